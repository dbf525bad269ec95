"""What the full benchmark measures: groups of work, each done through every side in turn.

One start of fio does several sections of a group, one after the other; a section has a file of its own, so that caches
that were dropped before the group are cold for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .host import BenchError
from .settings import Settings
from .sides import FUSE, Side

SIZES = {"4k": 4096, "64k": 65536, "1m": 1 << 20}
JOBS = (1, 16)
# What 16 writers of large requests have under way does not fit into a ring, and then Linux's frontend never wakes who
# waits for room (docs/troubleshooting.md): over any backend's v9fs they would stand still for ever.
WRITERS = {"1m": (1, 4)}
# Of a section's bytes, out of each mebibyte of a file: small requests take longer.
SHARE = {"4k": 1 / 8, "64k": 1 / 2, "1m": 1.0}
# Entries of the two directories that are listed; directories, and files in each, of the tree that is searched.
FEW, MANY = 1000, 10000
TREE = (20, 10)


@dataclass(frozen=True)
class Group:
    """Work that is measured through one side at a time; *request* is the agent's, without place and side."""

    name: str
    request: dict[str, Any] = field(default_factory=dict)
    cold: bool = False
    warm: bool = False
    floor: bool = False  # whether the floor can do it

    def fits(self, side: Side) -> bool:
        """Whether this side does it."""
        if side.served == "floor":
            return self.floor
        # 10,000 entries through a FUSE server in Python would take very long, and say no more than 1,000 do.
        return not (side.how == FUSE and self.name == "list-10000-cold")

    def warms(self, side: Side) -> bool:
        """Whether what is to be read through a side is read once before."""
        # So 1,000 entries take minutes there, and the second time as long as the first.
        return self.warm and not (side.how == FUSE and self.name == "list-1000")


def sections(given: Settings, access: str, size: str, suffix: str) -> list[dict[str, Any]]:
    """Sequential and random, by 1 and by 16 jobs."""
    bytes_ = int((given.file_mib << 20) * SHARE[size])
    found: list[dict[str, Any]] = []
    for pattern in ("seq", "rand"):
        for jobs in WRITERS.get(size, JOBS) if access == "write" else JOBS:
            found.append(
                {
                    "name": f"{access}-{pattern}-{size}-{jobs}{suffix}",
                    "rw": f"{'' if pattern == 'seq' else 'rand'}{access}",
                    "bs": SIZES[size],
                    "jobs": jobs,
                    "file": f"{access}-{len(found)}",
                    "area": max(SIZES[size], (given.file_mib << 20) // jobs),
                    "bytes": max(SIZES[size], bytes_ // jobs),
                }
            )
    return found


def groups(given: Settings) -> list[Group]:
    """Everything, in its order; what reads what another has made comes after it."""
    found: list[Group] = []
    for size in SIZES:
        found.append(Group(f"read-{size}-cold", _fio(given, sections(given, "read", size, "-cold")), cold=True))
    for size in SIZES:
        found.append(
            Group(f"read-{size}-warm", _fio(given, sections(given, "read", size, "-warm")), warm=True, floor=True)
        )
    for size in SIZES:
        found.append(Group(f"write-{size}", _fio(given, sections(given, "write", size, ""))))
    mixed = {
        "name": "mixed-4k-4",
        "rw": "randrw",
        "bs": SIZES["4k"],
        "jobs": 4,
        "file": "mixed-0",
        "area": (given.file_mib << 20) // 4,
        "bytes": (given.file_mib << 20) // 32,
    }
    found.append(Group("mixed", _fio(given, [mixed])))
    found += [
        Group("create", {"do": "create", "count": given.small_files}),
        Group("stat", {"do": "stat", "count": given.small_files}, warm=True),
        Group("unlink", {"do": "unlink", "count": given.small_files}),
        Group("find-cold", {"do": "find"}, cold=True),
        Group("untar", {"do": "untar", "entries": TREE[0] * (1 + TREE[1])}),
        Group("list-1000", {"do": "list", "folder": "few", "entries": FEW}, warm=True),
        Group("list-10000-cold", {"do": "list", "folder": "many", "entries": MANY}, cold=True),
    ]
    known = [group.name for group in found]
    if unknown := sorted(set(given.groups) - set(known)):
        raise BenchError(f"bench_groups has {', '.join(unknown)}, which is none of {', '.join(known)}")
    return [group for group in found if not given.groups or group.name in given.groups]


def order(sides: list[Side], number: int, index: int) -> list[Side]:
    """The sides' turns: another one begins in each group and round, and every other round goes backwards."""
    start = (number + index) % len(sides)
    turned = sides[start:] + sides[:start]
    return turned if number % 2 == 0 else turned[::-1]


def _fio(given: Settings, wanted: list[dict[str, Any]]) -> dict[str, Any]:
    return {"do": "fio", "sections": wanted, "seconds": given.section_seconds}
