"""A small synchronous 9P2000.L client over any transport: one request at a time, errors as OSError.

Methods named after a message send that message and return its reply's content. Fids are plain ints that
the client hands out; whoever got one from attach() or walk() clunks it. The helpers at the end take paths.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from xen9p import codec
from xen9p.codec import Dirent, Message, Qid
from xen9p.errors import ProtocolError

DEFAULT_MSIZE = 512 * 1024

R = TypeVar("R", bound=Message)


class Transport(Protocol):
    """What carries whole messages; transport.stream_client, transport.memory and others are such."""

    def send(self, data: bytes, /) -> None: ...
    def recv(self) -> bytes: ...
    def close(self) -> None: ...


class Client:
    """A session on a transport, which it owns.

    Args:
        transport: connected, and used by nobody else.
        msize: the largest message in bytes to propose; version() may lower it.
    """

    def __init__(self, transport: Transport, msize: int = DEFAULT_MSIZE) -> None:
        self.transport = transport
        self.msize = msize
        self._next_tag = 0
        self._next_fid = 0
        self._free_fids: list[int] = []

    @classmethod
    def connect(cls, transport: Transport, aname: bytes = b"", msize: int = DEFAULT_MSIZE) -> tuple[Client, int]:
        """A client with its version agreed, and the root fid of the tree named aname."""
        client = cls(transport, msize)
        client.version()
        return client, client.attach(aname=aname)

    def close(self) -> None:
        """Ends the session; the server forgets its fids."""
        self.transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Requests in general.

    def rpc(self, msg: Message, tag: int | None = None) -> Message:
        """Sends a request and returns its reply, or raises the Rlerror's errno as OSError."""
        if tag is None:
            tag = self._next_tag
            self._next_tag = (tag + 1) % codec.NOTAG
        self.transport.send(codec.encode(msg, tag))
        got, reply = codec.decode(self.transport.recv())
        if got != tag:
            raise ProtocolError(f"{codec.message_name(msg.type)} had tag {tag}, its reply has {got}")
        if isinstance(reply, codec.Rlerror):
            name = codec.message_name(msg.type)
            raise OSError(reply.ecode, f"{name}: {os.strerror(reply.ecode)}")
        if reply.type != msg.type + 1:
            name, other = codec.message_name(msg.type), codec.message_name(reply.type)
            raise ProtocolError(f"{name} was answered with {other}")
        return reply

    def send_raw(self, data: bytes) -> None:
        """Sends bytes as they are, right or wrong; the reply, if one comes, is for recv_raw()."""
        self.transport.send(data)

    def recv_raw(self) -> bytes:
        """The next message from the server as bytes."""
        return self.transport.recv()

    def _call(self, msg: Message, reply: type[R], tag: int | None = None) -> R:
        got = self.rpc(msg, tag)
        if not isinstance(got, reply):
            raise ProtocolError(f"{codec.message_name(msg.type)} was answered with {type(got).__name__}")
        return got

    def new_fid(self) -> int:
        """A fid that is not in use."""
        if self._free_fids:
            return self._free_fids.pop()
        self._next_fid += 1
        return self._next_fid - 1

    def _release(self, fid: int) -> None:
        self._free_fids.append(fid)

    # One method a message.

    def version(self, version: bytes = codec.VERSION) -> int:
        """Agrees on 9P2000.L and returns the msize in bytes; forgets every fid."""
        reply = self._call(codec.Tversion(self.msize, version), codec.Rversion, codec.NOTAG)
        if reply.version != codec.VERSION:
            raise ProtocolError(f"the server speaks {reply.version!r}, not {codec.VERSION!r}")
        if reply.msize > self.msize:
            raise ProtocolError(f"the server raised msize from {self.msize} to {reply.msize}")
        self.msize = reply.msize
        self._next_fid = 0
        self._free_fids.clear()
        return self.msize

    def auth(self, uname: bytes = b"", aname: bytes = b"", n_uname: int = 0) -> int:
        """The fid of an authentication exchange."""
        afid = self.new_fid()
        try:
            self._call(codec.Tauth(afid, uname, aname, n_uname), codec.Rauth)
        except BaseException:
            self._release(afid)
            raise
        return afid

    def attach(self, uname: bytes = b"", aname: bytes = b"", n_uname: int = 0, afid: int = codec.NOFID) -> int:
        """The fid of a tree's root, for the user with uid n_uname."""
        fid = self.new_fid()
        try:
            self._call(codec.Tattach(fid, afid, uname, aname, n_uname), codec.Rattach)
        except BaseException:
            self._release(fid)
            raise
        return fid

    def flush(self, oldtag: int) -> None:
        """Asks the server to give up the request with that tag."""
        self._call(codec.Tflush(oldtag), codec.Rflush)

    def walk(self, fid: int, *names: bytes) -> int:
        """A new fid for what lies at names beneath fid; without names, a second fid for the same file."""
        newfid = self.new_fid()
        try:
            self._walk_to(fid, newfid, names)
        except BaseException:
            self._release(newfid)
            raise
        return newfid

    def _walk_to(self, fid: int, newfid: int, names: tuple[bytes, ...]) -> None:
        first, rest = names[: codec.MAX_WALK], names[codec.MAX_WALK :]
        self._walk_some(fid, newfid, first)
        try:
            while rest:
                first, rest = rest[: codec.MAX_WALK], rest[codec.MAX_WALK :]
                self._walk_some(newfid, newfid, first)
        except BaseException:
            with suppress(OSError):
                self._call(codec.Tclunk(newfid), codec.Rclunk)
            raise

    def _walk_some(self, fid: int, newfid: int, names: tuple[bytes, ...]) -> tuple[Qid, ...]:
        qids = self._call(codec.Twalk(fid, newfid, names), codec.Rwalk).wqids
        if len(qids) > len(names):
            raise ProtocolError(f"Rwalk has {len(qids)} qids for {len(names)} names")
        if len(qids) < len(names):
            # The server stopped on the way: newfid does not exist.
            raise FileNotFoundError(errno.ENOENT, "Twalk: No such file or directory", os.fsdecode(names[len(qids)]))
        return qids

    def lopen(self, fid: int, flags: int = os.O_RDONLY) -> int:
        """Opens fid with the flags of open(2); returns the iounit in bytes, 0 for as much as fits."""
        return self._call(codec.Tlopen(fid, flags), codec.Rlopen).iounit

    def lcreate(self, fid: int, name: bytes, flags: int, mode: int = 0o644, gid: int = 0) -> int:
        """Creates name in the directory fid, which becomes the open file; returns the iounit in bytes."""
        return self._call(codec.Tlcreate(fid, name, flags, mode, gid), codec.Rlcreate).iounit

    def read(self, fid: int, offset: int, count: int) -> bytes:
        """One Tread: at most count bytes and at most what a message holds; b"" at the end."""
        count = min(count, self.msize - codec.READ_OVERHEAD)
        data = self._call(codec.Tread(fid, offset, count), codec.Rread).data
        if len(data) > count:
            raise ProtocolError(f"Rread has {len(data)} bytes, {count} were asked for")
        return data

    def write(self, fid: int, offset: int, data: bytes) -> int:
        """One Twrite: as much of data as a message holds; returns how many bytes were written."""
        data = data[: self.msize - codec.WRITE_OVERHEAD]
        count = self._call(codec.Twrite(fid, offset, data), codec.Rwrite).count
        if count > len(data):
            raise ProtocolError(f"Rwrite says {count} bytes, {len(data)} were sent")
        return count

    def readdir(self, fid: int, offset: int = 0, count: int | None = None) -> list[Dirent]:
        """One Treaddir: entries from offset on, at most count bytes of them; [] at the end."""
        most = self.msize - codec.READ_OVERHEAD
        count = most if count is None else min(count, most)
        data = self._call(codec.Treaddir(fid, offset, count), codec.Rreaddir).data
        if len(data) > count:
            raise ProtocolError(f"Rreaddir has {len(data)} bytes, {count} were asked for")
        return list(codec.decode_dirents(data))

    def clunk(self, fid: int) -> None:
        """Gives the fid back; it is free even if the server reports an error."""
        try:
            self._call(codec.Tclunk(fid), codec.Rclunk)
        finally:
            self._release(fid)

    def remove(self, fid: int) -> None:
        """Removes the file and clunks the fid, also if the removal fails."""
        try:
            self._call(codec.Tremove(fid), codec.Rremove)
        finally:
            self._release(fid)

    def getattr(self, fid: int, mask: int = codec.GETATTR_BASIC) -> codec.Rgetattr:
        """The attributes in mask (GETATTR_*)."""
        return self._call(codec.Tgetattr(fid, mask), codec.Rgetattr)

    def setattr(
        self,
        fid: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        """Sets what is given: mode bits, owner, group, size in bytes, times in ns since 1970."""
        valid = 0
        for value, bit in (
            (mode, codec.SETATTR_MODE),
            (uid, codec.SETATTR_UID),
            (gid, codec.SETATTR_GID),
            (size, codec.SETATTR_SIZE),
            (atime_ns, codec.SETATTR_ATIME | codec.SETATTR_ATIME_SET),
            (mtime_ns, codec.SETATTR_MTIME | codec.SETATTR_MTIME_SET),
        ):
            valid |= bit if value is not None else 0
        atime, mtime = divmod(atime_ns or 0, 10**9), divmod(mtime_ns or 0, 10**9)
        msg = codec.Tsetattr(fid, valid, mode or 0, uid or 0, gid or 0, size or 0, *atime, *mtime)
        self._call(msg, codec.Rsetattr)

    def statfs(self, fid: int) -> codec.Rstatfs:
        """The numbers of statfs(2)."""
        return self._call(codec.Tstatfs(fid), codec.Rstatfs)

    def fsync(self, fid: int, *, datasync: bool = False) -> None:
        """Returns when the file's data is on the disk of the server."""
        self._call(codec.Tfsync(fid, int(datasync)), codec.Rfsync)

    def mkdir(self, dfid: int, name: bytes, mode: int = 0o755, gid: int = 0) -> Qid:
        """Makes a directory."""
        return self._call(codec.Tmkdir(dfid, name, mode, gid), codec.Rmkdir).qid

    def symlink(self, dfid: int, name: bytes, target: bytes, gid: int = 0) -> Qid:
        """Makes a symbolic link name -> target."""
        return self._call(codec.Tsymlink(dfid, name, target, gid), codec.Rsymlink).qid

    def readlink(self, fid: int) -> bytes:
        """A symbolic link's target."""
        return self._call(codec.Treadlink(fid), codec.Rreadlink).target

    def mknod(self, dfid: int, name: bytes, mode: int, *, major: int = 0, minor: int = 0, gid: int = 0) -> Qid:
        """Makes a device node, FIFO or socket; mode has the type bits."""
        return self._call(codec.Tmknod(dfid, name, mode, major, minor, gid), codec.Rmknod).qid

    def link(self, dfid: int, fid: int, name: bytes) -> None:
        """Makes a hard link name in dfid to the file of fid."""
        self._call(codec.Tlink(dfid, fid, name), codec.Rlink)

    def rename(self, fid: int, dfid: int, name: bytes) -> None:
        """Moves the file of fid to name in dfid."""
        self._call(codec.Trename(fid, dfid, name), codec.Rrename)

    def renameat(self, olddirfid: int, oldname: bytes, newdirfid: int, newname: bytes) -> None:
        """Moves oldname in one directory to newname in another."""
        self._call(codec.Trenameat(olddirfid, oldname, newdirfid, newname), codec.Rrenameat)

    def unlinkat(self, dirfid: int, name: bytes, flags: int = 0) -> None:
        """Removes name; a directory only with codec.AT_REMOVEDIR."""
        self._call(codec.Tunlinkat(dirfid, name, flags), codec.Runlinkat)

    def lock(
        self,
        fid: int,
        kind: int,
        start: int = 0,
        length: int = 0,
        *,
        proc_id: int = 0,
        client_id: bytes = b"",
    ) -> int:
        """Takes or releases a POSIX lock without waiting; returns LOCK_SUCCESS, LOCK_BLOCKED, ..."""
        msg = codec.Tlock(fid, kind, 0, start, length, proc_id, client_id)
        return self._call(msg, codec.Rlock).status

    def getlock(
        self,
        fid: int,
        kind: int,
        start: int = 0,
        length: int = 0,
        *,
        proc_id: int = 0,
        client_id: bytes = b"",
    ) -> codec.Rgetlock:
        """The lock that stands in the way, or kind LOCK_TYPE_UNLCK."""
        msg = codec.Tgetlock(fid, kind, start, length, proc_id, client_id)
        return self._call(msg, codec.Rgetlock)

    def xattrwalk(self, fid: int, name: bytes = b"") -> tuple[int, int]:
        """(fid to read from, size in bytes) of an extended attribute, or of their list."""
        newfid = self.new_fid()
        try:
            size = self._call(codec.Txattrwalk(fid, newfid, name), codec.Rxattrwalk).size
        except BaseException:
            self._release(newfid)
            raise
        return newfid, size

    def xattrcreate(self, fid: int, name: bytes, size: int, flags: int = 0) -> None:
        """Turns fid into one that takes size bytes and sets the attribute when it is clunked."""
        self._call(codec.Txattrcreate(fid, name, size, flags), codec.Rxattrcreate)

    # Helpers that take a path beneath a directory's fid.

    @contextmanager
    def walked(self, fid: int, path: str | bytes) -> Iterator[int]:
        """A fid for path, clunked at the end."""
        found = self.walk(fid, *split(path))
        try:
            yield found
        finally:
            self.clunk(found)

    def read_file(self, fid: int, path: str | bytes) -> bytes:
        """The whole content of the file at path."""
        with self.walked(fid, path) as file:
            self.lopen(file, os.O_RDONLY)
            return b"".join(self.read_all(file))

    def read_all(self, fid: int) -> Iterator[bytes]:
        """An open file's content in pieces, from its start."""
        offset = 0
        while data := self.read(fid, offset, self.msize):
            yield data
            offset += len(data)

    def write_all(self, fid: int, offset: int, data: bytes) -> None:
        """Writes all of data to an open file, in as many messages as it takes."""
        view = memoryview(data)
        while view:
            count = self.write(fid, offset, bytes(view[: self.msize]))
            if count == 0:
                raise OSError(errno.EIO, "Twrite: the server wrote nothing")
            offset += count
            view = view[count:]

    def write_file(self, fid: int, path: str | bytes, data: bytes, mode: int = 0o644) -> None:
        """Makes path a file with just this content; creates it if it is not there."""
        *parents, name = split(path)
        with self.walked(fid, b"/".join(parents)) as directory:
            try:
                file = self.walk(directory, name)
                created = False
            except FileNotFoundError:
                file = self.walk(directory)
                created = True
            try:
                if created:
                    self.lcreate(file, name, os.O_WRONLY, mode)
                else:
                    self.lopen(file, os.O_WRONLY | os.O_TRUNC)
                self.write_all(file, 0, data)
            finally:
                self.clunk(file)

    def listdir(self, fid: int, path: str | bytes = b"") -> list[Dirent]:
        """Every entry of the directory at path but '.' and '..', in the server's order."""
        with self.walked(fid, path) as directory:
            self.lopen(directory, os.O_RDONLY | os.O_DIRECTORY)
            entries: list[Dirent] = []
            offset = 0
            while some := self.readdir(directory, offset):
                entries += some
                offset = some[-1].offset
            return [e for e in entries if e.name not in (b".", b"..")]

    def stat(self, fid: int, path: str | bytes) -> codec.Rgetattr:
        """The attributes of what lies at path."""
        with self.walked(fid, path) as file:
            return self.getattr(file)


def split(path: str | bytes) -> list[bytes]:
    """The components of a path; empty ones and '.' drop out."""
    raw = os.fsencode(path)
    return [name for name in raw.split(b"/") if name not in (b"", b".")]
