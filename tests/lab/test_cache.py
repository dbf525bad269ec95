"""Caching on the host: what is in dom0's memory, boots that are learned and foreseen, streams, clones with one copy.

The tests of boots restart guests and take the host's page cache; they come last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest

from lab import GUESTS, Dom0, connect, drop_connection, wait_for_sshd, wait_until

MIB = 1 << 20
ROOTS = "/srv/xen9p/guests"
FILES = ("cache-test-read", "cache-test-other")
POLICY = "/etc/xen9p/policy.toml"


def show(dom0: Dom0, words: str = "") -> dict[str, Any]:
    """`xen9p cache show --json`."""
    found: dict[str, Any] = json.loads(dom0.out(f"xen9p cache show --json {words} 2>/dev/null"))
    return found


def device(dom0: Dom0, guest: str, tag: str) -> dict[str, Any]:
    """What is counted of a guest's device."""
    (found,) = (d for d in show(dom0, f"{guest} --quick")["devices"] if (d["guest"], d["tag"]) == (guest, tag))
    return dict(found)


def resident(dom0: Dom0, path: str) -> int:
    """Bytes of a file on the host that are in its page cache."""
    return int(show(dom0, f"--quick --file {path}")["files"][0]["resident_bytes"])


def drop(dom0: Dom0) -> None:
    """Empties the host's page cache of everything that is on the disk."""
    dom0.out("sync; echo 3 > /proc/sys/vm/drop_caches")


def restart(dom0: Dom0, guest: str, *, cold: bool) -> float:
    """Shuts a guest down and starts it again; seconds from its creation until ssh answers."""
    dom0.out(f"xl shutdown -w {guest}")
    drop_connection(guest)
    wait_until(f"{guest} is gone", lambda: dom0.domid(guest) is None, 120)
    wait_until("its devices are gone", lambda: dom0.device(guest, "root") is None, 60)
    if cold:
        drop(dom0)
    began = time.monotonic()
    dom0.out(f"xl create /etc/xen/{guest}.cfg")
    wait_for_sshd(dom0, guest, 300)
    return time.monotonic() - began


@pytest.fixture
def files(dom0: Dom0) -> Iterator[tuple[str, str]]:
    """Two files in the shared home, on the disk and not in memory: their names there."""
    for name in FILES:
        dom0.out(f"head -c {2 * MIB} /dev/urandom > /srv/xen9p/home/{name}; sync /srv/xen9p/home/{name}")
    drop(dom0)
    try:
        yield FILES
    finally:
        dom0.run("rm -f " + " ".join(f"/srv/xen9p/home/{name}" for name in FILES))


def test_what_a_guest_has_read_is_in_memory_and_nothing_else(dom0: Dom0, files: tuple[str, str]) -> None:
    read, other = files
    connect("g1").check_output(f"cat /home/{read} > /dev/null")
    (home,) = show(dom0, "home --top 1000")["exports"]
    there = {PurePosixPath(one["path"]).name: one["resident"] for one in home["top"]}
    assert there[read] == 2 * MIB == resident(dom0, f"/srv/xen9p/home/{read}")
    assert other not in there
    assert {"g1", "g2"} <= set(home["guests"])


def test_the_second_read_hits(dom0: Dom0, files: tuple[str, str]) -> None:
    """Of whichever guest: the export is shared, and so is the copy."""
    read, _ = files
    before = device(dom0, "g1", "home")
    connect("g1").check_output(f"cat /home/{read} > /dev/null")
    first = device(dom0, "g1", "home")
    assert first["read_misses"] > before["read_misses"]
    other = device(dom0, "g2", "home")
    connect("g2").check_output(f"cat /home/{read} > /dev/null")
    second = device(dom0, "g2", "home")
    assert second["hit_bytes"] - other["hit_bytes"] == 2 * MIB
    assert second["read_misses"] == other["read_misses"]
    assert f'xen9p_read_hits_total{{guest="g2",tag="home",export="home"}} {second["read_hits"]}' in dom0.out(
        "xen9p metrics"
    )


