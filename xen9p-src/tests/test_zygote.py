"""Starting, talking to, losing and finding workers: real processes and sockets, with a worker that does nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xen9p import jsonlines, workers, zygote
from xen9p.loop import Loop
from xen9p.workers import Worker


def idle_worker(request: dict[str, Any], listener: socket.socket) -> int:
    """Says hello and ready to everybody who comes, and does as it is told."""
    while True:
        client, _ = listener.accept()
        threading.Thread(target=converse, args=(request, client), daemon=True).start()


def converse(request: dict[str, Any], client: socket.socket) -> None:
    lines = client.makefile("rw")

    def say(**event: object) -> None:
        print(json.dumps(event), file=lines, flush=True)

    say(event="hello", pid=os.getpid(), domid=request["domid"], devid=request["devid"])
    say(event="ready", order=9, rings=2)
    for line in lines:
        match json.loads(line)["do"]:
            case "stats":
                say(event="stats", requests=7)
            case "stop":
                say(event="stopped")
                os._exit(0)
            case "break":
                say(event="ended", reason="message size 3 is below 7")
                os._exit(3)


class Watched:
    """A worker in a loop, with what was heard of it."""

    def __init__(self, loop: Loop, runtime: Path) -> None:
        self.loop = loop
        self.ready = 0
        self.gone: list[tuple[str, str]] = []
        self.path = workers.socket_path(runtime, 3, 0)
        self.worker = Worker(loop, self.path, self.on_ready, lambda *why: self.gone.append(why))

    def on_ready(self) -> None:
        self.ready += 1

    def until(self, true: Callable[[], object]) -> None:
        end = time.monotonic() + 10
        while not true() and time.monotonic() < end:
            self.loop.after(0.05, lambda: None)
            self.loop.step()
        assert true()


def request(runtime: Path) -> dict[str, Any]:
    return {"domid": 3, "devid": 0, "guest": "g1", "socket": str(workers.socket_path(runtime, 3, 0))}


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    # The test takes the zygote's part, whose children are nobody's to wait for.
    old = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    one = Watched(Loop(), tmp_path)
    one.worker.started(zygote.spawn(request(tmp_path), idle_worker))
    one.until(lambda: one.ready)
    yield one
    one.worker.kill()
    one.until(lambda: one.gone)
    signal.signal(signal.SIGCHLD, old)


def test_a_worker_serves_and_stops(watched: Watched) -> None:
    done: list[bool] = []
    assert watched.worker.ask("stats", lambda: done.append(True))
    watched.until(lambda: done)
    assert watched.worker.stats == {"requests": 7}
    watched.worker.stop()
    watched.until(lambda: watched.gone)
    assert watched.gone == [("stopped", "")]
    assert not watched.path.exists()
    assert not watched.worker.ask("stats", lambda: None)


def test_the_reason_of_an_end_is_heard(watched: Watched) -> None:
    assert watched.worker._channel is not None
    watched.worker._channel.send({"do": "break"})
    watched.until(lambda: watched.gone)
    assert watched.gone == [("ended", "message size 3 is below 7")]


def test_a_killed_worker_is_seen_and_those_who_wait_for_it_are_told(watched: Watched) -> None:
    assert watched.worker.pid is not None
    os.kill(watched.worker.pid, signal.SIGSTOP)
    done: list[bool] = []
    assert watched.worker.ask("stats", lambda: done.append(True))
    watched.worker.kill()
    watched.until(lambda: watched.gone)
    assert watched.gone[0][0] == ""
    assert done


def test_a_worker_is_found_again(watched: Watched, tmp_path: Path) -> None:
    (found,) = workers.find(tmp_path)
    assert found.pid == watched.worker.pid
    assert found.device == (3, 0)
    found.sock.close()


def test_what_claims_another_pid_is_left_alone(watched: Watched, tmp_path: Path) -> None:
    watched.path.with_suffix(".pid").write_text("1\n")
    assert workers.find(tmp_path) == []
    assert watched.path.exists()


def test_dead_sockets_are_cleared_away(tmp_path: Path) -> None:
    path = workers.socket_path(tmp_path, 9, 9)
    jsonlines.listen(path).close()
    assert workers.find(tmp_path) == []
    assert not path.exists()


def test_a_zygote_that_cannot_start_a_worker_says_why(tmp_path: Path) -> None:
    loop = Loop()
    one = Watched(loop, tmp_path)
    parent = workers.Zygote(loop)
    parent.spawn(one.worker, {**request(tmp_path), "socket": str(tmp_path / "no" / "such.sock")})
    one.until(lambda: one.gone)
    assert one.gone[0][1]
    # It ends with the supervisor.
    loop.remove(parent._sock)
    parent._sock.close()
    assert os.waitpid(parent.pid, 0)[1] == 0


def test_a_zygote_that_dies_is_replaced(tmp_path: Path) -> None:
    loop = Loop()
    one = Watched(loop, tmp_path)
    parent = workers.Zygote(loop)
    first = parent.pid
    os.kill(first, signal.SIGKILL)
    one.until(lambda: parent.pid != first)
    loop.remove(parent._sock)
    parent._sock.close()
    os.waitpid(parent.pid, 0)
