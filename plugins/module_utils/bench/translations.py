"""Translations, counted: the same work through every side in turn, and what it takes in guest, dom0 and Xen.

As in the full benchmark there is one guest in which all sides are mounted, and dom0 leads. The agent in the guest
(counting.py) rests before and marks what it does, so that the ssh connection and the meters themselves are not counted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import content, cost, counted, full, meters, tracefs, xentrace
from .host import BenchError, domains, drop_caches, run
from .plan import order
from .settings import FULL, Settings
from .sides import DISK, Side, backends, chosen

PROGRAM = "/root/counting.py"
PROGRAMS = ("agent.py", "workloads.py", "counting.py", "tracefs.py", "meters.py")
# Seconds that the guest rests before it works: ssh has answered, and what was put off is done.
REST = 0.5
# Where in its file the byte of the example is, and how much of it is compared.
OFFSET, BYTES = 8192, 64
_LINE = re.compile(
    r'^xen9p_(?P<name>\w+)\{guest="(?P<guest>[^"]*)",tag="(?P<tag>[^"]*)",(?P<more>.*)\} (?P<value>\S+)$'
)
_TYPE = re.compile(r'\btype="(\w+)"')


@dataclass(frozen=True)
class Workload:
    """A piece of work that the agent knows. *cold*: with the page caches of guest and dom0 emptied before."""

    name: str
    what: str
    cold: bool = False


IDLE = "idle"
WORKLOADS = (
    Workload(IDLE, "nothing, for a second"),
    Workload("read-4k-cold", "open, read of 4 KiB, close; cold", cold=True),
    Workload("read-4k-warm", "read of 4 KiB, warm"),
    Workload("read-seq", "sequential read of 4 MiB, 64 KiB a time; cold", cold=True),
    Workload("write-seq", "sequential write of 4 MiB, 64 KiB a time, then fsync"),
    Workload("create", "create a file of 5 bytes; sync at the end"),
    Workload("stat", "stat of a file that was looked at before"),
    Workload("find", "find in a tree: names and attributes; cold", cold=True),
    Workload("list", "ls -l of a directory of 1,000, an entry"),
    Workload("mmap-read", "mapping read page by page; cold", cold=True),
)


def wanted(given: Settings) -> list[Workload]:
    """The workloads of this run, the idle second first.

    Raises:
        BenchError: one is unknown.
    """
    known = [work.name for work in WORKLOADS]
    if unknown := sorted(set(given.groups) - set(known)):
        raise BenchError(f"translations_workloads has {', '.join(unknown)}, which is none of {', '.join(known)}")
    return [work for work in WORKLOADS if not given.groups or work.name in {IDLE, *given.groups}]


def add(given: Settings) -> None:
    """Add to the guest's tree what it needs, and make the sides' files; for trees.prepare()."""
    wanted(given)  # refuses what does not exist before minutes have gone by
    content.make(given)
    content.install_client(given, given.seed)


def start(given: Settings, programs: Mapping[str, str]) -> dict[str, Any]:
    """Start the guest and mount every side; the mounts, and how soon each worker was ready."""
    full.bring_watcher(given, programs)
    told = full.bring_up(given, {name: programs[name] for name in PROGRAMS})
    domain = domains()[FULL]
    bounced = {side.name: _bounced(side, domain) for side in chosen(given) if side.how == DISK}
    works = wanted(given)
    names = [work.name for work in works]  # in their order; a dictionary may lose it on its way through Ansible
    return told | {"names": names, "workloads": {work.name: work.what for work in works}, "bounced": bounced}


def _bounced(side: Side, domain: int) -> bool:
    """Whether blkfront copies what it reads and writes: both ends keep grants, or it does not trust the backend."""
    kind = "vbd" if side.served == "blkback" else "qdisk"
    nodes = [
        f"/local/domain/{domain}/device/vbd/{_devid(side)}",
        f"/local/domain/0/backend/{kind}/{domain}/{_devid(side)}",
    ]
    kept = all(_node(f"{node}/feature-persistent") == "1" for node in nodes)
    return kept or _node(f"{nodes[1]}/trusted") == "0"


def _node(path: str) -> str:
    """A XenStore node's value, "" if there is none."""
    return subprocess.run(["xenstore-read", path], capture_output=True, text=True, check=False).stdout.strip()


def stop(given: Settings) -> bool:
    """Remove what is traced in dom0; whether there was anything."""
    scratch = given.run / "tracing"
    if not (tracefs.USUAL / "instances").is_dir() and not (scratch / "instances").is_dir():
        return False
    with tracefs.mounted(scratch) as tracing:
        return tracefs.remove(tracing)


