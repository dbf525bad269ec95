"""The full benchmark's part of the report: rates, bars, processor time and memory, from the samples of a run."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench_chart import chart
from bench_stats import SIDES, ReportError, Result, Spread, by_side, compare, result

MOST_MIB = 15.0
MOST_READY = 1.0
NAMES = {
    "mixed-4k-4": "mixed: 70 % reads, 30 % writes of 4k, 4 jobs, fsync",
    "create": "create small files",
    "stat": "stat",
    "unlink": "unlink",
    "find-cold": "find in a tree, cold",
    "untar": "unpack a tar",
    "list-1000": "ls -l of 1,000",
    "list-10000-cold": "ls -l of 10,000, cold",
}
Samples = dict[str, list[Mapping[str, Any]]]


@dataclass(frozen=True)
class Bar:
    """What the project has set itself: *mine* at least *least* times as fast as *rival*, in the workloads it picks."""

    text: str
    mine: str
    rival: str
    least: float
    picks: Callable[[str], bool]


def is_fio(name: str) -> bool:
    """Whether fio did it."""
    return name.startswith(("read-", "write-", "mixed-"))


def _is_cold_or_synced(name: str) -> bool:
    return name.startswith("write-") or (name.startswith("read-") and name.endswith("-cold"))


BARS = (
    Bar("QEMU's 9P, metadata and 4k", "ours", "theirs", 4.0, lambda name: not is_fio(name) or "-4k-" in name),
    Bar("QEMU's 9P, 64k and 1m", "ours", "theirs", 3.0, lambda name: "-64k-" in name or "-1m-" in name),
    Bar("blkback, cold reads and writes with fsync", "ours", "block", 1.0, _is_cold_or_synced),
    Bar("blkback, cold reads and writes with fsync", "cached", "block", 1.0, _is_cold_or_synced),
    Bar(
        "blkback, small-file create, stat, readdir",
        "cached",
        "block",
        0.8,
        lambda name: name in {"create", "stat", "list-1000", "list-10000-cold"},
    ),
    Bar(
        "the floor, 4k reads",
        "ours",
        "floor",
        0.7,
        lambda name: name.startswith("read-") and "-4k-" in name and name.endswith("-warm"),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """How a bar was met: of *count* workloads those below it, and the spread of the worst one's ratios by round."""

    text: str
    held: bool
    said: str


def samples_of(run: Mapping[str, Any]) -> Samples:
    """Workload -> its samples of all rounds, in the order in which they were measured first."""
    found: Samples = {}
    for one in run["full"]["rounds"]:
        for sample in one["samples"]:
            found.setdefault(sample["workload"], []).append(sample)
    if not found:
        raise ReportError("there are no samples: run the benchmark again")
    return found


def summarise(run: Mapping[str, Any]) -> list[Result]:
    """The results of all workloads that xen9p took part in."""
    every = samples_of(run)
    return [result(name, samples) for name, samples in every.items() if any(s["side"] == "ours" for s in samples)]


def label(name: str) -> str:
    """A workload as a reader sees it."""
    if name in NAMES:
        return NAMES[name]
    parts = name.split("-")
    if len(parts) < 4:
        return name
    access, pattern, size, jobs, *rest = parts
    how = {"seq": "sequential", "rand": "random"}.get(pattern, pattern)
    more = f", {rest[0]}" if rest else ", fsync"
    return f"{access} {size}, {how}, {jobs} job{'' if jobs == '1' else 's'}{more}"


def verdicts(run: Mapping[str, Any]) -> list[Verdict]:
    """Whether each bar is held, and where not, by how much it is missed."""
    every = samples_of(run)
    found = [verdict for bar in BARS if (verdict := _judge(bar, every))]
    if growth := _growth(every):
        found.append(growth)
    memory = {side: kib / 1024 for side, kib in _memory(run).items() if side in {"ours", "cached", "fuse"}}
    if memory:
        most = max(memory.values())
        found.append(Verdict(f"A worker at most {MOST_MIB:g} MiB", most <= MOST_MIB, f"{most:.1f} MiB at the most"))
    if ready := run["full"].get("ready"):
        slowest = max(ready.values())
        text = f"Ready at most {MOST_READY:g} s after the guest's rings"
        found.append(Verdict(text, slowest <= MOST_READY, f"{slowest:.2f} s at the most"))
    return found


def ratio(samples: Sequence[Mapping[str, Any]], mine: str, rival: str, name: str = "") -> tuple[float, Spread] | None:
    """How many times as fast *mine* is as *rival*: of the medians, and the spread within rounds; None if one lacks."""
    sides = by_side(name, samples)
    compared = compare(sides.get(rival, {}), sides.get(mine, {}))
    if compared is None:
        return None
    return statistics.median(sides[rival].values()) / statistics.median(sides[mine].values()), compared


