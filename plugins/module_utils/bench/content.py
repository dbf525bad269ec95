"""What the full benchmark's sides begin with: the same files below a directory or on a disk, and tools to work with."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ansible.module_utils.guests import client

from . import plan
from .host import BenchError, run
from .settings import Settings
from .sides import DISK, chosen

TOOLS = ("fio", "find", "ls", "tar")
_LIBRARY = re.compile(r"(?:^\s*|=> )(/\S+) \(0x")


def make(given: Settings) -> None:
    """Make the content once, and give each side a copy that shares its blocks: a snapshot, or a disk's image."""
    run("btrfs", "--quiet", "subvolume", "create", str(given.content))
    fill(given.content, given.file_mib)
    sides = [side for side in chosen(given) if side.served != "floor"]
    first: Path | None = None
    for side in sides:
        if side.how != DISK:
            target = given.area / side.name
            if target.is_dir():
                target.rmdir()
            run("btrfs", "--quiet", "subvolume", "snapshot", str(given.content), str(target))
        elif first is None:
            first = given.disk(side.name)
            # Room for all that is written, and inodes for all that is unpacked; nothing lazy.
            run("truncate", f"--size={given.file_mib * 16 + 512}M", str(first))
            eager = "lazy_itable_init=0,lazy_journal_init=0"
            run("mke2fs", "-q", "-F", "-t", "ext4", "-E", eager, "-i", "16384", "-d", str(given.content), str(first))
        else:
            run("cp", "--reflink=always", str(first), str(given.disk(side.name)))


def fill(folder: Path, file_mib: int) -> None:
    """Write the files: some to be read, one for mixed work, two directories to be listed, a tree."""
    block = os.urandom(1 << 20)
    for name in (*(f"read-{number}" for number in range(4)), "mixed-0"):
        with (folder / name).open("wb") as file:
            for number in range(file_mib):
                file.write(number.to_bytes(8, "big") + block[8:])
    for name, count in (("new", 0), ("few", plan.FEW), ("many", plan.MANY)):
        (folder / name).mkdir()
        for number in range(count):
            (folder / name / f"f{number}").touch()
    for branch in range(plan.TREE[0]):
        where = folder / "tree" / f"d{branch}"
        where.mkdir(parents=True)
        for number in range(plan.TREE[1]):
            (where / f"f{number}").write_bytes(block[number : number + 2048])


def bring_tools(given: Settings, tree: Path) -> None:
    """Copy dom0's programs with their libraries, and a tar of the small tree, below *tree*; Debian's own packages."""
    (tree / "bin").mkdir(parents=True)
    (tree / "lib").mkdir()
    for name in TOOLS:
        path = shutil.which(name)
        if path is None:
            raise BenchError(f"{name} is missing on the host: apt-get install --no-install-recommends {name}")
        shutil.copy(path, tree / "bin" / name)
        for library in libraries(run("ldd", path)):
            if library.name.startswith("ld-linux"):
                shutil.copy(library, tree / "ld.so")
            else:
                shutil.copy(library, tree / "lib" / library.name)
    run("tar", "-cf", str(tree / "tree.tar"), "-C", str(given.content), "tree")


def libraries(printed: str) -> list[Path]:
    """The files that ldd names."""
    return [Path(match[1]) for line in printed.splitlines() if (match := _LIBRARY.search(line))]


def install_client(given: Settings, tree: Path) -> None:
    """Give the guest xen9p for its user space, as roles/guest gives it to all guests."""
    found = client.files(Path(given.client))
    if not found:
        raise BenchError(f"{given.client} has no xen9p: run site.yml first")
    for path, (content, mode) in found.items():
        target = tree / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(mode)
