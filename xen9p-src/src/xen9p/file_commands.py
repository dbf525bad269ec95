"""What xen9p ls, cat, cp and so on do. One bad path costs a line and the exit code, not the paths after it."""

from __future__ import annotations

import argparse
import errno
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

from xen9p import codec
from xen9p.attributes import Attributes
from xen9p.connect import Place
from xen9p.errors import Xen9pError
from xen9p.meter import Meter
from xen9p.requests import split
from xen9p.sides import Copier, LocalSide, RemoteSide, Side

_READ: Final = 1 << 20
_FATAL: Final = (errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT)
_UNITS: Final = ("", "K", "M", "G", "T")


class _Session:
    """The connections of one command, made as paths name them, and its exit code."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack) -> None:
        self._place = Place.named(args)
        self._stack = stack
        self._sides: dict[str, RemoteSide] = {}
        self.failed = False

    def remote(self, text: str) -> tuple[RemoteSide, bytes]:
        """The side and the path that TAG:PATH means."""
        found = self.parse(text)
        if found is None and self._place.is_socket:
            found = "", os.fsencode(text)
        if found is None:
            raise Xen9pError(f"{text} names no tag", hint="write TAG:PATH, or say --unix or --tcp; see: xen9p tags")
        tag, path = found
        if tag not in self._sides:
            client, root = self._place.client(tag)
            self._stack.callback(client.close)
            self._sides[tag] = RemoteSide(client, root, tag)
        return self._sides[tag], path

    def parse(self, text: str) -> tuple[str, bytes] | None:
        """(tag, path), or None for a local path: one without a colon, or with a slash before it."""
        tag, colon, path = text.partition(":")
        if not colon or "/" in tag:
            return None
        if tag and self._place.is_socket:
            raise Xen9pError(f"{text} names a tag", hint="with --unix and --tcp write :PATH")
        if not tag and not self._place.is_socket:
            raise Xen9pError(f"{text} names no tag", hint="write TAG:PATH, or say --unix or --tcp; see: xen9p tags")
        return tag, os.fsencode(path)

    @contextmanager
    def each(self) -> Iterator[None]:
        """Says what went wrong with one path, unless the connection is gone."""
        try:
            yield
        except BrokenPipeError:
            raise  # who reads standard output has seen enough; main() knows
        except OSError as error:
            if error.errno in _FATAL:
                raise Xen9pError(f"the connection is gone: {error.strerror}", errno=error.errno) from error
            self.failed = True
            print(f"xen9p: error: {_said(error)}", file=sys.stderr)


def _said(error: OSError) -> str:
    name = error.filename
    if name is None:
        return error.strerror or str(error)
    return f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {error.strerror}"


def run(args: argparse.Namespace) -> int:
    """Runs one of the commands; 0 if all went well, 1 if anything failed."""
    if args.command == "tags":
        return _tags(args)
    try:
        with ExitStack() as stack:
            session = _Session(args, stack)
            _COMMANDS[args.command](session, args)
            return 1 if session.failed else 0
    except EOFError as error:
        raise Xen9pError(f"the connection is gone: {error}", errno=errno.ECONNRESET) from error


def _tags(args: argparse.Namespace) -> int:
    from xen9p.transport import xen_front  # noqa: PLC0415
    from xen9p.xenstore import XenStore  # noqa: PLC0415

    xen_front.require_guest()
    store = XenStore(xen_front.XENBUS)
    try:
        tags = sorted(device.tag for device in xen_front.find_all(store))
    finally:
        store.close()
    print(json.dumps({"tags": tags}) if args.json else "\n".join(tags) or "none", flush=True)
    return 0


# Looking.


def _ls(session: _Session, args: argparse.Namespace) -> None:
    for i, text in enumerate(args.paths):
        with session.each():
            side, path = session.remote(text)
            entry = side.stat(path, follow=not args.long)
            if not entry.is_dir:
                _print_rows(side, [_Row(os.fsencode(text), path, entry if args.long else None)])
                continue
            titled = len(args.paths) > 1 or args.recursive
            _ls_directory(side, path, args, (("\n" if i else "") + f"{side.show(path)}:\n") if titled else "")


def _ls_directory(side: RemoteSide, path: bytes, args: argparse.Namespace, title: str) -> None:
    entries = [e for e in side.entries(path) if args.all or not e.name.startswith(b".")]
    below = {e.name: path.rstrip(b"/") + b"/" + e.name for e in entries}
    _print(title)
    if args.long:
        found = zip(below, side.stat_all(path, list(below)), strict=True)
        # What was removed in between is not worth a word.
        _print_rows(side, [_Row(n, below[n], e) for n, e in found if not isinstance(e, OSError)])
    else:
        _print_rows(side, [_Row(name, where, None) for name, where in below.items()])
    if args.recursive:
        for entry in entries:
            if entry.qid.type & codec.QT_DIR:
                where = below[entry.name]
                _ls_directory(side, where, args, f"\n{side.show(where)}:\n")


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of ls: what to show, where it is, and with -l what it is."""

    shown: bytes
    path: bytes
    entry: Attributes | None


