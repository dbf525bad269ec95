"""Quotas on real filesystems: btrfs and ext4 on loop devices. Who is over one is refused, and nobody else."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from confined import confined_session
from loopmount import NO_MOUNTS, mounted, subvolume, tools
from xen9p import policy, quota
from xen9p.client import Client
from xen9p.errors import PolicyError, Xen9pError
from xen9p.loop import Loop
from xen9p.quota import Quota
from xen9p.quotas import Quotas

MIB = 1 << 20
pytestmark = pytest.mark.skipif(bool(NO_MOUNTS), reason=NO_MOUNTS)


@pytest.fixture
def btrfs(tmp_path: Path) -> Iterator[Path]:
    tools("btrfs")
    with mounted(tmp_path) as point:
        yield point


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    tools("setquota")
    make = ("mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota")
    with mounted(tmp_path, make, "prjquota") as point:
        yield point


def fill(client: Client, root: int, name: bytes, mib: int) -> int:
    """Writes so much and has it on the disk; the errno that stopped it, or 0."""
    try:
        client.write_file(root, name, os.urandom(MIB) * mib)
        with client.walked(root, name) as fid:
            client.lopen(fid, os.O_RDWR)
            client.fsync(fid)
    except OSError as error:
        return error.errno or 0
    return 0


def test_btrfs(btrfs: Path) -> None:
    """A guest that fills its export gets EDQUOT; its neighbour on the same filesystem does not notice."""
    small, other = subvolume(btrfs / "small"), subvolume(btrfs / "other")
    subprocess.run(["btrfs", "quota", "enable", str(btrfs)], check=True)
    quota.enforce(small, Quota(16 * MIB))
    with confined_session(small) as (mine, mine_root), confined_session(other) as (theirs, theirs_root):
        assert fill(mine, mine_root, b"a", 8) == 0
        assert fill(mine, mine_root, b"b", 16) == errno.EDQUOT
        assert fill(theirs, theirs_root, b"a", 40) == 0
        quota.enforce(small, Quota(64 * MIB))  # under its feet
        assert fill(mine, mine_root, b"c", 16) == 0
        quota.enforce(small, Quota())
        assert fill(mine, mine_root, b"d", 50) == 0


def test_btrfs_without_quotas_says_what_to_do(btrfs: Path) -> None:
    small = subvolume(btrfs / "small")
    with pytest.raises(Xen9pError, match=f"if quotas are off there: btrfs quota enable {btrfs}") as caught:
        quota.enforce(small, Quota(16 * MIB))
    assert "\n" not in str(caught.value)


def test_what_btrfs_cannot_do_is_said_by_policy_check(btrfs: Path, tmp_path: Path) -> None:
    plain = btrfs / "plain"
    plain.mkdir()
    small = subvolume(btrfs / "small")
    assert quota.problems({small: Quota(16 * MIB)}) == []
    file = tmp_path / "policy.toml"
    for path, most, line in (
        (plain, 'bytes = "16M"', "it is no subvolume"),
        (small, "files = 1000", "btrfs cannot limit files"),
    ):
        file.write_text(
            f'version = 1\n[exports.e]\npath = "{path}"\n[[rules]]\nguest = "g"\nexport = "e"\nquota = {{{most}}}\n'
        )
        policy.load(file, check_paths=False)  # no reason for the service not to start
        with pytest.raises(PolicyError, match=line):
            policy.load(file, check_paths=True)


def test_ext4(ext4: Path) -> None:
    """Bytes and files, of what was there before too; and the guest's df shows the quota."""
    small, other = ext4 / "small", ext4 / "other"
    (small / "d").mkdir(parents=True)
    (small / "d" / "before").write_bytes(b"x" * MIB)
    os.mkfifo(small / "fifo")
    other.mkdir()
    assert not quota.joined(small, quota.project_of(small))
    quota.enforce(small, Quota(16 * MIB, 24))
    assert quota.joined(small, quota.project_of(small))
    with confined_session(small) as (mine, root), confined_session(other) as (theirs, theirs_root):
        shown = mine.statfs(root)
        assert (shown.blocks * shown.bsize, shown.files) == (16 * MIB, 24)
        assert fill(mine, root, b"a", 8) == 0
        assert fill(mine, root, b"b", 16) in (errno.EDQUOT, errno.ENOSPC)
        made = 0
        with suppress(OSError):
            for made in range(100):
                mine.mkdir(root, f"{made}".encode())
        assert 10 < made < 24
        assert fill(theirs, theirs_root, b"a", 40) == 0
        for i in range(30):
            theirs.mkdir(theirs_root, f"{i}".encode())
        quota.enforce(small, Quota())
        mine.mkdir(root, b"one more")


