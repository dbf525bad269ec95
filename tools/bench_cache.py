"""Measure the host's caching: boots that are read ahead of, streams beside a hot set, clones that share pages.

Needs root, loop devices, btrfs-progs, e2fsprogs and python3-pyfuse3; no Xen. Trees are on a btrfs in a file, as fast
as it is, or as slow as a hard disk (slow_disk.py); guests are clients on rings in memory. A "boot" finds and reads
files in a fixed order and waits in between, as if it computed. Writes .lab/cache.json, with --docs the page and chart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "xen9p-src" / "src"))

import bench_store
from bench_store import MIB, BenchError, bars_chart, run
from xen9p import page_cache
from xen9p.cache_policy import Context
from xen9p.cache_runner import CacheRunner, Memory
from xen9p.caching import lineage
from xen9p.client import Client
from xen9p.dataplane import DataPlane, Limits
from xen9p.prefetch import Profile, parse
from xen9p.prefetch_policy import Learned
from xen9p.server import serve
from xen9p.transport.memory import MemoryRing, MemoryRingTransport

ROOT = Path(__file__).resolve().parents[1]
FOLDER = os.O_RDONLY | os.O_DIRECTORY
V1, V2 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cgroup.controllers")
BOOTS = {
    "first": "first boot: nothing known, nothing in memory",
    "second": "second guest of the image, read ahead of from its attach on",
    "lead": "the same, with a lead of 2 s",
    "off": "second guest, nothing read ahead",
    "shared": "second guest, sharing its origin, while the first one's files are in memory",
    "warm": "all in memory, nothing read ahead",
    "warm-ahead": "all in memory, read ahead of all the same",
}


# The machine.


@contextmanager
def slow(image: Path, point: Path) -> Iterator[Path]:
    """A file as one that is as slow as a hard disk."""
    point.mkdir(exist_ok=True)
    # Debian's Python, for python3-pyfuse3.
    process = subprocess.Popen(["/usr/bin/python3", ROOT / "tools/slow_disk.py", image, point], stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 20
        while not (point / "disk").exists():
            if process.poll() is not None or time.monotonic() > until:
                raise BenchError("the slow disk does not start: apt-get install python3-pyfuse3, modprobe fuse")
            time.sleep(0.05)
        yield point / "disk"
    finally:
        # The kernel lets go of a loop device's file a moment after it has been detached; or much later, if somebody has
        # made a mount namespace meanwhile (a worker does) and so holds what was mounted.
        for _ in range(50):
            if not subprocess.run(["umount", point], check=False, capture_output=True).returncode:
                break
            time.sleep(0.1)
        else:
            subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
        process.kill()
        process.communicate()


@contextmanager
def mounted(image: Path, point: Path) -> Iterator[None]:
    """A file mounted as the filesystem that it has, with no second copy in the page cache."""
    point.mkdir(exist_ok=True)
    loop = run("losetup", "--find", "--show", image).strip()
    subprocess.run(["losetup", "--direct-io=on", loop], check=False, capture_output=True)  # where it can be
    try:
        run("mount", "-o", "noatime", loop, point)
        try:
            yield
        finally:
            run("umount", point)
    finally:
        run("losetup", "--detach", loop)


@contextmanager
def cgroup(controller: str) -> Iterator[Path]:
    """This process in a cgroup of its own, of version 1 or 2, below the one where it is."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    old = next((V1 / controller / path.lstrip("/") for _, which, path in lines if controller in which.split(",")), None)
    if old is None and V2.exists():
        old = V1
        (V1 / "cgroup.subtree_control").write_text(f"+{controller}")
    if old is None:
        raise BenchError(f"there is no cgroup controller {controller} here")
    home = V1 / lines[-1][2].lstrip("/") if V2.exists() else old
    made = old / f"xen9p-bench-{os.getpid()}"
    made.mkdir()
    try:
        (made / "cgroup.procs").write_text(str(os.getpid()))
        yield made
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        made.rmdir()


@contextmanager
def memory_of(size: int) -> Iterator[None]:
    """No more memory than that for this process, page cache included."""
    with cgroup("memory") as folder:
        name = "memory.max" if (folder / "memory.max").exists() else "memory.limit_in_bytes"
        (folder / name).write_text(str(size))
        yield


# A guest.


@dataclass
class Guest:
    """A client, and what the process that serves it has counted so far."""

    client: Client
    root: int
    ask: Callable[[], dict[str, Any]]


