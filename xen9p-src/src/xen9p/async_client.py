"""A 9P2000.L client for asyncio, over any transport: any number of requests under way, replies in any order.

The methods are those of client.Client, as coroutines. Cancelling one (or leaving asyncio.timeout()) sends Tflush; its
tag, and the fid that it would have made, are free again when the server has answered that.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from xen9p import codec, requests
from xen9p.auth import CHALLENGE_SIZE, Key, asking, explained, respond
from xen9p.codec import Dirent, Message, Qid
from xen9p.errors import ProtocolError, Xen9pError
from xen9p.requests import DEFAULT_MSIZE
from xen9p.transport.link import Transport

R = TypeVar("R", bound=Message)
T = TypeVar("T")

_BUDGET: Final = 64  # replies before other tasks get their turn


class _Call:
    """A request under way."""

    __slots__ = ("flushed", "future", "late")

    def __init__(self, future: asyncio.Future[Message]) -> None:
        self.future = future
        self.flushed = False
        self.late: Message | None = None  # a reply that came after the flush was sent and before Rflush


class AsyncClient:
    """A session on a transport, which it owns; belongs to the running loop.

    Args:
        transport: connected, and used by nobody else.
        msize: the largest message in bytes to propose; version() may lower it.
        lost: called once, with the reason, when the connection ends by itself.
    """

    def __init__(
        self,
        transport: Transport,
        msize: int = DEFAULT_MSIZE,
        lost: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.transport = transport
        self.msize = msize
        self._lost = lost
        self.unleased: Callable[[Message], None] | None = None
        """Called with each Rrevoke and each reply of which nothing may be kept, the moment it is here (leases.py)."""
        self._loop = asyncio.get_running_loop()
        self._fids = requests.Fids()
        self._next_tag = 0
        self._calls: dict[int, _Call] = {}
        self._queue: deque[bytes] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._writing = False
        self._fd = transport.fileno()
        self._loop.add_reader(self._fd, self._receive)

    @classmethod
    async def connect(
        cls,
        transport: Transport,
        aname: bytes = b"",
        msize: int = DEFAULT_MSIZE,
        n_uname: int = 0,
        key: Key | None = None,
    ) -> tuple[AsyncClient, int]:
        """A client with its version agreed, and the tree aname's root fid. If that fails the transport is closed.

        Raises:
            AuthError: the server wants a key, refuses this one, or wants none.
        """
        client = cls(transport, msize)
        try:
            await client.version()
            root = await client.enter(aname, n_uname, key)
        except BaseException:
            client.close()
            raise
        return client, root

    def close(self) -> None:
        """Ends the session; requests under way fail with ConnectionAbortedError."""
        self._end(ConnectionAbortedError(errno.ECONNABORTED, "the 9P session was closed"))
        self.transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @property
    def in_flight(self) -> int:
        """Requests without a reply, those among them that have been flushed included."""
        return len(self._calls)

    # Messages in and out.

    def _receive(self) -> None:
        try:
            for _ in range(_BUDGET):
                data = self.transport.poll()
                if data is None:
                    break
                self._dispatch(data)
            else:
                self._loop.call_soon(self._receive_more)
            self._push()
        except (OSError, EOFError, Xen9pError) as error:
            self._fail(error)

    def _receive_more(self) -> None:
        # What is here already makes no descriptor readable.
        if self._error is None:
            self._receive()

    def _dispatch(self, data: bytes) -> None:
        data, leased = codec.strip_lease(data)
        tag, reply = codec.decode(data)
        if self.unleased is not None and (not leased or isinstance(reply, codec.Rrevoke)):
            self.unleased(reply)
        call = self._calls.get(tag)
        if call is None:
            raise ProtocolError(f"{type(reply).__name__} has tag {tag}, no request with it is under way")
        if call.flushed:
            call.late = reply  # the tag is free when Rflush comes
            return
        del self._calls[tag]
        if not call.future.done():
            call.future.set_result(reply)

    def _send(self, data: bytes) -> None:
        if self._error is not None:
            raise ConnectionAbortedError(errno.ECONNABORTED, f"the 9P session has ended: {self._error}")
        self._queue.append(data)
        try:
            self._push()
        except (OSError, EOFError, Xen9pError) as error:
            self._fail(error)

    def _push(self) -> None:
        """Sends what there is room for; the rest when the transport says so."""
        while self._queue and self.transport.post(self._queue[0]):
            self._queue.popleft()
        want = not self.transport.flush()
        if want != self._writing:
            self._writing = want
            if want:
                self._loop.add_writer(self._fd, self._writable)
            else:
                self._loop.remove_writer(self._fd)

    def _writable(self) -> None:
        try:
            self._push()
        except (OSError, EOFError, Xen9pError) as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        first = self._error is None
        self._end(error)
        if first and self._lost is not None:
            self._lost(error)

    def _end(self, error: BaseException) -> None:
        if self._error is not None:
            return
        self._error = error
        self._loop.remove_reader(self._fd)
        if self._writing:
            self._loop.remove_writer(self._fd)
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.future.done():
                gone = ConnectionAbortedError(errno.ECONNABORTED, f"the 9P session has ended: {error}")
                call.future.set_exception(gone)

    # Requests in general.

    async def call(self, msg: Message, wanted: type[R], newfid: int | None = None) -> R:
        """Sends a request and waits for its reply.

        Args:
            newfid: a fid from new_fid() that the request makes; taken back if it does not come to be.

        Raises:
            OSError: the server answered with an errno, or the connection is gone.
            ProtocolError: the reply does not fit.
        """
        tag = codec.NOTAG if isinstance(msg, codec.Tversion) else self._new_tag()
        data = codec.encode(msg, tag)
        call = _Call(self._loop.create_future())
        self._calls[tag] = call
        try:
            self._send(data)
            reply = await call.future
        except asyncio.CancelledError:
            self._abandon(tag, call, newfid)
            raise
        except BaseException:
            self._calls.pop(tag, None)
            raise
        try:
            return requests.fitting(type(msg), reply, wanted)
        except BaseException:
            if newfid is not None:
                self._fids.give(newfid)
            raise

    def _new_tag(self) -> int:
        if len(self._calls) >= codec.NOTAG:
            raise Xen9pError(f"{codec.NOTAG} requests are under way", hint="wait for some of them")
        tag = self._next_tag
        while tag in self._calls:
            tag = (tag + 1) % codec.NOTAG
        self._next_tag = (tag + 1) % codec.NOTAG
        return tag

    def _abandon(self, tag: int, call: _Call, newfid: int | None) -> None:
        if self._error is not None:
            return
        if tag in self._calls:
            call.flushed = True
            self.background(self._flush(tag, call, newfid))
        elif not call.future.cancelled():  # the reply came in the same moment
            self.background(self._drop(call.future.result(), newfid))

    async def _flush(self, tag: int, call: _Call, newfid: int | None) -> None:
        await self.call(codec.Tflush(tag), codec.Rflush)
        self._calls.pop(tag, None)
        await self._drop(call.late, newfid)

    async def _drop(self, reply: Message | None, newfid: int | None) -> None:
        """Takes back the fid of a request that nobody waits for any more."""
        if newfid is not None and reply is not None and not isinstance(reply, codec.Rlerror):
            with suppress(OSError):  # a walk that stopped on its way has made no fid
                await self.call(codec.Tclunk(newfid), codec.Rclunk)
        if newfid is not None:
            self._fids.give(newfid)

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs work that nobody waits for; it lives as long as the session, and its OSErrors are nobody's."""

        async def run() -> None:
            with suppress(OSError, Xen9pError):
                await work

        task = self._loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def new_fid(self) -> int:
        """A fid that is not in use."""
        return self._fids.take()

    # One method a message.

    async def version(self, version: bytes = codec.VERSION) -> int:
        """Agrees on 9P2000.L and returns the msize in bytes; forgets every fid."""
        reply = await self.call(codec.Tversion(self.msize, version), codec.Rversion)
        self.msize = requests.check_version(reply, self.msize)
        self._fids.forget()
        return self.msize

    async def attach(self, uname: bytes = b"", aname: bytes = b"", n_uname: int = 0, afid: int = codec.NOFID) -> int:
        """The fid of a tree's root, for the user with uid n_uname."""
        fid = self.new_fid()
        await self.call(codec.Tattach(fid, afid, uname, aname, n_uname), codec.Rattach, fid)
        return fid

    async def auth(self, uname: bytes = b"", aname: bytes = b"", n_uname: int = 0) -> int:
        """The fid of an authentication exchange."""
        afid = self.new_fid()
        await self.call(codec.Tauth(afid, uname, aname, n_uname), codec.Rauth, afid)
        return afid

    async def enter(self, aname: bytes = b"", n_uname: int = 0, key: Key | None = None) -> int:
        """attach(), with proof of a key if there is one.

        Raises:
            AuthError: the server wants a key, refuses this one, or wants none.
        """
        with explained(key):
            if key is None:
                return await self.attach(aname=aname, n_uname=n_uname)
            uname = key.name.encode()
            with asking(key):
                afid = await self.auth(uname, aname, n_uname)
            try:
                response = respond(key, await self.read(afid, 0, CHALLENGE_SIZE), aname, n_uname)
                await self.write(afid, 0, response)
                return await self.attach(uname, aname, n_uname, afid)
            finally:
                self.forget(afid)

    async def walk(self, fid: int, *names: bytes) -> int:
        """A new fid for what lies at names beneath fid; without names, a second fid for the same file."""
        return (await self.walk_qids(fid, *names))[0]

    async def walk_qids(self, fid: int, *names: bytes) -> tuple[int, tuple[Qid, ...]]:
        """As walk(), with the qid of each step."""
        newfid = self.new_fid()
        qids: tuple[Qid, ...] = ()
        for i, step in enumerate(requests.walk_steps(names)):
            if i == 0:
                got = (await self.call(codec.Twalk(fid, newfid, step), codec.Rwalk, newfid)).wqids
                try:
                    requests.check_walk(step, got)
                except BaseException:
                    self._fids.give(newfid)
                    raise
            else:
                try:
                    got = (await self.call(codec.Twalk(newfid, newfid, step), codec.Rwalk)).wqids
                    requests.check_walk(step, got)
                except BaseException:
                    self.forget(newfid)
                    raise
            qids += got
        return newfid, qids

    async def lopen(self, fid: int, flags: int = os.O_RDONLY) -> int:
        """Opens fid with the flags of open(2); returns the iounit in bytes, 0 for as much as fits."""
        return (await self.call(codec.Tlopen(fid, flags), codec.Rlopen)).iounit

    async def lcreate(self, fid: int, name: bytes, flags: int, mode: int = 0o644, gid: int = 0) -> int:
        """Creates name in the directory fid, which becomes the open file; returns the iounit in bytes."""
        return (await self.call(codec.Tlcreate(fid, name, flags, mode, gid), codec.Rlcreate)).iounit

    async def read(self, fid: int, offset: int, count: int) -> bytes:
        """One Tread: at most count bytes and at most what a message holds; b"" at the end."""
        count = min(count, self.msize - codec.READ_OVERHEAD)
        reply = await self.call(codec.Tread(fid, offset, count), codec.Rread)
        return requests.check_read(reply.data, count, "Rread")

    async def write(self, fid: int, offset: int, data: bytes) -> int:
        """One Twrite: as much of data as a message holds; returns how many bytes were written."""
        data = data[: self.msize - codec.WRITE_OVERHEAD]
        return requests.check_written(await self.call(codec.Twrite(fid, offset, data), codec.Rwrite), len(data))

    async def readdir(self, fid: int, offset: int = 0, count: int | None = None) -> list[Dirent]:
        """One Treaddir: entries from offset on, at most count bytes of them; [] at the end."""
        most = self.msize - codec.READ_OVERHEAD
        count = most if count is None else min(count, most)
        return requests.check_dirents(await self.call(codec.Treaddir(fid, offset, count), codec.Rreaddir), count)

    async def clunk(self, fid: int) -> None:
        """Gives the fid back; it is free even if the server reports an error."""
        try:
            await self.call(codec.Tclunk(fid), codec.Rclunk)
        except OSError:
            self._fids.give(fid)
            raise
        self._fids.give(fid)

    def forget(self, fid: int) -> None:
        """Clunks a fid without waiting."""
        if self._error is None:
            self.background(self.clunk(fid))

    async def remove(self, fid: int) -> None:
        """Removes the file and clunks the fid, also if the removal fails."""
        try:
            await self.call(codec.Tremove(fid), codec.Rremove)
        finally:
            self._fids.give(fid)

    async def getattr(self, fid: int, mask: int = codec.GETATTR_BASIC) -> codec.Rgetattr:
        """The attributes in mask (GETATTR_*)."""
        return await self.call(codec.Tgetattr(fid, mask), codec.Rgetattr)

    async def setattr(
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
        await self.call(msg, codec.Rsetattr)

    async def statfs(self, fid: int) -> codec.Rstatfs:
        """The numbers of statfs(2)."""
        return await self.call(codec.Tstatfs(fid), codec.Rstatfs)

    async def fsync(self, fid: int, *, datasync: bool = False) -> None:
        """Returns when the file's data is on the disk of the server."""
        await self.call(codec.Tfsync(fid, int(datasync)), codec.Rfsync)

    async def mkdir(self, dfid: int, name: bytes, mode: int = 0o755, gid: int = 0) -> Qid:
        """Makes a directory."""
        return (await self.call(codec.Tmkdir(dfid, name, mode, gid), codec.Rmkdir)).qid

    async def symlink(self, dfid: int, name: bytes, target: bytes, gid: int = 0) -> Qid:
        """Makes a symbolic link name -> target."""
        return (await self.call(codec.Tsymlink(dfid, name, target, gid), codec.Rsymlink)).qid

    async def readlink(self, fid: int) -> bytes:
        """A symbolic link's target."""
        return (await self.call(codec.Treadlink(fid), codec.Rreadlink)).target

    async def mknod(self, dfid: int, name: bytes, mode: int, *, major: int = 0, minor: int = 0, gid: int = 0) -> Qid:
        """Makes a file, device node, FIFO or socket; mode has the type bits."""
        return (await self.call(codec.Tmknod(dfid, name, mode, major, minor, gid), codec.Rmknod)).qid

    async def link(self, dfid: int, fid: int, name: bytes) -> None:
        """Makes a hard link name in dfid to the file of fid."""
        await self.call(codec.Tlink(dfid, fid, name), codec.Rlink)

    async def renameat(self, olddirfid: int, oldname: bytes, newdirfid: int, newname: bytes) -> None:
        """Moves oldname in one directory to newname in another."""
        await self.call(codec.Trenameat(olddirfid, oldname, newdirfid, newname), codec.Rrenameat)

    async def unlinkat(self, dirfid: int, name: bytes, flags: int = 0) -> None:
        """Removes name; a directory only with codec.AT_REMOVEDIR."""
        await self.call(codec.Tunlinkat(dirfid, name, flags), codec.Runlinkat)

    async def lock(
        self, fid: int, kind: int, start: int = 0, length: int = 0, *, proc_id: int = 0, client_id: bytes = b""
    ) -> int:
        """Takes or releases a POSIX lock without waiting; returns LOCK_SUCCESS, LOCK_BLOCKED, ..."""
        msg = codec.Tlock(fid, kind, 0, start, length, proc_id, client_id)
        return (await self.call(msg, codec.Rlock)).status

    async def getlock(
        self, fid: int, kind: int, start: int = 0, length: int = 0, *, proc_id: int = 0, client_id: bytes = b""
    ) -> codec.Rgetlock:
        """The lock that stands in the way, or kind LOCK_TYPE_UNLCK."""
        return await self.call(codec.Tgetlock(fid, kind, start, length, proc_id, client_id), codec.Rgetlock)

    # More than one message.

    async def read_exactly(self, fid: int, offset: int, count: int) -> bytes:
        """count bytes of an open file, fewer only at its end; in parts side by side where one message is too small."""
        most = self.msize - codec.READ_OVERHEAD
        if count <= most:
            data = await self.read(fid, offset, count)
            if len(data) in (0, count):
                return data
            return data + await self.read_exactly(fid, offset + len(data), count - len(data))
        size = requests.chunk(self.msize, 0, codec.READ_OVERHEAD)
        parts = await _together(
            [self.read_exactly(fid, offset + at, min(size, count - at)) for at in range(0, count, size)]
        )
        whole = b""
        for at, part in zip(range(0, count, size), parts, strict=True):
            whole += part
            if len(part) < min(size, count - at):
                break
        return whole

    async def write_all(self, fid: int, offset: int, data: bytes) -> None:
        """Writes all of data; in parts side by side where one message is too small."""
        size = requests.chunk(self.msize)

        async def one(at: int, part: bytes) -> None:
            while part:
                count = await self.write(fid, at, part)
                at, part = at + count, part[count:]

        if len(data) <= self.msize - codec.WRITE_OVERHEAD:
            await one(offset, data)
            return
        await _together([one(offset + at, data[at : at + size]) for at in range(0, len(data), size)])

    async def getxattr(self, fid: int, name: bytes = b"") -> bytes:
        """An extended attribute's value; without a name, the names of all, each ended by NUL."""
        newfid = self.new_fid()
        size = (await self.call(codec.Txattrwalk(fid, newfid, name), codec.Rxattrwalk, newfid)).size
        try:
            return await self.read_exactly(newfid, 0, size) if size else b""
        finally:
            self.forget(newfid)

    async def setxattr(self, fid: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Sets an extended attribute, flags as in setxattr(2); an empty value removes nothing."""
        newfid = await self.walk(fid)
        try:
            await self.call(codec.Txattrcreate(newfid, name, len(value), flags), codec.Rxattrcreate)
            done = 0
            while done < len(value):  # one after the other: a server may take no piece before what is in front of it
                done += await self.write(newfid, done, value[done:])
        except BaseException:
            self.forget(newfid)
            raise
        await self.clunk(newfid)  # this is what sets it, and says if that failed


async def _together(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of coroutines that run side by side; at the first error the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