def test_a_filesystem_that_has_none(tmp_path: Path) -> None:
    point = tmp_path / "tmpfs"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
    try:
        line = f"quota of {point}: tmpfs has none that could be used (have the export on btrfs, ext4 or xfs)"
        assert quota.problems({point: Quota(MIB)}) == [line]
        with pytest.raises(Xen9pError) as caught:
            quota.enforce(point, Quota(MIB))
        assert str(caught.value) == line
    finally:
        subprocess.run(["umount", point], check=True)


def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert quota.problems({gone: Quota(MIB)}) == [
        f"quota of {gone}: No such file or directory (create it or correct the path)"
    ]
    with pytest.raises(Xen9pError, match="create it or correct the path"):
        quota.enforce(gone, Quota(MIB))


def test_a_tool_that_is_missing(btrfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = subvolume(btrfs / "small")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Xen9pError, match=r"btrfs is missing \(install btrfs-progs\)"):
        quota.enforce(small, Quota(MIB))


def test_the_mount_of_a_path_with_odd_names(tmp_path: Path) -> None:
    point = tmp_path / "a b\\040c"
    point.mkdir()
    assert quota.mount_of(point).point != point
    subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
    try:
        (point / "d").mkdir()
        assert quota.mount_of(point / "d").point == point
        assert quota.mount_of(point / "d").kind == "tmpfs"
    finally:
        subprocess.run(["umount", point], check=True)


@pytest.fixture
def says_ext4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is taken for one on ext4: not every kernel has project quotas."""
    monkeypatch.setattr(quota, "mount_of", lambda path: quota.Mount("ext4", path.resolve(strict=True) and tmp_path, ""))
    (tmp_path / "a" / "b").mkdir(parents=True)
    return tmp_path


def pretended(folder: Path, chattr: str) -> Path:
    """Tools in a directory that say what they were asked for in a file."""
    (folder / "tools").mkdir()
    for name, work in (("chattr", chattr), ("setquota", "")):
        (folder / "tools" / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{folder}/said\n{work}\n')
        (folder / "tools" / name).chmod(0o755)
    return folder / "said"


def test_limits_that_would_bound_nothing_are_not_set(says_ext4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = pretended(says_ext4, "echo no projects here >&2; exit 1")
    monkeypatch.setenv("PATH", f"{says_ext4}/tools:{os.environ['PATH']}")
    with pytest.raises(Xen9pError, match=r"no projects here \(mount .* with prjquota; ext4 takes tune2fs"):
        quota.enforce(says_ext4 / "a", Quota(MIB))
    assert "setquota" not in said.read_text()


def test_a_tree_joins_its_project_once_and_as_a_whole(says_ext4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest's tree is gone through once, and not at each reload; one that took too long counts as not done."""
    top = says_ext4 / "a"
    said = pretended(says_ext4, 'case "$1" in -R) exec sleep 9;; esac')
    monkeypatch.setenv("PATH", f"{says_ext4}/tools:{os.environ['PATH']}")
    monkeypatch.setattr(quota, "TIMEOUT", 0.5)
    with pytest.raises(Xen9pError, match="timed out"):
        quota.enforce(top, Quota(MIB))
    number = quota.project_of(top)
    assert said.read_text().splitlines() == [f"chattr -R -f +P -p {number} {top}", f"chattr -p 0 {top}"]
    said.unlink()
    monkeypatch.setattr(quota, "joined", lambda *_: True)
    quota.enforce(top, Quota(MIB))
    assert said.read_text().splitlines() == [f"setquota -P {number} 0 1024 0 0 {says_ext4}"]


def test_a_quota_within_another_is_said(says_ext4: Path) -> None:
    above, below = says_ext4 / "a", says_ext4 / "a" / "b"
    assert quota.problems({below: Quota(MIB), above: Quota(MIB)}) == [
        f"quota of {below}: it is in {above}, which has one too (a file has one project only)"
    ]
    assert quota.problems({above: Quota(MIB), says_ext4 / "gone": Quota(MIB)}) == [
        f"quota of {says_ext4}/gone: No such file or directory (create it or correct the path)"
    ]


