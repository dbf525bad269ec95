"""The way over 9P: from a path in a mount to a byte of the store's device, as dom0 can see it.

Without a request on its way, the file's side is known (qid, inode, extents) and the device's rings; its fid, tag,
count and ring are the guest's choice, request by request, and come from the device's trace.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from xen9p import control, in_root, store_path, trace
from xen9p.codec import Qid, Rgetattr, Rlopen, Tread, Twrite, message_name
from xen9p.device import Ring
from xen9p.errors import ControlError, Xen9pError
from xen9p.escape import escape
from xen9p.path import FID, INODE, OFFSET, PATH, REQUEST, RING, Point, Way, shell_word
from xen9p.records import Exchange
from xen9p.traceformat import duration
from xen9p.xenbus import ViolationError, backend_path, frontend_path, parse_rings

DEFAULT_TAG: Final = "root"
PAGE: Final = 4096
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device node",
    stat.S_IFBLK: "a device node",
}
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ +\S*/gntdev\b")


class Nodes(Protocol):
    """What is needed of XenStore."""

    def read(self, path: str) -> str | None:
        """A node's value, None if there is none."""
        ...

    def children(self, path: str) -> list[str]:
        """The names of a node's children."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """What GUEST:TAG:/path or GUEST:/path names; tag "" if it is not said."""

    guest: str
    tag: str
    path: bytes


@dataclass(frozen=True, slots=True)
class Device:
    """A device as xen9pd knows it, and its rings as the frontend published them."""

    guest: str
    tag: str
    domid: int
    devid: int
    export: str
    root: Path
    pid: int | None
    client: str
    """Who asks, in the guest."""
    rings: tuple[Ring, ...]
    orders: tuple[int, ...]
    """2^order pages of data a ring; () if that cannot be seen."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that passed, and the qid of its file if a reply told it meanwhile."""

    exchange: Exchange
    qid: Qid | None

    @property
    def range(self) -> tuple[int, int]:
        """Offset and count that it asks for, in bytes."""
        return _range(self.exchange) or (0, 0)


def parse_target(text: str) -> Target:
    """GUEST:TAG:/path or GUEST:/path.

    Raises:
        Xen9pError: it is neither.
    """
    guest, colon, rest = text.partition(":")
    tag, slash, path = rest.partition("/")
    tag, end = (tag[:-1], tag[-1:]) if tag else ("", ":")
    if not guest or not colon or not slash or end != ":" or ":" in tag or "\0" in text:
        raise Xen9pError(f"{escape(os.fsencode(text))} is no path of a guest", "write GUEST:TAG:/path or GUEST:/path")
    return Target(guest, tag, os.fsencode("/" + path))


def find(target: Target, runtime: Path, store: Nodes) -> Device:
    """The device that a target is on.

    Raises:
        Xen9pError: there is no such guest, it has no such tag, or its device is not connected.
    """
    tag = target.tag or DEFAULT_TAG
    answer = control.ask(control.Status(), runtime)
    there = [d for d in answer["devices"] if d["guest"] == target.guest]
    if not there:
        names = sorted({str(d["guest"]) for d in answer["devices"]} | {str(g["name"]) for g in answer["guests"]})
        if target.guest not in names:
            raise Xen9pError(
                f"there is no guest {escape(target.guest.encode())}", f"running: {', '.join(names) or 'none'}"
            )
    named = [d for d in there if d["tag"] == tag]
    if not named:
        tags = ", ".join(sorted(str(d["tag"]) for d in there)) or "none"
        raise Xen9pError(f"{target.guest} has no tag {escape(tag.encode())}", f"it has: {tags}; write GUEST:TAG:/path")
    one = named[0]
    if one["phase"] != "connected":
        raise Xen9pError(f"{target.guest}:{tag} is not connected, but {one['phase']}", "see: xen9p status")
    return _device(one, store)


