"""Bringing an export back to a snapshot: one file, one directory, or all of it, also while guests use it.

What differs is put right and nothing else is touched. Each file is made anew beside its place, sharing the snapshot's
data, and takes its place by one rename: a guest sees the old one or the new one. What a guest has in the export is not
trusted: everything goes by descriptors beneath its top, and no link is followed.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xen9p import beneath, lease_table, subvolumes
from xen9p.beneath import open_beneath, open_parent
from xen9p.snapshot import NOW, SnapshotError, Store
from xen9p.treediff import Change, Tree, compare

_O_PATH: Final = os.O_PATH
_CHUNK: Final = 1 << 24
MOST_TWINS: Final = 400
"""Files of several names that stay so: of more than these, each name becomes a file of its own."""


def clean(path: str) -> bytes:
    """A path in an export as the export's own: without / at its ends. SnapshotError, it leads elsewhere."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in path:
        raise SnapshotError(f"{path!r:.80} is no path in an export", "write it from the export's top, without ..")
    return os.fsencode("/".join(parts))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a restore would do: the changes that it takes back, and what of it is open in guests."""

    changes: list[Change]
    removed: list[bytes]
    """Paths in the export that go, with all below."""
    copied: list[bytes]
    """Paths in the snapshot that come, with all below."""
    replaced: list[Change]
    adjusted: list[Change]
    busy: list[bytes]
    dirty: set[int]
    """The snapshot's inodes that are not the same in the export any more, in the path or not."""


def plan(older: Tree, newer: Tree, since: int, path: bytes, *, name: str, in_use: Iterable[int]) -> Plan:
    """What it takes to make a path of newer what it is in older; b"" is all.

    Args:
        since: treediff.parted() of both.
        in_use: inodes of files that are open in guests.

    Raises:
        SnapshotError: the path is not in the snapshot.
    """
    if not _is_there(older, path):
        raise SnapshotError(
            f"snapshot {name} has no {os.fsdecode(path)}",
            "to see what it has: xen9p snapshot list --json gives its path",
        )
    changes = compare(older, newer, since, content=False)
    dirty = {c.node for c in changes if c.kind in ("modified", "metadata") or c.ranges or c.what}
    if any(c.kind == "renamed" and c.old and path and _within(path, c.old) for c in changes) or (
        path and not _is_there(newer, path)
    ):
        # It went with a directory above it: its place is empty, or taken by something else.
        changes = [Change("deleted", path, "")]
        removed, copied = [path], [path]
    else:
        changes = [c for c in changes if _within(c.path, path) or (c.old is not None and _within(c.old, path))]
        removed = _topmost(c.path for c in changes if c.kind in ("created", "renamed") and _within(c.path, path))
        gone = (c.old or c.path for c in changes if c.kind in ("deleted", "renamed"))
        copied = _topmost(p for p in gone if _within(p, path))
    rest = [c for c in changes if c.kind in ("modified", "metadata") and not _covered(c.old or c.path, copied)]
    # Content that another link of the same file has counts as well; a new target makes a symlink new.
    replaced = [c for c in rest if c.kind == "modified"]
    adjusted = [c for c in rest if c.kind == "metadata"]
    changed = [*removed, *(c.path for c in replaced)]
    busy = [p for number in in_use for p in _paths(newer, number) if _covered(p, changed)]
    return Plan(changes, removed, copied, replaced, adjusted, sorted(busy), dirty)


def _within(path: bytes, folder: bytes) -> bool:
    return not folder or path == folder or path.startswith(folder + b"/")


def _covered(path: bytes, folders: Iterable[bytes]) -> bool:
    return any(_within(path, folder) for folder in folders)


def _topmost(paths: Iterable[bytes]) -> list[bytes]:
    found: list[bytes] = []
    for path in sorted(set(paths), key=lambda p: p.split(b"/")):
        if not found or not _within(path, found[-1]):
            found.append(path)
    return found


def _is_there(tree: Tree, path: bytes) -> bool:
    try:
        os.close(open_beneath(tree.fd, path))
    except OSError:  # also ELOOP: what is behind a link is elsewhere
        return False
    return True


