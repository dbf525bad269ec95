"""`xen9p metrics`: what the supervisor and its workers count, in Prometheus' text format.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/. Labels are bounded: guest, tag and export come
from the policy and from who runs, types, errnos, groups and stages are fixed lists. A domain id is no label, for it
changes with each start of a guest.
"""

from __future__ import annotations

import os
import socket
import socketserver
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from errno import errorcode
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

from xen9p import control
from xen9p.codec import message_name
from xen9p.errors import ControlError, Xen9pError
from xen9p.histogram import BOUNDS

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
STATES: Final = ("waiting", "starting", "connected", "stopping", "closed", "failed", "gone")
"""Phases of a device (device.Phase)."""
_SHOWN: Final = range(0, len(BOUNDS), 2)
"""Which buckets are given out: every second, so 4 times as wide each, for series cost Prometheus memory."""
_PREFIX: Final = "xen9p_"
_TIMEOUT: Final = 10.0

Labels = Mapping[str, str]


@dataclass
class _Family:
    """One metric with all its samples."""

    name: str
    kind: str
    help: str
    lines: list[str] = field(default_factory=list)

    def add(self, labels: Labels, value: float, suffix: str = "") -> None:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        self.lines.append(f"{_PREFIX}{self.name}{suffix}{{{inside}}} {_number(value)}")

    def text(self) -> Iterator[str]:
        if self.lines:
            yield f"# HELP {_PREFIX}{self.name} {self.help}"
            yield f"# TYPE {_PREFIX}{self.name} {self.kind}"
            yield from self.lines


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


# What there is to count: name, kind, help, and the value in a device of the supervisor's answer.
_PLAIN: Final[tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], float | None]], ...]] = (
    ("read_bytes_total", "counter", "Bytes of file data that the guest has read.", lambda d: _of(d, "read_bytes")),
    (
        "written_bytes_total",
        "counter",
        "Bytes of file data that the guest has written.",
        lambda d: _of(d, "written_bytes"),
    ),
    ("fids", "gauge", "Fids that the guest holds.", lambda d: _of(d, "fids")),
    ("requests_in_flight", "gauge", "Requests that wait for a thread or are worked on.", lambda d: _of(d, "in_flight")),
    ("queue_depth", "gauge", "Of these, requests that wait for a thread.", lambda d: _of(d, "queued")),
    ("bytes_in_flight", "gauge", "Bytes that these requests and their replies bind.", lambda d: _of(d, "bytes")),
    ("throttled_total", "counter", "Requests that had to wait for a limit.", lambda d: _of(d, "throttled")),
    (
        "throttled_seconds_total",
        "counter",
        "Seconds that requests have waited for a limit.",
        lambda d: None if (us := _of(d, "throttled_us")) is None else us / 1e6,
    ),
    ("read_hits_total", "counter", "Reads that the page cache had all of.", lambda d: _of(d, "read_hits")),
    ("read_misses_total", "counter", "Reads that had to wait for the disk.", lambda d: _of(d, "read_misses")),
    ("read_hit_bytes_total", "counter", "Bytes of reads that were hits.", lambda d: _of(d, "hit_bytes")),
    ("read_miss_bytes_total", "counter", "Bytes of reads that were misses.", lambda d: _of(d, "miss_bytes")),
    ("shared_read_bytes_total", "counter", "Bytes read through a clone's origin.", lambda d: _of(d, "shared_bytes")),
    ("streams_total", "counter", "Sequential reads and writes that were streams.", lambda d: _of(d, "streams")),
    ("stream_dropped_bytes_total", "counter", "Bytes dropped behind streams.", lambda d: _of(d, "dropped_bytes")),
    ("stream_spared_bytes_total", "counter", "Bytes in streams' way left alone.", lambda d: _of(d, "spared_bytes")),
    ("prefetched_bytes_total", "counter", "Bytes read ahead of the guest.", lambda d: _of(d, "ahead_bytes", "cache")),
    (
        "prefetched_files_total",
        "counter",
        "Files found or read ahead of the guest.",
        lambda d: _of(d, "ahead_files", "cache"),
    ),
    ("lease_sessions", "gauge", "1 while the guest's client has leases.", lambda d: _of(d, "sessions", "leases")),
    (
        "lease_revocations_total",
        "counter",
        "Buckets that the guest's client was told to give up.",
        lambda d: _of(d, "revocations", "leases"),
    ),
    (
        "lease_sessions_voided_total",
        "counter",
        "Lease sessions that ended because the guest's client did not give something up in time.",
        lambda d: _of(d, "voided", "leases"),
    ),
    (
        "lease_waits_total",
        "counter",
        "Changes that had to wait for other clients.",
        lambda d: _of(d, "waits", "leases"),
    ),
    (
        "lease_waits_seconds_total",
        "counter",
        "Seconds that changes have waited for other clients.",
        lambda d: None if (us := _of(d, "waited_us", "leases")) is None else us / 1e6,
    ),
    ("worker_restarts_total", "counter", "Workers that died and were replaced.", lambda d: d.get("restarts")),
    ("violations_total", "counter", "Times that the guest broke the protocol.", lambda d: d.get("violations")),
)


def _of(device: Mapping[str, Any], name: str, part: str = "") -> float | None:
    detail = device["detail"]
    value = ((detail.get(part) or {}) if part else detail).get(name)
    return None if value is None else float(value)


