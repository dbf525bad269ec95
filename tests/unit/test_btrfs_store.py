"""The store never formats what holds data, and says what is wrong with device, size and room in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import modules

GIB = 2**30


@pytest.fixture(scope="module")
def store() -> ModuleType:
    return modules.load("btrfs_store")


class Commands:
    """What the module runs, with the answers of a machine whose disk holds *signatures*."""

    def __init__(self, signatures: list[str]) -> None:
        self.signatures = signatures
        self.ran: list[tuple[str, ...]] = []

    def __call__(self, *command: str) -> str:
        self.ran.append(command)
        if command[0] == "wipefs":
            return json.dumps({"signatures": [{"type": kind} for kind in self.signatures]})
        return ""

    @property
    def formatted(self) -> bool:
        return any(command[0] == "mkfs.btrfs" for command in self.ran)


def a_store(store: ModuleType, folder: Path, **more: Any) -> Any:
    """A store in a file of 5 GiB (sparse)."""
    source = folder / "store.img"
    with source.open("wb") as file:
        file.truncate(5 * GIB)
    wanted: dict[str, Any] = {
        "source": source,
        "is_file": True,
        "size": 5,
        "minimum": 4,
        "mount": folder,
        "options": "noatime",
        "subvolumes": [],
        "force": False,
        "dry": False,
    }
    return store.Store(**{**wanted, **more})


@pytest.mark.parametrize("signatures", [["ext4"], ["gpt", "PMBR"], ["LVM2_member"], ["btrfs", "ext4"]])
def test_a_device_with_data_is_refused(
    store: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signatures: list[str]
) -> None:
    commands = Commands(signatures)
    monkeypatch.setattr(store, "run", commands)
    with pytest.raises(store.StoreError, match=r"holds data .* and is not touched") as caught:
        a_store(store, tmp_path).have_filesystem()
    assert "store_force_format: true" in str(caught.value)
    assert signatures[0] in str(caught.value)
    assert not commands.formatted
    # Told to, it does; and only then.
    a_store(store, tmp_path, force=True, dry=True).have_filesystem()
    assert not commands.formatted
    a_store(store, tmp_path, force=True).have_filesystem()
    assert commands.formatted


@pytest.mark.parametrize(("signatures", "formatted"), [(["btrfs"], False), ([], True)])
def test_btrfs_is_kept_and_an_empty_device_is_formatted(
    store: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signatures: list[str], formatted: bool
) -> None:
    commands = Commands(signatures)
    monkeypatch.setattr(store, "run", commands)
    a_store(store, tmp_path).have_filesystem()
    assert commands.formatted is formatted


def test_a_new_filesystem_gets_the_checksums_that_are_asked_for(
    store: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands([])
    monkeypatch.setattr(store, "run", commands)
    for checksum in ("xxhash", "sha256"):
        a_store(store, tmp_path, checksum=checksum).have_filesystem()
        words = next(command for command in reversed(commands.ran) if command[0] == "mkfs.btrfs")
        assert words[words.index("--csum") + 1] == checksum


def test_a_real_filesystem_is_seen_by_the_real_tool(
    store: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by mke2fs, seen by wipefs: no stand-in for either."""
    mke2fs = shutil.which("mke2fs", path="/usr/sbin:/sbin")
    if mke2fs is None:
        pytest.skip("mke2fs (e2fsprogs) is not installed")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    made = a_store(store, tmp_path)
    subprocess.run([mke2fs, "-q", "-F", "-t", "ext4", made.source, "8M"], check=True)
    before = head(made.source)
    with pytest.raises(store.StoreError, match=r"holds data \(ext4\) and is not touched"):
        made.have_filesystem()
    assert head(made.source) == before


def head(path: Path) -> bytes:
    """Return the first 8 MiB."""
    with path.open("rb") as file:
        return file.read(8 << 20)


def test_too_small(store: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(store.StoreError, match=r"has 5.0 GiB, 8 are needed; take a larger one or lower store_minimum"):
        a_store(store, tmp_path, minimum=8).have_filesystem()


def test_no_such_device_names_those_that_are_free(
    store: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "run", lambda *_: "/dev/sda /boot\n/dev/sdb\n")
    with pytest.raises(store.StoreError, match=r"set store_device to one of: /dev/sdb$"):
        a_store(store, tmp_path, is_file=False, source=tmp_path / "none").have_source()
    with pytest.raises(store.StoreError, match="is no block device; use store_loop_file"):
        a_store(store, tmp_path, is_file=False).have_source()


def test_a_full_store_is_refused_while_a_tree_is_missing(
    store: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = SimpleNamespace(f_bavail=100 << 8, f_frsize=4096)
    monkeypatch.setattr(store.os, "statvfs", lambda path: space)
    (tmp_path / "guests" / "g1").mkdir(parents=True)
    full = a_store(store, tmp_path, trees=["guests/g1", "guests/g2"], room=1024)
    with pytest.raises(store.StoreError) as caught:
        full.check_room()
    assert str(caught.value) == (
        f"the store {tmp_path} has 100 MiB free, 1024 are needed for guests/g2:"
        " remove files or take a larger store_device"
    )
    # Enough room, or nothing left to make: no reason to stop.
    a_store(store, tmp_path, trees=["guests/g2"], room=99).check_room()
    a_store(store, tmp_path, trees=["guests/g1"], room=1024).check_room()


@pytest.mark.parametrize(
    ("on", "wanted", "enabled"), [(True, True, 0), (False, True, 1), (False, False, 0), (True, False, 0)]
)
def test_quotas_are_turned_on_once_and_never_off(
    store: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, on: bool, wanted: bool, enabled: int
) -> None:
    commands = Commands([])

    def run(*command: str) -> str:
        answer = commands(*command)
        if command[1:3] == ("qgroup", "show") and not on:
            raise store.StoreError("quotas not enabled")
        return answer

    monkeypatch.setattr(store, "run", run)
    made = a_store(store, tmp_path, quotas=wanted)
    monkeypatch.setattr(made, "mounted_type", lambda: "btrfs")
    monkeypatch.setattr(made, "have_unit", lambda: None)
    made.converge()
    assert commands.ran.count(("btrfs", "quota", "enable", str(tmp_path))) == enabled
    assert len(made.actions) == enabled
