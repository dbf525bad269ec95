"""Events of the kernel, counted by itself: histograms in an instance of tracefs of our own; nothing is recorded.

Sources: Documentation/trace/ftrace.rst (instances), kprobetrace.rst (kprobe_events), histogram.rst (hist triggers).
Works in dom0 and, as a file beside the agent, in the guest: it imports nothing of ours.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

USUAL = Path("/sys/kernel/tracing")
NAME = "xen9p_count"
"""Of the instance, and of the group that the kprobes are in."""

Row = dict[str, Any]
"""One entry of a histogram: its keys (text), "hits", and the sum of each value (numbers)."""

_ROW = re.compile(r"^\{ (?P<keys>.*?)\s*\} hitcount:\s*(?P<hits>\d+)(?P<sums>.*)$")
_SUM = re.compile(r"(\w+):\s*(\d+)")
_DROPPED = re.compile(r"^\s*Dropped: ([1-9]\d*)$", re.MULTILINE)


class TraceError(Exception):
    """One line: what of tracefs cannot be used."""


@dataclass(frozen=True)
class Event:
    """What is counted: a tracepoint ("block/block_rq_issue"), or a kprobe on a function of the kernel ("name").

    *keys* and *values* as in hist:keys=...:vals=...; *fetch* are a kprobe's arguments ("irq=%di:s32").
    """

    name: str
    where: str
    keys: str
    values: str = ""
    fetch: str = ""

    @property
    def is_probe(self) -> bool:
        """Whether it is a kprobe."""
        return "/" not in self.where

    @property
    def trigger(self) -> str:
        """The histogram."""
        return f"hist:keys={self.keys}" + (f":vals={self.values}" if self.values else "")

    def as_dict(self) -> dict[str, str]:
        """For the agent in the guest: Event(**this)."""
        return asdict(self)


@contextmanager
def mounted(scratch: Path, usual: Path = USUAL) -> Iterator[Path]:
    """Where tracefs is; mounted at *scratch*, which is made and removed, while it is not mounted as usual.

    Raises:
        TraceError: it cannot be mounted.
    """
    if (usual / "instances").is_dir():
        yield usual
        return
    scratch.mkdir(parents=True, exist_ok=True)
    if not (scratch / "instances").is_dir():  # an earlier run may have been killed
        done = subprocess.run(
            ["mount", "-t", "tracefs", "tracefs", str(scratch)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise TraceError(f"tracefs cannot be mounted: {done.stderr.strip()}")
    try:
        yield scratch
    finally:
        subprocess.run(["umount", str(scratch)], check=False)
        scratch.rmdir()


class Counting:
    """The counters of some events, from open() to close(). *missing*: event -> why it cannot be counted here."""

    def __init__(self, tracing: Path, events: Sequence[Event]) -> None:
        self._tracing = tracing
        self._folder = tracing / "instances" / NAME
        self._events = list(events)
        self.missing: dict[str, str] = {}

    def open(self) -> None:
        """Begin to count, after clearing away what a run that was killed has left.

        Raises:
            TraceError: tracefs lets nobody make an instance.
        """
        remove(self._tracing)
        try:
            self._folder.mkdir()
        except OSError as error:
            raise TraceError(f"{self._folder}: {error.strerror}: only root can count events") from error
        for event in self._events:
            try:
                if event.is_probe:
                    _append(self._tracing / "kprobe_events", f"p:{NAME}/{event.name} {event.where} {event.fetch}")
                self._trigger(event).with_name("hist").stat()
                _append(self._trigger(event), event.trigger)
            except OSError as error:
                self.missing[event.name] = _reason(event, error)

    def clear(self) -> None:
        """Set all counters to zero."""
        for event in self._counted():
            _append(self._trigger(event), f"{event.trigger}:clear")

    def read(self) -> dict[str, list[Row]]:
        """Event -> the rows of its histogram.

        Raises:
            TraceError: a histogram was full, so that something was not counted.
        """
        return {event.name: self._rows(event) for event in self._counted()}

    def close(self) -> None:
        """End, and leave nothing."""
        for event in self._counted():
            with suppress(OSError):
                _append(self._trigger(event), f"!{event.trigger}")
        remove(self._tracing)

    def _counted(self) -> list[Event]:
        return [event for event in self._events if event.name not in self.missing]

    def _trigger(self, event: Event) -> Path:
        where = f"{NAME}/{event.name}" if event.is_probe else event.where
        return self._folder / "events" / where / "trigger"

    def _rows(self, event: Event) -> list[Row]:
        text = self._trigger(event).with_name("hist").read_text()
        if dropped := _DROPPED.search(text):
            raise TraceError(f"{event.where}: {dropped[1]} events found no room in the histogram")
        return rows(text)


def rows(text: str) -> list[Row]:
    """The entries of a histogram, as its file shows them."""
    found: list[Row] = []
    for line in text.splitlines():
        if match := _ROW.match(line):
            keys = (key.partition(":") for key in match["keys"].split(", "))
            sums = {name: int(value) for name, value in _SUM.findall(match["sums"])}
            found.append({name.strip(): value.strip() for name, _, value in keys} | {"hits": int(match["hits"])} | sums)
    return found


def remove(tracing: Path) -> bool:
    """Remove our instance, with its triggers, and our kprobes; whether there were any."""
    folder = tracing / "instances" / NAME
    found = folder.is_dir()
    if found:
        folder.rmdir()
    with suppress(FileNotFoundError):
        for line in (tracing / "kprobe_events").read_text().splitlines():
            event = line.split()[0].partition(":")[2]
            if event.startswith(f"{NAME}/"):
                found = True
                _append(tracing / "kprobe_events", f"-:{event}")
    return found


def _append(path: Path, text: str) -> None:
    # Opening with O_TRUNC would remove what is there.
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(handle, text.encode() + b"\n")
    finally:
        os.close(handle)


def _reason(event: Event, error: OSError) -> str:
    # From kprobe_events: ENOENT and EINVAL are a function that is not there, or that must not be probed.
    if event.is_probe and error.filename is None and error.errno in {errno.ENOENT, errno.EINVAL}:
        return f"this kernel has no function {event.where} that can be probed"
    if error.errno == errno.ENOENT:
        kind = "no kprobes" if event.is_probe else f"no event {event.where}"
        return f"this kernel has {kind}, or no histograms of events (CONFIG_HIST_TRIGGERS)"
    return f"{event.where}: {error.strerror}"
