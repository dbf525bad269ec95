"""The disk of a machine that boots by itself, and what roles/xen_host sees of such a machine."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from testbed import disk, image

PROBE = Path(__file__).resolve().parents[2] / "roles" / "xen_host" / "files" / "probe.sh"
SPECS = [kind("bookworm", [], ["grub-pc"], [], [], {}, 64) for kind in (image.ImageSpec, disk.DiskSpec)]


def test_a_disk_and_a_filesystem_of_the_same_packages_are_two_images(tmp_path: Path) -> None:
    names = {image.location(tmp_path, spec).name for spec in SPECS}
    assert {name.partition("-")[0] for name in names} == {"host", "disk"}
    # Neither sweeps nor prunes what is the other's.
    (tmp_path / "host-part-1").mkdir()
    image._sweep(tmp_path, disk.DiskSpec.prefix)
    assert (tmp_path / "host-part-1").exists()


def test_the_filesystem_is_in_the_partition(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "here").write_text("on the disk")
    disk._make_disk(tmp_path / "disk", tree, 64)
    sector = (tmp_path / "disk").read_bytes()[:512]
    status, kind, start, count = struct.unpack("<B3xB3xII", sector[446:462])
    assert (status, kind, start, count) == (0x80, 0x83, 2048, 64 * 2048)
    assert sector[510:] == b"\x55\xaa"
    # GRUB's place.
    assert not any((tmp_path / "disk").read_bytes()[512 : 1 << 20])
    command = ["debugfs", "-R", "cat /here", f"{tmp_path / 'disk'}?offset={1 << 20}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "on the disk"


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
    done = subprocess.run(["sh", PROBE], env=env, capture_output=True, text=True, check=True)
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
