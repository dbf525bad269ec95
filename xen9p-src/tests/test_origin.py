"""Clones that read unchanged files through the tree that they came from: one copy in memory, and never old data."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from confined import child
from loopmount import MISSING, mounted, subvolume
from serving import Served, Session
from test_streams import forget, here
from xen9p import sandbox, server, worker
from xen9p.cache_policy import Context
from xen9p.cache_runner import CacheRunner, Memory
from xen9p.caching import lineage
from xen9p.client import Client
from xen9p.dataplane import DataPlane, Limits
from xen9p.prefetch import BLOCK, Profile
from xen9p.prefetch_policy import Learned
from xen9p.transport.memory import MemoryRing, MemoryRingTransport

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
OLD = b"o" * 70_000
NEW = b"n" * 70_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(tmp_path_factory.mktemp("origin"), mib=400) as point:
        yield point


@pytest.fixture
def trees(store: Path) -> Iterator[tuple[Path, Path, Path]]:
    """A golden tree, read-only, and two clones."""
    golden = subvolume(store / "golden")
    (golden / "usr").mkdir()
    for name in ("lib", "other", "small"):
        (golden / "usr" / name).write_bytes(OLD if name != "small" else b"tiny")
    time.sleep(0.01)  # a change of the clone in the same tick of the clock as the making of the file would be none
    subprocess.run(["btrfs", "property", "set", golden, "ro", "true"], check=True, capture_output=True)
    clones = [store / "one", store / "two"]
    for clone in clones:
        subprocess.run(["btrfs", "subvolume", "snapshot", golden, clone], check=True, capture_output=True)
    yield golden, clones[0], clones[1]
    for tree in (*clones, golden):
        subprocess.run(["btrfs", "subvolume", "delete", tree], check=True, capture_output=True)


@contextmanager
def session(tree: Path, origin: Path | None) -> Iterator[Session]:
    """A tree that is served with its origin."""
    ring = MemoryRing(9)
    served = Served(tree)
    flags = os.O_RDONLY | os.O_DIRECTORY
    if origin is not None:
        served.device.close()
        served.device = DataPlane(os.open(tree, flags), False, origin_fd=os.open(origin, flags))
    ring.serve_with(served.device)
    served.start()
    client, root = Client.connect(MemoryRingTransport(ring))
    try:
        yield Session(client, root, served)
    finally:
        client.close()
        served.close()
        ring.close()


def opened(one: Session, *names: bytes, flags: int = os.O_RDONLY) -> int:
    fid = one.client.walk(one.root, *names)
    one.client.lopen(fid, flags)
    return fid


def shared(one: Session) -> int:
    return one.served.device.stats()["shared_bytes"]


def test_one_copy_serves_two_clones(trees: tuple[Path, Path, Path]) -> None:
    golden, *clones = trees
    for tree in trees:
        forget(tree / "usr/lib")
    for clone in clones:
        with session(clone, golden) as one:
            assert one.client.read(opened(one, b"usr", b"lib"), 0, len(OLD)) == OLD
            assert shared(one) == len(OLD)
            misses = one.served.device.stats()["read_misses"]
        assert misses == (1 if clone == clones[0] else 0)
    assert here(golden / "usr/lib") >= len(OLD)
    assert [here(clone / "usr/lib") for clone in clones] == [0, 0]


def test_it_is_looked_for_by_who_reads(trees: tuple[Path, Path, Path]) -> None:
    """Most files that are opened are in the guest's own page cache: for these nobody opens another one."""
    golden, clone, _ = trees
    fds = Path("/proc/self/fd")

    def descriptors() -> int:
        return sum(os.path.lexists(fd) and os.readlink(fd) == str(golden / "usr/lib") for fd in fds.iterdir())

    with session(clone, golden) as one:
        fid = opened(one, b"usr", b"lib")
        assert descriptors() == 0
        assert one.client.read(fid, 0, 8) == b"o" * 8
        assert (descriptors(), shared(one)) == (1, 8)
        one.client.clunk(fid)
        assert descriptors() == 0
        writing = opened(one, b"usr", b"lib", flags=os.O_RDWR)
        assert one.client.read(writing, 0, 8) == b"o" * 8
        assert (descriptors(), shared(one)) == (0, 8)


