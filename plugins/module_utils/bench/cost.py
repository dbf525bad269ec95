"""What a piece of work costs: processor time of dom0, of the guest, and of a backend's own processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .host import run

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Meter:
    """Seconds of processor time so far: *busy* as dom0's kernel counts, *domains* as Xen does, *backends* by side."""

    busy: float
    domains: Mapping[str, float]
    backends: Mapping[str, float]


def read(backends: Mapping[str, Iterable[int]]) -> Meter:
    """Read all meters; `xl list` has tenths of seconds."""
    rows = [line.split() for line in run("xl", "list").splitlines()[1:]]
    spent = {side: sum(process(pid) for pid in pids) for side, pids in backends.items()}
    return Meter(busy(Path("/proc/stat").read_text()), {row[0]: float(row[-1]) for row in rows}, spent)


def busy(stat: str) -> float:
    """Seconds that the processors of /proc/stat have worked: user, nice, system, irq, softirq."""
    words = stat.splitlines()[0].split()[1:]
    return sum(int(words[index]) for index in (0, 1, 2, 5, 6)) / TICKS


def process(pid: int) -> float:
    """Seconds that the threads of a process have run; 0.0 for one that is gone."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[0])
        except OSError:  # the thread has ended
            continue
    return total / 1e9


def between(before: Meter, after: Meter, side: str, guest: str) -> dict[str, float]:
    """What was spent between two readings: seconds of dom0 (by its kernel, by Xen), guest and the side's backend."""
    spent = {
        "dom0": after.busy - before.busy,
        "dom0_xen": after.domains["Domain-0"] - before.domains["Domain-0"],
        "guest": after.domains[guest] - before.domains[guest],
        "backend": after.backends.get(side, 0.0) - before.backends.get(side, 0.0),
    }
    return {name: round(max(0.0, seconds), 4) for name, seconds in spent.items()}
