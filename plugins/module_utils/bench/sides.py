"""The sides of the full benchmark: ways from one guest to files on one store, and what each needs in dom0."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import host
from .settings import FULL, Settings

# How a side's directory comes into the guest: by v9fs, by our FUSE mount, as ext4 on a disk.
V9FS, FUSE, DISK = "v9fs", "fuse", "disk"


@dataclass(frozen=True)
class Side:
    """*served* says by whom: xen9p, floor, qemu or blkback; *device* is the guest's block device."""

    name: str
    how: str
    served: str
    cached: bool = False
    device: str = ""

    @property
    def place(self) -> str:
        """Where it is mounted in the guest."""
        return f"/mnt/{self.name}"


SIDES = (
    Side("ours", V9FS, "xen9p"),
    Side("cached", V9FS, "xen9p", cached=True),
    Side("fuse", FUSE, "xen9p"),
    Side("theirs", V9FS, "qemu"),
    Side("block", DISK, "blkback", device="xvdb"),
    Side("qdisk", DISK, "qemu", device="xvdc"),
    Side("floor", V9FS, "floor"),
)
"""The floor is last: it has no files of its own, and answers reads only."""

FLOOR_UNIT = "xen9p-bench-floor.service"


def chosen(given: Settings) -> list[Side]:
    """The sides of this run, in the order of SIDES."""
    return [side for side in SIDES if side.name in given.sides]


def backends(given: Settings) -> dict[str, list[int]]:
    """Side -> pids of the processes and kernel threads in dom0 that serve it; loop devices' work is nobody's."""
    domid = host.domains()[FULL]
    workers = {item["tag"]: item["pid"] for item in _devices() if item.get("pid")}
    qemu = host.device_model(domid)
    found: dict[str, list[int]] = {}
    for side in chosen(given):
        if side.served == "xen9p":
            pids = [workers[side.name]] if side.name in workers else []
        elif side.served == "qemu":
            pids = [qemu] if qemu else []
        elif side.served == "floor":
            pids = [int(host.run("systemctl", "show", "--property=MainPID", "--value", FLOOR_UNIT).strip() or 0)]
        else:
            pids = _threads(f"{domid}.{side.device}")
        found[side.name] = [pid for pid in pids if pid]
    return found


def _devices() -> list[dict[str, Any]]:
    status = json.loads(host.run("xen9p", "status", "--json"))
    return [item for item in status["devices"] if item["guest"] == FULL]


def _threads(prefix: str) -> list[int]:
    return [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if (folder / "comm").is_file() and _comm(folder).startswith(prefix)
    ]


def _comm(folder: Path) -> str:
    try:
        return (folder / "comm").read_text()
    except OSError:  # it has ended
        return ""
