"""`xen9p top`: what each device does now, in a terminal, as text for scripts, or as JSON lines."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from xen9p import control
from xen9p.errors import ControlError, Xen9pError
from xen9p.escape import escape
from xen9p.histogram import quantile, since, total
from xen9p.traceformat import duration

_LEAST, _MOST = 0.2, 60.0  # seconds between two looks


@dataclass(frozen=True, slots=True)
class Row:
    """One device in one interval; rates are a second, latencies upper bounds in seconds (None: nothing came)."""

    guest: str
    tag: str
    export: str
    state: str
    ops: float
    read: float
    written: float
    errors: float
    p50: float | None
    p99: float | None
    fids: int
    in_flight: int
    queued: int
    throttled: float


SORTS: Final[dict[str, Callable[[Row], Any]]] = {
    "ops": lambda r: -r.ops,
    "read": lambda r: -r.read,
    "written": lambda r: -r.written,
    "errors": lambda r: -r.errors,
    "latency": lambda r: -(r.p99 or 0),
    "fids": lambda r: -r.fids,
    "name": lambda r: (),
}
_KEYS: Final = {"o": "ops", "r": "read", "w": "written", "e": "errors", "l": "latency", "f": "fids", "n": "name"}
_HEAD: Final = ("DEVICE", "OPS/s", "READ/s", "WRITE/s", "ERR/s", "p50", "p99", "FIDS", "FLY", "QUE", "THR/s")
_HELP: Final = "q quit  o ops  r read  w written  e errors  l latency  f fids  n name  +/- interval"


@dataclass(frozen=True, slots=True)
class Sample:
    """The supervisor's answer to control.Metrics, and when it came, in monotonic seconds."""

    at: float
    answer: Mapping[str, Any]


def sample(runtime: Path) -> Sample:
    """Asks the supervisor."""
    answer = control.ask(control.Metrics(), runtime, 10)
    return Sample(time.monotonic(), answer)


def rows(before: Sample, now: Sample, sort: str = "ops") -> list[Row]:
    """What each device did between two samples; one that is new, since it began."""
    seconds = max(now.at - before.at, 1e-3)
    old = {_key(d): d for d in before.answer["devices"]}
    found = [_row(old.get(_key(d), {}), d, seconds) for d in now.answer["devices"]]
    return sorted(found, key=lambda r: (SORTS[sort](r), r.guest, r.tag))


def _key(device: Mapping[str, Any]) -> tuple[Any, ...]:
    # With the worker: a new one counts from 0.
    return device["domid"], device["devid"], device["pid"]


def _row(old: Mapping[str, Any], device: Mapping[str, Any], seconds: float) -> Row:
    detail, before = device["detail"], old.get("detail", {})

    def rate(name: str) -> float:
        return max(0.0, float(detail.get(name, 0) - before.get(name, 0))) / seconds

    counts = since(total(detail.get("times", {})), total(before.get("times", {})))
    return Row(
        guest=device["guest"],
        tag=device["tag"],
        export=device["export"],
        state=device["phase"],
        ops=rate("requests"),
        read=rate("read_bytes"),
        written=rate("written_bytes"),
        errors=rate("errors"),
        p50=quantile(counts, 0.5),
        p99=quantile(counts, 0.99),
        fids=detail.get("fids", 0),
        in_flight=detail.get("in_flight", 0),
        queued=detail.get("queued", 0),
        throttled=rate("throttled"),
    )


# What is shown.


def figure(value: float) -> str:
    """A count for people in five characters or less: 12345 -> 12.3k, 0.25 -> 0.2."""
    if 0 < value < 10 and isinstance(value, float):
        return f"{value:.1f}"
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if not unit or value >= 99.95 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.0f}P"


def _cells(row: Row) -> list[str]:
    name = escape(f"{row.guest}:{row.tag}".encode())
    if row.state != "connected":
        return [name, row.state] + [""] * (len(_HEAD) - 2)
    latencies = ["-" if s is None else "<" + duration(round(s * 1e9)) for s in (row.p50, row.p99)]
    rates = [figure(v) for v in (row.ops, row.read, row.written, row.errors)]
    return [name, *rates, *latencies, *map(figure, (row.fids, row.in_flight, row.queued, row.throttled))]


def table(found: Sequence[Row], width: int) -> list[str]:
    """The head and a line a device, each at most width columns; a long name is cut and the last columns go first."""
    cells = [list(_HEAD), *map(_cells, found)]
    sizes = [max(len(row[i]) for row in cells) for i in range(len(_HEAD))]
    rest = sum(sizes[1:]) + len(sizes) - 1
    sizes[0] = max(min(sizes[0], width - rest), min(sizes[0], 12))
    lines = []
    for row in cells:
        name = row[0] if len(row[0]) <= sizes[0] else row[0][: sizes[0] - 1] + "~"
        line = " ".join(
            [name.ljust(sizes[0])] + [cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True)]
        )
        lines.append(line[:width].rstrip())
    return lines


