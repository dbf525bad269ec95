"""What is counted while a side does a piece of work, and what the raw numbers of guest, dom0 and Xen say together.

A figure is exact for what it names, or left out with the reason. Where two sources know the same thing independently,
both are kept: *checks*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import xentrace
from .settings import FULL
from .sides import DISK, FUSE, V9FS, Side
from .tracefs import Event, Row

# ioctl IOCTL_EVTCHN_NOTIFY of xen/evtchn.h, as a histogram shows it.
NOTIFY = "44504"
_IO = ("preadv", "pwritev", "pread64", "pwrite64", "preadv2", "pwritev2", "io_submit", "fsync", "fdatasync")

DOM0_EVENTS = (
    Event("notify", "notify_remote_via_irq", "irq", fetch="irq=%di:s32"),
    Event("evtchn", "evtchn_ioctl", "cmd.hex,common_pid", fetch="cmd=%si:x32"),
    Event("copied", "gnttab_batch_copy", "common_pid", "grants", "grants=%si:u32"),
    Event("mapped", "gnttab_map_refs", "common_pid", "grants", "grants=%cx:u32"),
    Event("extent", "btrfs_get_extent", "common_pid"),
    Event("chunk", "__btrfs_map_block", "common_pid"),
    Event("issued", "block/block_rq_issue", "dev,rwbs,common_pid", "nr_sector"),
    Event("switched", "sched/sched_switch", "prev_pid"),
    *(Event(name, f"syscalls/sys_enter_{name}", "common_pid") for name in _IO),
)
GUEST_EVENTS = (
    Event("walk", "p9_client_walk", "names", fetch="names=%si:u16"),
    Event("message", "9p/9p_client_req", "type"),
    Event("request", "p9_xen_request", "common_pid"),
    Event("notify", "notify_remote_via_irq", "irq", fetch="irq=%di:s32"),
    Event("evtchn", "evtchn_ioctl", "cmd.hex,common_pid", fetch="cmd=%si:x32"),
    Event("fuse", "fuse_dev_do_write", "common_pid"),
    Event("lookup", "ext4_lookup", "common_pid"),
    Event("map", "ext4_map_blocks", "common_pid"),
    Event("bio", "block/block_bio_queue", "dev", "nr_sector"),
    Event("issued", "block/block_rq_issue", "dev,rwbs", "nr_sector"),
)
# Messages that name no fid, by number (Tversion, Tflush), and by name.
_NO_FID = {"100", "108", "Tversion", "Tflush"}


@dataclass(frozen=True)
class Raw:
    """One count: what was read on both sides, before and after; rows as tracefs.Counting.read() has them.

    *irqs*: number -> name, and how many came. *messages*: type -> how many, as the worker counts. *blkback*: its
    statistics. *threads*: of the backend. *kernel*: dom0's kernel threads, which read and write for loop devices, and
    write back for everybody. *calls*: hypercalls between the marks, or why there are none.
    """

    guest_rows: Mapping[str, Sequence[Row]]
    dom0_rows: Mapping[str, Sequence[Row]]
    guest_irqs: Mapping[str, tuple[str, int]]
    dom0_irqs: Mapping[str, tuple[str, int]]
    guest_switches: int
    own_switches: int
    backend_seconds: float
    threads: frozenset[int]
    kernel: frozenset[int]
    disk: int
    loop: int
    store: int
    domain: int
    messages: Mapping[str, int] = field(default_factory=dict)
    file_bytes: int = 0
    blkback: Mapping[str, int] = field(default_factory=dict)
    calls: Sequence[xentrace.Call] | str = ""
    missing: Mapping[str, str] = field(default_factory=dict)


class Figures:
    """Counts by name, second opinions on some of them, and what could not be counted with the reason."""

    def __init__(self, missing: Mapping[str, str]) -> None:
        self.counts: dict[str, int] = {}
        self.checks: dict[str, list[int]] = {}
        self.left_out: dict[str, str] = {}
        self._missing = missing

    def add(self, name: str, value: int, sources: Iterable[str] = (), check: int | None = None) -> None:
        """A count that comes from some events; left out if this kernel lacks one of them."""
        for source in sources:
            if why := self._missing.get(source):
                self.left_out[name] = why
                return
        self.counts[name] = value
        if check is not None:
            self.checks[name] = [value, check]

    def omit(self, name: str, why: str) -> None:
        """A count that nothing here tells."""
        self.left_out[name] = why


def figures(side: Side, raw: Raw) -> Figures:
    """What the raw numbers say."""
    found = Figures(raw.missing)
    _ring(side, raw, found)
    _notifications(side, raw, found)
    _xen(raw, found)
    backend = hits(raw.dom0_rows, "switched", raw.threads, "prev_pid")
    # Threads that have ended took their own counters with them.
    found.add("switches_backend", backend, ["dom0 switched"], raw.own_switches)
    told = None if isinstance(raw.calls, str) else xentrace.grants(raw.calls, 0)
    for name, event, served, kind in (
        ("grants_copied", "copied", "qemu", "copy"),
        ("grants_mapped", "mapped", "blkback", "map_grant_ref"),
    ):
        # Xen does not tell whose grants they are; between the marks netback has none to copy or map.
        check = told.get(kind, 0) if told is not None and side.served == served else None
        found.add(name, sums(raw.dom0_rows, event, raw.threads, "grants"), [f"dom0 {event}"], check)
    found.add("backend_us", round(raw.backend_seconds * 1e6))
    found.add("file_system_calls", sum(hits(raw.dom0_rows, name, raw.threads) for name in _IO))
    store = [row for row in _of_device(raw.dom0_rows, raw.store) if int(row["common_pid"]) in raw.threads | raw.kernel]
    found.add("store_requests", sum(row["hits"] for row in store), ["dom0 issued"])
    found.add("store_bytes", 512 * sum(row["nr_sector"] for row in store), ["dom0 issued"])
    _bytes(side, raw, found)
    return found


def _ring(side: Side, raw: Raw, found: Figures) -> None:
    if side.how == DISK:
        taken = sum(raw.blkback.get(name, 0) for name in ("rd_req", "wr_req", "f_req", "ds_req"))
        check = taken if side.served == "blkback" else None
        issued = sum(row["hits"] for row in _of_device(raw.guest_rows, raw.disk))
        found.add("requests", issued, ["guest issued"], check)
    elif side.how == V9FS:
        found.add("requests", hits(raw.guest_rows, "request"), ["guest request"], sum(raw.messages.values()))
    else:
        found.add("requests", sum(raw.messages.values()))
        found.add("fuse_requests", hits(raw.guest_rows, "fuse"), ["guest fuse"])


def _notifications(side: Side, raw: Raw, found: Figures) -> None:
    there, here = frontend(side), backend(side)
    came_here = sum(count for name, count in raw.dom0_irqs.values() if name.startswith(here))
    came_there = sum(count for name, count in raw.guest_irqs.values() if name.startswith(there))
    if side.how == FUSE:
        by_guest = sum(row["hits"] for row in raw.guest_rows.get("evtchn", []) if row["cmd"] == NOTIFY)
        found.add("sent_by_guest", by_guest, ["guest evtchn"], came_here)
    else:
        by_guest = _sent(raw.guest_rows, raw.guest_irqs, there)
        found.add("sent_by_guest", by_guest, ["guest notify"], came_here)
    if side.served == "blkback":
        found.add("sent_by_dom0", _sent(raw.dom0_rows, raw.dom0_irqs, here), ["dom0 notify"], came_there)
    else:
        mine = [row for row in raw.dom0_rows.get("evtchn", []) if int(row["common_pid"]) in raw.threads]
        by_dom0 = sum(row["hits"] for row in mine if row["cmd"] == NOTIFY)
        found.add("sent_by_dom0", by_dom0, ["dom0 evtchn"], came_there)


def _sent(rows: Mapping[str, Sequence[Row]], irqs: Mapping[str, tuple[str, int]], prefix: str) -> int:
    wanted = {number for number, (name, _) in irqs.items() if name.startswith(prefix)}
    return sum(row["hits"] for row in rows.get("notify", []) if row["irq"] in wanted)


def frontend(side: Side) -> str:
    """What the guest's interrupts of a side are called."""
    return {V9FS: "xen_9pfs-frontend", FUSE: "evtchn:xen9p", DISK: "blkif"}[side.how]


