"""Does the same random operations in two directories and compares every result: value, errno, bytes, attributes.

    python3 differential.py MOUNTED LOCAL --operations 2000 --seed 1

Needs nothing but Python, so that it runs in a guest too. Prints the first difference with the operations that led to
it and exits with 1; the same seed gives the same operations.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = ("a", "b", "c", "long" * 20, "sp ace", "\u00fcml\u00e4ut", "x" * 255)
BAD = ("x" * 256, "a/.", ".", "./a//b")
SIZES = (0, 1, 7, 4095, 4096, 5000, 131072, 300000)
MODES = (0o644, 0o600, 0o755, 0o444, 0o000, 0o4755, 0o1777)
MOST_OPEN = 6
# The last two are refused by any kernel and by none; how much fits together is the filesystem's business: little.
XATTRS = ("user.a", "user.b", "user.\u00fc", "user.", "nonsense")
XATTR_SIZES = (0, 1, 100, 600)
Outcome = tuple[str, Any]


class Twins:
    """Two directories that have to stay alike."""

    def __init__(self, first: Path, second: Path, seed: int) -> None:
        self.roots = (str(first), str(second))
        self.random = random.Random(seed)
        self.open: list[tuple[int, int]] = []
        self.log: list[str] = []

    def both(self, text: str, act: Callable[[int], Any]) -> Outcome:
        """Does it on each side and compares; act gets 0 or 1."""
        self.log.append(text)
        outcomes = tuple(attempt(act, side) for side in (0, 1))
        if outcomes[0] != outcomes[1]:
            raise AssertionError(f"{text}: mounted {outcomes[0]!r:.300}, local {outcomes[1]!r:.300}")
        return outcomes[0]

    def path(self) -> str:
        """A path of one to three names, most of which exist some of the time."""
        r = self.random
        if r.random() < 0.03:
            return r.choice(BAD)
        return "/".join(r.choice(NAMES[:4] if depth else NAMES) for depth in range(r.choice((1, 1, 2, 2, 3))))

    def on_path(self, text: str, act: Callable[[str], Any]) -> Outcome:
        """Does something with one path."""
        path = self.path()
        return self.both(f"{text} {path}", lambda side: act(f"{self.roots[side]}/{path}"))

    def on_two(self, text: str, act: Callable[[str, str], Any]) -> Outcome:
        """Does something with two paths."""
        old, new = self.path(), self.path()
        return self.both(
            f"{text} {old} {new}", lambda side: act(f"{self.roots[side]}/{old}", f"{self.roots[side]}/{new}")
        )

    # Operations.

    def create(self) -> None:
        flags = os.O_RDWR | os.O_CREAT
        for flag in (os.O_EXCL, os.O_TRUNC, os.O_APPEND):
            flags |= flag if self.random.random() < 0.3 else 0
        self._open(flags)

    def reopen(self) -> None:
        self._open(self.random.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_DIRECTORY)))

    def _open(self, flags: int) -> None:
        path, mode = self.path(), self.random.choice(MODES) & 0o777
        fds: dict[int, int] = {}

        def act(side: int) -> str:
            where = f"{self.roots[side]}/{path}"
            with suppress(OSError):
                if stat.S_ISFIFO(os.stat(where).st_mode):
                    return "would wait"
            fds[side] = os.open(where, flags, mode)
            return "opened"

        try:
            self.both(f"open {path} flags={flags:o} mode={mode:o}", act)
        finally:
            if len(fds) == 1:
                os.close(*fds.values())
        if fds:
            self.open.append((fds[0], fds[1]))
        if len(self.open) > MOST_OPEN:
            self._close(self.open.pop(0))

    def close(self) -> None:
        if self.open:
            self._close(self.open.pop(self.random.randrange(len(self.open))))

    def _close(self, fds: tuple[int, int]) -> None:
        self.both("close", lambda side: os.close(fds[side]))

    def on_open(self, text: str, act: Callable[[int], Any]) -> None:
        """Does something with an open file."""
        if self.open:
            fds = self.random.choice(self.open)
            self.both(text, lambda side: act(fds[side]))

    def pwrite(self) -> None:
        offset, data = self.random.randrange(200000), self.random.randbytes(self.random.choice(SIZES))
        self.on_open(f"pwrite {len(data)} at {offset}", lambda fd: os.pwrite(fd, data, offset))

    def write(self) -> None:
        data = self.random.randbytes(self.random.choice(SIZES[:6]))
        self.on_open(f"write {len(data)}", lambda fd: os.write(fd, data))

    def pread(self) -> None:
        offset, count = self.random.randrange(250000), self.random.choice(SIZES)
        self.on_open(f"pread {count} at {offset}", lambda fd: os.pread(fd, count, offset))

    def read(self) -> None:
        self.on_open("read", lambda fd: os.read(fd, 3000))

    def seek_end(self) -> None:
        self.on_open("lseek to the end", lambda fd: not stat.S_ISDIR(os.fstat(fd).st_mode) and os.lseek(fd, 0, 2))

    def ftruncate(self) -> None:
        size = self.random.randrange(200000)
        self.on_open(f"ftruncate {size}", lambda fd: os.ftruncate(fd, size))

    def fsync(self) -> None:
        self.on_open("fdatasync", os.fdatasync)

    def fstat(self) -> None:
        self.on_open("fstat", lambda fd: attributes(os.fstat(fd)))

    def truncate(self) -> None:
        size = self.random.randrange(100000)
        self.on_path(f"truncate {size}", lambda path: os.truncate(path, size))

    def content(self) -> None:
        self.on_path("content", read_whole)

    def stat(self) -> None:
        self.on_path("stat", lambda path: attributes(os.stat(path)))

    def lstat(self) -> None:
        self.on_path("lstat", lambda path: attributes(os.lstat(path)))

    def list(self) -> None:
        self.on_path("list", listing)

    def mkdir(self) -> None:
        mode = self.random.choice((0o755, 0o700, 0o2775))
        self.on_path(f"mkdir {mode:o}", lambda path: os.mkdir(path, mode))

    def rmdir(self) -> None:
        self.on_path("rmdir", os.rmdir)

    def unlink(self) -> None:
        self.on_path("unlink", os.unlink)

    def mkfifo(self) -> None:
        self.on_path("mkfifo", lambda path: os.mkfifo(path, 0o640))

    def rename(self) -> None:
        self.on_two("rename", os.rename)

    def link(self) -> None:
        self.on_two("link", lambda old, new: os.link(old, new, follow_symlinks=False))

    def symlink(self) -> None:
        target = self.random.choice((self.path(), "../a", ".", "no/where", "t" * 3000))
        self.on_path(f"symlink to {target:.20}", lambda path: os.symlink(target, path))

    def readlink(self) -> None:
        self.on_path("readlink", os.readlink)

    def chmod(self) -> None:
        mode = self.random.choice(MODES)
        self.on_path(f"chmod {mode:o}", lambda path: os.chmod(path, mode))

    def chown(self) -> None:
        uid, gid = self.random.choice((0, 1000, -1)), self.random.choice((0, 1001, -1))
        self.on_path(f"lchown {uid} {gid}", lambda path: os.lchown(path, uid, gid))

    def utime(self) -> None:
        ns = (self.random.randrange(-(10**18), 2 * 10**18), self.random.randrange(2 * 10**18))
        follow = self.random.random() < 0.5

        def act(path: str) -> int:
            os.utime(path, ns=ns, follow_symlinks=follow)
            return os.stat(path, follow_symlinks=follow).st_mtime_ns

        self.on_path(f"utime {ns} follow={follow}", act)

    def setxattr(self) -> None:
        name, value = self.random.choice(XATTRS), self.random.randbytes(self.random.choice(XATTR_SIZES))
        flags = self.random.choice((0, 0, os.XATTR_CREATE, os.XATTR_REPLACE))
        self.on_path(f"setxattr {name} {len(value)} flags={flags}", lambda path: os.setxattr(path, name, value, flags))

    def getxattr(self) -> None:
        name = self.random.choice(XATTRS)
        self.on_path(f"getxattr {name}", lambda path: os.getxattr(path, name))

    def listxattr(self) -> None:
        self.on_path("listxattr", lambda path: sorted(os.listxattr(path)))

    def removexattr(self) -> None:
        name = self.random.choice(XATTRS)
        self.on_path(f"removexattr {name}", lambda path: os.removexattr(path, name))

    def compare(self) -> None:
        """Everything in both trees."""
        self.both("the whole trees", lambda side: whole_tree(self.roots[side]))

    def run(self, count: int) -> None:
        """So many random operations, and at the end a look at everything."""
        frequent = (self.create, self.pwrite, self.pread, self.mkdir, self.stat, self.lstat, self.content, self.rename)
        rare = (
            self.reopen, self.close, self.write, self.read, self.seek_end, self.ftruncate, self.fsync, self.fstat,
            self.truncate, self.list, self.rmdir, self.unlink, self.mkfifo, self.link, self.symlink, self.readlink,
            self.chmod, self.chown, self.utime, self.setxattr, self.getxattr, self.listxattr, self.removexattr,
        )  # fmt: skip
        try:
            for _ in range(count):
                self.random.choice(frequent + rare)()
            self.compare()
        finally:
            for fds in self.open:
                for fd in fds:
                    os.close(fd)


def attempt(act: Callable[[int], Any], side: int) -> Outcome:
    try:
        return "value", act(side)
    except OSError as error:
        return "errno", errno.errorcode.get(error.errno or 0, error.errno)


def attributes(s: os.stat_result) -> tuple[int, ...]:
    """What has to be alike. A directory's size, and times that nobody has set, are the filesystem's business."""
    size = 0 if stat.S_ISDIR(s.st_mode) else s.st_size
    return s.st_mode, s.st_nlink, s.st_uid, s.st_gid, size, s.st_rdev


def listing(path: str) -> list[tuple[str, bool, bool]]:
    with os.scandir(path) as entries:
        return sorted((e.name, e.is_dir(follow_symlinks=False), e.is_symlink()) for e in entries)


def read_whole(path: str) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):
        return b"no file"
    return Path(path).read_bytes()


def whole_tree(root: str) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files + folders):
            path = os.path.join(folder, name)
            s = os.lstat(path)
            extra: Any = read_whole(path) if stat.S_ISREG(s.st_mode) else None
            extra = os.readlink(path) if stat.S_ISLNK(s.st_mode) else extra
            named = sorted(n for n in os.listxattr(path, follow_symlinks=False) if n.startswith("user."))
            xattrs = [(n, os.getxattr(path, n, follow_symlinks=False)) for n in named]
            found.append((os.path.relpath(path, root), attributes(s), extra, xattrs))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare what random operations do in two directories.")
    parser.add_argument("mounted", type=Path)
    parser.add_argument("local", type=Path)
    parser.add_argument("--operations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        print(compare(args.mounted, args.local, args.operations, args.seed))
    except AssertionError as error:
        print(error)
        return 1
    return 0


def compare(mounted: Path, local: Path, operations: int, seed: int) -> str:
    """Compares in a new directory beneath each; says how much. AssertionError for the first difference."""
    for root in (mounted, local):
        root.joinpath("twins").mkdir()
    twins = Twins(mounted / "twins", local / "twins", seed)
    try:
        twins.run(operations)
    except AssertionError as error:
        last = "\n".join(twins.log[-30:])
        raise AssertionError(f"{last}\nseed {seed}, operation {len(twins.log)}: {error}") from None
    return f"{len(twins.log)} operations, no difference"


if __name__ == "__main__":
    sys.exit(main())
