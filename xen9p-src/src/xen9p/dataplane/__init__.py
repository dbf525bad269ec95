"""The C data plane, as Python sees it.

C takes the messages off the links and answers the hot ones; Python threads take the cold ones from it (server.py). One
DataPlane serves one export to one peer, over any number of rings, or over one byte stream.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from xen9p._dataplane import ffi, lib
from xen9p.codec import Qid
from xen9p.errors import Xen9pError
from xen9p.histogram import BUCKETS, GROUPS, STAGES
from xen9p.users import Range, Users

if TYPE_CHECKING:
    from xen9p.auth import Authenticator

MAX_MSIZE = 1 << 20
"""Largest message in bytes that a stream may agree on; a ring clamps it to half of its half."""
MAX_RATE = 10**12
"""Most that a rate may be, operations or bytes a second."""
_QID = struct.Struct("<BIQ")
_SQUASH = {"": 0, "root": lib.X9_SQUASH_ROOT, "all": lib.X9_SQUASH_ALL}
_STATS = (
    "requests", "read_bytes", "written_bytes", "errors", "fids", "in_flight", "queued",
    "bytes", "throttled", "throttled_us", "read_hits", "read_misses", "hit_bytes", "miss_bytes", "streams",
    "streamed_bytes", "dropped_bytes", "spared_bytes", "shared_bytes", "cache_events_lost",
)  # fmt: skip


class Verdict(IntEnum):
    """Why serving ended."""

    STOPPED = lib.X9_STOPPED
    HANGUP = lib.X9_HANGUP
    PROTOCOL = lib.X9_PROTOCOL
    SYSTEM = lib.X9_SYSTEM


LEAST_WRITE = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may hold at once, and how much it may have done in a second.

    Args:
        max_fids: fids.
        max_queued: requests that wait for a thread or are worked on.
        max_bytes: of these requests and their replies, in memory and in the ring; 0 for 16 of the largest messages.
        ops_per_second: messages; 0 for no limit. What was not used can be used within half a second.
        bytes_per_second: of messages, to and from the peer; 0 for no limit. The same holds.
        max_write: bytes of data in one write, as clients are asked to keep to it with the iounit of files opened for
            writing, from 4096 on; 0 for as much as fits into a message.
        stream_bytes: of one file in a row, from which on they are a stream (streams.c); 0 for never.
        pool_threads: C threads for what may wait, at most 16.
        python_threads: threads for cold messages.
        spin_us: microseconds of looking before sleeping; None for as long as pays on this machine (spin_us()).
        timing: 1 to measure how long messages take, 0 to leave it.

    Raises:
        Xen9pError: a value is out of range.
    """

    max_fids: int = 65536
    max_queued: int = 64
    max_bytes: int = 0
    ops_per_second: int = 0
    bytes_per_second: int = 0
    max_write: int = 0
    stream_bytes: int = 16 << 20
    pool_threads: int = 4
    python_threads: int = 2
    spin_us: int | None = None
    timing: int = 1

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise Xen9pError(f"{name} is {value!r}", f"it is a number from {least} to {most}", errno.EINVAL)
        if 0 < self.max_write < LEAST_WRITE:
            raise Xen9pError(f"max_write is {self.max_write}", f"it is 0, or {LEAST_WRITE} or more", errno.EINVAL)

    def in_c(self) -> Mapping[str, int]:
        """What can be changed while a device serves, as C has it (x9_limits)."""
        return {name: getattr(self, name) for name in _RANGES}


_RANGES: dict[str, tuple[int, int]] = {
    "max_fids": (1, 1 << 24),
    "max_queued": (1, 1 << 20),
    "max_bytes": (0, 1 << 40),
    "ops_per_second": (0, MAX_RATE),
    "bytes_per_second": (0, MAX_RATE),
    "max_write": (0, 1 << 24),
    "stream_bytes": (0, 1 << 40),
}


@dataclass(frozen=True, slots=True)
class Request:
    """A cold message that Python owes a reply."""

    tag: int
    type: int
    raw: bytes
    handle: Any