def measure(given: Settings, name: str, number: int) -> dict[str, Any]:
    """Have one piece of work done on every side, in turn, as round *number*; what was counted."""
    every = wanted(given)
    index, work = next((place, work) for place, work in enumerate(every) if work.name == name)
    with ExitStack() as stack:
        tracing = stack.enter_context(tracefs.mounted(given.run / "tracing"))
        counting = tracefs.Counting(tracing, counted.DOM0_EVENTS)
        stack.callback(counting.close)
        counting.open()
        agent = stack.enter_context(_agent(given))
        missing = agent.ask({"do": "open", "events": [event.as_dict() for event in counted.GUEST_EVENTS]})["missing"]
        lacking = {f"dom0 {event}": f"in dom0, {why}" for event, why in counting.missing.items()}
        lacking |= {f"guest {event}": f"in the guest, {why}" for event, why in missing.items()}
        one = _Counter(given, counting, agent, lacking)
        # Nothing is the same on every side.
        taking = chosen(given)[:1] if name == IDLE else order(chosen(given), number, index)
        found = [{"round": number, "workload": name, "side": side.name} | one.count(side, work) for side in taking]
        agent.ask({"do": "close"})
    return {"counts": found, "missing": lacking}


@contextmanager
def _agent(given: Settings) -> Iterator[full.Agent]:
    agent = full.Agent(given, PROGRAM)
    try:
        yield agent
    finally:
        agent.close()


class _Counter:
    """Counts one piece of work on one side at a time."""

    def __init__(
        self, given: Settings, counting: tracefs.Counting, agent: full.Agent, missing: Mapping[str, str]
    ) -> None:
        self._given, self._counting, self._agent, self._missing = given, counting, agent, missing
        self._domain = domains()[FULL]
        self._serving = backends(given)
        self._store = _store(Path("/proc/mounts").read_text(), given.store)
        self._file = given.run / "xentrace"

    def count(self, side: Side, work: Workload) -> dict[str, Any]:
        """Have it done; the figures, the steps, and what both need to be understood."""
        pids = self._serving[side.name]
        run("sync")  # what an earlier count has put off is not this one's
        if work.cold:
            self._agent.ask({"do": "drop"})
            drop_caches()
        request = {"do": "prepare", "work": work.name, "place": side.place, "device": side.device}
        if failed := self._agent.ask(request)["failed"]:
            self._agent.ask({"do": "finish"})
            return {"operations": 0, "failed": failed, "counts": {}, "checks": {}, "left_out": {}, "steps": []}
        worker, blkback = _worker(side), _blkback(side, self._domain)
        threads, kernel = meters.threads(pids), meters.kernel_threads()
        irqs = meters.interrupts(Path("/proc/interrupts").read_text())
        why = ""
        with ExitStack() as stack:
            try:
                stack.enter_context(xentrace.recording(self._file))
            except xentrace.XenTraceError as error:
                why = str(error)
            self._counting.clear()
            own, spent = meters.own_switches(pids), sum(map(cost.process, pids))
            answer = self._agent.ask({"do": "count", "rest": REST})
            spent, own = sum(map(cost.process, pids)) - spent, meters.own_switches(pids) - own
            rows = self._counting.read()
        threads |= meters.threads(pids)
        calls: Sequence[xentrace.Call] | str = why
        if not why:
            try:
                calls = xentrace.between_marks(xentrace.analysed(self._file), self._domain)
            except xentrace.XenTraceError as error:
                calls = str(error)
        self._file.unlink(missing_ok=True)
        messages, moved = _since(side, worker, _worker(side))
        taken = {name: count - blkback[name] for name, count in _blkback(side, self._domain).items()}
        came = _came(irqs, meters.interrupts(Path("/proc/interrupts").read_text()))
        self._agent.ask({"do": "finish"})  # what it takes away is not counted
        raw = counted.Raw(
            guest_rows=answer["rows"],
            dom0_rows=rows,
            guest_irqs={number: (name, count) for number, (name, count) in answer["interrupts"].items()},
            dom0_irqs=came,
            guest_switches=answer["switches"],
            own_switches=own,
            backend_seconds=spent,
            threads=frozenset(threads),
            kernel=frozenset(kernel | meters.kernel_threads()),
            disk=counted.kernel_number(*answer["disk"]) if side.device else -1,
            loop=_loop(side, self._domain),
            store=self._store,
            domain=self._domain,
            messages=messages,
            file_bytes=moved,
            blkback=taken,
            calls=calls,
            missing=self._missing,
        )
        found = counted.figures(side, raw)
        kinds = {}
        if not isinstance(calls, str):
            kinds = {"guest": xentrace.by_name(calls, self._domain), "dom0": xentrace.by_name(calls, 0)}
            kinds["grants"] = xentrace.grants(calls, 0)
        return {
            "operations": answer["operations"],
            "bytes": answer["bytes"],
            "seconds": answer["seconds"],
            "failed": answer["failed"],
            "counts": found.counts,
            "checks": found.checks,
            "left_out": found.left_out,
            "steps": counted.steps(side, raw),
            "hypercalls": kinds,
            "messages": messages,
            "disk_done": answer["disk_done"],
        }


