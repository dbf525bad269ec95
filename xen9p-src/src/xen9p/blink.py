"""The supervisor's side of a snapshot: devices stand still together for a moment.

Whoever takes the snapshot asks for the moment and ends it. If it dies, its connection does, and the devices go on; if
the supervisor dies, theirs does; and after worker.STAND_STILL they go on in any case.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Final

from xen9p.control import Answer, refusal
from xen9p.errors import ControlError
from xen9p.loop import Loop
from xen9p.workers import Worker

log = logging.getLogger("xen9pd")

PATIENCE: Final = 1.5
"""Seconds that workers have to answer. Less than they stand still; more than they wait for what they do."""

Device = tuple[str, Path, Worker]
"""What it is called, the directory that it writes to, its worker."""


class Blink:
    """The one pause that there can be at a time."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._owner: Answer | None = None
        self._paths: tuple[Path, ...] = ()
        self._force = False
        self._devices: list[Device] = []
        self._left: dict[int, int | None] = {}  # by place among the devices; None: it has not answered
        self._held = True
        self._began = 0.0
        self._timer = 0

    def begin(self, paths: Iterable[str], devices: Iterable[Device], force: bool, answer: Answer) -> None:
        """Answers when all the devices that can write there stand still, or says why they do not.

        Raises:
            ControlError: another pause is under way, or a worker knows of none.
        """
        if self._owner is not None:
            raise ControlError("another snapshot is being taken at this moment", "try again")
        self._paths = tuple(Path(os.path.realpath(path)) for path in paths)
        mine = [device for device in devices if self._concerns(device[1])]
        if not force and (deaf := [name for name, _, worker in mine if not worker.pauses]):
            raise ControlError(
                f"the worker of {deaf[0]} is of an earlier version and cannot stand still",
                "attach it anew, or take the snapshot with --force",
            )
        self._owner, self._force, self._held = answer, force, True
        self._devices, self._left = [], {}
        self._began = time.monotonic()
        for device in mine:
            self._add(device)
        if None in self._left.values():
            self._timer = self._loop.after(PATIENCE, self._answer)
        else:
            self._answer()

    def joined(self, device: Device) -> None:
        """A worker has been started: it stands still from the beginning if the others do."""
        if self._owner is not None and self._concerns(device[1]) and device[2].pauses:
            self._add(device)

    def end(self, answer: Answer) -> None:
        """Has the devices go on, and answers whether all of them stood still until now. ControlError, nobody does."""
        if self._owner != answer or None in self._left.values():
            raise ControlError("there is no pause to end", "ask for one by the same connection")
        missing = len(self._devices)
        held = self._held
        pause = (time.monotonic() - self._began) * 1000

        def told(still: bool) -> None:
            nonlocal missing, held
            missing, held = missing - 1, held and still
            if missing == 0:
                answer({"ok": True, "held": held, "ms": pause})

        devices = self._forget()
        for _, _, worker in devices:
            worker.resume(told)
        if not devices:
            answer({"ok": True, "held": held, "ms": pause})

    def hung_up(self, answer: Answer) -> None:
        """Whoever asked for the pause has gone."""
        if self._owner == answer:
            log.warning("a snapshot was given up: its devices go on")
            self._give_up()

    def _concerns(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return any(real == p or real.is_relative_to(p) or p.is_relative_to(real) for p in self._paths)

    def _add(self, device: Device) -> None:
        place = len(self._devices)
        self._devices.append(device)
        self._left[place] = None
        if device[2].pauses and self._owner:
            device[2].pause(partial(self._told, self._owner, place))
        else:
            self._left[place] = 0

    def _told(self, owner: Answer, place: int, left: int) -> None:
        if self._owner != owner or self._left.get(place, 0) is not None:
            return
        self._left[place] = left
        if None not in self._left.values() and self._timer:
            self._answer()

    def _answer(self) -> None:
        """Says to the owner how it went; once."""
        self._loop.cancel(self._timer)
        self._timer = 0
        assert self._owner is not None
        busy = [self._devices[place] for place, left in self._left.items() if left != 0]
        if busy and not self._force:
            names = ", ".join(name for name, _, _ in busy)
            answer = self._owner
            self._give_up()
            answer(
                refusal(
                    ControlError(
                        f"requests of {names} do not end",
                        "try again, or take the snapshot with --force: what they do may be in it by half",
                    )
                )
            )
            return
        self._left = dict.fromkeys(self._left, 0)
        self._owner({"ok": True, "devices": len(self._devices)})

    def _give_up(self) -> None:
        for _, _, worker in self._forget():
            worker.resume(lambda _: None)

    def _forget(self) -> list[Device]:
        devices, self._devices, self._left, self._owner = self._devices, [], {}, None
        self._loop.cancel(self._timer)
        self._timer = 0
        return devices
