"""De-duplication on a real btrfs in a file: what it finds, what it reads, and that no byte changes whatever happens."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import loopmount
from serving import serve_memory
from xen9p import btrfs, cli, dedup_state, policy
from xen9p.client import Client
from xen9p.dedup import CHUNK, Options, survey
from xen9p.dedup_commands import run_store, stores
from xen9p.dedup_state import State, only_run
from xen9p.errors import Xen9pError
from xen9p.transport.memory import MemoryRingTransport

KIB, MIB = 1 << 10, 1 << 20
SOURCE = Path(__file__).resolve().parents[1] / "src"
PROGRAM = [sys.executable, "-c", "import sys; from xen9p.cli import main; sys.exit(main())", "dedup"]
pytestmark = pytest.mark.skipif(bool(loopmount.MISSING), reason=loopmount.MISSING)


class Lab:
    """A store with golden tree and guests, a policy, and a state directory beside it."""

    def __init__(self, folder: Path, mebibytes: int) -> None:
        self.folder, self.image, self.store = folder, folder / "image", folder / "store"
        self.state, self.policy = folder / "state", folder / "policy.toml"
        self.random = random.Random(9)
        self.exports: dict[str, Path] = {}
        self.is_mounted = False
        self.store.mkdir()
        self.policy.write_text("version = 1\n")
        loopmount.new_image(self.image, mib=mebibytes)

    def mount(self) -> None:
        loopmount.mount(self.image, self.store)
        self.is_mounted = True

    def umount(self) -> None:
        if self.is_mounted:
            loopmount.unmount(self.store)
            self.is_mounted = False

    def check(self) -> None:
        """`btrfs check` of the store, which is unmounted for it."""
        self.umount()
        done = subprocess.run(["btrfs", "check", str(self.image)], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.mount()

    def subvolume(self, name: str, *, of: str | None = None, readonly: bool = False) -> Path:
        path = self.store / name
        if of is None:
            btrfs_tool("subvolume", "create", path)
        else:
            btrfs_tool("subvolume", "snapshot", *(["-r"] if readonly else []), self.store / of, path)
        return path

    def export(self, name: str, path: Path) -> Path:
        self.exports[name] = path
        tables = "".join(f'[exports.{name}]\npath = "{path}"\n' for name, path in self.exports.items())
        rules = "".join(f'[[rules]]\nguest = "{name}"\nexport = "{name}"\naccess = "rw"\n' for name in self.exports)
        self.policy.write_text(f"version = 1\n{tables}{rules}")
        return path

    def guests(self, count: int, *, golden: dict[str, bytes] | None = None) -> list[Path]:
        """Clones of a read-only golden tree."""
        work = self.subvolume("work")
        write(work, golden or {"base": self.bytes(256 * KIB)})
        self.subvolume("golden", of="work", readonly=True)
        btrfs_tool("subvolume", "delete", work)
        return [self.export(f"g{n}", self.subvolume(f"g{n}", of="golden")) for n in range(count)]

    def bytes(self, size: int) -> bytes:
        return self.random.randbytes(size)

    def run(self, *names: str, **options: Any) -> dict[str, Any]:
        """One run, in this process; its counts together, and "freed" and "trees"."""
        with stores(policy.load(self.policy, check_paths=False), names) as (found, _):
            assert len(found) == 1
            given = Options(**{"settle": 0.0, **options})
            done = run_store(found[0], self.state, given, lambda _: None, everything=not names)
        return {**done["total"], "freed": done["freed"], "contents": done["contents"], "trees": done["trees"]}

    def command(self, *words: str) -> list[str]:
        return [*PROGRAM, *words, "--policy", str(self.policy), "--state-dir", str(self.state)]

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), check=False, capture_output=True, text=True, timeout=60, env=environment()
        )

    def database(self) -> sqlite3.Connection:
        (path,) = self.state.glob("*.sqlite")
        return sqlite3.connect(path)

    def digests(self) -> dict[str, str]:
        """What each file of the store holds, by its path; without those that are too large to be read."""
        found = {}
        for path in sorted(self.store.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 100 * MIB:
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE)}


def btrfs_tool(*words: object) -> None:
    subprocess.run(["btrfs", "-q", *map(str, words)], check=True, capture_output=True)


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def places(path: Path) -> set[int]:
    """Where a file's extents are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        btrfs.sync(fd)
        here, one = btrfs.subvolume(fd), os.fstat(fd)
        return {e.address for e in btrfs.Trees(fd).extents(here.id, one.st_ino, 0, max(one.st_size, 1))}
    finally:
        os.close(fd)


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    made: list[Lab] = []

    def make(mebibytes: int = 600) -> Lab:
        one = Lab(tmp_path, mebibytes)
        made.append(one)
        one.mount()
        return one

    yield make
    for one in made:
        one.umount()


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()


