"""The supervisor's view of its workers: starting them through the zygote, talking to them, seeing them end.

A worker has ended when its process has, and not before: only then are its grants unmapped, and only then may
another take over its rings. So the end is taken from a pidfd; the socket tells why.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from xen9p import zygote
from xen9p.jsonlines import BadLineError, Channel, LineBuffer, Object
from xen9p.loop import Loop

log = logging.getLogger(__name__)

READY_TIMEOUT: Final = 30.0  # seconds from the order to map rings until a worker must serve
LINGER: Final = 5.0  # seconds from a worker's last word or hang-up until it must be gone


def socket_path(runtime: Path, domid: int, devid: int) -> Path:
    """Where the worker of a device listens."""
    return runtime / f"worker-{domid}-{devid}.sock"


class Worker:
    """One worker process, from the request to start it until its end. It gets its rings when the guest has made them.

    Args:
        ready: called when it serves.
        gone: called once when the process has ended, with its last event ("failed", "ended", "hangup", "stopped" or
            "" for none) and the reason that it gave.
    """

    def __init__(self, loop: Loop, path: Path, ready: Callable[[], None], gone: Callable[[str, str], None]) -> None:
        self.pid: int | None = None
        self.stats: Object = {}
        self.detail: Object = {}
        self.hello: Object = {}
        self.is_ready = False
        self.has_rings = False
        self.refusal = ""  # why it keeps other terms than it was told last
        self.learned: Callable[[Object], None] | None = None
        """Is called with what it wants to have kept of its guest's boot."""
        self.born: Callable[[int], None] | None = None
        """Is called with its pid as soon as it has one."""
        self._loop = loop
        self._path = path
        self._ready_callback = ready
        self._gone_callback = gone
        self._channel: Channel | None = None
        self._pidfd = -1
        self._last = ""
        self._reason = ""
        self._wanted: list[Object] = []  # what was asked before it could be told
        self._kill_wanted = False
        self._timers: list[int] = []
        self._ended = False
        self._pauses = 0
        self._paused: Callable[[int], None] | None = None
        self._resumed: Callable[[bool], None] | None = None
        self._waiters: dict[str, list[Callable[[], None]]] = {"stats": [], "metrics": []}

    def started(self, pid: int) -> None:
        """The zygote has forked it."""
        self._watch(pid)
        if self._ended:
            return
        if self.born is not None:
            self.born(pid)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(str(self._path))
        except OSError as error:
            sock.close()
            self._reason = f"cannot be reached at {self._path}: {error.strerror}"
            self.kill()
            return
        self._talk(sock)

    def not_started(self, reason: str) -> None:
        """The zygote could not fork it."""
        self._reason = reason
        self._end()

    def adopt(self, pid: int, sock: socket.socket, hello: Object) -> None:
        """Takes over a worker that an earlier supervisor started; sock is connected, the hello read."""
        self.hello = hello
        self.has_rings = hello.get("state") != "prepared"
        if self.has_rings:
            self._timers.append(self._loop.after(READY_TIMEOUT, self._late))
        self._watch(pid)
        if self._ended:
            sock.close()
        else:
            self._talk(sock)

    def map(self, rings: Sequence[Object]) -> None:
        """Has it map a guest's rings, {"ref": u32, "port": u32} each, and serve."""
        self.has_rings = True
        self._timers.append(self._loop.after(READY_TIMEOUT, self._late))
        self._ask({"do": "map", "rings": list(rings)})

    def settle(self, terms: Object) -> None:
        """Tells it other terms: "users" and "limits", as in the request that started it."""
        self._wanted = [order for order in self._wanted if order["do"] != "settle"]  # the last ones count
        self._ask({"do": "settle", **terms})

    @property
    def pauses(self) -> bool:
        """Whether it knows how: one of an earlier version does not."""
        return not self.hello or "pauses" in self.hello

    @property
    def knows_leases(self) -> bool:
        """Whether it asks the clients of others before it changes something; the same holds."""
        return not self.hello or "leases" in self.hello

    def learn(self) -> None:
        """Has it learn what its guest reads, from now on."""
        self._ask({"do": "learn"})

    def pause(self, paused: Callable[[int], None]) -> None:
        """Has it stand still for a moment; paused() is told how much it is still doing to files, 0 for nothing."""
        self._paused = paused
        self._pauses += 1
        self._ask({"do": "pause", "id": self._pauses})

    def resume(self, resumed: Callable[[bool], None]) -> None:
        """Has it go on; resumed() is told whether it has stood still until now."""
        self._resumed = resumed
        if self._ended:
            self._tell_resumed(False)
        else:
            self._ask({"do": "resume"})

    def _tell_paused(self, left: int) -> None:
        told, self._paused = self._paused, None
        if told:
            told(left)

    def _tell_resumed(self, held: bool) -> None:
        told, self._resumed = self._resumed, None
        if told:
            told(held)

    def stop(self) -> None:
        """Asks it to drain and end."""
        self._ask({"do": "stop"})

    def _ask(self, order: Object) -> None:
        if self._channel is not None:
            self._channel.send(order)
        elif order not in self._wanted:
            self._wanted.append(order)

    def kill(self) -> None:
        """Ends it at once."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        else:
            self._kill_wanted = True

    def ask(self, what: str, answered: Callable[[], None]) -> bool:
        """Asks for fresh "stats" or "metrics"; answered() is called when they are in ``stats`` or ``detail``. False:
        nobody to ask.
        """
        if self._channel is None or not self._channel.open or not self.is_ready:
            return False
        waiters = self._waiters[what]
        waiters.append(answered)
        if len(waiters) == 1:
            self._channel.send({"do": what})
        return True

    def _answered(self, what: str) -> None:
        waiters, self._waiters[what] = self._waiters[what], []
        for waiter in waiters:
            waiter()

    def _watch(self, pid: int) -> None:
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._end()
            return
        self._loop.add(self._pidfd, self._end)
        if self._kill_wanted:
            self.kill()

    def _talk(self, sock: socket.socket) -> None:
        self._channel = Channel(self._loop, sock, self._received, self._hung_up)
        for order in self._wanted:
            self._channel.send(order)
        self._wanted.clear()

    def _received(self, event: Object) -> None:
        kind = event.get("event")
        if kind == "hello":
            self.hello = event
        elif kind == "ready":
            if not self.is_ready:
                self.is_ready = True
                self._ready_callback()
        elif kind == "stats":
            self.stats = {k: v for k, v in event.items() if k != "event"}
            self._answered("stats")
        elif kind == "metrics":
            self.detail = {k: v for k, v in event.items() if k != "event"}
            self._answered("metrics")
        elif kind == "settled":
            self.refusal = str(event.get("problem") or "")[:300]
            if self.refusal:
                log.error("worker pid=%s keeps its terms: %s", self.pid, self.refusal)
        elif kind == "paused" and event.get("id") == self._pauses:  # a late answer says nothing about the next pause
            self._tell_paused(int(event["left"]))
        elif kind == "learned" and self.learned is not None:
            self.learned(event)
        elif kind == "resumed":
            self._tell_resumed(event.get("held") is True)
        elif kind in ("failed", "ended", "hangup", "stopped"):
            self._last = str(kind)
            self._reason = str(event.get("reason", ""))[:300]
            self._timers.append(self._loop.after(LINGER, self.kill))

    def _hung_up(self, reason: str) -> None:
        if not self._last:
            self._reason = self._reason or reason
        self._timers.append(self._loop.after(LINGER if self._last else 0.5, self.kill))

    def _late(self) -> None:
        if not self.is_ready and not self._last:
            self._reason = f"was not ready within {READY_TIMEOUT:g} s"
            self.kill()

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        # What it said last may still be in the socket.
        if self._channel is not None and self._channel.open:
            self._channel._ready()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        for timer in self._timers:
            self._loop.cancel(timer)
        if self._pidfd >= 0:
            self._loop.remove(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        for path in (self._path, self._path.with_suffix(".pid")):
            path.unlink(missing_ok=True)
        for what in self._waiters:
            self._answered(what)
        self._tell_paused(0)  # nobody serves its guest
        self._tell_resumed(False)
        self._gone_callback(self._last, self._reason)


class Zygote:
    """Starts workers; starts itself anew if it dies."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: deque[Worker] = deque()
        self.pid, self._sock = zygote.start()
        loop.add(self._sock, self._answered)

    def spawn(self, worker: Worker, request: Object) -> None:
        """Starts a worker; it is told how that went."""
        try:
            self._sock.send(json.dumps({"do": "spawn", **request}).encode())
        except OSError as error:
            worker.not_started(f"the zygote does not listen: {error.strerror}")
            return
        self._waiting.append(worker)

    def _answered(self) -> None:
        try:
            packet = self._sock.recv(zygote.MAX_PACKET)
        except OSError:
            packet = b""
        if not packet:
            self._restart()
            return
        answer = json.loads(packet)
        worker = self._waiting.popleft()
        if answer.get("ok"):
            worker.started(int(answer["pid"]))
        else:
            worker.not_started(str(answer.get("reason", "refused")))

    def _restart(self) -> None:
        log.error("the zygote (pid %d) died; starting another", self.pid)
        self._loop.remove(self._sock)
        self._sock.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        self.pid, self._sock = zygote.start()
        self._loop.add(self._sock, self._answered)
        waiting, self._waiting = self._waiting, deque()
        for worker in waiting:
            worker.not_started("the zygote died")


