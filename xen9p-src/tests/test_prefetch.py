"""Profiles of boots: learned, kept, checked, read ahead of; and bounded, whatever a guest or a damaged file does."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopmount import MISSING, mounted
from serving import Served, Session
from test_streams import forget, here
from xen9p import cache_policy, prefetch
from xen9p.cache_policy import Attach, Context, Event, Hint, Lookup, Open, Prefetch, Read, Remember, Tick
from xen9p.cache_runner import Budget, CacheRunner, Memory, Plan
from xen9p.client import Client
from xen9p.errors import Xen9pError
from xen9p.prefetch import BLOCK, MOST_BYTES, MOST_FILES, MOST_RANGES, MOST_TEXT, Profile, Recorder
from xen9p.prefetch_policy import LEAST, Learned
from xen9p.transport.memory import MemoryRing, MemoryRingTransport

IMAGE = "0b1c2d3e-0000-4000-8000-00000000000a"


def wait_for(what: Callable[[], object], seconds: float = 20.0) -> None:
    """A generous limit for something that is to come to be."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.02)


def boot(context: Context, files: Sequence[bytes]) -> tuple[Learned, list[Hint]]:
    """What the policy makes of a guest that reads some files and then is quiet."""
    policy = Learned(context)
    hints = list(policy.begin())
    hints += policy.events([Attach()], 100.0)
    for number, path in enumerate(files):
        hints += policy.events([Open(path), Read(path, 0, 1000, False)], 100.0 + number / 1000)
    hints += policy.events([Tick()], 100.0 + len(files) / 1000 + context.quiet)
    return policy, hints


def some(count: int) -> list[bytes]:
    return [b"/usr/file%d" % number for number in range(count)]


# Learning.


def test_a_boot_is_learned_once_and_foreseen_afterwards() -> None:
    first, hints = boot(Context(guest="g1"), some(20))
    (remember,) = [hint for hint in hints if isinstance(hint, Remember)]
    assert not [hint for hint in hints if isinstance(hint, Prefetch)]
    assert remember.profile.guest == "g1"
    assert list(remember.profile.files) == [path[1:] for path in some(20)]
    assert first.wants() == frozenset()
    second, hints = boot(Context(guest="g2", profile=remember.profile), some(20) + [b"/etc/other"])
    assert [hint.path for hint in hints if isinstance(hint, Prefetch)] == [path[1:] for path in some(20)]
    assert not [hint for hint in hints if isinstance(hint, Remember)]
    assert second.gains() == {"profile_used_bytes": 20 * BLOCK, "profile_missed_bytes": BLOCK}


def test_switched_off_it_does_and_wants_nothing() -> None:
    policy, hints = boot(Context(prefetch=False, profile=Profile({b"a": [(0, BLOCK)]})), some(20))
    assert hints == []
    assert policy.wants() == frozenset()


def test_a_guest_that_boots_nothing_leaves_nothing() -> None:
    assert boot(Context(), some(LEAST - 1))[1] == []


def test_a_boot_that_is_never_quiet_ends_all_the_same() -> None:
    policy = Learned(Context(learn=30.0))
    list(policy.events([Attach()], 0.0))
    hints: list[Hint] = []
    for second in range(40):
        hints += policy.events([Open(b"/f%d" % second)], float(second))
    (remember,) = hints
    assert isinstance(remember, Remember)
    assert len(remember.profile.files) == 31


def test_learning_anew() -> None:
    policy, _ = boot(Context(profile=Profile({b"a": []})), some(20))
    policy.learn()
    now = time.monotonic()
    hints = list(policy.events([Open(path) for path in some(9)], now))
    hints += policy.events([Tick()], now + 60)
    assert [len(hint.profile.files) for hint in hints if isinstance(hint, Remember)] == [9]


# Bounds.


def test_a_guest_cannot_make_a_profile_grow() -> None:
    """Endless files, endless names, endless stretches, endless bytes."""
    for path in (lambda n: b"/f%d" % n, lambda n: b"/%0900d" % n, lambda n: b"/\xff%d" % n):
        recorder = Recorder()
        for number in range(3 * MOST_FILES):
            recorder.read(path(number), 0, 1)
        assert len(recorder.profile.files) <= MOST_FILES
        assert recorder.full
        assert len(json.dumps(recorder.profile.plain(), separators=(",", ":"))) <= MOST_TEXT
        prefetch.parse(recorder.profile.plain())
    recorder = Recorder()
    for number in range(1000):
        recorder.read(b"/one", number * 7 * BLOCK, 1)
    assert len(recorder.profile.files[b"one"]) == MOST_RANGES
    recorder = Recorder()
    for number in range(20):
        recorder.read(b"/huge%d" % number, 0, MOST_BYTES // 10)
    assert recorder.profile.bytes <= MOST_BYTES
    assert recorder.full
    prefetch.parse(recorder.profile.plain())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 40), st.integers(0, 1 << 30)), max_size=60))
