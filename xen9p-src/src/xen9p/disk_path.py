"""The way over a block device: from a path on the guest's ext4 to a byte of the store's device, as dom0 can see it.

The guest's half is read from the image itself, see ext4_image.py. The device is in XenStore: "vbd" is blkback, with a
loop device under it if the disk is a file; "qdisk" is QEMU in user space, which reads the file itself. Source:
xen/io/blkif.h. A guest writes its frontend's directory: what is in there is shown escaped, and used for nothing.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xen9p import blocktrace, store_path
from xen9p.blocktrace import Issue
from xen9p.errors import Xen9pError
from xen9p.escape import escape
from xen9p.ext4_image import Ext4Image, Inode, Lookup
from xen9p.file_path import Nodes, Target, check_offset, missing, no_file
from xen9p.path import (
    DEVICE,
    FILE_BLOCK,
    GUEST_BLOCK,
    GUEST_INODE,
    IMAGE,
    LOOP,
    OFFSET,
    PATH,
    RING,
    SECTOR,
    Point,
    Way,
    look,
)

BACKENDS: Final = {"vbd": "blkback", "qdisk": "QEMU (qdisk)"}
_LOCAL: Final = "/local/domain"
_LOOP_MAJOR: Final = 7
_RAW: Final = ("aio", "raw")
"""How QEMU is told of an image with no format of its own."""
_PROTOCOL: Final = (
    "ring-ref", "ring-page-order", "event-channel", "multi-queue-num-queues", "protocol", "feature-persistent",
    *(f"ring-ref{i}" for i in range(16)),
)  # fmt: skip
_QUEUES: Final = 16


@dataclass(frozen=True, slots=True)
class Waiting:
    """For how many seconds to look for a real request, what to call when that begins, and where tracefs is."""

    seconds: float
    ready: Callable[[], None] = lambda: None
    tracing: Path = blocktrace.TRACING


@dataclass(frozen=True, slots=True)
class Disk:
    """A guest's block device and what is behind it.

    Attributes:
        kind: "vbd" or "qdisk".
        image: what holds its bytes: a file, or a block device.
        loop: the loop device between blkback and that file, if there is one.
        loop_offset: bytes of the file before the loop device's begin.
        protocol: what both ends published, by node.
    """

    guest: str
    domid: int
    devid: int
    name: str
    kind: str
    image: str
    loop: str
    loop_offset: int
    protocol: dict[str, str]

    @property
    def served(self) -> str:
        """Who serves it, in words."""
        return f"{BACKENDS[self.kind]}, {escape(os.fsencode(self.image))}"

    @property
    def front(self) -> str:
        """The frontend's directory in XenStore."""
        return f"{_LOCAL}/{self.domid}/device/vbd/{self.devid}"


def find(guest: str, name: str, store: Nodes) -> Disk:
    """A guest's disk by its name in the guest (xvda), with its image.

    Raises:
        Xen9pError: there is no such guest or disk, or its image is of a kind that is not followed.
    """
    names = {d: store.read(f"{_LOCAL}/{d}/name") for d in store.children(_LOCAL) if d.isdigit() and d != "0"}
    domids = [int(d) for d, named in names.items() if named == guest]
    if not domids:
        running = ", ".join(sorted(n for n in names.values() if n)) or "none"
        raise Xen9pError(f"there is no guest {escape(guest.encode())}", f"running: {running}")
    there = []
    for kind in BACKENDS:
        folder = f"{_LOCAL}/0/backend/{kind}/{domids[0]}"
        for devid in store.children(folder):
            named = store.read(f"{folder}/{devid}/dev") or ""
            there.append(named)
            if named == name and devid.isdigit():
                image, loop, begin = _below(f"{folder}/{devid}", kind, name, store)
                front = f"{_LOCAL}/{domids[0]}/device/vbd/{devid}"
                protocol = _protocol(front, f"{folder}/{devid}", store)
                return Disk(guest, domids[0], int(devid), name, kind, image, loop, begin, protocol)
    raise Xen9pError(
        f"{guest} has no disk {escape(name.encode())}",
        f"it has: {', '.join(sorted(there)) or 'none'}; see: xl block-list",
    )


def _protocol(front: str, back: str, store: Nodes) -> dict[str, str]:
    queues = [f"queue-{i}/{key}" for i in range(_QUEUES) for key in ("ring-ref", "event-channel")]
    nodes = [(front, key) for key in (*_PROTOCOL, *queues)]
    nodes += [(back, key) for key in ("sector-size", "sectors", "feature-max-indirect-segments")]
    return {key: value for folder, key in nodes if (value := store.read(f"{folder}/{key}")) is not None}


