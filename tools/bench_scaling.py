"""Measure what a request costs as open fids, entries of a directory and idle devices grow, on rings in memory.

No Xen is needed; the built data plane and root (for many descriptors) are; playbooks/bench-scaling.yml runs it in dom0,
where 100,000 files may be open. Each point is a server in a process of its
own that another process asks; the points take turns, round by round. Writes .lab/scaling.json, and with --docs the page
and the charts of the documentation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "xen9p-src" / "src"))

import bench_stats
from bench_chart import lines as line_chart
from xen9p import codec, server, worker
from xen9p.client import Client
from xen9p.dataplane import DataPlane, Limits
from xen9p.transport.memory import MemoryRing, MemoryRingTransport

ROOT = Path(__file__).resolve().parents[1]
FIDS = (10, 100, 1000, 10_000, 100_000)
ENTRIES = (10, 100, 1000, 10_000, 100_000)
DEVICES = (1, 10, 50, 200)
BURST, WINDOW = 20, 16
"""So many times so many requests at once are timed together."""
PACE = 0.03
"""Seconds of the same before that: a reader that has been disturbed looks for work again after 20 ms only."""
OPERATIONS = {"read": "Tread of 4 KiB", "walk": "Twalk and Tclunk", "getattr": "Tgetattr"}
SCALES = {"fids": "open fids", "entries": "entries of the directory", "devices": "devices, all but one idle"}
SPARE_FDS = 512


class Zygote:
    """Forks servers, as xen9pd's does: itself it never changes, so what a server has for itself alone is its own."""

    def __init__(self, most: int) -> None:
        self.rings = [MemoryRing() for _ in range(most)]
        self._free = list(range(most))
        self._asked, self._answered = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)
                self._fork_servers()
            finally:
                os._exit(0)

    def _fork_servers(self) -> None:
        os.close(self._asked[1])
        with os.fdopen(self._asked[0]) as asked:
            for line in asked:
                number, fids, folder = line.rstrip("\n").split(" ", 2)
                pid = os.fork()
                if pid == 0:
                    device = DataPlane(os.open(folder, os.O_RDONLY), False, Limits(max_fids=int(fids), spin_us=200))
                    self.rings[int(number)].serve_with(device)
                    device.run(server.serve)
                    os._exit(0)
                os.write(self._answered[1], b"%d\n" % pid)

    def start(self, folder: Path, fids: int) -> tuple[int, int]:
        """A server of *folder* that takes up to *fids* fids: its pid, and which ring is its."""
        number = self._free.pop(0)
        os.write(self._asked[1], f"{number} {fids} {folder}\n".encode())
        return int(os.read(self._answered[0], 20)), number

    def close(self) -> None:
        """End it; its servers have been ended before."""
        os.close(self._asked[1])
        os.waitpid(self.pid, 0)


