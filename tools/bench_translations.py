"""The report of what was counted on each way to a file: per operation, as table, page and pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import translations_copies
from bench_stats import SIDES, ReportError
from translations_picture import picture

IDLE = "idle"
EXAMPLE = "<!-- example -->"
NAMES = {
    "ours": "9P, v9fs cache=none",
    "cached": "9P, v9fs cache=loose",
    "fuse": "9P, our FUSE mount",
    "block": "ext4 on blkback",
    "qdisk": "ext4 on qdisk",
}
# Columns: what it is called, and which counts it is the sum of. An entry is left out where one of them is.
COLUMNS: dict[str, tuple[str, ...]] = {
    "translations": ("translations",),
    "requests on the ring": ("requests",),
    "notifications": ("sent_by_guest", "sent_by_dom0"),
    "hypercalls, guest": ("hypercalls_guest",),
    "hypercalls, dom0": ("hypercalls_dom0",),
    "context switches, guest": ("switches_guest",),
    "context switches, dom0": ("switches_dom0",),
    "context switches, backend": ("switches_backend",),
    "bytes on the ring": ("ring_bytes",),
    "bytes copied": ("copied",),
    "grants copied": ("grants_copied",),
    "grants mapped": ("grants_mapped",),
    "requests to the store's disk": ("store_requests",),
    "backend's processor time, µs": ("backend_us",),
}
# What is compared: what is certainly the way's own. Dom0 has other work, and loop's threads are everybody's.
COMPARED = (
    *("translations", "requests on the ring", "notifications"),
    *("hypercalls, guest", "context switches, guest", "bytes copied"),
)
PAIRS = (("ours", "block"), ("cached", "block"), ("cached", "qdisk"), ("fuse", "qdisk"))


@dataclass(frozen=True)
class Step:
    """A step of a way, with how often it was gone for an operation; None where nothing tells, and then why."""

    source: str
    target: str
    by: str
    event: str
    count: float | None
    why: str = ""


@dataclass(frozen=True)
class Entry:
    """One workload on one side, over all rounds: counts of one operation (of a second, where there is none)."""

    workload: str
    side: str
    operations: int
    counts: Mapping[str, float]
    steps: Sequence[Step]
    left_out: Mapping[str, str]
    failed: str = ""

    def column(self, name: str) -> float | None:
        """The value of a column; None where it could not be counted."""
        parts = COLUMNS[name]
        return sum(self.counts[part] for part in parts) if all(part in self.counts for part in parts) else None


def entries(run: Mapping[str, Any]) -> list[Entry]:
    """All workloads on all sides, in the order of the run and of the sides.

    Raises:
        ReportError: nothing was counted.
    """
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    told = run["translations"]
    for part in told["parts"]:
        for count in part["counts"]:
            found[count["workload"], count["side"]].append(count)
    if not found:
        raise ReportError("nothing was counted: run playbooks/translations.yml again")
    bounced = told.get("bounced", {})
    works = list(dict.fromkeys(workload for workload, _ in found))
    return [_entry(found[w, s], bounced.get(s, False)) for w in works for s in SIDES if (w, s) in found]


def _entry(counts: Sequence[Mapping[str, Any]], bounced: bool) -> Entry:
    first = counts[0]
    workload, side = first["workload"], first["side"]
    done = [count for count in counts if not count["failed"]]
    if not done:
        return Entry(workload, side, 0, {}, (), {}, first["failed"])
    operations = sum(count["operations"] for count in done)
    by = operations or sum(count["seconds"] for count in done)
    names = set.intersection(*(set(count["counts"]) for count in done))
    values = {name: sum(count["counts"][name] for count in done) / by for name in names}
    steps = _steps(done, by)
    left_out = {name: why for count in done for name, why in count["left_out"].items()}
    left_out |= {f"{step.source} -> {step.target}": step.why for step in steps if step.count is None}
    if all(step.count is not None for step in steps):
        values["translations"] = sum(step.count or 0 for step in steps)
    if operations:
        moved = sum(count["bytes"] for count in done) / by
        values["copied"] = translations_copies.copied(workload, side, bounced, values.get("ring_bytes", 0), moved)
    return Entry(workload, side, operations, values, steps, left_out)


def _steps(done: Sequence[Mapping[str, Any]], by: float) -> list[Step]:
    steps = []
    for same in zip(*(count["steps"] for count in done), strict=True):
        known = [step["count"] for step in same if step["count"] is not None]
        count = sum(known) / by if len(known) == len(same) else None
        why = next((step["why"] for step in same if step.get("why")), "")
        steps.append(Step(same[0]["from"], same[0]["to"], same[0]["by"], same[0]["event"], count, why))
    return steps


def disagreements(run: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Count -> how many readings have a second source, how many of these say the same, and the largest difference."""
    found: dict[str, tuple[int, int, int]] = {}
    for part in run["translations"]["parts"]:
        for count in part["counts"]:
            for name, (one, other) in count["checks"].items():
                readings, same, most = found.get(name, (0, 0, 0))
                found[name] = (readings + 1, same + (one == other), max(most, abs(one - other)))
    return found


