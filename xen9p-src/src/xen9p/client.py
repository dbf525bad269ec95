"""A synchronous 9P2000.L client over any transport, for one thread: errors as OSError, and requests side by side.

Methods named after a message send that message and return its reply's content. submit() sends without waiting;
replies may come in any order. Fids are plain ints that the client hands out; whoever got one from attach() or walk()
clunks it. The helpers at the end take paths. The client for asyncio is async_client.py.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from xen9p import codec, requests
from xen9p.auth import CHALLENGE_SIZE, Key, asking, explained, respond
from xen9p.codec import Dirent, Message, Qid
from xen9p.errors import ProtocolError, Xen9pError
from xen9p.requests import DEFAULT_MSIZE, WINDOW, split
from xen9p.transport.link import Transport

__all__ = ["DEFAULT_MSIZE", "Client", "Pending", "Transport", "split"]

R = TypeVar("R", bound=Message)


class Pending(Generic[R]):
    """A request that is under way."""

    def __init__(self, client: Client, tag: int, request: type[Message], wanted: type[R]) -> None:
        self.tag = tag
        self._client = client
        self._request = request
        self._wanted = wanted
        self._reply: Message | None = None

    @property
    def done(self) -> bool:
        """Whether the reply is here."""
        return self._reply is not None

    def arrived(self, reply: Message) -> None:
        """Takes the reply; the client calls this."""
        self._reply = reply

    def result(self, timeout: float | None = None) -> R:
        """Waits for the reply, at most so many seconds; None for as long as the transport waits.

        Raises:
            OSError: the server answered with an errno.
            TimeoutError: no reply in time; the request has been flushed and will have no effect that is not there yet.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._reply is None:
            try:
                self._client.receive(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                if timeout is None:
                    raise
                if self.cancel():
                    raise TimeoutError(f"{self._request.__name__}: no reply within {timeout:g} s") from None
        return requests.fitting(self._request, self._reply, self._wanted)

    def cancel(self) -> bool:
        """Asks the server to give up the request (Tflush). False if its reply came first: result() has it."""
        if self._reply is None:
            self._client.flush(self.tag)
            self._client.forget(self.tag)
        return self._reply is None


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
        self._fids = requests.Fids()
        self._waiting: dict[int, Pending[Message]] = {}

    @classmethod
    def connect(
        cls,
        transport: Transport,
        aname: bytes = b"",
        msize: int = DEFAULT_MSIZE,
        n_uname: int = 0,
        key: Key | None = None,
    ) -> tuple[Client, int]:
        """A client with its version agreed, and the tree aname's root fid. If that fails the transport is closed.

        Raises:
            AuthError: the server wants a key, refuses this one, or wants none.
        """
        client = cls(transport, msize)
        try:
            client.version()
            return client, client.enter(aname, n_uname, key)
        except BaseException:
            client.close()
            raise

    def close(self) -> None:
        """Ends the session; the server forgets its fids."""
        self.transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Requests in general.

    def submit(self, msg: Message, wanted: type[R], tag: int | None = None) -> Pending[R]:
        """Sends a request and does not wait for its reply. While there is no room to send, replies are taken in."""
        tag = self._new_tag() if tag is None else tag
        data = codec.encode(msg, tag)
        if self._waiting:
            while not self.transport.post(data):
                self.receive()
        else:
            self.transport.send(data)
        pending = Pending(self, tag, type(msg), wanted)
        self._waiting[tag] = pending  # type: ignore[assignment]
        return pending

    def _new_tag(self) -> int:
        if len(self._waiting) >= codec.NOTAG:
            raise Xen9pError(f"{codec.NOTAG} requests are under way", hint="wait for some of them")
        tag = self._next_tag
        while tag in self._waiting:
            tag = (tag + 1) % codec.NOTAG
        self._next_tag = (tag + 1) % codec.NOTAG
        return tag

    def receive(self, timeout: float | None = None) -> None:
        """Waits for one reply and hands it to its request. Seconds; None for as long as the transport waits."""
        data = self.transport.recv() if timeout is None else self.transport.recv(timeout)
        tag, reply = codec.decode(codec.strip_lease(data)[0])
        pending = self._waiting.pop(tag, None)
        if pending is None:
            raise ProtocolError(f"{type(reply).__name__} has tag {tag}, no request with it is under way")
        pending.arrived(reply)

    def forget(self, tag: int) -> None:
        """After Rflush: the tag is free, its reply will never come."""
        self._waiting.pop(tag, None)

    def rpc(self, msg: Message, tag: int | None = None) -> Message:
        """Sends a request and returns its reply, or raises the Rlerror's errno as OSError."""
        return self._call(msg, codec.MESSAGES[msg.type + 1], tag)

    def send_raw(self, data: bytes) -> None:
        """Sends bytes as they are, right or wrong; the reply, if one comes, is for recv_raw()."""
        self.transport.send(data)

    def recv_raw(self) -> bytes:
        """The next message from the server as bytes."""
        return self.transport.recv()

    def _call(self, msg: Message, reply: type[R], tag: int | None = None) -> R:
        return self.submit(msg, reply, tag).result()

    def new_fid(self) -> int:
        """A fid that is not in use."""
        return self._fids.take()

    def release(self, fid: int) -> None:
        """A fid of new_fid() did not come to be, or the server has forgotten it."""
        self._fids.give(fid)

    # One method a message.

    def version(self, version: bytes = codec.VERSION) -> int:
        """Agrees on 9P2000.L and returns the msize in bytes; forgets every fid."""
        reply = self._call(codec.Tversion(self.msize, version), codec.Rversion, codec.NOTAG)
        self.msize = requests.check_version(reply, self.msize)
        self._fids.forget()
        return self.msize

    def auth(self, uname: bytes = b"", aname: bytes = b"", n_uname: int = 0) -> int:
        """The fid of an authentication exchange."""
        afid = self.new_fid()
        try:
            self._call(codec.Tauth(afid, uname, aname, n_uname), codec.Rauth)
        except BaseException:
            self.release(afid)
            raise
        return afid

    def attach(self, uname: bytes = b"", aname: bytes = b"", n_uname: int = 0, afid: int = codec.NOFID) -> int:
        """The fid of a tree's root, for the user with uid n_uname."""
        fid = self.new_fid()
        try:
            self._call(codec.Tattach(fid, afid, uname, aname, n_uname), codec.Rattach)
        except BaseException:
            self.release(fid)
            raise
        return fid

    def enter(self, aname: bytes = b"", n_uname: int = 0, key: Key | None = None) -> int:
        """attach(), with proof of a key if there is one.

        Raises:
            AuthError: the server wants a key, refuses this one, or wants none.
        """
        with explained(key):
            if key is None:
                return self.attach(aname=aname, n_uname=n_uname)
            uname = key.name.encode()
            with asking(key):
                afid = self.auth(uname, aname, n_uname)
            try:
                self.write(afid, 0, respond(key, self.read(afid, 0, CHALLENGE_SIZE), aname, n_uname))
                return self.attach(uname, aname, n_uname, afid)
            finally:
                self.clunk(afid)

    def flush(self, oldtag: int) -> None:
        """Asks the server to give up the request with that tag."""
        self._call(codec.Tflush(oldtag), codec.Rflush)

    def walk(self, fid: int, *names: bytes) -> int:
        """A new fid for what lies at names beneath fid; without names, a second fid for the same file."""
        newfid = self.new_fid()
        try:
            self._walk_to(fid, newfid, names)
        except BaseException:
            self.release(newfid)
            raise
        return newfid

    def _walk_to(self, fid: int, newfid: int, names: tuple[bytes, ...]) -> None:
        here = fid
        try:
            for step in requests.walk_steps(names):
                requests.check_walk(step, self._call(codec.Twalk(here, newfid, step), codec.Rwalk).wqids)
                here = newfid
        except BaseException:
            if here != fid:
                with suppress(OSError):
                    self._call(codec.Tclunk(newfid), codec.Rclunk)
            raise

    def lopen(self, fid: int, flags: int = os.O_RDONLY) -> int:
        """Opens fid with the flags of open(2); returns the iounit in bytes, 0 for as much as fits."""
        return self._call(codec.Tlopen(fid, flags), codec.Rlopen).iounit

    def lcreate(self, fid: int, name: bytes, flags: int, mode: int = 0o644, gid: int = 0) -> int:
        """Creates name in the directory fid, which becomes the open file; returns the iounit in bytes."""
        return self._call(codec.Tlcreate(fid, name, flags, mode, gid), codec.Rlcreate).iounit

    def read(self, fid: int, offset: int, count: int) -> bytes:
        """One Tread: at most count bytes and at most what a message holds; b"" at the end."""
        count = min(count, self.msize - codec.READ_OVERHEAD)
        return requests.check_read(self._call(codec.Tread(fid, offset, count), codec.Rread).data, count, "Rread")

    def write(self, fid: int, offset: int, data: bytes) -> int:
        """One Twrite: as much of data as a message holds; returns how many bytes were written."""
        data = data[: self.msize - codec.WRITE_OVERHEAD]
        return requests.check_written(self._call(codec.Twrite(fid, offset, data), codec.Rwrite), len(data))

    def readdir(self, fid: int, offset: int = 0, count: int | None = None) -> list[Dirent]:
        """One Treaddir: entries from offset on, at most count bytes of them; [] at the end."""
        most = self.msize - codec.READ_OVERHEAD
        count = most if count is None else min(count, most)
        return requests.check_dirents(self._call(codec.Treaddir(fid, offset, count), codec.Rreaddir), count)

    def clunk(self, fid: int) -> None:
        """Gives the fid back; it is free even if the server reports an error."""
        try:
            self._call(codec.Tclunk(fid), codec.Rclunk)
        finally:
            self.release(fid)

    def remove(self, fid: int) -> None:
        """Removes the file and clunks the fid, also if the removal fails."""
        try:
            self._call(codec.Tremove(fid), codec.Rremove)
        finally:
            self.release(fid)

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
        msg = requests.setattr_message(
            fid, mode=mode, uid=uid, gid=gid, size=size, atime_ns=atime_ns, mtime_ns=mtime_ns
        )
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
            self.release(newfid)
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

    def read_all(self, fid: int, offset: int = 0, iounit: int = 0) -> Iterator[bytes]:
        """An open file's content in pieces from offset on, several reads under way at a time.

        Args:
            iounit: what lopen() said; the bytes that the server prefers in one read.
        """
        size = requests.chunk(self.msize, iounit, codec.READ_OVERHEAD)
        ahead: deque[tuple[int, Pending[codec.Rread]]] = deque()
        window = 1
        try:
            while True:
                while len(ahead) < window:
                    ahead.append((offset, self.submit(codec.Tread(fid, offset, size), codec.Rread)))
                    offset += size
                window = min(2 * window, WINDOW)  # a short file costs no more than it has to
                at, pending = ahead.popleft()
                end = at + size
                data = requests.check_read(pending.result().data, size, "Rread")
                while data:
                    yield data
                    at += len(data)
                    if at == end:
                        break
                    data = self.read(fid, at, end - at)  # less than asked for is no end of the file yet
                else:
                    return
        finally:
            for _, pending in ahead:
                with suppress(OSError, EOFError, Xen9pError):
                    pending.result()

    def write_stream(self, fid: int, offset: int, pieces: Iterable[bytes], iounit: int = 0) -> int:
        """Writes pieces one after the other from offset on, several writes under way at a time.

        Returns the bytes written. After an error some pieces behind the one that failed may be written too.
        """
        size = requests.chunk(self.msize, iounit)
        ahead: deque[tuple[int, bytes, Pending[codec.Rwrite]]] = deque()
        began = offset

        def finish() -> None:
            at, part, pending = ahead.popleft()
            done = requests.check_written(pending.result(), len(part))
            while done < len(part):
                done += self.write(fid, at + done, part[done:])

        try:
            for piece in pieces:
                view = memoryview(piece)
                for start in range(0, len(view), size):
                    part = bytes(view[start : start + size])
                    if len(ahead) >= WINDOW:
                        finish()
                    ahead.append((offset, part, self.submit(codec.Twrite(fid, offset, part), codec.Rwrite)))
                    offset += len(part)
            while ahead:
                finish()
        finally:
            for _, _, pending in ahead:
                with suppress(OSError, EOFError, Xen9pError):
                    pending.result()
        return offset - began

    def write_all(self, fid: int, offset: int, data: bytes) -> None:
        """Writes all of data to an open file, in as many messages as it takes."""
        self.write_stream(fid, offset, (data,))

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
