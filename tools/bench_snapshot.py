"""Measure snapshots: an export that a guest writes to, against reflinks of a disk image on the same store.

Needs root, loop devices, btrfs-progs and e2fsprogs; no Xen. The export is served over a ring in memory; the image is an
ext4 whose mount here stands for the guest's. Both have the same files. While one is being taken, somebody writes every
millisecond and notes how long each write takes. Writes .lab/snapshot.json, and with --docs the page and chart.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "xen9p-src" / "src"))

import bench_store
from bench_store import MIB, BenchError, bars_chart, drop_caches, mib, mounted, read_from, run, used
from xen9p import subvolumes
from xen9p.client import Client
from xen9p.dataplane import DataPlane
from xen9p.errors import Xen9pError
from xen9p.server import serve
from xen9p.snapshot import Store
from xen9p.transport.memory import MemoryRing, MemoryRingTransport
from xen9p.treediff import Tree, unshared

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "ours": "xen9p snapshot create",
    "frozen": "image: the guest freezes it, reflink",
    "unasked": "image: reflink, the guest is not asked",
}
PROGRAM = [sys.executable, "-c", "import sys; from xen9p.cli import main; sys.exit(main())", "snapshot"]
FOLDER = os.O_RDONLY | os.O_DIRECTORY
FIFREEZE: Final = 0xC0045877
FITHAW: Final = 0xC0045878
"""Of linux/fs.h: what fsfreeze(8) does."""
BEAT: Final = 0.001
"""Seconds between two writes."""
AROUND: Final = 0.3
"""Seconds that it writes before and after a snapshot is taken."""
COUNTER = "counter"
LIMIT_MS: Final = 100
"""What the slowest write may take more than the median."""

Write = Callable[[bytes], None]


# Who writes meanwhile.


class Writer(threading.Thread):
    """Writes a number into a file again and again, and notes how long each write took."""

    def __init__(self, write: Write, before: int = 0) -> None:
        """*before*: the last number that was written earlier; it goes on from there."""
        super().__init__(daemon=True)
        self._write = write
        self._before = before
        self._over = threading.Event()
        self._failed: OSError | Xen9pError | None = None
        self._times: list[tuple[float, float]] = []
        self.start()

    @property
    def last(self) -> int:
        """The number that was written last, by a write that has returned."""
        return self._before + len(self._times)

    def run(self) -> None:
        """Until end()."""
        try:
            while not self._over.wait(BEAT):
                began = time.monotonic()
                self._write(b"%016d" % (self.last + 1) + bytes(4080))
                self._times.append((began, time.monotonic() - began))
        except (OSError, Xen9pError) as error:
            self._failed = error

    def end(self) -> list[tuple[float, float]]:
        """When each write began, and how many seconds it took."""
        self._over.set()
        self.join()
        if self._failed or not self._times:
            raise BenchError(f"nobody writes: {self._failed}")
        return self._times


def pause(writes: Sequence[tuple[float, float]], began: float, ended: float) -> float:
    """Seconds that the slowest write of those between two moments took more than the median of all."""
    median = statistics.median(took for _, took in writes)
    beside = [took for start, took in writes if start < ended and start + took > began]
    return max(beside, default=median) - median


# The ways.


class Export:
    """A subvolume that a process serves, as a worker does; its boss has it stand still."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held = True
        self.ms = 0.0
        self.devices = 1
        self._ring = MemoryRing(9)
        self._boss, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if not self._pid:
            try:
                self._boss.close()
                self._serve(theirs)
            except (OSError, Xen9pError) as error:
                print(f"bench_snapshot: the server: {error}", file=sys.stderr)
            finally:
                os._exit(0)
        theirs.close()
        self.client, self.root = Client.connect(MemoryRingTransport(self._ring))
        self._counter = self.client.walk(self.root, COUNTER.encode())
        self.client.lopen(self._counter, os.O_RDWR)

    def _serve(self, boss: socket.socket) -> None:
        device = DataPlane(os.open(self.path, FOLDER), False)
        self._ring.serve_with(device)
        thread = threading.Thread(target=device.run, args=(serve,))
        thread.start()
        while order := boss.recv(1):
            if order == b"p":
                device.pause(2)
                boss.send(b"%d" % device.quiet(0.5))
            else:
                boss.send(b"%d" % bool(device.resume()))
        device.stop()
        thread.join()
        device.close()

    def _ask(self, order: bytes) -> int:
        self._boss.send(order)
        if not (answer := self._boss.recv(16)):
            raise BenchError("the server has ended")
        return int(answer)

    @contextmanager
    def still(self, _paths: Sequence[Path]) -> Iterator[Export]:
        """What Store.create() wants: nothing is written meanwhile."""
        began = time.monotonic()
        if self._ask(b"p"):
            raise BenchError("a write does not end")
        yield self
        self.held = bool(self._ask(b"r"))
        self.ms = (time.monotonic() - began) * 1000

    def write(self, data: bytes) -> None:
        """Into the file with the number."""
        self.client.write(self._counter, 0, data)

    def change(self, name: str, data: bytes) -> None:
        """Replace what a file begins with."""
        fid = self.client.walk(self.root, *name.encode().split(b"/"))
        self.client.lopen(fid, os.O_RDWR)
        self.client.write(fid, 0, data)
        self.client.clunk(fid)

    def close(self) -> None:
        """The server ends."""
        self.client.close()
        self._boss.close()
        os.waitpid(self._pid, 0)
        self._ring.close()