def _print_rows(side: RemoteSide, rows: list[_Row]) -> None:
    out = []
    width = max((len(_size_or_device(row.entry)) for row in rows if row.entry), default=0)
    for row in rows:
        line = os.fsdecode(row.shown)
        if (entry := row.entry) is not None:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.mtime_ns // 10**9))
            head = f"{stat.filemode(entry.mode)} {entry.nlink:>3} {entry.uid:>5} {entry.gid:>5}"
            line = f"{head} {_size_or_device(entry):>{width}} {when} {line}"
            if entry.is_link:
                line += f" -> {os.fsdecode(side.readlink(row.path))}"
        out.append(line + "\n")
    _print("".join(out))


def _print(text: str) -> None:
    # Names are bytes, and may be no UTF-8.
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(text))
    sys.stdout.buffer.flush()


def _size_or_device(entry: Attributes) -> str:
    if stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode):
        return f"{os.major(entry.rdev)},{os.minor(entry.rdev)}"
    return str(entry.size)


def _cat(session: _Session, args: argparse.Namespace) -> None:
    sys.stdout.flush()
    for text in args.paths:
        with session.each():
            side, path = session.remote(text)
            for piece in side.read(path):
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()


def _stat(session: _Session, args: argparse.Namespace) -> None:
    for text in args.paths:
        with session.each():
            side, path = session.remote(text)
            entry = side.stat(path, follow=False)
            if args.json:
                print(json.dumps({"path": side.show(path), **asdict(entry)}))
                continue
            _print(f"  path: {side.show(path)}\n")
            print(f"  type: {_KINDS.get(stat.S_IFMT(entry.mode), 'unknown')}")
            print(f"  mode: {stat.S_IMODE(entry.mode):04o} ({stat.filemode(entry.mode)})")
            print(f" owner: uid {entry.uid}, gid {entry.gid}")
            print(f"  size: {entry.size} bytes in {entry.blocks} blocks of 512")
            print(f" inode: {entry.ino}, {entry.nlink} links")
            for name, ns in (("access", entry.atime_ns), ("modify", entry.mtime_ns), ("change", entry.ctime_ns)):
                print(f"{name}: {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(ns // 10**9))}.{ns % 10**9:09}")


_KINDS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def _readlink(session: _Session, args: argparse.Namespace) -> None:
    for text in args.paths:
        with session.each():
            side, path = session.remote(text)
            _print(os.fsdecode(side.readlink(path)) + "\n")


def _df(session: _Session, args: argparse.Namespace) -> None:
    print(f"{'SIZE':>8} {'USED':>8} {'FREE':>8} {'USE':>4} {'FILES':>10} {'FREE':>10}  PATH")
    for text in args.paths:
        with session.each():
            side, path = session.remote(text)
            fs = side.statfs(path)
            used = fs.blocks - fs.bfree
            share = f"{100 * used / (used + fs.bavail):.0f}%" if used + fs.bavail else "-"
            sizes = " ".join(f"{human(n * fs.bsize):>8}" for n in (fs.blocks, used, fs.bavail))
            print(f"{sizes} {share:>4} {fs.files:>10} {fs.ffree:>10}  {side.show(path)}")


def human(count: float) -> str:
    """Bytes for people: 1536 -> 1.5K."""
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f}{unit}" if not unit else f"{count:.1f}{unit}"


# Changing.


