"""Tortures a directory: one file as fsx does, then a tree as fsstress does, and looks whether all of it is sound.

    python3 torture.py run DIRECTORY --seconds 20 --seed 1
    python3 torture.py report DIRECTORY

`run` wants an empty directory. Half of the time goes to one file: reads, writes, truncation, mappings, holes, each
followed by a look at every byte. The other half goes to a tree in which several processes make, link, rename and remove
things under each other's feet. At the end the tree must be readable, its link counts right, its blocks whole and no
record lost. What it prints is the report: a line a file, to be compared with the report that the server's side makes
of the same directory. A fault is printed with what led to it, and the exit code is 1; the same seed makes the same
choices.

Needs nothing but Python, so that it runs in a guest too.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import mmap
import os
import random
import signal
import stat
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final, NoReturn

MOST: Final = 200_000
"""Bytes that the one file may have; with its last page it is no multiple of anything."""
SPANS: Final = (1, 7, 511, 4096, 5000, 65536, 150_000)
BLOCK: Final = 512
BLOCKS: Final = 40
RECORD: Final = 64
HELD: Final = 4
PRUNED: Final = 0.1
NAMES: Final = ("a", "b", "c", "d")
PUNCH: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO: Final = 0x10  # FALLOC_FL_ZERO_RANGE
GRACE: Final = 120  # seconds after which a process hangs


class UnsoundError(Exception):
    """The file system has done something wrong."""


class OneFile:
    """A file and what it has to contain."""

    def __init__(self, path: str, seed: int) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.content = bytearray()
        self.log: list[str] = []
        self.done: Counter[str] = Counter()
        self.lacking: dict[str, str] = {}
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.other = os.open(path, os.O_RDONLY)
        self.operations: list[Callable[[], str]] = [
            self.read, self.read, self.write, self.write, self.write, self.append, self.truncate, self.truncate,
            self.map_read, self.map_write, self.map_write, self.punch, self.zero, self.copy, self.sync, self.drop,
            self.reopen,
        ]  # fmt: skip

    def span(self, end: int) -> tuple[int, int]:
        """Offset and length of a part of the first end bytes, of which there are some."""
        at = self.random.randrange(end)
        return at, min(self.random.choice(SPANS), end - at)

    def put(self, at: int, data: bytes) -> None:
        """What a write does to a file."""
        self.content += bytes(max(at - len(self.content), 0))
        self.content[at : at + len(data)] = data

    # Operations: each returns what it did, "" for nothing.

    def read(self) -> str:
        at, count = self.random.randrange(MOST), self.random.choice(SPANS)
        same("read", os.pread(self.fd, count, at), self.content[at : at + count], at)
        return f"read {count} at {at}"

    def write(self) -> str:
        at, count = self.span(MOST)
        data = self.random.randbytes(count)
        whole(os.pwrite(self.fd, data, at), count)
        self.put(at, data)
        return f"write {count} at {at}"

    def append(self) -> str:
        data = self.random.randbytes(min(self.random.choice(SPANS[:5]), MOST - len(self.content)))
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            whole(os.write(fd, data), len(data))
        finally:
            os.close(fd)
        self.put(len(self.content), data)
        return f"append {len(data)}"

    def truncate(self) -> str:
        size = self.random.randrange(MOST)
        named = self.random.random() < 0.5
        if named:
            os.truncate(self.path, size)
        else:
            os.ftruncate(self.fd, size)
        was = len(self.content)
        self.put(size, b"")
        del self.content[size:]
        return f"{'truncate' if named else 'ftruncate'} {was} to {size}"

    def map_read(self) -> str:
        if not self.content:
            return ""
        at, count = self.span(len(self.content))
        with mmap.mmap(self.other, len(self.content), mmap.MAP_PRIVATE, mmap.PROT_READ) as area:
            same("mapping", area[at : at + count], self.content[at : at + count], at)
        return f"map_read {count} at {at}"

    def map_write(self) -> str:
        if not self.content:
            return ""
        at, count = self.span(len(self.content))
        data, flush = self.random.randbytes(count), self.random.random() < 0.5
        with mmap.mmap(self.fd, len(self.content)) as area:
            area[at : at + count] = data
            if flush:
                area.flush()
        self.put(at, data)
        return f"map_write {count} at {at}{' msync' if flush else ''}"

    def punch(self) -> str:
        return self.emptied("punch", PUNCH)

    def zero(self) -> str:
        return self.emptied("zero", ZERO)

    def emptied(self, name: str, mode: int) -> str:
        at, count = self.span(MOST)
        number, offset, length = ctypes.c_int(mode), ctypes.c_int64(at), ctypes.c_int64(count)
        if LIBC.fallocate(self.fd, number, offset, length):
            raise OSError(ctypes.get_errno(), name)
        if mode == PUNCH:  # which leaves the size as it is
            count = min(count, max(len(self.content) - at, 0))
        if count:
            self.put(at, bytes(count))
        return f"{name} {count} at {at}"

    def copy(self) -> str:
        half = len(self.content) // 2
        if not half:
            return ""
        at, count = self.span(half)
        to = self.random.randrange(half, MOST - count)
        count = os.copy_file_range(self.other, self.fd, count, at, to)
        self.put(to, bytes(self.content[at : at + count]))
        return f"copy {count} from {at} to {to}"

    def sync(self) -> str:
        os.fdatasync(self.fd)
        return "fdatasync"

    def drop(self) -> str:
        """The kernel asks the server again, as far as it can."""
        os.fdatasync(self.fd)
        os.posix_fadvise(self.other, 0, 0, os.POSIX_FADV_DONTNEED)
        return "fadvise DONTNEED"

    def reopen(self) -> str:
        self.close()
        self.fd, self.other = os.open(self.path, os.O_RDWR), os.open(self.path, os.O_RDONLY)
        return "reopen"

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.other)

    def look(self) -> None:
        """Size and every byte."""
        for size in (os.fstat(self.fd).st_size, os.stat(self.path).st_size):
            if size != len(self.content):
                raise UnsoundError(f"the size is {size}, not {len(self.content)}")
        same("all of it", os.pread(self.other, MOST + 1, 0), self.content, 0)

    def run(self, seconds: float) -> None:
        """Random operations; UnsoundError with the last of them."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            act = self.random.choice(self.operations)
            name = act.__name__
            try:
                said = act()
                if said:
                    self.log.append(said)
                    self.done[name] += 1
                self.look()
            except OSError as error:
                # What a file system does not have it refuses the first time, and says so.
                if name not in OPTIONAL or error.errno not in OPTIONAL[name] or self.done[name]:
                    raise UnsoundError(self.told(f"{name}: {error}")) from None
                self.lacking[name] = "EOPNOTSUPP" if error.errno == errno.EOPNOTSUPP else errno.errorcode[error.errno]
                self.operations = [some for some in self.operations if some.__name__ != name]
            except UnsoundError as fault:
                raise UnsoundError(self.told(f"after {name}: {fault}")) from None
        self.close()

    def told(self, what: str) -> str:
        return "\n".join([*self.log[-20:], f"operation {sum(self.done.values())}, {what}"])