def _below(back: str, kind: str, name: str, store: Nodes) -> tuple[str, str, int]:
    """Image, loop device or "", and the offset of the loop device in the image."""
    params = store.read(f"{back}/params") or ""
    physical = store.read(f"{back}/physical-device") or ""
    if kind == "qdisk":
        form, colon, path = params.partition(":")
        if not colon or form not in _RAW:
            raise Xen9pError(f"the image of {name} is {escape(params.encode())}", "only raw images are followed")
        params, physical = path, ""
    try:
        about = os.stat(params)
    except (OSError, ValueError):
        raise Xen9pError(
            f"the image of {name} cannot be found: {escape(params.encode()) or 'no params in XenStore'}",
            "is the backend in dom0? see: xl block-list",
        ) from None
    number = about.st_rdev if stat.S_ISBLK(about.st_mode) else _number(physical)
    if number is None or os.major(number) != _LOOP_MAJOR:
        return params, "", 0
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    try:
        image = (folder / "loop" / "backing_file").read_text().removesuffix("\n")
        offset = int((folder / "loop" / "offset").read_text())
    except (OSError, ValueError):
        raise Xen9pError(f"the loop device of {name} has no file", "see: losetup -a") from None
    if not os.path.isfile(image):
        raise Xen9pError(f"the file of the loop device of {name} is gone: {escape(image.encode())}", "see: losetup -a")
    return image, f"/dev/{folder.resolve().name}", offset


def _number(text: str) -> int | None:
    """A device's number as a hotplug script writes it: major and minor in hexadecimal."""
    try:
        major, minor = text.split(":")
        return os.makedev(int(major, 16), int(minor, 16))
    except ValueError:
        return None


def follow(
    target: Target,
    name: str,
    offset: int,
    store: Nodes,
    *,
    wait: Waiting | None = None,
) -> Way:
    """The way of a byte at an offset of a file on a guest's disk, with a request that passes if *wait* is given.

    Raises:
        Xen9pError: no such guest, disk or file; the file is no regular one or is shorter; no ext4, no debugfs.
    """
    disk = find(target.guest, name, store)
    shown = escape(target.path)
    way = Way("block", disk.served, disk.guest, disk.name, shown, offset)
    # The filesystem begins where the guest's disk does, which is not where a loop device's file does.
    image = Ext4Image(disk.loop or disk.image)
    try:
        inode, lookups = image.resolve(target.path)
    except OSError as error:
        raise missing(shown, error) from None
    if not stat.S_ISREG(inode.mode):
        raise no_file(shown, inode.mode)
    check_offset(shown, offset, inode.size)
    if image.in_use:
        way.notes.append(
            "the guest has it mounted, and what it wrote last may not be in the image: run sync in the guest; an fsync "
            "of one file leaves its place in the journal only"
        )
    byte = _in_guest(way, image, inode, lookups, offset)
    if byte is not None:
        _on_disk(way, disk, byte)
        way.notes += _notes(disk, wait, _wait(way, disk, byte, wait) if wait else None)
    return way


