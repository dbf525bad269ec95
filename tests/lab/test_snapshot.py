"""Snapshots of what guests use: one instant, no failure, files back, and what guests may see of it.

A guest writes by its shell's own means: every process that it starts costs tens of milliseconds under emulation.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lab import MOUNT, Dom0, connect, scratch, wait_until

STORE = "/srv/xen9p"
NAME = "lab"  # what all snapshots of these tests begin with
EXPORT = ".lab-snap"
KEEP = "/tmp/policy.keep"
FILES = int(os.environ.get("XEN9P_FILES", "10000"))
"""The bar is meant for 100,000: making them takes two minutes under emulation, so they are for XEN9P_FILES=100000."""

# Appends a number to one file and then to the other, so the first has as many lines or one more. Ends with its log.
WRITER = """cd {path}; i=0
while [ -e run ]; do i=$((i+1)); echo $i >> a || echo failed >> log; echo $i >> b || echo failed >> log; done
echo done >> log"""

# The latency of small writes in ms: how many, median, maximum.
PROBE = """
import os, time
file, times, end = os.open({path!r}, os.O_WRONLY | os.O_CREAT), [], time.monotonic() + {seconds}
os.write(1, b"begun\\n")
while time.monotonic() < end:
    before = time.monotonic()
    os.pwrite(file, b"x" * 100, len(times) % 1000 * 100)
    times.append((time.monotonic() - before) * 1000)