def figure(value: float | None) -> str:
    """A count of one operation with as many digits as it is worth."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(run: Mapping[str, Any]) -> str:
    """Everything as text in columns: a block for each workload, a line for each side."""
    found, lines = entries(run), []
    for workload, group in _by_workload(found):
        unit = "per second" if workload == IDLE else "per operation"
        rows = [(f"{workload} ({unit})", *COLUMNS)]
        for entry in group:
            cells = [entry.failed] if entry.failed else [figure(entry.column(name)) for name in COLUMNS]
            rows.append((_named(entry), *cells))
        lines += [*_narrow(rows), ""]
    lines += [f"{workload}: {said}" for workload, group in _by_workload(found) for said in compared(group)]
    lines += [f"left out: {what}: {why}" for what, why in _left_out(found).items()]
    return "\n".join(lines).rstrip()


def _named(entry: Entry) -> str:
    return "at rest" if entry.workload == IDLE else NAMES[entry.side]


def _narrow(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their figures, under heads with a line for each word."""
    heads = [[rows[0][0]], *(name.split() for name in rows[0][1:])]
    height = max(map(len, heads))
    tall = [[""] * (height - len(head)) + head for head in heads]
    lines = [*map(list, zip(*tall, strict=True)), *(list(row) for row in rows[1:])]
    widths = [max(len(line[i]) for line in lines if len(line) > i) for i in range(len(heads))]
    return [
        "  ".join(cell.rjust(widths[i]) if i else cell.ljust(widths[0]) for i, cell in enumerate(line)).rstrip()
        for line in lines
    ]


def _by_workload(found: Iterable[Entry]) -> list[tuple[str, list[Entry]]]:
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        groups.setdefault(entry.workload, []).append(entry)
    return list(groups.items())


def compared(group: Sequence[Entry]) -> list[str]:
    """For each pair of sides what the 9P one takes less of, and what more of, in an operation."""
    sides = {entry.side: entry for entry in group if not entry.failed and entry.operations}
    said = []
    for mine, rival in PAIRS:
        if mine not in sides or rival not in sides:
            continue
        less: list[str] = []
        more: list[str] = []
        for name in COMPARED:
            one, other = sides[mine].column(name), sides[rival].column(name)
            if one is not None and other is not None and figure(one) != figure(other):
                (less if one < other else more).append(f"{name} {figure(one)} to {figure(other)}")
        parts = [f"less: {'; '.join(less)}"] if less else []
        parts += [f"more: {'; '.join(more)}"] if more else []
        said.append(f"{NAMES[mine]} against {NAMES[rival]}: {'. '.join(parts) or 'the same'}")
    return said


def verdict(group: Sequence[Entry]) -> str:
    """Which side takes the least of most of what is compared, and of what another takes less."""
    sides = [entry for entry in group if not entry.failed and entry.operations]
    wins: dict[str, list[str]] = {entry.side: [] for entry in sides}
    for name in COMPARED:
        values = {entry.side: value for entry in sides if (value := entry.column(name)) is not None}
        if values and len(least := [side for side, value in values.items() if value == min(values.values())]) == 1:
            wins[least[0]].append(name)
    best = max(wins.values(), key=len, default=[])
    if not best:
        return "No way takes less than all the others of anything."
    said = [f"**{NAMES[side]}** takes the least: {', '.join(won)}" for side, won in wins.items() if won]
    return ". ".join(sorted(said, key=lambda line: -line.count(","))) + "."


