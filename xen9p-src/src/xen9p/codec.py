"""9P2000.L on the wire: every message as a frozen dataclass, encoded and decoded from its declaration.

A message is ``size[4] type[1] tag[2]`` and then its fields in the order of declaration, little-endian.
Numbers are those of the Linux kernel (include/net/9p/9p.h), layouts those of diod's protocol.md.
Names are bytes: the protocol speaks of UTF-8, Linux does not enforce it, and neither do we.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Final, TypeAlias, TypeVar, dataclass_transform, get_type_hints

from xen9p.errors import ProtocolError, UnknownMessageError

VERSION: Final = b"9P2000.L"
VERSION_UNKNOWN: Final = b"unknown"
HEADER_SIZE: Final = 7
QID_SIZE: Final = 13
MAX_WALK: Final = 16
NOTAG: Final = 0xFFFF
NOFID: Final = 0xFFFFFFFF
NONUNAME: Final = 0xFFFFFFFF
# What a reply of file data and a request to write it add to the data itself.
READ_OVERHEAD: Final = HEADER_SIZE + 4
WRITE_OVERHEAD: Final = HEADER_SIZE + 4 + 8 + 4

QT_DIR: Final = 0x80
QT_APPEND: Final = 0x40
QT_EXCL: Final = 0x20
QT_MOUNT: Final = 0x10
QT_AUTH: Final = 0x08
QT_TMP: Final = 0x04
QT_SYMLINK: Final = 0x02
QT_LINK: Final = 0x01
QT_FILE: Final = 0x00

GETATTR_MODE: Final = 0x0001
GETATTR_NLINK: Final = 0x0002
GETATTR_UID: Final = 0x0004
GETATTR_GID: Final = 0x0008
GETATTR_RDEV: Final = 0x0010
GETATTR_ATIME: Final = 0x0020
GETATTR_MTIME: Final = 0x0040
GETATTR_CTIME: Final = 0x0080
GETATTR_INO: Final = 0x0100
GETATTR_SIZE: Final = 0x0200
GETATTR_BLOCKS: Final = 0x0400
GETATTR_BTIME: Final = 0x0800
GETATTR_GEN: Final = 0x1000
GETATTR_DATA_VERSION: Final = 0x2000
GETATTR_BASIC: Final = 0x07FF
GETATTR_ALL: Final = 0x3FFF

SETATTR_MODE: Final = 0x001
SETATTR_UID: Final = 0x002
SETATTR_GID: Final = 0x004
SETATTR_SIZE: Final = 0x008
SETATTR_ATIME: Final = 0x010
SETATTR_MTIME: Final = 0x020
SETATTR_CTIME: Final = 0x040
SETATTR_ATIME_SET: Final = 0x080
SETATTR_MTIME_SET: Final = 0x100

LOCK_TYPE_RDLCK: Final = 0
LOCK_TYPE_WRLCK: Final = 1
LOCK_TYPE_UNLCK: Final = 2
LOCK_FLAGS_BLOCK: Final = 1
LOCK_FLAGS_RECLAIM: Final = 2
LOCK_SUCCESS: Final = 0
LOCK_BLOCKED: Final = 1
LOCK_ERROR: Final = 2
LOCK_GRACE: Final = 3

AT_REMOVEDIR: Final = 0x200

LEASE_OPEN: Final = 0
LEASE_RENEW: Final = 1
LEASE_CLOSE: Final = 2
UNLEASED: Final = 0x80
"""In the type of a reply to a client with a lease session: nothing of it may be kept."""

_HEADER: Final = struct.Struct("<IBH")


@dataclass(frozen=True, slots=True)
class Qid:
    """A file's identity: type bits (u8, QT_*), version (u32), path (u64, unique on the server)."""

    type: int
    version: int
    path: int


@dataclass(frozen=True, slots=True)
class Dirent:
    """One record of Rreaddir's data: offset is where the next read goes on, type a DT_* number."""

    qid: Qid
    offset: int
    type: int
    name: bytes


class _Reader:
    """Takes fields off a copy-free view and says precisely which one ran past the end."""

    __slots__ = ("end", "offset", "view", "what")

    def __init__(self, view: memoryview, what: str, offset: int = 0) -> None:
        self.view = view
        self.what = what
        self.offset = offset
        self.end = len(view)

    def take(self, size: int, field: str) -> memoryview:
        start = self.offset
        if size > self.end - start:
            left = self.end - start
            raise ProtocolError(f"{self.what}: {field} needs {size} bytes at offset {start}, {left} are left")
        self.offset = start + size
        return self.view[start : self.offset]


@dataclass(frozen=True, slots=True)
class _Wire:
    """How one kind of field is written and read."""

    write: Callable[[Any], bytes]
    read: Callable[[_Reader, str], Any]


