"""Lease tables on a host: a file for each filesystem, shared by all workers that serve something of it (decision 25).

Exports may lie beneath each other or be the same directory by two ways. What they have in common is the filesystem, so
that is what a table is for. The files lie in the runtime directory and outlive the supervisor, as workers do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from xen9p.dataplane import Leases
from xen9p.defaults import MOST_TERM
from xen9p.errors import Xen9pError
from xen9p.quota import mount_of

log = logging.getLogger(__name__)

_PREFIX: Final = "leases1-"  # counts with the layout: workers of another version must not find it
_LOOK: Final = 0.02


def path_of(runtime: Path, export: Path) -> Path:
    """Where the table is for what lies in a directory. Raises OSError, the directory is missing."""
    return runtime / f"{_PREFIX}{mount_of(export).device.replace(':', '-')}"


def open_table(path: Path) -> Leases:
    """A table by its file, which is made if need be.

    Raises:
        Xen9pError: it cannot be used.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Xen9pError(f"cannot use the lease table {path}: {error.strerror}", errno=error.errno) from None
    try:
        return Leases(fd)
    finally:
        os.close(fd)


def new_table() -> Leases:
    """A table for the devices of this process and those that it forks.

    Raises:
        Xen9pError: out of memory.
    """
    fd = os.memfd_create("xen9p-leases", os.MFD_CLOEXEC)
    try:
        return Leases(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Leases | None]:
    """A table that is there; None, with a line in the log, if it is none."""
    try:
        table = open_table(path)
    except Xen9pError as error:
        log.error("%s", error)
        yield None
        return
    try:
        yield table
    finally:
        table.close()


def clean(runtime: Path, alive: set[int]) -> None:
    """Undoes what workers that are gone were doing, and what a supervisor or a restore left half done."""
    for path in runtime.glob(f"{_PREFIX}*"):
        with _opened(path) as table:
            if table is not None:
                table.thaw()
                for pid in table.pids() - alive:
                    table.recover(pid)


def recover(runtime: Path, pid: int) -> None:
    """Undoes what a worker was doing that has just ended."""
    for path in runtime.glob(f"{_PREFIX}*"):
        with _opened(path) as table:
            if table is not None:
                table.recover(pid)


def revoke(runtime: Path, export: Path, waiting: Callable[[], None] = lambda: None) -> None:
    """Has all clients give up what they keep of the filesystem that a directory lies on: somebody who is no guest has
    changed it. Returns when they have, or their terms are over.

    Args:
        waiting: called now and then meanwhile.

    Raises:
        Xen9pError: the table cannot be used.
    """
    path = path_of(runtime, export)
    if not path.exists():
        return
    table = open_table(path)
    try:
        table.freeze()
        until = time.monotonic() + 2 * MOST_TERM  # sessions end by themselves; this is for a table that is no good
        while table.owed() and time.monotonic() < until:
            waiting()
            time.sleep(_LOOK)
    finally:
        table.thaw()
        table.close()
