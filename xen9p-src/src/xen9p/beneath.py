"""Files beneath a directory whose content is not trusted: no link is followed, and nothing is waited for.

As the data plane does (fs.c): openat2(2) from a descriptor, and names only of the last component.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from contextlib import suppress
from typing import Final

_SYS_OPENAT2: Final = 437  # the same everywhere
NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 2, 4, 8  # linux/openat2.h: RESOLVE_*
_EXCHANGE: Final = 2
_MOST_PATH: Final = 3000  # bytes, less than PATH_MAX
_MOST_PASSES: Final = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(root: int, path: bytes, flags: int, resolve: int, tries: int) -> int:
    """openat2(2), so many times while renames elsewhere keep the kernel from being sure.

    Raises:
        OSError: as openat2(2); EAGAIN after the last try, EINVAL for a path with a NUL.
    """
    if b"\0" in path:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    how = _How(flags | os.O_CLOEXEC, 0, resolve)
    for _ in range(tries):
        fd = int(_libc.syscall(_SYS_OPENAT2, root, path, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))))
        if fd >= 0:
            return fd
        err = ctypes.get_errno()
        if err != errno.EAGAIN:
            break
    raise OSError(err, os.strerror(err), os.fsdecode(path[:200]))


def open_beneath(root: int, path: bytes, flags: int = os.O_PATH) -> int:
    """A descriptor of a path beneath root, however long; b"" is root itself. A FIFO or device does not hold it up.

    Raises:
        OSError: ELOOP, a component is a symbolic link; EXDEV, it leads out; ENOENT, ENOTDIR, ...
    """
    here, passed = root, -1
    while len(path) > _MOST_PATH:
        cut = path.rindex(b"/", 0, _MOST_PATH)
        try:
            here = _open(here, path[:cut], os.O_PATH | os.O_DIRECTORY)
        finally:
            if passed >= 0:
                os.close(passed)
        passed, path = here, path[cut + 1 :]
    try:
        return _open(here, path, flags)
    finally:
        if passed >= 0:
            os.close(passed)


def _open(root: int, path: bytes, flags: int) -> int:
    more = os.O_NOFOLLOW | (0 if flags & os.O_PATH else os.O_NONBLOCK)
    return openat2(root, path or b".", flags | more, _BENEATH | _NO_SYMLINKS | NO_MAGICLINKS, 100)


def open_parent(root: int, path: bytes) -> tuple[int, bytes]:
    """A descriptor of a path's directory, and the last component. Raises OSError."""
    folder, _, name = path.rpartition(b"/")
    return open_beneath(root, folder, os.O_PATH | os.O_DIRECTORY), name


def exchange(folder: int, name: str, other_folder: int, other: str) -> None:
    """Two names change places, at once or not at all. Raises OSError."""
    if _libc.renameat2(folder, os.fsencode(name), other_folder, os.fsencode(other), _EXCHANGE):
        err = ctypes.get_errno()
        raise OSError(err, os.strerror(err))


def remove(folder: int, name: bytes) -> None:
    """Removes a name with all that is below it, however deep; one that is gone already is well. Raises OSError."""
    try:
        if not stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
            os.unlink(name, dir_fd=folder)
            return
        top = _directory(folder, name)
    except FileNotFoundError:
        return
    try:
        _empty(top)
    finally:
        os.close(top)
    with suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=folder)


def _directory(folder: int, name: bytes | str) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


def _empty(top: int) -> None:
    """What is below the first level is brought up to it first, so that no depth costs a descriptor."""
    for _ in range(_MOST_PASSES):
        again = _directory(top, ".")  # btrfs shows only what was there when a directory was opened
        try:
            found = os.listdir(again)
        finally:
            os.close(again)
        if not found:
            return
        for name in found:
            with suppress(FileNotFoundError):
                if not stat.S_ISDIR(os.lstat(name, dir_fd=top).st_mode):
                    os.unlink(name, dir_fd=top)
                    continue
                below = _directory(top, name)
                try:
                    for inner in os.listdir(below):
                        if stat.S_ISDIR(os.lstat(inner, dir_fd=below).st_mode):
                            os.rename(inner, f".x{secrets.token_hex(12)}", src_dir_fd=below, dst_dir_fd=top)
                        else:
                            os.unlink(inner, dir_fd=below)
                finally:
                    os.close(below)
                os.rmdir(name, dir_fd=top)
    raise OSError(errno.ENOTEMPTY, "a guest goes on filling it")