def _integer(size: int) -> _Wire:
    def write(value: int) -> bytes:
        return value.to_bytes(size, "little")

    def read(reader: _Reader, field: str) -> int:
        return int.from_bytes(reader.take(size, field), "little")

    return _Wire(write, read)


def _counted(size: int) -> _Wire:
    def write(value: bytes | bytearray | memoryview) -> bytes:
        data = bytes(value)
        return len(data).to_bytes(size, "little") + data

    def read(reader: _Reader, field: str) -> bytes:
        length = int.from_bytes(reader.take(size, f"the length of {field}"), "little")
        return bytes(reader.take(length, field))

    return _Wire(write, read)


_QID_STRUCT: Final = struct.Struct("<BIQ")


def _write_qid(qid: Qid) -> bytes:
    return _QID_STRUCT.pack(qid.type, qid.version, qid.path)


def _read_qid(reader: _Reader, field: str) -> Qid:
    return Qid(*_QID_STRUCT.unpack(reader.take(QID_SIZE, field)))


def _repeated(element: _Wire) -> _Wire:
    """A list with a count[2] before it. 9P allows 16 elements in a walk and has no other lists."""

    def check(count: int, field: str) -> None:
        if count > MAX_WALK:
            raise ProtocolError(f"{field}: {count} elements, at most {MAX_WALK} are allowed")

    def write(values: tuple[Any, ...]) -> bytes:
        check(len(values), "list")
        return len(values).to_bytes(2, "little") + b"".join(map(element.write, values))

    def read(reader: _Reader, field: str) -> tuple[Any, ...]:
        count = int.from_bytes(reader.take(2, f"the count of {field}"), "little")
        check(count, f"{reader.what}: {field}")
        return tuple(element.read(reader, f"{field}[{i}]") for i in range(count))

    return _Wire(write, read)


U8: TypeAlias = Annotated[int, _integer(1)]
U16: TypeAlias = Annotated[int, _integer(2)]
U32: TypeAlias = Annotated[int, _integer(4)]
U64: TypeAlias = Annotated[int, _integer(8)]
Name: TypeAlias = Annotated[bytes, _counted(2)]
Data: TypeAlias = Annotated[bytes, _counted(4)]
QidField: TypeAlias = Annotated[Qid, _Wire(_write_qid, _read_qid)]
Names: TypeAlias = Annotated[tuple[bytes, ...], _repeated(_counted(2))]
Qids: TypeAlias = Annotated[tuple[Qid, ...], _repeated(_Wire(_write_qid, _read_qid))]


class Message:
    """Base of all messages; ``type`` is the number on the wire, even for requests, odd for replies."""

    __slots__ = ()
    type: ClassVar[int]
    _plan: ClassVar[tuple[tuple[str, _Wire], ...]]


M = TypeVar("M", bound=Message)
MESSAGES: Final[dict[int, type[Message]]] = {}


@dataclass_transform(frozen_default=True)
def _message(number: int) -> Callable[[type[M]], type[M]]:
    def declare(cls: type[M]) -> type[M]:
        slotted = dataclass(frozen=True, slots=True)(cls)
        hints = get_type_hints(slotted, include_extras=True)
        slotted.type = number
        slotted._plan = tuple((f.name, hints[f.name].__metadata__[0]) for f in fields(slotted))  # type: ignore[arg-type]
        MESSAGES[number] = slotted
        return slotted

    return declare


@_message(6)
class Tlerror(Message):
    pass


@_message(7)
class Rlerror(Message):
    """A Linux errno, in place of the reply that was asked for."""

    ecode: U32


@_message(8)
class Tstatfs(Message):
    fid: U32


@_message(9)
class Rstatfs(Message):
    fs_type: U32
    bsize: U32
    blocks: U64
    bfree: U64
    bavail: U64
    files: U64
    ffree: U64
    fsid: U64
    namelen: U32


@_message(12)
class Tlopen(Message):
    """flags are those of Linux open(2)."""

    fid: U32
    flags: U32


@_message(13)
class Rlopen(Message):
    qid: QidField
    iounit: U32


@_message(14)
class Tlcreate(Message):
    """fid is the directory before, the new open file after."""

    fid: U32
    name: Name
    flags: U32
    mode: U32
    gid: U32


@_message(15)
class Rlcreate(Message):
    qid: QidField
    iounit: U32


@_message(16)
class Tsymlink(Message):
    fid: U32
    name: Name
    target: Name
    gid: U32


@_message(17)
class Rsymlink(Message):
    qid: QidField


