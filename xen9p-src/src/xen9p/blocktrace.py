"""Requests of a block device as they are issued, from the kernel's tracefs, in an instance of our own.

Sources: Documentation/trace/ftrace.rst (instances), events/block/block_rq_issue/format. Sectors have 512 bytes.
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xen9p.errors import Xen9pError
from xen9p.escape import escape

TRACING: Final = Path("/sys/kernel/tracing")
_EVENT: Final = re.compile(
    r"\s*(?P<task>.{1,40})-\d+\s.*?(?P<time>\d+\.\d+): block_rq_issue: (?P<major>\d+),(?P<minor>\d+) (?P<kind>[A-Z]+) "
    r"\d+ \(.*?\) (?P<sector>\d+) \+ (?P<count>\d+) "
)


@dataclass(frozen=True, slots=True)
class Issue:
    """A request: what it is (rwbs, as in blkparse(1)), its sectors, who issued it, seconds since the host's start."""

    device: tuple[int, int]
    kind: str
    sector: int
    count: int
    task: str
    time: float


def parse(line: str) -> Issue | None:
    """The request in a line of trace_pipe."""
    match = _EVENT.match(line)
    if match is None:
        return None
    device = int(match["major"]), int(match["minor"])
    task = escape(match["task"].strip().encode(errors="surrogateescape"))
    return Issue(device, match["kind"], int(match["sector"]), int(match["count"]), task, float(match["time"]))


def whole_disk(number: int) -> tuple[int, int]:
    """The disk of a block device's number, and the disk's sector at which it begins: requests are the disk's."""
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    try:
        if not (folder / "partition").exists():
            return number, 0
        major, minor = (folder.resolve().parent / "dev").read_text().split(":")
        return os.makedev(int(major), int(minor)), int((folder / "start").read_text())
    except (OSError, ValueError):
        return number, 0


def watch(number: int, byte: int, seconds: float, ready: Callable[[], None], tracing: Path = TRACING) -> Issue | None:
    """Waits for a request of a block device for one of its bytes; None if none comes.

    Args:
        number: of the device (st_rdev).
        byte: from the begin of the device.
        seconds: how long.
        ready: called when nothing can be missed.
        tracing: where tracefs is mounted.

    Raises:
        Xen9pError: there is no tracefs, or it is not ours to use.
    """
    disk, start = whole_disk(number)
    sector = start + byte // 512
    until = time.monotonic() + seconds
    with _instance(tracing, disk) as pipe:
        ready()
        rest = b""
        while (left := until - time.monotonic()) > 0:
            if not select.select([pipe], [], [], min(left, 0.2))[0]:
                continue
            with suppress(BlockingIOError):
                *lines, rest = (rest + os.read(pipe, 1 << 16)).split(b"\n")
                for line in lines:
                    issue = parse(line.decode(errors="surrogateescape"))
                    if issue and os.makedev(*issue.device) == disk and 0 <= sector - issue.sector < issue.count:
                        return issue
    return None


@contextmanager
def _instance(tracing: Path, disk: int) -> Iterator[int]:
    folder = tracing / "instances" / f"xen9p-{os.getpid()}"
    event = folder / "events" / "block" / "block_rq_issue"
    try:
        folder.mkdir()
    except OSError as error:
        raise Xen9pError(
            f"cannot trace: {folder}: {error.strerror}", f"as root: mount -t tracefs tracefs {tracing}"
        ) from None
    try:
        # As the kernel has the number within itself: 20 bits of minor.
        (event / "filter").write_text(f"dev == {os.major(disk) << 20 | os.minor(disk)}")
        pipe = os.open(folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            (event / "enable").write_text("1")
            yield pipe
            (event / "enable").write_text("0")
        finally:
            os.close(pipe)
    except OSError as error:
        raise Xen9pError(
            f"cannot trace: {error.strerror}", "does this kernel have the block events? ls events/block"
        ) from None
    finally:
        with suppress(OSError):
            folder.rmdir()