@dataclass
class Server:
    """A process that serves one directory over a ring in memory, and the client that asks it."""

    pid: int
    client: Client
    root: int
    file: int = 0

    @classmethod
    def start(cls, zygote: Zygote, folder: Path, fids: int = 1024) -> Server:
        """Start a server of *folder* that takes up to *fids* fids."""
        pid, number = zygote.start(folder, fids)
        client, root = Client.connect(MemoryRingTransport(zygote.rings[number]))
        return cls(pid, client, root)

    def stop(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)

    def kib(self) -> int:
        """Memory that is this process's alone."""
        rows = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(row.split()[1]) for row in rows if row.startswith(("Private_Clean:", "Private_Dirty:")))

    def cpu(self) -> float:
        """Seconds of processor time that its threads have had."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def serving(zygote: Zygote, folder: Path, fids: int = 1024) -> Iterator[Server]:
    """A server for as long as it is wanted."""
    one = Server.start(zygote, folder, fids)
    try:
        yield one
    finally:
        one.stop()


def ask(one: Server, names: list[bytes]) -> dict[str, Callable[[], object]]:
    """The operations, each WINDOW times at once; *names* are what is walked to, in turn.

    Many at once, so that neither side falls asleep: what is measured is a request's cost and not that of waking up.
    """
    reads = encoded(codec.Tread(one.file, 0, 4096) for _ in range(WINDOW))
    attributes = encoded(codec.Tgetattr(one.file, codec.GETATTR_BASIC) for _ in range(WINDOW))
    fresh = range(1 << 20, (1 << 20) + WINDOW)
    clunks = encoded(codec.Tclunk(fid) for fid in fresh)
    walks = [
        encoded(codec.Twalk(one.root, fid, (names[(start + fid) % len(names)],)) for fid in fresh)
        for start in range(0, max(1, len(names) - WINDOW), WINDOW)
    ]
    turn = [0]

    def walk() -> None:
        turn[0] = (turn[0] + 1) % len(walks)
        exchange(one, walks[turn[0]])
        exchange(one, clunks)

    return {"read": lambda: exchange(one, reads), "walk": walk, "getattr": lambda: exchange(one, attributes)}


def encoded(messages: Iterable[codec.Message]) -> list[bytes]:
    """The messages, each with a tag of its own."""
    return [codec.encode(message, tag) for tag, message in enumerate(messages)]


def exchange(one: Server, messages: list[bytes]) -> None:
    """Send all, then take all replies."""
    for data in messages:
        one.client.send_raw(data)
    for _ in messages:
        reply = one.client.recv_raw()
        if reply[4] != messages[0][4] + 1:
            raise SystemExit(f"error: a message of type {messages[0][4]} was answered by {codec.decode(reply)[1]}")


def timed(operation: Callable[[], object]) -> float:
    """Microseconds of one of the WINDOW operations, once server and client have found into the pace of it."""
    until = time.perf_counter() + PACE
    while time.perf_counter() < until:
        operation()
    began = time.perf_counter()
    for _ in range(BURST):
        operation()
    return (time.perf_counter() - began) / (BURST * WINDOW) * 1e6


def opened(one: Server) -> None:
    """Give the server the file that is read."""
    one.file = one.client.walk(one.root, b"data")
    one.client.lopen(one.file)


def folder_of(parent: Path, entries: int) -> Path:
    """A directory with so many entries, one of them the file that is read."""
    folder = parent / f"entries-{entries}"
    folder.mkdir()
    (folder / "data").write_bytes(bytes(65536))
    for number in range(entries - 1):
        os.close(os.open(folder / f"f{number}", os.O_CREAT | os.O_WRONLY, 0o644))
    return folder


def names_of(entries: int) -> list[bytes]:
    """Some names of such a directory, spread over it."""
    step = max(1, (entries - 1) // 64)
    return [b"f%d" % number for number in range(0, entries - 1, step)] or [b"data"]


def take_turns(points: dict[int, dict[str, Callable[[], object]]], rounds: int, what: str) -> list[dict[str, Any]]:
    """Time all operations of all points, round by round; every other round goes backwards."""
    samples = []
    for operations in points.values():
        for operation in operations.values():
            timed(operation)
    said = time.monotonic()
    for number in range(rounds):
        for size, operations in list(points.items())[:: 1 if number % 2 == 0 else -1]:
            for name, operation in operations.items():
                samples.append({"size": size, "operation": name, "round": number, "us": round(timed(operation), 3)})
        if time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"    {SCALES[what]}: round {number + 1} of {rounds}", flush=True)
    return samples


def scale_fids(zygote: Zygote, folder: Path, sizes: list[int], rounds: int) -> dict[str, Any]:
    """One server a size, with so many fids open beside those that are used."""
    with ExitStack() as stack:
        servers = {}
        for size in sizes:
            print(f"    {size} fids", flush=True)
            one = stack.enter_context(serving(zygote, folder, size + SPARE_FDS))
            opened(one)
            before = one.kib()
            for _ in range(size):
                one.client.walk(one.root, b"f1")
            servers[size] = (one, before)
        points = {size: ask(one, names_of(len(os.listdir(folder)))) for size, (one, _) in servers.items()}
        samples = take_turns(points, rounds, "fids")
        memory = [{"size": size, "kib": one.kib() - before} for size, (one, before) in servers.items()]
    return {"samples": samples, "memory": memory}


def scale_entries(zygote: Zygote, parent: Path, sizes: list[int], rounds: int) -> dict[str, Any]:
    """One server a size of directory; it lists the whole of it once, too, and what that leaves in its memory counts."""
    with ExitStack() as stack:
        points, memory = {}, []
        for size in sizes:
            print(f"    a directory of {size}", flush=True)
            one = stack.enter_context(serving(zygote, folder_of(parent, size)))
            opened(one)
            timed(ask(one, names_of(size))["walk"])
            one.client.mkdir(one.root, b"small", 0o755)
            for _ in range(20):
                one.client.listdir(one.root, b"small")
            os.rmdir(parent / f"entries-{size}" / "small")
            before, began = one.kib(), time.perf_counter()
            listed = len(one.client.listdir(one.root, b""))
            spent = time.perf_counter() - began
            if listed != size:
                raise SystemExit(f"error: a directory of {size} entries lists {listed}")
            memory.append({"size": size, "kib": one.kib() - before, "us_an_entry": round(spent / size * 1e6, 3)})
            points[size] = ask(one, names_of(size))
        return {"samples": take_turns(points, rounds, "entries"), "memory": memory}


def scale_devices(zygote: Zygote, folder: Path, sizes: list[int], rounds: int) -> dict[str, Any]:
    """One busy device, and more and more that wait, and then fewer again: each a process, as workers are."""
    samples: list[dict[str, Any]] = []
    kib: dict[int, int] = {}
    cpu: dict[int, float] = dict.fromkeys(sizes, 0.0)
    idle: list[Server] = []
    with serving(zygote, folder) as busy:
        opened(busy)
        operations = ask(busy, names_of(len(os.listdir(folder))))
        try:
            for way in (sizes, sizes[::-1]):
                for size in way:
                    print(f"    {size} devices", flush=True)
                    while len(idle) < size - 1:
                        idle.append(Server.start(zygote, folder))
                    while len(idle) > size - 1:
                        idle.pop().stop()
                    time.sleep(1)
                    before = sum(one.cpu() for one in idle)
                    samples += take_turns({size: operations}, (rounds + 1) // 2, "devices")
                    cpu[size] += sum(one.cpu() for one in idle) - before
                    kib[size] = round(statistics.median(one.kib() for one in idle)) if idle else 0
        finally:
            for one in idle:
                one.stop()
    memory = [{"size": size, "kib_each": kib[size], "idle_cpu": round(cpu[size], 4)} for size in sizes]
    return {"samples": samples, "memory": memory}


def allow_files(wanted: int) -> int:
    """Raise the limit of open files; how many fids are possible."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted + 2 * SPARE_FDS
    if hard < need:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (need, need))
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(need, hard), hard))
    return min(need, hard) - 2 * SPARE_FDS


