"""The life of one device as a pure state machine: events in, actions out, nothing done here.

The backend's side of the Xen 9pfs handshake. Numbers are those of XenbusState (xen/io/xenbus.h)::

    WAITING   backend 2, until the frontend has published its rings (3)
    STARTING  a worker is being started on the rings (backend 2, or still 4 after a worker's crash)
    CONNECTED backend 4, a worker serves
    STOPPING  the worker drains; what follows depends on the frontend and on what we want
    CLOSED    backend 6 and no worker; a frontend that is alive gets a new device
    FAILED    backend 6 for good: the guest broke the protocol or no worker stays alive
    GONE      removed
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import Final

BACKOFF: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds between a crash and the next worker
CRASH_WINDOW: Final = 60.0
MAX_CRASHES: Final = 5
CLOSE_TIMEOUT: Final = 5.0  # seconds a frontend has to close
STOP_TIMEOUT: Final = 5.0  # seconds a worker has to drain
REVIVE_DELAY: Final = 2.0  # seconds between a frontend's close and a new device for it


class XenbusState(enum.IntEnum):
    """The states of a xenbus device, as both sides write them."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8

    @classmethod
    def named(cls, number: int | None) -> str:
        """'Connected' for 4, 'none' where there is no node."""
        return "none" if number is None else cls(number).name.replace("_", " ").title().replace(" ", "")


S = XenbusState


class Phase(enum.Enum):
    """Where a device is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    CONNECTED = "connected"
    STOPPING = "stopping"
    CLOSED = "closed"
    FAILED = "failed"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Ring:
    """One ring as the frontend published it: grant reference and event channel, both u32."""

    ref: int
    port: int


class Action:
    """Something for the supervisor to do."""


@dataclass(frozen=True, slots=True)
class Publish(Action):
    """Write the backend's state."""

    state: XenbusState


@dataclass(frozen=True, slots=True)
class ReadRings(Action):
    """Read and check the frontend's rings, and answer with rings() or violation()."""


@dataclass(frozen=True, slots=True)
class Spawn(Action):
    """Start a worker on these rings."""

    rings: tuple[Ring, ...]


@dataclass(frozen=True, slots=True)
class Stop(Action):
    """Ask the worker to drain and end."""


@dataclass(frozen=True, slots=True)
class Kill(Action):
    """End the worker at once."""


@dataclass(frozen=True, slots=True)
class Remove(Action):
    """Remove what is in XenStore, and then forget the device."""


@dataclass(frozen=True, slots=True)
class Recreate(Action):
    """Remove both directories and make new ones; the device waits for its frontend again.

    They need another number: a guest that looks after both happened sees a directory that is still there,
    and does not probe it again.
    """


@dataclass(frozen=True, slots=True)
class Timer(Action):
    """Call timer(epoch) after so many seconds; an epoch that has passed is ignored."""

    seconds: float
    epoch: int


@dataclass(frozen=True, slots=True)
class Log(Action):
    """Say one line about the device. level is one of info, warning, error."""

    level: str
    text: str


Actions = list[Action]