def _came(before: Mapping[str, tuple[str, int]], after: Mapping[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    return {number: (name, count - before.get(number, (name, 0))[1]) for number, (name, count) in after.items()}


def _store(mounts: str, store: str) -> int:
    """The number of the device that the store is on."""
    for line in mounts.splitlines():
        source, place, *_ = line.split()
        if place == store and source.startswith("/"):
            number = os.stat(source).st_rdev
            return counted.kernel_number(os.major(number), os.minor(number))
    raise BenchError(f"{store} is no file system of its own: what goes to its disk cannot be told from the rest")


def _worker(side: Side) -> str:
    """What the worker of a side has counted so far, as Prometheus reads it; nothing for a side without one."""
    return run("xen9p", "metrics") if side.served == "xen9p" else ""


def _since(side: Side, before: str, after: str) -> tuple[dict[str, int], int]:
    """Message type -> how many came between two readings of the metrics, and bytes of file data moved."""
    counts = [counters(text, side.name) for text in (before, after)]
    came = {name: count - counts[0].get(name, 0) for name, count in counts[1].items()}
    moved = sum(came.pop(name, 0) for name in ("read_bytes", "written_bytes"))
    return {name: count for name, count in came.items() if count}, moved


def counters(text: str, tag: str) -> dict[str, int]:
    """Message type -> how many the worker of the benchmark's guest has seen, and the bytes that it has moved."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        if not (match := _LINE.match(line)) or (match["guest"], match["tag"]) != (FULL, tag):
            continue
        name = match["name"].removesuffix("_total")
        if name == "operations" and (kind := _TYPE.search(match["more"])):
            found[kind[1]] = int(float(match["value"]))
        elif name in {"read_bytes", "written_bytes"}:
            found[name] = int(float(match["value"]))
    return found


def _blkback(side: Side, domain: int) -> dict[str, int]:
    """What blkback has counted so far of a side's disk; nothing for a side that it does not serve."""
    if side.served != "blkback":
        return {}
    folder = Path(f"/sys/bus/xen-backend/devices/vbd-{domain}-{_devid(side)}/statistics")
    if not folder.is_dir():
        raise BenchError(f"{folder} is missing: does blkback serve {side.device}? See xl block-list {FULL}")
    return {path.name: int(path.read_text()) for path in folder.iterdir()}


def _devid(side: Side) -> int:
    """A disk's number in XenStore: xvda is 202, 0, and each of the first 16 has 16 partitions."""
    return 202 << 8 | (ord(side.device[3]) - ord("a")) << 4


def _loop(side: Side, domain: int) -> int:
    """The number of the loop device under a side's disk, -1 for none."""
    if side.served != "blkback":
        return -1
    told = run("xenstore-read", f"/local/domain/0/backend/vbd/{domain}/{_devid(side)}/physical-device").strip()
    major, minor = (int(part, 16) for part in told.split(":"))
    return counted.kernel_number(major, minor)


# The examples: what `xen9p path` says while the guest stands.


def ways(given: Settings) -> list[dict[str, Any]]:
    """A way for a 9P side and for each disk, as text; and whether the byte at its end is the file's."""
    with _agent(given) as agent:
        agent.ask({"do": "drop"})
        return _ways(given, agent)


def _ways(given: Settings, agent: full.Agent) -> list[dict[str, Any]]:
    found = []
    for side in chosen(given):
        if side.name not in {"ours", "block", "qdisk"}:
            continue
        what = f"{FULL}:{side.name}:/read-0" if side.how != DISK else f"{FULL}:/read-0"
        words = ["xen9p", "path", what, "--offset", str(OFFSET)]
        words += ["--disk", side.device] if side.how == DISK else ["--wait", "60"]
        file = given.run / f"{side.name}.json"
        shown = _followed([*words, "--json"], agent, side)
        file.write_text(shown)
        texts = {"text": _followed(words, agent, side)}
        first = given.run / "ours.json"
        if side.how == DISK and first.exists():
            texts["beside"] = run(*words, "--beside", str(first))
        data = bytes.fromhex(agent.ask({"do": "bytes", "place": side.place, "offset": OFFSET, "count": BYTES})["data"])
        found.append({"side": side.name, "json": shown, "there": _at_end(shown) == data} | texts)
    return found


def _followed(words: Sequence[str], agent: full.Agent, side: Side) -> str:
    """What the command prints; the agent reads what it waits for."""
    if "--wait" not in words:
        return run(*words)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            time.sleep(REST)
            while process.poll() is None:
                agent.ask({"do": "drop"})
                agent.ask({"do": "bytes", "place": side.place, "offset": OFFSET, "count": BYTES})
                time.sleep(REST)
            assert process.stdout is not None
            assert process.stderr is not None
            printed, said = process.stdout.read(), process.stderr.read()
        finally:
            process.kill()
    if process.returncode != 0:
        raise BenchError(f"`{' '.join(words)}` failed: {(said.strip().splitlines() or ['no output'])[-1]}")
    return printed


def _at_end(shown: str) -> bytes:
    """The bytes on the device where a way ends, past every cache."""
    device = json.loads(shown)["device"]
    if device is None:
        return b""
    block, rest = divmod(int(device["byte"]), 4096)
    command = ["dd", f"if={device['device']}", "bs=4096", f"skip={block}", "count=1", "iflag=direct", "status=none"]
    done = subprocess.run(command, capture_output=True, check=False)
    return done.stdout[rest : rest + BYTES]