@dataclass(frozen=True, slots=True)
class Fid:
    """A fid while it is held: path_fd is a descriptor of the file, uid the caller's on the guest."""

    num: int
    path_fd: int
    is_open: bool
    uid: int
    format: int


class Leases:
    """The lease table in a file, which all devices share that serve overlapping directories, in any process (lease.c).

    Args:
        fd: of a file that nobody else writes to, empty the first time; it may be closed afterwards.

    Raises:
        Xen9pError: it is no lease table of this version.
    """

    def __init__(self, fd: int) -> None:
        self._table = lib.x9_leases_open(fd)
        if self._table == ffi.NULL:
            raise Xen9pError(
                f"cannot use the lease table: {os.strerror(ffi.errno)}", "remove it when no device uses it", ffi.errno
            )

    def close(self) -> None:
        """Unmaps it; no device of this process may use it any more."""
        if self._table is not None:
            lib.x9_leases_close(self._table)
            self._table = None

    @property
    def handle(self) -> Any:
        """For DataPlane."""
        return self._table

    def freeze(self) -> None:
        """All clients have to give up what they keep, and get no leases until thaw()."""
        lib.x9_leases_freeze(self._table)

    def owed(self) -> int:
        """How many clients have not done so yet, of those whose term has not run out."""
        return int(lib.x9_leases_owed(self._table))

    def thaw(self) -> None:
        """Clients get leases again."""
        lib.x9_leases_thaw(self._table)

    def recover(self, pid: int) -> int:
        """Undoes what a process was changing when it died; how many changes there were."""
        return int(lib.x9_leases_recover(self._table, pid))

    def pids(self) -> set[int]:
        """The processes that serve devices with this table, dead ones included that nobody has cleaned up after."""
        found = ffi.new("uint32_t[256]")
        return set(ffi.unpack(found, lib.x9_leases_pids(self._table, found, 256)))

    def stats(self) -> Mapping[str, int]:
        """sessions that there are; since the table was made: opened, revoked (buckets, for each client), voided."""
        out = ffi.new("x9_lease_stats *")
        lib.x9_leases_stats(self._table, out)
        return {name: int(getattr(out, name)) for name in ("sessions", "opened", "revoked", "voided")}


Serve = Callable[["DataPlane", Request], None]
"""Answers one cold request, by DataPlane.reply or DataPlane.reply_errno, exactly once."""