class Found:
    """A worker that an earlier supervisor left running: its hello, and the connection to it."""

    def __init__(self, path: Path, pid: int, sock: socket.socket, hello: Object) -> None:
        self.path = path
        self.pid = pid
        self.sock = sock
        self.hello = hello

    @property
    def device(self) -> tuple[int, int]:
        """(domid, devid) as it says."""
        return int(self.hello["domid"]), int(self.hello["devid"])


def find(runtime: Path, timeout: float = 5.0) -> list[Found]:
    """The live workers whose sockets are in the runtime directory; clears dead sockets away."""
    found = []
    for path in sorted(runtime.glob("worker-*.sock")):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.settimeout(timeout)
        try:
            sock.connect(str(path))
            hello = _read_hello(sock)
            pid = int(path.with_suffix(".pid").read_text())
            one = Found(path, pid, sock, hello)
            if hello.get("pid") != pid or socket_path(runtime, *one.device) != path:
                raise BadLineError("it is not the worker that was started")
            found.append(one)
        except ConnectionRefusedError:
            sock.close()
            path.unlink(missing_ok=True)
            path.with_suffix(".pid").unlink(missing_ok=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            sock.close()
            log.warning("worker at %s does not make sense: %s", path, str(error) or type(error).__name__)
            _end_by_file(path)
    return found


def _end_by_file(path: Path) -> None:
    """Ends a worker that cannot be talked to, by its pid file: two must never serve the same rings."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(path.with_suffix(".pid").read_text())
        fd = os.pidfd_open(pid)
        try:
            if b"xen9p" in Path(f"/proc/{pid}/cmdline").read_bytes():
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                select.select([fd], [], [], LINGER)
                log.warning("worker pid=%d ended", pid)
        finally:
            os.close(fd)


def _read_hello(sock: socket.socket) -> dict[str, Any]:
    """The first line, read byte by byte so that nothing after it is lost."""
    lines = LineBuffer()
    while data := sock.recv(1):
        for value in lines.feed(data):
            if value.get("event") != "hello":
                raise BadLineError("no hello")
            return value
    raise BadLineError("hung up before its hello")
