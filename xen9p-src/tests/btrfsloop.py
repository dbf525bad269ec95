"""A btrfs of its own in a file, mounted: the real thing, for tests by root."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from confined import has_capability

MISSING = (
    "mounting takes CAP_SYS_ADMIN" if not has_capability(21)
    else "there are no loop devices" if not Path("/dev/loop-control").exists()
    else "btrfs-progs is not installed" if shutil.which("mkfs.btrfs", path="/usr/sbin:/sbin:/usr/bin") is None
    else ""
)  # fmt: skip


@contextmanager
def mounted(folder: Path, mib: int = 600) -> Iterator[Path]:
    """Where it is mounted."""
    image, point = folder / "btrfs.image", folder / "store"
    with image.open("wb") as file:
        file.truncate(mib << 20)
    point.mkdir()
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, capture_output=True)
    done = subprocess.run(["mount", "-o", "loop,noatime", image, point], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot be mounted here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)
        image.unlink()


def subvolume(path: Path) -> Path:
    """A new one."""
    subprocess.run(["btrfs", "subvolume", "create", str(path)], check=True, capture_output=True)
    return path