def text(answer: Mapping[str, Any]) -> str:
    """The supervisor's answer to control.Metrics, as Prometheus reads it."""
    families: list[_Family] = []

    def family(name: str, kind: str, meaning: str) -> _Family:
        families.append(_Family(name, kind, meaning))
        return families[-1]

    host = answer["host"]
    family("build_info", "gauge", "Version of xen9p and of Xen; always 1.").add(
        {"version": host["version"], "xen": host["xen"]}, 1
    )
    family("guests", "gauge", "Guests that run.").add({}, len(answer["guests"]))
    devices = [(_labels(d), d) for d in _unique(answer["devices"])]
    states = family("device_state", "gauge", "1 for the state that a device is in, 0 for the others.")
    for labels, device in devices:
        for state in STATES:
            states.add({**labels, "state": state}, device["phase"] == state)
    for name, kind, meaning, value in _PLAIN:
        plain = family(name, kind, meaning)
        for labels, device in devices:
            if (number := value(device)) is not None:
                plain.add(labels, number)
    operations = family("operations_total", "counter", "Requests that have come, by message type.")
    errors = family("errors_total", "counter", "Requests that failed, by errno.")
    for labels, device in devices:
        for type_, count in sorted(_numbered(device["detail"].get("by_type"))):
            operations.add({**labels, "type": message_name(type_)}, count)
        for number, count in sorted(_numbered(device["detail"].get("errnos"))):
            errors.add({**labels, "errno": errorcode.get(number, "other")}, count)
    times = family(
        "request_duration_seconds", "histogram", "Time of requests by group of types, in each stage and in total."
    )
    for labels, device in devices:
        for group, stages in (device["detail"].get("times") or {}).items():
            for stage, histogram in stages.items():
                _histogram(times, {**labels, "group": group, "stage": stage}, histogram)
    return "\n".join([line for each in families for line in each.text()]) + "\n"


def _histogram(family: _Family, labels: Labels, histogram: Mapping[str, Any]) -> None:
    counts: Sequence[int] = histogram["counts"]
    everything = sum(counts)
    for i in _SHOWN:
        family.add({**labels, "le": repr(BOUNDS[i])}, sum(counts[: i + 1]), "_bucket")
    family.add({**labels, "le": "+Inf"}, everything, "_bucket")
    family.add(labels, histogram["seconds"], "_sum")
    family.add(labels, everything, "_count")


def _numbered(counts: Mapping[str, int] | None) -> Iterable[tuple[int, int]]:
    """JSON has made strings of the numbers."""
    return ((int(key), count) for key, count in (counts or {}).items())


def _labels(device: Mapping[str, Any]) -> dict[str, str]:
    return {"guest": device["guest"], "tag": device["tag"], "export": device["export"]}


def _unique(devices: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One device for each set of labels: a guest that restarts may be there twice for a moment."""
    newest: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for device in sorted(devices, key=lambda d: (d["domid"], d["devid"])):
        newest[tuple(_labels(device).values())] = device
    return list(newest.values())


def fetch(runtime: Path) -> str:
    """Asks the supervisor.

    Raises:
        ControlError: it cannot be reached.
    """
    return text(control.ask(control.Metrics(), runtime, _TIMEOUT))


def write_to(path: Path, content: str) -> None:
    """Replaces a file in one step, as node_exporter's textfile collector wants it.

    Raises:
        Xen9pError: it cannot be written.
    """
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(fd, "w") as file:
                file.write(content)
            Path(temporary).chmod(0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise Xen9pError(f"cannot write {path}: {error.strerror}", "the directory must exist") from None


# The HTTP endpoint.


class _Handler(BaseHTTPRequestHandler):
    server_version = "xen9p"
    sys_version = ""
    timeout = _TIMEOUT
    runtime: Path

    def do_GET(self) -> None:  # http.server's name for it
        if self.path.partition("?")[0] != "/metrics":
            self._answer(404, "text/plain", "the metrics are at /metrics\n")
            return
        try:
            self._answer(200, CONTENT_TYPE, fetch(self.runtime))
        except ControlError as error:
            self._answer(503, "text/plain", f"{error}\n")

    def _answer(self, code: int, kind: str, content: str) -> None:
        data = content.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)

    def address_string(self) -> str:
        return str(self.client_address[0]) if isinstance(self.client_address, tuple) else "unix"

    def log_message(self, format: str, *args: Any) -> None:  # as in the base class
        """Says nothing: a scrape every few seconds is no news."""


class _Tcp(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 8


class _Tcp6(_Tcp):
    address_family = socket.AF_INET6


class _Unix(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 8


def serve(address: str, runtime: Path, ready: Callable[[socketserver.BaseServer], None] | None = None) -> int:
    """Answers GET /metrics until interrupted.

    Args:
        address: HOST:PORT, or the path of a Unix socket to make.
        ready: called with the server once it listens.

    Raises:
        Xen9pError: the address cannot be used.
    """
    handler = type("Handler", (_Handler,), {"runtime": runtime})
    try:
        server = _listen(address, handler)
    except OSError as error:
        raise Xen9pError(f"cannot listen on {address}: {error.strerror}", "choose another address") from None
    except (OverflowError, UnicodeError):
        raise Xen9pError(f"cannot listen on {address}", "choose another address") from None
    with server:
        print(f"metrics on {address}", file=sys.stderr, flush=True)
        if ready:
            ready(server)
        server.serve_forever()
    return 0


def _listen(address: str, handler: type[BaseHTTPRequestHandler]) -> socketserver.BaseServer:
    if "/" in address:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(address).st_mode):
                os.unlink(address)  # that an earlier one left
        mask = os.umask(0o117)
        try:
            return _Unix(address, handler)
        finally:
            os.umask(mask)
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise Xen9pError(f"{address!r} is neither HOST:PORT nor a path", "for example 127.0.0.1:9564")
    host = host.strip("[]") or "127.0.0.1"
    return (_Tcp6 if ":" in host else _Tcp)((host, int(port)), handler)
