"""A single-threaded event loop: descriptors, timers, signals. Nothing in it knows what it serves."""

from __future__ import annotations

import heapq
import itertools
import selectors
import signal
import socket
import time
from collections.abc import Callable
from typing import Protocol

Callback = Callable[[], None]


class HasFileno(Protocol):
    """Anything that can be selected on."""

    def fileno(self) -> int: ...


class Loop:
    """Calls back when a descriptor is ready, a time has come, or a signal was caught."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callback]] = []
        self._cancelled: set[int] = set()
        self._ids = itertools.count(1)
        self._signals: dict[int, Callback] = {}
        self._running = False
        self._wake: socket.socket | None = None
        self._wake_write: socket.socket | None = None

    def add(self, file: HasFileno | int, callback: Callback, *, write: bool = False) -> None:
        """Calls back whenever the descriptor can be read, or also when it can be written."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
        self._selector.register(file, events, callback)

    def modify(self, file: HasFileno | int, callback: Callback, *, write: bool) -> None:
        """As add(), for a descriptor that is there already."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
        self._selector.modify(file, events, callback)

    def remove(self, file: HasFileno | int) -> None:
        """Forgets the descriptor; call it before closing."""
        self._selector.unregister(file)

    def after(self, seconds: float, callback: Callback) -> int:
        """Calls back once, later; returns a number for cancel()."""
        number = next(self._ids)
        heapq.heappush(self._timers, (time.monotonic() + seconds, number, callback))
        return number

    def cancel(self, number: int) -> None:
        """Forgets a timer that has not gone off."""
        if any(n == number for _, n, _ in self._timers):
            self._cancelled.add(number)

    def on_signal(self, number: int, callback: Callback) -> None:
        """Calls back out of the loop, not out of the signal handler."""
        if self._wake is None:
            self._wake, self._wake_write = socket.socketpair()
            self._wake.setblocking(False)
            self._wake_write.setblocking(False)
            signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
            self.add(self._wake, self._caught)
        self._signals[number] = callback
        signal.signal(number, lambda *_: None)

    def run(self) -> None:
        """Runs until stop()."""
        self._running = True
        while self._running:
            self.step()

    def stop(self) -> None:
        """Makes run() return after the callbacks of this round."""
        self._running = False

    def step(self) -> None:
        """Waits for what comes first, and handles all that is there by then."""
        timeout = None
        if self._timers:
            timeout = max(0.0, self._timers[0][0] - time.monotonic())
        for key, _ in self._selector.select(timeout):
            # An earlier callback of this round may have removed it.
            if key.fd in self._selector.get_map():
                key.data()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, number, callback = heapq.heappop(self._timers)
            if number in self._cancelled:
                self._cancelled.discard(number)
            else:
                callback()

    def _caught(self) -> None:
        assert self._wake is not None
        for number in set(self._wake.recv(4096)):
            if number in self._signals:
                self._signals[number]()

    def after_fork(self) -> None:
        """In a child: closes what the loop owns and gives signals their defaults back."""
        if self._wake is not None and self._wake_write is not None:
            signal.set_wakeup_fd(-1)
            self._wake.close()
            self._wake_write.close()
        for number in self._signals:
            signal.signal(number, signal.SIG_DFL)
        self._selector.close()
