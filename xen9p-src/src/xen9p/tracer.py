"""The tracing end of a server: reads a device's trace and hands it on, while the device serves."""

from __future__ import annotations

import base64
import contextlib
import errno
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, Final

from xen9p.dataplane import DataPlane
from xen9p.jsonlines import dump
from xen9p.records import unpack
from xen9p.traceformat import Format

DATA: Final = 64
"""Bytes of file data in a record, where nobody says otherwise."""
PAUSE: Final = 0.02
"""Seconds between two looks at an empty queue: the data plane wakes nobody for a trace."""
HANDOVER: Final = 1.0
"""Seconds that a trace has to end after its client is gone."""


def _start(device: DataPlane, data: int, over: Callable[[], bool]) -> None:
    """Starts a trace; waits for one whose client has just hung up to notice that."""
    deadline = time.monotonic() + HANDOVER
    while True:
        try:
            device.trace_start(data)
        except OSError as error:
            if error.errno != errno.EBUSY or over() or time.monotonic() > deadline:
                raise
            time.sleep(PAUSE)
        else:
            return


def ship(device: DataPlane, client: socket.socket, data: int, over: Callable[[], bool]) -> None:
    """Sends a device's trace to client as JSON lines, until that hangs up or over() says so.

    A client that does not read fills the data plane's queue and then misses records; how many, each line says.
    """
    try:
        _start(device, data, over)
    except OSError as error:
        taken = error.errno == errno.EBUSY
        why = "somebody traces this device already" if taken else f"cannot trace: {error.strerror}"
        _send(client, {"event": "refused", "error": why, "hint": "end that trace first" if taken else ""}, over)
        return
    try:
        ended = hung_up = False
        dropped = 0
        _send(client, {"event": "tracing"}, over)
        while not hung_up:
            batch = device.trace_read()
            if batch or device.trace_dropped != dropped:
                dropped = device.trace_dropped
                records = base64.b64encode(batch).decode()
                hung_up = not _send(client, {"event": "trace", "records": records, "dropped": dropped}, over)
            elif ended:
                return
            else:
                hung_up = _hung_up(client)
            ended = over()  # once more after that: what came last is told too
    finally:
        device.trace_stop()


def _hung_up(client: socket.socket) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(select.select([client], [], [], PAUSE)[0]) and not client.recv(4096)
    return True


def _send(client: socket.socket, event: Mapping[str, Any], over: Callable[[], bool]) -> bool:
    """Sends one line to a client that may be slow; False if that cannot be."""
    left = memoryview(dump(dict(event)))
    while left:
        try:
            left = left[client.send(left) :]
        except BlockingIOError:  # the socket's own timeout
            if over():
                return False
        except OSError:
            return False
    return True


class Recorder:
    """Writes a device's trace to a file that others may write to as well, until closed."""

    def __init__(self, device: DataPlane, name: str, sink: Sink, data: int = DATA) -> None:
        self._device = device
        self._name = name
        self._sink = sink
        self._end = threading.Event()
        device.trace_start(data)
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last = False
        while True:
            batch = self._device.trace_read()
            self._sink.write(self._name, batch)
            if not batch:
                if last:
                    return
                last = self._end.wait(PAUSE)

    def close(self) -> None:
        """Returns when all that there was is written; call it before the device is closed."""
        self._end.set()
        self._thread.join()
        self._device.trace_stop()
        self._sink.dropped(self._name, self._device.trace_dropped)


class Sink:
    """A file that takes the traces of several devices."""

    def __init__(self, file: IO[bytes], form: Format, complain: Callable[[str], None]) -> None:
        self._file = file
        self._format = form
        self._complain = complain
        self._lock = threading.Lock()
        self._file.write(form.start())
        self._file.flush()

    def write(self, device: str, batch: bytes) -> None:
        """Writes a batch of records."""
        if batch:
            with self._lock:
                self._file.write(b"".join(self._format.one(device, exchange) for exchange in unpack(batch)))
                self._file.flush()

    def dropped(self, device: str, count: int) -> None:
        """Says that some are missing, if any are."""
        if count:
            self._complain(
                f"{device}: {count} requests are missing from the trace: they came faster than it is written"
            )

    def close(self) -> None:
        """Writes what has been held back."""
        with self._lock:
            self._file.write(self._format.end())
            self._file.close()
