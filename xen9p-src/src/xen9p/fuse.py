"""A FUSE filesystem on a 9P client: the requests of the guest's kernel become requests to the server.

Nothing waits for anything else: each request of the kernel is a task of the event loop. Writes go through at once,
so fsync(2) and close(2) have little left to do. Errors are the server's errno. pyfuse3 passes on no locks: flock(2)
and fcntl(2) locks work among the processes of one guest, in its kernel, and others do not see them.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import math
import os
import stat
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import pyfuse3

from xen9p import codec
from xen9p.async_client import AsyncClient
from xen9p.attributes import Attributes
from xen9p.cache import Cache
from xen9p.codec import Dirent
from xen9p.errors import Xen9pError
from xen9p.inodes import ROOT, Nodes
from xen9p.kept import Kept, Leased
from xen9p.leases import Leases

log = logging.getLogger("xen9p.mount")

P = ParamSpec("P")
R = TypeVar("R")

# Of the flags of open(2), those that mean something to the server; the rest is between the guest's kernel and itself.
_FLAGS: Final = (
    os.O_ACCMODE | os.O_APPEND | os.O_CREAT | os.O_DIRECTORY | os.O_DSYNC | os.O_EXCL | os.O_SYNC | os.O_TRUNC
)
_BATCH: Final = 32
_NO_FID: Final = 1 << 32  # handles of directories that have no fid are above
_CAPABILITY: Final = b"security.capability"
_CAPABILITY_SECONDS: Final = 1.0  # what others do to a program's capabilities is seen after that
_XATTR_REPLACE: Final = 2


@dataclass(slots=True)
class _File:
    """An open file."""

    fid: int
    ino: int
    append: bool


@dataclass(slots=True)
class _Listed:
    """A directory entry that is ready to be given to the kernel; fid and attr only where attributes go with it."""

    entry: Dirent
    ino: int
    fid: int | None = None
    attr: Attributes | None = None


@dataclass(slots=True)
class _Directory:
    """An open directory, and what has been read of it and not been taken by the kernel."""

    fid: int | None
    """None: its entries come from the cache."""
    ino: int
    position: int = 0
    """Where the kernel goes on, if it goes on."""
    offset: int = 0
    """Where the server goes on."""
    mark: int = 0
    """From before it was read, if all of it has been read in one go."""
    changes: int = 0
    """Its node's at that time."""
    read: list[Dirent] | None = field(default_factory=list)
    """What has been read in that go; None: it went back."""
    entries: deque[Dirent] = field(default_factory=deque)
    ready: deque[_Listed] = field(default_factory=deque)


def _answers(
    method: Callable[Concatenate[Filesystem, P], Awaitable[R]],
) -> Callable[Concatenate[Filesystem, P], Coroutine[Any, Any, R]]:
    """Turns what goes wrong into an errno for the kernel; pyfuse3 would end the mount."""

    @functools.wraps(method)
    async def answer(self: Filesystem, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(self, *args, **kwargs)
        except ConnectionError:
            raise pyfuse3.FUSEError(errno.EIO) from None
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except Xen9pError as error:
            log.error("%s: %s", method.__name__, error)
            raise pyfuse3.FUSEError(error.errno) from None
        except Exception as error:
            # A cache may be anybody's code.
            log.error("%s: %r", method.__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))
            raise pyfuse3.FUSEError(errno.EIO) from None

    return answer


