"""The cache of a mount: what it remembers, for how long, and what makes it forget."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from xen9p.attributes import Attributes
from xen9p.cache import BLOCK, Cache, TimedCache, load
from xen9p.errors import Xen9pError

ATTR = Attributes(0o100644, 0, 0, 1, 10, 8, 7, 0, 1, 2, 3)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> TimedCache:
    return TimedCache(2.0, limit=4 * BLOCK, clock=clock)


def test_names_and_attributes_grow_old(cache: TimedCache, clock: Clock) -> None:
    cache.put_lookup(1, b"a", 7)
    cache.put_attr(7, ATTR)
    clock.now += 1.9
    assert (cache.lookup(1, b"a"), cache.attr(7)) == (7, ATTR)
    clock.now += 0.1
    assert (cache.lookup(1, b"a"), cache.attr(7)) == (None, None)


def test_what_is_invalidated_is_gone(cache: TimedCache) -> None:
    cache.put_lookup(1, b"a", 7)
    cache.put_attr(7, ATTR)
    cache.invalidate_lookup(1, b"a")
    cache.invalidate_attr(7)
    cache.invalidate_lookup(1, b"never seen")
    assert (cache.lookup(1, b"a"), cache.attr(7)) == (None, None)


def test_a_forgotten_directory_takes_its_names_along(cache: TimedCache) -> None:
    cache.put_lookup(5, b"a", 7)
    cache.put_lookup(6, b"a", 8)
    cache.forget(5)
    assert cache.lookup(5, b"a") is None
    assert cache.lookup(6, b"a") == 8


def test_data_counts_until_the_file_is_another(cache: TimedCache) -> None:
    assert not cache.opened(7, ATTR)
    cache.put_data(7, 0, b"x" * 10, at_end=True)
    assert cache.opened(7, ATTR)
    assert cache.data(7, 2, 100) == b"x" * 8
    assert not cache.opened(7, replace(ATTR, mtime_ns=9))
    assert cache.data(7, 0, 10) is None


def test_whole_blocks_are_kept_and_the_oldest_go(cache: TimedCache) -> None:
    data = bytes(range(256)) * (3 * BLOCK // 256)
    cache.put_data(7, BLOCK - 5, data, at_end=False)
    assert cache.data(7, BLOCK - 5, 10) is None  # before the first whole block
    assert cache.data(7, BLOCK, 2 * BLOCK) == data[5 : 5 + 2 * BLOCK]
    assert cache.data(7, 3 * BLOCK, 1) is None  # not whole either
    for ino in (8, 9, 10):
        assert cache.data(7, BLOCK, 1) is not None  # so this one is in use
        cache.put_data(ino, 0, bytes(BLOCK), at_end=False)
    assert cache.data(7, 2 * BLOCK, 1) is None
    assert cache.data(7, BLOCK, 1) is not None


class Model:
    """A file, and what a mount would do to it and to its cache."""

    def __init__(self, cache: Cache, seed: int) -> None:
        self.cache = cache
        self.content = bytearray()
        self.random = random.Random(seed)
        self.hits = 0

    def write(self) -> None:
        offset, data = self.random.randrange(4 * BLOCK), self.random.randbytes(self.random.choice((1, 100, BLOCK + 3)))
        if offset > len(self.content):
            self.content += bytes(offset - len(self.content))
        self.content[offset : offset + len(data)] = data
        self.cache.invalidate_data(7, offset, len(data))

    def truncate(self) -> None:
        size = self.random.randrange(4 * BLOCK)
        self.content = self.content[:size] + bytes(size - min(size, len(self.content)))
        self.cache.invalidate_data(7)

    def read(self) -> None:
        offset = self.random.choice((self.random.randrange(5 * BLOCK), self.random.randrange(4) * BLOCK))
        count = self.random.choice((1, 5000, BLOCK, 2 * BLOCK))
        right = bytes(self.content[offset : offset + count])
        cached = self.cache.data(7, offset, count)
        if cached is None:
            self.cache.put_data(7, offset, right, at_end=len(right) < count)
        else:
            self.hits += 1
            assert cached == right, f"{count} bytes at {offset} of {len(self.content)}"


@pytest.mark.parametrize("seed", range(5))
def test_random_reads_see_every_write(cache: TimedCache, seed: int) -> None:
    model = Model(cache, seed)
    for _ in range(1500):
        model.random.choice((model.write, model.read, model.read, model.read, model.read, model.truncate))()
    assert model.hits > 50
    assert cache._bytes == sum(map(len, cache._blocks.values())) <= 4 * BLOCK


@pytest.fixture
def search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("homework", None)


def test_a_cache_of_ones_own(search_path: Path) -> None:
    text = "from xen9p.cache import Cache\nclass Mine(Cache):\n    kernel_seconds = 9.0\n"
    (search_path / "homework.py").write_text(text)
    mine = load("homework:Mine", 3.0)
    assert (mine.kernel_seconds, mine.seconds) == (9.0, 3.0)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("homework:Mine", "class Mine: pass", "no class made from"),
        ("homework:Yours", "", "has no attribute 'Yours'"),
        ("homework:Mine", "class Mine(", "cache homework:Mine: "),
        ("nobody:Mine", "", "No module named 'nobody'"),
        ("homework", "", "no cache homework"),
        (
            "homework:Mine",
            "from xen9p.cache import Cache\nclass Mine(Cache):\n def __init__(self): pass",
            "cannot be made",
        ),
    ],
)
def test_a_cache_that_is_none(search_path: Path, name: str, text: str, said: str) -> None:
    (search_path / "homework.py").write_text(text)
    with pytest.raises(Xen9pError, match=said):
        load(name, 1.0)
