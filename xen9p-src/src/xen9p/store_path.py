"""The last part of every way: from a byte of a file in dom0 to a byte of the device below."""

from __future__ import annotations

import errno
import os
import shlex

from xen9p import extents
from xen9p.errors import Xen9pError
from xen9p.escape import escape
from xen9p.path import ADDRESS, DEVICE, Point, Way, look, shell_word


def follow(way: Way, fd: int, file: bytes, offset: int, source: Point) -> None:
    """Adds the steps from a byte of an open file to the device; ends the way where the byte has no place.

    Args:
        way: so far; source is where it has come to.
        fd: of the file, for reading.
        file: its path in dom0.
        offset: bytes from its begin.

    Raises:
        Xen9pError: the filesystem cannot be followed.
    """
    name = escape(file)
    kind = extents.filesystem_of(fd, name)
    try:
        found = extents.extent_at(fd, offset)
        check = f"filefrag -v -b1 -- {shell_word(file)}"
        by = f"dom0's {kind}"
        space = ADDRESS if kind == extents.BTRFS else DEVICE
        if found is None:
            way.add(by, source, Point(space, "none: a hole, which reads as zeros", {"hole": True}), check)
            way.end = "the byte is in a hole: no block is kept for it"
            return
        about = _about(found)
        if found.placeless:
            way.add(by, source, Point(space, f"none: {', '.join(found.names)}", about), check)
            way.end = found.placeless
            return
        address = found.address + offset - found.start
        shared = "shared: other files, or snapshots, use this extent too" if found.flags & extents.SHARED else ""
        where = f"file {found.start}+{found.length}, flags {','.join(found.names) or 'none'}"
        if kind != extents.BTRFS:
            device = extents.device_path(os.fstat(fd).st_dev)
            place = Point(DEVICE, f"{device} byte {address} (extent: {where})", _place(device, address, about))
            way.add(by, source, place, check, shared, _loop(device), f"see it: {look(device, address)}")
            return
        logical = Point(ADDRESS, f"{address} (extent: {where})", about | {"address": address})
        way.add(by, source, logical, check, shared)
        _chunk(way, fd, address, logical)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise Xen9pError(f"{name}: the chunks of btrfs cannot be read", "run it as root") from None
        raise Xen9pError(f"{name}: cannot ask where it is: {error.strerror}", "is it on btrfs, ext4 or xfs?") from None


def _chunk(way: Way, fd: int, address: int, logical: Point) -> None:
    places = extents.chunk_places(fd, address)
    first = places[0]
    values = _place(first.device, first.byte, {"devid": first.devid})
    values["copies"] = [{"device": p.device, "byte": p.byte, "devid": p.devid} for p in places]
    device = escape(first.device.encode())
    others = [f"a copy: {escape(p.device.encode())} byte {p.byte} (devid {p.devid})" for p in places[1:]]
    way.add(
        "dom0's btrfs, chunks",
        logical,
        Point(DEVICE, f"{device} byte {first.byte} (devid {first.devid})", values),
        f"btrfs-map-logical -l {address} {shlex.quote(first.device)}",
        *others,
        _loop(first.device),
        f"see it: {look(first.device, first.byte)}",
    )


def _loop(device: str) -> str:
    """That the way does not end at the store's device, if that is a file itself: no way is shorter for it."""
    if not device.startswith("/dev/loop"):
        return ""
    return "the store is a loop device on a file, and from there on every way is the same: losetup -l"


def _about(found: extents.Extent) -> dict[str, object]:
    return {"extent": {"start": found.start, "length": found.length, "address": found.address, "flags": found.names}}


def _place(device: str, byte: int, more: dict[str, object]) -> dict[str, object]:
    return {"device": device, "byte": byte, "sector": byte // 512, **more}