times.sort()
print(len(times), times[len(times) // 2], times[-1])
"""


@pytest.fixture(autouse=True)
def clean(dom0: Dom0) -> Iterator[None]:
    """No snapshot of these tests is left, whatever happened."""
    yield
    for export in ("home", "g1-root"):
        for one in snapshot(dom0, "list", export)["snapshots"]:
            if one["name"].startswith(NAME):
                snapshot(dom0, "delete", export, one["name"])


def snapshot(dom0: Dom0, verb: str, *words: str) -> dict[str, Any]:
    """What `xen9p snapshot` says."""
    found: dict[str, Any] = json.loads(dom0.out(f"xen9p snapshot {verb} --json {shlex.join(words)}"))
    return found


def test_a_guests_exports_are_of_one_instant(dom0: Dom0) -> None:
    """A guest keeps an invariant across two files of an export that another one has too: it holds in each snapshot, and
    no write fails."""
    g1 = connect("g1")
    with scratch(g1, "/home/.snap") as path:
        g1.check_output(f"touch {path}/run {path}/a {path}/b")
        command = shlex.quote(WRITER.format(path=path))
        g1.check_output(f"nohup sh -c {command} > /dev/null 2>&1 < /dev/null &")
        wait_until("it writes", lambda: int(dom0.out(f"wc -l < {STORE}/home/.snap/b")) > 5, 20)
        pauses = []
        for number in range(4):
            made = snapshot(dom0, "create", "g1", f"{NAME}-{number}")
            assert {s["export"] for s in made["snapshots"]} == {"g1-root", "home"}
            assert made["devices"] >= 3, "g1's root, and home of both guests"
            pauses.append(made["pause_ms"])
        dom0.out(f"rm {STORE}/home/.snap/run")
        wait_until("it ends", lambda: "done" in g1.run(f"cat {path}/log").stdout, 20)
        assert g1.check_output(f"cat {path}/log") == "done"
        counts = []
        for number in range(4):
            folder = f"{STORE}/.snapshots/home/{NAME}-{number}/.snap"
            one, other = map(int, dom0.out(f"wc -l < {folder}/a; wc -l < {folder}/b").split())
            assert other <= one <= other + 1, f"snapshot {number}: {one} and {other} lines"
            assert dom0.out(f"tail -n 1 {folder}/a").strip() == str(one), "a line by half"
            counts.append(one)
        assert counts == sorted(counts)
        assert counts[-1] > counts[0], "the guest did not write between them"
        print(f"pauses in ms: {pauses}")


def test_what_changed_and_back_again(dom0: Dom0) -> None:
    g1 = connect("g1")
    with scratch(g1, "/home/.snap") as path:
        g1.check_output(f"cd {path} && seq 20000 > f && echo gone > gone && mkdir d && echo in > d/in")
        snapshot(dom0, "create", "home", f"{NAME}-a")
        g1.check_output(
            f"cd {path} && printf XYZ | dd of=f bs=1 seek=50000 conv=notrunc 2> /dev/null && rm -r gone d && echo n > n"
        )
        found = snapshot(dom0, "diff", "home", f"{NAME}-a")["exports"]["home"]
        mine = {c["path"].removeprefix(".snap/"): c for c in found if c["path"].startswith(".snap/")}
        assert {name: c["change"] for name, c in mine.items()} == {
            "f": "modified",
            "gone": "deleted",
            "d": "deleted",
            "d/in": "deleted",
            "n": "created",
        }
        assert mine["f"]["ranges"] == [[50000, 3]]

        assert snapshot(dom0, "restore", "home", f"{NAME}-a", ".snap/d", ".snap/gone")["changed"] is True
        assert g1.check_output(f"cat {path}/d/in {path}/gone").split() == ["in", "gone"]
        g1.check_output(f"(exec 3<> {path}/f; sleep 12) > /dev/null 2>&1 < /dev/null &")
        result = dom0.run(f"xen9p snapshot restore home {NAME}-a .snap/f")
        assert result.rc == 1
        assert "is open in a guest" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        snapshot(dom0, "restore", "--force", "home", f"{NAME}-a", ".snap")
        # Who has it open keeps the old one, and v9fs with it the name, also with cache=none.
        g1.check_output("pkill -f '[s]leep 12'; sleep 1")
        assert g1.check_output(f"ls {path}; seq 20000 | cmp - {path}/f && echo same").split() == [
            "d", "f", "gone", "same",
        ]  # fmt: skip
        assert snapshot(dom0, "restore", "home", f"{NAME}-a", ".snap")["changed"] is False


@pytest.mark.long
def test_bad_input_is_one_line(dom0: Dom0) -> None:
    snapshot(dom0, "create", "home", f"{NAME}-a")
    for words, says in (
        (f"create home {NAME}-a", "already"),
        ("create nobody", "nobody"),
        ("diff home none", "none"),
        ("create home 'a b'", "no name"),
        (f"restore home {NAME}-a", "is attached to guest"),
        (f"restore home {NAME}-a nothing/here", "has no nothing/here"),
        ("prune home", "every snapshot"),
    ):
        result = dom0.run(f"xen9p snapshot {words}")
        assert result.rc == 1, words
        assert says in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert [s["name"] for s in snapshot(dom0, "list", "home")["snapshots"]] == [f"{NAME}-a"]


@contextmanager
def own_export(dom0: Dom0) -> Iterator[str]:
    """A subvolume that g1 has as tag snap, and its snapshots as tag shown; its path on the host."""
    path = f"{STORE}/{EXPORT}"
    dom0.out(f"btrfs -q subvolume create {path} && cp /etc/xen9p/policy.toml {KEEP}")
    try:
        dom0.out(
            f'cat >> /etc/xen9p/policy.toml <<\'EOF\'\n[exports.labsnap]\npath = "{path}"\n[[rules]]\nguest = "g1"\n'
            'export = "labsnap"\ntag = "snap"\naccess = "rw"\nsnapshots = "shown"\nEOF\n'
            "xen9p policy check && systemctl reload xen9pd"
        )
        for tag in ("snap", "shown"):
            wait_until(f"{tag} is there", lambda tag=tag: dom0.device("g1", tag) is not None, 30)  # type: ignore[misc]
        yield path
    finally:
        dom0.run("for s in $(ls /srv/xen9p/.snapshots/labsnap); do xen9p snapshot delete labsnap $s; done")
        dom0.out(f"cp {KEEP} /etc/xen9p/policy.toml && systemctl reload xen9pd")
        for tag in ("snap", "shown"):
            dom0.run(f"xen9p detach g1 {tag}")
            wait_until("the device is gone", lambda tag=tag: dom0.device("g1", tag) is None, 20)  # type: ignore[misc]
        dom0.out(f"btrfs -q subvolume delete {path} && rmdir /srv/xen9p/.snapshots/labsnap")


@pytest.mark.long
def test_a_guest_sees_its_snapshots_and_waits_for_none(dom0: Dom0) -> None:
    """Of an export with many files: the guest's slowest write is at most 100 ms slower than its median one."""
    g1 = connect("g1")
    with own_export(dom0) as path:
        dom0.out(f"mkdir {path}/many && cd {path}/many && seq {FILES} | split -l 1 -a 6 -d - f && sync")
        g1.check_output(
            f"mkdir -p /mnt/snap /mnt/shown && {MOUNT},cache=none snap /mnt/snap && {MOUNT},cache=none shown /mnt/shown"
        )
        try:
            program = shlex.quote(PROBE.format(path="/mnt/snap/probe", seconds=10))
            g1.check_output(f"nohup python3 -c {program} > /tmp/probe 2>&1 < /dev/null &")
            wait_until("the guest writes", lambda: "begun" in g1.run("cat /tmp/probe").stdout, 30)
            made = [snapshot(dom0, "create", "labsnap", f"{NAME}-{number}") for number in range(3)]
            wait_until("the guest is done", lambda: len(g1.run("cat /tmp/probe").stdout.split()) == 4, 30)
            said = g1.check_output("cat /tmp/probe").split()
            median, slowest = float(said[2]), float(said[3])
            print(f"{said[1]} writes, median {median:.1f} ms, slowest {slowest:.1f} ms,", [m["pause_ms"] for m in made])
            assert slowest - median <= 100

            assert dom0.out(f"ls {STORE}/.snapshots/labsnap/{NAME}-0/many | wc -l").strip() == str(FILES)
            assert g1.check_output("ls /mnt/shown").split() == [f"{NAME}-{number}" for number in range(3)]
            assert g1.check_output(f"cat /mnt/shown/{NAME}-1/many/f000041") == "42"
            assert "Read-only" in g1.run(f"sh -c 'echo x > /mnt/shown/{NAME}-1/many/f000041'").stderr
            g1.check_output("echo changed > /mnt/snap/many/f000041")
            assert g1.check_output(f"cat /mnt/shown/{NAME}-1/many/f000041") == "42"
            found = snapshot(dom0, "diff", "labsnap", f"{NAME}-2")["exports"]["labsnap"]
            assert {c["path"] for c in found} - {"probe"} == {"many/f000041"}
        finally:
            g1.run("umount /mnt/snap; umount /mnt/shown; rmdir /mnt/snap /mnt/shown; rm -f /tmp/probe")


def test_systemd_makes_them_and_leaves_others_alone(dom0: Dom0) -> None:
    """The service has the rights that it takes, while a guest has the export attached; it keeps what it is told to."""
    unit = "xen9p-snapshot-labsnap"
    with own_export(dom0):
        snapshot(dom0, "create", "labsnap", NAME)
        said = dom0.out("xen9p snapshot schedule labsnap --on daily --keep-last 1").strip()
        try:
            assert said == "runs at daily"
            assert dom0.out(f"systemctl is-enabled {unit}.timer").strip() == "enabled"
            for _ in range(2):
                dom0.out(f"systemctl start {unit}.service || {{ journalctl -u {unit} -n 5 -o cat; false; }}")
            there = snapshot(dom0, "list", "labsnap")["snapshots"]
            assert [(s["name"] == NAME, s["reason"]) for s in there] == [(True, ""), (False, "schedule:labsnap")]
        finally:
            dom0.out("xen9p snapshot schedule labsnap --off")
        assert dom0.run(f"systemctl is-enabled {unit}.timer").rc != 0


def test_killed_in_the_middle_it_leaves_a_whole_store(dom0: Dom0) -> None:
    """The command dies while guests stand still: they go on, and no half of a snapshot is there."""
    g1 = connect("g1")
    for delay in ("0.3", "0.6", "1.2", "1.8"):
        dom0.run(f"xen9p snapshot create g1 {NAME}-killed & sleep {delay}; kill -9 $!; wait $! 2> /dev/null")
        g1.check_output("echo on > /home/.snap-on && rm /home/.snap-on")
        there = snapshot(dom0, "list", "g1")["snapshots"]
        assert len([s for s in there if s["name"] == f"{NAME}-killed"]) in (0, 2)
        dom0.run(f"xen9p snapshot delete g1 {NAME}-killed")
    snapshot(dom0, "create", "g1", f"{NAME}-killed")
    assert dom0.out(f"ls -A {STORE}/.snapshots/home {STORE}/.snapshots/g1-root | grep -c '^\\.' || true").strip() == "0"
