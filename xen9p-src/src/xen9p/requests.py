"""What both clients share: fids, the messages that need thought, and whether a reply fits its request.

Nothing here sends or waits; client.py and async_client.py do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final, TypeVar

from xen9p import codec
from xen9p.codec import Dirent, Message, Qid
from xen9p.errors import ProtocolError

DEFAULT_MSIZE: Final = 512 * 1024
WINDOW: Final = 8
"""Requests that a stream of reads or writes keeps under way."""
_PAGE: Final = 4096

R = TypeVar("R", bound=Message)


class Fids:
    """Hands out fids; those that came back are used again."""

    def __init__(self) -> None:
        self._next = 0
        self._free: list[int] = []

    def take(self) -> int:
        """A fid that is not in use."""
        if self._free:
            return self._free.pop()
        self._next += 1
        return self._next - 1

    def give(self, fid: int) -> None:
        """The server has forgotten the fid."""
        self._free.append(fid)

    def forget(self) -> None:
        """The server has forgotten all of them."""
        self._next = 0
        self._free.clear()


def fitting(request: type[Message], reply: Message, wanted: type[R]) -> R:
    """The reply, if it is the wanted one.

    Raises:
        OSError: it is Rlerror.
        ProtocolError: it is another message.
    """
    if isinstance(reply, wanted):
        return reply
    if isinstance(reply, codec.Rlerror):
        raise OSError(reply.ecode, f"{request.__name__}: {os.strerror(reply.ecode)}")
    raise ProtocolError(f"{request.__name__} was answered with {type(reply).__name__}")


def check_version(reply: codec.Rversion, asked: int) -> int:
    """The msize in bytes that the server agrees to, of at most the one that was asked for."""
    if reply.version != codec.VERSION:
        raise ProtocolError(f"the server speaks {reply.version!r}, not {codec.VERSION!r}")
    if reply.msize > asked:
        raise ProtocolError(f"the server raised msize from {asked} to {reply.msize}")
    return reply.msize


def walk_steps(names: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    """The names in parts that fit a Twalk each, at least one."""
    return [tuple(names[i : i + codec.MAX_WALK]) for i in range(0, max(len(names), 1), codec.MAX_WALK)]


def check_walk(names: Sequence[bytes], qids: tuple[Qid, ...]) -> None:
    """Whether a walk came to its end; FileNotFoundError names where it stopped."""
    if len(qids) > len(names):
        raise ProtocolError(f"Rwalk has {len(qids)} qids for {len(names)} names")
    if len(qids) < len(names):
        # The server stopped on the way: newfid does not exist.
        raise FileNotFoundError(errno.ENOENT, "Twalk: No such file or directory", os.fsdecode(names[len(qids)]))


def check_read(data: bytes, count: int, name: str) -> bytes:
    """What a read brought, unless it is more than was asked for."""
    if len(data) > count:
        raise ProtocolError(f"{name} has {len(data)} bytes, {count} were asked for")
    return data


def check_dirents(reply: codec.Rreaddir, count: int) -> list[Dirent]:
    """The entries of a Rreaddir."""
    return list(codec.decode_dirents(check_read(reply.data, count, "Rreaddir")))


def check_written(reply: codec.Rwrite, length: int) -> int:
    """How many of length bytes were written; OSError if none was."""
    if reply.count > length:
        raise ProtocolError(f"Rwrite says {reply.count} bytes, {length} were sent")
    if length and not reply.count:
        raise OSError(errno.EIO, "Twrite: the server wrote nothing")
    return reply.count


def chunk(msize: int, iounit: int = 0, overhead: int = codec.WRITE_OVERHEAD) -> int:
    """Bytes of file data that a message of a stream carries: as many as fit, in whole pages if it is any."""
    most = msize - overhead
    if iounit:
        most = min(most, iounit)
    return most // _PAGE * _PAGE if most >= _PAGE else most


def setattr_message(
    fid: int,
    *,
    mode: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    size: int | None = None,
    atime_ns: int | None = None,
    mtime_ns: int | None = None,
) -> codec.Tsetattr:
    """Sets what is given: mode bits, owner, group, size in bytes, times in ns since 1970."""
    valid = 0
    for value, bit in (
        (mode, codec.SETATTR_MODE),
        (uid, codec.SETATTR_UID),
        (gid, codec.SETATTR_GID),
        (size, codec.SETATTR_SIZE),
        (atime_ns, codec.SETATTR_ATIME | codec.SETATTR_ATIME_SET),
        (mtime_ns, codec.SETATTR_MTIME | codec.SETATTR_MTIME_SET),
    ):
        valid |= bit if value is not None else 0
    atime, mtime = _timespec(atime_ns or 0), _timespec(mtime_ns or 0)
    return codec.Tsetattr(fid, valid, mode or 0, uid or 0, gid or 0, size or 0, *atime, *mtime)


def _timespec(ns: int) -> tuple[int, int]:
    """Seconds as the u64 that the wire has (before 1970 it is negative in two's complement), and nanoseconds."""
    seconds, rest = divmod(ns, 10**9)
    return seconds % (1 << 64), rest


def split(path: str | bytes) -> list[bytes]:
    """The components of a path; empty ones and '.' drop out."""
    raw = os.fsencode(path)
    return [name for name in raw.split(b"/") if name not in (b"", b".")]
