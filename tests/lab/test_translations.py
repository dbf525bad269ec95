"""`make translations` on real Xen, with two of its workloads, and sources that know nothing of each other.

It needs a guest of its own, so it takes minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import REPOSITORY, STATE, Dom0

WORK = ("read-4k-cold", "read-4k-warm")
SIDES = ("ours", "cached", "fuse", "block", "qdisk")
FILES, READS = 4, 64
"""How many files a cold count reads one page of, and how many pages a warm count reads."""
# What v9fs without a cache says for each of them: look up, attributes, a fid of its own, open, read, close, and forget.
V9FS = {"Twalk": 2, "Tgetattr": 1, "Tlopen": 1, "Tread": 1, "Tclunk": 2}

pytestmark = pytest.mark.long

Counted = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def run(dom0: Dom0, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of the playbook, as `make translations` starts it: its JSON."""
    folder = tmp_path_factory.mktemp("translations")
    given = {"translations_workloads": list(WORK), "bench_results_dir": str(folder), "testbed_name": STATE.name}
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "playbooks/translations.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg")}
    done = subprocess.run(
        [*command, "-e", json.dumps(given)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads((folder / "translations.json").read_text())
    return found


@pytest.fixture(scope="module")
def counts(run: dict[str, Any]) -> Counted:
    """(workload, side) -> what was counted."""
    parts = run["translations"]["parts"]
    found = {(one["workload"], one["side"]): one for part in parts for one in part["counts"]}
    assert set(found) == {(work, side) for work in WORK for side in SIDES} | {("idle", "ours")}
    assert not any(one["failed"] for one in found.values())
    return found


def test_a_cold_read_through_v9fs_takes_just_these_messages(counts: Counted) -> None:
    one = counts["read-4k-cold", "ours"]
    assert one["operations"] == FILES
    attached = one["messages"].pop("Tattach", 0)  # once, if the root's own fid went with the caches
    assert attached <= 1
    assert one["messages"] == {name: FILES * count for name, count in V9FS.items()}
    assert one["counts"]["requests"] == FILES * sum(V9FS.values()) + attached
    assert one["counts"]["ring_bytes"] == one["bytes"] == FILES * 4096


def test_a_warm_read_goes_over_the_ring_only_where_nothing_is_cached(counts: Counted) -> None:
    assert counts["read-4k-warm", "ours"]["messages"] == {"Tread": READS}
    for side in ("cached", "block", "qdisk"):
        assert counts["read-4k-warm", side]["counts"]["requests"] == 0, side
        assert counts["read-4k-warm", side]["counts"]["ring_bytes"] == 0, side


def test_guest_and_dom0_agree_on_what_went_over_the_ring(counts: Counted) -> None:
    for (work, side), one in counts.items():
        if work == "idle":
            continue
        for name in ("requests", "ring_bytes"):
            if name in one["checks"]:
                ours, theirs = one["checks"][name]
                assert ours == theirs, (work, side, name)
    # blkfront's disk as the guest's kernel counts it, and as its block events do.
    for side in ("block", "qdisk"):
        one = counts["read-4k-cold", side]
        assert one["counts"]["requests"] == sum(one["disk_done"][name] for name in ("reads", "writes", "flushes"))
        assert one["counts"]["requests"] >= FILES


def test_the_disks_steps_are_what_is_below_them(counts: Counted) -> None:
    steps = {(step["from"], step["to"]): step["count"] for step in counts["read-4k-cold", "block"]["steps"]}
    taken = steps["virtual disk sector", "ring"]
    assert steps["ring", "loop device byte"] == steps["loop device byte", "image offset"] == taken
    # Each of the files has a name to be looked up.
    assert steps["path", "guest inode"] == FILES


def test_notifications_and_switches_are_seen_from_both_sides(counts: Counted) -> None:
    for (work, side), one in counts.items():
        for name in ("sent_by_guest", "sent_by_dom0"):
            sent, came = one["checks"][name]
            # Several that are sent while one is pending come as one.
            assert came <= sent, (work, side, name)
        own, seen_by_xen = one["checks"]["switches_guest"]
        assert abs(own - seen_by_xen) <= max(8, own // 10), (work, side)
    for side in ("ours", "fuse"):
        one = counts["read-4k-warm", side]["counts"]
        assert one["sent_by_guest"] > 0
        assert one["sent_by_dom0"] > 0


def test_xens_own_trace_has_been_read(counts: Counted) -> None:
    for key, one in counts.items():
        assert "hypercalls_guest" in one["counts"], (key, one["left_out"])
        assert one["counts"]["hypercalls_dom0"] == sum(one["hypercalls"]["dom0"].values())
    # A request through the ring ends in a notification, and that is a hypercall.
    kinds = counts["read-4k-warm", "ours"]["hypercalls"]["guest"]
    assert kinds["evtchn_op"] >= counts["read-4k-warm", "ours"]["counts"]["sent_by_guest"]


def test_only_qemu_copies_by_grants(counts: Counted) -> None:
    for side in SIDES:
        copied = counts["read-4k-cold", side]["counts"]["grants_copied"]
        assert copied > 0 if side == "qdisk" else copied == 0, side


def test_the_bytes_are_where_the_ways_end_on_blkback_and_qdisk_too(run: dict[str, Any]) -> None:
    ways = {way["side"]: way for way in run["translations"]["ways"]}
    assert set(ways) == {"ours", "block", "qdisk"}
    assert all(way["there"] for way in ways.values())
    steps = {side: json.loads(way["json"])["translations"] for side, way in ways.items()}
    assert steps["block"] == steps["qdisk"] + 1
    assert steps["ours"] < steps["qdisk"]
    assert json.loads(ways["block"]["json"])["served"].startswith("blkback")
    assert json.loads(ways["qdisk"]["json"])["served"].startswith("QEMU")


def test_nothing_is_left(run: dict[str, Any], dom0: Dom0) -> None:
    assert "bench-full" not in dom0.out("xl list")
    assert dom0.run("grep -q 'BEGIN benchmark' /etc/xen9p/policy.toml").rc == 1
    assert dom0.run("ls -d /srv/xen9p/bench /run/xen9p-bench").stdout == ""
    assert dom0.run("pgrep -x xentrace").stdout == ""
    assert "/run/xen9p-bench" not in dom0.out("cat /proc/mounts")
    look = "mount -t tracefs tracefs {0} && ls {0}/instances && cat {0}/kprobe_events; umount {0}; rmdir {0}"
    assert "xen9p" not in dom0.out("mkdir /tmp/left && " + look.format("/tmp/left"))
