"""What a hostile peer's tests share: raw messages, a valid sample of each request, what the process holds."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

from xen9p import codec

# Tlerror is a number and no message: nobody sends it.
REQUESTS = sorted(t for t in codec.MESSAGES if t % 2 == 0 and t != codec.Tlerror.type)
REPLIES = sorted(t for t in codec.MESSAGES if t % 2 == 1)

ROOT, FILE, NEW = 0, 1, 77
"""Fids of the samples: the root, an open file, and one that is not in use."""

SAMPLES: tuple[codec.Message, ...] = (
    codec.Tstatfs(FILE),
    codec.Tlopen(ROOT, os.O_RDONLY),
    codec.Tlcreate(ROOT, b"made", os.O_RDWR, 0o600, 0),
    codec.Tsymlink(ROOT, b"made", b"target", 0),
    codec.Tmknod(ROOT, b"made", 0o010600, 0, 0, 0),
    codec.Trename(FILE, ROOT, b"made"),
    codec.Treadlink(FILE),
    codec.Tgetattr(FILE, codec.GETATTR_BASIC),
    codec.Tsetattr(FILE, codec.SETATTR_MODE, 0o600, 0, 0, 0, 0, 0, 0, 0),
    codec.Txattrwalk(FILE, NEW, b"user.a"),
    codec.Txattrcreate(FILE, b"user.a", 4, 0),
    codec.Treaddir(ROOT, 0, 1000),
    codec.Tfsync(FILE, 0),
    codec.Tlock(FILE, codec.LOCK_TYPE_WRLCK, 0, 0, 0, 1, b"client"),
    codec.Tgetlock(FILE, codec.LOCK_TYPE_WRLCK, 0, 0, 1, b"client"),
    codec.Tlink(ROOT, FILE, b"made"),
    codec.Tmkdir(ROOT, b"made", 0o755, 0),
    codec.Trenameat(ROOT, b"f", ROOT, b"made"),
    codec.Tunlinkat(ROOT, b"f", 0),
    codec.Tlease(codec.LEASE_OPEN),
    codec.Trevoke(0),
    codec.Tversion(32768, codec.VERSION),
    codec.Tauth(NEW, b"user", b"", 0),
    codec.Tattach(NEW, codec.NOFID, b"user", b"", 0),
    codec.Tflush(3),
    codec.Twalk(ROOT, NEW, (b"f",)),
    codec.Tread(FILE, 0, 100),
    codec.Twrite(FILE, 0, b"data"),
    codec.Tclunk(FILE),
    codec.Tremove(FILE),
)


def raw(kind: int, tag: int, body: bytes) -> bytes:
    """Bytes with a header that is right about their number."""
    return (7 + len(body)).to_bytes(4, "little") + bytes([kind]) + tag.to_bytes(2, "little") + body


def lengths(message: codec.Message) -> list[tuple[int, int]]:
    """Where in an encoded message lengths and counts stand: (offset, bytes)."""
    found, at = [], codec.HEADER_SIZE
    for name, wire in message._plan:
        value = getattr(message, name)
        if isinstance(value, bytes):
            found.append((at, 4 if isinstance(message, codec.Twrite) else 2))
        elif isinstance(value, tuple):
            found.append((at, 2))
            inside = at + 2
            for element in value:
                found.append((inside, 2))
                inside += 2 + len(element)
        at += len(wire.write(value))
    return found


class _Mallinfo2(ctypes.Structure):
    # fmt: off
    _fields_ = [(n, ctypes.c_size_t) for n in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]
    # fmt: on


def heap() -> int:
    """Bytes that C holds from malloc, exact to the byte where RSS sees pages only."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def rss() -> int:
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def descriptors() -> int:
    """How many file descriptors the process has open."""
    return len(os.listdir("/proc/self/fd"))