def _in_guest(way: Way, image: Ext4Image, inode: Inode, lookups: list[Lookup], offset: int) -> int | None:
    """The steps that the guest's kernel does; the byte of its disk, None if it has none."""
    parts = [{"directory": one.directory, "name": escape(one.name), "inode": one.inode} for one in lookups]
    found = Point(GUEST_INODE, str(inode.number), {"inode": inode.number, "lookups": parts})
    way.add(
        "guest's ext4",
        Point(PATH, f'"{way.path}"'),
        found,
        image.command(f"stat <{inode.number}>"),
        *(f'"{p["name"]}" in directory {p["directory"]} -> inode {p["inode"]}' for p in parts),
    )
    logical, rest = divmod(offset, image.block)
    place = Point(FILE_BLOCK, f"{logical}, byte {rest} of {image.block}", {"block": logical, "byte": rest})
    way.add(
        "guest's page cache",
        Point(OFFSET, f"{offset} of inode {inode.number}", {"offset": offset}),
        place,
        f"echo $(({offset} / {image.block})) $(({offset} % {image.block}))",
    )
    check = image.command(f"bmap <{inode.number}> {logical}")
    by = "guest's ext4, extents"
    if inode.inline:
        way.add(by, place, Point(GUEST_BLOCK, "none: inline", {"inline": True}), check)
        way.end = "inline: the bytes are within the inode"
        return None
    block = image.block_of(inode.number, logical)
    if not block.number:
        way.add(by, place, Point(GUEST_BLOCK, "none: a hole, which reads as zeros", {"hole": True}), check)
        way.end = "the byte is in a hole of the guest's file: no block is kept for it"
        return None
    physical = Point(GUEST_BLOCK, f"{block.number}, byte {rest}", {"block": block.number, "byte": rest})
    unwritten = "unwritten: room is kept for it, the guest reads zeros" if block.unwritten else ""
    way.add(by, place, physical, check, unwritten)
    byte = block.number * image.block + rest
    sector = Point(SECTOR, f"{byte // 512}, byte {byte % 512}", {"sector": byte // 512, "byte": byte % 512})
    way.add("guest's block layer", physical, sector, f"echo $(({block.number} * {image.block // 512} + {rest} / 512))")
    return byte


def _on_disk(way: Way, disk: Disk, byte: int) -> None:
    """The steps from the guest's ring on, for a byte of its disk."""
    ring = Point(RING, _ring_text(disk), {"request": None, "protocol": _shown(disk.protocol)})
    way.add(
        "guest's blkfront",
        way.steps[-1].target,
        ring,
        f"xenstore-ls {disk.front}",
        "each request names the grants of its own pages: they are in the ring, and nothing in dom0 records them",
    )
    if disk.loop:
        at: dict[str, Any] = {"device": disk.loop, "byte": byte, "sector": byte // 512}
        on_loop = Point(LOOP, f"{disk.loop} byte {byte}, sector {byte // 512}", at)
        way.add(
            "dom0's blkback",
            ring,
            on_loop,
            f"xenstore-ls {_LOCAL}/0/backend/vbd/{disk.domid}/{disk.devid}",
            "the sector's number stays; it is another device's now",
            f"see it: {look(disk.loop, byte)}",
        )
        by, source = "dom0's loop", on_loop
        check = f"losetup -l {disk.loop}"
    else:
        by, source = f"dom0's {BACKENDS[disk.kind]}", ring
        check = f"xenstore-read {_LOCAL}/0/backend/{disk.kind}/{disk.domid}/{disk.devid}/params"
    if stat.S_ISBLK(os.stat(disk.image).st_mode):
        image = escape(os.fsencode(disk.image))
        values: dict[str, Any] = {"device": image, "byte": byte, "sector": byte // 512}
        way.add(by, source, Point(DEVICE, f"{image} byte {byte}", values), check, f"see it: {look(disk.image, byte)}")
    else:
        inside = byte + disk.loop_offset
        name = escape(os.fsencode(disk.image))
        place = Point(IMAGE, f"{name} offset {inside}", {"image": name, "offset": inside})
        word = shlex.quote(disk.image)
        same = "the number stays; it is of a file now" if disk.loop and not disk.loop_offset else ""
        way.add(by, source, place, check, same, f"see it: tail -c +{inside + 1} {word} | head -c 64 | od -A d -t x1z")
        fd = os.open(disk.image, os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME)
        try:
            store_path.follow(way, fd, os.fsencode(disk.image), inside, place)
        finally:
            os.close(fd)


def _wait(way: Way, disk: Disk, byte: int, wait: Waiting) -> Issue | None:
    """A request for a byte of the guest's disk that reaches dom0's block layer."""
    device, at = disk.loop, byte
    if not device:
        # QEMU reads the file itself: what can be seen is what the store's device gets of it.
        found = way.device
        if found is None:
            return None
        device, at = str(found["device"]), int(found["byte"])
    return blocktrace.watch(os.stat(device).st_rdev, at, wait.seconds, wait.ready, wait.tracing)


def _ring_text(disk: Disk) -> str:
    shown = _shown(disk.protocol)
    refs = [f"{key} {value}" for key, value in shown.items() if "ring-ref" in key or "event-channel" in key]
    return ", ".join(refs + [f"sectors of {shown.get('sector-size', '?')} bytes"]) if refs else "not in XenStore"


def _shown(protocol: dict[str, str]) -> dict[str, str]:
    """What a guest may have written, cut and escaped."""
    return {key: escape(value.encode())[:40] for key, value in protocol.items()}


def _notes(disk: Disk, wait: Waiting | None, issue: Issue | None) -> list[str]:
    if wait is None:
        return ["which request takes it is known only while it is on its way: --wait S shows a real one"]
    where = disk.loop or "the store's device"
    if issue is None:
        return [
            f"no request for it reached {where} within {wait.seconds:g} s: the guest or dom0 may have it in a cache"
        ]
    last = issue.sector + issue.count - 1
    return [
        f"seen on {where}: {issue.kind}, sectors {issue.sector} to {last}, issued by {issue.task} at {issue.time:.6f} s"
    ]
