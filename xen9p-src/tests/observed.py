"""A host without Xen: a control socket that answers as the supervisor does, and workers on rings in memory."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving import Session, memory_session
from xen9p import control, jsonlines
from xen9p.control import Answer, ControlServer, Metrics, Request, Status
from xen9p.loop import Loop
from xen9p.worker import Worker, seen


@dataclass
class Device:
    """One device: its place, and the session of its guest."""

    guest: str
    tag: str
    domid: int
    devid: int
    session: Session
    phase: str = "connected"
    restarts: int = 0
    violations: int = 0
    extra: dict[str, Any] | None = None

    def status(self) -> dict[str, Any]:
        return {
            "domid": self.domid,
            "devid": self.devid,
            "guest": self.guest,
            "tag": self.tag,
            "export": f"{self.tag}-export",
            "path": str(self.session.served.path),
            "frontend_kind": "kernel",
            "state": self.phase,
            "phase": self.phase,
            "pid": os.getpid(),
            **self.session.served.device.stats(),
        }

    def metrics(self) -> dict[str, Any]:
        detail = seen(self.session.served.device) | (self.extra or {})
        return self.status() | {"detail": detail, "restarts": self.restarts, "violations": self.violations}


class Host:
    """Answers the commands for its devices."""

    def __init__(self, runtime: Path, devices: list[Device]) -> None:
        self.runtime = runtime
        self.devices = devices
        self._loop = Loop()
        self._server = ControlServer(self._loop, control.socket_path(runtime), self._handle)
        self._told, self._tell = socket.socketpair()
        self._loop.add(self._told, self._loop.stop)
        self._thread = threading.Thread(target=self._loop.run)
        self._thread.start()
        self._workers = [self._worker(device) for device in devices]

    def _worker(self, device: Device) -> Worker:
        path = self.runtime / f"worker-{device.domid}-{device.devid}.sock"
        request = {"domid": device.domid, "devid": device.devid, "guest": device.guest, "uuid": "u", "tag": device.tag}
        worker = Worker({**request, "export": "e", "readonly": False, "socket": str(path)}, jsonlines.listen(path))
        worker.device = worker._made = device.session.served.device
        threading.Thread(target=worker._listen, daemon=True).start()
        return worker

    def _handle(self, request: Request, answer: Answer) -> None:
        whole = isinstance(request, Metrics)
        assert whole or isinstance(request, Status)
        devices = [d.metrics() if whole else d.status() for d in self.devices]
        guests = [{"name": name} for name in sorted({d.guest for d in self.devices})]
        host = {"version": "0.1.0", "xen": "4.17.5"}
        answer({"ok": True, "host": host, "guests": guests, "devices": devices})

    def close(self) -> None:
        self._tell.send(b"!")
        self._thread.join(5)
        self._server.close()
        for worker in self._workers:
            worker.listener.shutdown(socket.SHUT_RDWR)
            worker.listener.close()
            worker._withdraw()  # a trace may still be going on, and the sessions end next
        self._told.close()
        self._tell.close()


@contextmanager
def host(runtime: Path, *names: str) -> Iterator[Host]:
    """A host with a device for each GUEST:TAG, each with an export of its own."""
    with ExitStack() as stack:
        devices = []
        for i, name in enumerate(names):
            guest, _, tag = name.partition(":")
            export = runtime / f"export-{i}"
            export.mkdir()
            devices.append(Device(guest, tag, 3 + i, i, stack.enter_context(memory_session(export))))
        made = Host(runtime, devices)
        try:
            yield made
        finally:
            made.close()