class Filesystem:
    """The handlers that pyfuse3 calls; the names are its own (pyfuse3.Operations).

    Args:
        root: the fid of the tree's root.
        uid: the user that root was attached as; what others make is given to them.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, client: AsyncClient, root: int, qid: codec.Qid, cache: Cache, uid: int) -> None:
        self.client = client
        self.cache = cache
        self.nodes = Nodes.of(root, qid)
        self.kept = Kept(cache)
        self._uid = uid
        self._files: dict[int, _File] = {}
        self._directories: dict[int, _Directory] = {}
        self._cached = _NO_FID

    def init(self) -> None:
        """The kernel has begun to talk."""

    async def lease(self) -> None:
        """Has the server say what others change, between pyfuse3.init() and the kernel's first word.

        Raises:
            Xen9pError: it gives no leases.
        """
        kept = Leased(self.cache, pyfuse3, self._revoked)
        self.kept, kept.leases = kept, Leases(self.client, kept.revoked)
        await kept.leases.open()
        await self._attributes(ROOT, self.nodes.fid(ROOT))

    async def drop(self) -> None:
        """Has cache and kernel keep nothing any more, before the mount ends."""
        if isinstance(self.kept, Leased) and self.kept.leases is not None:
            self.kept.leases.stop()
            await self.kept.revoked(None)

    async def close(self) -> None:
        """The mount has ended: nobody needs to wait for us."""
        if isinstance(self.kept, Leased) and self.kept.leases is not None:
            await self.kept.leases.close()

    def _revoked(self, files: Collection[int]) -> None:
        for ino in files:
            node = self.nodes.get(ino)
            if node is not None:
                node.changes += 1
                node.no_capability_until = 0.0

    def stacktrace(self) -> None:
        """pyfuse3 asks for this on a certain xattr; there is nothing to show."""

    # Names and attributes.

    async def _attributes(self, ino: int, fid: int) -> Attributes:
        """Fresh attributes; remembered unless the file has been changed meanwhile."""
        node = self.nodes.get(ino)
        changes, mark = node.changes if node else 0, self.kept.mark()
        reply = await self.client.getattr(fid)
        attr = Attributes.of(reply)
        node = self.nodes.get(ino)
        self.kept.learn(ino, reply.gen)
        if (node is None or node.changes == changes) and self.kept.file(ino, mark):
            self.cache.put_attr(ino, attr)
        return attr

    def _known(self, ino: int) -> Attributes | None:
        """Attributes that need not be asked for."""
        return self.cache.attr(ino) if self.kept.usable() else None

    def _changed(self, ino: int) -> None:
        """Attributes have changed, or will have when the reply is here: answers to earlier questions are old."""
        node = self.nodes.get(ino)
        if node is not None:
            node.changes += 1
        self.cache.invalidate_attr(ino)

    def _named(self, parent: int, name: bytes, ino: int, attr: Attributes) -> pyfuse3.EntryAttributes:
        """For a name. To be given to the kernel at once: it may be revoked any time."""
        entry = self._entry(ino, attr)
        entry.entry_timeout = self.kept.name_seconds(parent, name)
        return entry

    def _entry(self, ino: int, attr: Attributes, *, asked: bool = False) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        entry.st_mode = attr.mode
        entry.st_nlink = attr.nlink
        entry.st_uid = attr.uid
        entry.st_gid = attr.gid
        entry.st_rdev = attr.rdev
        entry.st_size = attr.size
        entry.st_blksize = 4096
        entry.st_blocks = attr.blocks
        entry.st_atime_ns = attr.atime_ns
        entry.st_mtime_ns = attr.mtime_ns
        entry.st_ctime_ns = attr.ctime_ns
        entry.generation = 0
        entry.entry_timeout = 0
        entry.attr_timeout = self.kept.attr_seconds(ino, asked=asked)
        return entry

    async def _find(self, parent: int, name: bytes) -> tuple[int, Attributes]:
        """Asks the server what a name means; counts a lookup."""
        mark = self.kept.mark()
        try:
            fid, qids = await self.client.walk_qids(self.nodes.fid(parent), name)
        except FileNotFoundError:
            if self.kept.leased and self.kept.name(parent, name, mark):
                self.cache.put_missing(parent, name)
            raise
        ino = self.nodes.ino(qids[-1].path)
        try:
            attr = await self._attributes(ino, fid)
        except BaseException:
            self.client.forget(fid)
            raise
        self._looked_up(ino, fid)
        if self.kept.name(parent, name, mark):
            self.cache.put_lookup(parent, name, ino)
        return ino, attr

    def _looked_up(self, ino: int, fid: int | None) -> None:
        _, spare = self.nodes.add(ino, fid)
        if spare is not None:
            self.client.forget(spare)

    @_answers
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        """A name's meaning."""
        usable = self.kept.usable()
        if usable and self.cache.missing(parent_inode, name):
            return self._missing(parent_inode, name)
        ino = self.cache.lookup(parent_inode, name) if usable else None
        node = None if ino is None else self.nodes.get(ino)
        if node is not None and node.fid is not None:
            attr = self._known(node.ino) or await self._attributes(node.ino, node.fid)
            self._looked_up(node.ino, None)
            return self._named(parent_inode, name, node.ino, attr)
        try:
            found = await self._find(parent_inode, name)
        except FileNotFoundError:
            if not self.kept.leased:
                raise
            return self._missing(parent_inode, name)
        return self._named(parent_inode, name, *found)

    def _missing(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        """That there is no such name; the kernel may keep that, too."""
        seconds = self.kept.name_seconds(parent, name)
        if not seconds:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = 0
        entry.entry_timeout, entry.attr_timeout = seconds, 0
        return entry

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel does not know some files any more."""
        for ino, lookups in inode_list:
            node = self.nodes.forget(ino, lookups)
            if node is None and (left := self.nodes.get(ino)) is not None and self.kept.leased:
                # It had forgotten the file and has looked it up anew, and that inode may have been missed.
                left.asked = False
                self.client.background(self.kept.stale(ino))
            if node is not None:
                with suppress(Exception):
                    self.cache.forget(ino)
                self.kept.forget(ino)
                if node.fid is not None:
                    self.client.forget(node.fid)

    @_answers
    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        """A file's attributes."""
        node = self.nodes.known(inode)
        changes = node.changes
        attr = self._known(inode) or await self._attributes(inode, self.nodes.fid(inode))
        await self.kept.settle(inode)
        node.asked = True
        return self._entry(inode, attr, asked=node.changes == changes)

    @_answers
    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: Any, fh: int | None, ctx: Any
    ) -> pyfuse3.EntryAttributes:
        """Changes attributes; a size truncates or extends the file."""
        node = self.nodes.known(inode)
        file = self._files.get(fh) if fh is not None else None
        fid = self.nodes.fid(inode)
        self._changed(inode)
        try:
            await self.client.setattr(
                file.fid if file is not None else fid,
                mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
                uid=attr.st_uid if fields.update_uid else None,
                gid=attr.st_gid if fields.update_gid else None,
                size=attr.st_size if fields.update_size else None,
                atime_ns=attr.st_atime_ns if fields.update_atime else None,
                mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            )
        finally:
            self._changed(inode)
            if fields.update_size:
                self.cache.invalidate_data(inode)
        if fields.update_mode or fields.update_uid or fields.update_size:
            node.no_capability_until = 0.0
        return self._entry(inode, await self._attributes(inode, fid))

    @_answers
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        """A symbolic link's target."""
        return await self.client.readlink(self.nodes.fid(inode))

    @_answers
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        """How full the file system is."""
        numbers = await self.client.statfs(self.nodes.fid(ROOT))
        out = pyfuse3.StatvfsData()
        out.f_bsize = out.f_frsize = numbers.bsize
        out.f_blocks, out.f_bfree, out.f_bavail = numbers.blocks, numbers.bfree, numbers.bavail
        out.f_files, out.f_ffree = numbers.files, numbers.ffree
        out.f_favail = numbers.ffree
        out.f_namemax = numbers.namelen
        return out

    @_answers
    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        """The kernel checks (default_permissions), and then the server."""
        return True

    # Making and removing.

    async def _made(self, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        """A name has been made in a directory: gives it to who asked, and tells the kernel about it."""
        self._changed(parent)
        self.kept.changed(parent, name)
        self.cache.invalidate_lookup(parent, name)
        ino, attr = await self._find(parent, name)
        if ctx.uid not in (self._uid, attr.uid):
            fid = self.nodes.fid(ino)
            await self.client.setattr(fid, uid=ctx.uid)
            self._changed(ino)
            attr = await self._attributes(ino, fid)
        return self._named(parent, name, ino, attr)

    @_answers
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> pyfuse3.EntryAttributes:
        """Makes a file, FIFO, socket or device node."""
        await self.client.mknod(
            self.nodes.fid(parent_inode),
            name,
            mode & ~ctx.umask,
            major=os.major(rdev),
            minor=os.minor(rdev),
            gid=ctx.gid,
        )
        return await self._made(parent_inode, name, ctx)

    @_answers
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        """Makes a directory."""
        await self.client.mkdir(self.nodes.fid(parent_inode), name, stat.S_IMODE(mode) & ~ctx.umask, ctx.gid)
        return await self._made(parent_inode, name, ctx)

    @_answers
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        """Makes a symbolic link."""
        await self.client.symlink(self.nodes.fid(parent_inode), name, target, ctx.gid)
        return await self._made(parent_inode, name, ctx)

    @_answers
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        """Makes a hard link."""
        await self.client.link(self.nodes.fid(new_parent_inode), self.nodes.fid(inode), new_name)
        self._changed(new_parent_inode)
        self._changed(inode)
        self.kept.changed(new_parent_inode, new_name)
        self.cache.invalidate_lookup(new_parent_inode, new_name)
        return self._named(new_parent_inode, new_name, *await self._find(new_parent_inode, new_name))

    @_answers
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """Removes a name."""
        await self._remove(parent_inode, name, 0)

    @_answers
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """Removes an empty directory."""
        await self._remove(parent_inode, name, codec.AT_REMOVEDIR)

    async def _meant(self, parent: int, name: bytes) -> int | None:
        """The file of a name that goes, if the cache may have attributes of it: other names of it have one link less.

        The kernel may know the name for longer than the cache, and then asks nobody before.
        """
        ino = self.cache.lookup(parent, name) if self.kept.usable() else None
        if ino is not None or type(self.cache).attr is Cache.attr:
            return ino
        try:
            fid, qids = await self.client.walk_qids(self.nodes.fid(parent), name)
        except OSError:
            return None
        self.client.forget(fid)
        return self.nodes.ino(qids[-1].path)

    async def _remove(self, parent: int, name: bytes, flags: int) -> None:
        ino = await self._meant(parent, name)
        await self.client.unlinkat(self.nodes.fid(parent), name, flags)
        self._gone(parent, name, ino)

    def _gone(self, parent: int, name: bytes, ino: int | None) -> None:
        self.kept.changed(parent, name)
        self.cache.invalidate_lookup(parent, name)
        self._changed(parent)
        if ino is not None:
            self._changed(ino)

    @_answers
    async def rename(  # noqa: PLR0917 - as pyfuse3 calls it
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int, ctx: Any
    ) -> None:
        """Moves a name. 9P2000.L has no RENAME_NOREPLACE and no RENAME_EXCHANGE: EINVAL, as from v9fs."""
        if flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        moved = await self._meant(parent_inode_old, name_old)
        if self.kept.leased:
            replaced = await self._meant(parent_inode_new, name_new)
        else:
            replaced = self.cache.lookup(parent_inode_new, name_new)  # this one the kernel has just asked for
        old, new = self.nodes.fid(parent_inode_old), self.nodes.fid(parent_inode_new)
        self.kept.moving((parent_inode_old, name_old), (parent_inode_new, name_new))
        await self.client.renameat(old, name_old, new, name_new)
        self._gone(parent_inode_old, name_old, moved)
        self._gone(parent_inode_new, name_new, replaced)

    # Files.

    @_answers
    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        """Opens a file."""
        node_fid = self.nodes.fid(inode)
        fid = await self.client.walk(node_fid)
        try:
            await self.client.lopen(fid, flags & _FLAGS & ~(os.O_CREAT | os.O_EXCL))
            if flags & os.O_TRUNC:
                self._changed(inode)
                self.cache.invalidate_data(inode)
            keep = False
            if self.cache.kernel_pages:
                known = self._known(inode) if self.kept.leased else None
                keep = self.cache.opened(inode, known or await self._attributes(inode, node_fid))
                await self.kept.settle(inode)
        except BaseException:
            self.client.forget(fid)
            raise
        return self._opened(fid, inode, flags, keep)

    def _opened(self, fid: int, ino: int, flags: int, keep: bool) -> pyfuse3.FileInfo:
        self._files[fid] = _File(fid, ino, bool(flags & os.O_APPEND))
        return pyfuse3.FileInfo(fh=fid, direct_io=not self.cache.kernel_pages, keep_cache=keep)

    @_answers
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Makes a file and opens it."""
        fid = await self.client.walk(self.nodes.fid(parent_inode))
        try:
            await self.client.lcreate(fid, name, flags & _FLAGS, stat.S_IMODE(mode) & ~ctx.umask, ctx.gid)
            entry = await self._made(parent_inode, name, ctx)
        except BaseException:
            self.client.forget(fid)
            raise
        return self._opened(fid, entry.st_ino, flags, keep=False), entry

    @_answers
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Data of an open file."""
        file = self._files[fh]
        data = self.cache.data(file.ino, off, size) if self.kept.usable() else None
        if data is not None:
            return data
        node = self.nodes.get(file.ino)
        changes, mark = node.changes if node else 0, self.kept.mark()
        data = await self.client.read_exactly(file.fid, off, size)
        if not self.kept.file(file.ino, mark):
            await self.kept.stale(file.ino)
        elif node is not None and node.changes == changes:
            self.cache.put_data(file.ino, off, data, at_end=len(data) < size)
        return data

    @_answers
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Writes all of it, or says why not."""
        file = self._files[fh]
        node = self.nodes.known(file.ino)
        self._changed(file.ino)
        mark = self.kept.mark()
        self.kept.writing(file.ino, 1)
        try:
            if file.append:  # where it goes is the server's to say, so one after the other
                done = 0
                while done < len(buf):
                    done += await self.client.write(file.fid, off + done, buf[done:])
            else:
                await self.client.write_all(file.fid, off, buf)
        finally:
            self.kept.writing(file.ino, -1)
            node.changes += 1
            self.cache.invalidate_attr(file.ino)
            if file.append:
                self.cache.invalidate_data(file.ino)
            else:
                self.cache.invalidate_data(file.ino, off, len(buf))
            if not self.kept.file(file.ino, mark):  # the kernel has the page already
                await self.kept.stale(file.ino)
        return len(buf)

    @_answers
    async def flush(self, fh: int) -> None:
        """Nothing is held back."""

    @_answers
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Returns when the server has it on its disk."""
        await self.client.fsync(self._files[fh].fid, datasync=datasync)

    @_answers
    async def release(self, fh: int) -> None:
        """The last descriptor is closed."""
        file = self._files.pop(fh)
        self.client.forget(file.fid)

    # Directories.

    @_answers
    async def opendir(self, inode: int, ctx: Any) -> int:
        """Opens a directory."""
        listing = self.cache.listing(inode) if self.kept.usable() else None
        if listing is not None:
            self._cached += 1
            self._directories[self._cached] = _Directory(None, inode, entries=deque(listing))
            return self._cached
        mark, changes = self.kept.mark(), self.nodes.known(inode).changes
        fid = await self.client.walk(self.nodes.fid(inode))
        try:
            await self.client.lopen(fid, os.O_RDONLY | os.O_DIRECTORY)
        except BaseException:
            self.client.forget(fid)
            raise
        self._directories[fid] = _Directory(fid, inode, mark=mark, changes=changes)
        return fid

    @_answers
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """Entries from a position on, as many as the kernel has room for."""
        directory = self._directories[fh]
        if start_id != directory.position:
            await self._seek(directory, start_id)
        while await self._fill(directory):
            while directory.ready:
                listed = directory.ready[0]
                if not pyfuse3.readdir_reply(
                    token, listed.entry.name, self._listed(directory, listed), listed.entry.offset
                ):
                    return
                directory.ready.popleft()
                directory.position = listed.entry.offset
                self._looked_up(listed.ino, listed.fid)
                if listed.fid is not None and not self.kept.leased:
                    self.cache.put_lookup(directory.ino, listed.entry.name, listed.ino)

    def _listed(self, directory: _Directory, listed: _Listed) -> pyfuse3.EntryAttributes:
        if listed.attr is not None:
            out = self._named(directory.ino, listed.entry.name, listed.ino, listed.attr)
            node = self.nodes.get(listed.ino)
            if self.kept.leased and node is not None and node.asked and self._known(listed.ino) is listed.attr:
                out.attr_timeout = self.kept.attr_seconds(listed.ino, asked=True)
            return out
        # Number and type are all that a listing shows. The kernel asks before it uses more, for it may keep nothing.
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = listed.ino
        entry.st_mode = listed.entry.type << 12
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    async def _seek(self, directory: _Directory, start: int) -> None:
        if directory.fid is None:  # what it was opened with may be old by now
            directory.fid = await self.client.walk(self.nodes.fid(directory.ino))
            await self.client.lopen(directory.fid, os.O_RDONLY | os.O_DIRECTORY)
        self._rewind(directory, start)

    def _rewind(self, directory: _Directory, start: int) -> None:
        for listed in directory.ready:
            if listed.fid is not None:
                self.client.forget(listed.fid)
        directory.ready.clear()
        directory.entries.clear()
        directory.position = directory.offset = start
        directory.read = None

    async def _fill(self, directory: _Directory) -> bool:
        """Has some entries ready; False at the end."""
        while not directory.ready:
            if not directory.entries:
                if directory.fid is None:
                    return False
                entries = await self.client.readdir(directory.fid, directory.offset)
                if not entries:
                    self._read_all(directory)
                    return False
                directory.offset = entries[-1].offset
                entries = [e for e in entries if e.name not in (b".", b"..")]
                directory.entries.extend(entries)
                if directory.read is not None:
                    directory.read += entries
                continue
            some = [directory.entries.popleft() for _ in range(min(_BATCH, len(directory.entries)))]
            ready: list[_Listed | None] = [self._listed_before(directory, entry) for entry in some]
            missing = [i for i, listed in enumerate(ready) if listed is None]
            found = await asyncio.gather(*(self._prepare(directory, some[i]) for i in missing))
            for i, listed in zip(missing, found, strict=True):
                ready[i] = listed
            directory.ready.extend(listed for listed in ready if listed is not None)
        return True

    def _read_all(self, directory: _Directory) -> None:
        """Keeps what a directory has, if that is what it had when its reading began."""
        read, directory.read = directory.read, None
        node = self.nodes.get(directory.ino)
        if (
            self.kept.leased
            and read is not None
            and node is not None
            and node.changes == directory.changes
            and self.kept.file(directory.ino, directory.mark)
        ):
            self.cache.put_listing(directory.ino, read)

    def _listed_before(self, directory: _Directory, entry: Dirent) -> _Listed | None:
        """An entry of which all is leased."""
        if not self.kept.leased or not self.kept.usable():
            return None
        ino = self.nodes.ino(entry.qid.path)
        node, attr = self.nodes.get(ino), self.cache.attr(ino)
        if node is None or node.fid is None or attr is None or self.cache.lookup(directory.ino, entry.name) != ino:
            return None
        return _Listed(entry, ino, None, attr)

    async def _prepare(self, directory: _Directory, entry: Dirent) -> _Listed | None:
        """An entry, with attributes if the kernel may use them or has some that would be overwritten by none."""
        ino = self.nodes.ino(entry.qid.path)
        node = self.nodes.get(ino)
        known = not self.kept.leased or (self.kept.usable() and self.cache.lookup(directory.ino, entry.name) == ino)
        if node is not None and node.fid is not None and known:
            attr = self._known(ino)
            if attr is None:
                with suppress(OSError):
                    attr = await self._attributes(ino, node.fid)
            return _Listed(entry, ino, None, attr) if attr is not None else None
        if not self.kept.leased and not self.cache.kernel_seconds:
            return _Listed(entry, ino)
        mark = self.kept.mark()
        try:
            fid, qids = await self.client.walk_qids(self.nodes.fid(directory.ino), entry.name)
        except OSError:
            return None  # removed since
        try:
            ino = self.nodes.ino(qids[-1].path)
            attr = await self._attributes(ino, fid)
            if self.kept.leased and self.kept.name(directory.ino, entry.name, mark):
                self.cache.put_lookup(directory.ino, entry.name, ino)
            return _Listed(entry, ino, fid, attr)
        except OSError:
            self.client.forget(fid)
            return None

    @_answers
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Returns when the server has the directory on its disk."""
        directory = self._directories[fh]
        if directory.fid is None:
            await self._seek(directory, directory.position)
        assert directory.fid is not None
        await self.client.fsync(directory.fid, datasync=datasync)

    @_answers
    async def releasedir(self, fh: int) -> None:
        """A directory is closed."""
        directory = self._directories.pop(fh)
        self._rewind(directory, 0)
        if directory.fid is not None:
            self.client.forget(directory.fid)

    # Extended attributes.

    @_answers
    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        """An extended attribute's value."""
        node = self.nodes.known(inode)
        if name == _CAPABILITY and self.kept.usable() and time.monotonic() < node.no_capability_until:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        mark = self.kept.mark()
        try:
            return await self.client.getxattr(self.nodes.fid(inode), name)
        except OSError as error:
            if name == _CAPABILITY and error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                if not self.kept.leased:
                    node.no_capability_until = time.monotonic() + _CAPABILITY_SECONDS
                elif self.kept.file(inode, mark):
                    node.no_capability_until = math.inf  # until it is revoked
            raise

    @_answers
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        """Sets an extended attribute. pyfuse3 keeps XATTR_CREATE and XATTR_REPLACE: it calls getxattr before."""
        await self._set_xattr(inode, name, value, 0)

    @_answers
    async def listxattr(self, inode: int, ctx: Any) -> list[bytes]:
        """The names of the extended attributes."""
        try:
            names = await self.client.getxattr(self.nodes.fid(inode))
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return []
            raise
        return [name for name in names.split(b"\0") if name]

    @_answers
    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        """Removes an extended attribute: 9P2000.L does that by setting it to nothing."""
        await self._set_xattr(inode, name, b"", _XATTR_REPLACE)

    async def _set_xattr(self, inode: int, name: bytes, value: bytes, flags: int) -> None:
        node = self.nodes.known(inode)
        await self.client.setxattr(self.nodes.fid(inode), name, value, flags)
        node.no_capability_until = 0.0
        self._changed(inode)
