"""The torture of a mount, for some seconds: it finds nothing on ours and on a local directory, and does find faults."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import test_fuse
from test_fuse import mounted
from torture import OneFile, Storm, UnsoundError, check, report

SCRIPT = Path(__file__).with_name("torture.py")
WITH_FUSE = pytest.mark.skipif(bool(test_fuse.missing()), reason=f"this machine lacks {test_fuse.missing()}")
SECONDS = os.environ.get("XEN9P_TORTURE", "4")

nothing_stays = test_fuse.nothing_stays


def torture(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "run", str(directory), "--seconds", SECONDS, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=float(SECONDS) + 300)


def found(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The report of a run that went well, in which things have happened."""
    assert done.returncode == 0, done.stderr
    first, second, *lines = done.stdout.splitlines()
    for summary in (first, second):
        operations = re.search(r"(\d+) operations", summary)
        assert operations is not None, summary
        assert int(operations[1]) > 50, summary
    return lines


@pytest.fixture
def here(tmp_path: Path) -> Path:
    path = tmp_path / "here"
    path.mkdir()
    return path


def test_a_local_directory_is_sound(here: Path) -> None:
    assert found(torture(here)) == report(str(here))


@WITH_FUSE
@pytest.mark.parametrize(("cache", "seed"), [("none", "1"), ("timed", "2"), ("coherent", "3")])
def test_a_mount_is_sound(export: Path, tmp_path: Path, cache: str, seed: str) -> None:
    with mounted(export, tmp_path, "--cache", cache) as here:
        done = torture(here, "--seed", seed)
        assert found(done) == report(str(export))
        lacks = set(re.findall(r"no (\w+) \((\w+)\)", done.stdout))
        no_mapping = {("map_write", "ENODEV")} if cache == "none" else set()
        assert lacks == no_mapping | {("punch", "EOPNOTSUPP"), ("zero", "EOPNOTSUPP")}


@WITH_FUSE
def test_a_cache_that_goes_on_saying_what_is_no_longer_so_is_found(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stale.py").write_text(
        "from xen9p.cache import TimedCache\n"
        "class Stale(TimedCache):\n"
        "    def invalidate_data(self, ino, offset=0, count=None):\n"
        "        pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with mounted(export, tmp_path, "--cache", "stale:Stale") as here:
        done = torture(here)
    assert done.returncode == 1
    assert re.search(r"operation \d+, .*(bytes differ|bytes, not)", done.stderr), done.stderr


@WITH_FUSE
def test_an_errno_that_nobody_expects_is_found(export: Path, tmp_path: Path) -> None:
    with mounted(export, tmp_path, "--ro") as here:
        done = torture(here)
    assert done.returncode == 1
    assert os.strerror(errno.EROFS) in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_wrong_with_a_tree_is_said(here: Path) -> None:
    (here / "tree").mkdir()
    (here / "tree" / "f").write_bytes(b"a" * 512 + b"b" * 512)
    os.link(here / "tree" / "f", here / "g")
    assert len(check(str(here), loose=False)) == 3
    (here / "tree" / "f").write_bytes(b"a" * 511 + b"b" * 513)
    with pytest.raises(UnsoundError, match=r"torn blocks at \[0\]"):
        check(str(here), loose=False)
    (here / "tree" / "f").write_bytes(b"")
    os.link(here / "g", here.parent / "elsewhere")
    with pytest.raises(UnsoundError, match="3 links, not 2"):
        check(str(here), loose=False)


def test_a_changed_byte_and_a_lost_record_are_said(here: Path) -> None:
    file = OneFile(str(here / "file"), seed=1)
    while not file.content:
        file.write()
    file.look()
    os.pwrite(file.fd, bytes([file.content[5] ^ 1]), 5)
    with pytest.raises(UnsoundError, match="1 bytes differ, from 5 to 5"):
        file.look()
    file.close()
    storm = Storm(str(here), 1, 0)
    storm.record()
    storm.record()
    assert storm.lost() == []
    os.truncate(storm.own, 64)
    assert "64 bytes that are not its 2 records" in storm.lost()[0]


def test_only_an_empty_directory_is_tortured(here: Path) -> None:
    (here / "precious").touch()
    done = torture(here)
    assert done.returncode == 1
    assert done.stderr == f"seed 1: {here} is not empty: name an empty directory\n"
