"""The hands in the guest of what counts translations: does a piece of work between two marks, and counts its events.

Reads a JSON object a line from standard input and answers with one, as agent.py does. tracefs.py and meters.py beside
it are dom0's own. A mark is MARK hypercalls of one kind, which Xen's trace shows (see xentrace.py).
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import agent
import meters
import tracefs
import workloads

MARK = 64
VERSION = "/sys/hypervisor/version/major"
TRACING = Path("/run/xen9p-tracing")
PAGE, PIECE = 4096, 65536
SEQUENTIAL, MAPPED = 4 << 20, 1 << 20
COLD, WARM, CREATED, LOOKED_AT = 4, 64, 50, 200
DATA = os.urandom(PIECE)


@dataclass
class Place:
    """Where work is done, and the file that is open for it."""

    path: str
    file: int = -1
    mapping: mmap.mmap | None = None

    def open(self, name: str, flags: int = os.O_RDONLY) -> None:
        """Open a file for the work."""
        self.file = os.open(f"{self.path}/{name}", flags, 0o644)

    def close(self) -> None:
        """Close what is open."""
        if self.mapping is not None:
            self.mapping.close()
        if self.file >= 0:
            os.close(self.file)


@dataclass(frozen=True)
class Work:
    """*before* is not counted, *run* is: it returns how many operations it did and how many bytes it moved."""

    run: Callable[[Place], tuple[int, int]]
    before: Callable[[Place], None] = lambda _: None
    after: Callable[[Place], None] = lambda _: None


def idle(_: Place) -> tuple[int, int]:
    """A second without any work: what there is besides."""
    time.sleep(1)
    return 0, 0


def read_cold(place: Place) -> tuple[int, int]:
    """The first page of each of some files."""
    for number in range(COLD):
        file = os.open(f"{place.path}/read-{number}", os.O_RDONLY)
        _full(os.pread(file, PAGE, 0), PAGE)
        os.close(file)
    return COLD, COLD * PAGE


def read_warm(place: Place) -> tuple[int, int]:
    """The first pages of a file, one by one."""
    for number in range(WARM):
        _full(os.pread(place.file, PAGE, number * PAGE), PAGE)
    return WARM, WARM * PAGE


def read_all(place: Place) -> tuple[int, int]:
    """The begin of a file in large pieces."""
    for offset in range(0, SEQUENTIAL, PIECE):
        _full(os.pread(place.file, PIECE, offset), PIECE)
    return SEQUENTIAL // PIECE, SEQUENTIAL


def write_all(place: Place) -> tuple[int, int]:
    """A new file in large pieces, and fsync."""
    for _ in range(SEQUENTIAL // PIECE):
        if os.write(place.file, DATA) != PIECE:
            raise OSError(errno.EIO, "short write")
    os.fsync(place.file)
    return SEQUENTIAL // PIECE, SEQUENTIAL


def create(place: Place) -> tuple[int, int]:
    """New files with a line in each; sync, so that what is put off counts too."""
    workloads.create(place.path, CREATED)
    os.sync()
    return CREATED, CREATED * 5


def stat(place: Place) -> tuple[int, int]:
    """The attributes of files."""
    for number in range(LOOKED_AT):
        os.stat(f"{place.path}/few/f{number}")
    return LOOKED_AT, 0


def _walk(path: str) -> int:
    """Names and attributes of all below a directory: what find -size and ls -l ask for."""
    count = 0
    with os.scandir(path) as entries:
        for entry in entries:
            count += 1
            os.lstat(entry.path)
            if entry.is_dir(follow_symlinks=False):
                count += _walk(entry.path)
    return count


def find(place: Place) -> tuple[int, int]:
    """A tree of small files."""
    return _walk(f"{place.path}/tree"), 0


def listing(place: Place) -> tuple[int, int]:
    """One large directory."""
    return _walk(f"{place.path}/few"), 0


def read_mapped(place: Place) -> tuple[int, int]:
    """A byte of each page of a mapping."""
    assert place.mapping is not None
    for offset in range(0, MAPPED, PAGE):
        place.mapping[offset]
    return MAPPED // PAGE, MAPPED


def _full(data: bytes, wanted: int) -> None:
    if len(data) != wanted:
        raise OSError(errno.EIO, "short read")


def _open_read(place: Place) -> None:
    place.open("read-0")


def _map(place: Place) -> None:
    place.open("read-1")
    place.mapping = mmap.mmap(place.file, MAPPED, mmap.MAP_PRIVATE, mmap.PROT_READ)


def _warm(place: Place) -> None:
    place.open("read-2")
    read_warm(place)


def _make(place: Place) -> None:
    place.open("counted", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def _unmake(place: Place) -> None:
    os.unlink(f"{place.path}/counted")


def _remove_created(place: Place) -> None:
    for name in os.listdir(f"{place.path}/new"):
        os.unlink(f"{place.path}/new/{name}")


WORK = {
    "idle": Work(idle),
    "read-4k-cold": Work(read_cold),
    "read-4k-warm": Work(read_warm, _warm),
    "read-seq": Work(read_all, _open_read),
    "write-seq": Work(write_all, _make, _unmake),
    "create": Work(create, after=_remove_created),
    "stat": Work(stat, lambda place: (stat(place), None)[1]),
    "find": Work(find),
    "list": Work(listing, lambda place: (listing(place), None)[1]),
    "mmap-read": Work(read_mapped, _map),
}


class Counter:
    """Counts between marks, from open() to close()."""

    def __init__(self) -> None:
        self._mount: Any = None
        self._counting: tracefs.Counting | None = None
        self._work: Work | None = None
        self._place: Place | None = None
        self._device = ""
        self._version = os.open(VERSION, os.O_RDONLY) if os.path.exists(VERSION) else -1

    def open(self, events: list[dict[str, str]]) -> dict[str, Any]:
        """Begin with these events."""
        self._mount = tracefs.mounted(TRACING)
        self._counting = tracefs.Counting(self._mount.__enter__(), [tracefs.Event(**event) for event in events])
        self._counting.open()
        return {"missing": self._counting.missing}

    def close(self) -> dict[str, Any]:
        """End, and leave nothing."""
        if self._counting is not None:
            self._counting.close()
            self._mount.__exit__(None, None, None)
        self._counting = None
        return {}

    def _mark(self) -> None:
        if self._version < 0:
            return
        # No other process may come in between: the mark's hypercalls have to be close to each other.
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        for _ in range(MARK):
            os.pread(self._version, 8, 0)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what comes before a piece of work and is not counted; "failed" with the reason if this side cannot."""
        self._work, self._place, self._device = WORK[request["work"]], Place(request["place"]), request["device"]
        try:
            self._work.before(self._place)
            os.sync()
        except OSError as error:
            return {"failed": _reason(error)}
        return {"failed": ""}

    def count(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do the piece of work, between marks, and say what it took; "failed" with the reason if this side cannot."""
        if self._counting is None or self._place is None or self._work is None:
            raise agent.WorkError("open and prepare come first")
        operations, moved, failed = 0, 0, ""
        time.sleep(request["rest"])
        with _quiet():
            irqs, disk = meters.interrupts(_text("/proc/interrupts")), _disk(self._device)
            self._counting.clear()
            switched = meters.switches(_text("/proc/stat"))
            self._mark()
            began = time.monotonic()
            try:
                operations, moved = self._work.run(self._place)
            except OSError as error:
                failed = _reason(error)
            seconds = time.monotonic() - began
            self._mark()
            switched = meters.switches(_text("/proc/stat")) - switched
            rows = self._counting.read()
            after = meters.interrupts(_text("/proc/interrupts"))
            done = {name: count - disk[name] for name, count in _disk(self._device).items()}
        number = os.stat(f"/dev/{self._device}").st_rdev if self._device else 0
        return {
            "operations": operations,
            "bytes": moved,
            "seconds": seconds,
            "failed": failed,
            "rows": rows,
            "switches": switched,
            "interrupts": {n: (name, count - irqs.get(n, (name, 0))[1]) for n, (name, count) in after.items()},
            "disk": [os.major(number), os.minor(number)],
            "disk_done": done,
        }

    def finish(self) -> dict[str, Any]:
        """Take away what the work has made."""
        if self._place is not None and self._work is not None:
            self._place.close()
            with suppress(OSError):
                self._work.after(self._place)
        self._work = self._place = None
        return {}


@contextmanager
def _quiet() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _reason(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO)


def _text(path: str) -> str:
    return Path(path).read_text()


def _disk(device: str) -> dict[str, int]:
    return meters.completed(_text(f"/sys/block/{device}/stat")) if device else {}


def main() -> int:
    """Answer until standard input ends."""
    counter = Counter()

    def perform(request: dict[str, Any]) -> dict[str, Any]:
        try:
            if request["do"] == "open":
                return counter.open(request["events"])
            if request["do"] == "prepare":
                return counter.prepare(request)
            if request["do"] == "count":
                return counter.count(request)
            if request["do"] == "finish":
                return counter.finish()
        except tracefs.TraceError as error:
            raise agent.WorkError(str(error)) from error
        if request["do"] == "close":
            return counter.close()
        if request["do"] == "bytes":
            with open(f"{request['place']}/read-0", "rb", buffering=0) as file:
                return {"data": os.pread(file.fileno(), request["count"], request["offset"]).hex()}
        return agent.perform(request)

    try:
        return agent.serve(perform)
    finally:
        counter.close()


if __name__ == "__main__":
    sys.exit(main())
