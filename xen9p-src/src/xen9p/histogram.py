"""Latency histograms: what the data plane counts, and what can be read off the counts.

Bucket 0 counts what took less than 1 µs, bucket i what took less than 2^i µs, the last one all the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

GROUPS: Final = ("session", "read", "write", "lookup", "open", "readdir", "change", "sync", "xattr", "lock")
"""Groups of message types, in the order of the data plane's numbers (dataplane/observe.c)."""
STAGES: Final = ("ring", "queue", "filesystem", "total")
BUCKETS: Final = 25
BOUNDS: Final = tuple((1 << i) / 1e6 for i in range(BUCKETS - 1))
"""Upper bounds in seconds of all buckets but the last, which has none."""

Counts = Sequence[int]


def total(times: Mapping[str, Mapping[str, Mapping[str, Any]]], stage: str = "total") -> list[int]:
    """The counts of all groups together, for one stage of DataPlane.times()."""
    return added(stages[stage]["counts"] for stages in times.values() if stage in stages)


def added(many: Iterable[Counts]) -> list[int]:
    """The counts of several histograms together."""
    sums = [0] * BUCKETS
    for counts in many:
        for i, count in enumerate(counts):
            sums[i] += count
    return sums


def since(now: Counts, before: Counts) -> list[int]:
    """What came to be counted between two looks; all of now, if counting began anew (a new worker)."""
    fresh = [a - b for a, b in zip(now, before, strict=True)]
    return list(now) if any(count < 0 for count in fresh) else fresh


def quantile(counts: Counts, q: float) -> float | None:
    """The upper bound in seconds of the bucket that the q-quantile (0 to 1) lies in; None without counts.

    Of what lies in the last bucket, its lower bound is all that is known.
    """
    wanted = q * sum(counts)
    if not wanted:
        return None
    seen = 0
    for count, bound in zip(counts, BOUNDS, strict=False):
        seen += count
        if seen >= wanted:
            return bound
    return BOUNDS[-1]