class Device:
    """One device's state. Each method takes one event and returns what is to be done, in order.

    Args:
        phase: WAITING for a new device; others when one is taken over from an earlier supervisor.
        published: the backend's state in XenStore.
    """

    def __init__(
        self, phase: Phase = Phase.WAITING, published: XenbusState = S.INIT_WAIT, rings: tuple[Ring, ...] = ()
    ) -> None:
        self.phase = phase
        self.published = published
        self.frontend: int | None = S.INITIALISING
        self.reason = ""  # why it failed
        self.violations = 0
        self.restarts = 0  # of the worker
        self._rings = rings
        self._worker = phase is Phase.CONNECTED
        self._detaching = False
        self._domain_gone = False
        self._failing = False
        self._spawn_pending = False
        self._crashes: deque[float] = deque(maxlen=MAX_CRASHES + 1)
        self._epoch = 0

    # Events.

    def frontend_state(self, state: int | None) -> Actions:
        """The frontend's state node changed, or its directory is gone (None)."""
        self.frontend = state
        if self.phase is Phase.GONE or self._domain_gone:
            return []
        if self._detaching:
            return self._detach_progress()
        if self.phase is Phase.FAILED:
            return []
        if state is not None and state not in list(S):
            return self.violation(f"frontend state {state} does not exist")
        if self.phase is Phase.WAITING:
            if state in (S.INITIALISED, S.CONNECTED):
                return [ReadRings()]
            return self._close() if self._wants_close(state) else []
        if self.phase in (Phase.STARTING, Phase.CONNECTED):
            # 1 is a frontend that began anew without closing: kexec, or a driver bound again.
            return self._close() if self._wants_close(state) or state == S.INITIALISING else []
        if self.phase is Phase.CLOSED:
            return self._closed_progress()
        return []

    def rings(self, rings: tuple[Ring, ...]) -> Actions:
        """The frontend's rings were read and are in order."""
        if self.phase is not Phase.WAITING:
            return []
        self._rings = rings
        return self._start()

    def violation(self, reason: str) -> Actions:
        """The guest broke the rules; the device is closed for good."""
        if self.phase in (Phase.GONE, Phase.FAILED) or self._failing:
            return []
        self.violations += 1
        return [Log("warning", f"closed: {reason}"), *self._fail(reason)]

    def worker_ready(self) -> Actions:
        """The worker has mapped the rings and serves."""
        if self.phase is not Phase.STARTING:
            return []
        self.phase = Phase.CONNECTED
        return self._publish(S.CONNECTED)

    def worker_failed(self, reason: str) -> Actions:
        """The worker could not use what the guest gave, or ended because of what the guest did."""
        self._worker = False
        if self.phase is Phase.STOPPING:
            return self._stopped()
        return self.violation(reason)

    def frontend_gone(self) -> Actions:
        """The worker ended because a frontend in user space did, without a word; its state in XenStore is old."""
        self._worker = False
        if self.phase is Phase.STOPPING:
            return self._stopped()
        if self.phase in (Phase.STARTING, Phase.CONNECTED):
            return [Log("info", "frontend ended without closing"), *self._stop()]
        return []

    def worker_gone(self, now: float, reason: str = "died") -> Actions:
        """The worker is no more: it stopped as asked, or it crashed. now is in monotonic seconds."""
        self._worker = False
        if self.phase is Phase.STOPPING:
            return self._stopped()
        if self.phase not in (Phase.STARTING, Phase.CONNECTED):
            return []
        self._crashes.append(now)
        recent = sum(1 for t in self._crashes if now - t < CRASH_WINDOW)
        if recent > MAX_CRASHES:
            text = f"worker {reason} {recent} times within {CRASH_WINDOW:g} s"
            return [Log("error", f"closed: {text}"), *self._fail(text)]
        delay = BACKOFF[min(recent, len(BACKOFF)) - 1]
        self.phase = Phase.STARTING
        self._spawn_pending = True
        self.restarts += 1
        return [Log("error", f"worker {reason}; a new one in {delay:g} s"), self._timer(delay)]

    def adopted(self) -> None:
        """A worker of an earlier supervisor serves; it will say when it is ready."""
        self._worker = True

    def orphaned(self) -> Actions:
        """Both sides are connected, but the worker died while no supervisor was there."""
        return self._start()

    def detach(self) -> Actions:
        """Somebody wants the device removed."""
        if self.phase is Phase.GONE or self._detaching:
            return []
        self._detaching = True
        self._spawn_pending = False
        if self.phase is Phase.STOPPING:
            return []
        actions = [] if self.published == S.CLOSED else self._publish(S.CLOSING)
        return [*actions, self._timer(CLOSE_TIMEOUT), *self._detach_progress()]

    def domain_gone(self) -> Actions:
        """The guest is no more: nobody to talk to, only things to clear away."""
        if self.phase is Phase.GONE or self._domain_gone:
            return []
        self._domain_gone = True
        self._spawn_pending = False
        if self.phase is Phase.STOPPING:
            return []
        return self._stop()

    def timer(self, epoch: int) -> Actions:
        """A Timer went off."""
        if epoch != self._epoch or self.phase is Phase.GONE:
            return []
        if self.phase is Phase.STOPPING:
            return [Log("error", f"worker did not stop within {STOP_TIMEOUT:g} s; killed"), Kill()]
        if self._detaching:
            return [Log("warning", "frontend did not close; removed without it"), *self._stop()]
        if self.phase is Phase.STARTING and self._spawn_pending:
            return self._start()
        if self.phase is Phase.CLOSED and self.frontend in (S.CLOSED, None):
            return self._recreate()
        return []

    # What follows from them.

    @staticmethod
    def _wants_close(state: int | None) -> bool:
        return state in (None, S.CLOSING, S.CLOSED)

    def _timer(self, seconds: float) -> Timer:
        self._epoch += 1
        return Timer(seconds, self._epoch)

    def _publish(self, state: XenbusState) -> Actions:
        if self.published == state:
            return []
        self.published = state
        return [Publish(state)]

    def _start(self) -> Actions:
        self.phase = Phase.STARTING
        self._spawn_pending = False
        self._worker = True
        return [Spawn(self._rings)]

    def _close(self) -> Actions:
        return self._stop()

    def _stop(self) -> Actions:
        """Stops the worker if there is one, and goes on in _stopped()."""
        self.phase = Phase.STOPPING
        self._spawn_pending = False
        if self._worker:
            return [Stop(), self._timer(STOP_TIMEOUT)]
        return self._stopped()

    def _stopped(self) -> Actions:
        self._worker = False
        self._epoch += 1
        if self._domain_gone:
            self.phase = Phase.GONE
            return [Remove()]
        if self._detaching:
            self.phase = Phase.GONE
            return [*self._publish(S.CLOSED), Remove()]
        if self._failing:
            self.phase = Phase.FAILED
            return [*self._publish(S.CLOSING), *self._publish(S.CLOSED)]
        self.phase = Phase.CLOSED
        return [*self._publish(S.CLOSING), *self._closed_progress()]

    def _closed_progress(self) -> Actions:
        if self.frontend == S.INITIALISING:
            # It drives the handshake itself (kexec, or no Linux), so it is looking at this very directory.
            self._renew()
            return self._publish(S.INIT_WAIT)
        if self.frontend in (S.CLOSED, None):
            return [*self._publish(S.CLOSED), self._timer(REVIVE_DELAY)]
        return []

    def _recreate(self) -> Actions:
        self._renew()
        self.published = S.INIT_WAIT
        self.frontend = S.INITIALISING
        return [Recreate()]

    def _renew(self) -> None:
        self.phase = Phase.WAITING
        self._rings = ()
        self._crashes.clear()
        self._epoch += 1

    def _fail(self, reason: str) -> Actions:
        self._failing = True
        self.reason = reason
        return self._stop()

    def _detach_progress(self) -> Actions:
        """While detaching: once the frontend has closed, or never was there, the rest can go."""
        if self.phase is Phase.STOPPING:
            return []
        if self.frontend in (S.INITIALISED, S.CONNECTED, S.CLOSING):
            return []
        return self._stop()
