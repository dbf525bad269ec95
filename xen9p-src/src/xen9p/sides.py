"""The two sides of a copy, this machine's files and those behind a 9P client, with the same few operations.

Paths are bytes. On the 9P side symbolic links are followed here, by the client, as the protocol wants it; an absolute
target means the root of the export. Errors are OSError with the path in them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol

from xen9p import codec
from xen9p.attributes import Attributes
from xen9p.client import Client
from xen9p.codec import Dirent
from xen9p.requests import split

MAX_LINKS: Final = 40
_LOCAL_READ: Final = 1 << 20
_BATCH: Final = 64

Progress = Callable[[int], None]
"""Called with the number of bytes that have been moved since the last call."""


class Side(Protocol):
    """What copying needs of a side."""

    def stat(self, path: bytes, *, follow: bool = True) -> Attributes: ...
    def names(self, path: bytes) -> list[bytes]: ...
    def read(self, path: bytes) -> Iterator[bytes]: ...
    def write(self, path: bytes, pieces: Iterable[bytes], mode: int) -> None: ...
    def mkdir(self, path: bytes, mode: int) -> None: ...
    def readlink(self, path: bytes) -> bytes: ...
    def symlink(self, path: bytes, target: bytes) -> None: ...
    def set_times(self, path: bytes, like: Attributes) -> None: ...
    def show(self, path: bytes) -> str: ...


class LocalSide:
    """This machine's files."""

    def stat(self, path: bytes, *, follow: bool = True) -> Attributes:
        """The attributes of what lies at path."""
        s = os.stat(path, follow_symlinks=follow)
        times = (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)
        return Attributes(
            s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_size, s.st_blocks, s.st_ino, s.st_rdev, *times
        )

    def names(self, path: bytes) -> list[bytes]:
        """What is in a directory, sorted."""
        return sorted(os.listdir(path))

    def read(self, path: bytes) -> Iterator[bytes]:
        """A file's content in pieces."""
        with open(path, "rb", buffering=0) as file:
            while data := file.read(_LOCAL_READ):
                yield data

    def write(self, path: bytes, pieces: Iterable[bytes], mode: int) -> None:
        """Makes a file with that content, or gives it to one that is there."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(fd, "wb", buffering=0) as file:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]

    def mkdir(self, path: bytes, mode: int) -> None:
        """Makes a directory."""
        os.mkdir(path, mode)

    def readlink(self, path: bytes) -> bytes:
        """A symbolic link's target."""
        return os.readlink(path)

    def symlink(self, path: bytes, target: bytes) -> None:
        """Makes a symbolic link."""
        os.symlink(target, path)

    def set_times(self, path: bytes, like: Attributes) -> None:
        """Gives a file the mode and times of another."""
        os.chmod(path, stat.S_IMODE(like.mode))
        os.utime(path, ns=(like.atime_ns, like.mtime_ns))

    def show(self, path: bytes) -> str:
        """The path for messages."""
        return os.fsdecode(path)


