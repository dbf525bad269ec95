"""Fuzzes the life of a device: whatever a guest writes into XenStore and in whatever order, and however workers end.

The state machine and the reading of the frontend's directory are the real ones. What they ask for is done by a host
that is nothing but counters: at most one worker, only rings that a guest can have, an end in any case.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import cast

from fuzz.target import FindingError
from xen9p import xenbus
from xen9p.device import (
    Action,
    Actions,
    Device,
    Kill,
    Log,
    Phase,
    Publish,
    ReadRings,
    Recreate,
    Remove,
    Ring,
    Spawn,
    Stop,
    Timer,
    XenbusState,
)
from xen9p.xenstore import XenStore

MOST_EVENTS = 80
MOST_TO_END = 30  # events that the host itself causes, from the end of the guest to that of the device
MOST_ACTIONS = 8  # that one event may lead to

GOOD: Mapping[str, str] = {
    "state": "3",
    "version": "1",
    "num-rings": "2",
    "ring-ref0": "8",
    "event-channel-0": "12",
    "ring-ref1": "521",
    "event-channel-1": "13",
}
# fmt: off
VALUES = (
    "", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "12", "77", "-1", "4294967295", "4294967296", "1e3", " 1",
    "1 ", "0x1", "٣", "1\n", "99999999999999999999", "x" * 2048, "\0", "None",
)
# fmt: on


class Nodes:
    """The frontend's directory as a guest fills it: each read may find something else."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.content: dict[str, str] = dict(GOOD)

    def read(self, path: str) -> str | None:
        """What xenbus asks XenStore for."""
        if self.chance.random() < 0.05:
            self.scribble()
        return self.content.get(path.rpartition("/")[2])

    def scribble(self) -> None:
        """One write, or one removal."""
        key = self.chance.choice((*GOOD, "ring-ref2", "event-channel-3"))
        value = self.chance.choice((None, *VALUES, GOOD.get(key), GOOD.get(key)))
        if value is None:
            self.content.pop(key, None)
        else:
            self.content[key] = value


