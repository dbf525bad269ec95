"""Weights of guests: the workers of each are put into a cgroup of their own, with memory and disk by weight.

The kernel charges a page of the page cache to the cgroup that brought it in. systemd owns the tree of cgroups, so it is
asked for a transient scope a guest, below xen9p.slice (StartTransientUnit, AttachProcessesToUnit of
org.freedesktop.systemd1(5)), by busctl(1). A scope ends by itself with its last process. Not below the service's own
unit: a cgroup that has others with controllers below it takes no process, and so the service could not be started
again while workers live on.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Sequence
from typing import Final

from xen9p.loop import Loop

log = logging.getLogger("xen9pd")

USUAL: Final = 100
SLICE: Final = "xen9p.slice"
PART: Final = 8
"""A guest of the usual weight has an eighth of the memory protected (memory.low), as far as all of them together fit
into what the slice has; beyond that, the kernel takes from each by how much it is above its part."""
SLICE_PART: Final = 2
PATIENCE: Final = 10.0
_MOST: Final = 10_000
_MANAGER: Final = (
    "busctl", "--quiet", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1",
    "org.freedesktop.systemd1.Manager",
)  # fmt: skip


def scope(guest: str, domid: int) -> str:
    """The name of a guest's scope; systemd's names take no other characters."""
    return f"xen9p-{re.sub(r'[^A-Za-z0-9_.]', '_', guest)[:60]}-{domid}.scope"


def memory() -> int:
    """Bytes of memory that the host has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def low(weight: int, total: int) -> int:
    """Bytes of page cache and other memory that a guest keeps when others want more."""
    return min(total // SLICE_PART, total // PART * weight // USUAL)


def start(guest: str, domid: int, weight: int, pid: int, total: int) -> list[str]:
    """The command that makes a guest's scope with a first process in it."""
    properties = [
        ("Description", "s", [f"xen9p workers of guest {guest}"]),
        ("Slice", "s", [SLICE]),
        ("PIDs", "au", ["1", str(pid)]),
        ("MemoryAccounting", "b", ["true"]),
        ("MemoryLow", "t", [str(low(weight, total))]),
        ("IOWeight", "t", [str(min(weight, _MOST))]),
    ]
    words = [word for name, kind, values in properties for word in (name, kind, *values)]
    return [*_MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))", scope(guest, domid), "fail",
            str(len(properties)), *words, "0"]  # fmt: skip


def join(guest: str, domid: int, pid: int) -> list[str]:
    """The command that puts another process there."""
    return [*_MANAGER, "AttachProcessesToUnit", "ssau", scope(guest, domid), "", "1", str(pid)]


def protect(total: int) -> list[str]:
    """The command that lets the guests' protection count: a cgroup protects no more than the one above it does."""
    return [*_MANAGER, "SetUnitProperties", "sba(sv)", SLICE, "true", "1", "MemoryLow", "t", str(total // SLICE_PART)]


class Weights:
    """Puts workers into their guests' scopes, one after the other, beside the supervisor's loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: list[list[Sequence[str]]] = []
        self._running: subprocess.Popen[bytes] | None = None
        self._said = False
        self._protected = False

    def set(self, guest: str, domid: int, weight: int, pid: int) -> None:
        """A worker of a guest with a weight has started."""
        total = memory()
        # The scope is there or is not, which changes at any time: the first that works will do.
        self._waiting.append([join(guest, domid, pid), start(guest, domid, weight, pid, total)])
        if not self._protected:
            self._protected = True
            self._waiting.append([protect(total)])
        self._next()

    def _next(self) -> None:
        while self._running is None and self._waiting:
            ways = self._waiting[0]
            try:
                process = subprocess.Popen(
                    ways[0], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
            except OSError as error:
                self._give_up(f"{ways[0][0]}: {error.strerror}")
                continue
            self._running = process
            pidfd = os.pidfd_open(process.pid)
            timer = self._loop.after(PATIENCE, process.kill)

            def ended(process: subprocess.Popen[bytes] = process, pidfd: int = pidfd, timer: int = timer) -> None:
                self._loop.remove(pidfd)
                os.close(pidfd)
                self._loop.cancel(timer)
                said = process.stderr.read(300).decode(errors="replace").strip() if process.stderr else ""
                code = process.wait()
                if process.stderr:
                    process.stderr.close()
                self._running = None
                self._ended(code, said)

            self._loop.add(pidfd, ended)

    def _ended(self, code: int, said: str) -> None:
        ways = self._waiting[0]
        if code == 0 or len(ways) == 1:
            if code:
                self._give_up(said or f"busctl ended with {code}")
            else:
                self._waiting.pop(0)
        else:
            ways.pop(0)
        self._next()

    def _give_up(self, why: str) -> None:
        self._waiting.pop(0)
        if not self._said:
            self._said = True
            log.warning(
                "guests have no weights: %s (it takes systemd with cgroup v2 and busctl)", " ".join(why.split())
            )