class RemoteSide:
    """The files behind a client.

    Args:
        root: the fid of the tree's root.
        name: what stands before the colon in messages.
    """

    def __init__(self, client: Client, root: int, name: str) -> None:
        self.client = client
        self.root = root
        self.name = name
        self._umask = os.umask(0)
        os.umask(self._umask)

    def show(self, path: bytes) -> str:
        """The path for messages, with what stands before it."""
        return f"{self.name}:{os.fsdecode(path)}"

    # From paths to fids.

    @contextmanager
    def at(self, path: bytes, *, follow: bool = True) -> Iterator[int]:
        """A fid for what lies at path, clunked at the end; errors in between name the path."""
        with self._named(path):
            fid = self._resolve(path, follow)
            try:
                yield fid
            finally:
                with suppress(OSError):
                    self.client.clunk(fid)

    @contextmanager
    def parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """(fid of the directory, last name) of a path to something that may not be there yet."""
        names = split(path)
        if not names or names[-1] == b"..":
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), self.show(path))
        with self.at(b"/".join(names[:-1])) as fid, self._named(path):
            yield fid, names[-1]

    @contextmanager
    def _named(self, path: bytes) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            ours = error.filename is None or str(error.strerror).startswith("Twalk")
            if error.errno is None or not ours:
                raise
            raise OSError(error.errno, os.strerror(error.errno), self.show(path)) from error

    def _resolve(self, path: bytes, follow: bool) -> int:
        todo = split(path)
        here = self.client.walk(self.root)
        links = 0
        try:
            while todo:
                step, rest = todo[: codec.MAX_WALK], todo[codec.MAX_WALK :]
                reply = self.client.submit(codec.Twalk(here, (new := self.client.new_fid()), tuple(step)), codec.Rwalk)
                try:
                    qids = reply.result().wqids
                except OSError:
                    self.client.release(new)
                    raise
                there = len(qids) == len(step)
                link = next((i for i, q in enumerate(qids) if q.type & codec.QT_SYMLINK), None)
                last = link == len(step) - 1 and not rest
                if there and (link is None or (last and not follow)):
                    self.client.clunk(here)
                    here, todo = new, rest
                    continue
                if there:
                    self.client.clunk(new)
                else:
                    self.client.release(new)
                if link is None:
                    no_dir = qids and not qids[-1].type & codec.QT_DIR
                    err = errno.ENOTDIR if no_dir else errno.ENOENT
                    raise OSError(err, os.strerror(err))
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                here, target = self._through(here, step[: link + 1])
                todo = split(target) + step[link + 1 :] + rest
        except BaseException:
            with suppress(OSError):
                self.client.clunk(here)
            raise
        return here

    def _through(self, here: int, names: list[bytes]) -> tuple[int, bytes]:
        """(where a link's target starts from, the target); gives here back."""
        link = self.client.walk(here, *names)
        try:
            target = self.client.readlink(link)
        finally:
            self.client.clunk(link)
        base = self.client.walk(self.root) if target.startswith(b"/") else self.client.walk(here, *names[:-1])
        self.client.clunk(here)
        return base, target

    # As the other side.

    def stat(self, path: bytes, *, follow: bool = True) -> Attributes:
        """The attributes of what lies at path."""
        with self.at(path, follow=follow) as fid:
            return Attributes.of(self.client.getattr(fid))

    def entries(self, path: bytes) -> list[Dirent]:
        """What is in a directory but '.' and '..', sorted by name."""
        with self.at(path) as fid:
            self.client.lopen(fid, os.O_RDONLY | os.O_DIRECTORY)
            found: list[Dirent] = []
            offset = 0
            while some := self.client.readdir(fid, offset):
                found += some
                offset = some[-1].offset
        return sorted((e for e in found if e.name not in (b".", b"..")), key=lambda e: e.name)

    def names(self, path: bytes) -> list[bytes]:
        """The names in a directory, sorted."""
        return [entry.name for entry in self.entries(path)]

    def stat_all(self, path: bytes, names: list[bytes]) -> list[Attributes | OSError]:
        """The attributes of names in a directory (links themselves), many requests under way at a time."""
        out: list[Attributes | OSError] = []
        with self.at(path) as fid:
            for start in range(0, len(names), _BATCH):
                out += self._stat_batch(fid, names[start : start + _BATCH])
        return out

    def _stat_batch(self, fid: int, names: list[bytes]) -> list[Attributes | OSError]:
        client = self.client
        out: list[Attributes | OSError] = [OSError(errno.ENOENT, os.strerror(errno.ENOENT))] * len(names)
        walks = [
            (new := client.new_fid(), client.submit(codec.Twalk(fid, new, (name,)), codec.Rwalk)) for name in names
        ]
        walked: list[tuple[int, int]] = []
        for i, (new, walk) in enumerate(walks):
            try:
                walk.result()
                walked.append((i, new))
            except OSError as error:
                out[i] = error
                client.release(new)
        gets = [client.submit(codec.Tgetattr(new, codec.GETATTR_BASIC), codec.Rgetattr) for _, new in walked]
        for (i, _), get in zip(walked, gets, strict=True):
            try:
                out[i] = Attributes.of(get.result())
            except OSError as error:
                out[i] = error
        clunks = [client.submit(codec.Tclunk(new), codec.Rclunk) for _, new in walked]
        for (_, new), clunk in zip(walked, clunks, strict=True):
            with suppress(OSError):
                clunk.result()
            client.release(new)
        return out

    def read(self, path: bytes) -> Iterator[bytes]:
        """A file's content in pieces."""
        with self.at(path) as fid:
            iounit = self.client.lopen(fid, os.O_RDONLY)
            yield from self.client.read_all(fid, iounit=iounit)

    def write(self, path: bytes, pieces: Iterable[bytes], mode: int) -> None:
        """Makes a file with that content, or gives it to one that is there."""
        self.write_at(path, pieces, mode, offset=0, truncate=True)

    def write_at(
        self, path: bytes, pieces: Iterable[bytes], mode: int, *, offset: int | None, truncate: bool = False
    ) -> None:
        """Writes into a file from offset on (None: from its end on); makes it if it is not there."""
        try:
            with self.at(path) as fid:
                iounit = self.client.lopen(fid, os.O_WRONLY | (os.O_TRUNC if truncate else 0))
                start = self.client.getattr(fid, codec.GETATTR_SIZE).size if offset is None else offset
                self.client.write_stream(fid, start, pieces, iounit)
            return
        except FileNotFoundError:
            pass
        with self.parent(path) as (directory, name):
            fid = self.client.walk(directory)
            try:
                iounit = self.client.lcreate(fid, name, os.O_WRONLY, mode & ~self._umask, os.getgid())
                self.client.write_stream(fid, offset or 0, pieces, iounit)
            finally:
                self.client.clunk(fid)

    def mkdir(self, path: bytes, mode: int) -> None:
        """Makes a directory."""
        with self.parent(path) as (directory, name):
            self.client.mkdir(directory, name, mode & ~self._umask, os.getgid())

    def readlink(self, path: bytes) -> bytes:
        """A symbolic link's target."""
        with self.at(path, follow=False) as fid:
            return self.client.readlink(fid)

    def symlink(self, path: bytes, target: bytes) -> None:
        """Makes a symbolic link."""
        with self.parent(path) as (directory, name):
            self.client.symlink(directory, name, target, os.getgid())

    def link(self, old: bytes, new: bytes) -> None:
        """Makes a hard link new to what lies at old."""
        with self.at(old, follow=False) as fid, self.parent(new) as (directory, name):
            self.client.link(directory, fid, name)

    def rename(self, old: bytes, new: bytes) -> None:
        """Moves what lies at old to new, which it replaces."""
        with self.parent(old) as (olddir, oldname), self.parent(new) as (newdir, newname):
            self.client.renameat(olddir, oldname, newdir, newname)

    def set_times(self, path: bytes, like: Attributes) -> None:
        """Gives a file the mode and times of another."""
        with self.at(path) as fid:
            mode = stat.S_IMODE(like.mode)
            self.client.setattr(fid, mode=mode, atime_ns=like.atime_ns, mtime_ns=like.mtime_ns)

    def statfs(self, path: bytes) -> codec.Rstatfs:
        """The numbers of statfs(2)."""
        with self.at(path) as fid:
            return self.client.statfs(fid)

    def unlink(self, path: bytes, *, directory: bool = False) -> None:
        """Removes a name; a directory if it is one and is empty."""
        with self.parent(path) as (fid, name):
            self.client.unlinkat(fid, name, codec.AT_REMOVEDIR if directory else 0)

    def remove_tree(self, path: bytes) -> None:
        """Removes a directory with all beneath it; links are removed, not followed."""
        entries = self.entries(path)
        for entry in entries:
            if entry.qid.type & codec.QT_DIR:
                self.remove_tree(path + b"/" + entry.name)
        names = [e.name for e in entries if not e.qid.type & codec.QT_DIR]
        with self.at(path) as fid:
            for start in range(0, len(names), _BATCH):
                batch = names[start : start + _BATCH]
                under_way = [self.client.submit(codec.Tunlinkat(fid, n, 0), codec.Runlinkat) for n in batch]
                for pending in under_way:
                    pending.result()
        self.unlink(path, directory=True)


