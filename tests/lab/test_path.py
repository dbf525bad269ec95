"""The way of a byte, from a guest's file to the device of the store: what it ends at is read there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lab import Dom0, connect, scratch, wait_until

OFFSET = 8192
IMAGE = "/srv/xen9p/.lab-path.img"
TWIN = "lab-path"


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


@contextmanager
def image(dom0: Dom0) -> Iterator[str]:
    """An ext4 on the store with the file /d/x, which is on the disk; the sum of some of its bytes."""
    with scratch(dom0.host, "/tmp/path"):
        dom0.out("mkdir /tmp/path/d && head -c 65536 /dev/urandom > /tmp/path/d/x && rm -f " + IMAGE)
        dom0.out(f"truncate -s 32M {IMAGE} && mke2fs -q -F -t ext4 -d /tmp/path {IMAGE} && sync")
        try:
            yield dom0.out(f"tail -c +{OFFSET + 1} /tmp/path/d/x | head -c 64 | sha256sum")
        finally:
            dom0.out(f"rm -f {IMAGE}")


def at_end(dom0: Dom0, way: dict[str, Any]) -> str:
    """The sum of the bytes on the device where a way ends."""
    device, byte = way["device"]["device"], way["device"]["byte"]
    read = f"dd if={device} bs=4096 skip={byte // 4096} count=1 iflag=direct status=none"
    return dom0.out(f"{read} | tail -c +{byte % 4096 + 1} | head -c 64 | sha256sum")


def assert_request_is_seen(dom0: Dom0, device: str, sector: int) -> None:
    """With --wait the request for a byte of g1's disk shows up on the loop device, when the guest reads it anew."""
    g1 = connect("g1")
    mounted = dom0.run("test -d /sys/kernel/tracing/instances").rc == 0
    with scratch(dom0.host, "/tmp/wait"):
        try:
            if not mounted:
                dom0.out("mount -t tracefs tracefs /sys/kernel/tracing")
            command = f"xen9p path g1:/d/x --disk xvdk --offset {OFFSET} --wait 60 --json"
            dom0.out(f"nohup {command} > /tmp/wait/out 2> /tmp/wait/err < /dev/null & echo started")
            wait_until("it waits", lambda: "waiting" in dom0.out("cat /tmp/wait/err"), 60)
            g1.check_output("echo 3 > /proc/sys/vm/drop_caches; cat /run/path/d/x > /dev/null")
            wait_until("it has ended", lambda: "translations" in dom0.out("cat /tmp/wait/out"), 90)
            notes = " ".join(json.loads(dom0.out("cat /tmp/wait/out"))["notes"])
            assert dom0.out("ls /sys/kernel/tracing/instances") == ""
        finally:
            if not mounted:
                dom0.run("umount /sys/kernel/tracing")
    seen = re.search(rf"seen on {device}: R\w*, sectors (\d+) to (\d+), issued by", notes)
    assert seen, notes
    assert int(seen[1]) <= sector <= int(seen[2])


def test_the_bytes_of_a_disk_on_blkback_are_where_the_way_ends(dom0: Dom0) -> None:
    g1 = connect("g1")
    with image(dom0) as expected:
        dom0.out(f"xl block-attach g1 format=raw,vdev=xvdk,access=w,target={IMAGE}")
        try:
            wait_until("the guest has the disk", lambda: g1.run("test -b /dev/xvdk").rc == 0, 30)
            g1.check_output("modprobe ext4 && mkdir -p /run/path && mount -t ext4 /dev/xvdk /run/path")
            read = f"tail -c +{OFFSET + 1} /run/path/d/x | head -c 64 | sha256sum"
            assert g1.check_output(read) == expected
            way = followed(dom0, f"g1:/d/x --disk xvdk --offset {OFFSET}")
            assert at_end(dom0, way) == expected
            assert way["served"].startswith("blkback")
            inode = int(g1.check_output("stat -c %i /run/path/d/x"))
            assert point(way, "guest inode")["inode"] == inode
            ring = point(way, "ring")
            front = f"/local/domain/{dom0.domid('g1')}/device/vbd/51872"
            assert ring["protocol"]["event-channel"] == dom0.store(f"{front}/event-channel")
            loop = point(way, "loop device byte")
            assert dom0.out(f"losetup -n -O BACK-FILE {loop['device']}").strip() == IMAGE
            assert_request_is_seen(dom0, loop["device"], loop["sector"])
        finally:
            g1.run("umount /run/path; rmdir /run/path")
            dom0.run("xl block-detach g1 xvdk")
            wait_until("the disk is gone", lambda: "51872" not in dom0.out("xl block-list g1"), 30)
            wait_until("the loop device is gone", lambda: IMAGE not in dom0.out("losetup -l"), 30)


def test_the_bytes_of_a_disk_on_qdisk_are_where_the_way_ends(dom0: Dom0) -> None:
    """Of a guest that stands still from the start: its QEMU and its nodes in XenStore are there, and that is enough."""
    config = (
        f'name = "{TWIN}"\ntype = "pv"\nmemory = 128\nvcpus = 1\n'
        'kernel = "/tmp/twin/vmlinuz"\nextra = "console=hvc0"\n'
        f'disk = ["format=raw,vdev=xvda,access=w,backendtype=qdisk,target={IMAGE}"]\n'
    )
    with image(dom0) as expected, scratch(dom0.host, "/tmp/twin"):
        dom0.out("cp $(ls -t /srv/xen9p/boot/*/vmlinuz | head -1) /tmp/twin/vmlinuz")
        dom0.out(f"printf '%s' '{config}' > /tmp/twin/cfg")
        try:
            dom0.out("xl create -q -p /tmp/twin/cfg")
            way = followed(dom0, f"{TWIN}:/d/x --disk xvda --offset {OFFSET}")
            assert at_end(dom0, way) == expected
            assert way["served"].startswith("QEMU")
            spaces = [step["to"]["space"] for step in way["steps"]]
            assert "image offset" in spaces
            assert "loop device byte" not in spaces
        finally:
            dom0.run(f"xl destroy {TWIN}")
            wait_until("the guest is gone", lambda: TWIN not in dom0.out("xl list"), 30)


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