@pytest.mark.long
def test_a_stream_leaves_another_guests_files_in_memory(dom0: Dom0, files: tuple[str, str]) -> None:
    """A file that is read from begin to end does not stay, and pages of it that were there before do."""
    hot, _ = files
    big = "/srv/xen9p/home/cache-test-stream"
    dom0.out(f"head -c {128 * MIB} /dev/urandom > {big}; sync {big}")
    try:
        drop(dom0)
        connect("g2").check_output(f"cat /home/{hot} > /dev/null")
        before = device(dom0, "g1", "home")
        connect("g1").check_output("cat /home/cache-test-stream | sha256sum")
        after = device(dom0, "g1", "home")
        assert after["streams"] == before["streams"] + 1
        assert after["dropped_bytes"] - before["dropped_bytes"] > 64 * MIB
        assert resident(dom0, big) < 48 * MIB
        assert resident(dom0, f"/srv/xen9p/home/{hot}") == 2 * MIB
        again = device(dom0, "g2", "home")
        connect("g2").check_output(f"cat /home/{hot} > /dev/null")
        assert device(dom0, "g2", "home")["read_misses"] == again["read_misses"]
    finally:
        dom0.run(f"rm -f {big}")


def test_one_copy_serves_the_roots_of_all_guests(dom0: Dom0) -> None:
    """A file of the golden tree that no guest has changed: read by both, it is in memory once."""
    name = "usr/bin/perl" if dom0.run(f"test -f {ROOTS}/g1/usr/bin/perl").rc == 0 else "usr/bin/journalctl"
    drop(dom0)
    origins = show(dom0, "g1-root --quick")["origins"]
    assert len(origins) == 1, "g1's root has no golden tree that is read-only"
    for guest in GUESTS:
        connect(guest).check_output(f"echo 3 > /proc/sys/vm/drop_caches; cat /{name} > /dev/null")
    assert resident(dom0, f"{origins[0]['path']}/{name}") > 0
    assert [resident(dom0, f"{ROOTS}/{guest}/{name}") for guest in GUESTS] == [0, 0]
    assert all(device(dom0, guest, "root")["shared_bytes"] > 0 for guest in GUESTS)


def test_a_change_of_a_shared_file_is_seen_at_once(dom0: Dom0) -> None:
    """A guest changes a file of its golden tree: it reads its own, and the other one the old one."""
    name, g1, g2 = "etc/issue", connect("g1"), connect("g2")
    for guest in (g1, g2):
        guest.check_output(f"echo 3 > /proc/sys/vm/drop_caches; cat /{name} > /dev/null")
    old = g2.check_output(f"cat /{name}")
    before = g1.check_output(f"cat /{name}")
    g1.check_output(f"echo changed > /{name}; sync")
    try:
        assert g1.check_output(f"echo 3 > /proc/sys/vm/drop_caches; cat /{name}").strip() == "changed"
        assert g2.check_output(f"echo 3 > /proc/sys/vm/drop_caches; cat /{name}") == old
        assert dom0.out(f"cat {ROOTS}/g1/{name}").strip() == "changed"
    finally:
        g1.check_output(f"printf '%s\\n' '{before.strip()}' > /{name}")


@pytest.mark.long
def test_a_guest_with_a_weight_has_a_cgroup(dom0: Dom0) -> None:
    """Its workers are in a scope of systemd's below xen9p.slice; without one they are the service's."""
    dom0.out(f"cp -p {POLICY} {POLICY}.test")
    try:
        dom0.out(rf"""sed -i '/^tag = "course"$/a cache = {{ weight = 300 }}' {POLICY}; systemctl reload xen9pd""")
        dom0.out("xen9p detach g1 course")
        dom0.out("xen9p attach g1 course")
        pid = dom0.pid("g1", "course")
        path = f"/proc/{pid}/cgroup"
        wait_until("it is in its scope", lambda: "/xen9p.slice/xen9p-g1-" in dom0.out(f"cat {path}"), 60)
        scope = dom0.out(f"cut -d: -f3 {path}").strip()
        assert int(dom0.out(f"cat /sys/fs/cgroup{scope}/memory.low")) > 0
        assert "xen9pd.service" in dom0.out(f"cat /proc/{dom0.pid('g2', 'course')}/cgroup")
        # It outlives a restart of the service, and the service starts.
        dom0.out("systemctl restart xen9pd")
        assert dom0.pid("g1", "course") == pid
    finally:
        dom0.out(f"mv {POLICY}.test {POLICY}; systemctl reload xen9pd")
        dom0.out("xen9p detach g1 course; xen9p attach g1 course")
        connect("g1").run("umount -l /course; mount /course")


