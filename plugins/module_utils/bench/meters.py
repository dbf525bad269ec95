"""Counters that the kernel keeps anyway: interrupts, context switches, requests of a disk; as numbers.

Sources: proc(5), Documentation/block/stat.rst. Works in dom0 and, as a file beside the agent, in the guest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_SWITCHES = re.compile(r"^(?:non)?voluntary_ctxt_switches:\s+(\d+)$", re.MULTILINE)


def interrupts(text: str) -> dict[str, tuple[str, int]]:
    """Number of an interrupt -> what it is for, and how many have come; from /proc/interrupts."""
    head, *lines = text.splitlines()
    processors = len(head.split())
    found = {}
    for line in lines:
        number, *words = line.split()
        # Chip and kind of the event come before the name; what is no device's has no number.
        if number[:-1].isdigit() and len(words) > processors + 2:
            found[number[:-1]] = (" ".join(words[processors + 2 :]), sum(map(int, words[:processors])))
    return found


def switches(stat: str) -> int:
    """Context switches since the kernel's start, from /proc/stat."""
    return next(int(line.split()[1]) for line in stat.splitlines() if line.startswith("ctxt "))


def own_switches(pids: Iterable[int], proc: Path = Path("/proc")) -> int:
    """Context switches of all threads of some processes, so far; 0 of one that is gone."""
    total = 0
    for pid in pids:
        for status in proc.glob(f"{pid}/task/*/status"):
            try:
                total += sum(map(int, _SWITCHES.findall(status.read_text())))
            except OSError:  # the thread has ended
                continue
    return total


def threads(pids: Iterable[int], proc: Path = Path("/proc")) -> set[int]:
    """All threads of some processes."""
    return {int(path.name) for pid in pids for path in proc.glob(f"{pid}/task/*")}


def kernel_threads(proc: Path = Path("/proc")) -> set[int]:
    """All threads of the kernel: what kthreadd, process 2, has started."""
    found = set()
    for stat in proc.glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may have any character.
            if stat.read_text().rpartition(")")[2].split()[1] == "2":
                found.add(int(stat.parent.name))
        except OSError:  # it has ended
            continue
    return found


def completed(stat: str) -> dict[str, int]:
    """Requests of a disk that are done, by kind, from /sys/block/*/stat."""
    words = [int(word) for word in stat.split()]
    # Flushes came with Linux 5.5.
    places = {"reads": 0, "read_sectors": 2, "writes": 4, "written_sectors": 6, "discards": 11, "flushes": 15}
    return {name: words[place] for name, place in places.items() if place < len(words)}