def _left_out(found: Iterable[Entry]) -> dict[str, str]:
    gathered: dict[str, dict[str, None]] = defaultdict(dict)
    for entry in found:
        for what, why in entry.left_out.items():
            gathered[why][what.replace("_", " ")] = None
    return {", ".join(whats): why for why, whats in gathered.items()}


def charts(run: Mapping[str, Any], name: str) -> dict[str, str]:
    """A picture for each workload: file name -> SVG."""
    drawn = {}
    for workload, group in _by_workload(entries(run)):
        rows = [_row(entry) for entry in group if entry.operations and not entry.failed]
        if rows:
            title = f"{run['translations']['workloads'].get(workload, workload)}: how often, for one operation"
            drawn[f"{name}-{workload}.svg"] = picture(title, rows)
    return drawn


def _row(entry: Entry) -> tuple[str, str, list[tuple[str, str, str]]]:
    head = f"{NAMES[entry.side]}: {figure(entry.column('translations'))} translations"
    short = {
        "requests on the ring": "requests",
        "notifications": "notifications",
        "hypercalls, guest": "guest's hypercalls",
        "context switches, guest": "guest's context switches",
        "bytes copied": "bytes copied",
    }
    under = " · ".join(f"{label} {figure(entry.column(name))}" for name, label in short.items())
    return head, under, [(figure(step.count), step.by, f"{step.source} → {step.target}") for step in entry.steps]


