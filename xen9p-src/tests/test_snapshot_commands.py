"""xen9p snapshot from its options to the worker: a real btrfs, real sockets, workers on rings in memory."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from loopmount import MISSING, mounted, subvolume
from serving import Session, memory_session
from test_flush import gated_mkdir, receive, send
from test_rates import until
from test_snapshot import home  # noqa: F401 - a fixture
from xen9p import cli, codec, control, jsonlines, timers, worker, workers
from xen9p.blink import Blink
from xen9p.control import Answer, Attach, ControlServer, Pause, Request, Resume, Status
from xen9p.errors import Xen9pError
from xen9p.loop import Loop

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(tmp_path_factory.mktemp("btrfs")) as made:
        yield made


class Ours(workers.Worker):
    """A worker in this process, which nobody may kill."""

    def kill(self) -> None:
        pass


class Lab:
    """The supervisor's control socket, its Blink, and the workers of devices of guest g1."""

    def __init__(self, runtime: Path, exports: dict[str, tuple[Path, Session]]) -> None:
        self.runtime = runtime
        self.exports = exports
        self.loop = Loop()
        self.blink = Blink(self.loop)
        self.late: set[str] = set()
        self.server = ControlServer(self.loop, control.socket_path(runtime), self.handle, self.blink.hung_up)
        self.told, self.tell = socket.socketpair()
        self.loop.add(self.told, self.loop.stop)
        self.listeners: list[socket.socket] = []
        self.devices = [self._device(number, name) for number, name in enumerate(exports)]
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def _device(self, number: int, name: str) -> tuple[str, Path, workers.Worker]:
        path, session = self.exports[name]
        where = workers.socket_path(self.runtime, 1, number)
        request = {"domid": 1, "devid": number, "guest": "g1", "uuid": "u", "tag": name, "export": name}
        served = worker.Worker({**request, "readonly": False, "socket": str(where)}, jsonlines.listen(where))
        served.device = served._made = session.served.device
        threading.Thread(target=served._listen, daemon=True).start()
        self.listeners.append(served.listener)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(where))
        ours = Ours(self.loop, where, lambda: None, lambda *_: None)
        ours.adopt(os.getpid(), sock, workers._read_hello(sock))
        return f"g1 {name}", path, ours

    def handle(self, request: Request, answer: Answer) -> None:
        match request:
            case Pause(paths, force):
                self.blink.begin(paths, [d for d in self.devices if d[0] not in self.late], force, answer)
            case Attach(_, name):  # its worker has just been started
                self.blink.joined(next(d for d in self.devices if d[0] == f"g1 {name}"))
                answer({"ok": True})
            case Resume():
                self.blink.end(answer)
            case Status():
                devices = [
                    {"guest": "g1", "tag": name, "path": str(path), "pid": 1}
                    for name, (path, _) in self.exports.items()
                ]
                answer({"ok": True, "guests": [{"name": "g1", "uuid": "u"}], "devices": devices})

    def close(self) -> None:
        self.tell.send(b"!")
        self.thread.join(5)
        self.server.close()
        for listener in self.listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for _, _, one in self.devices:
            one._end()
        self.told.close()
        self.tell.close()


@contextmanager
def lab(runtime: Path, *paths: Path) -> Iterator[Lab]:
    with ExitStack() as stack:
        made = Lab(runtime, {p.name: (p, stack.enter_context(memory_session(p))) for p in paths})
        try:
            yield made
        finally:
            made.close()


Command = Callable[..., dict[str, Any]]


@pytest.fixture
def policy_file(home: Path, tmp_path: Path) -> Path:  # noqa: F811
    file = tmp_path / "policy.toml"
    file.write_text(
        f'version = 1\n[exports.home]\npath = "{home}"\n[exports.g1-root]\npath = "{home.parent}/g1-root"\n'
        f'[exports.plain]\npath = "{tmp_path}"\n'
        '[[rules]]\nguest = "g1"\nexport = "home"\naccess = "rw"\n'
        '[[rules]]\nguest = "g1"\nexport = "g1-root"\ntag = "root"\naccess = "rw"\n'
        '[[rules]]\nguest = "g2"\nexport = "home"\n'
    )
    subvolume(home.parent / "g1-root")
    return file


