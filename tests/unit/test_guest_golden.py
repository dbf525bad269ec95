"""The golden tree: found by its inputs, built once, and nothing half-finished is ever taken for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import modules
from testbed import manifest
from testbed.progress import Progress

INPUTS = {"suite": "bookworm"}


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, on a controller that has every tool, with root, and a build that takes no time."""
    module = modules.load("guest_golden")

    def build(inputs: dict[str, Any], sources: Sequence[str], files: Path, out: Path, progress: Progress) -> None:
        assert list(out.iterdir()) == []
        for part in ("vmlinuz", "initrd.img", "root.tar.zst", "kernel-version"):
            (out / part).write_text(part)

    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(module, "check_controller", lambda cache: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: None)
    return module


def provide(golden: ModuleType, target: Path) -> bool:
    return bool(golden.provide(target, INPUTS, [], target, Progress(None)))


def test_built_once(golden: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "golden-1"
    assert provide(golden, target) is True
    assert manifest.read(target) == INPUTS
    assert sorted(path.name for path in target.iterdir()) == ["golden.tar", "kernel-version", "manifest.json"]
    assert provide(golden, target) is False


def test_what_an_interrupted_build_left_is_swept(golden: ModuleType, tmp_path: Path) -> None:
    whole = tmp_path / "golden-0"
    whole.mkdir()
    manifest.write(whole, INPUTS)
    # Killed in the middle, killed before the last rename, and of other inputs.
    for name in ("golden-1", "golden-1.part", "golden-2.part"):
        (tmp_path / name / "tmp").mkdir(parents=True)
        (tmp_path / name / "root.tar.zst").write_text("half")
    manifest.write(tmp_path / "golden-2.part", INPUTS)
    assert provide(golden, tmp_path / "golden-1") is True
    assert sorted(path.name for path in tmp_path.glob("golden-*")) == ["golden-0", "golden-1"]
    assert not (tmp_path / "golden-1" / "root.tar.zst").exists()


def test_a_build_that_fails_leaves_nothing_that_counts(
    golden: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise golden.TestbedError("mmdebstrap failed: E: no network")

    with monkeypatch.context() as patch:
        patch.setattr(golden, "build", fail)
        with pytest.raises(golden.TestbedError):
            provide(golden, tmp_path / "golden-1")
    assert manifest.newest(tmp_path, "golden-") is None
    assert provide(golden, tmp_path / "golden-1") is True


def test_only_root_builds(golden: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(golden.TestbedError, match=r"needs root .* with sudo"):
        provide(golden, tmp_path / "golden-1")


def test_the_command_takes_what_the_controller_is_set_up_with(golden: ModuleType, tmp_path: Path) -> None:
    inputs = {"packages": ["udev"], "suite": "bookworm"}
    command = golden.mmdebstrap(inputs, ["deb http://m.example/debian bookworm main"], tmp_path, tmp_path)
    assert command[-3:] == ["bookworm", str(tmp_path / "root.tar.zst"), "deb http://m.example/debian bookworm main"]


def test_where_it_comes_from_does_not_decide_what_it_is(golden: ModuleType, tmp_path: Path) -> None:
    given = {"suite": "bookworm", "packages": ["b", "a", "b"], "kernel_modules": [], "files": str(tmp_path)}
    assert golden.described({**given, "mirror": "http://a"}) == golden.described({**given, "mirror": ""})
    assert golden.described(given)["packages"] == ["a", "b"]
