"""The scripts of roles/xen_host: what they see of a machine, and when they refuse."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

FILES = Path(__file__).resolve().parents[2] / "roles" / "xen_host" / "files"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine's files: plain Debian with GRUB."""
    (tmp_path / "usr/sbin").mkdir(parents=True)
    (tmp_path / "usr/sbin/update-grub").touch(mode=0o755)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\n')
    (tmp_path / "sys/firmware/efi/efivars").mkdir(parents=True)
    return tmp_path


def probe(root: Path) -> list[str]:
    """Return what the role's probe says."""
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "ROOT": str(root)}
    done = subprocess.run(["sh", FILES / "probe.sh"], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_probe_sees_plain_debian(root: Path) -> None:
    assert probe(root) == ["grub", "release debian 12"]
    (root / "usr/sbin/update-grub").unlink()
    (root / "etc/os-release").unlink()
    assert probe(root) == []


def test_the_probe_sees_dom0(root: Path) -> None:
    (root / "proc/xen").mkdir(parents=True)
    (root / "proc/xen/capabilities").write_text("control_d\n")
    assert "dom0" in probe(root)


@pytest.mark.parametrize(("value", "on"), [(b"\x06\0\0\0\x01", True), (b"\x06\0\0\0\x00", False), (b"", False)])
def test_the_probe_sees_secure_boot(root: Path, value: bytes, on: bool) -> None:
    (root / "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c").write_bytes(value)
    assert ("secureboot" in probe(root)) is on


@pytest.mark.parametrize(
    ("default", "code"), [("Debian GNU/Linux, with Xen hypervisor", 0), ("0", 1), ("${saved_entry}", 1), ("", 1)]
)
def test_a_menu_that_would_start_linux_is_refused(tmp_path: Path, default: str, code: int) -> None:
    (tmp_path / "update-grub").write_text(f'#!/bin/sh\necho \'   set default="{default}"\' > "$MENU"\n')
    (tmp_path / "update-grub").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MENU": str(tmp_path / "grub.cfg")}
    done = subprocess.run(["sh", FILES / "menu.sh"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == code
    assert ("is not Xen" in done.stderr) is bool(code)
