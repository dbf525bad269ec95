"""Runs a device's caching policy: hands it events, and does what its hints say, within a budget.

Two threads of the worker: one for the policy, one for reading ahead, which waits for the disk. Both act as the server,
on files beneath the export alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from xen9p import cache_policy
from xen9p.cache_policy import CachePolicy, Drop, Event, Forget, Hint, Prefetch, Pressure, Remember, Streams, Tick
from xen9p.dataplane import DataPlane, Limits, await_read, drop, idle_io, read_ahead
from xen9p.errors import Xen9pError, describe
from xen9p.prefetch import MOST_BYTES, MOST_FILES, Profile, is_plain
from xen9p.prefetch import load as load_profile

log = logging.getLogger(__name__)

TICK: Final = 0.1
SECOND: Final = 1.0
WINDOW_BYTES: Final = 4 << 20
"""What may be under way to the disk at once: more would make the guest's own reads wait."""
WINDOW_FILES: Final = 16
MOST_HINTS: Final = 2 * MOST_FILES
"""That wait; further ones are dropped and counted."""
MOST_ENTRIES: Final = 10_000
"""Of a directory that is read ahead."""
TIGHT: Final = 16
"""When less than this part of the host's memory is available, nothing is read ahead: it would push out what is used."""
REFILL_FILES: Final = 50.0
REFILL_BYTES: Final = float(8 << 20)
QUIET: Final = 15.0
"""Seconds without a new file after which a boot is over."""
MEMINFO: Final = "/proc/meminfo"


class Budget:
    """How much may be read ahead: a whole profile at once, and then so much a second."""

    def __init__(self, files: float, size: float, now: float) -> None:
        self._most = files, size
        self.files, self.size = files, size
        self._at = now

    def take(self, files: int, size: int, now: float) -> bool:
        """Takes it, if it is there."""
        passed, self._at = max(0.0, now - self._at), now
        self.files = min(self._most[0], self.files + passed * REFILL_FILES)
        self.size = min(self._most[1], self.size + passed * REFILL_BYTES)
        if files > self.files or size > self.size:
            return False
        self.files -= files
        self.size -= size
        return True


