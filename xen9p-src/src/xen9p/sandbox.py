"""Shuts a serving process in, before it sees a byte of what its peer sends: decision 0017 says with what and why.

Whatever the process needs from outside has to be open or imported before. All of this is for the calling process
and the threads that it starts afterwards, and none of it can be taken back.
"""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Final

from xen9p._dataplane import ffi, lib
from xen9p.errors import Xen9pError

EXPORT: Final = "/tmp/export"
"""Where a caged export is until the door shuts; /export afterwards (CAGE in sandbox.c)."""
ORIGIN: Final = "/tmp/origin"
"""The same of the tree that it was cloned from."""

# Numbers of linux/capability.h: what the guests' users may need to have done on their files. The caller's identity
# takes most of them off the threads' effective sets; it cannot put back what is not here.
CAPABILITIES: Final = {
    "chown": 0,
    "dac_override": 1,
    "dac_read_search": 2,
    "fowner": 3,
    "fsetid": 4,
    "setgid": 6,
    "setuid": 7,
    "mknod": 27,
    "setfcap": 31,
}


def prepare() -> None:
    """Makes the filter of system calls, which takes the longest: a zygote does it once for all its workers.

    Raises:
        Xen9pError: libseccomp is missing.
    """
    err = lib.x9_seccomp_prepare()
    if err:
        raise _failure("making the filter of system calls", err, "it takes libseccomp 2 (Debian: libseccomp2)")


def go_private() -> None:
    """An empty network, and System V objects and a host name of its own. Once, for a zygote and all its workers.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN.
    """
    _raise(lib.x9_cage_alone())


def cage(path: str, readonly: bool, origin: str | None = None) -> int:
    """Makes a mount namespace with an export alone in a new root, still ajar; a descriptor of the export in there.

    Args:
        origin: the tree that the export was cloned from: it is there too, read-only, for open_origin().

    The process must have no other thread yet, and no descriptor of a directory.

    Raises:
        Xen9pError: the export is missing or no directory, or the process lacks CAP_SYS_ADMIN.
    """
    prepare()
    step = ffi.new("const char **")
    err = lib.x9_cage_build(os.fsencode(path), readonly, os.fsencode(origin) if origin else ffi.NULL, step)
    if err:
        name = ffi.string(step[0]).decode()
        if name == "taking the export" and err != errno.EPERM:
            raise Xen9pError(f"cannot serve {path}: {os.strerror(err)}", "an export is an existing directory", err)
        raise _failure(name, err, "a worker starts as root with CAP_SYS_ADMIN")
    return _open_tree(EXPORT)


def open_origin() -> int:
    """A descriptor of the tree that cage() was told of, before the door shuts. Raises OSError."""
    return _open_tree(ORIGIN)


def _open_tree(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def shut(export_fd: int, readonly: bool, origin_fd: int = -1) -> list[str]:
    """Shuts a caged worker in for good; what the kernel has no means for, in words.

    Raises:
        Xen9pError: what must work did not; the process is not to serve.
    """
    step = ffi.new("const char **")
    err = lib.x9_cage_shut(step)
    if err:
        raise _failure(ffi.string(step[0]).decode(), err, "a worker starts as root with CAP_SYS_ADMIN")
    return _give_up(export_fd, readonly, origin_fd=origin_fd)


def confine_server(export_fd: int, readonly: bool, address: tuple[str, int] | str) -> list[str]:
    """What of that a server on a socket can do, without root and its export at its place; what is missing, in words.

    Args:
        export_fd: a descriptor of the export.
        address: what the server listens on already; a Unix socket's path may be removed at the end.

    Raises:
        Xen9pError: what must work did not.
    """
    prepare()
    folder = Path(address).parent if isinstance(address, str) else None
    folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if folder else -1
    try:
        return _give_up(export_fd, readonly, folder_fd)
    finally:
        if folder_fd >= 0:
            os.close(folder_fd)


def _give_up(export_fd: int, readonly: bool, remove_fd: int = -1, origin_fd: int = -1) -> list[str]:
    """Capabilities, core files, Landlock, system calls: in this order, as each takes away what the one before needs."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, err in (
        ("dropping capabilities", lib.x9_drop_capabilities(sum(1 << number for number in CAPABILITIES.values()))),
        ("setting no_new_privs", lib.x9_no_new_privileges()),
    ):
        if err:
            raise _failure(name, err)
    version = lib.x9_landlock(export_fd, readonly, remove_fd, origin_fd)
    missing = []
    if version <= 0:
        reason = os.strerror(-version) if version else "the kernel has none, or one before Linux 5.19"
        missing.append(f"not confined by Landlock: {reason}")
    err = lib.x9_seccomp()
    if err:
        raise _failure("loading the filter of system calls", err)
    return missing


def _failure(step: str, err: int, hint: str = "") -> Xen9pError:
    return Xen9pError(f"cannot confine the process: {step}: {os.strerror(err)}", hint, err)


def _raise(err: int) -> None:
    if err:
        raise OSError(err, os.strerror(err))