def page_parts(run: Mapping[str, Any], name: str) -> list[str]:
    """The page below its head, in Markdown."""
    found, told = entries(run), run["translations"]
    lines = [
        "Every figure is of one operation, and was counted in the kernels and in Xen. What a translation is, and how",
        "it is counted: [Translations](../translations.md). What could not be counted is `-`, with the reason below.",
        "",
    ]
    works = told["workloads"]
    for workload, group in _by_workload(found):
        lines += [f"## {works.get(workload, workload)}", ""]
        if workload == IDLE:
            lines += [
                "What there is besides, in a second: timers, xentrace, all else that dom0 does. Hypercalls and context",
                "switches of dom0 below have their share of it, and are not compared.",
                "",
            ]
        elif any(entry.operations for entry in group):
            lines += [f"![The stations of each way, with counts]({name}-{workload}.svg)", "", verdict(group), ""]
        names = [_named(entry) for entry in group]
        lines += [f"| of one operation | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
        if workload == IDLE:
            lines[-2] = lines[-2].replace("of one operation", "in a second")
        for column in COLUMNS:
            lines.append(f"| {column} | {' | '.join(figure(entry.column(column)) for entry in group)} |")
        lines += ["", *(f"- {line}." for line in compared(group))]
        lines += [f"- {NAMES[entry.side]} cannot do it: {entry.failed}." for entry in group if entry.failed]
        lines.append("")
    lines += ["## Copies", "", *_copies(found, told), "", "## Two sources for one count", "", *_checks(run), ""]
    if left := _left_out(found):
        lines += ["## Left out", "", *(f"- {what}: {why}." for what, why in left.items()), ""]
    lines += ["## How", "", *_how(run)]
    return lines


def _copies(found: Sequence[Entry], told: Mapping[str, Any]) -> list[str]:
    lines = [
        "How often file data is copied is known from the code; how many bytes went through the ring, and how many the",
        "program moved, was counted. What Xen copies is a grant copy; all else guest or dom0 copy in memory that they",
        "have. Names and attributes are no data here.",
        "",
        "| way | reading | writing |",
        "| --- | --- | --- |",
    ]
    for side in SIDES:
        if any(entry.side == side for entry in found):
            bounced = told.get("bounced", {}).get(side, False)
            cells = []
            for workload in ("read-seq", "write-seq"):
                made = translations_copies.copies(workload, side, bounced)
                cells.append(f"{len(made)}: " + "; ".join(f"{c.by}, {c.what} (`{c.code}`)" for c in made))
            lines.append(f"| {NAMES[side]} | {' | '.join(cells)} |")
    return lines


_CHECKS = {
    "requests": "requests on the ring: frontend (kprobe, block event), backend (worker's or blkback's counters)",
    "sent_by_guest": "notifications by the guest: sent there (kprobe), interrupts in dom0; several may be one",
    "sent_by_dom0": "notifications by dom0: sent there (kprobe), interrupts in the guest",
    "switches_guest": "context switches of the guest: its /proc/stat, and stack_switch hypercalls in Xen's trace",
    "switches_backend": "context switches of the backend's threads: sched_switch, and /proc/PID/task/*/status",
    "grants_copied": "grants that QEMU has Xen copy: kprobe in its threads, and grant_table_op in Xen's trace",
    "grants_mapped": "grants that blkback maps: kprobe in its thread, and grant_table_op in Xen's trace",
    "ring_bytes": "bytes on the ring: the guest's block events, and blkback's statistics",
}


def _checks(run: Mapping[str, Any]) -> list[str]:
    lines = ["| count | readings | equal | largest difference |", "| --- | ---: | ---: | ---: |"]
    for name, (readings, same, most) in disagreements(run).items():
        lines.append(f"| {_CHECKS.get(name, name)} | {readings} | {same} | {most} |")
    return lines


def _how(run: Mapping[str, Any]) -> list[str]:
    told = run["translations"]
    rounds = len({part["counts"][0]["round"] for part in told["parts"] if part["counts"]})
    count = "1 round" if rounds == 1 else f"{rounds} rounds"
    lines = [
        f"One guest ({run['settings']['memory']} MiB, one processor) in which all ways are mounted; {count}, each",
        "workload on every way before the next begins. All files and images are on one btrfs and share their first",
        "content. *Cold*: the page caches of guest and dom0 were emptied before. Xen's trace is cut by marks that the",
        "guest makes before and after its work, so hypercalls and dom0's context switches are all those of that time,",
        "also those of dom0's other processes. Backend's switches and processor time lack those of the loop's threads,",
        "which are everybody's; what they read and write for another guest on that btrfs is counted as well. Counting",
        "costs time, and changes what waits for what: nothing here measures speed.",
        "",
        "| way | mounted as |",
        "| --- | --- |",
    ]
    return lines + [f"| {NAMES.get(side, side)} | `{options}` |" for side, options in told["mounts"].items()]


def with_example(text: str, run: Mapping[str, Any]) -> str:
    """A page with the ways of this run between its two marks.

    Raises:
        ReportError: the page has no such marks.
    """
    parts = text.split(EXAMPLE)
    if len(parts) != 3:
        raise ReportError(f"docs/translations.md must have two lines {EXAMPLE}: the example goes between them")
    return EXAMPLE.join([parts[0], "\n" + "\n".join(_example(run)) + "\n", parts[2]])


def _example(run: Mapping[str, Any]) -> list[str]:
    ways = run["translations"]["ways"]
    lines = [
        f"Of the run of {run['date']} that [the counts](results/translations.md) are from. The file is the same on all",
        "three; the run has read the bytes at each end, and they were "
        f"{'the same' if all(way['there'] for way in ways) else '**not** the same'} as the guest's.",
        "",
    ]
    for way in ways:
        lines += ["```text", way["text"].strip("\n"), "```", ""]
    for way in ways:
        if "beside" in way:
            lines += ["Side by side (`--beside`). The lines do not belong together across.", ""]
            lines += ["```text", way["beside"].strip("\n"), "```", ""]
    return lines


def write_example(docs: Path, run: Mapping[str, Any]) -> None:
    """Put this run's ways into docs/translations.md; the example stays as it is if the run has followed none."""
    if not run["translations"]["ways"]:
        return
    path = docs / "translations.md"
    path.write_text(with_example(path.read_text(), run))
