"""Snapshots on a real btrfs: one instant, whole or not there, named bytes, in order whatever the clock says."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from loopmount import MISSING, mounted, subvolume
from serving import Session, memory_session
from xen9p import policy, snapshot, subvolumes
from xen9p.snapshot import Keep, Snapshot, SnapshotError, Store
from xen9p.treediff import Change

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


class Still:
    """A moment in which given devices stand still, or none do."""

    def __init__(self, sessions: Sequence[Session] = ()) -> None:
        self.sessions = sessions
        self.held = True
        self.ms = 0.0
        self.devices = len(sessions)

    @contextmanager
    def __call__(self, _paths: Sequence[Path]) -> Iterator[Still]:
        began = time.monotonic()
        for session in self.sessions:
            session.served.device.pause(5)
        assert not any(session.served.device.quiet(1) for session in self.sessions)
        yield self
        self.held = 0 not in [session.served.device.resume() for session in self.sessions]  # each of them
        self.ms = (time.monotonic() - began) * 1000


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(tmp_path_factory.mktemp("btrfs")) as made:
        yield made


@pytest.fixture
def home(point: Path) -> Iterator[Path]:
    """An export; afterwards its snapshots and itself are gone."""
    yield subvolume(point / "home")
    for path in [*point.glob(".snapshots/[a-z]*/*"), *point.glob(".snapshots/.meta/tmp-*")]:
        with subvolumes.opened(path.parent) as folder:
            subvolumes.destroy(folder, path.name)
    shutil.rmtree(point / ".snapshots", ignore_errors=True)
    for path in point.iterdir():
        if path.is_dir():
            with subvolumes.opened(point) as folder:
                subvolumes.destroy(folder, path.name)


def store_of(home: Path) -> Store:
    return Store.of({"home": home})


def take(home: Path, name: str = "") -> Snapshot:
    return store_of(home).create({"home": home}, name, Still()).snapshots[0]


def changes(home: Path, older: str, newer: str = snapshot.NOW) -> dict[str, Change]:
    found = store_of(home).diff("home", home, older, newer)
    by_path = {os.fsdecode(change.path): change for change in found}
    assert len(by_path) == len(found), f"a path comes twice: {found}"
    return by_path


# One instant.


def invariant_holds(one: Path, other: Path) -> tuple[bool, str]:
    """The writer writes a number into the first export, and then the same into the second."""
    texts = [(folder / "number").read_text() for folder in (one, other)]
    first, second = (int(text.partition("\n")[0]) for text in texts)
    return second <= first <= second + 1, f"{first} {second}"


def test_several_exports_are_of_one_instant(home: Path, point: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that keeps an invariant across two files of two exports: it holds in every snapshot.

    btrfs takes both so nearly at once that it would seldom be seen without a pause: here one of them is late.
    """
    original = subvolumes.snapshot

    def late(source: int, folder: int, name: str, *, readonly: bool) -> None:
        time.sleep(0.02 if os.readlink(f"/proc/self/fd/{source}").endswith("other") else 0)
        original(source, folder, name, readonly=readonly)

    monkeypatch.setattr(subvolumes, "snapshot", late)
    other = subvolume(point / "other")
    exports = {"home": home, "other": other}
    with memory_session(home) as first, memory_session(other) as second:
        fids = []
        for session in (first, second):
            fid = session.client.walk(session.root)
            session.client.lcreate(fid, b"number", os.O_RDWR)
            session.client.write(fid, 0, b"%08d\n" % 0)
            fids.append((session.client, fid))
        over = threading.Event()
        slowest: list[float] = []
        wrong: list[BaseException] = []

        def write() -> None:
            count = 0
            try:
                while not over.is_set():
                    count += 1
                    for client, fid in fids:
                        began = time.monotonic()
                        client.write(fid, 0, b"%08d\n" % count)
                        slowest.append(time.monotonic() - began)
            except BaseException as error:
                wrong.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        store = Store.of(exports)
        try:
            made = [store.create(exports, f"s{i}", Still([first, second])) for i in range(25)]
        finally:
            over.set()
            writer.join()
        assert not wrong
        assert len(slowest) > 100
        for one in made:
            assert {s.export for s in one.snapshots} == {"home", "other"}
            holds, numbers = invariant_holds(*(s.path for s in sorted(one.snapshots, key=lambda s: s.export)))
            assert holds, numbers
        assert max(slowest) - sorted(slowest)[len(slowest) // 2] < 1.0, "the bar is 0.1 s on a quiet machine"


def test_a_pause_that_did_not_hold_gives_no_snapshot(home: Path) -> None:
    still = Still()

    @contextmanager
    def lost(_paths: Sequence[Path]) -> Iterator[Still]:
        yield still
        still.held, still.ms = False, 2345.0

    with pytest.raises(SnapshotError, match=r"took longer \(2345 ms\) than devices stand still"):
        store_of(home).create({"home": home}, "a", lost)
    assert nothing_is_left(home)


def nothing_is_left(home: Path) -> bool:
    folder = home.parent / ".snapshots"
    return (
        not list(folder.glob("[a-z]*/*"))
        and not list(folder.glob("[a-z]*/.*"))
        and sorted(p.name for p in (folder / ".meta").iterdir()) == ["lock"]
    )


# Whole or not there.


def test_create_list_delete(home: Path) -> None:
    (home / "f").write_text("one")
    first = take(home, "first")
    (home / "f").write_text("two")
    second = take(home)
    assert [s.name for s in store_of(home).all("home")] == ["first", second.name]
    assert (first.path / "f").read_text() == "one"
    assert (second.path / "f").read_text() == "two"
    with pytest.raises(OSError, match="Read-only"):
        (first.path / "f").write_text("three")
    assert abs(second.time - datetime.now(UTC)) < timedelta(seconds=60)
    store_of(home).delete("home", "first")
    assert [s.name for s in store_of(home).all()] == [second.name]
    assert not first.path.exists()


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", "x" * 65, "now", "a b", "ä"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(SnapshotError, match="is no name for a snapshot"):
        snapshot.check_name(name)


def test_what_cannot_be_is_one_line_and_changes_nothing(home: Path, tmp_path: Path) -> None:
    (home / "plain").mkdir()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Store.of({"x": home / "plain"}), "is no btrfs subvolume"),
        (lambda: Store.of({"x": home.parent}), "is the whole filesystem"),
        (lambda: Store.of({"x": tmp_path / "gone"}), "No such file"),
        (lambda: Store.of({"x": Path("/proc")}), "proc has no snapshots"),
        (lambda: store_of(home).delete("home", "none"), "has no snapshot none"),
        (lambda: store_of(home).diff("home", home, "none"), "has no snapshot none"),
        (lambda: store_of(home).clone("home", "none", home, "x"), "has no snapshot none"),
        (lambda: take(home, "there"), "has a snapshot there already"),
    ]
    take(home, "there")
    before = sorted(p.name for p in (home.parent / ".snapshots/.meta").iterdir())
    for work, says in cases:
        with pytest.raises(SnapshotError, match=says) as caught:
            work()
        assert "\n" not in str(caught.value)
        assert caught.value.hint
    assert [s.name for s in store_of(home).all()] == ["there"]
    assert sorted(p.name for p in (home.parent / ".snapshots/.meta").iterdir()) == before


