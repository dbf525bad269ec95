"""Which copies of file data each way makes, from the code that does them: Linux 6.1, QEMU 7.2, this package.

How many bytes went through the ring, and how many the program moved, is measured; how often they were copied is known
from here. Nothing else of this is measured. Pages that move by DMA, or change hands by being mapped, are no copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RING, PROGRAM = "ring", "program"
"""What a copy is of: the bytes that go through the ring, or those that the program asks for or gives."""


@dataclass(frozen=True)
class Copy:
    """One copy: who makes it, from where to where, of which bytes, and where in whose code. *grant*: by Xen."""

    by: str
    what: str
    of: str
    code: str
    grant: bool = False


_V9FS_READ = (
    Copy("dom0's worker", "page cache to ring", RING, "xen9p, dataplane: preadv2"),
    Copy("guest's 9pnet_xen", "ring to reply", RING, "net/9p/trans_xen.c: xen_9pfs_read_packet"),
)
_V9FS_WRITE = (
    Copy("guest's 9pnet_xen", "request to ring", RING, "net/9p/trans_xen.c: xen_9pfs_write_packet"),
    Copy("dom0's worker", "ring to page cache", RING, "xen9p, dataplane: pwritev2"),
)
_FILL = Copy("guest's 9p", "reply to page cache", RING, "net/9p/client.c: p9_client_read_once")
_TAKE = Copy("guest's 9p", "page cache to request", RING, "net/9p/protocol.c: p9pdu_vwritef")
_TO_READER = Copy("guest's kernel", "page cache to program", PROGRAM, "mm/filemap.c: filemap_read")
_FROM_WRITER = Copy("guest's kernel", "program to page cache", PROGRAM, "mm/filemap.c: generic_perform_write")
_BOUNCE_READ = Copy("guest's blkfront", "granted page to page cache", RING, "xen-blkfront.c: blkif_copy_from_grant")
_BOUNCE_WRITE = Copy("guest's blkfront", "page cache to granted page", RING, "xen-blkfront.c: blkif_setup_rw_req_grant")

_READ: dict[str, tuple[Copy, ...]] = {
    "ours": (
        *_V9FS_READ,
        Copy("guest's 9p", "reply to program", RING, "net/9p/client.c: p9_client_read_once"),
    ),
    "cached": (*_V9FS_READ, _FILL, _TO_READER),
    "fuse": (
        Copy("dom0's worker", "page cache to ring", RING, "xen9p, dataplane: preadv2"),
        Copy("guest's xen9p", "ring to buffer", RING, "xen9p, dataplane: x9_front_recv"),
        Copy("guest's xen9p", "buffer to message", RING, "xen9p, transport/ring_front.py"),
        Copy("guest's xen9p", "message to data", RING, "xen9p, codec.py"),
        Copy("guest's FUSE", "data to program", RING, "fs/fuse/dev.c: fuse_dev_do_write (direct_io)"),
    ),
    "block": (
        Copy("dom0's loop", "image's page cache to granted page", RING, "drivers/block/loop.c: lo_rw_aio"),
        _TO_READER,
    ),
    "qdisk": (
        Copy("dom0's QEMU", "image's page cache to buffer", RING, "hw/block/dataplane/xen-block.c: blk_aio_preadv"),
        Copy("Xen", "buffer to granted page", RING, "xen_device_copy_grant_refs", grant=True),
        _TO_READER,
    ),
}
_WRITE: dict[str, tuple[Copy, ...]] = {
    "ours": (
        Copy("guest's 9p", "program to request", RING, "net/9p/protocol.c: p9pdu_vwritef"),
        *_V9FS_WRITE,
    ),
    "cached": (_FROM_WRITER, _TAKE, *_V9FS_WRITE),
    "fuse": (
        Copy("guest's FUSE", "program to data", RING, "fs/fuse/dev.c: fuse_dev_do_read (direct_io)"),
        Copy("guest's xen9p", "data to message", RING, "xen9p, codec.py"),
        Copy("guest's xen9p", "message to ring", RING, "xen9p, dataplane: x9_front_send"),
        Copy("dom0's worker", "ring to page cache", RING, "xen9p, dataplane: pwritev2"),
    ),
    "block": (
        _FROM_WRITER,
        Copy("dom0's loop", "granted page to image's page cache", RING, "drivers/block/loop.c: lo_rw_aio"),
    ),
    "qdisk": (
        _FROM_WRITER,
        Copy("Xen", "granted page to buffer", RING, "xen_device_copy_grant_refs", grant=True),
        Copy("dom0's QEMU", "buffer to image's page cache", RING, "hw/block/dataplane/xen-block.c: blk_aio_pwritev"),
    ),
}
_DIRECTIONS = {
    "read-4k-cold": _READ,
    "read-4k-warm": _READ,
    "read-seq": _READ,
    "mmap-read": _READ,
    "write-seq": _WRITE,
    "create": _WRITE,
}


def copies(workload: str, side: str, bounced: bool) -> Sequence[Copy]:
    """The copies of a workload's file data; none where it moves names and attributes only.

    *bounced*: whether blkfront copies into pages that stay granted: both ends have agreed on persistent grants, or it
    does not trust the backend.
    """
    table = _DIRECTIONS.get(workload)
    if table is None:
        return ()
    found = list(table[side])
    if bounced and side in {"block", "qdisk"}:
        # Between the guest's page cache and what dom0 can reach.
        found.insert(1, _BOUNCE_READ if table is _READ else _BOUNCE_WRITE)
    if workload == "mmap-read":
        # What is mapped is read where it is.
        found = [copy for copy in found if copy.of == RING]
    return found


def copied(workload: str, side: str, bounced: bool, ring_bytes: float, program_bytes: float) -> float:
    """How many bytes are copied, by whomever."""
    return sum(ring_bytes if c.of == RING else program_bytes for c in copies(workload, side, bounced))