class Memory:
    """How much memory the host has and could give, from a descriptor of /proc/meminfo that was opened in time."""

    def __init__(self) -> None:
        try:
            self._fd = os.open(MEMINFO, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def look(self) -> Pressure | None:
        """As it is now; None if that cannot be told."""
        try:
            lines = os.pread(self._fd, 4096, 0).decode().splitlines()
            found = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines[:8])}
            return Pressure(found["MemAvailable"], found["MemTotal"])
        except (OSError, KeyError, ValueError, IndexError):
            return None

    def close(self) -> None:
        """Gives the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class CacheRunner:
    """The caching of one device.

    Args:
        remember: called with a profile that the policy wants to be kept, from a thread of ours.
    """

    def __init__(
        self, device: DataPlane, policy: CachePolicy, memory: Memory, remember: Callable[[Profile], None]
    ) -> None:
        self._device = device
        self._policy = policy
        self._memory = memory
        self._remember = remember
        self._budget = Budget(MOST_FILES, MOST_BYTES, time.monotonic())
        self._hints: deque[Prefetch | Drop] = deque()
        self._lock = threading.Condition()  # of the hints, of what is counted, and of the end
        self._over = self._learn = False
        self._awake = threading.Event()
        self._counts = dict.fromkeys(
            ("ahead_files", "ahead_bytes", "there_bytes", "ahead_gone", "ahead_refused", "dropped_hints"), 0
        )
        self._seconds = 0.0
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("cache", self._run), ("ahead", self._read))
        ]

    def start(self) -> None:
        """Begins; before the guest has sent anything."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends, and waits for that; to be called before the device is closed."""
        with self._lock:
            self._over = True
            self._lock.notify_all()
        self._awake.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._device.events_want(0)
        self._memory.close()

    def learn(self) -> None:
        """Has the policy learn anew from now on."""
        self._learn = True  # the policy is its thread's
        self._awake.set()

    def report(self) -> dict[str, Any]:
        """What was read ahead, in files and bytes, and what the policy says of its gains."""
        with self._lock:
            counts: dict[str, Any] = {**self._counts, "waiting_hints": len(self._hints)}
        counts["ahead_seconds"] = round(self._seconds, 3)
        with contextlib.suppress(Exception):  # of somebody else's module
            counts["gains"] = {str(name): int(value) for name, value in self._policy.gains().items()}
        return counts

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a policy may be somebody else's; the guest is served on without it
            log.error("caching ends: %s", describe(error))
            self._device.events_want(0)

    # The policy.

    def _run(self) -> None:
        self._take(self._policy.begin())
        looked = 0.0
        while not self._over:
            wants = self._policy.wants()
            self._device.events_want(cache_policy.mask(wants))
            self._awake.wait(None if not wants else TICK if Tick in wants else SECOND)
            self._awake.clear()
            if self._learn:
                self._learn = False
                self._policy.learn()
                self._device.events_want(cache_policy.mask(self._policy.wants()))
            now = time.monotonic()
            batch: list[Event] = []
            while data := self._device.events_read():
                batch += cache_policy.unpack(data)
            if Pressure in wants and now - looked >= SECOND and (pressure := self._memory.look()):
                looked = now
                batch.append(pressure)
            if Tick in wants:
                batch.append(Tick())
            if batch:
                self._take(self._policy.events(batch, now))

    def _take(self, hints: Iterable[Hint]) -> None:
        for hint in hints:
            match hint:
                case Remember(profile):
                    self._remember(profile)
                case Streams(length):
                    self._set_streams(length)
                case Forget():
                    with self._lock:
                        self._hints.clear()
                case Prefetch() | Drop():
                    with self._lock:
                        if len(self._hints) >= MOST_HINTS:
                            self._counts["dropped_hints"] += 1
                        else:
                            self._hints.append(hint)
                            self._lock.notify_all()

    def _set_streams(self, length: int) -> None:
        with contextlib.suppress(Xen9pError):  # out of range: as it was
            self._device.set_limits(replace(self._device.limits, stream_bytes=length))

    # Reading ahead.

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            idle_io()
        window: deque[tuple[int, int, int]] = deque()  # descriptor, last byte, bytes; a descriptor's last one closes it
        try:
            while True:
                hint = self._next(wait=not window)
                began = time.monotonic()
                if hint is None and not window:
                    return
                if isinstance(hint, Drop):
                    self._drop(hint)
                elif hint is not None:
                    self._ahead(hint, window)
                while window and (
                    hint is None or len(window) >= WINDOW_FILES or sum(size for _, _, size in window) >= WINDOW_BYTES
                ):
                    fd, last, _ = window.popleft()
                    with contextlib.suppress(OSError):
                        await_read(fd, last)
                    os.close(fd)
                self._seconds += time.monotonic() - began
        finally:
            for fd, _, _ in window:
                os.close(fd)

    def _next(self, *, wait: bool) -> Prefetch | Drop | None:
        """The next hint; None when there is none now, or if it waits, at the end."""
        with self._lock:
            while wait and not self._over and not self._hints:
                self._lock.wait()
            return self._hints.popleft() if self._hints and not self._over else None

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def _ahead(self, hint: Prefetch, window: deque[tuple[int, int, int]]) -> None:
        path = hint.path.lstrip(b"/")
        size = sum(end - start for start, end in hint.ranges)
        memory = self._memory.look()
        tight = memory is not None and memory.available * TIGHT < memory.total
        if tight or not is_plain(path) or not self._budget.take(1, size, time.monotonic()):
            self._count("ahead_refused")
            return
        try:
            fd = self._device.ahead_open(path)
        except OSError:
            self._count("ahead_gone")  # or it is something else by now
            return
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                with os.scandir(fd) as entries:
                    for _ in zip(range(MOST_ENTRIES), entries, strict=False):
                        pass
            else:
                self._ranges(fd, hint, size, window)
            self._count("ahead_files")
        except OSError:
            self._count("ahead_gone")
        finally:
            os.close(fd)

    def _ranges(self, fd: int, hint: Prefetch, size: int, window: deque[tuple[int, int, int]]) -> None:
        missing = 0
        end = os.fstat(fd).st_size
        for start, stop in hint.ranges:
            got = read_ahead(fd, start, stop - start)
            missing += got
            if got:
                window.append((os.dup(fd), min(stop, end) - 1, got))
        self._count("ahead_bytes", missing)
        self._count("there_bytes", max(0, size - missing))

    def _drop(self, hint: Drop) -> None:
        with contextlib.suppress(OSError):
            fd = self._device.ahead_open(hint.path.lstrip(b"/"))
            try:
                drop(fd, hint.offset, hint.length)
            finally:
                os.close(fd)


class Plan:
    """The caching that a worker's request asks for, as far as it has to be ready before the process shuts itself in.

    What cannot be had is in `problems`, a line each; the worker serves without it.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        wanted = request.get("cache") or {}
        self.image = str(wanted.get("image") or "")
        self.problems: list[str] = []
        self._memory: Memory | None = None
        self._policy: CachePolicy | None = None
        if not wanted:
            return
        profile, prefetch = None, bool(wanted.get("prefetch"))
        try:
            profile = self._load(wanted)
        except Xen9pError as error:
            self.problems.append(f"nothing is read ahead: {error}")
            prefetch = False
        context = cache_policy.Context(
            guest=str(request.get("guest", "")),
            tag=str(request.get("tag", "")),
            export=str(request.get("export", "")),
            profile=profile,
            prefetch=prefetch and bool(self.image),
            learn=float(wanted.get("learn", 120)),
            quiet=QUIET,
            stream_bytes=int((request.get("limits") or {}).get("stream_bytes", Limits().stream_bytes)),
            options=wanted.get("options") or {},
        )
        name = wanted.get("policy") or cache_policy.BUILT_IN
        try:
            self._policy = cache_policy.load(name)(context)
        except Xen9pError as error:
            self.problems.append(str(error))
        except Exception as error:  # of somebody else's module
            self.problems.append(f"the caching policy {name} cannot be made: {describe(error)}")
        self._memory = Memory()

    def _load(self, wanted: Mapping[str, Any]) -> Profile | None:
        return load_profile(Path(wanted["folder"]), self.image) if self.image and wanted.get("folder") else None

    def runner(self, device: DataPlane, remember: Callable[[Profile], None]) -> CacheRunner | None:
        """What runs it, not started yet; None if there is nothing to run."""
        if self._policy is None or self._memory is None:
            return None
        return CacheRunner(device, self._policy, self._memory, remember)