@pytest.mark.long
def test_a_boot_is_learned_and_the_next_guest_is_foreseen(dom0: Dom0) -> None:
    """From g1's boot to g2's: the files are in memory before g2 has asked for anything."""
    dom0.run("xen9p cache forget --all")
    first = restart(dom0, "g1", cold=True)
    wait_until("g1's boot is learned", lambda: bool(show(dom0, "--quick")["profiles"]), 180)
    (profile,) = show(dom0, "--quick")["profiles"]
    assert profile["problem"] is None
    assert profile["guest"] == "g1"
    kept = json.loads(dom0.out(f"cat /var/lib/xen9p/cache/{profile['image']}.json"))["files"]
    names = {row[0] for row in kept}
    assert profile["files"] == len(names) > 50
    assert any(name.endswith("systemd") for name in names), "a boot starts systemd"
    # Shared origins would have g1's copies serve g2: both roots' memory goes.
    second = restart(dom0, "g2", cold=True)
    found = device(dom0, "g2", "root")
    assert found["ahead"]["ahead_files"] > 50
    assert found["ahead"]["ahead_bytes"] > MIB
    assert found["ahead"]["gains"]["profile_used_bytes"] > 0
    print(f"first boot {first:.1f} s, second {second:.1f} s (times of one run)")


@pytest.mark.long
def test_what_was_foreseen_is_there_before_the_guest_asks(dom0: Dom0) -> None:
    """A domain that is built and still paused: its worker reads ahead while its kernel has not run yet."""
    dom0.out("xl shutdown -w g2")
    drop_connection("g2")
    wait_until("g2 is gone", lambda: dom0.domid("g2") is None and dom0.device("g2", "root") is None, 120)
    drop(dom0)
    dom0.out("xl create -p /etc/xen/g2.cfg")
    try:
        image = show(dom0, "g2-root --quick")["exports"][0]["image"]
        rows = json.loads(dom0.out(f"cat /var/lib/xen9p/cache/{image}.json"))["files"]
        name = next(row[0] for row in rows if len(row) > 1 and row[0].startswith("usr/lib/x86_64-linux-gnu/"))
        origin = show(dom0, "g2-root --quick")["origins"][0]["path"]
        places = [f"{origin}/{name}", f"{ROOTS}/g2/{name}"]
        wait_until(f"{name} is in memory", lambda: any(resident(dom0, place) for place in places), 60)
        assert dom0.device("g2", "root")["requests"] == 0  # type: ignore[index]
    finally:
        dom0.out("xl unpause g2")
        wait_for_sshd(dom0, "g2", 300)


@pytest.mark.long
def test_switched_off_nothing_is_read_ahead(dom0: Dom0) -> None:
    dom0.out(f"cp -p {POLICY} {POLICY}.test")
    try:
        dom0.out(f"""sed -i 's/"prefetch" = true/"prefetch" = false/' {POLICY}; systemctl reload xen9pd""")
        restart(dom0, "g2", cold=True)
        assert device(dom0, "g2", "root")["ahead"] is None
    finally:
        dom0.out(f"mv {POLICY}.test {POLICY}; systemctl reload xen9pd")


def test_bad_input_is_one_line(dom0: Dom0) -> None:
    for command, words in (
        ("show nothing", "unknown export or guest nothing"),
        ("learn nobody", "no guest nobody is running"),
        ("learn g1 --tag course", "wants nothing learned"),
        ("forget 0b1c2d3e-0000-4000-8000-00000000000a", "nothing is known of"),
        ("forget", "say of what to forget"),
    ):
        result = dom0.run(f"xen9p cache {command}")
        assert result.rc == 1, command
        assert words in result.stderr, command
        assert len(result.stderr.strip().splitlines()) == 1, command


@pytest.mark.long
def test_a_profile_that_somebody_has_changed_is_not_used(dom0: Dom0) -> None:
    """It is left as it is, and one line says what to do; the guest boots as without."""
    image = show(dom0, "g2-root --quick")["exports"][0]["image"]
    path = f"/var/lib/xen9p/cache/{image}.json"
    dom0.out(f'echo \'{{"format": 1, "files": [["../../etc/shadow", 0, 1]]}}\' > {path}')
    try:
        restart(dom0, "g2", cold=False)
        assert "is no profile" in dom0.out(
            "journalctl -u xen9pd -n 200 --no-pager -o cat | grep 'read ahead' | tail -1"
        )
        assert device(dom0, "g2", "root")["ahead"]["ahead_files"] == 0
        assert "../../etc/shadow" in dom0.out(f"cat {path}")
    finally:
        dom0.out(f"xen9p cache forget {image}")