@contextmanager
def guest(
    tree: Path,
    context: Context | None = None,
    *,
    origin: Path | None = None,
    lead: float = 0.0,
    limits: Limits | None = None,
) -> Iterator[Guest]:
    """A guest of a tree, with a process that serves it and was there *lead* seconds before."""
    ring = MemoryRing(9)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        try:
            ours.close()
            served(tree, context, origin, limits, ring=ring, boss=theirs)
        finally:
            os._exit(0)
    theirs.close()

    def ask() -> dict[str, Any]:
        ours.send(b"?")
        found: dict[str, Any] = json.loads(ours.recv(1 << 20))
        return found

    try:
        time.sleep(lead)
        client, root = Client.connect(MemoryRingTransport(ring))
        try:
            yield Guest(client, root, ask)
        finally:
            client.close()
    finally:
        ours.close()
        os.waitpid(pid, 0)
        ring.close()


def served(
    tree: Path,
    context: Context | None,
    origin: Path | None,
    limits: Limits | None,
    *,
    ring: MemoryRing,
    boss: socket.socket,
) -> None:
    """What a worker does, until its boss hangs up."""
    there = os.open(origin, FOLDER) if origin else -1
    device = DataPlane(os.open(tree, FOLDER), False, limits, origin_fd=there)
    ring.serve_with(device)
    kept: list[Profile] = []
    runner = CacheRunner(device, Learned(context), Memory(), kept.append) if context else None
    if runner:
        runner.start()
    thread = threading.Thread(target=device.run, args=(serve,))
    thread.start()
    while boss.recv(1):
        answer: dict[str, Any] = dict(device.stats())
        answer["ahead"] = runner.report()["ahead_bytes"] if runner else 0
        answer["profile"] = kept[0].plain() if kept else None
        boss.send(json.dumps(answer).encode())
    if runner:
        runner.close()
    device.stop()
    thread.join()
    device.close()


def boot(one: Guest, order: list[bytes], think: float) -> float:
    """Seconds in which a guest finds and reads its files."""
    client = one.client
    began = time.perf_counter()
    for path in order:
        names = path.split(b"/")
        fid = client.walk(one.root, *names)
        size = client.getattr(fid).size
        client.lopen(fid)
        for at in range(0, size, 128 << 10):
            client.read(fid, at, 128 << 10)
        client.clunk(fid)
        time.sleep(think)
    return time.perf_counter() - began


# The parts.


