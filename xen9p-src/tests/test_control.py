"""The supervisor's conversations over real sockets, and the pieces of its loop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen9p import control, notify
from xen9p.budget import Budget
from xen9p.control import Answer, Attach, ControlServer, Detach, Reload, Request, Status, from_wire, to_wire
from xen9p.errors import ControlError, PolicyError, RefusedError
from xen9p.jsonlines import MAX_LINE, BadLineError, Channel, LineBuffer, Object, dump
from xen9p.loop import Loop


@pytest.mark.parametrize(
    "request_", [Status(), Reload(), Attach("g1", "home", "home", True), Attach("g1", "home"), Detach("g1", "t")]
)
def test_requests_survive_the_wire(request_: Request) -> None:
    assert from_wire(json.loads(dump(to_wire(request_)))) == request_


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"do": "stop"},
        {"do": "status", "more": 1},
        {"do": "attach", "guest": "g1"},
        {"do": "attach", "guest": "g1", "export": "e", "tag": "t", "readonly": "yes"},
        {"do": "detach", "guest": 1, "tag": "t"},
    ],
)
def test_other_requests_are_refused(value: Object) -> None:
    with pytest.raises(ControlError, match="does not understand"):
        from_wire(value)


class Running:
    """A control server whose loop runs in a thread."""

    def __init__(self, runtime: Path) -> None:
        self.loop = Loop()
        self.server = ControlServer(self.loop, control.socket_path(runtime), self.handle)
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def handle(self, request: Request, answer: Answer) -> None:
        match request:
            case Status():
                answer({"ok": True, "big": "x" * 200_000})
            case Detach(guest, _):
                self.loop.after(0.05, lambda: answer({"ok": True, "guest": guest}))
            case Attach():
                raise RefusedError("the policy says no", "ask nicely")
            case Reload():
                raise PolicyError("bad policy")

    def end(self) -> None:
        def finish() -> None:
            self.server.close()
            self.loop.stop()

        # A request that the loop answers by ending, so that all happens in its own thread.
        self.handle = lambda *_: finish()  # type: ignore[method-assign]
        self.server._handler = self.handle
        with contextlib.suppress(ControlError):
            control.ask(Status(), Path(self.server._path).parent, 5)
        self.thread.join(5)
        assert not self.thread.is_alive()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    server = Running(tmp_path)
    yield server
    server.end()


@pytest.mark.usefixtures("running")
def test_answers_now_later_and_refused(tmp_path: Path) -> None:
    assert len(control.ask(Status(), tmp_path)["big"]) == 200_000
    assert control.ask(Detach("g1", "t"), tmp_path)["guest"] == "g1"
    with pytest.raises(ControlError) as caught:
        control.ask(Attach("g1", "home"), tmp_path)
    assert str(caught.value) == "the policy says no (ask nicely)"
    assert caught.value.exit_code == 1
    with pytest.raises(ControlError) as caught:
        control.ask(Reload(), tmp_path)
    assert caught.value.exit_code == 78
    assert control.socket_path(tmp_path).stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("rubbish", [b"\n{}\n", b"nonsense\n", b"[]\n", b"\xff\n", b"x" * (MAX_LINE + 70_000)])
def test_rubbish_hurts_nobody_else(tmp_path: Path, rubbish: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(control.socket_path(tmp_path)))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(rubbish)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
    assert control.ask(Status(), tmp_path)["ok"]


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"xen9pd is not running.*systemctl start xen9pd"):
        control.ask(Status(), tmp_path)


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers(), max_size=3)), st.data())
def test_lines_come_whole_however_they_are_cut(values: list[Object], data: st.DataObject) -> None:
    wire = b"".join(map(dump, values))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    lines = LineBuffer()
    got = []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        got += lines.feed(wire[start:end])
    assert got == values


def test_a_deep_line_is_only_a_bad_line() -> None:
    with pytest.raises(BadLineError):
        LineBuffer().feed(b"[" * 100_000 + b"\n")


def test_a_last_word_is_heard_before_the_end() -> None:
    loop = Loop()
    ours, theirs = socket.socketpair()
    heard: list[object] = []
    Channel(loop, ours, heard.append, heard.append)
    theirs.sendall(dump({"event": "ended"}))
    theirs.close()
    while len(heard) < 2:
        loop.step()
    assert heard == [{"event": "ended"}, "hung up"]


def test_timers_and_signals() -> None:
    loop = Loop()
    seen: list[str] = []
    loop.after(0.02, lambda: seen.append("late"))
    loop.after(0.0, lambda: seen.append("early"))
    loop.cancel(loop.after(0.01, lambda: seen.append("never")))
    loop.on_signal(signal.SIGUSR1, lambda: seen.append("signal"))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        end = time.monotonic() + 5
        while len(seen) < 3 and time.monotonic() < end:
            loop.step()
    finally:
        loop.after_fork()
    assert sorted(seen) == ["early", "late", "signal"]
    assert seen.index("early") < seen.index("late")


def test_a_budget_runs_dry_and_refills() -> None:
    budget = Budget(burst=3, rate=2, now=0)
    assert [budget.take(1, 0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert budget.take(1, 0.5) == 0
    assert budget.take(1, 0.5) > 0
    assert budget.take(3, 100) == 0
    assert budget.take(1, 100) > 0


def test_notify_speaks_to_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify.notify("READY=1", "STATUS=fine")
        assert sock.recv(100) == b"READY=1\nSTATUS=fine"
        notify.reloading()
        assert sock.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    notify.notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify.notify("READY=1")
