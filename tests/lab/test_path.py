"""The way of a byte, from a guest's file to the device of the store: what it ends at is read there."""

from __future__ import annotations

import json
from typing import Any

from lab import Dom0, connect, scratch, wait_until

OFFSET = 8192


def followed(dom0: Dom0, arguments: str) -> dict[str, Any]:
    """`xen9p path --json`."""
    found: dict[str, Any] = json.loads(dom0.out(f"xen9p path {arguments} --json"))
    return found


def point(way: dict[str, Any], space: str) -> dict[str, Any]:
    """The first point that a step leads to in a space of names or numbers."""
    found: dict[str, Any] = next(step["to"] for step in way["steps"] if step["to"]["space"] == space)
    return found


def test_the_bytes_are_where_the_way_ends(dom0: Dom0) -> None:
    g1 = connect("g1")
    with scratch(g1, "/home/path"):
        g1.check_output("head -c 65536 /dev/urandom > /home/path/x && sync")
        dom0.out("sync")
        expected = g1.check_output(f"tail -c +{OFFSET + 1} /home/path/x | head -c 64 | sha256sum")
        way = followed(dom0, f"g1:home:/path/x --offset {OFFSET}")
        device, byte = way["device"]["device"], way["device"]["byte"]
        assert byte % 4096 == 0, way
        read = f"dd if={device} bs=4096 skip={byte // 4096} count=1 iflag=direct status=none | head -c 64 | sha256sum"
        assert dom0.out(read) == expected
        inode = int(dom0.out("stat -c %i /srv/xen9p/home/path/x"))
        assert point(way, "inode")["inode"] == inode
        assert way["translations"] == sum(step["from"]["space"] != step["to"]["space"] for step in way["steps"])


def test_the_rings_are_those_in_xenstore(dom0: Dom0) -> None:
    g1 = connect("g1")
    device = dom0.device("g1", "home")
    assert device is not None
    front = f"/local/domain/{device['domid']}/device/9pfs/{device['devid']}"
    with scratch(g1, "/home/path"):
        g1.check_output("echo there > /home/path/x && sync")
        rings = point(followed(dom0, "g1:home:/path/x"), "ring")["rings"]
    assert len(rings) == int(dom0.store(f"{front}/num-rings") or 0)
    for ring in rings:
        assert str(ring["ring-ref"]) == dom0.store(f"{front}/ring-ref{ring['ring']}")
        assert str(ring["event-channel"]) == dom0.store(f"{front}/event-channel-{ring['ring']}")
        # Seen in how much of the grant device the worker maps.
        assert 1 <= ring["order"] <= 9, rings


def test_a_real_request_is_shown(dom0: Dom0) -> None:
    g1 = connect("g1")
    with scratch(g1, "/home/path"), scratch(dom0.host, "/tmp/path"):
        g1.check_output("head -c 65536 /dev/urandom > /home/path/x && sync")
        command = f"xen9p path g1:home:/path/x --offset {OFFSET} --wait 120 --json"
        dom0.out(f"nohup {command} > /tmp/path/out 2> /tmp/path/err < /dev/null & echo started")
        wait_until("it waits", lambda: "waiting" in dom0.out("cat /tmp/path/err"), 60)
        g1.check_output("echo 3 > /proc/sys/vm/drop_caches; cat /home/path/x > /dev/null")
        wait_until("it has seen one", lambda: "translations" in dom0.out("cat /tmp/path/out"), 60)
        way = json.loads(dom0.out("cat /tmp/path/out"))
    request = next(step["from"] for step in way["steps"] if step["from"]["space"] == "9P request")
    assert request["type"] == "Tread", request
    assert request["offset"] <= OFFSET < request["offset"] + request["count"]
    ring = point(way, "ring")
    # Linux takes the ring by the tag.
    assert ring["ring"] == request["tag"] % len(ring["rings"])
    assert ring["ns"]["total"] > 0
    assert point(way, "fid")["fid"] == request["fid"]


def test_what_cannot_be_followed_is_one_line(dom0: Dom0) -> None:
    for arguments, word in (
        ("nobody:/x", "nobody"),
        ("g1:nothing:/x", "nothing"),
        ("g1:home:/nothing", "No such file"),
        ("g1:/etc", "directory"),
        ("g1:/x --disk xvda", "no disk xvda"),
    ):
        result = dom0.run(f"xen9p path {arguments}")
        assert result.rc == 1
        assert word in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