@dataclass(frozen=True, slots=True)
class Copier:
    """Copies files, or with recursive trees, from one side to another.

    Links at the top are followed, those beneath are copied as links. preserve keeps modes and times.
    """

    source: Side
    target: Side
    recursive: bool
    preserve: bool
    progress: Progress

    def copy(self, old: bytes, new: bytes) -> None:
        """Copies what lies at old to the path new.

        Raises:
            OSError: EISDIR for a directory without recursive; EINVAL for what is neither file, directory nor link.
        """
        self._copy(old, self.source.stat(old), new)

    def _copy(self, old: bytes, entry: Attributes, new: bytes) -> None:
        source, target = self.source, self.target
        if entry.is_dir:
            self._copy_directory(old, entry, new)
        elif entry.is_link:
            target.symlink(new, source.readlink(old))
            return
        elif entry.is_file:
            target.write(new, self._counted(old), stat.S_IMODE(entry.mode) & 0o777)
        else:
            raise OSError(errno.EINVAL, "is no file, directory or link: not copied", source.show(old))
        if self.preserve or (entry.is_dir and entry.mode & 0o700 != 0o700):
            target.set_times(new, entry)

    def _copy_directory(self, old: bytes, entry: Attributes, new: bytes) -> None:
        if not self.recursive:
            raise OSError(errno.EISDIR, "is a directory (copy it with -r)", self.source.show(old))
        names = self.source.names(old)  # before the target is made: it may lie inside
        with suppress(FileExistsError):
            self.target.mkdir(new, stat.S_IMODE(entry.mode) | 0o700)
        for name in names:
            below = old + b"/" + name
            self._copy(below, self.source.stat(below, follow=False), new + b"/" + name)

    def _counted(self, path: bytes) -> Iterator[bytes]:
        for piece in self.source.read(path):
            yield piece
            self.progress(len(piece))
