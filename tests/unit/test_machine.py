"""What stands in the way of the testbed is said in one line each, with the remedy."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from testbed import machine


def problems(tmp_path: Path, memory: int = 0, disk: float = 0, port: int | None = None) -> list[str]:
    """What is wrong with this machine; nothing should be by default."""
    return list(machine.problems(memory_mib=memory, disk_gib=disk, directories=[tmp_path], port=port, needs_root=False))


@pytest.fixture(autouse=True)
def _complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tool is there, whatever this machine has."""
    monkeypatch.setattr(shutil, "which", lambda tool, path=None: f"/usr/bin/{tool}")


def test_a_fit_machine_has_no_problems(tmp_path: Path) -> None:
    assert problems(tmp_path) == []


def test_too_little_memory(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, memory=1 << 30)
    assert "MiB of memory are available" in line
    assert "testbed_memory" in line


def test_too_little_disk_where_a_directory_will_be(tmp_path: Path) -> None:
    (line,) = problems(tmp_path / "not" / "yet", disk=1e9)
    assert "GiB are free in" in line
    assert "XEN9P_CACHE" in line


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        (line,) = problems(tmp_path, port=server.getsockname()[1])
    assert "is in use" in line
    assert "testbed_ssh_port" in line


def test_a_missing_tool_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shutil, "which", lambda tool, path=None: None if tool == "qemu-system-x86_64" else f"/usr/bin/{tool}"
    )
    assert problems(tmp_path) == [
        "qemu-system-x86_64 not found: run `make lab`, or `apt install qemu-system-x86`",
    ]


def test_another_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    (line,) = problems(tmp_path)
    assert line == "the testbed runs on Linux on amd64, not on Linux on aarch64"


def test_root_is_wanted_only_where_something_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    wanted: dict[str, Any] = {"memory_mib": 0, "disk_gib": 0.0, "directories": [tmp_path], "port": None}
    assert list(machine.problems(**wanted, needs_root=True)) == []
    monkeypatch.setattr(shutil, "which", lambda tool, path=None: None if tool == "sudo" else f"/usr/bin/{tool}")
    assert list(machine.problems(**wanted, needs_root=True)) == [
        "building the images needs root: install sudo, or run as root",
    ]
    assert list(machine.problems(**wanted, needs_root=False)) == []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert list(machine.problems(**wanted, needs_root=True)) == []