def _judge(bar: Bar, every: Samples) -> Verdict | None:
    ratios = {
        name: found[0]
        for name, samples in every.items()
        if bar.picks(name) and (found := ratio(samples, bar.mine, bar.rival, name))
    }
    if not ratios:
        return None
    text = f"{SIDES[bar.mine]} at least {bar.least:g} times {bar.text}"
    below = sorted((value, name) for name, value in ratios.items() if value < bar.least)
    lowest, highest = min(ratios.values()), max(ratios.values())
    if not below:
        return Verdict(text, True, f"in all {len(ratios)}: {lowest:.2f} to {highest:.2f}")
    missed = "; ".join(f"{label(name)} ({value:.2f})" for value, name in below)
    return Verdict(text, False, f"held in {len(ratios) - len(below)} of {len(ratios)}; missed: {missed}")


def _growth(every: Samples) -> Verdict | None:
    """Whether 16 jobs get more done than one."""
    said, grows = [], True
    for pattern in ("seq", "rand"):
        rates: dict[str, dict[int, float]] = defaultdict(dict)
        for jobs in (1, 16):
            for side, found in by_side("", every.get(f"read-{pattern}-4k-{jobs}-warm", [])).items():
                rates[side][jobs] = 1 / statistics.median(found.values())
        factor = {side: rate[16] / rate[1] for side, rate in rates.items() if len(rate) == 2}
        if "ours" in factor:
            grows = grows and factor["ours"] >= 1
            beside = f", the floor {factor['floor']:.2f}" if "floor" in factor else ""
            said.append(f"{label(f'read-{pattern}-4k-1-warm').split(',')[1].strip()} {factor['ours']:.2f}{beside}")
    return Verdict("4k reads: 16 jobs get more done than 1 (times)", grows, "; ".join(said)) if said else None


def table(run: Mapping[str, Any]) -> str:
    """The rates and the bars as text."""
    names = [side for side in SIDES if any(side in item.sides for item in summarise(run))]
    rows = [("operations/s", *(SIDES[side] for side in names))]
    for item in summarise(run):
        rows.append((label(item.name), *(_rate(item.sides.get(side)) for side in names)))
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    for bar in verdicts(run):
        lines.append(f"bar: {bar.text}: {'held' if bar.held else 'missed'}, {bar.said}")
    return "\n".join(lines)


def page_parts(run: Mapping[str, Any], name: str) -> list[str]:
    """The page below its head, in Markdown."""
    every, found = samples_of(run), summarise(run)
    lines = ["## Bars", "", "| what | | how far |", "| --- | --- | --- |"]
    lines += [f"| {item.text} | {'held' if item.held else '**missed**'} | {item.said} |" for item in verdicts(run)]
    for part, title in (("4k", "Small requests"), ("large", "Large requests"), ("files", "Files and directories")):
        if f"{name}-{part}.svg" in charts(run, name):
            lines += ["", f"## {title}", "", f"![Median time of an operation]({name}-{part}.svg)"]
    names = [side for side in SIDES if any(side in item.sides for item in found)]
    lines += ["", "## Operations a second", "", f"| workload | {' | '.join(SIDES[side] for side in names)} |"]
    lines += [f"| --- |{' ---: |' * len(names)}"]
    for item in found:
        lines.append(f"| {label(item.name)} | {' | '.join(_rate(item.sides.get(side)) for side in names)} |")
    lines += ["", "## Ratios", "", *_ratios(every)]
    lines += ["", "## Processor time of an operation", "", *_costs(run)]
    lines += ["", "## Memory and readiness", "", *_memory_rows(run)]
    return [*lines, "", "## How", "", *_how(run)]


PAIRS = (("ours", "theirs"), ("ours", "block"), ("cached", "block"), ("cached", "qdisk"), ("fuse", "theirs"))


def _ratios(every: Samples) -> list[str]:
    pairs = [pair for pair in PAIRS if any(ratio(samples, *pair) for samples in every.values())]
    head = " | ".join(f"{SIDES[mine]} ÷ {SIDES[rival]}" for mine, rival in pairs)
    lines = ["Speed of the one divided by that of the other: of the medians, and the middle half of the rounds.", ""]
    lines += [f"| workload | {head} |", f"| --- |{' ---: |' * len(pairs)}"]
    for name, samples in every.items():
        cells = [_ratio_cell(ratio(samples, mine, rival, name)) for mine, rival in pairs]
        lines.append(f"| {label(name)} | {' | '.join(cells)} |")
    return lines