def headline(now: Sample, found: Sequence[Row], interval: float) -> str:
    """All devices together, in one line."""
    ops, read, written = (sum(getattr(r, name) for r in found) for name in ("ops", "read", "written"))
    return (
        f"xen9p {now.answer['host']['version']}  {len(now.answer['guests'])} guests  {len(found)} devices  "
        f"{figure(ops)} ops/s  {figure(read)}B/s read  {figure(written)}B/s written  every {interval:g} s"
    )


def batch(runtime: Path, interval: float, sort: str, as_json: bool, times: int | None) -> int:
    """Prints one table, or one JSON object, an interval, for scripts; for ever, or so many times."""
    before = sample(runtime)
    while times is None or times > 0:
        time.sleep(interval)
        now = sample(runtime)
        found = rows(before, now, sort)
        if as_json:
            value = {"time": time.time(), "interval": now.at - before.at, "devices": [asdict(r) for r in found]}
            print(json.dumps(value), flush=True)
        else:
            print("\n".join(table(found, 1000)), flush=True)
        before = now
        times = None if times is None else times - 1
    return 0


# The screen.


class _QuitError(Exception):
    """The user or the system wants the end."""


class Screen:
    """The terminal's other screen, with keys as they are pressed; all is as before when it is left.

    Raises:
        Xen9pError: standard input or output is no terminal.
    """

    def __init__(self) -> None:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise Xen9pError("this is no terminal", "for scripts: xen9p top --once, or --json")
        self._fd = sys.stdin.fileno()
        self._kept = termios.tcgetattr(self._fd)
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, _quit)
        # A new size only has to end the wait for a key.
        self._handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        tty.setcbreak(self._fd)
        _write("\x1b[?1049h\x1b[?25l")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # it may have been closed
            _write("\x1b[?25h\x1b[?1049l")
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._kept)
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._woken)
        os.close(self._wake)

    def show(self, lines: Sequence[str]) -> None:
        """Draws lines from the top, cut to the terminal's size; the second one stands out."""
        width, height = shutil.get_terminal_size()
        shown = [line[:width] for line in lines[:height]]
        if len(shown) > 1:
            shown[1] = f"\x1b[7m{shown[1].ljust(width)[:width]}\x1b[0m"
        _write("\x1b[H" + "\r\n".join(line + "\x1b[K" for line in shown) + "\x1b[J")

    def key(self, timeout: float) -> str | None:
        """The next key; "" after the size has changed, None if neither came in time (seconds)."""
        ready = select.select([self._fd, self._woken], [], [], max(0, timeout))[0]
        if self._woken in ready:
            os.read(self._woken, 100)
            return ""
        if self._fd in ready:
            pressed = os.read(self._fd, 1)
            if not pressed:
                raise _QuitError  # the terminal is gone
            return pressed.decode("ascii", "ignore")
        return None


def _quit(*_: object) -> None:
    raise _QuitError


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def live(runtime: Path, interval: float, sort: str) -> int:
    """Shows all devices until q or Ctrl-C.

    Raises:
        ControlError: there is no supervisor from the first. One that goes later is waited for.
        Xen9pError: there is no terminal.
    """
    now = before = sample(runtime)
    found = rows(before, now, sort)
    trouble = "the first figures come after one interval"
    with Screen() as screen, suppress(_QuitError, KeyboardInterrupt):
        due = time.monotonic() + min(interval, 1.0)
        while True:
            width = shutil.get_terminal_size().columns
            found.sort(key=lambda r: (SORTS[sort](r), r.guest, r.tag))
            head = headline(now, found, interval)
            screen.show([head, *table(found, width), "", trouble or f"by {sort}   {_HELP}"])
            key = screen.key(due - time.monotonic())
            if key is None:
                before, now, trouble = _next(runtime, now)
                if before is not now:
                    found = rows(before, now, sort)
                due = time.monotonic() + interval
            elif key in ("q", "Q", "\x03", "\x04"):
                return 0
            elif key in ("+", "-"):
                interval = min(_MOST, max(_LEAST, interval * (2 if key == "+" else 0.5)))
            else:
                sort = _KEYS.get(key.lower(), sort)
    return 0


def _next(runtime: Path, last: Sample) -> tuple[Sample, Sample, str]:
    """The sample to compare with, the newest, and what is wrong; twice the last one if there is none."""
    try:
        return last, sample(runtime), ""
    except ControlError as error:
        return last, last, str(error)