class Bench:
    """The store and what is measured on it."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.given = given
        self.image, self.point = folder / "store.img", folder / "store"
        self.folder = folder
        dice = random.Random(9)
        self.order: list[bytes] = []
        with self.image.open("wb") as file:
            file.truncate((given.stream_mib + 8 * given.tree_mib + 1500) * MIB)
        run("mkfs.btrfs", "-q", self.image)
        with mounted(self.image, self.point):
            run("btrfs", "-q", "subvolume", "create", self.point / "golden")
            left = given.tree_mib * MIB
            while left > 0:
                # As a Debian root has them: nine of ten are small. Others lie between those that a boot reads.
                number = len(self.order)
                name = f"usr/{number % 23}/{number}"
                size = dice.randrange(2_000, 60_000) if number % 10 else dice.randrange(100_000, 800_000)
                for tree_name in (name, f"{name}.other"):
                    path = self.point / "golden" / tree_name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(dice.randbytes(size))
                self.order.append(name.encode())
                left -= size
            dice.shuffle(self.order)
            run("btrfs", "-q", "property", "set", self.point / "golden", "ro", "true")
            for number in range(given.clones):
                run("btrfs", "-q", "subvolume", "snapshot", self.point / "golden", self.point / f"g{number}")
            (self.point / "shared").mkdir()
            for name, mib in (("hot", given.hot_mib), ("stream", given.stream_mib)):
                with (self.point / "shared" / name).open("wb") as file:
                    for _ in range(mib):
                        file.write(dice.randbytes(MIB))

    @contextmanager
    def cold(self, *, disk: bool) -> Iterator[None]:
        """The store as it is after a start of the host: nothing in memory. disk: as slow as a hard disk."""
        with ExitStack() as stack:
            image = stack.enter_context(slow(self.image, self.folder / "slow")) if disk else self.image
            stack.enter_context(mounted(image, self.point))
            yield

    def one_boot(
        self, name: str, context: Context | None, *, origin: bool = False, lead: float = 0.0
    ) -> dict[str, Any]:
        """A boot of a tree."""
        tree = self.point / name
        there = lineage(tree)[1] if origin else None
        with guest(tree, context, origin=there, lead=lead) as one:
            seconds = boot(one, self.order, self.given.think)
            stats = one.ask()
        return {
            "seconds": round(seconds, 3),
            "misses": stats["read_misses"],
            "hits": stats["read_hits"],
            "shared": stats["shared_bytes"],
            "ahead": stats["ahead"],
        }

    def learn(self) -> Profile:
        """The profile of the image, from a boot."""
        with self.cold(disk=False), guest(self.point / "g0", Context(guest="g0", quiet=0.5)) as one:
            boot(one, self.order, 0.0)
            until = time.monotonic() + 20
            while time.monotonic() < until:
                if (kept := one.ask()["profile"]) is not None:
                    return parse(kept)
                time.sleep(0.05)
        raise BenchError("nothing was learned")

    def boots(self, profile: Profile, *, disk: bool) -> dict[str, list[dict[str, Any]]]:
        """All kinds of boots, in turns."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in BOOTS}
        for number in range(self.given.rounds):
            print(f"    boots, {'as a hard disk' if disk else 'as it is'}, round {number + 1}", flush=True)
            known, off = Context(profile=profile), Context(prefetch=False)
            with self.cold(disk=disk):
                found["first"].append(self.one_boot("g0", Context()))
            with self.cold(disk=disk):
                found["second"].append(self.one_boot("g1", known))
            with self.cold(disk=disk):
                found["lead"].append(self.one_boot("g1", known, lead=2.0))
            with self.cold(disk=disk):
                found["off"].append(self.one_boot("g1", off))
                found["warm"].append(self.one_boot("g1", off))
                found["warm-ahead"].append(self.one_boot("g1", known))
            with self.cold(disk=disk):
                self.one_boot("g0", off, origin=True)
                found["shared"].append(self.one_boot("g1", off, origin=True))
        return found

    def stream(self, length: int, looks: int) -> dict[str, Any]:
        """Hits of one guest's hot set, which it has read so many times, after another one has streamed a file.

        Args:
            length: from where on it is a stream; see Limits.
        """
        limits = Limits(stream_bytes=length)
        shared = self.point / "shared"
        with self.cold(disk=False), memory_of(self.given.memory_mib * MIB):  # noqa: SIM117
            with guest(shared, limits=limits) as one, guest(shared, limits=limits) as two:
                hot = one.client.walk(one.root, b"hot")
                one.client.lopen(hot)

                def look() -> int:
                    before = int(one.ask()["read_hits"])
                    # Backwards and with gaps, so that neither the kernel nor we take it for a stream.
                    for at in reversed(range(0, self.given.hot_mib * MIB, 64 << 10)):
                        one.client.read(hot, at, 4096)
                    return int(one.ask()["read_hits"]) - before

                with (self.point / "shared/hot").open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
                    while file.read(MIB):
                        pass
                hits = self.given.hot_mib * MIB // (64 << 10)
                for _ in range(looks):
                    hits = look()
                began = time.perf_counter()
                fid = two.client.walk(two.root, b"stream")
                two.client.lopen(fid)
                for at in range(0, self.given.stream_mib * MIB, 256 << 10):
                    two.client.read(fid, at, 256 << 10)
                seconds = time.perf_counter() - began
                two.client.clunk(fid)
                after = look()
                stats = two.ask()
        return {
            "hits_before": hits,
            "hits_after": after,
            "seconds": round(seconds, 2),
            "dropped": stats["dropped_bytes"],
            "spared": stats["spared_bytes"],
        }

    def copies(self) -> dict[str, int]:
        """Bytes of page cache that some guests' boots leave: clones, clones that share, and disk images."""
        trees = [self.point / f"g{number}" for number in range(self.given.clones)]
        found: dict[str, int] = {}
        for kind in ("clones", "sharing"):
            with self.cold(disk=False):
                for tree in trees:
                    origin = lineage(tree)[1] if kind == "sharing" else None
                    with guest(tree, origin=origin) as one:
                        boot(one, self.order, 0.0)
                found[kind] = sum(in_memory(tree) for tree in [*trees, self.point / "golden"])
        found |= self.images()
        return found

    def images(self) -> dict[str, int]:
        """The same on ext4 in files of the store: in dom0, and in the guests, whose mounts stand for them."""
        with self.cold(disk=False):
            first = self.point / "golden.ext4"
            size = f"{4 * self.given.tree_mib + 60}M"
            run("mke2fs", "-q", "-t", "ext4", "-d", self.point / "golden", first, size)
            for number in range(self.given.clones):
                run("cp", "--reflink=always", first, self.point / f"g{number}.ext4")
            run("sync", "-f", self.point)
        with self.cold(disk=False), ExitStack() as stack:
            points = []
            for number in range(self.given.clones):
                point = self.folder / f"guest{number}"
                point.mkdir()
                # Not direct: that is how a loop device under blkback is by default.
                image = self.point / f"g{number}.ext4"
                loop = run("losetup", "--find", "--show", image).strip()
                stack.callback(run, "losetup", "--detach", loop)
                run("mount", "-o", "noatime,ro,noload", loop, point)
                stack.callback(run, "umount", point)
                points.append(point)
            for point in points:
                for path in self.order:
                    (point / path.decode()).read_bytes()
            host = 0
            for number in range(self.given.clones):
                with (self.point / f"g{number}.ext4").open("rb") as file:
                    host += page_cache.resident(file.fileno(), os.fstat(file.fileno()).st_size)
            return {"images_host": host, "images_guests": sum(in_memory(point) for point in points)}


