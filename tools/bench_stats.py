"""Medians, spreads and ratios of a benchmark's samples."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

WORKLOADS = {
    "read_big": "read 64 MiB, 256 KiB a time",
    "read_random": "500 reads of 4 KiB, scattered",
    "write": "write 25 MiB, 256 KiB a time, and fsync",
    "create": "create 50 files",
    "listing": "ls -la of a directory of 52",
}
SIDES = {
    "ours": "xen9p",
    "cached": "xen9p, caching",
    "fuse": "xen9p, FUSE",
    "theirs": "QEMU's 9P",
    "block": "blkback, ext4",
    "qdisk": "qdisk, ext4",
    "floor": "the floor",
}
BOOT = "boot"


class ReportError(Exception):
    """One line: what is wrong with the samples; what to do."""


@dataclass(frozen=True)
class Spread:
    """Some seconds (or ratios) in short: median, quartiles, extremes, and how many there were."""

    median: float
    q1: float
    q3: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Result:
    """One thing that was measured: a spread for each side, and how many times as long the others took as ours.

    *ratio* holds the other side's median divided by ours; *rounds* the spread of the same within each round, where
    both sides met the same noise.
    """

    name: str
    sides: dict[str, Spread]
    ratio: dict[str, float]
    rounds: dict[str, Spread]

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value."""
    if not values:
        raise ReportError("there are no samples: run the benchmark again")
    ordered = sorted(values)
    q1, middle, q3 = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else (ordered[0],) * 3
    short = [float(f"{value:.6g}") for value in (middle, q1, q3, ordered[0], ordered[-1])]
    return Spread(short[0], short[1], short[2], short[3], short[4], len(ordered))


def by_side(name: str, samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return side -> round -> seconds; of one operation, where a sample counts operations."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for sample in samples:
        seconds = float(sample["seconds"]) / float(sample.get("operations", 1))
        if seconds <= 0:
            raise ReportError(f"{name}: a sample of {seconds} seconds cannot be: run the benchmark again")
        found[sample["side"]][int(sample["round"])] = seconds
    return found


def compare(rival: Mapping[int, float], mine: Mapping[int, float]) -> Spread | None:
    """Return how many times as long the rival took, within each round that both have; None without such rounds."""
    common = sorted(set(mine) & set(rival))
    return spread([rival[number] / mine[number] for number in common]) if common else None


def result(name: str, samples: Iterable[Mapping[str, Any]]) -> Result:
    """Return what *samples* (each with round, side and seconds) say; one side has to be "ours"."""
    found = by_side(name, samples)
    if "ours" not in found:
        raise ReportError(f"{name}: no sample of xen9p: run the benchmark again")
    sides = {side: spread(list(found[side].values())) for side in SIDES if side in found}
    rounds = {}
    for side in sides:
        if side != "ours" and (compared := compare(found[side], found["ours"])):
            rounds[side] = compared
    ratio = {side: round(sides[side].median / sides["ours"].median, 3) for side in rounds}
    return Result(name, sides, ratio, rounds)


def summarise(raw: Mapping[str, Any]) -> list[Result]:
    """Return the results of a whole run: the workloads in their order, then the boot, as far as they were measured."""
    found = []
    file_samples = raw.get("files", {}).get("samples", [])
    for workload in WORKLOADS:
        if chosen := [sample for sample in file_samples if sample["workload"] == workload]:
            found.append(result(workload, chosen))
    if boots := raw.get("boot", {}).get("samples", []):
        found.append(result(BOOT, boots))
    if not found:
        raise ReportError("there are no samples: run the benchmark again")
    return found
