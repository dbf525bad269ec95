"""`xen9p trace`: what guests ask and what they get, request by request, as it happens.

It talks to the workers themselves, over their sockets: a trace costs the supervisor nothing.
"""

from __future__ import annotations

import base64
import errno
import fnmatch
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from xen9p import control
from xen9p.codec import MESSAGES, message_name
from xen9p.errors import ControlError, ProtocolError, Xen9pError
from xen9p.escape import escape
from xen9p.jsonlines import BadLineError, LineBuffer, dump
from xen9p.pcap import Pcap
from xen9p.records import Exchange, unpack
from xen9p.traceformat import Format, JsonLines, Text, error_name

_GREETING: Final = 5.0  # seconds for a worker to say that it traces
_LOOK: Final = 0.1  # seconds between two looks for a device that is waited for

Filter = Callable[[Exchange], bool]


# What is wanted.


def parse_filter(text: str) -> Filter:
    """A filter from KEY=VALUE: type=Tread,Twrite, path=GLOB, errno=ENOENT,... or any, slower=MILLISECONDS.

    Raises:
        Xen9pError: it is none of these.
    """
    key, equals, value = text.partition("=")
    maker = _FILTERS.get(key) if equals and value else None
    if maker is None:
        raise Xen9pError(f"{text!r} is no filter", "type=Tread,Twrite or path=GLOB or errno=ENOENT or slower=MS")
    return maker(value)


def _by_type(value: str) -> Filter:
    known = {message_name(number).lower(): number for number in MESSAGES if number % 2 == 0}
    wanted = set()
    for name in value.lower().split(","):
        number = known.get(name) or known.get(f"t{name}")
        if number is None:
            raise Xen9pError(f"type={value}: there is no message {name!r}", "see: Messages in the documentation")
        wanted.add(number)
    return lambda exchange: exchange.request.type in wanted


def _by_path(value: str) -> Filter:
    return lambda exchange: fnmatch.fnmatchcase(escape(exchange.target), value)


def _by_errno(value: str) -> Filter:
    if value.lower() == "any":
        return lambda exchange: bool(exchange.errno)
    wanted = set()
    for name in value.upper().split(","):
        number = int(name) if name.isdigit() else getattr(errno, name, None)
        if not isinstance(number, int):
            raise Xen9pError(f"errno={value}: there is no errno {name!r}", "as in errno(3): ENOENT, EACCES, ... or any")
        wanted.add(error_name(number))
    return lambda exchange: error_name(exchange.errno or 0) in wanted


def _slower(value: str) -> Filter:
    try:
        least = float(value) * 1e6
    except ValueError:
        raise Xen9pError(f"slower={value}: not a number of milliseconds", "for example slower=10") from None
    return lambda exchange: (exchange.stages["total"] or 0) >= least


_FILTERS: Final[Mapping[str, Callable[[str], Filter]]] = {
    "type": _by_type,
    "path": _by_path,
    "errno": _by_errno,
    "slower": _slower,
}


def format_of(path: str) -> Format:
    """The format that a file's name asks for: .pcap, .json or .jsonl, and else text."""
    match Path(path).suffix:
        case ".pcap":
            return Pcap()
        case ".json" | ".jsonl":
            return JsonLines()
    return Text()


# Where it comes from.


class _NotThereError(ControlError):
    """A device that may come."""