def test_two_within_a_second_and_a_clock_that_goes_back(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay in the order in which they were made."""
    clock = datetime(2030, 1, 1, tzinfo=UTC)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return clock

    monkeypatch.setattr(snapshot, "datetime", Clock)
    names = [take(home).name, take(home).name]
    clock = datetime(2020, 1, 1, tzinfo=UTC)
    names += [take(home).name]
    assert names == ["2030-01-01T000000Z", "2030-01-01T000000Z-2", "2020-01-01T000000Z"]
    assert [s.name for s in store_of(home).all()] == names
    kept, gone = store_of(home).prune("home", Keep(last=1))
    assert ([s.name for s in kept], [s.name for s in gone]) == (names[2:], names[:2])


# Dies at its nth call to the system that changes something: before it or after it.
MORTAL = """import os, signal, sys
sys.path[:0] = sys.argv[3].split(":")
from pathlib import Path
from contextlib import contextmanager
from types import SimpleNamespace
from xen9p import btrfs, snapshot, subvolumes
left = int(sys.argv[1])
def counted(module, name):
    original = getattr(module, name)
    def call(*args, **kwargs):
        global left
        for _ in range(2):  # before and after
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if _ == 0:
                result = original(*args, **kwargs)
        return result
    setattr(module, name, call)
from xen9p import beneath
for module, names in (
    (os, ("rename", "fsync", "mkdir", "unlink")),
    (subvolumes, ("snapshot", "destroy")),
    (btrfs, ("sync",)),
    (beneath, ("exchange",)),
):
    for name in names:
        counted(module, name)
@contextmanager
def still(paths):
    yield SimpleNamespace(held=True, ms=1.0, devices=0)
point = Path(sys.argv[4])
exports = {"home": point / "home", "other": point / "other"}
exec(sys.argv[2])
"""


def die(point: Path, where: int, work: str) -> int:
    """Has a process do some work until it dies; its exit code."""
    path = ":".join(sys.path)
    command = [sys.executable, "-c", MORTAL, str(where), work, path, str(point)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.parametrize("where", range(1, 30, 2))
def test_killed_at_any_time_it_leaves_a_store_that_is_whole(home: Path, point: Path, where: int) -> None:
    exports = {"home": home, "other": subvolume(point / "other")}
    Store.of(exports).create(exports, "old", Still())
    die(point, where, 'snapshot.Store.of(exports).create(exports, "new", still)')
    listed = sorted((s.export, s.name) for s in Store.of(exports).all() if s.name == "new")
    assert listed in ([], [("home", "new"), ("other", "new")])
    if listed:
        return
    Store.of(exports).create(exports, "new", Still())  # what is left over does not hold it up
    assert len(Store.of(exports).all()) == 4
    leftovers = [p for p in (point / ".snapshots").glob("*/.*") if p.parent.name != ".meta"]
    assert leftovers == []
    assert len(list((point / ".snapshots/.meta").glob("*.json*"))) == 2


@pytest.mark.parametrize("where", range(1, 9))
def test_killed_while_a_tree_is_exchanged_it_is_the_old_one_or_the_new(home: Path, point: Path, where: int) -> None:
    subvolume(point / "other")
    (home / "f").write_text("old")
    take(home, "a")
    (home / "f").write_text("new")
    (home / "g").touch()
    code = die(point, where, 'snapshot.Store.of(exports).swap("home", "a", exports["home"])')
    seen = (sorted(os.listdir(home)), (home / "f").read_text())
    assert seen in ((["f"], "old"), (["f", "g"], "new"))
    assert code or seen[1] == "old"
    take(home, "b")
    assert list((point / ".snapshots/.meta").glob("tmp-*")) == []
    assert [s.name for s in store_of(home).all()] == ["a", "b"]


def test_a_store_that_is_really_full(tmp_path: Path) -> None:
    """One line or a whole snapshot, and what was there is there."""
    with mounted(tmp_path, mib=120) as small:
        home = subvolume(small / "home")
        (home / "f").write_text("kept")
        take(home, "old")
        with suppress(OSError), (home / "big").open("wb") as file:
            while True:
                file.write(os.urandom(1 << 20))
                file.flush()
        for size in (4096, 100):
            with suppress(OSError):
                for i in range(20_000):
                    (home / f"{size}-{i}").write_bytes(os.urandom(size))
        names = ["old"]
        for i in range(5):
            try:
                names.append(take(home, f"n{i}").name)
            except SnapshotError as error:
                assert "\n" not in str(error)  # noqa: PT017
                assert "the store is full" in str(error)  # noqa: PT017
        assert [s.name for s in store_of(home).all()] == names
        assert (small / ".snapshots/home/old/f").read_text() == "kept"
        assert list((small / ".snapshots/home").glob(".*")) == []


def test_a_full_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(home, "old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(subvolumes, "snapshot", full)
    with pytest.raises(SnapshotError, match="the store is full: delete files or snapshots") as caught:
        take(home, "new")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert [s.name for s in store_of(home).all()] == ["old"]


def test_a_clone_is_writable_and_its_own(home: Path, point: Path) -> None:
    (home / "f").write_text("one")
    take(home, "a")
    (home / "f").write_text("two")
    made = store_of(home).clone("home", "a", home, "copy")
    assert made == point / "copy"
    assert (made / "f").read_text() == "one"
    (made / "f").write_text("three")
    assert (home / "f").read_text() == "two"
    with pytest.raises(SnapshotError, match="exists already"):
        store_of(home).clone("home", "a", home, "copy")


def test_a_guest_sees_its_snapshots_and_cannot_change_them(home: Path) -> None:
    """Through a device of its own, also those that are made and deleted while it is attached."""
    (home / "d").mkdir()
    (home / "d/f").write_text("one")
    folder = snapshot.provide("home", home)
    assert folder == home.parent / ".snapshots/home"
    with memory_session(folder, readonly=True) as session:
        client = session.client
        take(home, "a")
        (home / "d/f").write_text("two")
        take(home, "b")
        assert [client.read_file(session.root, name) for name in (b"a/d/f", b"b/d/f")] == [b"one", b"two"]
        qids = set()
        for name in (b"a/d/f", b"b/d/f"):
            with client.walked(session.root, name) as fid:
                qids.add(client.getattr(fid).qid.path)
        assert len(qids) == 2, "two files with one number confuse the guest"
        with pytest.raises(OSError, match="Read-only"):
            client.write_file(session.root, b"a/d/f", b"three")
        store_of(home).delete("home", "a")
        with pytest.raises(OSError, match="No such file"):
            client.read_file(session.root, b"a/d/f")
        assert client.read_file(session.root, b"b/d/f") == b"two"


def test_guests_users_may_look_in_whatever_the_umask(home: Path) -> None:
    before = os.umask(0o077)
    try:
        folder = snapshot.provide("home", home)
        take(home)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (folder, folder.parent, folder.parent / ".meta")]
    assert modes == [0o755, 0o711, 0o700]


def test_an_export_that_has_all_snapshots_in_it_is_not_served(home: Path) -> None:
    whole = policy.Export("all", home.parent)
    assert policy.path_problems(whole) == []
    take(home)
    assert "has the snapshots of all exports" in policy.path_problems(whole)[0]
    (home / ".snapshots/.meta").mkdir(parents=True)  # a guest that would keep others from its export
    assert policy.path_problems(policy.Export("home", home)) == []
    assert policy.path_problems(policy.Export("home.snapshots", subvolumes.place("home", home))) == []


# Schedules.


def dated(*times: str) -> list[Snapshot]:
    when = [datetime.fromisoformat(text).replace(tzinfo=UTC) for text in times]
    return [Snapshot("e", str(i), Path("/"), t, i, "", "", ()) for i, t in enumerate(when)]


def test_schedules() -> None:
    there = dated(*(f"2026-03-{day:02}T{hour:02}:00" for day in (1, 2, 3) for hour in (1, 9, 17)))
    names = lambda keep: "".join(s.name for s in keep.of(there))  # noqa: E731
    assert names(Keep(last=2)) == "78"
    assert names(Keep(daily=2)) == "58"
    assert names(Keep(daily=9)) == "258"
    assert names(Keep(hourly=4)) == "5678"
    assert names(Keep(last=1, daily=2, monthly=1)) == "58"
    assert names(Keep(weekly=5)) == "28"  # 1 March 2026 was a Sunday
    assert names(Keep()) == ""


def test_a_clock_that_jumped_keeps_no_less(home: Path) -> None:
    """One from a year that never was takes one place, and not that of those after it."""
    there = dated("2026-03-01", "2026-03-02", "2099-01-01", "2026-03-03", "2026-03-04")
    assert [s.name for s in Keep(daily=3).of(there)] == ["2", "3", "4"]
    assert [s.name for s in Keep(last=2).of(there)] == ["3", "4"]


# What differs.


def test_diff_names_what_changed(home: Path) -> None:
    for name in ("same", "grown", "cut", "inside", "mode", "gone", "old-name", "saved", "attr", "touched"):
        (home / name).write_bytes(bytes(range(256)) * 256)
    (home / "dir/deep").mkdir(parents=True)
    (home / "dir/deep/f").write_text("f")
    (home / "moved").mkdir()
    (home / "moved/inner").write_text("inner")
    (home / "link").symlink_to("same")
    os.link(home / "same", home / "hard")
    take(home, "a")

    with (home / "grown").open("ab") as file:
        file.write(b"more")
    os.truncate(home / "cut", 1000)
    with (home / "inside").open("r+b") as file:
        file.seek(30_000)
        file.write(b"xyz")
    (home / "mode").chmod(0o600)
    os.chown(home / "mode", 5, 6)
    (home / "gone").unlink()
    (home / "old-name").rename(home / "new-name")
    (home / "saved.tmp").write_bytes(b"!" + bytes(range(256))[1:] + bytes(range(256)) * 255)
    (home / "saved.tmp").rename(home / "saved")
    os.setxattr(home / "attr", "user.a", b"1")
    os.utime(home / "touched", (1, 1))
    shutil.rmtree(home / "dir")
    (home / "moved").rename(home / "moved2")
    (home / "moved2/inner").write_text("other")
    (home / "made").mkdir()
    (home / "made/f").write_text("12345")
    (home / "link").unlink()
    (home / "link").symlink_to("grown")
    (home / "hard").unlink()
    take(home, "b")

    for newer in ("b", snapshot.NOW):
        got = changes(home, "a", newer)
        told = {path: (c.kind, c.ranges, c.what) for path, c in got.items()}
        assert told == {
            "grown": ("modified", [(65536, 4)], []),
            "cut": ("modified", [(1000, 64536)], []),
            "inside": ("modified", [(30_000, 3)], []),
            "mode": ("metadata", [], ["mode", "owner", "group"]),
            "gone": ("deleted", [], []),
            "new-name": ("renamed", [], []),
            "saved": ("modified", [(0, 1)], []),
            "attr": ("metadata", [], ["xattrs"]),
            "touched": ("metadata", [], ["mtime"]),
            "dir": ("deleted", [], []),
            "dir/deep": ("deleted", [], []),
            "dir/deep/f": ("deleted", [], []),
            "moved2": ("renamed", [], []),
            "moved2/inner": ("modified", [(0, 3)], []),
            "made": ("created", [], []),
            "made/f": ("created", [(0, 5)], []),
            "link": ("modified", [], ["target"]),
            "hard": ("deleted", [], []),
        }
        assert (got["new-name"].old, got["moved2/inner"].old) == (b"old-name", b"moved/inner")
        assert json.loads(json.dumps(got["inside"].plain()))["ranges"] == [[30_000, 3]]
    assert changes(home, "b") == {}
    assert changes(home, "a", "a") == {}
    back = changes(home, "b", "a")
    assert back["gone"].kind == "created"
    assert back["made/f"].kind == "deleted"
    assert back["moved"].old == b"moved2"
    assert {path for path, c in back.items() if c.kind == "created"} == {
        "gone",
        "hard",
        "dir",
        "dir/deep",
        "dir/deep/f",
    }


def test_a_name_that_was_file_and_is_directory(home: Path) -> None:
    (home / "x").write_text("1")
    take(home, "a")
    (home / "x").unlink()
    (home / "x").mkdir()
    (home / "x/y").write_text("1")
    found = store_of(home).diff("home", home, "a")
    assert sorted((c.kind, c.path, c.type) for c in found) == [
        ("created", b"x", "directory"),
        ("created", b"x/y", "file"),
        ("deleted", b"x", "file"),
    ]


def test_ranges_are_right_whatever_is_written(home: Path) -> None:
    """Against a comparison of the whole files, byte by byte: holes, cuts, clones, rewriting the same."""
    rng = random.Random(7)
    path = home / "f"
    for round_ in range(12):
        before = bytearray(rng.randbytes(rng.randrange(1, 300_000)))
        path.write_bytes(before)
        take(home, f"r{round_}")
        with path.open("r+b") as file:
            for _ in range(rng.randrange(1, 8)):
                at = rng.randrange(0, len(before) + 50_000)
                match rng.randrange(4):
                    case 0:
                        file.seek(at)
                        file.write(rng.randbytes(rng.randrange(1, 20_000)))
                    case 1:
                        file.truncate(at)
                    case 2:  # the same again: no change
                        file.seek(0)
                        same = file.read(5000)
                        file.seek(0)
                        file.write(same)
                    case 3:
                        file.seek(at)
                        file.write(bytes(rng.randrange(1, 9000)))
        after = path.read_bytes()
        longest = max(len(before), len(after))
        a, b = bytes(before).ljust(longest, b"\0"), after.ljust(longest, b"\0")
        differ = {i for i in range(longest) if a[i] != b[i]} | set(range(min(len(before), len(after)), longest))
        found = changes(home, f"r{round_}").get("f")
        ranges = found.ranges if found else []
        covered = {i for start, length in ranges for i in range(start, start + length)}
        assert differ <= covered
        assert all(start in differ and start + length - 1 in differ for start, length in ranges)
        assert len(covered - differ) < 4096 * 2 * (len(ranges) + 1) + len(differ)


def test_diff_across_a_restore(home: Path) -> None:
    """Two snapshots whose common past is an older one than both: nothing is overlooked."""
    for i in range(300):
        (home / f"{i}").write_text(f"{i}")
    take(home, "a")
    (home / "1").write_text("changed before")
    take(home, "b")
    store_of(home).swap("home", "a", home)
    assert (home / "1").read_text() == "1"
    assert changes(home, "a") == {}
    (home / "2").write_text("changed after")
    take(home, "c")
    assert {p: c.kind for p, c in changes(home, "b", "c").items()} == {"1": "modified", "2": "modified"}
    assert {p: c.kind for p, c in changes(home, "b").items()} == {"1": "modified", "2": "modified"}


def test_only_what_changed_is_looked_at(home: Path) -> None:
    for folder in range(40):
        (home / f"{folder}").mkdir()
        for i in range(100):
            (home / f"{folder}/{i}").write_text("x")
    take(home, "a")
    (home / "7/7").write_text("changed")
    looked: list[int] = []
    store_of(home).diff("home", home, "a", step=lambda _, total: looked.append(total))
    assert max(looked) <= 3
