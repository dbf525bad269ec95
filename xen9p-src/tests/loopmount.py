"""A filesystem of its own in a file, mounted: the real thing, for tests by root."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from confined import has_capability

BTRFS = ("mkfs.btrfs", "-q")


def installed(name: str) -> bool:
    """Whether root could run a program."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is not None


NO_MOUNTS = (
    "mounting takes CAP_SYS_ADMIN" if not has_capability(21)
    else "there are no loop devices" if not Path("/dev/loop-control").exists()
    else ""
)  # fmt: skip
MISSING = NO_MOUNTS or ("" if installed(BTRFS[0]) else "btrfs-progs is not installed")


def tools(*names: str) -> None:
    """Skips the test if one of these programs is not there."""
    for name in names:
        if not installed(name):
            pytest.skip(f"{name} is not installed")


def new_image(image: Path, make: Sequence[str] = BTRFS, mib: int = 600) -> None:
    """A file with a new filesystem."""
    with image.open("wb") as file:
        file.truncate(mib << 20)
    subprocess.run([*make, str(image)], check=True, capture_output=True)


def mount(image: Path, point: Path, options: str = "noatime") -> None:
    """Mounts it, or skips the test: not every kernel has every filesystem and option."""
    command = ["mount", "-o", f"loop,{options}", image, point]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot be mounted here: {done.stderr.strip()}")


def unmount(point: Path) -> None:
    """Also when a server that has just been closed is not yet done with it."""
    for _ in range(50):
        if subprocess.run(["umount", point], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "--lazy", point], check=True)


@contextmanager
def mounted(folder: Path, make: Sequence[str] = BTRFS, options: str = "noatime", *, mib: int = 600) -> Iterator[Path]:
    """Where a new one is mounted."""
    tools(make[0])
    image, point = folder / "image", folder / "store"
    new_image(image, make, mib)
    point.mkdir()
    mount(image, point, options)
    try:
        yield point
    finally:
        unmount(point)
        image.unlink()


def subvolume(path: Path) -> Path:
    """A new one."""
    subprocess.run(["btrfs", "subvolume", "create", str(path)], check=True, capture_output=True)
    return path