def backend(side: Side) -> str:
    """What dom0's interrupts of a side are called; a process's name has 15 characters at most."""
    if side.served == "xen9p":
        return "evtchn:" + f"x9 {FULL}/{side.name}"[:15]
    return "blkif-backend" if side.served == "blkback" else "evtchn:xen-qemu"


def _xen(raw: Raw, found: Figures) -> None:
    names = ("hypercalls_guest", "hypercalls_dom0", "switches_dom0")
    if isinstance(raw.calls, str):
        for name in names:
            found.omit(name, raw.calls)
        found.add("switches_guest", raw.guest_switches)
        return
    guest, dom0 = (xentrace.by_name(raw.calls, domain) for domain in (raw.domain, 0))
    found.add("hypercalls_guest", sum(guest.values()))
    found.add("hypercalls_dom0", sum(dom0.values()))
    # A paravirtualised kernel tells Xen of each switch which stack comes next.
    found.add("switches_guest", raw.guest_switches, check=guest.get("stack_switch", 0))
    found.add("switches_dom0", dom0.get("stack_switch", 0))


def _bytes(side: Side, raw: Raw, found: Figures) -> None:
    if side.how == DISK:
        sectors = sum(row["nr_sector"] for row in _of_device(raw.guest_rows, raw.disk))
        taken = raw.blkback.get("rd_sect", 0) + raw.blkback.get("wr_sect", 0)
        check = 512 * taken if side.served == "blkback" else None
        found.add("ring_bytes", 512 * sectors, ["guest issued"], check)
    else:
        found.add("ring_bytes", raw.file_bytes)