def _write(session: _Session, args: argparse.Namespace) -> None:
    with session.each():
        side, path = session.remote(args.path)
        pieces = iter(partial(os.read, sys.stdin.fileno(), _READ), b"")
        plain = not args.append and args.offset is None
        offset = None if args.append else args.offset or 0
        side.write_at(path, pieces, 0o666, offset=offset, truncate=plain)


def _mkdir(session: _Session, args: argparse.Namespace) -> None:
    for text in args.paths:
        with session.each():
            side, path = session.remote(text)
            names = split(path)
            for depth in range(1, len(names)) if args.parents else ():
                try:
                    side.mkdir(b"/".join(names[:depth]), 0o777)
                except FileExistsError:
                    continue
            try:
                side.mkdir(path, args.mode)
            except FileExistsError:
                if not args.parents or not side.stat(path).is_dir:
                    raise


def _rm(session: _Session, args: argparse.Namespace) -> None:
    for text in args.paths:
        with session.each():
            side, path = session.remote(text)
            try:
                if not side.stat(path, follow=False).is_dir:
                    side.unlink(path)
                elif args.recursive:
                    side.remove_tree(path)
                else:
                    raise OSError(errno.EISDIR, "is a directory (remove it with -r)", side.show(path))
            except FileNotFoundError:
                if not args.force:
                    raise


def _mv(session: _Session, args: argparse.Namespace) -> None:
    with session.each():
        side, old = session.remote(args.source)
        other, new = session.remote(args.target)
        if side is not other:
            raise OSError(errno.EXDEV, "another export: use cp -r and rm -r", args.target)
        side.rename(old, _inside(other, new, old))


def _ln(session: _Session, args: argparse.Namespace) -> None:
    with session.each():
        side, new = session.remote(args.path)
        if args.symbolic:
            side.symlink(_inside(side, new, os.fsencode(args.target)), os.fsencode(args.target))
            return
        other, old = session.remote(args.target)
        if side is not other:
            raise OSError(errno.EXDEV, "another export: hard links stay within one", args.path)
        side.link(old, _inside(side, new, old))


def _inside(side: Side, target: bytes, source: bytes) -> bytes:
    """The path of the target itself, or beneath it under the source's name if it is a directory."""
    try:
        into = side.stat(target).is_dir
    except FileNotFoundError:
        into = False
    names = split(source)
    return target.rstrip(b"/") + b"/" + names[-1] if into and names and names[-1] != b".." else target


def _cp(session: _Session, args: argparse.Namespace) -> None:
    local = LocalSide()

    def place(text: str) -> tuple[Side, bytes]:
        return session.remote(text) if session.parse(text) is not None else (local, os.fsencode(text))

    target, new = place(args.target)
    if len(args.sources) > 1 and not target.stat(new).is_dir:
        raise Xen9pError(f"{args.target} is no directory", hint="several sources need one", errno=errno.ENOTDIR)
    for text in args.sources:
        with session.each(), Meter(quiet=args.quiet) as meter:
            source, old = place(text)
            copied = _Copied(text, meter)
            if meter.shows and not args.recursive:
                copied.total = source.stat(old).size
            path = _inside(target, new, old)
            copier = Copier(source, target, args.recursive, args.preserve, copied.moved)
            copier.copy(old, path)


class _Copied:
    """How far a copy is, for a meter."""

    def __init__(self, name: str, meter: Meter) -> None:
        self.total = 0
        self._name = name
        self._meter = meter
        self._done = 0

    def moved(self, count: int) -> None:
        """So many bytes more."""
        self._done += count
        self._meter.show(self._text)

    def _text(self, seconds: float) -> str:
        share = f" of {human(self.total)}, {100 * self._done / self.total:.0f}%" if self.total else ""
        return f"{self._name}: {human(self._done)}{share}, {human(self._done / seconds)}/s"


_COMMANDS: Final[dict[str, Callable[[_Session, argparse.Namespace], None]]] = {
    "ls": _ls,
    "cat": _cat,
    "cp": _cp,
    "stat": _stat,
    "write": _write,
    "mkdir": _mkdir,
    "rm": _rm,
    "mv": _mv,
    "ln": _ln,
    "readlink": _readlink,
    "df": _df,
}
