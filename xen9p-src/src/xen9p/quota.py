"""How much an export's directory may hold: said by the policy, enforced by the filesystem that it lies on.

btrfs: the directory is a subvolume, and its qgroup gets a limit (bytes; btrfs has none for files). ext4 and xfs: the
directory gets a project, and the project a quota. Debian's own tools do it: btrfs-progs, e2fsprogs, quota.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xen9p.errors import Xen9pError
from xen9p.sizes import size_text

SUBVOLUME: Final = 256
"""The inode of every btrfs subvolume's top, and of nothing else there."""
PROJECT_KINDS: Final = ("ext4", "xfs")
TIMEOUT: Final = 60.0

# linux/fs.h
FS_IOC_FSGETXATTR: Final = 0x801C581F
FS_XFLAG_PROJINHERIT: Final = 0x200
FSXATTR: Final = struct.Struct("=I8xI12x")
"""struct fsxattr: fsx_xflags, fsx_projid."""


@dataclass(frozen=True, slots=True)
class Quota:
    """How much an export's directory may hold; 0: as much as there is room for."""

    bytes: int = 0
    files: int = 0

    def __str__(self) -> str:
        parts = [f"{size_text(self.bytes)} bytes"] if self.bytes else []
        return " and ".join(parts + ([f"{self.files} files"] if self.files else []))


@dataclass(frozen=True, slots=True)
class Mount:
    """What a directory lies on."""

    kind: str
    point: Path
    options: str
    device: str = ""
    """MAJOR:MINOR of the filesystem itself, the same wherever and whatever of it is mounted."""


def mount_of(path: Path) -> Mount:
    """The mounted filesystem that a directory lies on. Raises OSError, it is missing."""
    real = path.resolve(strict=True)
    best = Mount("", Path("/"), "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point, kind = Path(_unescape(before.split()[4])), after.split()[0]
        # The later of two on one place lies over the earlier.
        if real.is_relative_to(point) and len(point.parts) >= len(best.point.parts):
            best = Mount(kind, point, after.split()[2], before.split()[2])
    return best


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def problems(quotas: Mapping[Path, Quota]) -> list[str]:
    """What keeps quotas from being enforced, as far as it can be seen by looking; a line each."""
    found = []
    for path, quota in quotas.items():
        try:
            problem = _problem(path, quota)
        except OSError as error:
            problem = f"{error.strerror} (create it or correct the path)"
        if problem:
            found.append(f"quota of {path}: {problem}")
    names: dict[int, Path] = {}
    for path in quotas:
        other = names.setdefault(project_of(path), path)
        if other != path:
            found.append(f"quota of {path}: its project is that of {other} as well (rename one of the directories)")
        for above in quotas.keys() & set(path.parents):
            with suppress(OSError):  # said above
                if mount_of(path) == mount_of(above) and mount_of(path).kind in PROJECT_KINDS:
                    found.append(f"quota of {path}: it is in {above}, which has one too (a file has one project only)")
    return found


def _problem(path: Path, quota: Quota) -> str:
    kind = mount_of(path).kind
    if kind == "btrfs":
        if path.stat().st_ino != SUBVOLUME:
            return "it is no subvolume (only these have a quota on btrfs: btrfs subvolume create)"
        if quota.files:
            return "btrfs cannot limit files (leave files out, or have the export on ext4 or xfs)"
    elif kind not in PROJECT_KINDS:
        return f"{kind} has none that could be used (have the export on btrfs, ext4 or xfs)"
    return ""


def joining(path: Path, *, again: bool = False) -> list[str]:
    """The command that puts all that is in a directory into its project, for before enforce(..., join=False). Its exit
    code says nothing. Empty if it takes none: the directory is on btrfs, or has joined already.

    Raises:
        OSError: the directory is missing.
    """
    if mount_of(path).kind not in PROJECT_KINDS:
        return []
    number = project_of(path)
    return [] if joined(path, number) and not again else _join_all(path, str(number))


def _join_all(path: Path, number: str) -> list[str]:
    return ["chattr", "-R", "-f", "+P", "-p", number, str(path)]  # -f: special files have no project


def enforce(path: Path, quota: Quota, *, join: bool = True) -> None:
    """Sets a directory's limits; Quota() takes them away. What is there already stays, and counts.

    Args:
        path: the directory.
        quota: its limits.
        join: whether what is there joins the directory's project here, if it has not yet; else joining() has been done.

    Raises:
        Xen9pError: one line, with the remedy.
    """
    try:
        problem = _problem(path, quota)
        mount = mount_of(path)
    except OSError as error:
        raise Xen9pError(f"quota of {path}: {error.strerror}", "create it or correct the path") from None
    if problem:
        raise Xen9pError(f"quota of {path}: {problem}")
    if mount.kind == "btrfs":
        limit = str(quota.bytes) if quota.bytes else "none"
        remedy = f"if quotas are off there: btrfs quota enable {mount.point}"
        _run(path, ["btrfs", "qgroup", "limit", limit, str(path)], remedy)
        return
    number = str(project_of(path))
    remedy = f"mount {mount.point} with prjquota" + (
        "; ext4 takes tune2fs -O project,quota before" if mount.kind == "ext4" else ""
    )
    if not join:
        _run(path, ["chattr", "+P", "-p", number, str(path)], remedy)
    elif not joined(path, int(number)):
        _join(path, number, remedy)
    # setquota counts in KiB; 0 is none. Soft limits are not used.
    limits = ["0", str(-(-quota.bytes // 1024)), "0", str(quota.files)]
    _run(path, ["setquota", "-P", number, *limits, str(mount.point)], remedy)


def joined(path: Path, project: int) -> bool:
    """Whether a directory is in a project and gives it to what is made there. What comes from elsewhere then is a copy,
    because nothing can be renamed or linked from one project to another.
    """
    attributes = bytearray(FSXATTR.size)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, FS_IOC_FSGETXATTR, attributes)
        finally:
            os.close(fd)
    except OSError:
        return False
    flags, number = FSXATTR.unpack(attributes)
    return bool(flags & FS_XFLAG_PROJINHERIT) and number == project


def _join(path: Path, number: str, remedy: str) -> None:
    """Puts a directory with all that is in it into a project. It takes long, and goes by names that a guest may change
    meanwhile: so it is done once.
    """
    try:
        _run(path, _join_all(path, number), remedy, may_fail=True)
    except Xen9pError:
        _run(
            path, ["chattr", "-p", "0", str(path)], remedy, may_fail=True
        )  # it comes first, and would say that all is in
        raise
    _run(path, ["chattr", "+P", "-p", number, str(path)], remedy)  # without it the limits would bound nothing


def project_of(path: Path) -> int:
    """The number of a directory's project: always the same, and far from those that people choose."""
    return zlib.crc32(os.fsencode(path)) & 0x3FFFFFFF | 1 << 30


def _run(path: Path, command: Iterable[str], remedy: str, *, may_fail: bool = False) -> None:
    command = list(command)
    try:
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT
        )
    except FileNotFoundError:
        package = {"setquota": "quota", "btrfs": "btrfs-progs", "chattr": "e2fsprogs"}[command[0]]
        raise Xen9pError(f"quota of {path}: {command[0]} is missing", f"install {package}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Xen9pError(f"quota of {path}: {command[0]}: {error}") from None
    if done.returncode and not may_fail:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise Xen9pError(f"quota of {path}: {said}", remedy)