@pytest.fixture
def run(policy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command; what it says as JSON, or {"error": its line}."""

    def command(*args: str) -> dict[str, Any]:
        capsys.readouterr()
        options = ("--json", "--policy", str(policy_file), "--runtime-dir", str(tmp_path))
        code = cli.main(["snapshot", *args, *options])
        said = capsys.readouterr()
        if code:
            assert said.err.count("\n") == 1, said.err
            assert said.err.startswith("xen9p: error: ")
            return {"error": said.err, "code": code}
        found: dict[str, Any] = json.loads(said.out)
        return found

    return command


def test_a_guest_from_create_to_restore(home: Path, run: Command, tmp_path: Path) -> None:  # noqa: F811
    root = home.parent / "g1-root"
    (home / "f").write_text("before")
    with lab(tmp_path, home, root) as made:
        got = run("create", "g1", "one", "--reason", "a test")
        assert got["devices"] == 2
        assert 0 < got["pause_ms"] < 2000
        assert [(s["export"], s["name"], s["guest"]) for s in got["snapshots"]] == [
            ("g1-root", "one", "g1"),
            ("home", "one", "g1"),
        ]
        session = made.exports["home"][1]
        session.client.mkdir(session.root, b"made")
        (home / "f").write_text("after!")
        assert [c["path"] for c in run("diff", "home", "one")["exports"]["home"]] == ["f", "made"]
        assert run("list", "g1")["snapshots"][0]["reason"] == "a test"
        assert "home is attached to guest g1 as home" in run("restore", "home", "one")["error"]
        assert "of one" in run("restore", "g1", "one", "f")["error"]
        assert run("restore", "home", "one", "f")["changed"] is True
        assert (home / "f").read_text() == "before"
        assert run("restore", "home", "one", "f")["changed"] is False
        assert run("restore", "home", "one", "--online", "--dry-run")["changed"] is True
        assert (home / "made").is_dir()
        assert run("restore", "home", "one", "--online")["changed"] is True
        assert not (home / "made").exists()
    (home / "late").touch()
    assert run("restore", "home", "one")["changed"] is True
    assert os.listdir(home) == ["f"]
    assert run("clone", "g1", "one", "g9", "--dry-run") == {
        "changed": True, "path": str(home.parent / "g9"), "export": "g1-root"
    }  # fmt: skip
    assert run("clone", "g1", "one", "g9")["path"] == str(home.parent / "g9")
    assert run("clone", "g1", "one", "g9", "--dry-run")["changed"] is False
    assert "exists already" in run("clone", "g1", "one", "g9")["error"]
    assert run("create", "home")["devices"] == 0
    assert [s["name"] for s in run("prune", "home", "--keep-last", "1", "--dry-run")["deleted"]] == ["one"]
    assert len(run("prune", "home", "--keep-last", "1")["deleted"]) == 1
    assert len(run("delete", "g1", "one")["snapshots"]) == 1
    assert len(run("list", "g1")["snapshots"]) == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("create", "nobody"), "no export nobody, and no guest of that name"),
        (("create", "g2"), "no export g2, and no guest of that name can write"),
        (("create", "plain"), "has no snapshots (have the export on btrfs)"),
        (("create", "home", "a b"), "is no name for a snapshot"),
        (("delete", "home", "none"), "has no snapshot none"),
        (("restore", "home", "none"), "has no snapshot none"),
        (("diff", "home", "none"), "has no snapshot none"),
        (("prune", "home"), "this would delete every snapshot (say what to keep"),
        (("clone", "home", "none", "x"), "has no snapshot none"),
        (("schedule", "home", "--on", "daily"), "this would fill the store (say what to keep"),
        (("schedule", "home", "--on", "daily", "--off", "--keep-last", "1"), "contradict each other"),
        (("schedule", "home", "--keep-last", "1"), "says nothing without --on"),
        (("schedule", "nobody", "--on", "daily", "--keep-last", "1"), "no export nobody, and no guest of that name"),
        (("schedule", "home", "--on", "a\nb", "--keep-last", "1"), "is no time"),
        (("schedule", "home", "--on", "", "--keep-last", "1"), "is no time"),
        (("schedule", "a+b", "--off"), "cannot have a schedule"),
    ],
)
def test_bad_input_is_one_line(run: Command, args: tuple[str, ...], says: str, tmp_path: Path) -> None:
    units = tmp_path / "units"
    units.mkdir()
    more = ("--unit-dir", str(units)) if args[0] == "schedule" else ()
    assert says in run(*args, *more)["error"]
    assert list(units.iterdir()) == []
    assert run("list", "home")["snapshots"] == []


def commands(unit: Path) -> list[list[str]]:
    """What a service runs, without the program, and without where policy and supervisor are."""
    lines = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=")]
    return [line.partition(" --policy")[0].split()[2:] for line in lines]


def test_schedules_keep_of_their_own_and_leave_others_alone(home: Path, run: Command, tmp_path: Path) -> None:  # noqa: F811
    units = tmp_path / "units"
    units.mkdir()
    where = ("--unit-dir", str(units))
    assert run("schedule", "home", *where) == {"changed": False, "said": "does not run by itself (see --on)"}
    keep = ("--keep-last", "2", "--keep-daily", "7")
    assert run("schedule", "home", "--on", "daily", *keep, *where) == {"changed": True, "said": "runs at daily"}
    again = run("schedule", "home", "--on", "daily", *keep, *where)
    assert again == {"changed": False, "said": "runs at daily, as before"}
    assert "prune home --reason schedule:home --keep-last 2 --keep-daily 7" in run("schedule", "home", *where)["said"]
    assert run("schedule", "g1", "--on", "hourly", "--keep-last", "1", *where)["changed"] is True
    assert "OnCalendar=daily\n" in (units / "xen9p-snapshot-home.timer").read_text()
    service = (units / "xen9p-snapshot-home.service").read_text()
    assert f" --policy {tmp_path}/" in service
    assert f" --runtime-dir {tmp_path}\n" in service
    run("create", "home", "mine")
    for _ in range(3):  # what systemd would do
        for name in ("home", "g1"):
            for words in commands(units / f"xen9p-snapshot-{name}.service"):
                assert "error" not in run(*words)
    there = [s["reason"] for s in run("list", "home")["snapshots"]]
    assert sorted(there) == ["", "schedule:g1", "schedule:home", "schedule:home"]
    for name in ("home", "g1"):
        assert run("schedule", name, "--off", *where)["said"] == "does not run by itself any more"
    assert run("schedule", "home", "--off", *where) == {"changed": False, "said": "does not run by itself, as before"}
    assert list(units.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/etc/xen9p/policy.toml", "/etc/xen9p/policy.toml"),
        ("/a b", '"/a b"'),
        ("/100%/$HOME", '"/100%%/$$HOME"'),
        ('/say "it"\\', '"/say \\"it\\"\\\\"'),
    ],
)
def test_a_path_is_a_word_of_a_unit(path: str, word: str) -> None:
    assert timers.word(Path(path)) == word


def test_a_path_that_no_unit_can_have() -> None:
    with pytest.raises(Xen9pError, match="cannot be in a unit"):
        timers.word("/a\nExecStart=b")


def test_a_request_that_does_not_end(home: Path, run: Command, tmp_path: Path) -> None:  # noqa: F811
    with gated_mkdir() as gates, lab(tmp_path, home) as made:
        session = made.exports["home"][1]
        send(session.client, codec.Tmkdir(session.root, b"d", 0o755, 0), 7)
        stats = session.served.device.stats
        until(lambda: stats()["in_flight"] == 1 and stats()["queued"] == 0)  # else it waits for the pause's end
        began = time.monotonic()
        assert "requests of g1 home do not end" in run("create", "home", "a")["error"]
        assert time.monotonic() - began < 3
        assert run("list", "home")["snapshots"] == []
        assert run("create", "home", "a", "--force")["devices"] == 1
        gates[b"d"].set()
        assert receive(session.client)[0] == 7


def test_a_pause_ends_when_its_client_dies(home: Path, tmp_path: Path) -> None:  # noqa: F811
    with lab(tmp_path, home) as made:
        session = made.exports["home"][1]
        with control.Conversation(tmp_path) as conversation:
            assert conversation.ask(Pause((str(home),)))["devices"] == 1
            with pytest.raises(Exception, match="another snapshot is being taken"):
                control.ask(Pause((str(home),)), tmp_path)
            with pytest.raises(Exception, match="there is no pause to end"):
                control.ask(Resume(), tmp_path)
            send(session.client, codec.Tmkdir(session.root, b"d", 0o755, 0), 7)
            time.sleep(0.1)
            assert os.listdir(home) == []
        began = time.monotonic()
        assert receive(session.client)[0] == 7
        assert time.monotonic() - began < worker.STAND_STILL / 2


def test_only_those_that_write_there_stand_still(home: Path, tmp_path: Path) -> None:  # noqa: F811
    other = subvolume(home.parent / "other")
    (home / "inner").mkdir()
    with lab(tmp_path, home, other, home / "inner") as made, control.Conversation(tmp_path) as conversation:
        assert conversation.ask(Pause((str(home),)))["devices"] == 2
        session = made.exports["other"][1]
        session.client.mkdir(session.root, b"d")
        time.sleep(worker.STAND_STILL + 0.1)
        assert conversation.ask(Resume())["held"] is False, "they went on by themselves, and nobody was told"


def test_a_device_that_comes_meanwhile_stands_still_too(home: Path, tmp_path: Path) -> None:  # noqa: F811
    (home / "inner").mkdir()
    with lab(tmp_path, home, home / "inner") as made, control.Conversation(tmp_path) as conversation:
        made.late.add("g1 inner")
        session = made.exports["inner"][1]
        assert conversation.ask(Pause((str(home),)))["devices"] == 1
        control.ask(Attach("g1", "inner"), tmp_path)
        time.sleep(0.1)
        send(session.client, codec.Tmkdir(session.root, b"d", 0o755, 0), 7)
        time.sleep(0.2)
        assert os.listdir(home / "inner") == []
        assert conversation.ask(Resume())["held"] is True
        assert receive(session.client)[0] == 7


def test_without_a_supervisor_but_with_workers(home: Path, run: Command, tmp_path: Path) -> None:  # noqa: F811
    """Somebody writes there whom nobody can stop."""
    (tmp_path / "worker-1-0.sock").touch()
    assert "xen9pd is not running" in run("create", "home", "a")["error"]
    assert run("list", "home")["snapshots"] == []
    (tmp_path / "worker-1-0.sock").unlink()
    assert run("create", "home", "a")["devices"] == 0