@_message(18)
class Tmknod(Message):
    dfid: U32
    name: Name
    mode: U32
    major: U32
    minor: U32
    gid: U32


@_message(19)
class Rmknod(Message):
    qid: QidField


@_message(20)
class Trename(Message):
    fid: U32
    dfid: U32
    name: Name


@_message(21)
class Rrename(Message):
    pass


@_message(22)
class Treadlink(Message):
    fid: U32


@_message(23)
class Rreadlink(Message):
    target: Name


@_message(24)
class Tgetattr(Message):
    fid: U32
    request_mask: U64


@_message(25)
class Rgetattr(Message):
    """valid is a mask of GETATTR_*; blocks are of 512 bytes."""

    valid: U64
    qid: QidField
    mode: U32
    uid: U32
    gid: U32
    nlink: U64
    rdev: U64
    size: U64
    blksize: U64
    blocks: U64
    atime_sec: U64
    atime_nsec: U64
    mtime_sec: U64
    mtime_nsec: U64
    ctime_sec: U64
    ctime_nsec: U64
    btime_sec: U64
    btime_nsec: U64
    gen: U64
    data_version: U64


@_message(26)
class Tsetattr(Message):
    """valid is a mask of SETATTR_*; a time without its _SET bit means the server's now."""

    fid: U32
    valid: U32
    mode: U32
    uid: U32
    gid: U32
    size: U64
    atime_sec: U64
    atime_nsec: U64
    mtime_sec: U64
    mtime_nsec: U64


@_message(27)
class Rsetattr(Message):
    pass


@_message(30)
class Txattrwalk(Message):
    """An empty name lists the attributes."""

    fid: U32
    newfid: U32
    name: Name


@_message(31)
class Rxattrwalk(Message):
    size: U64


@_message(32)
class Txattrcreate(Message):
    fid: U32
    name: Name
    attr_size: U64
    flags: U32


@_message(33)
class Rxattrcreate(Message):
    pass


@_message(40)
class Treaddir(Message):
    fid: U32
    offset: U64
    count: U32


@_message(41)
class Rreaddir(Message):
    """data holds whole Dirent records; see decode_dirents()."""

    data: Data


@_message(50)
class Tfsync(Message):
    fid: U32
    datasync: U32


@_message(51)
class Rfsync(Message):
    pass


@_message(52)
class Tlock(Message):
    """kind is LOCK_TYPE_*, flags LOCK_FLAGS_*."""

    fid: U32
    kind: U8
    flags: U32
    start: U64
    length: U64
    proc_id: U32
    client_id: Name


@_message(53)
class Rlock(Message):
    status: U8


@_message(54)
class Tgetlock(Message):
    fid: U32
    kind: U8
    start: U64
    length: U64
    proc_id: U32
    client_id: Name


@_message(55)
class Rgetlock(Message):
    kind: U8
    start: U64
    length: U64
    proc_id: U32
    client_id: Name


@_message(70)
class Tlink(Message):
    dfid: U32
    fid: U32
    name: Name


@_message(71)
class Rlink(Message):
    pass


@_message(72)
class Tmkdir(Message):
    dfid: U32
    name: Name
    mode: U32
    gid: U32


@_message(73)
class Rmkdir(Message):
    qid: QidField


@_message(74)
class Trenameat(Message):
    olddirfid: U32
    oldname: Name
    newdirfid: U32
    newname: Name


@_message(75)
class Rrenameat(Message):
    pass


@_message(76)
class Tunlinkat(Message):
    dirfid: U32
    name: Name
    flags: U32


@_message(77)
class Runlinkat(Message):
    pass


@_message(90)
class Tlease(Message):
    """Ours: opens (LEASE_OPEN), renews (LEASE_RENEW) or ends (LEASE_CLOSE) a lease session."""

    how: U32


@_message(91)
class Rlease(Message):
    """For how many ms from now on the session lives, and how many buckets there are."""

    ms: U32
    buckets: U32


@_message(92)
class Trevoke(Message):
    """Ours: what the last Rrevoke named is given up. Stays with the server until there is more to give up."""

    batch: U64


@_message(93)
class Rrevoke(Message):
    """buckets are u32 each; everything is 1 for all that there are. See decode_buckets()."""

    batch: U64
    everything: U8
    buckets: Data


@_message(100)
class Tversion(Message):
    """Sent with NOTAG; ends every fid of the session."""

    msize: U32
    version: Name


@_message(101)
class Rversion(Message):
    msize: U32
    version: Name


@_message(102)
class Tauth(Message):
    afid: U32
    uname: Name
    aname: Name
    n_uname: U32


@_message(103)
class Rauth(Message):
    aqid: QidField


@_message(104)
class Tattach(Message):
    fid: U32
    afid: U32
    uname: Name
    aname: Name
    n_uname: U32