OPTIONAL: Final = {
    "map_write": (errno.EINVAL, errno.ENODEV),
    "punch": (errno.EOPNOTSUPP, errno.ENOSYS),
    "zero": (errno.EOPNOTSUPP, errno.ENOSYS),
    "copy": (errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EINVAL),
}
LIBC: Final = ctypes.CDLL(None, use_errno=True)


def same(what: str, found: bytes, wanted: bytes | bytearray, at: int) -> None:
    if found == wanted:
        return
    if len(found) != len(wanted):
        raise UnsoundError(f"{what} at {at}: {len(found)} bytes, not {len(wanted)}")
    wrong = [i for i, (one, two) in enumerate(zip(found, wanted, strict=True)) if one != two]
    raise UnsoundError(f"{what}: {len(wrong)} bytes differ, from {at + wrong[0]} to {at + wrong[-1]}")


def whole(done: int, count: int) -> None:
    if done != count:
        raise UnsoundError(f"{done} bytes of {count} were written")


class Storm:
    """One of the processes that work in a tree. What may go wrong because of the others is said with each operation."""

    ANYWHERE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

    def __init__(self, top: str, seed: int, number: int) -> None:
        self.top = top
        self.number = number
        self.random = random.Random(f"{seed} {number}")
        self.own = f"{top}/own-{number}"
        self.records = 0
        self.held: list[int] = []
        self.operations: tuple[tuple[Callable[[], object], tuple[int, ...]], ...] = (
            (self.record, ()),
            (self.make, (errno.EEXIST, errno.EISDIR, errno.ENXIO)),
            (self.make, (errno.EEXIST, errno.EISDIR, errno.ENXIO)),
            (self.hold, (errno.EISDIR, errno.ENXIO)),
            (self.write_held, ()),
            (self.read, (errno.EISDIR, errno.ENXIO)),
            (self.truncate, (errno.EISDIR, errno.EINVAL)),
            (lambda: os.mkdir(self.path(), 0o755), (errno.EEXIST,)),
            (lambda: os.mkdir(self.path(), 0o755), (errno.EEXIST,)),
            (lambda: os.rmdir(self.path()), (errno.ENOTEMPTY,)),
            (lambda: os.unlink(self.path()), (errno.EISDIR,)),
            (self.prune, (errno.ENOTEMPTY, errno.EISDIR)),
            (lambda: os.link(self.path(), self.path(), follow_symlinks=False), (errno.EEXIST, errno.EPERM)),
            (lambda: os.symlink(self.random.choice(NAMES), self.path()), (errno.EEXIST,)),
            (lambda: os.mkfifo(self.path(), 0o640), (errno.EEXIST,)),
            (lambda: os.rename(self.path(), self.path()), RENAME),
            (lambda: os.rename(self.path(), self.path()), RENAME),
            (lambda: os.chmod(self.path(), self.random.choice((0o755, 0o700, 0o775))), ()),
            (lambda: os.stat(self.path()), ()),
            (lambda: os.lstat(self.path()), ()),
            (lambda: os.listdir(self.path()), ()),
            (lambda: os.readlink(self.path()), (errno.EINVAL,)),
        )

    def path(self) -> str:
        depth = self.random.choice((1, 2, 2, 3))
        return "/".join([self.top, "tree", *(self.random.choice(NAMES) for _ in range(depth))])

    def record(self) -> None:
        """A line in a file of one's own: nobody else's doing may cost it."""
        fd = os.open(self.own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            whole(os.write(fd, record(self.number, self.records)), RECORD)
        finally:
            os.close(fd)
        self.records += 1

    def lost(self) -> list[str]:
        """What is wrong with the file of one's own."""
        if not self.records:
            return []
        with open(self.own, "rb") as file:
            found = file.read()
        wanted = b"".join(record(self.number, n) for n in range(self.records))
        return [] if found == wanted else [f"{self.own}: {len(found)} bytes that are not its {self.records} records"]

    def opened(self, flags: int) -> int:
        """A descriptor of a regular file, -1 for what is none."""
        fd = os.open(self.path(), flags | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return -1
        return fd

    def fill(self, fd: int) -> None:
        """Writes a block whose bytes are all the same."""
        whole(
            os.pwrite(fd, bytes([self.random.randrange(1, 256)]) * BLOCK, BLOCK * self.random.randrange(BLOCKS)), BLOCK
        )

    def make(self) -> None:
        fd = self.opened(os.O_RDWR | os.O_CREAT | self.random.choice((0, 0, os.O_EXCL, os.O_TRUNC)))
        if fd >= 0:
            try:
                self.fill(fd)
            finally:
                os.close(fd)

    def hold(self) -> None:
        fd = self.opened(os.O_RDWR)
        if fd >= 0:
            self.held.append(fd)
        if len(self.held) > HELD:
            os.close(self.held.pop(0))

    def write_held(self) -> None:
        """Its name may be gone or another by now."""
        if self.held:
            fd = self.random.choice(self.held)
            self.fill(fd)
            os.fstat(fd)

    def read(self) -> None:
        fd = self.opened(os.O_RDONLY)
        if fd >= 0:
            try:
                os.read(fd, BLOCK * BLOCKS)
            finally:
                os.close(fd)

    def prune(self) -> None:
        """Removes a whole directory, unless somebody gets in the way; seldom, or there would be no tree."""
        if self.random.random() > PRUNED:
            return
        for folder, folders, files in os.walk(self.path(), topdown=False):
            for name in files:
                os.unlink(f"{folder}/{name}")
            for name in folders:
                path = f"{folder}/{name}"
                if os.path.islink(path):
                    os.unlink(path)
                else:
                    os.rmdir(path)

    def truncate(self) -> None:
        os.truncate(self.path(), BLOCK * self.random.randrange(BLOCKS))

    def run(self, seconds: float) -> tuple[int, int]:
        """(operations, of which the others have made fail)."""
        end = time.monotonic() + seconds
        done = failed = 0
        while time.monotonic() < end:
            act, may = self.random.choice(self.operations)
            done += 1
            try:
                act()
            except OSError as error:
                if error.errno not in (*self.ANYWHERE, *may):
                    raise UnsoundError(f"process {self.number}, operation {done}: {error!r}") from None
                failed += 1
        for fd in self.held:
            os.close(fd)
        return done, failed


RENAME: Final = (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.EINVAL)


def record(number: int, count: int) -> bytes:
    return f"process {number} record {count}".encode().ljust(RECORD - 1, b".") + b"\n"


def storm(top: str, seed: int, seconds: float, processes: int) -> tuple[int, int]:
    """Lets the processes loose; (operations, failed ones). UnsoundError if one has seen something wrong, or hangs."""
    os.mkdir(f"{top}/tree")
    pipes: list[tuple[int, int]] = []
    for number in range(processes):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            _storm(Storm(top, seed, number), seconds, write)
        os.close(write)
        pipes.append((pid, read))
    done = failed = 0
    faults = []
    for number, (pid, read) in enumerate(pipes):
        with open(read, encoding="utf-8") as file:
            told = file.read()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            faults.append(f"process {number} was ended by signal {os.WTERMSIG(status)}: {signal.SIGALRM} if it hung")
        elif os.WEXITSTATUS(status):
            faults.append(told)
        else:
            operations, refused, records = map(int, told.split())
            done, failed = done + operations, failed + refused
            one = Storm(top, seed, number)
            one.records = records
            faults += one.lost()
    if faults:
        raise UnsoundError("\n".join(faults))
    return done, failed


def _storm(one: Storm, seconds: float, write: int) -> NoReturn:
    """In the child."""
    code = 1
    try:
        signal.alarm(int(seconds) + GRACE)
        told = "{} {} {}".format(*one.run(seconds), one.records)
        code = 0
    except Exception as error:
        told = str(error) if isinstance(error, UnsoundError) else repr(error)
    with suppress(BaseException):
        os.write(write, told.encode())
    os._exit(code)


def report(top: str) -> list[str]:
    """A line for each file: name, mode, link count (not of directories), size, what is in it."""
    return [line for line, _ in entries(top)]


def entries(top: str) -> Iterator[tuple[str, tuple[str, os.stat_result, bytes]]]:
    """Lines of the report, and (path, attributes, content or target) of each."""
    for folder, folders, files in os.walk(top, onerror=_unreadable):
        folders.sort()
        for name in sorted(files + folders):
            path = os.path.join(folder, name)
            s = os.lstat(path)
            content = b""
            if stat.S_ISREG(s.st_mode):
                with open(path, "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(s.st_mode):
                content = os.fsencode(os.readlink(path))
            size = "- -" if stat.S_ISDIR(s.st_mode) else f"{s.st_nlink} {s.st_size}"
            yield (
                f"{os.path.relpath(path, top)} {s.st_mode:o} {size} {zlib.crc32(content):08x}",
                (path, s, content),
            )


def _unreadable(error: OSError) -> NoReturn:
    raise UnsoundError(f"the tree cannot be read: {error}")


def check(top: str, loose: bool) -> list[str]:
    """Looks at the whole tree; returns its report. UnsoundError if something is wrong."""
    lines, faults = [], []
    paths: dict[tuple[int, int], list[str]] = {}
    links: dict[tuple[int, int], int] = {}
    for line, (path, s, content) in entries(top):
        lines.append(line)
        key = s.st_dev, s.st_ino
        if stat.S_ISDIR(s.st_mode):
            with os.scandir(path) as found:
                folders = sum(entry.is_dir(follow_symlinks=False) for entry in found)
            if s.st_nlink not in (1, 2 + folders) and not loose:
                faults.append(f"{path}: {s.st_nlink} links with {folders} directories in it")
            continue
        paths.setdefault(key, []).append(path)
        if links.setdefault(key, s.st_nlink) != s.st_nlink:
            faults.append(f"{path}: {s.st_nlink} links, {links[key]} by another of its names")
        if (stat.S_ISREG(s.st_mode) or stat.S_ISLNK(s.st_mode)) and s.st_size != len(content):
            faults.append(f"{path}: size {s.st_size}, and {len(content)} bytes in it")
        if stat.S_ISREG(s.st_mode) and path.startswith(f"{top}/tree/"):
            torn = [at for at in range(0, len(content), BLOCK) if len(set(content[at : at + BLOCK])) > 1]
            if torn or len(content) % BLOCK:
                faults.append(f"{path}: {len(content)} bytes, torn blocks at {torn}")
    for key, names in paths.items():
        if links[key] != len(names):
            faults.append(f"{' '.join(names)}: {links[key]} links, not {len(names)}")
    if faults:
        raise UnsoundError("\n".join(faults))
    return lines


def sync(top: str) -> None:
    """syncfs(2): what others of the machine have to write is not waited for."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if LIBC.syncfs(fd):
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(fd)


def run(top: str, args: argparse.Namespace) -> list[str]:
    """All of it; returns the report."""
    seconds, seed, processes = args.seconds, args.seed, args.processes
    signal.alarm(int(seconds) + 3 * GRACE)
    file = OneFile(f"{top}/file", seed)
    file.run(seconds / 2)
    counts = " ".join(f"{name}={count}" for name, count in sorted(file.done.items()))
    lacks = "".join(f", no {name} ({why})" for name, why in file.lacking.items())
    print(f"# one file: {sum(file.done.values())} operations{lacks}: {counts}", flush=True)
    done, failed = storm(top, seed, seconds / 2, processes)
    print(f"# tree: {done} operations by {processes} processes, {failed} of them in each other's way", flush=True)
    sync(top)
    if args.drop_caches:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as caches:
            caches.write("3")
    with open(f"{top}/file", "rb") as again:
        same("the one file, at the end", again.read(), file.content, 0)
    return check(top, args.loose)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Torture a directory.")
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("directory")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--drop-caches", action="store_true", help="before the tree is looked at")
    parser.add_argument("--loose", action="store_true", help="do not look at link counts of directories")
    args = parser.parse_args(argv)
    try:
        if args.what == "report":
            lines = report(args.directory)
        elif os.listdir(args.directory):
            raise UnsoundError(f"{args.directory} is not empty: name an empty directory")
        else:
            lines = run(args.directory, args)
    except (UnsoundError, OSError) as error:
        print(f"seed {args.seed}: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