# Those that the service has in force.


def run_until(loop: Loop, holds: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        loop.after(0.01, lambda: None)
        loop.step()


def test_a_large_tree_joins_while_others_are_served(says_ext4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hold() returns at once, and says when it holds. One that was cut off begins again."""
    top, go = says_ext4 / "a", says_ext4 / "go"
    said = pretended(says_ext4, f'case "$1" in -R) while [ ! -e {go} ]; do sleep 0.02; done;; esac')
    monkeypatch.setenv("PATH", f"{says_ext4}/tools:{os.environ['PATH']}")
    number = quota.project_of(top)
    all_of_it, itself = f"chattr -R -f +P -p {number} {top}", f"chattr +P -p {number} {top}"
    limits = f"setquota -P {number} 0 1024 0 0 {says_ext4}"
    loop, changed = Loop(), []
    quotas = Quotas(loop, says_ext4 / "quotas.json", lambda: changed.append(1))
    for _ in range(2):
        (line,) = quotas.hold(top, Quota(MIB))
        assert "joins its project first" in line
    run_until(loop, said.exists)
    assert not changed
    monkeypatch.setattr(quota, "joined", lambda *_: True)  # the top comes first
    later = Quotas(loop, says_ext4 / "quotas.json", lambda: changed.append(2))  # after the host has crashed
    later.keep({top: Quota(MIB)})
    assert later.hold(top, Quota(MIB)) == [line]
    go.touch()
    run_until(loop, lambda: len(changed) == 2)
    assert quotas.hold(top, Quota(MIB)) == later.hold(top, Quota(MIB)) == []
    assert said.read_text().splitlines() == [all_of_it, all_of_it, *[itself, limits] * 2]


def test_a_tree_that_cannot_join_is_said_once_and_tried_again(says_ext4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = says_ext4 / "a"
    said = pretended(says_ext4, "echo no projects here >&2; exit 1")
    monkeypatch.setenv("PATH", f"{says_ext4}/tools:{os.environ['PATH']}")
    loop, changed = Loop(), []
    quotas = Quotas(loop, says_ext4 / "quotas.json", lambda: changed.append(1))
    quotas.hold(top, Quota(MIB))
    run_until(loop, lambda: changed)
    (line,) = quotas.hold(top, Quota(MIB))
    assert "no projects here (mount" in line
    assert "setquota" not in said.read_text()
    assert "joins its project first" in quotas.hold(top, Quota(MIB))[0]
    run_until(loop, lambda: len(changed) == 2)


def test_what_the_policy_dropped_while_the_service_was_down_goes(btrfs: Path, tmp_path: Path) -> None:
    kept, dropped, foreign = (subvolume(btrfs / name) for name in ("kept", "dropped", "foreign"))
    subprocess.run(["btrfs", "quota", "enable", str(btrfs)], check=True)
    quota.enforce(foreign, Quota(8 * MIB))  # by hand: not ours to take away

    def limits() -> list[str]:
        shown = subprocess.run(
            ["btrfs", "qgroup", "show", "-r", "--raw", btrfs], check=True, capture_output=True, text=True
        )
        rows = [line.split() for line in shown.stdout.splitlines()[3:]]
        return [row[3] for row in rows]

    first = Quotas(Loop(), tmp_path / "state" / "quotas.json", lambda: None)
    assert first.hold(kept, Quota(16 * MIB)) == first.hold(dropped, Quota(32 * MIB)) == []
    assert limits() == [f"{16 * MIB}", f"{32 * MIB}", f"{8 * MIB}"]
    second = Quotas(Loop(), tmp_path / "state" / "quotas.json", lambda: None)
    second.keep({kept: Quota(16 * MIB)})
    assert limits() == [f"{16 * MIB}", "none", f"{8 * MIB}"]
    third = Quotas(Loop(), tmp_path / "state" / "quotas.json", lambda: None)
    third.keep({})
    assert limits() == ["none", "none", f"{8 * MIB}"]


def test_a_state_that_makes_no_sense_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "quotas.json").write_text("[1]")
    Quotas(Loop(), tmp_path / "quotas.json", lambda: None).keep({})
    assert "does not make sense" in caplog.text
    caplog.clear()
    Quotas(Loop(), tmp_path / "none.json", lambda: None)
    assert not caplog.text
