"""A client's lease session: what its server says may be kept until it says otherwise (decision 25).

What a client has asked while it had a session may be kept until the bucket of the file or name is revoked, or the
session ends. A bucket is counted from the lease key of a file (Rgetattr's gen) and a name. Ask for a mark() before the
request and for holds() after the reply: an answer that was under way when something was revoked is not to be kept.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
import zlib
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Final

from xen9p import codec
from xen9p.async_client import AsyncClient
from xen9p.errors import ProtocolError, Xen9pError

log = logging.getLogger("xen9p.leases")

RENEWALS: Final = 3  # in a term
GUARD: Final = 8  # a term's part of this is left unused: between a look at the clock and what follows time goes by

Revoked = Callable[[Collection[int] | None], Awaitable[None]]
"""Drops what is kept of some buckets, None for everything. When it returns nothing of it is used any more."""


class Leases:
    """A session on a client, which it gives what nothing else has to be asked for.

    Args:
        revoked: called in the client's loop; the server has others wait until it returns.
    """

    def __init__(self, client: AsyncClient, revoked: Revoked) -> None:
        self._client = client
        self._revoked = revoked
        self._until = 0.0
        self._buckets = 1
        self._term = 0.0
        self._count = 0  # of what makes answers that are under way worthless
        self._all = 0
        self._last: dict[int, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        client.unleased = self._unleased

    async def open(self) -> None:
        """Begins the session, and goes on with it until close() or the end of the connection. If it is lost, everything
        is dropped and nothing kept, until the server gives another.

        Raises:
            Xen9pError: the server gives no leases.
        """
        try:
            await self._begin()
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise Xen9pError(
                    "the server gives no leases",
                    "take another cache; on a host the policy's rule says for how long: leases = SECONDS",
                    error.errno or errno.EOPNOTSUPP,
                ) from None
            self._term = 1.0  # a session before this one has not given up what it had to: later
        self._tasks.append(asyncio.get_running_loop().create_task(self._live()))

    def stop(self) -> None:
        """Has nothing kept any more, before close()."""
        self._until = 0.0
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    async def close(self) -> None:
        """Ends the session, when nothing of what was kept is used any more: others need not wait for its end."""
        self.stop()
        self._client.unleased = None
        with suppress(OSError, Xen9pError, TimeoutError):
            async with asyncio.timeout(1):
                await self._client.call(codec.Tlease(codec.LEASE_CLOSE), codec.Rlease)

    # What may be kept.

    def remaining(self) -> float:
        """For how many seconds from now on what is kept may be used if nobody can be asked; 0 without a session."""
        return max(0.0, self._until - time.monotonic())

    def mark(self) -> int:
        """A moment before a request, for holds()."""
        return self._count

    def holds(self, mark: int, *buckets: int) -> bool:
        """Whether what was asked after a mark may be kept: it is leased, and nothing of it has been revoked since."""
        return (
            self._all <= mark and all(self._last.get(b, 0) <= mark for b in buckets) and time.monotonic() < self._until
        )

    def touch(self, bucket: int) -> None:
        """This client has changed something itself: what was asked about it before is old."""
        self._forget((bucket,))

    def file(self, key: int) -> int:
        """The bucket of a file with that lease key (Rgetattr's gen)."""
        return key % self._buckets

    def name(self, key: int, name: bytes) -> int:
        """The bucket of a name in the directory with that lease key."""
        return zlib.crc32(name, key & 0xFFFFFFFF) % self._buckets

    # The session.

    async def _begin(self) -> None:
        sent = time.monotonic()
        reply = await self._client.call(codec.Tlease(codec.LEASE_OPEN), codec.Rlease)
        if not reply.ms or not reply.buckets:
            raise ProtocolError(f"Rlease says {reply.ms} ms and {reply.buckets} buckets")
        self._count += 1
        self._all = self._count
        self._last.clear()
        self._buckets, self._term = reply.buckets, reply.ms / 1000
        self._granted(sent, reply.ms)

    def _granted(self, sent: float, ms: int) -> None:
        """The server counts from when it got the message; that was after it was sent."""
        self._until = max(self._until, sent + ms / 1000 - self._term / GUARD)

    async def _live(self) -> None:
        """One session after the other."""
        while True:
            if self.remaining():
                await self._session()
                self._until = 0.0
                self._forget(None)
                log.warning("the leases are lost: nothing is kept until there are others")
                await self._revoked(None)
            await asyncio.sleep(self._term)
            with suppress(OSError):
                await self._begin()

    async def _session(self) -> None:
        """Until it is lost."""
        renewing = asyncio.create_task(self._renew())
        listening = asyncio.create_task(self._listen())
        try:
            await asyncio.wait((renewing, listening), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (renewing, listening):
                task.cancel()
            for ended in await asyncio.gather(renewing, listening, return_exceptions=True):
                if isinstance(ended, Exception):
                    log.debug("leases: %r", ended)

    async def _renew(self) -> None:
        while self.remaining():
            await asyncio.sleep(self._term / RENEWALS)
            sent = time.monotonic()
            if sent >= self._until:
                return  # this process was stopped: the session may be over
            async with asyncio.timeout(self._term):
                reply = await self._client.call(codec.Tlease(codec.LEASE_RENEW), codec.Rlease)
            self._granted(sent, reply.ms)

    async def _listen(self) -> None:
        batch = 0
        while True:
            reply = await self._client.call(codec.Trevoke(batch), codec.Rrevoke)
            buckets = None if reply.everything else codec.decode_buckets(reply.buckets)
            await self._revoked(buckets)
            batch = reply.batch

    # What makes answers worthless; called when the message comes in, before those behind it are looked at.

    def _unleased(self, reply: codec.Message) -> None:
        if isinstance(reply, codec.Rrevoke):
            self._forget(None if reply.everything else codec.decode_buckets(reply.buckets))
        else:  # whichever question it answers
            self._forget(None)

    def _forget(self, buckets: Collection[int] | None) -> None:
        self._count += 1
        if buckets is None:
            self._all = self._count
            self._last.clear()
        else:
            self._last.update(dict.fromkeys(buckets, self._count))