def _device(status: dict[str, Any], store: Nodes) -> Device:
    domid, devid, pid = int(status["domid"]), int(status["devid"]), status["pid"]
    kind = str(status["frontend_kind"])
    front = frontend_path(domid, devid, kind)
    try:
        rings = parse_rings(lambda key: store.read(f"{front}/{key}"))
    except ViolationError:
        rings = ()  # it has written over them since; the worker goes on with what it was given
    return Device(
        guest=str(status["guest"]),
        tag=str(status["tag"]),
        domid=domid,
        devid=devid,
        export=str(status["export"]),
        root=Path(status["path"]),
        pid=pid,
        client="guest's v9fs" if kind == "kernel" else "guest's xen9p",
        rings=rings,
        orders=_orders_of(pid) if rings else (),
    )


def _orders_of(pid: int | None) -> tuple[int, ...]:
    try:
        return ring_orders(Path(f"/proc/{pid}/maps").read_text(errors="replace"))
    except OSError:
        return ()


def ring_orders(maps: str) -> tuple[int, ...]:
    """The orders of a worker's rings, in their order, from its proc_pid_maps(5).

    The order is in a page that only guest and worker see. But the worker maps a ring as two stretches of gntdev, the
    page and then 2^order pages, and their sizes are there for all to see.
    """
    found = []
    for line in maps.splitlines():
        match = _MAPPING.match(line)
        if match:
            begin, end, index = (int(match[i], 16) for i in (1, 2, 3))
            found.append((index, (end - begin) // PAGE))
    return tuple(pages.bit_length() - 1 for _, pages in sorted(found) if pages > 1)


def qid_of(about: os.stat_result, root_device: int) -> Qid:
    """The qid that the server gives a file (encode_qid() in dataplane/fs.c): kind, version, inode number."""
    number = about.st_ino
    if about.st_dev != root_device:
        number ^= (about.st_dev * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) | 1 << 63
    seconds, ns = divmod(about.st_mtime_ns, 1_000_000_000)
    version = (ns ^ seconds << 3 ^ about.st_size << 8) & 0xFFFFFFFF
    kind = {stat.S_IFDIR: 0x80, stat.S_IFLNK: 0x02}.get(stat.S_IFMT(about.st_mode), 0)
    return Qid(kind, version, number)


@dataclass(frozen=True, slots=True)
class _File:
    """An open file of an export: its path from the export's root on, and the device number (st_dev) of that root."""

    fd: int
    inside: bytes
    root_device: int


def follow(
    target: Target,
    offset: int,
    runtime: Path,
    store: Nodes,
    *,
    wait: float | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Way:
    """The way of a byte at an offset of a file, with a request that passes within *wait* seconds if that is given.

    ready() is called when the waiting begins.

    Raises:
        Xen9pError: no such guest, tag or file; the file is no regular one or is shorter.
    """
    device = find(target, runtime, store)
    try:
        root = os.open(device.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Xen9pError(f"{device.root}: {error.strerror}", "see: xen9p policy check") from None
    try:
        fd = _open(root, target.path)
        try:
            check_offset(escape(target.path), offset, os.fstat(fd).st_size)
            inside = in_root.name_of(fd).removeprefix(in_root.name_of(root).rstrip(b"/")) or b"/"
            file = _File(fd, inside, os.fstat(root).st_dev)
            seen = watch(device, inside, offset, runtime=runtime, seconds=wait, ready=ready) if wait else None
            way = _steps(device, target.path, offset, file, seen)
        finally:
            os.close(fd)
    finally:
        os.close(root)
    way.notes += _notes(device, seen, wait)
    return way


def _open(root: int, path: bytes) -> int:
    name = escape(path)
    try:
        found = in_root.resolve(root, path)
    except OSError as error:
        raise missing(name, error) from None
    try:
        opened = in_root.open_regular(found)
        if opened is None:
            raise no_file(name, os.fstat(found).st_mode)
        return opened
    finally:
        os.close(found)


def missing(name: str, error: OSError) -> Xen9pError:
    """What an error of looking a path up means, and what to do."""
    hint = {
        errno.ENOENT: "paths begin at the root of the mount, or of the disk, not of the guest",
        errno.ENOTDIR: "something on the way is a file",
        errno.ELOOP: "its symbolic links lead in a circle",
    }.get(error.errno or 0, "can root read it?")
    return Xen9pError(f"{name}: {os.strerror(error.errno or errno.EIO)}", hint, errno=error.errno)


def no_file(name: str, mode: int) -> Xen9pError:
    """That something has no bytes at offsets."""
    return Xen9pError(f"{name} is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}", "name a regular file")


def check_offset(name: str, offset: int, size: int) -> None:
    """Xen9pError if a file of that size has no byte there."""
    if offset >= size:
        raise Xen9pError(
            f"{name} has {size} bytes, none at offset {offset}", f"take --offset from 0 to {max(0, size - 1)}"
        )


def _steps(device: Device, path: bytes, offset: int, opened: _File, seen: Seen | None) -> Way:
    shown, about, file = escape(path), os.fstat(opened.fd), in_root.name_of(opened.fd)
    served = f"export {device.export}, {escape(os.fsencode(device.root))}"
    way = Way("9P", served, device.guest, device.tag, shown, offset)

    qid = qid_of(about, opened.root_device)
    fid = _fid(seen, qid)
    word = shell_word(file)
    link = f"symbolic links lead to {escape(opened.inside)}" if opened.inside != os.path.normpath(path) else ""
    traced = f"xen9p trace {device.guest}:{device.tag} --filter type=Twalk"
    way.add(
        f"{device.client}, Twalk", Point(PATH, f'"{shown}"'), fid, traced, link, "the version is made of mtime and size"
    )
    here = Point(OFFSET, str(offset), {"offset": offset})
    request, asked = _request(seen, offset)
    way.add(
        f"{device.client}, request", here, asked, f"xen9p trace {device.guest}:{device.tag} --filter type=Tread,Twrite"
    )
    way.add("ring", request, _ring(device, seen), _ring_check(device), *_ring_notes(device, seen))
    same = "" if qid.path == about.st_ino else "the qid's number is mixed with the device's: it is of another subvolume"
    inode = {"inode": about.st_ino, "st_dev": about.st_dev, "file": escape(file)}
    way.add(
        "worker",
        fid,
        Point(INODE, f"{about.st_ino} of device {_numbers(about.st_dev)}, {escape(file)}", inode),
        f"stat -c '%i %Hd:%Ld %s' -- {word}",
        same,
    )
    way.add(
        "worker",
        replace(asked, space=OFFSET),
        Point(OFFSET, f"{offset} (pread or pwrite at the request's offset)", {"offset": offset}),
        f"strace -f -e trace=pread64,pwrite64,preadv,pwritev,preadv2,pwritev2 -p {device.pid}",
    )
    store_path.follow(
        way, opened.fd, file, offset, Point(OFFSET, f"{offset} of inode {about.st_ino}", {"offset": offset})
    )
    return way


def _numbers(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _fid(seen: Seen | None, qid: Qid) -> Point:
    told = seen.qid if seen is not None and seen.qid is not None else None
    qid = told or qid
    values: dict[str, Any] = {"fid": None, "qid": {"type": qid.type, "version": qid.version, "path": qid.path}}
    number = "fid ?"
    if seen is not None:
        values["fid"] = _message(seen).fid
        number = f"fid {values['fid']}"
    source = "as a reply told it" if told else "as the server makes it"
    return Point(FID, f"{number}, qid {qid.type:02x}.{qid.version:x}.{qid.path:x} ({source})", values)


def _message(seen: Seen) -> Tread | Twrite:
    message = seen.exchange.request.message
    assert isinstance(message, Tread | Twrite)
    return message


def _request(seen: Seen | None, offset: int) -> tuple[Point, Point]:
    """The request as what goes into the ring, and the offset in it."""
    if seen is None:
        unknown = dict.fromkeys(("fid", "tag", "count"))
        return (
            Point(REQUEST, f"Tread or Twrite of offset {offset}", unknown),
            Point(OFFSET, f"in Tread(fid=?, offset<={offset}, count=?): the byte's offset is not changed", unknown),
        )
    message, (start, count) = _message(seen), seen.range
    name = message_name(seen.exchange.request.type)
    values = {"type": name, "fid": message.fid, "tag": seen.exchange.request.tag, "offset": start, "count": count}
    what = f"{name}(tag={values['tag']}, fid={message.fid}, offset={start}, count={count})"
    return (
        Point(REQUEST, what, values),
        Point(OFFSET, f"{what}: byte {offset - start} of its data", values),
    )


def _ring(device: Device, seen: Seen | None) -> Point:
    about = [
        {"ring": i, "ring-ref": r.ref, "event-channel": r.port, "order": _order(device, i)}
        for i, r in enumerate(device.rings)
    ]
    if seen is not None:
        number = seen.exchange.link
        values: dict[str, Any] = {"ring": number, "position": None, "rings": about, "ns": dict(seen.exchange.stages)}
        one = about[number] if number < len(about) else {}
        return Point(RING, f"ring {number} of {len(about) or '?'}: {_ring_text(one)}", values)
    listed = "; ".join(f"ring {a['ring']}: {_ring_text(a)}" for a in about)
    return Point(RING, listed or "not in XenStore", {"ring": None, "position": None, "rings": about})


def _order(device: Device, ring: int) -> int | None:
    return device.orders[ring] if len(device.orders) == len(device.rings) else None


def _ring_text(about: dict[str, Any]) -> str:
    if not about:
        return "not in XenStore"
    order = about["order"]
    size = "order ?" if order is None else f"order {order}, {1 << order} pages, {1 << (order + 11)} bytes each way"
    return f"grant {about['ring-ref']}, event channel {about['event-channel']}, {size}"


def _ring_check(device: Device) -> str:
    kind = "kernel" if device.client == "guest's v9fs" else "user"
    return f"xenstore-ls {frontend_path(device.domid, device.devid, kind)}; grep gntdev /proc/{device.pid}/maps"


def _ring_notes(device: Device, seen: Seen | None) -> list[str]:
    notes = [
        "the grant is of the ring's first page, which has the grants of its data pages in it; all stay mapped",
        "where in the ring a message was is not recorded: the indices are in that first page",
    ]
    if seen is None:
        notes.append("Linux takes the ring with number tag mod the count of rings")
    else:
        times = ", ".join(f"{name} {duration(ns)}" for name, ns in seen.exchange.stages.items())
        notes.append(f"times: {times}")
    return notes


def _notes(device: Device, seen: Seen | None, wait: float | None) -> list[str]:
    notes = [f"XenStore of the backend: {backend_path(device.domid, device.devid)}"]
    if wait is None:
        notes.append(
            "fid, tag, count and ring are the guest's choice for each request: --wait S shows those of a real one"
        )
    elif seen is None:
        notes.append(f"no request for this byte came within {wait:g} s: the guest may have it in its own cache")
    return notes


# Waiting for a real one.


def _range(exchange: Exchange) -> tuple[int, int] | None:
    """Offset and count of a read or write."""
    match exchange.request.message:
        case Tread(offset=offset, count=count):
            return offset, count
        case Twrite(offset=offset):
            return offset, exchange.request.data_size
    return None


def covers(exchange: Exchange, inside: bytes, offset: int) -> bool:
    """Whether it reads or writes that byte of the file at a path from the export's root on, and was not refused."""
    found = _range(exchange)
    if found is None or exchange.path != inside or exchange.errno:
        return False
    return found[0] <= offset < found[0] + found[1]


def watch(
    device: Device,
    inside: bytes,
    offset: int,
    *,
    runtime: Path,
    seconds: float,
    ready: Callable[[], None] = lambda: None,
) -> Seen | None:
    """Waits for a request for a byte of a file; None if none comes. ready() is called when nothing can be missed.

    Raises:
        ControlError: the worker cannot be reached, or somebody traces it already.
    """
    socket = runtime / f"worker-{device.domid}-{device.devid}.sock"
    source = trace.Source.open(f"{device.guest}:{device.tag}", socket, 0)
    qid = None
    try:
        ready()
        for _, exchanges in trace.follow([source], time.monotonic() + seconds):
            for exchange in exchanges:
                reply = exchange.reply.message if exchange.reply is not None else None
                if exchange.path == inside and isinstance(reply, Rlopen | Rgetattr):
                    qid = reply.qid
                if covers(exchange, inside, offset):
                    return Seen(exchange, qid)
    finally:
        source.sock.close()
    if source.dropped:
        raise ControlError(
            f"{source.dropped} requests were lost: they came faster than they were read", "try it while less goes on"
        )
    return None