# What it finds, and what that costs.


def packages(lab: Lab, size: int) -> dict[str, bytes]:
    """Files as packages have them: many small ones, some large ones."""
    files = {f"usr/lib/large{n}": lab.bytes(size // 8 + n) for n in range(4)}
    while sum(map(len, files.values())) < size:
        files[f"usr/share/doc/{len(files)}"] = lab.bytes(lab.random.choice([3000, 5000, 12288, 40000, 70001]))
    return files


def drift(lab: Lab, guests: list[Path], files: dict[str, bytes], noise: int) -> None:
    """Each guest writes the same files by itself, with something of its own in between."""
    for guest in guests:
        names = list(files)
        lab.random.shuffle(names)
        for name in names:
            write(guest, {name: files[name]})
            write(guest, {f"var/own/{os.path.basename(name)}": lab.bytes(noise // len(names))})


def test_drifted_guests_are_pulled_together_for_a_tenth_of_a_full_scan(lab: Lab) -> None:
    guests = lab.guests(6, golden={f"lib/{n}": lab.bytes(MIB) for n in range(24)})
    files = packages(lab, MIB)
    drift(lab, guests, files, MIB // 4)
    before = lab.digests()
    whole = sum(os.path.getsize(path) for path in before)
    found = lab.run()
    equal = 5 * sum(len(data) for data in files.values())
    assert found["shared"] >= 0.9 * equal
    assert found["scanned"] <= 0.1 * whole
    assert found["freed"] >= 0.9 * equal
    assert lab.digests() == before
    assert len({frozenset(places(guest / "usr/lib/large0")) for guest in guests}) == 1
    lab.check()


def test_the_next_run_reads_next_to_nothing_and_finds_what_is_new(lab: Lab) -> None:
    guests = lab.guests(3)
    drift(lab, guests, packages(lab, MIB), 1000)
    assert lab.run()["shared"]
    again = lab.run()
    assert again["shared"] == again["data"] == again["looked"] == 0
    assert again["scanned"] < 200 * KIB
    # As equal to what was seen long ago as to what another guest writes.
    old, new = (guests[0] / "usr/lib/large1").read_bytes(), lab.bytes(200 * KIB)
    write(guests[1], {"copy": old, "new": new})
    write(guests[2], {"new": new})
    third = lab.run()
    assert third["shared"] == len(old) + len(new)
    assert third["scanned"] < 3 * (len(old) + len(new)) + 200 * KIB


def test_a_new_clone_costs_nothing(lab: Lab) -> None:
    lab.guests(2, golden={f"lib/{n}": lab.bytes(MIB) for n in range(8)})
    lab.run()
    lab.export("late", lab.subvolume("late", of="golden"))
    found = lab.run()
    assert found["data"] == 0
    assert found["looked"] == 0
    assert found["metadata"] < 100 * KIB


def test_what_is_equal_to_the_golden_tree_goes_back_to_it(lab: Lab) -> None:
    """Written anew by a guest: the read-only tree is where it is shared from."""
    data = lab.bytes(300 * KIB + 5)
    (guest,) = lab.guests(1, golden={"lib": data})
    (guest / "lib").write_bytes(data)
    golden = places(lab.store / "golden/lib")
    assert places(guest / "lib") != golden
    assert lab.run()["shared"] == len(data)
    assert places(guest / "lib") == places(lab.store / "golden/lib") == golden


def test_a_readonly_export_is_a_source(lab: Lab) -> None:
    data = lab.bytes(200 * KIB)
    guest = lab.export("g0", lab.subvolume("g0"))
    write(guest, {"f": data})
    work = lab.subvolume("work")
    write(work, {"f": data})
    course = lab.export("course", lab.subvolume("course", of="work", readonly=True))
    before = places(course / "f")
    assert lab.run()["shared"] == len(data)
    assert places(guest / "f") == places(course / "f") == before


def test_parts_of_files_are_shared_too(lab: Lab) -> None:
    """Two large files that differ here and there, and one whose equal part is at another place."""
    (guest,) = lab.guests(1)
    one = bytearray(lab.bytes(4 * MIB))
    other = bytearray(one)
    for at in range(0, len(other), MIB):
        other[at] ^= 1
    write(guest, {"one": bytes(one), "other": bytes(other), "moved": lab.bytes(CHUNK) + bytes(one[:MIB])})
    before = lab.digests()
    found = lab.run()
    assert found["shared"] >= 0.9 * (4 * MIB - 4 * CHUNK) + 0.9 * MIB
    assert lab.digests() == before


def test_compressed_files_are_shared(lab: Lab) -> None:
    guests = lab.guests(2)
    data = b"".join(b"line %d of a text\n" % n for n in range(60_000))
    for guest in guests:
        btrfs_tool("property", "set", guest, "compression", "zstd")
        write(guest, {"text": data})
    before = lab.digests()
    found = lab.run()
    assert found["shared"] >= 0.9 * len(data)
    assert lab.digests() == before
    assert places(guests[0] / "text") == places(guests[1] / "text")


def test_full_and_dry_run(lab: Lab) -> None:
    guests = lab.guests(2)
    drift(lab, guests, packages(lab, MIB), 1000)
    dry = lab.run(dry_run=True)
    assert dry["equal"] > 0
    assert dry["shared"] == dry["data"] == 0
    found = lab.run()
    assert found["shared"] == dry["equal"]
    full = lab.run(full=True)
    assert full["shared"] == 0
    assert full["already"] >= found["shared"]
    assert full["data"] == 0


# Correctness does not depend on what is remembered.


def test_without_the_state_file_everything_is_new(lab: Lab) -> None:
    guests = lab.guests(2)
    drift(lab, guests, packages(lab, MIB), 1000)
    found = lab.run()
    shutil.rmtree(lab.state)
    write(guests[0], {"copy": (guests[0] / "usr/lib/large1").read_bytes()})
    again = lab.run()
    assert again["already"] >= found["shared"]
    assert again["shared"] == (guests[0] / "copy").stat().st_size


def test_a_guest_that_is_gone_takes_no_knowledge_along(lab: Lab) -> None:
    """What the index knew of it alone is found in the others, too."""
    data = lab.bytes(500 * KIB)
    guests = lab.guests(3)
    write(guests[0], {f"f{n}": data for n in range(dedup_state.ALTERNATIVES)})
    write(guests[1], {"f": data})
    lab.run()
    lab.exports.pop("g0")
    lab.export("g1", guests[1])
    btrfs_tool("subvolume", "delete", guests[0])
    write(guests[2], {"again": data})
    assert lab.run()["shared"] == len(data)


def test_an_old_file_that_is_cloned_into_an_export_is_new_there(lab: Lab) -> None:
    """Its extents are older than the last run, and no run has seen them."""
    backup, data = lab.subvolume("backup"), lab.bytes(200 * KIB)
    write(backup, {"f": data})
    guests = lab.guests(2)
    lab.run()
    subprocess.run(["cp", "--reflink=always", backup / "f", guests[0] / "f"], check=True)
    lab.run()
    write(guests[1], {"f": data})
    assert lab.run()["shared"] == len(data)
    assert places(guests[1] / "f") == places(backup / "f")


def test_a_place_that_has_changed_is_seen_by_its_checksums(lab: Lab) -> None:
    """Nothing is read for it, and who has the content now takes its place in the index."""
    guests = lab.guests(3)
    data, other = lab.bytes(100 * KIB), lab.bytes(100 * KIB)
    write(guests[0], {"f": data, "gone": other})
    lab.run()
    write(guests[0], {"f": lab.bytes(100 * KIB)})
    (guests[0] / "gone").unlink()
    write(guests[1], {"f": data, "gone": other})
    found = lab.run()
    assert found["data"] == found["equal"] == 0
    write(guests[2], {"f": data, "gone": other})
    assert lab.run()["shared"] == len(data) + len(other)


def test_files_in_work_wait_and_are_not_forgotten(lab: Lab) -> None:
    guests = lab.guests(2)
    data = lab.bytes(300 * KIB)
    for guest in guests:
        write(guest, {"f": data})
    first = lab.run(settle=3600.0)
    assert first["shared"] == 0
    assert first["later"] == 2
    assert lab.run(settle=3600.0)["later"] == 2
    assert lab.run()["shared"] == len(data)
    assert lab.run()["looked"] == 0


def test_more_files_wait_than_are_noted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup_state, "MOST_WAITING", 5)
    guests = lab.guests(2)
    for guest in guests:
        write(guest, {f"f{n}": lab.bytes(0) + bytes([n]) * 5000 for n in range(20)})
    assert lab.run(settle=3600.0)["later"] == 40
    assert lab.database().execute("SELECT max(n) FROM (SELECT count(*) n FROM waiting GROUP BY tree)").fetchone() == (
        5,
    )
    assert lab.run()["shared"] >= 20 * 5000


def test_the_index_is_bounded(tmp_path: Path) -> None:
    fs = UUID(int=7)
    state = State(tmp_path, fs, most=100)
    with state.transaction():
        for n in range(1000):
            state.add(b"%016d" % n, 5, n, 1, 0)
            if n % 50 == 0:
                state.commit()
    assert state.contents() == 100
    assert state.find(b"%016d" % 999)
    assert not state.find(b"%016d" % 1)
    state.close()


def test_an_older_copy_of_the_store_is_new_as_a_whole(lab: Lab) -> None:
    guests = lab.guests(2)
    for guest in guests:
        write(guest, {"f": b"x" * 100_000})
    lab.run()
    (path,) = lab.state.glob("*.sqlite")
    db = sqlite3.connect(path)
    db.execute("UPDATE tree SET base = base + 1000000")
    db.commit()
    db.close()
    write(guests[0], {"g": lab.bytes(CHUNK)})
    write(guests[1], {"g": (guests[0] / "g").read_bytes()})
    assert lab.run()["shared"] == CHUNK


def test_a_damaged_state_is_one_line(lab: Lab) -> None:
    lab.guests(1)
    lab.run()
    (path,) = lab.state.glob("*.sqlite")
    for rest in lab.state.glob("*.sqlite-*"):
        rest.unlink()
    path.write_bytes(b"nonsense" * 1000)
    done = lab.call("run")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(path) in done.stderr
    assert "rm " in done.stderr


# Bytes never change.


def test_a_zero_more_is_another_content(lab: Lab) -> None:
    """The checksums are the same: btrfs fills the last block up with zeros."""
    guests = lab.guests(2)
    data = lab.bytes(5000)
    write(guests[0], {"f": data})
    write(guests[1], {"f": data + b"\0"})
    found = lab.run()
    assert found["equal"] == found["data"] == 0
    assert (guests[1] / "f").read_bytes() == data + b"\0"


def same_checksum(block: bytes) -> bytes:
    """Another block with the same crc32c: a multiple of its polynomial more."""
    bits = f"{0x11EDC6F41:b}"
    pattern = bytearray(5)
    for place, bit in enumerate(bits):
        pattern[place // 8] |= (bit == "1") << place % 8
    return bytes(a ^ b for a, b in zip(block[:5], pattern, strict=True)) + block[5:]


def test_blocks_made_to_have_the_same_checksum_stay_different(lab: Lab) -> None:
    guests = lab.guests(2)
    one = lab.bytes(CHUNK)
    other = same_checksum(one)
    assert one != other
    write(guests[0], {"f": one})
    write(guests[1], {"f": other})
    found = lab.run()
    assert found["equal"] == CHUNK, "the checksums are not the same, so the test is wrong"
    assert found["changed"] == CHUNK
    assert found["shared"] == 0
    assert (guests[0] / "f").read_bytes() == one
    assert (guests[1] / "f").read_bytes() == other
    assert places(guests[0] / "f").isdisjoint(places(guests[1] / "f"))


def test_the_kernel_compares_when_we_do_not(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xen9p.dedup.Deduper._equal", lambda self, one, start, other, at, length: [(0, length)])
    test_blocks_made_to_have_the_same_checksum_stay_different(lab)


def test_a_writer_is_never_robbed_of_a_byte(lab: Lab) -> None:
    """Somebody writes, truncates and renames equal and different blocks while run follows run."""
    guests = lab.guests(3)
    blocks = [lab.bytes(CHUNK) for _ in range(4)]
    wanted: dict[Path, bytearray] = {}
    for guest in guests:
        for n in range(6):
            wanted[guest / f"f{n}"] = bytearray(b"".join(blocks))
    for path, data in wanted.items():
        path.write_bytes(data)
    stop = threading.Event()
    writes = 0

    def work() -> None:
        nonlocal writes
        dice = random.Random(4)
        while not stop.is_set():
            path = dice.choice(list(wanted))
            data = wanted[path]
            at, piece = dice.randrange(8) * 4096 * 4, dice.choice(blocks)[: dice.choice([1, 4096, CHUNK])]
            with path.open("r+b") as file:
                if dice.random() < 0.1:
                    file.truncate(at)
                    del data[at:]
                file.seek(at)
                file.write(piece)
            if len(data) < at:
                data += bytes(at - len(data))
            data[at : at + len(piece)] = piece
            writes += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        shared, runs, began = 0, 0, time.monotonic()
        while runs < 12 or (not shared and time.monotonic() - began < 20):
            shared += lab.run()["shared"]
            runs += 1
    finally:
        stop.set()
        thread.join()
    assert shared > 0
    assert writes > 100
    assert {path: path.read_bytes() for path in wanted} == {path: bytes(data) for path, data in wanted.items()}
    lab.check()
    assert all(path.read_bytes() == data for path, data in wanted.items())


def test_guests_that_write_over_9p_meanwhile(lab: Lab) -> None:
    """Two devices write the same and other things; each reads what it wrote, through the data plane and beside it."""
    guests = lab.guests(2)
    blocks = [lab.bytes(CHUNK) for _ in range(4)]
    with contextlib.ExitStack() as held:
        clients: list[tuple[Client, int, list[int], list[bytearray]]] = []
        for guest in guests:
            rings, _ = held.enter_context(serve_memory(guest))
            client, root = Client.connect(MemoryRingTransport(rings[0]))
            held.callback(client.close)
            fids = []
            for n in range(4):
                client.write_file(root, f"f{n}", b"".join(blocks))
                fids.append(client.walk(root, b"f%d" % n))
                client.lopen(fids[-1], os.O_RDWR)
            clients.append((client, root, fids, [bytearray(b"".join(blocks)) for _ in fids]))
        stop, failed = threading.Event(), []

        def work(client: Client, root: int, fids: list[int], wanted: list[bytearray], seed: int) -> None:
            dice = random.Random(seed)
            try:
                while not stop.is_set():
                    n, at, piece = (
                        dice.randrange(4),
                        dice.randrange(32) * 4096,
                        dice.choice(blocks)[: dice.choice([5, 4096])],
                    )
                    client.write_all(fids[n], at, piece)
                    wanted[n][at : at + len(piece)] = piece
                    time.sleep(0.0005)
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(*one, seed)) for seed, one in enumerate(clients)]
        for thread in threads:
            thread.start()
        shared, rounds, until = 0, 0, time.monotonic() + 60
        try:
            while rounds < 15 or (not shared and time.monotonic() < until):
                shared += lab.run()["shared"]
                rounds += 1
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not failed
        assert shared > 0
        for guest, (client, root, _, wanted) in zip(guests, clients, strict=True):
            for n, data in enumerate(wanted):
                assert client.read_file(root, f"f{n}") == data == (guest / f"f{n}").read_bytes()
    lab.check()


def test_kills_at_any_time_leave_all_whole(lab: Lab) -> None:
    guests = lab.guests(4)
    files = packages(lab, 2 * MIB)
    drift(lab, guests, files, 20_000)
    before = lab.digests()
    killed = 0
    for number in range(12):
        process = subprocess.Popen(
            lab.command("run", "--settle", "0", "--limit", "2M"), env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(0.1 + lab.random.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert not lab.state.exists() or lab.database().execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if number % 4 == 3:
            write(guests[number % 3], {f"meanwhile{number}": files["usr/lib/large0"]})
            before = lab.digests()
    assert killed >= 6
    lab.run()
    assert lab.digests() == before
    for name in ("usr/lib/large0", "usr/lib/large1"):
        assert len({frozenset(places(guest / name)) for guest in guests}) == 1
    assert places(guests[0] / "meanwhile3") == places(guests[0] / "usr/lib/large0")
    again = lab.run()
    assert again["shared"] == 0
    lab.check()
    assert lab.digests() == before


class Cut(BaseException):
    """Instead of a kill, at a certain place."""


def cut_off(lab: Lab, title: str, after: int, **options: Any) -> None:
    """A run that ends when it has told so often how far it is in a tree."""
    seen = 0

    def tell(text: str) -> None:
        nonlocal seen
        seen += text.startswith(f"{title} ")
        if seen == after:
            raise Cut

    with stores(policy.load(lab.policy, check_paths=False), []) as (found, _), contextlib.suppress(Cut):
        run_store(found[0], lab.state, Options(**{"settle": 0.0, **options}), tell, everything=True)
    assert seen == after


def test_a_run_goes_on_where_it_was_cut_off(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xen9p.dedup.COMMIT", 0.0)
    guests = lab.guests(2)
    files = {f"f{n:03}": lab.bytes(CHUNK) for n in range(60)}
    for guest in guests:
        write(guest, files)
    cut_off(lab, "g1", 60)
    write(guests[1], {"f001": lab.bytes(CHUNK), "f002": files["f003"]})  # before the place where it was cut off
    write(guests[0], {"f050": files["f051"]})
    rest = lab.run()
    assert 25 * CHUNK <= rest["shared"] <= 35 * CHUNK
    assert {tree["name"]: tree["files"] for tree in rest["trees"]}["g1"] <= 40, "it began at the beginning again"
    assert places(guests[1] / "f002") == places(guests[0] / "f003")
    assert places(guests[0] / "f050") == places(guests[0] / "f051")


def test_a_run_that_is_cut_off_forgets_no_file_that_waits(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those that there was room to note, nor the others."""
    monkeypatch.setattr("xen9p.dedup.COMMIT", 0.0)
    monkeypatch.setattr(dedup_state, "MOST_WAITING", 5)
    guests = lab.guests(2)
    files = {f"f{n:03}": lab.bytes(CHUNK) for n in range(30)}
    for guest in guests:
        write(guest, files)
    cut_off(lab, "g1", 20, settle=3600.0)
    assert lab.run()["shared"] == len(files) * CHUNK


def test_a_large_file_that_is_cut_off(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was shared stays, and how far it is was told in the middle of it."""
    monkeypatch.setattr("xen9p.dedup.COMMIT", 0.0)
    monkeypatch.setattr("xen9p.dedup.STRETCH", MIB)
    guests = lab.guests(2)
    data = lab.bytes(12 * MIB)
    for guest in guests:
        write(guest, {"large": data})
    cut_off(lab, "g1", 6)
    rest = lab.run()
    assert 4 * MIB <= rest["already"] <= 8 * MIB
    assert rest["shared"] + rest["already"] == len(data)
    assert (guests[1] / "large").read_bytes() == data


# What a hostile guest may have there.


def test_links_fifos_holes_and_giants(lab: Lab, tmp_path: Path) -> None:
    guests = lab.guests(2)
    secret = lab.bytes(200 * KIB)
    outside = lab.store / "outside"
    outside.mkdir()
    write(outside, {"secret": secret})
    for guest in guests:
        write(guest, {"copy": secret, "tiny": b"x" * 100, "empty": b""})
        (guest / "link").symlink_to(outside / "secret")
        (guest / "folder").symlink_to(outside)
        (guest / "loop").symlink_to("loop")
        os.mkfifo(guest / "fifo")
        os.mknod(guest / "null", 0o666 | 0o020000, os.makedev(1, 3))
        os.link(guest / "copy", guest / "twin")
        with (guest / "sparse").open("wb") as file:
            file.truncate(8 << 40)
            file.seek(4 << 40)
            file.write(secret)
        with (guest / "reserved").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, MIB)
            file.write(secret)
        (guest / os.fsdecode(b"\xff\n\x1b[2J")).write_bytes(secret)
    where = places(outside / "secret")
    before = lab.digests()
    began = time.monotonic()
    found = lab.run()
    assert time.monotonic() - began < 10
    # The copy, what stands in the sparse and the reserved file, and the one with the bad name; of two guests.
    assert found["shared"] >= 0.8 * 7 * len(secret)
    assert places(outside / "secret") == where
    assert places(guests[0] / "copy").isdisjoint(where)
    assert lab.digests() == before
    lab.check()


def test_a_file_of_very_many_extents(lab: Lab) -> None:
    """One that was written block by block, and one that has its chunks in another order: no cost beyond measure."""
    (guest,) = lab.guests(1)
    chunks = [lab.bytes(CHUNK) for _ in range(300)]
    data = b"".join(chunks)
    with (guest / "pieces").open("wb", buffering=0) as file:
        file.write(bytes(len(data)))
        os.fsync(file.fileno())
        for at in range(0, len(data), 8192):  # every other block is written anew, and lies elsewhere
            os.pwrite(file.fileno(), data[at : at + 4096], at)
        os.fsync(file.fileno())
        for at in range(4096, len(data), 8192):
            os.pwrite(file.fileno(), data[at : at + 4096], at)
        os.fsync(file.fileno())
    assert len(places(guest / "pieces")) > 100
    lab.random.shuffle(chunks)
    write(guest, {"shuffled": b"".join(chunks)})
    before = lab.digests()
    found = lab.run()
    assert found["shared"] == len(data)
    assert found["metadata"] < 64 * MIB
    assert lab.digests() == before


def test_extents_are_found_from_any_place(lab: Lab) -> None:
    """Also what begins far before, and after holes."""
    path = lab.subvolume("g0") / "f"
    with path.open("wb") as file:
        file.write(lab.bytes(20 * MIB))
        file.seek(300 * MIB)
        file.write(lab.bytes(CHUNK))
    fd = os.open(path, os.O_RDONLY)
    try:
        btrfs.sync(fd)
        look, tree, number = btrfs.Trees(fd), btrfs.subvolume(fd).id, os.fstat(fd).st_ino
        everything = list(look.extents(tree, number, 0, 400 * MIB))
        for start in (0, 1, 4096, 7 * MIB, 20 * MIB - 1, 20 * MIB, 200 * MIB, 300 * MIB, 300 * MIB + 4096, 390 * MIB):
            found = list(look.extents(tree, number, start, start + MIB))
            assert found == [one for one in everything if one.end > start and one.start < start + MIB], start
    finally:
        os.close(fd)


def test_names_that_are_swapped_meanwhile(lab: Lab) -> None:
    """A guest replaces files and directories by links to what is outside, again and again."""
    (guest,) = lab.guests(1)
    outside = lab.store / "outside"
    data = lab.bytes(100 * KIB)
    write(outside, {"f": data, "d/f": data})
    write(guest, {"f": data, "d/f": data, "other": data})
    where = places(outside / "f") | places(outside / "d/f")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for name in ("f", "d"):
                (guest / name).rename(guest / f"{name}-away")
                (guest / name).symlink_to(outside / name)
                (guest / name).unlink()
                (guest / f"{name}-away").rename(guest / name)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(5):
            lab.run(full=True)
    finally:
        stop.set()
        thread.join()
    assert places(outside / "f") | places(outside / "d/f") == where
    assert (outside / "f").read_bytes() == (guest / "d/f").read_bytes() == data


def test_an_export_that_is_no_subvolume_ends_where_it_ends(lab: Lab) -> None:
    data = lab.bytes(200 * KIB)
    plain = lab.store / "plain"
    write(plain, {"in/f": data, "in/deep/f": data, "out/f": data})
    (plain / "in/link").symlink_to("../out")
    lab.export("in", plain / "in")
    before = places(plain / "out/f")
    assert lab.run()["shared"] == len(data)
    assert places(plain / "out/f") == before
    assert places(plain / "in/f") == places(plain / "in/deep/f") != before


def test_exports_of_one_subvolume_are_not_taken_for_each_other(lab: Lab) -> None:
    """A run over one of them says nothing about the other, now or when the policy gets it."""
    data = lab.bytes(200 * KIB)
    plain = lab.store / "plain"
    write(plain, {"one/f": data, "two/f": data})
    lab.export("one", plain / "one")
    lab.export("two", plain / "two")
    assert lab.run("one")["shared"] == 0
    assert lab.run()["shared"] == len(data)
    assert places(plain / "one/f") == places(plain / "two/f")
    lab.run()  # sharing is a change, too
    assert lab.run()["scanned"] == 0, "what was looked at is not read again"
    assert lab.run("two")["scanned"] == 0
    write(plain, {"three/f": data})
    lab.export("three", plain / "three")
    assert lab.run("three")["shared"] == len(data)
    assert places(plain / "three/f") == places(plain / "one/f")


def test_what_an_older_version_remembers_is_found_again(lab: Lab) -> None:
    one, two = lab.guests(2)
    data = lab.bytes(200 * KIB)
    write(one, {"f": data})
    write(two, {"f": data})
    lab.run()
    database = lab.database()
    database.executescript("ALTER TABLE tree DROP COLUMN covered; PRAGMA user_version = 1")
    database.close()
    write(two, {"g": data})
    assert lab.run()["shared"] == len(data)
    assert places(two / "g") == places(one / "f")


def test_a_giant_of_zeros_has_bounded_owners(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xen9p.dedup.MOST_USES", 50)
    (guest,) = lab.guests(1)
    write(guest, {"zeros": bytes(10 * MIB)})
    found = lab.run()
    assert 0.8 * 10 * MIB < found["shared"] < 10 * MIB
    (most,) = lab.database().execute("SELECT max(uses) FROM content").fetchone()
    assert most <= 50 + dedup_state.ALTERNATIVES
    assert (guest / "zeros").read_bytes() == bytes(10 * MIB)


# Bad places and bad input.


def test_a_full_store(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(140)
    guests = lab.guests(2)
    data = {f"f{n}": lab.bytes(200 * KIB) for n in range(20)}
    for guest in guests:
        write(guest, data)
    with contextlib.suppress(OSError), (lab.store / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(MIB))
    with contextlib.suppress(OSError):
        for n in range(100_000):  # metadata, too
            (lab.store / f"link{n}").symlink_to("x" * 3900)
    before = {path: hashlib.sha256(path.read_bytes()).digest() for guest in guests for path in guest.iterdir()}
    done = lab.call("run", "--settle", "0", "--json")
    assert done.returncode in (0, 1), done.stderr
    if done.returncode:
        assert "full" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    else:
        assert json.loads(done.stdout)["stores"][0]["total"]["shared"] > 0
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in before} == before
    lab.check()


def test_no_room_for_metadata_is_one_line(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel says it; when it does depends on the kernel."""
    guests = lab.guests(2)
    data = lab.bytes(100_000)
    for guest in guests:
        write(guest, {"f": data})

    def full(*_: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xen9p.btrfs.share", full)
    with pytest.raises(Xen9pError, match="the store is full"):
        lab.run()
    monkeypatch.undo()
    assert lab.run()["shared"] == 100_000


def test_a_filesystem_without_reflinks(lab: Lab, tmp_path: Path) -> None:
    shared_memory = Path("/dev/shm") / f"xen9p-dedup-{os.getpid()}"
    shared_memory.mkdir()
    try:
        write(shared_memory, {"a": b"z" * 100_000, "b": b"z" * 100_000})
        lab.export("memory", shared_memory)
        for words in (["memory"], []):
            done = lab.call("run", *words)
            assert done.returncode == 1
            assert done.stderr.startswith("xen9p: error: export memory: ")
            assert "btrfs" in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
        assert not lab.state.exists()
        # Beside one that can be, it is left out, and that is said.
        lab.guests(1)
        done = lab.call("run", "g0", "memory")
        assert done.returncode == 1
        assert not lab.state.exists()
        done = lab.call("run")
        assert done.returncode == 0
        assert "left out: export memory" in done.stderr
    finally:
        shutil.rmtree(shared_memory)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "nothing"], "unknown export nothing"),
        (["run", "gone"], "gone: No such file or directory"),
        (["run", "--limit", "fast"], "'fast' is not a rate"),
        (["run", "--settle", "-1"], "-1"),
    ],
)
def test_bad_input_is_one_line(lab: Lab, words: list[str], said: str) -> None:
    lab.guests(1)
    lab.export("gone", lab.store / "gone")
    done = lab.call(*words)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not lab.state.exists()


def test_one_run_at_a_time(lab: Lab) -> None:
    lab.guests(1)
    with only_run(lab.state):
        done = lab.call("run")
        status = lab.call("status", "--json")
    assert done.returncode == 1
    assert f"another run is under way (pid {os.getpid()})" in done.stderr
    assert json.loads(status.stdout)["running"]["pid"] == os.getpid()
    assert lab.call("run").returncode == 0


def test_a_limit_is_kept(lab: Lab) -> None:
    guests = lab.guests(2)
    for guest in guests:
        write(guest, {f"f{n}": lab.bytes(0) + bytes([n]) * CHUNK for n in range(16)})
    began = time.monotonic()
    found = lab.run(limit=MIB)
    assert found["data"] == 32 * CHUNK
    assert time.monotonic() - began > 0.8


def test_status_says_what_each_export_has(lab: Lab) -> None:
    data = lab.bytes(300 * KIB)
    guests = lab.guests(2, golden={"lib": lab.bytes(MIB)})
    for guest in guests:
        write(guest, {"f": data, "own": lab.bytes(100 * KIB)})
    os.sync()
    before = json.loads(lab.call("status", "--json").stdout)["stores"][0]["trees"]
    by_name = {tree["name"]: tree for tree in before}
    assert by_name["g0"]["last_run"] is None
    assert by_name["g0"]["exclusive"] == 400 * KIB
    assert by_name["g0"]["shared"] == MIB
    assert lab.call("run", "--settle", "0").returncode == 0
    after = {tree["name"]: tree for tree in json.loads(lab.call("status", "--json").stdout)["stores"][0]["trees"]}
    assert after["g1"]["guests"] == ["g1"]
    assert after["g1"]["saved"] == 300 * KIB
    assert after["g1"]["exclusive"] == 100 * KIB
    assert after["g1"]["changed"] == 0
    assert after["g1"]["logical"] == 400 * KIB + MIB
    assert 1.9 < after["g1"]["scanned_per_saved"] < 2.3
    text = lab.call("status").stdout
    assert "g1" in text
    assert "300.0K" in text


def test_survey_names_the_origin_first(lab: Lab) -> None:
    lab.guests(2)
    with stores(policy.load(lab.policy, check_paths=False), []) as (found, _):
        trees = survey(found[0].exports, found[0].fd)
    assert [tree.name for tree in trees] == ["origin of g0", "g0", "g1"]
    assert trees[0].subvolume.readonly


# The schedule.


def test_a_schedule_is_written_once_and_taken_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: str) -> str:
        assert cli.main(["dedup", "schedule", *words, "--unit-dir", str(tmp_path)]) == 0
        return capsys.readouterr().out.strip()

    assert call() == "does not run by itself (see --on)"
    assert call("--on", "daily", "--limit", "50M") == "runs at daily"
    service = (tmp_path / "xen9p-dedup.service").read_text()
    assert " dedup run --limit 50M\n" in service
    stamp = (tmp_path / "xen9p-dedup.timer").stat().st_mtime_ns
    assert call("--on", "daily", "--limit", "50M") == "runs at daily, as before"
    assert (tmp_path / "xen9p-dedup.timer").stat().st_mtime_ns == stamp
    assert call().startswith("runs at daily (")
    assert call("--off") == "does not run by itself any more"
    assert call("--off") == "does not run by itself, as before"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--on", "daily", "--off"], ["--limit", "1M"], ["--on", "a\nb"]])
def test_a_bad_schedule_changes_nothing(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dedup", "schedule", *words, "--unit-dir", str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
