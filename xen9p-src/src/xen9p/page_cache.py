"""What of files is in the kernel's page cache.

By cachestat(2) (Linux 6.5), or by mincore(2) on a mapping where that is not there; neither brings anything in.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
MOST_FILES: Final = 500_000
_CHUNK: Final = 256 << 20
_SYS_CACHESTAT: Final = 451  # the same everywhere
_PROT_READ, _MAP_SHARED = 1, 1
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_has_cachestat = True


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent"))


def resident(fd: int, size: int) -> int:
    """Bytes of an open regular file that are in the page cache, in whole pages.

    Raises:
        OSError: EACCES, the descriptor cannot be read from.
    """
    global _has_cachestat  # noqa: PLW0603  # what the kernel is, once
    if size <= 0:
        return 0
    if _has_cachestat:
        found = _Stat()
        wanted = _Range(0, 0)
        if not _libc.syscall(_SYS_CACHESTAT, fd, ctypes.byref(wanted), ctypes.byref(found), 0):
            return int(found.cached) * PAGE
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        _has_cachestat = False
    return sum(bytes_.count(1) for bytes_ in pages(fd, size)) * PAGE


def pages(fd: int, size: int) -> Iterator[bytes]:
    """By mincore(2): 1 for each page that is there, 0 for the others, in pieces.

    The kernel tells only who may write the file or owns it; to others it says that everything is there.
    """
    for start in range(0, size, _CHUNK):
        length = min(_CHUNK, size - start)
        address = _libc.mmap(None, length, _PROT_READ, _MAP_SHARED, fd, start)
        if address in (None, _FAILED):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            vector = ctypes.create_string_buffer(-(-length // PAGE))
            if _libc.mincore(address, length, vector):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            yield bytes(byte & 1 for byte in vector.raw)
        finally:
            _libc.munmap(address, length)


@dataclass(frozen=True, slots=True)
class Found:
    """A file that has something in the page cache."""

    path: bytes
    device: int
    inode: int
    size: int
    changed: int
    """Its ctime in nanoseconds."""
    resident: int


@dataclass(slots=True)
class Count:
    """What walk() has come across: regular files, their bytes; failed: what could not be looked at."""

    files: int = 0
    bytes: int = 0
    failed: int = 0
    complete: bool = True


def walk(
    root: Path, count: Count, tell: Callable[[str], None], most: int = MOST_FILES, every: float = 5.0
) -> Iterator[Found]:
    """Every file of a tree with something in the page cache, once, however many names it has.

    No link is followed, no other filesystem entered but subvolumes, and nothing but regular files opened.

    Args:
        count: is filled in; complete is False if there were more than *most* files.
        tell: is told how far it is, every so many seconds.
    """
    said = time.monotonic()
    twice: set[tuple[int, int]] = set()
    for folder, _, names, fd in os.fwalk(os.fsencode(root), follow_symlinks=False):
        for name in names:
            if count.files >= most:
                count.complete = False
                return
            try:
                there = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if not stat.S_ISREG(there.st_mode):
                    continue
                key = there.st_dev, there.st_ino
                if there.st_nlink > 1 and key in twice:
                    continue
                if there.st_nlink > 1:
                    twice.add(key)
                count.files += 1
                count.bytes += there.st_size
                size = _look(name, fd, key, there.st_size)
            except OSError:
                count.failed += 1
                continue
            if size:
                path = os.path.join(folder, name)[len(os.fsencode(root)) :]
                yield Found(path, *key, there.st_size, there.st_ctime_ns, size)
        if time.monotonic() - said >= every:
            said = time.monotonic()
            tell(f"{root}: {count.files} files looked at")


def _look(name: bytes, folder: int, key: tuple[int, int], size: int) -> int:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC, dir_fd=folder)
    try:
        there = os.fstat(fd)
        return resident(fd, size) if (there.st_dev, there.st_ino) == key else 0
    finally:
        os.close(fd)