def test_without_it_each_clone_has_a_copy(trees: tuple[Path, Path, Path]) -> None:
    """What a snapshot shares is blocks and not pages: the reason for all this."""
    _, *clones = trees
    for clone in clones:
        forget(clone / "usr/lib")
        with session(clone, None) as one:
            assert one.client.read(opened(one, b"usr", b"lib"), 0, len(OLD)) == OLD
            assert one.served.device.stats()["read_misses"] == 1
        assert here(clone / "usr/lib") >= len(OLD)


@pytest.mark.parametrize("how", ["its guest", "dom0", "dom0 by mmap", "truncate", "reflink", "replace"])
def test_a_change_is_seen_by_who_has_the_file_open(trees: tuple[Path, Path, Path], how: str) -> None:
    golden, clone, other = trees
    path = clone / "usr/lib"
    with session(clone, golden) as one, session(other, golden) as two:
        reading, there = opened(one, b"usr", b"lib"), opened(two, b"usr", b"lib")
        assert one.client.read(reading, 0, 8) == b"o" * 8
        assert shared(one) == 8
        wanted = NEW
        match how:
            case "its guest":
                one.client.write(opened(one, b"usr", b"lib", flags=os.O_WRONLY), 0, NEW)
            case "dom0":
                with path.open("r+b") as file:
                    os.pwrite(file.fileno(), NEW, 0)
            case "dom0 by mmap":
                import mmap  # noqa: PLC0415

                with path.open("r+b") as file, mmap.mmap(file.fileno(), len(NEW)) as mapped:
                    mapped[:] = NEW
            case "truncate":
                os.truncate(path, 10)
                wanted = OLD[:10]
            case "reflink":
                source = clone / "source"
                source.write_bytes(NEW)
                subprocess.run(["cp", "--reflink=always", source, path], check=True)
            case "replace":  # the fid goes on with the file that it had
                (clone / "fresh").write_bytes(NEW)
                (clone / "fresh").rename(path)
                wanted = OLD
        assert one.client.read(reading, 0, len(NEW)) == wanted
        assert one.client.read(opened(one, b"usr", b"lib"), 0, len(NEW)) == (NEW if how == "replace" else wanted)
        assert two.client.read(there, 0, len(OLD)) == OLD
    assert (golden / "usr/lib").read_bytes() == OLD


def test_what_looks_the_same_and_is_not(trees: tuple[Path, Path, Path]) -> None:
    """Another file at the place; the same one with another time; one that came later; one open for writing."""
    golden, clone, _ = trees
    (clone / "usr/lib").unlink()
    (clone / "usr/lib").write_bytes(NEW)
    there = (golden / "usr/lib").stat()
    os.utime(clone / "usr/lib", ns=(there.st_atime_ns, there.st_mtime_ns))
    (clone / "usr/small").chmod(0o600)
    (clone / "late").write_bytes(OLD)
    with session(clone, golden) as one:
        assert one.client.read(opened(one, b"usr", b"lib"), 0, len(NEW)) == NEW
        assert one.client.read(opened(one, b"usr", b"small"), 0, 9) == b"tiny"
        assert one.client.read(opened(one, b"late"), 0, len(OLD)) == OLD
        assert one.client.read(opened(one, b"usr", b"other", flags=os.O_RDWR), 0, len(OLD)) == OLD
        assert shared(one) == 0


def test_a_golden_tree_that_is_changed_or_removed(store: Path, trees: tuple[Path, Path, Path]) -> None:
    """Nobody should; a guest does not notice."""
    golden, clone, _ = trees
    with session(clone, golden) as one:
        fid = opened(one, b"usr", b"lib")
        assert one.client.read(fid, 0, len(OLD)) == OLD
        subprocess.run(["btrfs", "property", "set", "-f", golden, "ro", "false"], check=True, capture_output=True)
        (golden / "usr/lib").write_bytes(NEW)
        assert one.client.read(fid, 0, len(OLD)) == OLD
        assert one.client.read(opened(one, b"usr", b"lib"), 0, len(OLD)) == OLD
        before = shared(one)
        assert one.client.read(opened(one, b"usr", b"lib"), 0, len(OLD)) == OLD
        assert shared(one) == before == len(OLD)


