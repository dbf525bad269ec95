"""Restoring on a real btrfs: what comes back is what was there, to the byte, whatever a guest has made of its place."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loopmount import MISSING, mounted
from serving import memory_session
from test_snapshot import home, store_of, take  # noqa: F401 - a fixture
from xen9p import restore
from xen9p.snapshot import SnapshotError
from xen9p.treediff import Change

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(tmp_path_factory.mktemp("btrfs")) as made:
        yield made


def back(home: Path, name: str, path: str = "", **options: Any) -> list[Change]:  # noqa: F811
    """Restores a path in place."""
    given = {"runtime": home.parent / "none"} | options
    return restore.restore(store_of(home), "home", home, name, restore.clean(path), **given)


def seen(top: Path) -> dict[str, Any]:
    """Everything that there is to see in a tree, the groups of hard links too."""
    found: dict[str, Any] = {}
    inodes: dict[int, str] = {}
    for folder, folders, files in os.walk(top):
        for name in [".", *folders, *files]:
            path = Path(folder, name)
            st = path.lstat()
            content: object = None
            if stat.S_ISREG(st.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(st.st_mode):
                content = os.readlink(path)
            rel = str(path.relative_to(top))
            xattrs = {n: os.getxattr(path, n, follow_symlinks=False) for n in os.listxattr(path, follow_symlinks=False)}
            twin = inodes.setdefault(st.st_ino, rel) if not stat.S_ISDIR(st.st_mode) else rel
            found[rel] = (st.st_mode, st.st_uid, st.st_gid, st.st_rdev, st.st_mtime_ns, content, xattrs, twin)
    return found


def fill(home: Path, rng: random.Random) -> None:  # noqa: F811
    """Directories, files of all kinds and sizes, links, devices, attributes."""
    for i in range(6):
        (home / f"d{i}/sub").mkdir(parents=True)
        for k in range(6):
            path = home / f"d{i}/f{k}"
            path.write_bytes(rng.randbytes(rng.choice((0, 10, 3000, 5000, 200_000))))
            path.chmod(rng.choice((0o600, 0o644, 0o4755)))
            os.chown(path, rng.randrange(3), rng.randrange(3))
        (home / f"d{i}/sub/s").symlink_to(f"../f{i}")
        os.mkfifo(home / f"d{i}/sub/fifo")
        os.link(home / f"d{i}/f0", home / f"d{i}/sub/hard")
    os.mknod(home / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.setxattr(home / "d0/f1", "user.a", b"value")


def disturb(home: Path, rng: random.Random) -> None:  # noqa: F811
    """What guests do to it."""
    for count in range(25):
        every = [p for p in sorted(home.rglob("*")) if not p.is_symlink()]
        files = [p for p in every if p.is_file()]
        path = rng.choice(every)
        match rng.randrange(9):
            case 0:
                rng.choice(files).write_bytes(rng.randbytes(rng.randrange(100_000)))
            case 1 if path.is_dir() and len(every) > 20:
                shutil.rmtree(path)
            case 2:
                path.chmod(rng.choice((0o700, 0o755, 0o640)))
                os.chown(path, rng.randrange(5), rng.randrange(5))
            case 3:
                folder = rng.choice([home, *(p for p in every if p.is_dir())])
                if not folder.is_relative_to(path):
                    path.rename(folder / f"moved{count}")
            case 4:
                rng.choice(files).unlink()
            case 5:
                folder = rng.choice([home, *(p for p in every if p.is_dir())])
                (folder / f"new{count}").mkdir()
                (folder / f"new{count}/x").write_text("new")
            case 6:
                chosen = rng.choice(files)
                chosen.unlink()
                chosen.symlink_to("/etc/passwd")
            case 7:
                os.link(rng.choice(files), home / f"link{count}")
            case 8:
                os.setxattr(rng.choice(files), "user.b", b"%d" % count)


@pytest.mark.parametrize("seed", range(12))
def test_all_of_it_online(home: Path, seed: int) -> None:  # noqa: F811
    rng = random.Random(seed)
    fill(home, rng)
    take(home, "a")
    before = seen(home)
    disturb(home, rng)
    assert seen(home) != before
    assert back(home, "a")
    after = seen(home)
    assert {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} == set()
    assert back(home, "a") == []
    assert seen(home.parent / ".snapshots/home/a") == before


def test_by_a_swap(home: Path) -> None:  # noqa: F811
    fill(home, random.Random(1))
    take(home, "a")
    before = seen(home)
    disturb(home, random.Random(2))
    store_of(home).swap("home", "a", home)
    assert seen(home) == before
    (home / "writable").touch()
    assert [p.name for p in (home.parent / ".snapshots/.meta").glob("tmp-*")] == []


def test_one_file_and_one_directory(home: Path) -> None:  # noqa: F811
    (home / "d").mkdir()
    for name in ("d/one", "d/two", "three"):
        (home / name).write_text(name)
    take(home, "a")
    for name in ("d/one", "d/two", "three"):
        (home / name).write_text("changed")
    (home / "d/new").write_text("new")
    assert [c.path for c in back(home, "a", "/d/one/")] == [b"d/one"]
    assert [(home / n).read_text() for n in ("d/one", "d/two", "three")] == ["d/one", "changed", "changed"]
    back(home, "a", "d")
    assert sorted(os.listdir(home / "d")) == ["one", "two"]
    assert (home / "d/two").read_text() == "d/two"
    assert (home / "three").read_text() == "changed"


def test_what_went_with_a_directory_above(home: Path) -> None:  # noqa: F811
    (home / "a/b").mkdir(parents=True)
    (home / "a/b/f").write_text("f")
    (home / "a/b").chmod(0o750)
    take(home, "s")
    (home / "a").rename(home / "z")
    back(home, "s", "a/b/f")
    assert (home / "a/b/f").read_text() == "f"
    assert stat.S_IMODE((home / "a/b").stat().st_mode) == 0o750
    assert (home / "z/b/f").exists()
    shutil.rmtree(home / "a")
    shutil.rmtree(home / "z")
    back(home, "s", "a/b/f")
    assert (home / "a/b/f").read_text() == "f"


def test_a_link_that_a_guest_put_there_leads_nowhere(home: Path, tmp_path: Path) -> None:  # noqa: F811
    """Nothing outside of the export is written, and one line says why."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("dom0's")
    (home / "d/e").mkdir(parents=True)
    (home / "d/e/f").write_text("the guest's")
    take(home, "a")
    shutil.rmtree(home / "d/e")
    (home / "d/e").symlink_to(outside)
    with pytest.raises(SnapshotError, match="d/e leads through what is no directory any more") as caught:
        back(home, "a", "d/e/f")
    assert "\n" not in str(caught.value)
    assert (outside / "f").read_text() == "dom0's"
    back(home, "a", "d/e")
    assert (home / "d/e/f").read_text() == "the guest's"
    assert (outside / "f").read_text() == "dom0's"
    (home / "d/e/f").unlink()
    (home / "d/e/f").symlink_to(outside / "f")
    back(home, "a")
    assert not (home / "d/e/f").is_symlink()
    (outside / "e").mkdir()
    (home / "d").rename(home / "elsewhere")
    (home / "d").symlink_to(outside)
    with pytest.raises(SnapshotError, match="d/e leads through what is no directory any more"):
        back(home, "a", "d/e/f")
    assert os.listdir(outside / "e") == []
    back(home, "a")
    assert (home / "d/e/f").read_text() == "the guest's"
    assert sorted(os.listdir(outside)) == ["e", "f"]
    assert os.listdir(outside / "e") == []
    assert (outside / "f").read_text() == "dom0's"


