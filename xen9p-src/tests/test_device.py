"""The life of a device: what follows from each event, and that no order of events breaks it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xen9p.device import (
    BACKOFF,
    MAX_CRASHES,
    Action,
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

S = XenbusState
RINGS = (Ring(8, 12), Ring(521, 13))


def doing(actions: list[Action]) -> list[Action]:
    """Without what is only said."""
    return [a for a in actions if not isinstance(a, Log)]


def serving() -> Device:
    device = Device()
    assert device.frontend_state(S.INITIALISED) == [ReadRings()]
    assert device.rings(RINGS) == [Spawn(RINGS)]
    assert device.worker_ready() == [Publish(S.CONNECTED)]
    assert device.frontend_state(S.CONNECTED) == []
    return device


def epoch(actions: list[Action]) -> int:
    return next(a.epoch for a in actions if isinstance(a, Timer))


def test_a_frontend_connects() -> None:
    assert serving().phase is Phase.CONNECTED


def test_a_frontend_closes_and_gets_a_new_device() -> None:
    device = serving()
    assert doing(device.frontend_state(S.CLOSING))[0] == Stop()
    # Unmapped before we say so.
    assert device.worker_gone(0.0) == [Publish(S.CLOSING)]
    actions = device.frontend_state(S.CLOSED)
    assert actions[0] == Publish(S.CLOSED)
    assert device.timer(epoch(actions)) == [Recreate()]
    assert device.frontend_state(S.INITIALISED) == [ReadRings()]


def test_a_frontend_that_begins_anew() -> None:
    device = serving()
    assert device.frontend_state(S.INITIALISING)[0] == Stop()
    assert device.worker_gone(0.0) == [Publish(S.CLOSING), Publish(S.INIT_WAIT)]
    assert device.phase is Phase.WAITING
    assert device.frontend_state(S.INITIALISED) == [ReadRings()]


def test_a_frontend_in_user_space_that_died_leaves_a_device_for_the_next() -> None:
    device = serving()
    assert doing(device.frontend_gone()) == [Publish(S.CLOSING)]
    assert device.frontend_state(S.CONNECTED) == []  # what it left in XenStore
    assert device.frontend_state(S.INITIALISING) == [Publish(S.INIT_WAIT)]
    assert device.phase is Phase.WAITING
    assert device.frontend_state(S.INITIALISED) == [ReadRings()]


def test_a_frontend_in_user_space_that_died_while_it_closed() -> None:
    device = serving()
    device.frontend_state(S.CLOSING)
    assert device.frontend_gone() == [Publish(S.CLOSING)]
    assert device.phase is Phase.CLOSED
    assert device.frontend_gone() == []


def test_a_frontend_that_jumps_to_closed() -> None:
    device = serving()
    device.frontend_state(S.CLOSED)
    assert device.worker_gone(0.0)[:2] == [Publish(S.CLOSING), Publish(S.CLOSED)]


@pytest.mark.parametrize("break_it", [lambda d: d.violation("bad ring"), lambda d: d.frontend_state(77)])
def test_a_violation_closes_for_good_and_is_said_once(break_it: Callable[[Device], list[Action]]) -> None:
    device = serving()
    actions = break_it(device)
    assert isinstance(actions[0], Log)
    assert actions[1] == Stop()
    assert device.violation("again") == []
    assert device.worker_gone(0.0) == [Publish(S.CLOSING), Publish(S.CLOSED)]
    assert device.phase is Phase.FAILED
    for state in (1, 3, 5, 6, 1, 99, None):
        assert device.frontend_state(state) == []
    assert device.reason


def test_a_worker_that_ends_because_of_the_guest() -> None:
    device = serving()
    actions = device.worker_failed("message size 3 is below 7")
    assert actions == [
        Log("warning", "closed: message size 3 is below 7"),
        Publish(S.CLOSING),
        Publish(S.CLOSED),
    ]


def test_a_crashed_worker_is_replaced_on_the_same_rings_until_it_is_too_much() -> None:
    device = serving()
    for n in range(MAX_CRASHES):
        actions = device.worker_gone(float(n))
        timer = doing(actions)[0]
        assert isinstance(timer, Timer)
        assert timer.seconds == BACKOFF[n]
        assert device.timer(timer.epoch) == [Spawn(RINGS)]
        # The frontend never sees it: our state stays 4.
        assert device.worker_ready() == []
    assert doing(device.worker_gone(10.0)) == [Publish(S.CLOSING), Publish(S.CLOSED)]
    assert device.phase is Phase.FAILED


def test_crashes_long_ago_do_not_count() -> None:
    device = serving()
    for n in range(4 * MAX_CRASHES):
        assert device.timer(epoch(device.worker_gone(100.0 * n))) == [Spawn(RINGS)]
        device.worker_ready()


def test_detach_waits_for_the_frontend_then_for_the_worker() -> None:
    device = serving()
    assert isinstance(device.detach()[1], Timer)
    assert device.published == S.CLOSING
    assert device.detach() == []
    assert device.frontend_state(S.CLOSED)[0] == Stop()
    assert device.worker_gone(0.0) == [Publish(S.CLOSED), Remove()]
    assert device.phase is Phase.GONE


def test_detach_does_not_wait_for_ever() -> None:
    device = serving()
    actions = device.timer(epoch(device.detach()))
    assert doing(actions)[0] == Stop()
    assert doing(device.timer(epoch(actions))) == [Kill()]
    assert device.worker_gone(0.0)[-1] == Remove()


def test_detach_of_what_has_no_frontend_is_at_once() -> None:
    assert Device().detach()[-1] == Remove()


def test_detach_of_what_failed() -> None:
    device = serving()
    device.worker_failed("x")
    device.detach()
    assert device.frontend_state(S.CLOSED)[-1] == Remove()


def test_a_guest_that_dies_takes_no_more_writing() -> None:
    device = serving()
    assert device.domain_gone()[0] == Stop()
    assert device.worker_gone(0.0) == [Remove()]
    assert Device().domain_gone() == [Remove()]


def test_a_stale_timer_does_nothing() -> None:
    device = serving()
    old = epoch(device.worker_gone(0.0))
    device.timer(old)
    device.worker_ready()
    assert device.timer(old) == []


def test_taking_over() -> None:
    device = Device(Phase.STARTING, S.CONNECTED, RINGS)
    device.adopted()
    assert device.worker_ready() == []
    device = Device(Phase.STARTING, S.CONNECTED, RINGS)
    assert device.orphaned() == [Spawn(RINGS)]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("frontend_state"), st.sampled_from([None, -1, 0, 1, 2, 3, 4, 5, 6, 7, 99])),
        st.sampled_from(["detach", "domain_gone", "crash", "failed", "hangup", "ready", "timer"]).map(
            lambda e: (e, None)
        ),
    ),
    max_size=60,
)


def how_it_ends(device: Device, event: str, now: float) -> list[Action]:
    """Why a worker may be no more."""
    match event:
        case "failed":
            return device.worker_failed("bad")
        case "hangup":
            return device.frontend_gone()
    return device.worker_gone(now)


@given(EVENTS)
@settings(max_examples=400)
def test_no_order_of_events_breaks_it(events: list[tuple[str, int | None]]) -> None:
    """At most one worker, no writing after the domain has gone, removed once, and always removable."""
    device = Device()
    workers = 0
    removed = 0
    timers: list[int] = []
    clock = 0.0
    dead = False

    def do(actions: list[Action]) -> None:
        nonlocal workers, removed
        for action in actions:
            match action:
                case Spawn(rings):
                    workers += 1
                    assert workers == 1
                    assert rings == RINGS
                case Stop() | Kill():
                    assert workers == 1
                case ReadRings():
                    do(device.rings(RINGS))
                case Timer(_, number):
                    timers.append(number)
                case Publish() | Recreate():
                    assert not dead
                    assert workers == 0 or isinstance(action, Publish)
                case Remove():
                    removed += 1
                    assert workers == 0

    def end_worker(event: str) -> None:
        nonlocal workers
        if workers:
            workers = 0
            do(how_it_ends(device, event, clock))

    for event, argument in events:
        clock += 1.0
        if event == "frontend_state":
            do(device.frontend_state(argument))
        elif event in ("crash", "failed", "hangup"):
            end_worker(event)
        elif event == "ready" and workers:
            do(device.worker_ready())
        elif event == "timer" and timers:
            do(device.timer(timers.pop()))
        elif event == "detach":
            do(device.detach())
        elif event == "domain_gone":
            dead = True
            do(device.domain_gone())
    dead = True
    do(device.domain_gone())
    end_worker("crash")
    assert removed == 1
    assert device.phase is Phase.GONE