def test_whatever_is_read_what_is_kept_covers_it_or_is_full(reads: list[tuple[int, int, int]]) -> None:
    recorder = Recorder()
    for number, offset, length in reads:
        recorder.read(b"/%d" % number, offset, length)
    kept = prefetch.parse(json.loads(json.dumps(recorder.profile.plain())))
    assert kept == recorder.profile
    for number, offset, length in reads:
        ranges = kept.files.get(b"%d" % number, [])
        assert recorder.full or not length or any(s <= offset and offset + length <= e for s, e in ranges)


def test_no_path_leads_elsewhere() -> None:
    recorder = Recorder()
    for path in (b"/../x", b"/a/../../x", b"/a//b", b"/a/./b", b"/a\0b", b"/" + b"x/" * 600 + b"x", b"/", b""):
        assert not recorder.look(path)
    assert recorder.profile.files == {}


# Keeping.


def test_it_is_kept_as_it_was(tmp_path: Path) -> None:
    made = Profile({b"usr/lib": [(0, BLOCK), (3 * BLOCK, 4 * BLOCK)], b"\xff\xfe": [], b"d": []}, "g1", 12, 1.5)
    prefetch.save(tmp_path / "new", IMAGE, made)
    assert prefetch.load(tmp_path / "new", IMAGE) == made
    assert list(prefetch.images(tmp_path / "new")) == [IMAGE]
    assert stat.S_IMODE(prefetch.place(tmp_path / "new", IMAGE).stat().st_mode) == 0o600
    assert prefetch.forget(tmp_path / "new", IMAGE)
    assert not prefetch.forget(tmp_path / "new", IMAGE)
    assert prefetch.load(tmp_path / "new", IMAGE) is None


def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Profile({b"a": []}, "g1")
    prefetch.save(tmp_path, IMAGE, old)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        prefetch.save(tmp_path, IMAGE, Profile({b"b": []}))
    assert prefetch.load(tmp_path, IMAGE) == old
    assert [path.name for path in tmp_path.iterdir()] == [f"{IMAGE}.json"]


def test_what_a_kill_leaves_is_swept(tmp_path: Path) -> None:
    (tmp_path / f".{IMAGE}.0badcafe").write_text("half of a pro")
    (tmp_path / "other").touch()
    prefetch.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


GOOD: dict[str, Any] = {"format": 1, "guest": "g1", "made": 1, "seconds": 2.0, "files": [["a/b", 0, BLOCK]]}


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "[" * 5000, '{"format": 2}', b"\xff".decode("latin-1"),
        json.dumps(GOOD | {"files": [["../a", 0, 1]]}),
        json.dumps(GOOD | {"files": [["/etc/passwd", 0, 1]]}),
        json.dumps(GOOD | {"files": [["a", 5, 5]]}),
        json.dumps(GOOD | {"files": [["a", 5, 9, 7, 12]]}),
        json.dumps(GOOD | {"files": [["a", 0, 1 << 63]]}),
        json.dumps(GOOD | {"files": [["a", 0, MOST_BYTES + 1]]}),
        json.dumps(GOOD | {"files": [["a", 0]]}),
        json.dumps(GOOD | {"files": [["a", True, 3]]}),
        json.dumps(GOOD | {"files": [["a"], ["a"]]}),
        json.dumps(GOOD | {"files": [[7]]}),
        json.dumps(GOOD | {"files": [["\0###"]]}),
        json.dumps(GOOD | {"files": [["a", *range(2 * MOST_RANGES + 2)]]}),
        json.dumps(GOOD | {"files": [[f"f{n}"] for n in range(MOST_FILES + 1)]}),
        json.dumps(GOOD | {"guest": "a\nb"}),
        json.dumps(GOOD | {"made": -1}),
        json.dumps(GOOD | {"seconds": float("nan")}),
        json.dumps(GOOD) + " " * MOST_TEXT,
    ],
)  # fmt: skip
def test_a_file_that_somebody_has_changed_is_refused_and_left(tmp_path: Path, content: str) -> None:
    prefetch.parse(GOOD)
    path = prefetch.place(tmp_path, IMAGE)
    path.write_text(content)
    with pytest.raises(Xen9pError) as caught:
        prefetch.load(tmp_path, IMAGE)
    assert len(str(caught.value).splitlines()) == 1
    assert path.name in str(caught.value)
    assert path.read_text() == content
    plan = Plan({"cache": {"prefetch": True, "folder": str(tmp_path), "image": IMAGE}})
    assert len(plan.problems) == 1


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = prefetch.place(tmp_path, IMAGE)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "link":
            (tmp_path / "good").write_text(json.dumps(GOOD))
            path.symlink_to("good")
        case _:
            path.mkdir()
    with pytest.raises(Xen9pError):
        prefetch.load(tmp_path, IMAGE)