@dataclass
class Source:
    """A connection to one worker that traces."""

    name: str
    sock: socket.socket
    lines: LineBuffer
    early: list[dict[str, Any]]
    dropped: int = 0

    @classmethod
    def open(cls, name: str, path: Path, data: int) -> Source:
        """Asks a worker for its trace.

        Raises:
            ControlError: it is not there, or does not want to.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        lines = LineBuffer()
        try:
            sock.settimeout(_GREETING)
            sock.connect(str(path))
            sock.sendall(dump({"do": "trace", "data": data}))
            while received := sock.recv(65536):
                events = lines.feed(received)
                for i, event in enumerate(events):
                    if event.get("event") == "refused":
                        raise ControlError(f"{name}: {event.get('error')}", str(event.get("hint", "")))
                    if event.get("event") == "tracing":
                        sock.setblocking(False)
                        return cls(name, sock, lines, events[i + 1 :])
            raise _NotThereError(f"{name}: its worker does not trace", "is it of the same version, and connected?")
        except (OSError, BadLineError) as error:
            sock.close()
            what = getattr(error, "strerror", None) or str(error)
            raise _NotThereError(f"{name}: cannot reach its worker: {what}", "see: xen9p status") from None
        except ControlError:
            sock.close()
            raise

    def read(self) -> list[Exchange] | None:
        """What has come; None when the worker has hung up."""
        try:
            received = self.sock.recv(1 << 18)
        except BlockingIOError:
            return []
        except OSError:
            return None
        try:
            return self._exchanges(self.lines.feed(received)) if received else None
        except (BadLineError, ProtocolError, ValueError):
            return None

    def take_early(self) -> list[Exchange]:
        """What came together with the greeting."""
        events, self.early = self.early, []
        return self._exchanges(events)

    def _exchanges(self, events: Sequence[Mapping[str, Any]]) -> list[Exchange]:
        found: list[Exchange] = []
        for event in events:
            if event.get("event") == "trace":
                self.dropped = int(event["dropped"])
                found += unpack(base64.b64decode(event["records"]))
        return found


def find(target: str, runtime: Path) -> list[tuple[str, Path]]:
    """Name (GUEST:TAG) and worker's socket of the devices that GUEST, GUEST:TAG or "" (all) means.

    Raises:
        ControlError: there are none.
    """
    guest, _, tag = target.partition(":")
    devices = control.ask(control.Status(), runtime)["devices"]
    found = [
        (f"{d['guest']}:{d['tag']}", runtime / f"worker-{d['domid']}-{d['devid']}.sock")
        for d in devices
        if d["phase"] == "connected" and guest in ("", d["guest"]) and tag in ("", d["tag"])
    ]
    if not found:
        there = ", ".join(sorted({f"{d['guest']}:{d['tag']}" for d in devices if d["phase"] == "connected"})) or "none"
        raise _NotThereError(f"no device {target} is served" if target else "no device is served", f"served: {there}")
    return found


def open_all(target: str, runtime: Path, data: int, wait: float = 0.0) -> list[Source]:
    """Asks the workers of all devices that are meant, as find() has it, for their traces.

    Args:
        wait: seconds for which to look again while there are none: a guest may be about to start.

    Raises:
        ControlError: there are none, or somebody traces one already.
    """
    until = time.monotonic() + wait
    while True:
        sources: list[Source] = []
        try:
            for name, path in find(target, runtime):
                sources.append(Source.open(name, path, data))
        except ControlError as error:
            for source in sources:
                source.sock.close()
            if not isinstance(error, _NotThereError) or time.monotonic() >= until:
                raise
        else:
            return sources
        time.sleep(_LOOK)


# The trace.


@dataclass
class Tally:
    """How it went."""

    shown: int = 0
    passed: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        text = f"{self.shown} requests"
        if self.passed:
            text += f", {self.passed} more that the filters left out"
        return text + (f", {self.dropped} LOST: they came faster than they were read" if self.dropped else "")


def follow(sources: Sequence[Source], until: float | None) -> Iterator[tuple[str, list[Exchange]]]:
    """(device, what has come from it), until all workers have hung up, or until a time (monotonic, seconds)."""
    with selectors.DefaultSelector() as selector:
        for source in sources:
            selector.register(source.sock, selectors.EVENT_READ, source)
            yield source.name, source.take_early()
        while selector.get_map():
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return
            for key, _ in selector.select(left):
                source = key.data
                exchanges = source.read()
                if exchanges is None:
                    selector.unregister(source.sock)
                    print(f"xen9p: {source.name}: its worker has ended", file=sys.stderr)
                else:
                    yield source.name, exchanges


def copy(
    batches: Iterator[tuple[str, list[Exchange]]],
    out: IO[bytes],
    form: Format,
    *,
    filters: Sequence[Filter],
    count: int | None,
    tally: Tally,
) -> None:
    """Writes what passes all filters, until the batches end or count requests are written."""
    for device, exchanges in batches:
        for exchange in exchanges:
            if not all(wanted(exchange) for wanted in filters):
                tally.passed += 1
                continue
            out.write(form.one(device, exchange))
            tally.shown += 1
            if count is not None and tally.shown >= count:
                return
        out.flush()


def run(
    target: str,
    runtime: Path,
    form: Format,
    out: IO[bytes],
    filters: Sequence[Filter] = (),
    *,
    data: int,
    seconds: float | None = None,
    count: int | None = None,
    wait: float = 0.0,
) -> Tally:
    """Traces devices until time or count is over, they have ended, or somebody presses Ctrl-C.

    Args:
        wait: seconds for which to wait for a device that is not there yet.

    Raises:
        ControlError: there is nothing to trace, or somebody traces it already.
    """
    tally = Tally()
    if wait:
        print(f"xen9p: waiting {wait:g} s at the most for {target or 'a device'}", file=sys.stderr, flush=True)
    sources = open_all(target, runtime, data, wait)
    try:
        print(f"xen9p: tracing {', '.join(s.name for s in sources)}; Ctrl-C ends it", file=sys.stderr, flush=True)
        out.write(form.start())
        out.flush()
        until = None if seconds is None else time.monotonic() + seconds
        with suppress(KeyboardInterrupt):  # the usual end
            copy(follow(sources, until), out, form, filters=filters, count=count, tally=tally)
        out.write(form.end())
        out.flush()
    finally:
        for source in sources:
            source.sock.close()
    tally.dropped = sum(source.dropped for source in sources)
    print(f"xen9p: {tally}", file=sys.stderr, flush=True)
    return tally