def _ratio_cell(found: tuple[float, Spread] | None) -> str:
    return "" if found is None else f"**{found[0]:.2f}** ({found[1].q1:.2f} to {found[1].q3:.2f})"


def _costs(run: Mapping[str, Any]) -> list[str]:
    """Median µs of dom0's processors, and of the backend's own threads, for each operation of a group."""
    spent: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for one in run["full"]["rounds"]:
        for cost in one["costs"]:
            per = 1e6 / cost["operations"]
            spent[cost["group"]][cost["side"]].append((cost["dom0"] * per, cost["backend"] * per))
    names = [side for side in SIDES if any(side in sides for sides in spent.values())]
    lines = [
        "Microseconds of dom0's processors for each operation, as dom0's kernel counts them, and in parentheses those",
        "of the backend's own threads (QEMU: of its process; blkback: of its kernel threads, without those of the loop",
        "device). Medians of the rounds; what the benchmark itself needs in dom0 is part of the first figure.",
        "",
        f"| group | {' | '.join(SIDES[side] for side in names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    for group, sides in spent.items():
        cells = []
        for side in names:
            values = sides.get(side)
            dom0, own = (statistics.median(part) for part in zip(*values, strict=True)) if values else (0.0, 0.0)
            cells.append(f"{dom0:.0f} ({own:.0f})" if values else "")
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return lines


def _memory(run: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in run["full"]["rounds"]:
        for side, kib in one.get("pss_kib", {}).items():
            found[side] = max(found.get(side, 0), kib)
    return found


def _memory_rows(run: Mapping[str, Any]) -> list[str]:
    names = SIDES | {"supervisor": "the supervisor, one for all guests", "fuse_guest": "the FUSE mount, in the guest"}
    ready = run["full"].get("ready", {})
    lines = ["Proportional share of memory (PSS), the highest of the rounds; one QEMU serves its 9P and its qdisk.", ""]
    lines += ["| | memory | ready after |", "| --- | ---: | ---: |"]
    for side, kib in _memory(run).items():
        soon = f"{ready[side]:.2f} s" if side in ready else ""
        lines.append(f"| {names.get(side, side)} | {kib / 1024:.1f} MiB | {soon} |")
    return lines


def _how(run: Mapping[str, Any]) -> list[str]:
    settings, mounts = run["settings"], run["full"].get("mounts", {})
    lines = [
        f"Medians of {len(run['full']['rounds'])} rounds in one guest ({settings['memory']} MiB, one processor). In",
        "each round every group of work goes through all sides before the next group begins; each group and round",
        "begins with another side, and every other round goes backwards. *Cold*: the page caches of guest and dom0",
        "were emptied before. *Warm*: nothing was dropped. All directories and disk images are on one btrfs and share",
        "their first content. fio: psync, a thread a job, the jobs in parts of one file of "
        f"{settings['file_mib']} MiB, at most {settings['section_seconds']:g} s",
        "a section; writes end with fsync, which counts. The guest's own page cache is on for the disks and for the",
        "caching mount.",
        "",
        "| side | mounted as |",
        "| --- | --- |",
    ]
    return lines + [f"| {SIDES.get(side, side)} | `{options}` |" for side, options in mounts.items()]


def charts(run: Mapping[str, Any], name: str) -> dict[str, str]:
    """The charts as file name -> SVG."""
    parts: dict[str, tuple[str, Callable[[str], bool]]] = {
        "4k": (
            "4 KiB: time of an operation, median; shorter is better; each group has its own scale",
            lambda n: n.endswith(("-4k-1-warm", "-4k-16-warm", "rand-4k-1-cold", "rand-4k-1", "mixed-4k-4")),
        ),
        "large": (
            "64 KiB and 1 MiB, one job: time of an operation, median; each group has its own scale",
            lambda n: n.endswith(("seq-64k-1-cold", "seq-1m-1-cold", "seq-64k-1", "seq-1m-1", "rand-64k-1-cold")),
        ),
        "files": ("Small files: time of an operation, median; each group has its own scale", lambda n: not is_fio(n)),
    }
    drawn = {}
    for part, (title, picks) in parts.items():
        if chosen := [(label(item.name), item) for item in summarise(run) if picks(item.name)]:
            drawn[f"{name}-{part}.svg"] = chart(title, chosen, own_scale=True)
    return drawn


def _rate(spread: Spread | None) -> str:
    return "" if spread is None else f"{1 / spread.median:,.0f}" if spread.median < 0.1 else f"{1 / spread.median:.1f}"
