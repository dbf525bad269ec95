"""The disk of a machine that boots by itself: its partition, and its place in the cache."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from testbed import disk, image

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