def test_a_budget_comes_back_slowly() -> None:
    budget = Budget(10, 1000.0, 0.0)
    assert budget.take(10, 1000, 0.0)
    assert not budget.take(1, 0, 0.0)
    assert budget.take(1, 1000, 1.0)
    assert not budget.take(100, 0, 1e9)


# Reading ahead, for real.


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if MISSING:
        pytest.skip(MISSING)
    with mounted(tmp_path_factory.mktemp("prefetch"), mib=300) as point:
        yield point


@pytest.fixture
def tree(store: Path) -> Path:
    """Some files that are on the disk and not in memory."""
    folder = store / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "usr").mkdir(parents=True)
    for number in range(20):
        path = folder / f"usr/file{number}"
        path.write_bytes(os.urandom(200_000))
        with path.open("rb") as file:
            os.fsync(file.fileno())
        forget(path)
    return folder


class Running:
    """A device with a caching policy, as a worker has it."""

    def __init__(self, folder: Path, policy: cache_policy.CachePolicy) -> None:
        self.remembered: list[Profile] = []
        self.served = Served(folder)
        self.ring = MemoryRing(7)
        self.ring.serve_with(self.served.device)
        self.runner = CacheRunner(self.served.device, policy, Memory(), self.remembered.append)
        self.runner.start()

    def __enter__(self) -> Running:
        return self

    def attach(self) -> Session:
        self.served.start()
        client, root = Client.connect(MemoryRingTransport(self.ring))
        return Session(client, root, self.served)

    def __exit__(self, *_: object) -> None:
        self.runner.close()
        if self.served._thread.ident is None:
            self.served.device.close()
        else:
            self.served.close()
        self.ring.close()


def test_from_one_guest_to_the_next(tree: Path) -> None:
    """A real boot is learned from real messages; the next guest finds in memory what it has not asked for yet."""
    with Running(tree, Learned(Context(guest="g1", quiet=1.0))) as first:
        one = first.attach()
        for number in (3, 1, 2, 7, 5, 8, 9, 11):
            assert len(one.client.read_file(one.root, b"usr/file%d" % number)) == 200_000
        one.client.listdir(one.root, b"usr")
        wait_for(lambda: first.remembered)
        one.client.close()
    (profile,) = first.remembered
    files = [path for path, ranges in profile.files.items() if ranges]
    assert files == [b"usr/file%d" % number for number in (3, 1, 2, 7, 5, 8, 9, 11)]
    assert b"usr" in profile.files
    assert all(profile.files[path] == [(0, 4 * BLOCK)] for path in files)
    for number in range(20):
        forget(tree / f"usr/file{number}")
    with Running(tree, Learned(Context(guest="g2", profile=profile))) as second:
        wait_for(lambda: second.runner.report()["ahead_files"] == len(profile.files))
        # The kernel has begun to read; the disk takes its time.
        wait_for(lambda: {n for n in range(20) if here(tree / f"usr/file{n}") >= 200_000} == {3, 1, 2, 7, 5, 8, 9, 11})
        two = second.attach()
        two.client.read_file(two.root, b"usr/file3")
        stats = two.served.device.stats()
        assert (stats["read_misses"], stats["hit_bytes"]) == (0, 200_000)
        wait_for(lambda: second.runner.report()["gains"]["profile_used_bytes"] == 4 * BLOCK)
        two.client.close()
        report = second.runner.report()
    assert report["ahead_bytes"] >= 8 * 200_000
    assert (report["ahead_gone"], report["ahead_refused"]) == (0, 0)