def steps(side: Side, raw: Raw) -> list[dict[str, Any]]:
    """How often each step of the path (`xen9p path`) was gone: from, to, by whom, count, and the event that is counted.

    A count is None, with "why", where nothing tells.
    """
    walked = [row for row in raw.guest_rows.get("walk", []) if row["names"] != "0"]
    issued = _of_device(raw.guest_rows, raw.disk)
    bios = [row for row in raw.guest_rows.get("bio", []) if row["dev"] == str(raw.disk)]
    mapped = hits(raw.guest_rows, "map")
    found: list[tuple[str, str, str, int, str, str]] = []
    if side.how == DISK:
        looked = hits(raw.guest_rows, "lookup")
        found += [
            ("path", "guest inode", "guest's ext4", looked, "ext4_lookup", "guest lookup"),
            ("file offset", "file block", "guest's page cache", mapped, "ext4_map_blocks", "guest map"),
            ("file block", "guest filesystem block", "guest's ext4", mapped, "ext4_map_blocks", "guest map"),
        ]
        made = sum(row["hits"] for row in bios)
        sent = sum(row["hits"] for row in issued)
        block = "guest's block layer"
        found.append(("guest filesystem block", "virtual disk sector", block, made, "block_bio_queue", "guest bio"))
        found.append(("virtual disk sector", "ring", "guest's blkfront", sent, "block_rq_issue", "guest issued"))
        if side.served == "blkback":
            taken = sum(raw.blkback.get(name, 0) for name in ("rd_req", "wr_req", "f_req", "ds_req"))
            looped = sum(row["hits"] for row in _of_device(raw.dom0_rows, raw.loop))
            found.append(("ring", "loop device byte", "dom0's blkback", taken, "statistics/*_req", ""))
            found.append(("loop device byte", "image offset", "dom0's loop", looped, "block_rq_issue", "dom0 issued"))
        else:
            files = sum(hits(raw.dom0_rows, name, raw.threads) for name in _IO)
            found.append(("ring", "image offset", "dom0's QEMU", files, "its system calls on files", ""))
    else:
        sent = sum(raw.messages.values())
        named = sum(count for name, count in raw.messages.items() if name not in _NO_FID)
        if side.how == V9FS:
            walks = sum(row["hits"] for row in walked)
            found.append(("path", "fid", "guest's v9fs", walks, "p9_client_walk with names", "guest walk"))
        else:
            walks = raw.messages.get("Twalk", 0)
            found.append(("path", "fid", "guest's xen9p", walks, "Twalk, of the worker's metrics", ""))
        found.append(("9P request", "ring", "guest's client", sent, "requests of the worker's metrics", ""))
        found.append(("fid", "inode", "dom0's worker", named, "requests that name a fid, of the metrics", ""))
    space = "file offset" if side.how != DISK else "image offset"
    extents, chunks = (hits(raw.dom0_rows, event, raw.threads | raw.kernel) for event in ("extent", "chunk"))
    found.append((space, "store address", "dom0's btrfs", extents, "btrfs_get_extent", "dom0 extent"))
    found.append(("store address", "device byte", "dom0's btrfs", chunks, "__btrfs_map_block", "dom0 chunk"))
    steps: list[dict[str, Any]] = []
    for source, target, by, count, event, needs in found:
        why = raw.missing.get(needs)
        step = {"from": source, "to": target, "by": by, "event": event, "count": None if why else count}
        steps.append(step | ({"why": why} if why else {}))
    return steps


def hits(
    rows: Mapping[str, Sequence[Row]], event: str, pids: frozenset[int] | None = None, key: str = "common_pid"
) -> int:
    """How often an event came; with *pids*, in these threads."""
    return sum(row["hits"] for row in rows.get(event, []) if pids is None or int(row[key]) in pids)


def sums(rows: Mapping[str, Sequence[Row]], event: str, pids: frozenset[int], value: str) -> int:
    """The sum of an event's value in these threads."""
    return sum(row[value] for row in rows.get(event, []) if int(row["common_pid"]) in pids)


def kernel_number(major: int, minor: int) -> int:
    """A block device's number as the kernel has it within itself, and in its events: 20 bits of minor."""
    return major << 20 | minor


def _of_device(rows: Mapping[str, Sequence[Row]], number: int) -> list[Row]:
    return [row for row in rows.get("issued", []) if row["dev"] == str(number)]