def _paths(tree: Tree, number: int) -> list[bytes]:
    with suppress(KeyError):
        node = tree.node(number)
        return [tree.named(link) for link in node.links] if node else []
    return []


class _Restorer:
    """Does what a plan says."""

    def __init__(self, older: Tree, live: int, plan: Plan, step: Callable[[int, int], None] | None) -> None:
        self.older = older
        self.live = live
        self.plan = plan
        self.step = step
        self.twins: dict[int, int] = {}  # descriptors of files of several names that are right by now
        self.touched: set[bytes] = set()

    def run(self) -> None:
        try:
            self._run(self.plan)
        finally:
            for fd in self.twins.values():
                os.close(fd)

    def _run(self, plan: Plan) -> None:
        work: list[tuple[Callable[[bytes], None], bytes]] = [
            *((self.remove, path) for path in plan.removed),
            *((self.replace, change.old or change.path) for change in plan.replaced),
            *((self.adjust, change.path) for change in plan.adjusted),
            *((self.copy, path) for path in plan.copied),
        ]
        for done, (what, path) in enumerate(work):
            if self.step:
                self.step(done, len(work))
            what(path)
            self.touched.add(path.rpartition(b"/")[0])
        for folder in sorted(self.touched, key=len, reverse=True):
            with suppress(OSError):  # it is gone, or none of the snapshot's
                found = self._stat(folder)
                with self._opened(self.live, folder) as fd:
                    if stat.S_ISDIR(os.fstat(fd).st_mode):
                        os.utime(_by(fd), ns=(found.st_atime_ns, found.st_mtime_ns))

    @staticmethod
    @contextmanager
    def _opened(root: int, path: bytes, flags: int = _O_PATH) -> Iterator[int]:
        fd = open_beneath(root, path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    @staticmethod
    @contextmanager
    def _parent(root: int, path: bytes) -> Iterator[tuple[int, bytes]]:
        fd, name = open_parent(root, path)
        try:
            yield fd, name
        finally:
            os.close(fd)

    def _stat(self, path: bytes) -> os.stat_result:
        if not path:
            return os.fstat(self.older.fd)
        with self._parent(self.older.fd, path) as (fd, name):
            return os.lstat(name, dir_fd=fd)

    def remove(self, path: bytes) -> None:
        try:
            with self._parent(self.live, path) as (fd, name):
                beneath.remove(fd, name)
        except OSError as error:  # what it was in is not there, or leads elsewhere: then so is it
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise

    def copy(self, path: bytes) -> None:
        """Makes a path as it is in the snapshot, with the directories above it."""
        above = path.rpartition(b"/")[0]
        if above:
            try:
                os.close(open_beneath(self.live, above, _O_PATH | os.O_DIRECTORY))
            except FileNotFoundError:
                self._folder(above)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                raise SnapshotError(
                    f"{os.fsdecode(above)} leads through what is no directory any more", "restore that one first"
                ) from None
        self.replace(path)

    def _folder(self, path: bytes) -> None:
        """Makes a directory of the snapshot's, and those above it, as far as they are not there."""
        parts = path.split(b"/")
        for count in range(1, len(parts) + 1):
            here = b"/".join(parts[:count])
            with suppress(FileExistsError):
                with self._parent(self.live, here) as (fd, name):
                    os.mkdir(name, 0o700, dir_fd=fd)
                self._dress(here, self._stat(here))

    def replace(self, path: bytes) -> None:
        """Puts the snapshot's file in the place of what is there; a directory with all that is in it."""
        found = self._stat(path)
        with self._parent(self.live, path) as (fd, name):
            partial = b".xen9p-restore-" + secrets.token_hex(8).encode()
            try:
                self._make(path, found, fd, partial)
                if stat.S_ISDIR(found.st_mode):
                    beneath.remove(fd, name)  # what came there meanwhile
                else:
                    self._give_way(fd, name)
                os.rename(partial, name, src_dir_fd=fd, dst_dir_fd=fd)
            except BaseException:
                with suppress(OSError):
                    beneath.remove(fd, partial)
                raise

    @staticmethod
    def _give_way(folder: int, name: bytes) -> None:
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
                beneath.remove(folder, name)

    def _twin(self, number: int) -> int | None:
        """A descriptor of a file of several names, if one of them is right."""
        if number in self.twins or number in self.plan.dirty:
            return self.twins.get(number)
        node = self.older.node(number)
        for link in node.links if node else ():
            with suppress(OSError, KeyError):
                fd = open_beneath(self.live, self.older.named(link))
                if os.fstat(fd).st_ino == number:  # not changed since, by the diff
                    self.twins[number] = fd
                    return fd
                os.close(fd)
        return None

    def _link(self, number: int, folder: int, name: bytes) -> bool:
        """Whether the name could be made another one of a file that is there."""
        twin = self._twin(number)
        try:
            if twin is not None:
                os.link(_by(twin), name, dst_dir_fd=folder, follow_symlinks=True)
        except OSError:  # it was deleted meanwhile
            return False
        return twin is not None

    def _make(self, path: bytes, found: os.stat_result, folder: int, name: bytes) -> None:
        kind = stat.S_IFMT(found.st_mode)
        several = found.st_nlink > 1 and kind == stat.S_IFREG
        if several and self._link(found.st_ino, folder, name):
            return
        if kind == stat.S_IFREG:
            with self._opened(self.older.fd, path, os.O_RDONLY) as source:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                target = os.open(name, flags, 0o600, dir_fd=folder)
                try:
                    _clone(source, target)
                    _dress(source, found, target)
                finally:
                    os.close(target)
        elif kind == stat.S_IFDIR:
            self._make_folder(path, found, folder, name)
        elif kind == stat.S_IFLNK:
            with self._parent(self.older.fd, path) as (fd, last):
                os.symlink(os.readlink(last, dir_fd=fd), name, dir_fd=folder)
            os.chown(name, found.st_uid, found.st_gid, dir_fd=folder, follow_symlinks=False)
            times = (found.st_atime_ns, found.st_mtime_ns)
            os.utime(name, ns=times, dir_fd=folder, follow_symlinks=False)
        else:
            os.mknod(name, kind | 0o600, found.st_rdev, dir_fd=folder)
            with self._opened(self.older.fd, path) as source, self._opened(folder, name) as target:
                _dress(source, found, target)
        if several and len(self.twins) < MOST_TWINS:
            self.twins[found.st_ino] = open_beneath(folder, name)

    def _make_folder(self, path: bytes, found: os.stat_result, folder: int, name: bytes) -> None:
        """A directory with all that is in it; without recursion, for a guest says how deep it is."""
        os.mkdir(name, 0o700, dir_fd=folder)
        todo, made = [(path, name, found)], []
        while todo:
            here, there, _ = todo[-1]
            made.append(todo.pop())
            with (
                self._opened(self.older.fd, here, os.O_RDONLY | os.O_DIRECTORY) as source,
                self._opened(folder, there, _O_PATH | os.O_DIRECTORY) as target,
            ):
                for entry in map(os.fsencode, os.listdir(source)):
                    inner = os.lstat(entry, dir_fd=source)
                    if stat.S_ISDIR(inner.st_mode):
                        os.mkdir(entry, 0o700, dir_fd=target)
                        todo.append((here + b"/" + entry, there + b"/" + entry, inner))
                    else:
                        self._make(here + b"/" + entry, inner, target, entry)
        for here, there, inner in reversed(made):
            with self._opened(self.older.fd, here) as source, self._opened(folder, there) as target:
                _dress(source, inner, target)

    def adjust(self, path: bytes) -> None:
        """Only what is about a file; what is in it stays."""
        found = self._stat(path)
        self.plan.dirty.discard(found.st_ino)  # by all its names
        if stat.S_ISLNK(found.st_mode):
            with suppress(FileNotFoundError), self._parent(self.live, path) as (fd, name):
                os.chown(name, found.st_uid, found.st_gid, dir_fd=fd, follow_symlinks=False)
        else:
            self._dress(path, found)

    def _dress(self, path: bytes, found: os.stat_result) -> None:
        with (
            suppress(FileNotFoundError),
            self._opened(self.older.fd, path) as source,
            self._opened(self.live, path) as target,
        ):
            if stat.S_IFMT(os.fstat(target).st_mode) == stat.S_IFMT(found.st_mode):
                _dress(source, found, target)


def _by(fd: int) -> str:
    """A way to a file for calls that take no O_PATH descriptor."""
    return f"/proc/self/fd/{fd}"


def _clone(source: int, target: int) -> None:
    try:
        subvolumes.reflink(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        while os.sendfile(target, source, None, _CHUNK):  # one of both has no checksums, say
            pass


def _dress(source: int, found: os.stat_result, target: int) -> None:
    """Gives a file another one's owner, mode, attributes and times, in the order in which none takes one back."""
    path, other = _by(target), _by(source)
    os.chown(path, found.st_uid, found.st_gid)
    os.chmod(path, stat.S_IMODE(found.st_mode))
    wanted = {name: os.getxattr(other, name) for name in os.listxattr(other)}
    for name in set(os.listxattr(path)) - wanted.keys():
        os.removexattr(path, name)
    for name, value in wanted.items():
        os.setxattr(path, name, value)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def open_files(runtime: Path, device: int) -> set[int]:
    """The inodes of files of a filesystem (its st_dev) that guests have open, by the descriptors of the workers."""
    found = set()
    for file in runtime.glob("worker-*.pid"):
        with suppress(OSError, ValueError):
            process = Path("/proc", str(int(file.read_text())))
            for fd in os.listdir(process / "fd"):
                with suppress(OSError):
                    there = os.stat(process / "fd" / fd)
                    if there.st_dev == device and stat.S_ISREG(there.st_mode) and _is_open(process / "fdinfo" / fd):
                        found.add(there.st_ino)
    return found


def _is_open(fdinfo: Path) -> bool:
    """A fid alone has a descriptor that cannot read."""
    line = next(line for line in fdinfo.read_text().splitlines() if line.startswith("flags:"))
    return not int(line.split()[1], 8) & _O_PATH


def restore(
    store: Store,
    export: str,
    live: Path,
    name: str,
    path: bytes,
    *,
    runtime: Path,
    force: bool = False,
    dry_run: bool = False,
    step: Callable[[int, int], None] | None = None,
) -> list[Change]:
    """Makes a path of an export, b"" for all, what it is in a snapshot; what that has taken back.

    Args:
        live: the export's directory; guests may use it meanwhile, and what they change then is theirs.
        runtime: where the workers' sockets are.
        force: also if guests have files open that are replaced: they keep what they have open.
        dry_run: change nothing.

    Raises:
        SnapshotError: one line; before anything is changed, but for an error of the filesystem.
    """
    changing = False
    try:
        with store.tree(export, name, live) as older, subvolumes.opened(live) as top:
            in_use = open_files(runtime, os.fstat(top).st_dev)
            with store.tree(export, NOW, live) as newer:
                since = store.since(older, newer, live)
                made = plan(older, newer, since or 0, path, name=name, in_use=in_use)
            if made.busy and not force and not dry_run:
                more = f" and {len(made.busy) - 1} more" if len(made.busy) > 1 else ""
                raise SnapshotError(
                    f"{os.fsdecode(made.busy[0])}{more} of {export} is open in a guest",
                    "have it closed, or use --force: whoever has it open keeps what it was",
                )
            if not dry_run and made.changes:
                changing = True
                lease_table.revoke(runtime, live)
                _Restorer(older, top, made, step).run()
            return made.changes
    except OSError as error:
        how = "restored in part only" if changing else "not restored"
        raise SnapshotError(f"{export} is {how}: {error}", "put that right and restore again", error.errno) from None
    finally:
        if changing:  # also by half
            lease_table.revoke(runtime, live)