def place() -> str:
    """Where this runs, in words (/sys/hypervisor: Documentation/ABI/stable/sysfs-hypervisor-xen)."""
    kind = Path("/sys/hypervisor/type")
    return "in dom0 of a Xen host" if kind.exists() and kind.read_text().strip() == "xen" else "without Xen"


def points_of(run: dict[str, Any], scale: str) -> dict[str, dict[int, bench_stats.Spread]]:
    """Operation -> size -> spread of microseconds."""
    found: dict[str, dict[int, list[float]]] = {}
    for sample in run[scale]["samples"]:
        found.setdefault(sample["operation"], {}).setdefault(sample["size"], []).append(sample["us"])
    return {name: {size: bench_stats.spread(us) for size, us in sizes.items()} for name, sizes in found.items()}


def page(run: dict[str, Any]) -> str:
    """The page of the documentation, in Markdown."""
    text = [
        "# What grows, and what does not",
        "",
        "<!-- Written by tools/bench_scaling.py (`make bench-scaling`): changes are lost. -->",
        "",
        f"Measured {run['date']} on rings in memory, {run['where']}; Linux {run['kernel']}, {run['processors']}",
        f"processors. Microseconds of a request with {WINDOW} under way, the client's own work (in Python) included:",
        f"the median of {run['rounds']} rounds of {BURST * WINDOW} requests, and the middle half of the rounds.",
    ]
    for scale, title in SCALES.items():
        found = points_of(run, scale)
        text += ["", f"## By {title}", "", f"![Microseconds by {title}](scaling-{scale}.svg)", ""]
        memory = {item["size"]: item for item in run[scale]["memory"]}
        keys = [key for key in next(iter(memory.values())) if key != "size"]
        text += [
            f"| {title} | {' | '.join([*(OPERATIONS[name] for name in found), *(COLUMNS[key] for key in keys)])} |"
        ]
        text += [f"| ---: |{' ---: |' * (len(found) + len(keys))}"]
        for size in memory:
            cells = [f"{one[size].median:.2f} ({one[size].q1:.2f} to {one[size].q3:.2f})" for one in found.values()]
            text.append(f"| {size:,} | {' | '.join([*cells, *(f'{memory[size][key]:,}' for key in keys)])} |")
        text += ["", *(f"- {line}" for line in growth(found))]
        if scale == "fids" and run.get("limit"):
            text.append(f"- Up to 100,000 are measured where so many files may be open; here it was {run['limit']:,}.")
    return "\n".join([*text, ""])


