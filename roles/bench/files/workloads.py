"""The five workloads, timed inside a guest through each of several directories in turn.

Usage: workloads.py ROUNDS SIDE=DIRECTORY...; prints `sample ROUND WORKLOAD SIDE SECONDS`. Imports only what
Debian's python3-minimal has.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

BLOCK = 256 * 1024
BIG = 64 * 1024 * 1024
WRITTEN = 25 * 1024 * 1024
READS = 500
CREATED = 50
# A directory of 50 files, . and .., which `ls -la` shows as 52 lines.
LISTED = 50
DATA = os.urandom(BLOCK)


def read_big(place: str) -> None:
    """64 MiB in blocks of 256 KiB."""
    handle, buffer, total = os.open(f"{place}/big", os.O_RDONLY), bytearray(BLOCK), 0
    while got := os.readv(handle, [buffer]):
        total += got
    os.close(handle)
    if total != BIG:
        raise SystemExit(f"{place}/big: read {total} bytes instead of {BIG}")


def read_random(place: str) -> None:
    """500 times 4 KiB, at offsets that look random and are the same in each run."""
    handle, buffer, seed = os.open(f"{place}/big", os.O_RDONLY), bytearray(4096), 9
    for _ in range(READS):
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        if os.preadv(handle, [buffer], 4096 * ((seed >> 8) % (BIG // 4096))) != 4096:
            raise SystemExit(f"{place}/big: short read")
    os.close(handle)


def write(place: str) -> None:
    """25 MiB in blocks of 256 KiB to a new file, then fsync."""
    handle = os.open(f"{place}/out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for _ in range(WRITTEN // BLOCK):
        if os.write(handle, DATA) != BLOCK:
            raise SystemExit(f"{place}/out: short write")
    os.fsync(handle)
    os.close(handle)


def create(place: str, count: int = CREATED) -> None:
    """New files with a line in each."""
    for number in range(count):
        handle = os.open(f"{place}/new/f{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(handle, b"line\n")
        os.close(handle)


def listing(place: str) -> None:
    """`ls -la` of a directory of 52; the program's own start counts, and is the same on all sides."""
    quiet = (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)
    child = os.posix_spawn("/bin/ls", ["ls", "-la", f"{place}/list"], os.environ, file_actions=[quiet])
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit(f"{place}/list: ls failed")


WORKLOADS: dict[str, Callable[[str], None]] = {
    "read_big": read_big,
    "read_random": read_random,
    "write": write,
    "create": create,
    "listing": listing,
}


def prepare(place: str) -> None:
    """Make what the workloads read."""
    for name in ("new", "list"):
        os.mkdir(f"{place}/{name}")
    for number in range(LISTED):
        os.close(os.open(f"{place}/list/file-{number}", os.O_WRONLY | os.O_CREAT, 0o644))
    handle = os.open(f"{place}/big", os.O_WRONLY | os.O_CREAT, 0o644)
    for _ in range(BIG // BLOCK):
        os.write(handle, DATA)
    os.fsync(handle)
    os.close(handle)


def tidy(workload: str, place: str) -> None:
    """Take away what a workload made."""
    if workload == "write":
        os.unlink(f"{place}/out")
    if workload == "create":
        for name in os.listdir(f"{place}/new"):
            os.unlink(f"{place}/new/{name}")


def timed(workload: str, place: str) -> float:
    """Return the seconds that a workload takes."""
    began = time.monotonic()
    WORKLOADS[workload](place)
    spent = time.monotonic() - began
    tidy(workload, place)
    return spent


def main() -> None:
    """Warm up once, then measure; every other round goes through the sides in reverse."""
    rounds = int(sys.argv[1])
    sides = [word.split("=", 1) for word in sys.argv[2:]]
    for _, place in sides:
        prepare(place)
        for workload in WORKLOADS:
            timed(workload, place)
    for number in range(rounds):
        lines = []
        for workload in WORKLOADS:
            for side, place in sides if number % 2 == 0 else sides[::-1]:
                lines.append(f"sample {number} {workload} {side} {timed(workload, place):.4f}")
        # Printed between rounds: sending it would take the processor away from what is timed.
        print("\n".join(lines), flush=True)
        time.sleep(0.3)


if __name__ == "__main__":
    main()
