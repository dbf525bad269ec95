"""The interface of a caching policy: events in, hints out; and what the built-in ones need to know.

A policy is an object of one device, in the device's worker: it is as shut in as that, sees one guest's events, and
gives hints about one guest's export. It runs in a thread of its own, on batches, never in the way of a message. Another
is named in the policy file (``cache_policy = "module:Class"``); the class is called with a Context.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from xen9p._dataplane import lib
from xen9p.errors import Xen9pError
from xen9p.prefetch import Profile, Range

BUILT_IN: Final = "xen9p.prefetch_policy:Learned"
_PACKED: Final = struct.Struct("<4I2Q")  # struct packed of cache_events.c


# Events.


@dataclass(frozen=True, slots=True)
class Attach:
    """The guest has attached the export: for a root, its boot begins."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """A walk has led to a file. format: its S_IFMT bits."""

    path: bytes
    format: int


@dataclass(frozen=True, slots=True)
class Open:
    """A file has been opened."""

    path: bytes


@dataclass(frozen=True, slots=True)
class List:
    """A directory has been opened."""

    path: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes of a file have been read; cached: all of them were in the page cache."""

    path: bytes
    offset: int
    length: int
    cached: bool


@dataclass(frozen=True, slots=True)
class Stream:
    """A sequential reader or writer of a file has become a stream."""

    path: bytes
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Pressure:
    """Of total bytes of memory, so many could be given to somebody at once (MemAvailable of proc(5)). Once a second."""

    available: int
    total: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed, and perhaps nothing else. Several times a second while anything is wanted."""


Event = Attach | Lookup | Open | List | Read | Stream | Pressure | Tick

_KINDS: Final[Mapping[type, int]] = {
    Attach: lib.X9_SAW_ATTACH,
    Lookup: lib.X9_SAW_LOOKUP,
    Open: lib.X9_SAW_OPEN,
    List: lib.X9_SAW_LIST,
    Read: lib.X9_SAW_READ,
    Stream: lib.X9_SAW_STREAM,
}


# Hints.


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Have these stretches of a file in the page cache before they are asked for.

    With none, only find the file; of a directory, read its entries.
    """

    path: bytes
    ranges: tuple[Range, ...] = ()


@dataclass(frozen=True, slots=True)
class Drop:
    """This stretch of a file is not worth its memory; what is dirty stays."""

    path: bytes
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Streams:
    """From so many bytes of a file in a row on, a reader or writer is a stream; 0 for never.

    Good until the policy file is read again, and not to be given before Attach.
    """

    length: int


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep this profile for the next guest of the same image."""

    profile: Profile


@dataclass(frozen=True, slots=True)
class Forget:
    """Do no more of what was hinted and is not done yet."""


Hint = Prefetch | Drop | Streams | Remember | Forget


# The policy.


@dataclass(frozen=True, slots=True)
class Context:
    """What a policy is told when it is made.

    Attributes:
        guest, tag, export: whose device it is.
        profile: what has been remembered of the image, if anything.
        prefetch: whether the policy file wants profiles to be used, and to be made where there is none.
        learn: seconds that a boot lasts at the most.
        quiet: seconds without a new file after which it is over.
        stream_bytes: what the policy file says of streams.
        options: what else the policy file says to this policy (cache.options).
    """

    guest: str = ""
    tag: str = ""
    export: str = ""
    profile: Profile | None = None
    prefetch: bool = True
    learn: float = 120.0
    quiet: float = 15.0
    stream_bytes: int = 16 << 20
    options: Mapping[str, Any] = field(default_factory=dict)


class CachePolicy(Protocol):
    """One device's policy. What it raises ends it, with a line in the log, and the device serves on without."""

    def wants(self) -> frozenset[type]:
        """The kinds of events that it wants from now on; asked after each batch. An event that nobody wants costs
        nothing, one that is wanted some 100 ns of the data plane's time."""
        ...

    def begin(self) -> Iterable[Hint]:
        """Called once, before the guest has sent anything."""
        ...

    def events(self, batch: Sequence[Event], now: float) -> Iterable[Hint]:
        """What has happened, in the order in which it did, by time.monotonic() now."""
        ...

    def learn(self) -> None:
        """Somebody wants what happens from now on to be learned anew (xen9p cache learn)."""
        ...

    def gains(self) -> Mapping[str, int]:
        """What it has brought, by names of its own, for `xen9p cache show`."""
        ...


Make = Callable[[Context], CachePolicy]


def load(name: str) -> Make:
    """The class that "module:Class" names. To be called before the process shuts itself in.

    Raises:
        Xen9pError: there is no such thing.
    """
    module, _, attribute = name.partition(":")
    try:
        made: Make = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of somebody else's module
        raise Xen9pError(
            f"the caching policy {name} cannot be loaded: {type(error).__name__}: {error}",
            "cache_policy is module:Class, of a module that python3 of xen9pd finds",
        ) from None
    return made


def mask(kinds: Iterable[type]) -> int:
    """The data plane's word for kinds of events."""
    return sum(_KINDS.get(kind, 0) for kind in set(kinds))


def unpack(batch: bytes) -> Iterator[Event]:
    """The events in what DataPlane.events_read() gave. Those of files that have lost their names are left out."""
    at = 0
    while at < len(batch):
        size, kind, format_, cached, offset, length = _PACKED.unpack_from(batch, at)
        path = batch[at + _PACKED.size : at + size]
        at += size
        if kind == lib.X9_SAW_ATTACH:
            yield Attach()
        elif not path:
            continue
        elif kind == lib.X9_SAW_LOOKUP:
            yield Lookup(path, format_)
        elif kind == lib.X9_SAW_OPEN:
            yield Open(path)
        elif kind == lib.X9_SAW_LIST:
            yield List(path)
        elif kind == lib.X9_SAW_READ:
            yield Read(path, offset, length, bool(cached))
        elif kind == lib.X9_SAW_STREAM:
            yield Stream(path, offset, length)
