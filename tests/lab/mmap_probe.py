"""What mmap(2) and its neighbours do in one directory of a guest: prints JSON, case -> "yes" or an errno's name.

Usage: python3 mmap_probe.py DIRECTORY. Runs in the guest, with the mmap module of dom0's Python beside it:
python3-minimal has none.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable

SIZE = 3 * 4096 + 100
OLD, NEW = b"o" * SIZE, b"new"


def fresh(path: str) -> None:
    with open(path, "wb") as file:
        file.write(OLD)


def mapped(path: str, mode: int, flags: int, protection: int) -> tuple[int, mmap.mmap]:
    handle = os.open(path, mode)
    try:
        return handle, mmap.mmap(handle, SIZE, flags, protection)
    except OSError:
        os.close(handle)
        raise


def read(path: str, mode: int, flags: int) -> bool:
    handle, area = mapped(path, mode, flags, mmap.PROT_READ)
    same = area[:] == OLD
    area.close()
    os.close(handle)
    return same


def write(path: str, flags: int) -> tuple[bool, bytes]:
    """Writes into a mapping at its end; whether the mapping shows it, and what the file holds afterwards."""
    handle, area = mapped(path, os.O_RDWR, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    area[5000 : 5000 + len(NEW)] = NEW
    shown = area[5000 : 5000 + len(NEW)] == NEW
    if flags == mmap.MAP_SHARED:
        area.flush()
    area.close()
    os.close(handle)
    with open(path, "rb") as file:
        return shown, file.read()


def private_write(path: str) -> bool:
    shown, content = write(path, mmap.MAP_PRIVATE)
    return shown and content == OLD


def shared_write(path: str) -> bool:
    shown, content = write(path, mmap.MAP_SHARED)
    return shown and content == OLD[:5000] + NEW + OLD[5000 + len(NEW) :]


def seen_by_read(path: str) -> bool:
    """A store into a shared mapping, and read(2) of another descriptor before any msync(2)."""
    handle, area = mapped(path, os.O_RDWR, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    area[: len(NEW)] = NEW
    other = os.open(path, os.O_RDONLY)
    seen = os.pread(other, len(NEW), 0) == NEW
    area.close()
    os.close(other)
    os.close(handle)
    return seen


def seen_in_mapping(path: str) -> bool:
    """write(2), and then a mapping that was there before."""
    handle, area = mapped(path, os.O_RDONLY, mmap.MAP_SHARED, mmap.PROT_READ)
    _ = area[0]
    with open(path, "r+b") as file:
        file.write(NEW)
    seen = area[: len(NEW)] == NEW
    area.close()
    os.close(handle)
    return seen


def unlinked(path: str) -> bool:
    handle, area = mapped(path, os.O_RDWR, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    os.unlink(path)
    area[: len(NEW)] = NEW
    area.flush()
    same = area[: len(NEW)] == NEW
    area.close()
    os.close(handle)
    return same


def program(path: str) -> bool:
    """Running a program maps it (private, executable)."""
    with open("/bin/true", "rb") as file:
        content = file.read()
    with open(path + ".program", "wb") as file:
        file.write(content)
    os.chmod(path + ".program", 0o755)
    return os.spawnv(os.P_WAIT, path + ".program", ["true"]) == 0


def tmpfile(path: str) -> bool:
    os.close(os.open(os.path.dirname(path), os.O_TMPFILE | os.O_RDWR, 0o600))
    return True


CASES: dict[str, Callable[[str], bool]] = {
    "private, read": lambda path: read(path, os.O_RDONLY, mmap.MAP_PRIVATE),
    "private, written (copy on write)": private_write,
    "a program is run": program,
    "shared, read, descriptor for reading": lambda path: read(path, os.O_RDONLY, mmap.MAP_SHARED),
    "shared, read, descriptor for writing too": lambda path: read(path, os.O_RDWR, mmap.MAP_SHARED),
    "shared, written": shared_write,
    "a store is seen by `read(2)` at once": seen_by_read,
    "`write(2)` is seen in a mapping at once": seen_in_mapping,
    "shared, written after the file is unlinked": unlinked,
    "`O_TMPFILE`": tmpfile,
}


def main() -> None:
    results = []
    path = os.path.join(sys.argv[1], "probe")
    for name, case in CASES.items():
        fresh(path)
        try:
            result = "yes" if case(path) else "no"
        except OSError as error:
            result = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}[error.errno or 0]
        results.append(f'"{name}": "{result}"')
    print("{" + ", ".join(results) + "}")


main()