def test_depth_beyond_any_path(home: Path) -> None:  # noqa: F811
    """A guest can make directories much deeper than a path is long."""

    def dig(top: Path, content: str) -> None:
        fd = os.open(top, os.O_RDONLY)
        for _ in range(3000):
            os.mkdir("deep", dir_fd=fd)
            below = os.open("deep", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        file = os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
        os.write(file, content.encode())
        os.close(file)
        os.close(fd)

    (home / "a").mkdir()
    dig(home / "a", "one")
    take(home, "s")
    (home / "a").rename(home / "b")
    found = back(home, "s", dry_run=True)
    assert [(c.kind, c.path, c.old) for c in found] == [("renamed", b"b", b"a")]
    back(home, "s")
    assert os.listdir(home) == ["a"]
    assert back(home, "s") == []
    (home / "c").mkdir()
    dig(home / "c", "two")
    found = store_of(home).diff("home", home, "s")
    assert len(found) == 3002
    assert max(len(c.path) for c in found) > 15_000
    back(home, "s")
    assert os.listdir(home) == ["a"]


@pytest.mark.parametrize("path", ["../x", "a/../../x", "a\0b"])
def test_paths_that_lead_elsewhere(path: str) -> None:
    with pytest.raises(SnapshotError, match="is no path in an export"):
        restore.clean(path)


def test_a_path_that_the_snapshot_has_not(home: Path) -> None:  # noqa: F811
    take(home, "a")
    (home / "f").touch()
    with pytest.raises(SnapshotError, match="snapshot a has no f"):
        back(home, "a", "f")
    assert (home / "f").exists()


def test_what_is_open_in_a_guest_is_refused_unless_forced(home: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("open", "looked-at", "d/in"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("before")
    take(home, "a")
    for name in ("open", "looked-at", "d/in"):
        (home / name).write_text("after!")
    (tmp_path / "worker-1-0.pid").write_text(f"{os.getpid()}\n")
    with memory_session(home) as session:
        client = session.client
        client.walk(session.root, b"looked-at")
        fid = client.walk(session.root, b"open")
        client.lopen(fid, os.O_RDWR)
        back(home, "a", "looked-at", runtime=tmp_path)
        assert back(home, "a", runtime=tmp_path, dry_run=True)
        with pytest.raises(SnapshotError, match=r"^open of home is open in a guest") as caught:
            back(home, "a", runtime=tmp_path)
        assert "--force" in caught.value.hint
        assert (home / "d/in").read_text() == "after!"
        back(home, "a", runtime=tmp_path, force=True)
        assert (home / "open").read_text() == "before"
        assert client.read(fid, 0, 10) == b"after!", "whoever has it open keeps it"
        client.write(fid, 0, b"still")
        assert (home / "open").read_text() == "before"


def test_a_dry_run_changes_nothing(home: Path) -> None:  # noqa: F811
    fill(home, random.Random(3))
    take(home, "a")
    disturb(home, random.Random(4))
    before = seen(home)
    assert back(home, "a", dry_run=True)
    assert seen(home) == before


def test_data_is_shared_and_not_copied(home: Path) -> None:  # noqa: F811
    (home / "big").write_bytes(os.urandom(8 << 20))
    take(home, "a")
    (home / "big").unlink()
    os.sync()
    free = os.statvfs(home).f_bfree
    back(home, "a", "big")
    os.sync()
    assert free - os.statvfs(home).f_bfree < 256