def in_memory(tree: Path) -> int:
    """Bytes of a tree in the page cache."""
    return sum(one.resident for one in page_cache.walk(tree, page_cache.Count(), lambda _: None))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    with tempfile.TemporaryDirectory("", "xen9p-cache-", given.folder, ignore_cleanup_errors=True) as temporary:
        print("    the store", flush=True)
        bench = Bench(Path(temporary), given)
        profile = bench.learn()
        found: dict[str, Any] = {"profile": {"files": len(profile.files), "bytes": profile.bytes}, "boots": {}}
        for name, disk in (("disk", True), ("plain", False)):
            found["boots"][name] = bench.boots(profile, disk=disk)
        found["streams"] = {}
        for looks, often in ((0, "once"), (3, "often")):
            for name, length in (("with", Limits().stream_bytes), ("without", 0)):
                print(f"    a stream {name} dropping behind, a hot set that was read {often}", flush=True)
                found["streams"][f"{often}-{name}"] = bench.stream(length, looks)
        print("    copies", flush=True)
        found["copies"] = bench.copies()
        found["files"] = len(bench.order)
        return found


def median(rows: list[dict[str, Any]]) -> float:
    """Of the seconds."""
    return float(statistics.median(row["seconds"] for row in rows))


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project has set itself, and what came of it."""
    disk = found["boots"]["disk"]
    said = []
    for kind, what in (("second", "from its attach on"), ("lead", "with a lead of 2 s")):
        faster = median(disk["first"]) / median(disk[kind])
        text = f"second boot at least 1.5 times faster on a hard disk, {what}"
        said.append({"text": text, "value": faster, "held": faster >= 1.5})
    for name, boots in found["boots"].items():
        slower = median(boots["warm-ahead"]) / median(boots["warm"])
        text = f"no slower with all in memory ({'hard disk' if name == 'disk' else 'disk as it is'}), within 5 %"
        said.append({"text": text, "value": slower, "held": slower <= 1.05})
    plain = found["boots"]["plain"]
    slower = median(plain["second"]) / median(plain["off"])
    said.append({"text": "no slower with the disk as it is, within 5 %", "value": slower, "held": slower <= 1.05})
    for often in ("once", "often"):
        stream = found["streams"][f"{often}-with"]
        kept = stream["hits_after"] / stream["hits_before"]
        text = f"a stream leaves 90 % of the hits of what another guest has read {often}"
        said.append({"text": text, "value": kept, "held": kept >= 0.9})
    return said


def page(run_: dict[str, Any]) -> str:
    """The page of the documentation, in Markdown."""
    sizes, copies = run_["sizes"], run_["copies"]
    text = [
        "# Caching on the host",
        "",
        "<!-- Written by tools/bench_cache.py (`make bench-cache`): changes are lost. -->",
        "",
        f"Measured {run_['date']} on a btrfs in a file, without Xen; Linux {run_['kernel']},",
        f"{run_['processors']} processors. A tree of {run_['files']} files and {sizes['tree_mib']} MiB, read in a",
        f"fixed order with {1000 * sizes['think']:g} ms of waiting after each. *Hard disk*: one request after the",
        "other, 8 ms for a way of over 1 MiB, 2 ms for a shorter one, 120 MiB a second (`tools/slow_disk.py`).",
        f"Median of {sizes['rounds']} rounds, all kinds in turns.",
        "",
        "![Seconds of a boot](cache.svg)",
        "",
        "| boot | hard disk: s | misses | disk as it is: s | misses |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, label in BOOTS.items():
        cells = []
        for kind in ("disk", "plain"):
            rows = run_["boots"][kind][name]
            cells += [f"{median(rows):.2f}", f"{statistics.median(row['misses'] for row in rows):.0f}"]
        text.append(f"| {label} | {' | '.join(cells)} |")
    text += [
        "",
        f"The profile has {run_['profile']['files']} files and {run_['profile']['bytes'] / MIB:.1f} MiB. A miss is a",
        "`Tread` of which the page cache had not all: while a file is being read ahead of, its reads still wait for",
        "the disk, but not as long.",
        "",
        "## A stream beside a hot set",
        "",
        f"{sizes['memory_mib']} MiB of memory (a cgroup's). One guest has {sizes['hot_mib']} MiB in use, another",
        f"reads a file of {sizes['stream_mib']} MiB from begin to end; then the first one reads its own again.",
        "",
        "| in use | streams | hits before | hits after | dropped | stream: s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, one in run_["streams"].items():
        often, _, how = name.partition("-")
        label = f"read {often} | {'recognised' if how == 'with' else 'switched off'}"
        dropped = f"{one['dropped'] / MIB:.0f} MiB"
        text.append(f"| {label} | {one['hits_before']} | {one['hits_after']} | {dropped} | {one['seconds']:.2f} |")
    text += [
        "",
        f"## Memory for {sizes['clones']} guests of one image",
        "",
        "Page cache after each has booted, in MiB; guests on disk images are mounts on this machine.",
        "",
        "| how | dom0 | the guests' own, for the same files |",
        "| --- | ---: | ---: |",
        f"| clones, each with its own pages | {copies['clones'] / MIB:.1f} | as they cache |",
        f"| clones that share their origin's | {copies['sharing'] / MIB:.1f} | as they cache |",
        f"| ext4 images on loop devices | {copies['images_host'] / MIB:.1f} | {copies['images_guests'] / MIB:.1f} |",
        "",
        "## Bars",
        "",
        "| bar | measured | |",
        "| --- | ---: | --- |",
    ]
    text += [
        f"| {bar['text']} | {bar['value']:.2f} | {'held' if bar['held'] else '**missed**'} |" for bar in run_["bars"]
    ]
    return "\n".join([*text, ""])


def chart(run_: dict[str, Any]) -> str:
    """The boots as bars, in SVG."""
    groups = []
    for name, label in BOOTS.items():
        both = [(css, median(run_["boots"][kind][name])) for kind, css in (("disk", "ours"), ("plain", "fuse"))]
        short = label if len(label) < 48 else f"{label[:46]}…"
        groups.append((short, [(css, seconds, f"{seconds:.2f}") for css, seconds in both]))
    title = "Seconds of a boot, on a hard disk (dark) and with the disk as it is"
    return bars_chart(title, groups, left=330, room=70, top=44, bar=20)


def missing() -> str:
    """What keeps this from being run here, in words."""
    if problem := bench_store.missing("bench-cache"):
        return problem
    if subprocess.run(["/usr/bin/python3", "-c", "import pyfuse3"], check=False, capture_output=True).returncode:
        return "Debian's pyfuse3 is missing: apt-get install python3-pyfuse3"
    return ""


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default, what in (
        ("rounds", 3, "rounds of boots"),
        ("tree-mib", 26, "what a boot reads"),
        ("clones", 4, "guests of the image"),
        ("memory-mib", 256, "memory beside the stream"),
        ("hot-mib", 64, "the hot set"),
        ("stream-mib", 1024, "the stream: 4 times the memory"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default: %(default)s")
    parser.add_argument("--think", type=float, default=0.005, metavar="S", help="after each file; default: %(default)s")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the store is while it runs; some GiB, sparse")
    parser.add_argument("--results", type=Path, default=ROOT / ".lab/cache.json", metavar="FILE.json")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write the documentation's page and chart, too")
    given = parser.parse_args()
    sizes: dict[str, Any] = {
        n: getattr(given, n) for n in ("rounds", "tree_mib", "clones", "memory_mib", "hot_mib", "stream_mib")
    }
    problem = missing()
    if not problem and (given.clones < 2 or min(sizes.values()) < 1 or not 0 <= given.think <= 1):
        problem = "--clones is 2 or more, --think from 0 to 1, and the others are 1 or more"
    if problem:
        print(f"bench_cache: {problem}", file=sys.stderr)
        return 1
    try:
        found = measure(given)
    except (BenchError, OSError) as error:
        print(f"bench_cache: {error}", file=sys.stderr)
        return 1
    result = {"sizes": sizes | {"think": given.think}, **found, "bars": bars(found)}
    bench_store.publish("cache", given, result, page, chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