class Image:
    """An ext4 in a file of the store, mounted as a guest would."""

    def __init__(self, image: Path, point: Path) -> None:
        self.image, self.point = image, point
        self._counter = os.open(point / COUNTER, os.O_RDWR)

    def take(self, target: Path, *, frozen: bool) -> None:
        """A reflink of the image."""
        top, beside = os.open(self.point, FOLDER), os.open(target.parent, FOLDER)
        source = os.open(self.image, os.O_RDONLY)
        made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if frozen:
                fcntl.ioctl(top, FIFREEZE, 0)
            try:
                subvolumes.reflink(source, made)
            finally:
                if frozen:
                    fcntl.ioctl(top, FITHAW, 0)
            for fd in (made, beside):  # as a snapshot of ours, it is there after a crash
                os.fsync(fd)
        finally:
            for fd in (made, source, beside, top):
                os.close(fd)

    def write(self, data: bytes) -> None:
        """Into the file with the number."""
        os.pwrite(self._counter, data, 0)

    def change(self, name: str, data: bytes) -> None:
        """Replace what a file begins with."""
        with (self.point / name).open("r+b") as file:
            file.write(data)

    def close(self) -> None:
        """It can be unmounted."""
        os.close(self._counter)


class Bench:
    """A store with an export and an image of the same files."""

    def __init__(self, folder: Path, count: int, stack: ExitStack) -> None:
        self.folder, self.point = folder, folder / "store"
        self.names = [f"d{number // 100}/{number}" for number in range(count)]
        dice = random.Random(11)
        store = folder / "store.img"
        with store.open("wb") as file:
            file.truncate((1500 + count // 20) * MIB)
        run("mkfs.btrfs", "-q", store)
        stack.callback(store.unlink)
        self.loop = stack.enter_context(mounted(store, self.point))
        tree = self.point / "export"
        run("btrfs", "-q", "subvolume", "create", tree)
        for name in self.names:
            path = tree / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(dice.randbytes(dice.randrange(500, 8_000)))
        (tree / COUNTER).write_bytes(b"%016d" % 0)
        image = self.point / "guest.ext4"
        # Blocks for the files of up to 2, and the tables.
        size = f"{100 + count // 60}M"
        run("mke2fs", "-q", "-t", "ext4", "-N", 2 * count + 1000, "-d", tree, image, size)
        stack.enter_context(mounted(image, folder / "guest"))
        self.image = Image(image, folder / "guest")
        stack.callback(self.image.close)
        self.export = Export(tree)
        stack.callback(self.export.close)
        self.exports = {"export": tree}
        self.store = Store.of(self.exports)
        self.policy = folder / "policy.toml"
        self.policy.write_text(f'version = 1\n[exports.export]\npath = "{tree}"\n')
        self.env = {**os.environ, "PYTHONPATH": str(ROOT / "xen9p-src" / "src")}
        self._written = {"export": 0, "image": 0}

    def _xen9p(self, verb: str, *words: str) -> dict[str, Any]:
        """What `xen9p snapshot` says; the process that serves here is no device of a supervisor."""
        places = ("--policy", self.policy, "--runtime-dir", self.folder, "--json")
        said: dict[str, Any] = json.loads(run(*PROGRAM, verb, "export", *words, *places, env=self.env))
        return said

    def _image_of(self, name: str) -> Path:
        return self.point / f"{name}.ext4"

    def _take(self, way: str, name: str) -> None:
        if way == "ours":
            self.store.create(self.exports, name, self.export.still)
        else:
            self.image.take(self._image_of(name), frozen=way == "frozen")

    def _number_in(self, way: str, name: str) -> int:
        """What the writer had written last, as the snapshot has it."""
        if way == "ours":
            return int((self.store.get("export", name).path / COUNTER).read_bytes()[:16])
        with self._opened(name) as tree:
            return int((tree / COUNTER).read_bytes()[:16])

    @contextmanager
    def _opened(self, name: str) -> Iterator[Path]:
        """An image's snapshot as a tree: of a copy, as its journal has to be replayed first."""
        copy = self._image_of(f"{name}-look")
        run("cp", "--reflink=always", self._image_of(name), copy)
        try:
            point = self.folder / f"look-{name}"
            with mounted(copy, point):
                yield point
        finally:
            copy.unlink()

    def take(self, way: str, name: str) -> dict[str, float]:
        """Takes a snapshot while somebody writes."""
        kind, side = ("export", self.export) if way == "ours" else ("image", self.image)
        os.sync()  # what the round before has left to write
        writer = Writer(side.write, self._written[kind])
        try:
            time.sleep(AROUND)
            done = writer.last
            began = time.monotonic()
            self._take(way, name)
            ended = time.monotonic()
            time.sleep(AROUND)
        finally:
            writes = writer.end()
        self._written[kind] = writer.last
        return {
            "seconds": ended - began,
            "pause": pause(writes, began, ended),
            "missing": max(0, done - self._number_in(way, name)),
        }

    def afterwards(self, way: str, changes: int) -> dict[str, Any]:
        """What the last snapshot of a way takes and tells, when some files have changed since."""
        name = f"{way}-last"
        side = self.export if way == "ours" else self.image
        before = self._in_use()
        self._take(way, name)
        dice = random.Random(7)
        changed = dice.sample(self.names, changes)
        for path in changed:
            side.change(path, dice.randbytes(100))
        found = {"room": self._in_use() - before}
        return found | (self._ours(name, changed) if way == "ours" else self._images(name, changed))

    def _in_use(self) -> int:
        """Bytes in use of the store. What was deleted a moment ago is free only after another transaction."""
        os.sync()
        used(self.point)
        (self.point / "settled").write_bytes(b"")
        used(self.point)
        (self.point / "settled").unlink()
        return used(self.point)

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float, int]:
        """What it gave, its seconds, and the bytes that it read from the store's device, from empty caches on."""
        drop_caches()
        before, began = read_from(self.loop), time.monotonic()
        found = work()
        return found, time.monotonic() - began, read_from(self.loop) - before

    def _ours(self, name: str, changed: Sequence[str]) -> dict[str, Any]:
        said, seconds, read = self._timed(lambda: self._xen9p("diff", name))
        found = {change["path"]: change for change in said["exports"]["export"]}
        self._whole("xen9p snapshot diff", set(found) - {COUNTER}, changed)
        _, restored, _ = self._timed(lambda: self._xen9p("restore", name, changed[0]))
        old, new = self.store.get("export", name).path, self.exports["export"]
        self._same(old / changed[0], new / changed[0])
        return {
            "diff": seconds,
            "diff_read": read,
            "named": len(changed),
            "bytes_named": sum(length for path in changed for _, length in found[path]["ranges"]),
            "restored": restored,
        }

    def _images(self, name: str, changed: Sequence[str]) -> dict[str, Any]:
        now = "now"

        def places() -> int:
            self.image.take(self._image_of(now), frozen=True)
            return blocks_apart(self._image_of(name), self._image_of(now))

        def compare() -> set[str]:
            self.image.take(self._image_of(now), frozen=True)
            with self._opened(name) as before, self._opened(now) as after:
                return differing(before, after)

        def back() -> None:
            with self._opened(name) as before:
                shutil.copy2(before / changed[0], self.image.point / changed[0])
                self._same(before / changed[0], self.image.point / changed[0])

        blocks, seconds, read = self._timed(places)
        self._image_of(now).unlink()
        named, whole, whole_read = self._timed(compare)
        self._image_of(now).unlink()
        self._whole("comparing all files", named - {COUNTER}, changed)
        _, restored, _ = self._timed(back)
        return {
            "blocks": seconds,
            "blocks_read": read,
            "bytes_apart": blocks,
            "diff": whole,
            "diff_read": whole_read,
            "named": len(changed),
            "restored": restored,
        }

    @staticmethod
    def _whole(what: str, named: set[str], changed: Sequence[str]) -> None:
        if named != set(changed):
            raise BenchError(f"{what} names {len(named)} files, {len(changed)} have changed")

    @staticmethod
    def _same(one: Path, other: Path) -> None:
        if one.read_bytes() != other.read_bytes():
            raise BenchError("what was brought back is not what was there")


def differing(one: Path, other: Path) -> set[str]:
    """The files that two trees do not share: by name, owner, mode, size, and every byte."""

    def look(path: Path) -> tuple[int, int, int, bytes]:
        there = path.lstat()
        return there.st_mode, there.st_uid, there.st_gid, path.read_bytes()

    names = [{str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file()} for tree in (one, other)]
    return names[0] ^ names[1] | {name for name in names[0] & names[1] if look(one / name) != look(other / name)}


def blocks_apart(one: Path, other: Path) -> int:
    """Bytes of two files of a btrfs that are not stored in the same place: what a block layer can know."""
    size = one.stat().st_size
    with subvolumes.opened(one.parent) as fd:
        tree = Tree(fd)
        places = [tree.extents(path.stat().st_ino, size) for path in (one, other)]
    return sum(length for _, length in unshared(places[0], places[1], size))


# The run.


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    found: dict[str, Any] = {"taken": {}, "afterwards": {}}
    for count in given.files:
        with tempfile.TemporaryDirectory(prefix="xen9p-snapshot-", dir=given.folder) as temporary, ExitStack() as stack:
            print(f"    {count:,} files", flush=True)
            bench = Bench(Path(temporary), count, stack)
            taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for number in range(given.rounds):
                print(f"    {count:,} files, round {number + 1} of {given.rounds}", flush=True)
                ways = list(WAYS)
                for way in ways[number % 3 :] + ways[: number % 3]:
                    taken[way].append(bench.take(way, f"{way}-{number}"))
            found["taken"][str(count)] = taken
            print(f"    {count:,} files, {given.changes} of them changed", flush=True)
            found["afterwards"][str(count)] = {way: bench.afterwards(way, given.changes) for way in ("ours", "frozen")}
    return found


def spread(rows: Sequence[dict[str, float]], what: str) -> tuple[float, float, float]:
    """Median, least and most."""
    values = [row[what] for row in rows]
    return statistics.median(values), min(values), max(values)


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project has set itself, and what came of it."""
    most = max(found["taken"], key=int)
    worst = max(row["pause"] for row in found["taken"][most]["ours"]) * 1000
    text = f"with {int(most):,} files no write takes {LIMIT_MS} ms more than the median"
    lost = sum(row["missing"] for rows in found["taken"].values() for row in rows["ours"])
    return [
        {"text": text, "value": f"{worst:.1f} ms", "held": worst <= LIMIT_MS},
        {"text": "every finished write is in the snapshot", "value": f"{lost:.0f} missing", "held": not lost},
    ]


def ms(values: tuple[float, float, float]) -> str:
    """Seconds as milliseconds: the median, and the range."""
    median, low, high = (1000 * value for value in values)
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def page(run_: dict[str, Any]) -> str:
    """The page of the documentation, in Markdown."""
    sizes = run_["sizes"]
    text = [
        "# Snapshots: an export against a disk image",
        "",
        "<!-- Written by tools/bench_snapshot.py (`make bench-snapshot`): changes are lost. -->",
        "",
        f"Measured {run_['date']} on a btrfs in a file, without Xen; Linux {run_['kernel']},",
        f"{run_['processors']} processors. The same files are in an export, served over a ring in memory, and in an",
        "ext4 image on the same btrfs, whose mount on this machine stands for a guest's. Somebody writes 4 KiB into",
        f"a file every millisecond, while {sizes['rounds']} snapshots are taken of each, in turns, until they are on",
        "the disk. How long it takes to ask a supervisor, and it the workers, is not in these times.",
        "",
        "![Milliseconds of a snapshot](snapshot.svg)",
        "",
        "*Slowest write*: what the slowest write that met the snapshot took more than the median of all.",
        "*Missing*: writes that had returned before it was begun and are not in it, the most of all rounds. By then",
        f"somebody has written for {AROUND:g} s; a guest that has done so for longer can miss more. Median, and the",
        "range.",
        "",
        "| files | | taken in, ms | slowest write, ms | missing |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for count, ways in run_["taken"].items():
        for way, rows in ways.items():
            cells = [ms(spread(rows, "seconds")), ms(spread(rows, "pause")), f"{max(r['missing'] for r in rows):.0f}"]
            text.append(f"| {int(count):,} | {WAYS[way]} | {' | '.join(cells)} |")
    text += [
        "",
        f"## What one knows, after {sizes['changes']} files have changed",
        "",
        f"100 bytes are written into each of {sizes['changes']} files. *Room*: what the store has in use more than",
        "before the snapshot. Times are from the start of a command to its end and from empty caches on; what has to",
        "be mounted for it, and a snapshot of what is there now, are in them.",
        "",
        "| files | | room, MiB | what changed is known in, s | read, MiB | what is known | one file is back in, s |",
        "| ---: | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for count, ways in run_["afterwards"].items():
        ours, image = ways["ours"], ways["frozen"]
        known = f"{ours['named']} names, {ours['bytes_named']:,} bytes"
        apart, all_of_them = f"{image['bytes_apart']:,} bytes, no name", f"{image['named']} names"
        back = [f"{way['restored']:.2f}" for way in (ours, image)]
        rows = (
            ("`xen9p snapshot diff`", ours, "diff", known, back[0]),
            ("image: where blocks lie", image, "blocks", apart, ""),
            ("image: mounted, all files compared", image, "diff", all_of_them, back[1]),
        )
        for label, side, kind, what, restored in rows:
            cells = [mib(side["room"]), f"{side[kind]:.2f}", mib(side[f"{kind}_read"]), what, restored]
            text.append(f"| {int(count):,} | {label} | {' | '.join(cells)} |")
    text += [
        "",
        "To look into an image, dom0's kernel mounts a filesystem that a guest has written; for an export it does not.",
        "",
        "## Bars",
        "",
        "| bar | measured | |",
        "| --- | ---: | --- |",
    ]
    text += [f"| {bar['text']} | {bar['value']} | {'held' if bar['held'] else '**missed**'} |" for bar in run_["bars"]]
    return "\n".join([*text, ""])


def chart(run_: dict[str, Any]) -> str:
    """Milliseconds of a snapshot as bars, in SVG."""
    css = {"ours": "ours", "frozen": "theirs", "unasked": "block"}
    groups = []
    for count, ways in run_["taken"].items():
        rows = []
        for way, taken in ways.items():
            median = 1000 * spread(taken, "seconds")[0]
            rows.append((css[way], median, f"{median:.1f} ms, {WAYS[way]}"))
        groups.append((f"{int(count):,} files", rows))
    return bars_chart("Milliseconds until a snapshot is taken", groups, left=110, room=300, top=34, bar=20)


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--files", type=int, nargs="+", default=[1000, 10_000, 100_000], metavar="N", help="default: 1000 10000 100000"
    )
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: %(default)s")
    parser.add_argument("--changes", type=int, default=100, metavar="N", help="files; default: %(default)s")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the store is while it runs; some GiB, sparse")
    parser.add_argument("--results", type=Path, default=ROOT / ".lab/snapshot.json", metavar="FILE.json")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write the documentation's page and chart, too")
    given = parser.parse_args()
    problem = bench_store.missing("bench-snapshot")
    if not problem and (given.rounds < 1 or not 1 <= given.changes <= min(given.files)):
        problem = "--rounds is 1 or more, and --changes from 1 to the least of --files"
    if problem:
        print(f"bench_snapshot: {problem}", file=sys.stderr)
        return 1
    sys.setswitchinterval(0.0005)  # who writes is not to wait for who takes the snapshot
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what is mounted is unmounted
    try:
        found = measure(given)
    except (BenchError, Xen9pError, OSError) as error:
        print(f"bench_snapshot: {error}", file=sys.stderr)
        return 1
    sizes = {"files": given.files, "rounds": given.rounds, "changes": given.changes}
    result = {"sizes": sizes, **found, "bars": bars(found)}
    bench_store.publish("snapshot", given, result, page, chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
