"""What a client needs of a transport, and what all of them share: whole messages, waiting or not."""

from __future__ import annotations

import errno
import os
import select
import time
from typing import Protocol


class Transport(Protocol):
    """Carries whole messages for one client. send() and recv() wait, post() and poll() never do.

    A client that has several requests under way must go on receiving while it sends: the server may be unable
    to take a request before it has got rid of a reply.
    """

    def send(self, data: bytes, /) -> None:
        """Sends one message; waits for room as long as the transport's timeout says."""

    def recv(self, timeout: float | None = None) -> bytes:
        """The next message. Seconds to wait; None for the transport's own timeout. TimeoutError if none came."""

    def post(self, data: bytes, /) -> bool:
        """Sends one message without waiting. False: there is no room now, nothing was sent; receive, then try again."""

    def poll(self) -> bytes | None:
        """The next message if it is here. None: fileno() becomes readable when that changes."""

    def flush(self) -> bool:
        """Passes on what post() has taken and not sent yet. False: some is left; when writable, call again."""

    def fileno(self) -> int:
        """The descriptor to wait at."""

    def close(self) -> None:
        """Ends the connection; twice is allowed."""


def wait_for(fd: int, events: int, deadline: float | None) -> None:
    """Waits until a descriptor is ready (select.POLLIN, POLLOUT), at most until a time of the monotonic clock.

    Raises:
        TimeoutError: the deadline has passed.
    """
    poller = select.poll()
    poller.register(fd, events)
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if poller.poll(None if left is None else left * 1000):
            return
        if left == 0.0:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
