"""A whole worker, shut in, that learns a boot and tells its supervisor; the next one reads ahead."""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from confined import child
from loopmount import MISSING, mounted
from test_origin import OLD, trees  # noqa: F401  # a fixture
from test_streams import forget, here
from xen9p import jsonlines, prefetch, worker
from xen9p.caching import Caching, lineage
from xen9p.client import Client
from xen9p.dataplane import DataPlane
from xen9p.loop import Loop
from xen9p.policy import Cache, Grant
from xen9p.transport.memory import MemoryRing, MemoryRingTransport
from xen9p.xenbus import GuestId

OWN = 10
"""Files of the first guest alone."""

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(tmp_path_factory.mktemp("worker"), mib=300) as point:
        yield point


class OnRing(worker.Worker):
    """A worker whose rings are in memory."""

    def __init__(self, request: dict[str, Any], listener: socket.socket, ring: MemoryRing) -> None:
        super().__init__(request, listener)
        self._ring = ring

    def _map(self, device: DataPlane, rings: object) -> None:
        self._ring.serve_with(device)


class Supervised:
    """The supervisor's end of a worker's socket."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(20)
        self._sock.connect(str(path))
        self._lines = self._sock.makefile("rb")

    def send(self, **order: object) -> None:
        self._sock.sendall(json.dumps(order).encode() + b"\n")

    def until(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        for line in self._lines:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == kind:
                return event
        raise AssertionError(f"it hung up without {kind}")

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


@contextmanager
def running(tree: Path, folder: Path, cache: Cache) -> Iterator[tuple[Supervised, Client, int]]:
    """A worker of a grant as the supervisor starts it, with a client."""
    plan = Caching(Loop(), folder / "profiles").plan(Grant("root", tree, "root", False, True, cache=cache))
    path = folder / "worker.sock"
    request = {
        "domid": 1, "devid": 0, "guest": "g1", "uuid": "u", "tag": "root", "export": "root", "path": str(tree),
        "readonly": False, "keys": None, "socket": str(path), **plan,
    }  # fmt: skip
    ring = MemoryRing(7)
    listener = jsonlines.listen(path)

    def work() -> int:
        DataPlane.open_xen = lambda self: None  # type: ignore[method-assign]  # there is no Xen
        return OnRing(request, listener, ring).run()

    with child(work) as (_, result):
        listener.close()
        boss = Supervised(path)
        boss.send(do="map", rings=[{"ref": 1, "port": 1}])
        boss.until("ready")
        client, root = Client.connect(MemoryRingTransport(ring))
        try:
            yield boss, client, root
        finally:
            client.close()
            boss.send(do="stop")
            boss.until("stopped")
            boss.close()
        assert result() == 0
    ring.close()


def test_what_one_has_learned_the_next_one_foresees(
    trees: tuple[Path, Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    golden, first, second = trees
    image = lineage(first)[0]
    for number in range(OWN):
        (first / f"own{number}").write_bytes(b"x")
    monkeypatch.setattr("xen9p.cache_runner.QUIET", 1.0)
    with running(first, tmp_path, Cache(prefetch=True, share=True, learn=3)) as (boss, client, root):
        assert client.read_file(root, b"usr/lib") == OLD
        for number in range(OWN):
            client.read_file(root, b"own%d" % number)
        event = boss.until("learned")
        boss.send(do="metrics")
        detail = boss.until("metrics")
        assert detail["shared_bytes"] == len(OLD)
        assert detail["cache"]["ahead_files"] == 0
    caching = Caching(Loop(), tmp_path / "profiles")
    caching.learned(GuestId(1, "g1", "u"), event)
    known = prefetch.load(tmp_path / "profiles", image)
    assert known is not None
    assert known.files[b"usr/lib"] == [(0, 2 * prefetch.BLOCK)]
    for tree in trees:
        forget(tree / "usr/lib")
    with running(second, tmp_path, Cache(prefetch=True, share=True)) as (boss, client, root):
        until = time.monotonic() + 20
        while here(golden / "usr/lib") < len(OLD) and time.monotonic() < until:
            time.sleep(0.02)
        assert client.read_file(root, b"usr/lib") == OLD
        boss.send(do="metrics")
        detail = boss.until("metrics")
        assert (detail["read_misses"], detail["shared_bytes"]) == (0, len(OLD))
        assert detail["cache"]["ahead_gone"] == OWN  # the first one's own files
    assert here(second / "usr/lib") == 0
    assert "xen9p: worker" not in capfd.readouterr().err


def test_without_the_policy_there_is_nothing_of_it(trees: tuple[Path, Path, Path], tmp_path: Path) -> None:  # noqa: F811
    _, first, _ = trees
    with running(first, tmp_path, Cache()) as (boss, client, root):
        assert client.read_file(root, b"usr/lib") == OLD
        boss.send(do="metrics")
        detail = boss.until("metrics")
        assert "cache" not in detail
        assert detail["shared_bytes"] == 0


@pytest.mark.parametrize("what", ["profile", "policy", "origin"])
def test_what_is_missing_is_one_line_and_the_guest_is_served(
    trees: tuple[Path, Path, Path],  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    _, first, _ = trees
    cache = Cache(prefetch=True, share=True, policy="no.such:Thing" if what == "policy" else "")
    if what == "profile":
        (tmp_path / "profiles").mkdir()
        prefetch.place(tmp_path / "profiles", lineage(first)[0]).write_text("{")
    if what == "origin":
        monkeypatch.setattr("xen9p.caching.lineage", lambda path: ("", tmp_path / "gone"))
    with running(first, tmp_path, cache) as (_, client, root):
        assert client.read_file(root, b"usr/lib") == OLD
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    wanted = {"profile": "is no profile", "policy": "cannot be loaded", "origin": "nothing is shared with"}[what]
    assert wanted in lines[0]


def test_learning_anew_on_demand(
    trees: tuple[Path, Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `xen9p cache learn` has it: long after the boot, and in place of what is known."""
    _, first, _ = trees
    for number in range(OWN):
        (first / f"own{number}").write_bytes(b"x")
    prefetch.save(tmp_path / "profiles", lineage(first)[0], prefetch.Profile({b"usr/other": []}))
    monkeypatch.setattr("xen9p.cache_runner.QUIET", 0.5)
    with running(first, tmp_path, Cache(prefetch=True)) as (boss, client, root):
        client.read_file(root, b"usr/lib")
        time.sleep(1.5)  # its boot is over
        boss.send(do="learn")
        # The order and the reads go different ways, so they go on until it has come.
        over = threading.Event()

        def read() -> None:
            while not over.wait(0.05):
                for number in range(OWN):
                    client.read_file(root, b"own%d" % number)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            event = boss.until("learned")
        finally:
            over.set()
            reader.join()
    known = prefetch.parse(event["profile"])
    assert {b"own%d" % number for number in range(OWN)} <= set(known.files)
    assert b"usr/lib" not in known.files


def test_descriptors_are_enough_for_all_fids(tmp_path: Path) -> None:
    """Also with an origin and with events: what is no fid has some left."""
    plain, caching = (
        worker.limits().max_fids,
        worker.limits(None, {"origin": "/o", "cache": {"prefetch": True}}).max_fids,
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 3 * (caching + worker.MOST_EVENTS) + worker.RESERVED_FDS <= max(soft, 3 * (16 + worker.MOST_EVENTS) + 128)
    assert caching <= plain