COLUMNS = {
    "kib": "memory that it took, KiB",
    "us_an_entry": "listing, µs an entry",
    "kib_each": "memory of an idle one, KiB",
    "idle_cpu": "processor time of all idle ones meanwhile, s",
}


def growth(found: dict[str, dict[int, bench_stats.Spread]]) -> list[str]:
    """What becomes of each operation from the smallest to the largest size."""
    said = []
    for name, sizes in found.items():
        first, last = min(sizes), max(sizes)
        times = sizes[last].median / sizes[first].median
        said.append(f"{OPERATIONS[name]}: {times:.2f} times as long with {last:,} as with {first:,}.")
    return said


def charts(run: dict[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    drawn = {}
    for scale, title in SCALES.items():
        series = {
            OPERATIONS[name]: [(size, spread.median) for size, spread in sizes.items()]
            for name, sizes in points_of(run, scale).items()
        }
        drawn[f"scaling-{scale}.svg"] = line_chart(f"Microseconds a request, by {title}", series)
    return drawn


def say(run: dict[str, Any], docs: Path | None) -> None:
    """Print how everything grows; with *docs* write the page and the charts."""
    for scale, title in SCALES.items():
        print(f"{title}:", *growth(points_of(run, scale)), sep="\n  ")
    if docs:
        docs.mkdir(parents=True, exist_ok=True)
        for name, text in ({"scaling.md": page(run)} | charts(run)).items():
            (docs / name).write_text(text)


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21, metavar="N", help="how often; default: %(default)s")
    parser.add_argument("--most", type=int, default=FIDS[-1], metavar="N", help="of fids and entries")
    parser.add_argument("--results", type=Path, default=ROOT / ".lab/scaling.json", metavar="FILE.json")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write the documentation's page and charts, too")
    parser.add_argument(
        "--show", type=Path, metavar="FILE.json", help="measure nothing: say what an earlier run has found"
    )
    given = parser.parse_args()
    if given.show:
        try:
            say(json.loads(given.show.read_text()), given.docs)
        except (OSError, ValueError, KeyError) as error:
            print(f"bench_scaling: {given.show} is no result of bench_scaling: {error}", file=sys.stderr)
            return 1
        return 0
    if given.rounds < 1 or given.most < FIDS[0]:
        print(f"bench_scaling: --rounds is 1 or more, and --most {FIDS[0]} or more", file=sys.stderr)
        return 1
    possible = allow_files(given.most)
    fids = [size for size in FIDS if size <= min(possible, given.most)]
    if not fids:
        print("bench_scaling: too few open files are allowed: raise it with ulimit -n", file=sys.stderr)
        return 1
    limit = 0
    if possible < given.most:
        if (most := possible // 1000 * 1000) > fids[-1]:
            fids.append(most)
        limit = fids[-1]
        print(f"no more open files are allowed here: up to {limit} fids are measured")
        print(f"for {given.most}: ulimit -n {given.most + 2 * SPARE_FDS}, by root with CAP_SYS_RESOURCE")
    worker.prepare_process()
    run: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "where": place(),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "rounds": given.rounds,
        "limit": limit,
    }
    zygote = Zygote(len(FIDS) + 1 + len(ENTRIES) + 2 * DEVICES[-1])
    with tempfile.TemporaryDirectory(prefix="xen9p-scaling-") as temporary:
        parent = Path(temporary)
        (parent / "plain").mkdir()
        plain = folder_of(parent / "plain", 1000)
        run["fids"] = scale_fids(zygote, plain, fids, given.rounds)
        run["entries"] = scale_entries(zygote, parent, [size for size in ENTRIES if size <= given.most], given.rounds)
        run["devices"] = scale_devices(zygote, plain, [size for size in DEVICES if size <= given.most], given.rounds)
    zygote.close()
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(run, indent=1) + "\n")
    say(run, given.docs)
    print(f"all samples: {given.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