class DataPlane:
    """Serves the directory behind root_fd, which it owns, until stopped or the peer goes.

    Args:
        authenticator: of this peer alone; without one it is known already, and need not prove who it is.
        users: what the peer's users are and may; without, they are as they say and their kernel checks.
        origin_fd: a descriptor of the read-only tree that the export was cloned from, which it owns as well: files that
            are unchanged since are read through that one (origin.c). -1: without.

    Raises:
        Xen9pError: out of memory, or root_fd is not usable.
    """

    def __init__(
        self,
        root_fd: int,
        readonly: bool,
        limits: Limits | None = None,
        authenticator: Authenticator | None = None,
        users: Users | None = None,
        *,
        origin_fd: int = -1,
    ) -> None:
        self.limits = limits or Limits()
        self.authenticator = authenticator
        self.readonly = readonly
        self.root_fd = root_fd
        self._origin_fd = origin_fd
        config = ffi.new(
            "x9_config *",
            {
                "root_fd": root_fd,
                "origin_fd": origin_fd,
                "readonly": readonly,
                "max_msize": MAX_MSIZE,
                "limits": self.limits.in_c(),
                "pool_threads": self.limits.pool_threads,
                "spin_us": spin_us() if self.limits.spin_us is None else self.limits.spin_us,
                "timing": self.limits.timing,
            },
        )
        self._dev = lib.x9_dev_new(config)
        if self._dev == ffi.NULL:
            self._close_trees()
            raise Xen9pError("cannot make a device", hint="out of memory or file descriptors")
        self._keep: list[Any] = []
        self._trace_buffer: Any = None
        self._event_buffer: Any = None
        self.users = Users()
        if users is not None:
            try:
                self.set_users(users)
            except Xen9pError:
                self.close()
                raise

    def close(self) -> None:
        """Frees everything; only after run() has returned."""
        if self._dev is not None:
            lib.x9_dev_free(self._dev)
            self._dev = None
            self._keep.clear()
            self._close_trees()

    def _close_trees(self) -> None:
        os.close(self.root_fd)
        if self._origin_fd >= 0:
            os.close(self._origin_fd)

    def set_users(self, users: Users) -> None:
        """What the guest's users are and may, from now on; also those that are attached, and what they have open stays
        open.

        Raises:
            Xen9pError: they are to be checked, and this process may not act as others.
        """
        who = users.identity
        words = [word for uid, gids in users.groups for word in (uid, len(gids), *gids)]
        keep = [_ranges(who.uids), _ranges(who.gids), ffi.new("uint32_t[]", words)]
        given = ffi.new(
            "x9_users *",
            {
                "checks": users.checks,
                "squash": _SQUASH[who.squash],
                "squash_uid": who.uid,
                "squash_gid": who.gid,
                "mapped": bool(who.uids),
                "nuids": len(who.uids),
                "ngids": len(who.gids),
                "ngroups": len(words),
                "uids": keep[0],
                "gids": keep[1],
                "groups": keep[2],
            },
        )
        err = lib.x9_dev_set_users(self._dev, given)
        if err == errno.EPERM:
            raise Xen9pError("cannot act as the guest's users", "run it as root, or with checks by the guest", err)
        if err:
            raise Xen9pError(f"cannot take the guest's users: {os.strerror(err)}", errno=err)
        self.users = users

    def set_leases(self, leases: Leases, term: float, peer: int = 0) -> None:
        """Has what this device changes taken from the clients of others, and gives leases to its own. Before run().

        Args:
            term: for how many seconds a lease session goes on without its client; 0 for no leases.
            peer: a number for who has this device and may have others (a domain's); 0 for somebody who has but this.
        """
        lib.x9_dev_set_leases(self._dev, leases.handle, int(term * 1000), peer)
        self._keep.append(leases)

    # Links.

    def add_stream(self, stream: socket.socket) -> None:
        """Serves a connected SOCK_STREAM socket, Unix or TCP."""
        self._keep.append(stream)
        self._check(lib.x9_dev_add_stream(self._dev, stream.fileno()))

    def add_memory_ring(self, page: Any, data: Any, order: int, wait_fd: int, notify_fd: int) -> None:
        """Serves a ring in memory (transport.memory); page and data are writable buffers."""
        page, data = (
            ffi.from_buffer(page, require_writable=True),
            ffi.from_buffer(data, require_writable=True),
        )
        self._keep += [page, data]
        page, data = ffi.cast("uint8_t *", page), ffi.cast("uint8_t *", data)
        self._check(lib.x9_dev_add_memory_ring(self._dev, page, data, order, wait_fd, notify_fd))

    def open_xen(self) -> None:
        """Opens Xen's grant and event channel devices, so that nothing but mapping is left to do.

        Raises:
            Xen9pError: this is no Xen host, or the caller lacks the right.
        """
        self._check(lib.x9_dev_open_xen(self._dev))

    def add_xen_ring(self, domid: int, ref: int, port: int) -> None:
        """Maps the ring that guest domid granted with ref, and binds its event channel.

        Raises:
            Xen9pError: with errno EPROTO where the guest is to blame.
        """
        self._check(lib.x9_dev_add_xen_ring(self._dev, domid, ref, port))

    def _check(self, err: int) -> None:
        if err:
            raise Xen9pError(self.reason or os.strerror(err), errno=err)

    # Serving.

    def run(self, serve: Serve) -> Verdict:
        """Serves in this thread and a few of its own until the device ends."""
        threads = [
            threading.Thread(target=self._serve_cold, args=(serve,), name=f"cold-{i}", daemon=True)
            for i in range(self.limits.python_threads)
        ]
        for thread in threads:
            thread.start()
        verdict = Verdict(lib.x9_dev_run(self._dev))
        for thread in threads:
            thread.join()
        return verdict

    def _serve_cold(self, serve: Serve) -> None:
        while (handle := lib.x9_next_cold(self._dev)) != ffi.NULL:
            raw = bytes(ffi.buffer(handle.msg, handle.size))
            serve(self, Request(handle.tag, handle.type, raw, handle))

    def stop(self) -> None:
        """Makes run() return STOPPED; callable from any thread."""
        lib.x9_dev_stop(self._dev)

    def fail(self, reason: str) -> None:
        """Makes run() return PROTOCOL: the peer broke the rules."""
        lib.x9_dev_fail(self._dev, reason.encode())

    def set_limits(self, limits: Limits) -> None:
        """Changes what can be changed while it serves; threads, spin_us and timing stay. Callable from any thread."""
        lib.x9_dev_set_limits(self._dev, ffi.new("x9_limits *", limits.in_c()))
        self.limits = limits

    def pause(self, seconds: float) -> None:
        """Has messages wait in the rings, for at most so long (10 s); callable from any thread, also before run()."""
        lib.x9_dev_pause(self._dev, int(seconds * 1000))

    def quiet(self, seconds: float) -> int:
        """Waits at most so long for what a paused device does to its files to end; how much is left, 0 for nothing."""
        return int(lib.x9_dev_quiet(self._dev, int(seconds * 1000)))

    def resume(self) -> bool:
        """Ends a pause. False: it was over already, and messages have been taken since."""
        return bool(lib.x9_dev_resume(self._dev))

    def reply(self, request: Request, message: bytes) -> None:
        """Sends the reply of a cold request; ends the request."""
        lib.x9_reply(self._dev, request.handle, message, len(message))

    def reply_errno(self, request: Request, err: int) -> None:
        """Sends Rlerror for a cold request; ends the request."""
        lib.x9_reply_errno(self._dev, request.handle, err)

    # Files.

    @contextmanager
    def fid(self, num: int) -> Iterator[Fid]:
        """Holds a fid: no Tclunk closes its descriptor meanwhile.

        Raises:
            OSError: EBADF, there is no such fid.
        """
        ref = lib.x9_fid_get(self._dev, num)
        if ref == ffi.NULL:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            yield Fid(num, ref.path_fd, ref.io_fd >= 0, ref.uid, ref.format)
        finally:
            lib.x9_fid_put(ref)

    def attach(self, num: int, uid: int) -> None:
        """Makes num a fid of the export's root for the guest's uid."""
        _raise(lib.x9_fid_attach(self._dev, num, uid))

    def auth_new(self, num: int, challenge: bytes) -> None:
        """Makes num a fid from which a challenge is read, and to which its response is written.

        Raises:
            OSError: EMFILE, there are too many of them; EINVAL, num is in use.
        """
        assert len(challenge) == lib.X9_CHALLENGE
        _raise(lib.x9_auth_new(self._dev, num, challenge))

    def auth_take(self, num: int) -> tuple[bytes, bytes]:
        """The challenge and the response of such a fid, once.

        Raises:
            OSError: EBADF, it is none; EKEYREJECTED, it was taken before, or the response is not complete.
        """
        challenge, response = ffi.new("uint8_t[]", lib.X9_CHALLENGE), ffi.new("uint8_t[]", lib.X9_RESPONSE)
        _raise(lib.x9_auth_take(self._dev, num, challenge, response))
        return bytes(challenge), bytes(response)

    def clunk(self, num: int) -> None:
        """Gives a fid back. Raises OSError, EBADF."""
        _raise(lib.x9_fid_clunk(self._dev, num))

    @contextmanager
    def acting(self, uid: int) -> Iterator[None]:
        """This thread has the rights of a user of the guest's, by the guest's number.

        Raises:
            OSError: EPERM, the process may not.
        """
        _raise(lib.x9_act_as(self._dev, uid))
        yield

    @contextmanager
    def making(self, parent: Fid, gid: int) -> Iterator[Callable[[int], None]]:
        """What this thread makes in a directory belongs to the fid's user and a group of the guest's, by the guest's
        number, as far as they may. What is given is a function to be called with a descriptor of what was made.

        Raises:
            OSError: EOVERFLOW, one of them has no number on the host.
        """
        give = ffi.new("uint32_t *")
        _raise(lib.x9_act_to_make(self._dev, parent.uid, gid, give))
        try:
            yield lambda fd: _raise(lib.x9_give_group(parent.path_fd, fd, give[0]))
        finally:
            lib.x9_act_done(self._dev)

    def qid(self, fd: int) -> Qid:
        """The qid of the file behind a descriptor."""
        raw = ffi.new("uint8_t[13]")
        _raise(lib.x9_qid(self._dev, fd, raw))
        return Qid(*_QID.unpack(bytes(raw)))

    @contextmanager
    def located(self, fd: int) -> Iterator[tuple[int, bytes]]:
        """A file's directory (an O_PATH descriptor) and its name there, checked to lead to this very file.

        Raises:
            OSError: ESTALE, it has no name any more; EBUSY, it is the export's root.
        """
        name = ffi.new("char[256]")
        directory = lib.x9_locate(self._dev, fd, name)
        _raise(-directory if directory < 0 else 0)
        try:
            yield directory, ffi.string(name)
        finally:
            os.close(directory)

    # To be seen.

    @property
    def reason(self) -> str:
        """Why the device ended, or could not start."""
        return str(ffi.string(lib.x9_dev_reason(self._dev)).decode(errors="replace"))

    @property
    def order(self) -> int:
        """Ring order: each ring has 2^order data pages."""
        return int(lib.x9_dev_order(self._dev))

    def stats(self) -> Mapping[str, int]:
        """Counters since the start: requests, read_bytes, written_bytes, errors, throttled (messages), throttled_us;
        and now: fids, in_flight, queued, bytes (that those in flight bind).
        """
        out = self._stats()
        return {name: int(getattr(out, name)) for name in _STATS}

    def stats_by_type(self) -> Mapping[int, int]:
        """How many messages of each type have come."""
        out = self._stats()  # held: by_type alone does not keep its memory
        return {kind: int(count) for kind, count in enumerate(out.by_type) if count}

    def lease_stats(self) -> Mapping[str, int]:
        """sessions (1 or 0); since the start: revocations (buckets that its client was told to give up), voided
        (sessions of its client), waits (changes that waited for other clients) and waited_us.
        """
        out = ffi.new("x9_lease_counts *")
        lib.x9_dev_lease_stats(self._dev, out)
        return {n: int(getattr(out, n)) for n in ("sessions", "revocations", "voided", "waits", "waited_us")}

    def errnos(self) -> Mapping[int, int]:
        """How often each errno has been answered; 0 stands for those beyond Linux's own."""
        out = ffi.new("uint64_t[]", lib.X9_ERRNOS)
        lib.x9_dev_errnos(self._dev, out)
        return {number: int(count) for number, count in enumerate(out) if count}

    def times(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """Where messages have spent their time: by group and stage (histogram.GROUPS, .STAGES), each with "counts"
        (a list of histogram.BUCKETS) and "seconds" (of all together). What has not come is left out.
        """
        counts = ffi.new("uint64_t[]", lib.X9_GROUPS * lib.X9_STAGES * lib.X9_BUCKETS)
        ns = ffi.new("uint64_t[]", lib.X9_GROUPS * lib.X9_STAGES)
        lib.x9_dev_times(self._dev, counts, ns)
        every = ffi.unpack(counts, len(counts))
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for i, (group, stage) in enumerate((g, s) for g in GROUPS for s in STAGES):
            mine = every[i * BUCKETS : (i + 1) * BUCKETS]
            if any(mine):
                found.setdefault(group, {})[stage] = {"counts": mine, "seconds": ns[i] / 1e9}
        return found

    def trace_start(self, data: int) -> None:
        """Begins to mirror messages for trace_read(), with at most data bytes of file data each.

        Raises:
            OSError: EBUSY, it is being traced.
        """
        if self._trace_buffer is None:
            self._trace_buffer = ffi.new("uint8_t[]", 2 * lib.X9_TRACE_BUFFER)
        _raise(lib.x9_trace_start(self._dev, max(0, data)))

    def trace_stop(self) -> None:
        """Ends the trace."""
        lib.x9_trace_stop(self._dev)

    def trace_read(self) -> bytes:
        """The records that are there, for records.unpack(); b"" if there are none. For one thread at a time."""
        size = lib.x9_trace_read(self._dev, self._trace_buffer, len(self._trace_buffer))
        return bytes(ffi.buffer(self._trace_buffer, size))

    @property
    def trace_dropped(self) -> int:
        """How many messages did not fit into the queue since trace_start()."""
        return int(lib.x9_trace_dropped(self._dev))

    # For a caching policy (cache_policy.py).

    def events_want(self, kinds: int) -> None:
        """From now on these kinds of events (X9_SAW_*, together) are kept for events_read(); 0 for none."""
        if self._event_buffer is None:
            self._event_buffer = ffi.new("uint8_t[]", lib.X9_EVENT_BUFFER)
        lib.x9_events_want(self._dev, kinds)

    def events_read(self) -> bytes:
        """The events that are there, for cache_policy.unpack(); b"" if there are none. For one thread at a time."""
        if self._event_buffer is None:
            return b""
        size = lib.x9_events_read(self._dev, self._event_buffer, len(self._event_buffer))
        return bytes(ffi.buffer(self._event_buffer, size))

    def ahead_open(self, path: bytes) -> int:
        """A descriptor of a file or directory beneath the export, to read ahead of: of its origin's, if that has it
        unchanged.

        Raises:
            OSError: ENOENT, ELOOP (there is a link on the way), EPERM (it is neither), ...
        """
        fd = int(lib.x9_ahead_open(self._dev, path))
        _raise(-fd if fd < 0 else 0)
        return fd

    def _stats(self) -> Any:
        out = ffi.new("x9_stats *")
        lib.x9_dev_stats(self._dev, out)
        return out


@functools.cache
def spin_us() -> int:
    """For how many microseconds looking for work is worth while here: a few times what waking a thread takes.

    Measured at the first call.
    """
    return int(lib.x9_spin_us())


def fd_path(fd: int) -> bytes:
    """A path to the file behind a descriptor, whatever its name is by now, for calls that want a path."""
    path = ffi.new("char[32]")
    lib.x9_fd_path(fd, path)
    return bytes(ffi.string(path))


def read_ahead(fd: int, offset: int, length: int) -> int:
    """Has the kernel begin to read a stretch of a file; how many bytes of it were not in the page cache.

    Raises:
        OSError: as mmap(2), mincore(2), posix_fadvise(2).
    """
    missing = int(lib.x9_ahead(fd, offset, length))
    _raise(-missing if missing < 0 else 0)
    return missing


def await_read(fd: int, offset: int) -> None:
    """Waits until that byte of a file is in the page cache. Raises OSError: EIO, ..."""
    _raise(lib.x9_ahead_wait(fd, offset))


def drop(fd: int, offset: int, length: int) -> None:
    """Gives a stretch of a file out of the page cache, as far as it is clean. Raises OSError."""
    _raise(-int(lib.x9_drop(fd, offset, length)))


def idle_io() -> None:
    """What this thread reads from now on gives way to what others read. Raises OSError."""
    _raise(lib.x9_idle_io())


def link_fd(fd: int, directory: int, name: bytes) -> None:
    """linkat(2) of an open file."""
    _raise(lib.x9_link_fd(fd, directory, name))


def _ranges(ranges: tuple[Range, ...]) -> Any:
    return ffi.new("x9_range[]", list(ranges))


def keep_capabilities() -> None:
    """Has a change of user change no capabilities by itself. Call before any thread starts."""
    _raise(lib.x9_keep_capabilities())


def _raise(err: int) -> None:
    if err:
        raise OSError(err, os.strerror(err))