@_message(105)
class Rattach(Message):
    qid: QidField


@_message(108)
class Tflush(Message):
    oldtag: U16


@_message(109)
class Rflush(Message):
    pass


@_message(110)
class Twalk(Message):
    fid: U32
    newfid: U32
    wnames: Names


@_message(111)
class Rwalk(Message):
    wqids: Qids


@_message(116)
class Tread(Message):
    fid: U32
    offset: U64
    count: U32


@_message(117)
class Rread(Message):
    data: Data


@_message(118)
class Twrite(Message):
    fid: U32
    offset: U64
    data: Data


@_message(119)
class Rwrite(Message):
    count: U32


@_message(120)
class Tclunk(Message):
    fid: U32


@_message(121)
class Rclunk(Message):
    pass


@_message(122)
class Tremove(Message):
    fid: U32


@_message(123)
class Rremove(Message):
    pass


def encode(msg: Message, tag: int) -> bytes:
    """The whole message, header included. Raises ProtocolError if a field does not fit its place."""
    parts = [b""]
    for name, wire in msg._plan:
        value = getattr(msg, name)
        try:
            parts.append(wire.write(value))
        except (OverflowError, struct.error):
            raise ProtocolError(f"{message_name(msg.type)}: {name} does not fit: {value!r:.80}") from None
    if not 0 <= tag <= NOTAG:
        raise ProtocolError(f"{message_name(msg.type)}: tag {tag} does not fit in 2 bytes")
    parts[0] = _HEADER.pack(HEADER_SIZE + sum(map(len, parts)), msg.type, tag)
    return b"".join(parts)


def decode(buf: bytes | bytearray | memoryview) -> tuple[int, Message]:
    """(tag, message) from exactly one whole message; ProtocolError for anything else."""
    view = memoryview(buf).cast("B")
    if len(view) < HEADER_SIZE:
        raise ProtocolError(f"a message of {len(view)} bytes is shorter than its header of {HEADER_SIZE}")
    size, type_, tag = _HEADER.unpack_from(view)
    cls = MESSAGES.get(type_)
    if size != len(view):
        raise ProtocolError(f"{message_name(type_)}: size says {size} bytes, {len(view)} are there")
    if cls is None:
        raise UnknownMessageError(type_, tag)
    reader = _Reader(view, message_name(type_), HEADER_SIZE)
    values = [wire.read(reader, name) for name, wire in cls._plan]
    if reader.offset != reader.end:
        raise ProtocolError(f"{reader.what}: {reader.end - reader.offset} bytes after the last field")
    return tag, cls(*values)


def strip_lease(buf: bytes) -> tuple[bytes, bool]:
    """A reply as 9P2000.L has it, and whether what it says may be kept as far as its client has leases."""
    if len(buf) < HEADER_SIZE or not buf[4] & UNLEASED:
        return buf, True
    return buf[:4] + bytes((buf[4] & ~UNLEASED,)) + buf[5:], False


def decode_buckets(data: bytes) -> tuple[int, ...]:
    """The buckets in Rrevoke's data; ProtocolError where one is cut short."""
    if len(data) % 4:
        raise ProtocolError(f"Rrevoke: {len(data)} bytes are no whole number of buckets")
    return struct.unpack(f"<{len(data) // 4}I", data)


def message_name(type_: int) -> str:
    """'Twalk' for 110; 'type 99' for a number that 9P2000.L does not have."""
    cls = MESSAGES.get(type_)
    return f"type {type_}" if cls is None else cls.__name__


_DIRENT_STRUCT: Final = struct.Struct("<BIQQBH")


def encode_dirents(entries: Iterable[Dirent]) -> bytes:
    """Rreaddir's data for these entries."""
    out = bytearray()
    for e in entries:
        try:
            out += _DIRENT_STRUCT.pack(e.qid.type, e.qid.version, e.qid.path, e.offset, e.type, len(e.name))
        except struct.error:
            raise ProtocolError(f"directory entry does not fit: {e!r:.120}") from None
        out += e.name
    return bytes(out)


def decode_dirents(data: bytes | memoryview) -> Iterator[Dirent]:
    """The entries in Rreaddir's data; ProtocolError where one is cut short."""
    reader = _Reader(memoryview(data), "Rreaddir data")
    while reader.offset < reader.end:
        fixed = reader.take(_DIRENT_STRUCT.size, "an entry")
        qid_type, qid_version, qid_path, offset, type_, length = _DIRENT_STRUCT.unpack(fixed)
        name = bytes(reader.take(length, "an entry's name"))
        yield Dirent(Qid(qid_type, qid_version, qid_path), offset, type_, name)