class Life:
    """One device from its making to its end, with a host that does what is asked."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.nodes = Nodes(chance)
        self.device = Device()
        self.worker = False
        self.ready = False
        self.domain = True
        self.removed = 0
        self.timers: list[int] = []
        self.allowed: set[tuple[Ring, ...]] = set()
        self.complaints = 0
        self.clock = 0.0
        self.history: list[str] = []

    def check(self, holds: bool, what: str) -> None:
        """Raises FindingError with the history unless it holds."""
        if not holds:
            raise FindingError(f"{what}, after {' '.join(self.history[-40:])}")

    def run(self) -> int:
        """Lives; the number of events."""
        for _ in range(self.chance.randrange(MOST_EVENTS)):
            self.event()
        self.end()
        return len(self.history)

    def event(self) -> None:
        """Something happens."""
        self.clock += self.chance.choice((0.0, 0.1, 1.0, 61.0))
        for _ in range(self.chance.choice((0, 0, 1, 1, 3))):
            self.nodes.scribble()
        kind = self.chance.choices(("state", "worker", "timer", "detach", "rings"), (60, 25, 20, 1, 3))[0]
        match kind:
            case "state":
                self.look()
            case "worker":
                self.worker_event()
            case "timer" if self.timers:
                self.do("timer", self.device.timer(self.chance.choice(self.timers)))
            case "detach":
                self.do("detach", self.device.detach())
            case "rings":
                self.read_rings()  # an answer that comes late

    def look(self) -> None:
        """The supervisor reads the frontend's state, honest more often than not."""
        if self.chance.random() < 0.6:
            self.nodes.content["state"] = self.chance.choice(("1", "3", "4", "5", "6"))
        state = xenbus.state(cast(XenStore, self.nodes), "/front")
        self.do(f"state={state}", self.device.frontend_state(state))

    def worker_event(self) -> None:
        """The worker is ready, or ends in one of its ways."""
        if not self.worker:
            return
        kind = self.chance.choice(("ready", "ready", "crash", "failed"))
        if kind == "ready":
            self.ready = True
            self.do("ready", self.device.worker_ready())
        else:
            self.end_worker(kind)

    def end_worker(self, kind: str) -> None:
        """The process is no more."""
        self.worker = self.ready = False
        failed = kind == "failed"
        self.do(kind, self.device.worker_failed("bad") if failed else self.device.worker_gone(self.clock))

    def read_rings(self) -> None:
        """The supervisor reads the rings and says what it has found."""
        try:
            rings = xenbus.parse_rings(self.nodes.read)
        except xenbus.ViolationError as error:
            self.check(len(error.message) < 200, f"a complaint of {len(error.message)} characters")
            self.do("violation", self.device.violation(error.message))
            return
        self.check(1 <= len(rings) <= xenbus.MAX_RINGS, f"{len(rings)} rings")
        for number in (n for ring in rings for n in (ring.ref, ring.port)):
            self.check(0 <= number < 1 << 32, f"a reference or port {number}")
        self.check(len({r.ref for r in rings}) == len({r.port for r in rings}) == len(rings), "rings share something")
        self.allowed.add(rings)
        self.do("rings", self.device.rings(rings))

    def do(self, event: str, actions: Actions) -> None:
        """Does what the state machine wants."""
        self.history.append(event)
        self.check(len(actions) <= MOST_ACTIONS, f"{len(actions)} actions for one event")
        for action in actions:
            self.act(action)

    def act(self, action: Action) -> None:
        """Does one thing, and checks that it may be."""
        self.check(not self.removed, f"{action} for a device that has been removed")
        match action:
            case Spawn(rings):
                self.check(not self.worker, "a second worker for the same rings")
                self.check(rings in self.allowed, f"a worker on rings that were never checked: {rings}")
                self.check(self.domain, "a worker for a guest that has gone")
                self.worker = True
            case Stop() | Kill():
                self.check(self.worker, f"{action} without a worker")
                if isinstance(action, Kill):
                    self.end_worker("killed")
            case Publish(state):
                self.check(self.domain, "a write for a guest that has gone")
                self.check(state != XenbusState.CONNECTED or self.ready, "connected, and no worker serves")
                self.check(state != XenbusState.CLOSED or not self.worker, "closed, with the rings still mapped")
            case Recreate():
                self.check(self.domain and not self.worker, "made anew while its worker lives")
                self.nodes.content = dict(GOOD) | {"state": "1"}
                self.complaints = 0
            case Remove():
                self.check(not self.worker, "removed while its worker lives")
                self.removed += 1
            case ReadRings():
                self.read_rings()
            case Timer(_, epoch):
                self.timers.append(epoch)
            case Log(level, _):
                self.complaints += level == "warning" and "closed:" in action.text
                self.check(self.complaints <= 1, "a second complaint about a device that is closed for good")

    def end(self) -> None:
        """The guest goes, or somebody detaches and the guest does not help: the device must end either way."""
        if self.chance.random() < 0.6:
            self.domain = False
            self.do("gone", self.device.domain_gone())
        else:
            self.do("detach", self.device.detach())
        stubborn = self.chance.random() < 0.5  # a worker that ends only when it is killed
        for _ in range(MOST_TO_END):
            if self.device.phase is Phase.GONE:
                break
            if self.worker and not stubborn and self.chance.random() < 0.5:
                self.end_worker("crash")
            elif self.timers:
                self.do("timer", self.device.timer(self.timers[-1]))
        self.check(self.device.phase is Phase.GONE, f"{self.device.phase} for ever")
        self.check(self.removed == 1, f"removed {self.removed} times")
        for state in (None, 1, 3, 6):
            self.do("late", self.device.frontend_state(state))


def fuzz(*, seed: int, lives: int) -> tuple[int, int]:
    """(lives, events) that have passed.

    Raises:
        FindingError: an invariant did not hold; the message has the events that led there.
    """
    events = 0
    for number in range(lives):
        events += Life(random.Random(f"{seed}/{number}")).run()
    return lives, events