def test_a_writer_and_a_reader_race(trees: tuple[Path, Path, Path]) -> None:
    """A read that begins after a write has been answered sees it: counted up by one client, read by another."""
    golden, clone, _ = trees
    with session(clone, golden) as writer, session(clone, golden) as reader:
        fid, floor, over = opened(reader, b"usr", b"small"), [0], threading.Event()
        assert reader.client.read(fid, 0, 4) == b"tiny"

        def write() -> None:
            out = opened(writer, b"usr", b"small", flags=os.O_WRONLY)
            for number in range(1, 400):
                writer.client.write(out, 0, b"%04d" % number)
                floor[0] = number
            over.set()

        thread = threading.Thread(target=write)
        thread.start()
        looked = 0
        while not over.is_set() or not looked:
            least = floor[0]
            found = reader.client.read(fid, 0, 4)
            assert (0 if found == b"tiny" else int(found)) >= least
            looked += 1
        thread.join()
        assert reader.client.read(fid, 0, 4) == b"0399"


def test_links_lead_nowhere(trees: tuple[Path, Path, Path], tmp_path: Path) -> None:
    golden, clone, _ = trees
    (clone / "usr").rename(clone / "moved")
    (clone / "usr").symlink_to("moved")
    with session(clone, golden) as one:
        assert one.client.read(opened(one, b"moved", b"lib"), 0, len(OLD)) == OLD
        assert shared(one) == 0


def test_whose_clone_a_tree_is(trees: tuple[Path, Path, Path], tmp_path: Path) -> None:
    golden, clone, other = trees
    image, origin = lineage(clone)
    assert lineage(other) == (image, origin)
    assert origin == golden
    assert lineage(golden) == (image, None)
    assert lineage(tmp_path) == ("", None)
    subprocess.run(["btrfs", "property", "set", "-f", golden, "ro", "false"], check=True, capture_output=True)
    assert lineage(clone) == (image, None)


def serve_shut_in(clone: Path, golden: Path, ring: MemoryRing, until: int) -> dict[str, Any]:
    """What a worker does, until the pipe is closed; what it has counted, and what it could do that it should not."""
    worker.prepare_process()
    profile = Profile({b"usr/other": [(0, BLOCK * 2)], b"usr": [], b"../golden/usr/small": []})
    policy, memory = Learned(Context(profile=profile)), Memory()
    root = sandbox.cage(str(clone), False, str(golden))
    origin = sandbox.open_origin()
    device = DataPlane(root, False, Limits(stream_bytes=2 << 20), origin_fd=origin)
    sandbox.shut(root, False, origin)
    written = []
    for name, flags in (("new", os.O_CREAT | os.O_WRONLY), ("usr/lib", os.O_WRONLY)):
        with suppress(OSError):
            os.close(os.open(name, flags, dir_fd=origin))
            written.append(name)
    runner = CacheRunner(device, policy, memory, lambda _: None)
    runner.start()
    ring.serve_with(device)
    thread = threading.Thread(target=device.run, args=(server.serve,))
    thread.start()
    os.read(until, 1)
    report = runner.report()
    runner.close()
    device.stop()
    thread.join()
    return {"stats": dict(device.stats()), "report": report, "written": written}


def test_all_of_it_works_confined(trees: tuple[Path, Path, Path]) -> None:
    """The walls leave what it takes: the origin to be read and not written, looks at pages, reading ahead."""
    golden, clone, _ = trees
    (clone / "big").write_bytes(os.urandom(8 << 20))
    subprocess.run(["sync", "-f", clone], check=True)
    for path in (clone / "big", *(tree / "usr" / name for tree in trees for name in ("lib", "other"))):
        forget(path)
    ring = MemoryRing(9)
    waiting, done = os.pipe()

    def serve() -> dict[str, Any]:
        os.close(done)
        return serve_shut_in(clone, golden, ring, waiting)

    with child(serve) as (_, result):
        os.close(waiting)
        client, root = Client.connect(MemoryRingTransport(ring))
        until = time.monotonic() + 20
        while here(golden / "usr/other") < len(OLD) and time.monotonic() < until:
            time.sleep(0.02)
        assert client.read_file(root, b"usr/other") == OLD
        assert client.read_file(root, b"usr/lib") == OLD
        fid = client.walk(root, b"big")
        client.lopen(fid)
        for at in range(0, 8 << 20, 128 << 10):
            client.read(fid, at, 128 << 10)
        client.clunk(fid)
        client.close()
        os.close(done)
        found = result()
    ring.close()
    assert found["written"] == []
    assert found["report"]["ahead_bytes"] >= len(OLD)
    assert found["report"]["ahead_refused"] == 1  # what leads out of the export
    assert found["stats"]["shared_bytes"] == 2 * len(OLD)
    assert found["stats"]["streams"] == 1
    assert found["stats"]["streamed_bytes"] + found["stats"]["spared_bytes"] > 0
    assert here(clone / "usr/other") == here(clone / "usr/lib") == 0
