"""The conversation between the ``xen9p`` command and the supervisor: JSON lines on a Unix socket.

Requests: {"do": "status"}, {"do": "metrics"}, {"do": "attach", "guest", "export", "tag", "readonly"}, {"do":
"detach", "guest", "tag"}, {"do": "reload"}, {"do": "learn", "guest", "tag"}, {"do": "pause", "paths", "force"},
{"do": "resume"}. Each gets one answer:
{"ok": true, ...} or {"ok": false, "error", "hint", "exit"}. A pause ends with its connection. Only root can connect.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xen9p.defaults import RUNTIME
from xen9p.errors import ControlError, NobodyError, Xen9pError
from xen9p.jsonlines import BadLineError, Channel, Object, dump, listen, parse
from xen9p.loop import Loop

MAX_CLIENTS: Final = 32
IDLE: Final = 60.0  # seconds that a client may keep a connection open

Answer = Callable[[Object], None]
Handler = Callable[["Request", Answer], None]


def socket_path(runtime: Path = RUNTIME) -> Path:
    """Where the supervisor listens."""
    return runtime / "control.sock"


# Requests.


@dataclass(frozen=True, slots=True)
class Status:
    """Everything that there is to see."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """The same, and each device's counters in full."""


@dataclass(frozen=True, slots=True)
class Reload:
    """Read the policy again."""


@dataclass(frozen=True, slots=True)
class Attach:
    """Give a guest an export that the policy allows; tag "" takes the rule's."""

    guest: str
    export: str
    tag: str = ""
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class Detach:
    """Take a tag from a guest."""

    guest: str
    tag: str


@dataclass(frozen=True, slots=True)
class Learn:
    """Learn what a guest reads through a tag, from now on."""

    guest: str
    tag: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Have all devices stand still that can write to what is in or above these directories."""

    paths: tuple[str, ...]
    force: bool = False
    """Also if something is still being done to files after a while."""


@dataclass(frozen=True, slots=True)
class Resume:
    """End this connection's pause."""


Request = Status | Metrics | Reload | Attach | Detach | Learn | Pause | Resume


def to_wire(request: Request) -> Object:
    """The JSON object for a request."""
    match request:
        case Status():
            return {"do": "status"}
        case Metrics():
            return {"do": "metrics"}
        case Reload():
            return {"do": "reload"}
        case Attach(guest, export, tag, readonly):
            return {"do": "attach", "guest": guest, "export": export, "tag": tag, "readonly": readonly}
        case Detach(guest, tag):
            return {"do": "detach", "guest": guest, "tag": tag}
        case Learn(guest, tag):
            return {"do": "learn", "guest": guest, "tag": tag}
        case Pause(paths, force):
            return {"do": "pause", "paths": list(paths), "force": force}
        case Resume():
            return {"do": "resume"}


def from_wire(value: Object) -> Request:
    """The request in a JSON object; ControlError says what is wrong with it."""
    match value:
        case {"do": "status", **rest} if not rest:
            return Status()
        case {"do": "metrics", **rest} if not rest:
            return Metrics()
        case {"do": "reload", **rest} if not rest:
            return Reload()
        case {
            "do": "attach",
            "guest": str(guest),
            "export": str(export),
            "tag": str(tag),
            "readonly": bool(readonly),
            **rest,
        } if not rest:
            return Attach(guest, export, tag, readonly)
        case {"do": "detach", "guest": str(guest), "tag": str(tag), **rest} if not rest:
            return Detach(guest, tag)
        case {"do": "learn", "guest": str(guest), "tag": str(tag), **rest} if not rest:
            return Learn(guest, tag)
        case {"do": "pause", "paths": list(paths), "force": bool(force), **rest} if not rest:
            if all(isinstance(path, str) and path.startswith("/") for path in paths):
                return Pause(tuple(paths), force)
        case {"do": "resume", **rest} if not rest:
            return Resume()
    raise ControlError(f"the supervisor does not understand {value!r:.100}", "are both of one version?")


def refusal(error: Xen9pError) -> Object:
    """The answer for a request that failed."""
    return {"ok": False, "error": error.message, "hint": error.hint, "exit": error.exit_code}


class ControlServer:
    """The supervisor's end, in its loop.

    Args:
        handler: gets each request, and a function to answer it with, once, now or later; may raise
            Xen9pError, which becomes the answer.
        hung_up: gets that function when its client has gone.
    """

    def __init__(
        self, loop: Loop, path: Path, handler: Handler, hung_up: Callable[[Answer], None] = lambda _: None
    ) -> None:
        self._loop = loop
        self._hung_up = hung_up
        self._path = path
        self._handler = handler
        self._clients: set[Channel] = set()
        self._listener = listen(path)
        self._listener.setblocking(False)
        loop.add(self._listener, self._accept)

    def close(self) -> None:
        """Hangs up on everybody and removes the socket."""
        for channel in list(self._clients):
            channel.close()
        self._loop.remove(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._listener.accept()
            if len(self._clients) >= MAX_CLIENTS:
                sock.close()
                return
            self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        def received(value: Object) -> None:
            try:
                self._handler(from_wire(value), channel.send)
            except Xen9pError as error:
                channel.send(refusal(error))

        def gone(_: str = "") -> None:
            self._loop.cancel(timer)
            self._clients.discard(channel)
            self._hung_up(channel.send)

        def idle() -> None:
            channel.close()
            gone()

        channel = Channel(self._loop, sock, received, gone)
        timer = self._loop.after(IDLE, idle)
        self._clients.add(channel)


class Conversation:
    """A connection to the supervisor, for several requests. ControlError if nobody is there."""

    def __init__(self, runtime: Path = RUNTIME, timeout: float = 30.0) -> None:
        self._timeout = timeout
        path = socket_path(runtime)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sock.settimeout(timeout)
        try:
            self._sock.connect(str(path))
        except OSError as error:
            self._sock.close()
            if isinstance(error, PermissionError):
                raise ControlError(f"no permission to use {path}", "run it as root") from None
            if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                raise NobodyError(
                    f"xen9pd is not running: nobody listens at {path}", "start it: systemctl start xen9pd"
                ) from None
            raise ControlError(f"{path}: {error.strerror}", "see: systemctl status xen9pd") from None
        self._lines = self._sock.makefile("rb")

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._sock.close()

    def ask(self, request: Request) -> Object:
        """The answer to a request; ControlError if that is a refusal."""
        try:
            self._sock.sendall(dump(to_wire(request)))
            answer = parse(self._lines.readline())
        except TimeoutError:
            raise ControlError(
                f"xen9pd gave no answer within {self._timeout:g} s", "see: journalctl -u xen9pd"
            ) from None
        except (OSError, BadLineError):
            raise ControlError("xen9pd hung up without an answer", "see: journalctl -u xen9pd") from None
        if not answer.get("ok"):
            raise _refused(answer)
        return answer


def ask(request: Request, runtime: Path = RUNTIME, timeout: float = 30.0) -> Object:
    """Sends one request to the supervisor and returns its answer; ControlError if that is a refusal."""
    with Conversation(runtime, timeout) as conversation:
        return conversation.ask(request)


def _refused(answer: dict[str, Any]) -> ControlError:
    error = ControlError(str(answer.get("error", "refused")), str(answer.get("hint", "")))
    if isinstance(code := answer.get("exit"), int):
        error.exit_code = code  # type: ignore[misc]  # of this one error, not of its class
    return error
