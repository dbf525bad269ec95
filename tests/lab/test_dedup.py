"""De-duplication on the host while guests run: what two of them wrote by themselves becomes one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from lab import GUESTS, Dom0, connect

MIB = 1 << 20
SIZE = 8 * MIB
FILE = "var/tmp/dedup-test"
EXPORTS = "g1-root g2-root"
RUN = f"xen9p dedup run {EXPORTS} --settle 0 --json"


@pytest.fixture
def digest(dom0: Dom0) -> Iterator[str]:
    """The same file in both guests' roots, written by each; what it holds, as sha256sum says it."""
    dom0.out(f"head -c {SIZE} /dev/urandom > /srv/xen9p/home/dedup-seed")
    try:
        found = dom0.out("sha256sum < /srv/xen9p/home/dedup-seed").strip()
        for guest in GUESTS:
            connect(guest).check_output(f"cat /home/dedup-seed > /{FILE} && sync /{FILE}")
        dom0.out("rm /srv/xen9p/home/dedup-seed")
        yield found
    finally:
        dom0.run("rm -f /srv/xen9p/home/dedup-seed")
        for guest in GUESTS:
            connect(guest).run(f"rm -f /{FILE}")


def run(dom0: Dom0) -> dict[str, Any]:
    """What one run did, all trees together."""
    (store,) = json.loads(dom0.out(RUN))["stores"]
    total: dict[str, Any] = store["total"]
    return total


def blocks(dom0: Dom0, guest: str) -> list[list[int]]:
    """Where the file is on the host's disk, as [first, last] of 4 KiB blocks; what follows each other is one."""
    shown = dom0.out(
        f"filefrag -v -b4096 /srv/xen9p/guests/{guest}/{FILE} | awk '$1 ~ /^[0-9]+:/ {{print $4, $5}}' | tr -d .:"
    )
    found: list[list[int]] = []
    for line in shown.splitlines():
        first, last = map(int, line.split())
        if found and found[-1][1] + 1 == first:
            found[-1][1] = last
        else:
            found.append([first, last])
    return found


def same(digest: str) -> None:
    """Both guests read it anew, and find it as they wrote it."""
    for guest in GUESTS:
        out = connect(guest).check_output(f"echo 3 > /proc/sys/vm/drop_caches; sha256sum < /{FILE}")
        assert out.strip() == digest, guest


def test_what_two_guests_wrote_is_shared(dom0: Dom0, digest: str) -> None:
    dom0.out(f"sync -f /srv/xen9p/guests/g1/{FILE}")
    assert blocks(dom0, "g1") != blocks(dom0, "g2")
    found = run(dom0)
    assert found["shared"] >= SIZE
    assert blocks(dom0, "g1") == blocks(dom0, "g2") != []
    same(digest)
    # What is read now is what the guests have written meanwhile, and metadata.
    again = run(dom0)
    assert again["data"] < MIB
    assert again["scanned"] < 4 * MIB
    # Who writes to it has a copy of that, and the other does not see it.
    connect("g1").check_output(f"printf x | dd of=/{FILE} conv=notrunc,fsync status=none")
    assert connect("g2").check_output(f"sha256sum < /{FILE}").strip() == digest
    (store,) = json.loads(dom0.out("xen9p dedup status --json"))["stores"]
    trees = {tree["name"]: tree for tree in store["trees"]}
    assert trees["g1-root"]["saved"] + trees["g2-root"]["saved"] >= SIZE
    assert trees["g1-root"]["guests"] == ["g1"]


def test_a_run_that_is_killed(dom0: Dom0, digest: str) -> None:
    """While it shares: the guests notice nothing, and the next run goes on."""
    dom0.out(
        f"rm -f /var/lib/xen9p/dedup/progress; nohup {RUN} --limit 1M > /dev/null 2>&1 & pid=$!;"
        " for n in $(seq 300); do test -e /var/lib/xen9p/dedup/progress && break; sleep 0.2; done;"
        " sleep 2; kill -9 $pid; wait $pid; true"
    )
    same(digest)
    run(dom0)
    assert blocks(dom0, "g1") == blocks(dom0, "g2")
    same(digest)


def test_bad_input_is_one_line(dom0: Dom0) -> None:
    result = dom0.run("xen9p dedup run nothing")
    assert result.rc == 1
    assert "unknown export nothing" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.long
def test_systemd_runs_it(dom0: Dom0) -> None:
    """The service has the rights that it takes, and no more."""
    dom0.out("xen9p dedup schedule --on daily --limit 50M")
    try:
        assert dom0.out("xen9p dedup schedule --on daily --limit 50M").strip() == "runs at daily, as before"
        assert dom0.out("systemctl is-enabled xen9p-dedup.timer").strip() == "enabled"
        dom0.out("systemctl start xen9p-dedup.service")
        assert "together" in dom0.out("journalctl -u xen9p-dedup.service -n 30 --no-pager -o cat")
    finally:
        dom0.out("xen9p dedup schedule --off")
    assert dom0.run("systemctl is-enabled xen9p-dedup.timer").rc != 0