def test_what_has_become_something_else_is_left_alone(tree: Path, tmp_path: Path) -> None:
    """A link, a FIFO, a way through a link, a file that is gone, one that is shorter: none harms, and none waits."""
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(100_000))
    usr = tree / "usr"
    for number in range(5):
        (usr / f"file{number}").unlink()
    (usr / "file0").symlink_to(secret)
    os.mkfifo(usr / "file1")
    (usr / "file2").write_bytes(b"short")
    (tree / "way").symlink_to("usr")
    ranges: list[prefetch.Range] = [(0, 4 * BLOCK)]
    paths = [b"usr/file0", b"usr/file1", b"usr/file2", b"usr/file3", b"way/file6", b"usr/file7"]
    profile = Profile({path: list(ranges) for path in paths})
    with Running(tree, Learned(Context(profile=profile))) as running:
        wait_for(lambda: sum(running.runner.report()[k] for k in ("ahead_files", "ahead_gone")) == len(paths))
        report = running.runner.report()
    assert (report["ahead_files"], report["ahead_gone"]) == (2, 4)
    assert here(usr / "file7") >= 200_000
    assert here(usr / "file6") == 0


class Greedy:
    """A policy that answers every read with as many hints as it can: what a hostile guest would like."""

    def __init__(self, context: Context) -> None:
        self.asked = 0

    def wants(self) -> frozenset[type]:
        return frozenset((Read, Tick))

    def begin(self) -> Iterable[Hint]:
        return ()

    def events(self, batch: Sequence[Event], now: float) -> Iterable[Hint]:
        for event in batch:
            if isinstance(event, Read):
                for _ in range(5000):
                    self.asked += 1
                    yield Prefetch(event.path, ((0, MOST_BYTES // 100),))

    def learn(self) -> None:
        """Nothing to learn."""

    def gains(self) -> Mapping[str, int]:
        return {"asked": self.asked}


def test_endless_hints_end_at_the_budget(tree: Path) -> None:
    policy = Greedy(Context())
    with Running(tree, policy) as running:
        one = running.attach()
        for _ in range(4):
            one.client.read_file(one.root, b"usr/file3")
        wait_for(lambda: policy.asked >= 20_000)
        wait_for(lambda: not running.runner.report()["waiting_hints"])
        report = running.runner.report()
        one.client.close()
    assert 0 < report["ahead_files"] <= 150
    assert report["ahead_refused"] > 4000
    assert report["gains"] == {"asked": policy.asked}


class Broken(Greedy):
    """A policy that fails."""

    def events(self, batch: Sequence[Event], now: float) -> Iterable[Hint]:
        raise KeyError("nothing")


def test_a_policy_that_fails_costs_its_guest_nothing(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Running(tree, Broken(Context())) as running:
        one = running.attach()
        for number in range(3):
            assert len(one.client.read_file(one.root, b"usr/file%d" % number)) == 200_000
        wait_for(lambda: "caching ends: KeyError" in caplog.text)
        assert len(one.client.read_file(one.root, b"usr/file9")) == 200_000
        one.client.close()


def test_another_policy_is_loaded_by_name() -> None:
    assert cache_policy.load(f"{__name__}:Greedy") is Greedy
    for name in ("no.such:Thing", f"{__name__}:Nothing"):
        with pytest.raises(Xen9pError, match="cannot be loaded"):
            cache_policy.load(name)
    assert cache_policy.load(cache_policy.BUILT_IN) is Learned


def test_events_that_nobody_reads_are_bounded(tree: Path) -> None:
    """A thread that reads them may be slow; what does not fit is counted."""
    with Running(tree, Learned(Context(prefetch=False))) as running:
        one = running.attach()
        device = running.served.device
        device.events_want(cache_policy.mask({Read}))
        fid = one.client.walk(one.root, b"usr", b"file9")
        one.client.lopen(fid)
        for _ in range(5000):
            one.client.read(fid, 0, 1)
        assert device.stats()["cache_events_lost"] == 5000 - 4096
        events: list[Event] = []
        while batch := device.events_read():
            events += cache_policy.unpack(batch)
        assert len(events) == 4096
        assert events[0] == Read(b"/usr/file9", 0, 1, events[0].cached if isinstance(events[0], Read) else True)
        device.events_want(0)
        one.client.clunk(fid)
        one.client.close()


def test_a_lookup_says_what_it_found(tree: Path) -> None:
    with Running(tree, Learned(Context(prefetch=False))) as running:
        one = running.attach()
        device = running.served.device
        device.events_want(cache_policy.mask({Lookup}))
        one.client.walk(one.root, b"usr")
        (event,) = cache_policy.unpack(device.events_read())
        assert isinstance(event, Lookup)
        assert (event.path, stat.S_ISDIR(event.format)) == (b"/usr", True)
        one.client.close()
