"""The built-in caching policy: what a guest's boot reads is learned once, and read ahead of at the next."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from xen9p.cache_policy import (
    Attach,
    Context,
    Event,
    Hint,
    List,
    Lookup,
    Open,
    Prefetch,
    Read,
    Remember,
    Tick,
)
from xen9p.prefetch import BLOCK, MOST_FILES, Recorder

BUSY: Final = frozenset[type]((Attach, Lookup, Open, List, Read, Tick))
LEAST: Final = 8
"""Files of a profile that is worth keeping: a guest that attaches and leaves has booted nothing."""


class Learned:
    """Reads ahead what the image's profile has, before the guest asks; makes one where there is none.

    A boot begins with an attach and ends when no new file has come for a while, or after a time. Where there is a
    profile the boot is watched as well, so that it can be said how much of what was read ahead has been used.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._profile = context.profile
        self._ahead = context.prefetch and context.profile is not None
        self._learning = context.prefetch and context.profile is None
        self._recorder: Recorder | None = None
        self._began = 0.0
        self._news = 0.0
        self._attached = False
        self._used: dict[bytes, set[int]] = {}
        self._gains = {"profile_used_bytes": 0, "profile_missed_bytes": 0}

    def wants(self) -> frozenset[type]:
        """Everything until a boot is over, and nothing afterwards."""
        if self._recorder is not None or ((self._learning or self._ahead) and not self._attached):
            return BUSY
        return frozenset()

    def begin(self) -> Iterable[Hint]:
        """Everything of the profile, in order of its first use."""
        if self._ahead and self._profile is not None:
            for path, ranges in self._profile.files.items():
                yield Prefetch(path, tuple(ranges))

    def learn(self) -> None:
        """From now on, as if the guest had just attached."""
        self._learning, self._ahead = True, False
        self._start(time.monotonic())

    def _start(self, now: float) -> None:
        self._recorder = Recorder()
        self._began = self._news = now
        self._attached = True

    def events(self, batch: Sequence[Event], now: float) -> Iterator[Hint]:
        """Notes what is read; at the end of a boot it may remember it."""
        for event in batch:
            if isinstance(event, Attach) and not self._attached and (self._learning or self._ahead):
                self._start(now)
            elif self._recorder is not None:
                self._note(self._recorder, event, now)
        recorder = self._recorder
        if recorder is None:
            return
        context = self._context
        if not (now - self._began >= context.learn or now - self._news >= context.quiet or recorder.full):
            return
        self._recorder = None
        if self._learning and len(recorder.profile.files) >= LEAST:
            self._learning = False
            made = recorder.profile
            made.guest, made.made, made.seconds = context.guest, int(time.time()), self._news - self._began
            self._profile = made
            yield Remember(made)

    def _note(self, recorder: Recorder, event: Event, now: float) -> None:
        news = False
        match event:
            case Lookup(path) | Open(path) | List(path):
                news = recorder.look(path)
            case Read(path, offset, length):
                self._count(path.lstrip(b"/"), offset, length)
                news = recorder.read(path, offset, length)
        if news:
            self._news = now

    def _count(self, path: bytes, offset: int, length: int) -> None:
        """Whether a first read of a block was foreseen."""
        if not self._ahead or self._profile is None or not length:
            return
        if path not in self._used and len(self._used) >= 2 * MOST_FILES:
            return
        ranges = self._profile.files.get(path, ())
        seen = self._used.setdefault(path, set())
        for block in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
            if block in seen or len(seen) > 8192:
                continue
            seen.add(block)
            foreseen = any(start <= block * BLOCK < end for start, end in ranges)
            self._gains["profile_used_bytes" if foreseen else "profile_missed_bytes"] += BLOCK

    def gains(self) -> Mapping[str, int]:
        """Bytes, in blocks, that the boot has read and the profile had foreseen, or had not."""
        return dict(self._gains)
