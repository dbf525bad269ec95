"""xen9pd: watches XenStore, reads the policy, gives guests their devices, keeps a worker for each.

One thread, one loop. It knows guests, XenStore and processes, and nothing of 9P or rings. Whatever goes wrong
with one guest is logged once and stays with that guest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from xen9p import __version__, device, journal, lease_table, policy, quotas, snapshot, workers, xenbus
from xen9p.blink import Blink
from xen9p.budget import Budget
from xen9p.caching import Caching
from xen9p.control import (
    Answer,
    Attach,
    Detach,
    Learn,
    Metrics,
    Pause,
    Reload,
    Request,
    Resume,
    Status,
    refusal,
)
from xen9p.device import Actions, Device, Phase, XenbusState
from xen9p.errors import ControlError, PolicyError, RefusedError, Xen9pError, XenStoreError
from xen9p.jsonlines import Object
from xen9p.loop import Loop
from xen9p.policy import Grant, Policy
from xen9p.terms import TERMS
from xen9p.workers import Worker, Zygote
from xen9p.xenbus import GuestId, NoGuestError, ViolationError
from xen9p.xenstore import XenStore, XenStoreErrnoError

log = logging.getLogger("xen9pd")

# A guest's events cost 1 each; what makes directories or processes costs more.
BURST: Final = 60.0
RATE: Final = 5.0
COST_REBUILD: Final = 10.0
STATS_TIMEOUT: Final = 2.0
RECONNECT: Final = 2.0
_STATS: Final = ("requests", "read_bytes", "written_bytes", "errors", "fids", "in_flight", "queued")
_DOMAINS: Final = ("@introduceDomain", "@releaseDomain")


class Managed:
    """A device with all that belongs to it."""

    def __init__(self, owner: Guest, devid: int, grant: Grant, machine: Device) -> None:
        self.owner = owner
        self.devid = devid
        self.grant = grant
        self.machine = machine
        self.worker: Worker | None = None
        self.terms: Object = {}  # as the worker was told
        self.deaf = False  # its worker is of an earlier version, which knows no terms
        self.narrowed = False  # by hand
        self.later = ""  # what the policy says by now and only the next attach brings
        self.refusal = ""  # why its terms are not the policy's
        self.dirty = False
        self.timer = 0
        self.waiters: list[Callable[[], None]] = []

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.owner.id.name} {self.grant.tag}"

    @property
    def token(self) -> str:
        """The watch token of the frontend's state."""
        return f"{self.owner.id.domid}/{self.devid}"

    @property
    def fields(self) -> dict[str, str]:
        """What the journal can be asked for."""
        who = self.owner.id
        return journal.fields(who.name, who.domid, self.devid, self.grant.tag, self.grant.export)

    @property
    def front(self) -> str:
        """The frontend's directory in XenStore."""
        return xenbus.frontend_path(self.owner.id.domid, self.devid, self.grant.frontend)

    def say(self, level: str, text: str) -> None:
        """One log line about this device."""
        who = self.owner.id
        line = f"guest={who.name} device={self.token} tag={self.grant.tag} {text}"
        log.log(logging.getLevelName(level.upper()), "%s", line, extra={"fields": self.fields})


class Guest:
    """A guest with its devices."""

    def __init__(self, who: GuestId) -> None:
        self.id = who
        self.devices: dict[int, Managed] = {}
        self.budget = Budget(BURST, RATE, time.monotonic())
        self.detached: set[str] = set()  # tags that somebody took away by hand: not given again by rule
        self.refused: set[str] = set()  # problems logged already
        self.waiting = False
        self._next_devid = 0

    @property
    def fields(self) -> dict[str, str]:
        """What the journal can be asked for."""
        return journal.fields(self.id.name, self.id.domid)

    def new_devid(self, used: set[int]) -> int:
        """A device number that this guest has not had: one that comes back goes unnoticed by its kernel."""
        while self._next_devid in used:
            self._next_devid += 1
        self._next_devid += 1
        return self._next_devid - 1

    def by_tag(self, tag: str) -> Managed | None:
        """The guest's device with that tag."""
        return next((d for d in self.devices.values() if d.grant.tag == tag), None)


class Supervisor:
    """The one supervisor of a host."""

    def __init__(
        self, loop: Loop, store: XenStore, zygote: Zygote, rules: Policy, runtime: Path, *, state: Path | None = None
    ) -> None:
        self.loop = loop
        self.store = store
        self.zygote = zygote
        self.policy = rules
        self.runtime = runtime
        self.guests: dict[int, Guest] = {}
        self.blink = Blink(loop)
        self.caching = Caching(loop)
        self._watched_fd = -1
        self._resync_timer = 0
        self._quotas = quotas.Quotas(loop, (state or runtime) / quotas.FILE, self._give_all)

    # XenStore as a whole.

    def start(self) -> None:
        """Takes over what is there, and gives every guest what it lacks."""
        for special in _DOMAINS:
            self.store.watch(special, special)
        self._follow_store()
        self._quotas.keep(self.policy.quotas())
        self._adopt()
        alive = {m.worker.pid for g in self.guests.values() for m in g.devices.values() if m.worker and m.worker.pid}
        lease_table.clean(self.runtime, alive)
        self.rescan()

    def _follow_store(self) -> None:
        """Has the loop read the current connection."""
        fd = self.store.fileno()
        if fd != self._watched_fd:
            self._forget_store()
            self.loop.add(fd, self._store_ready)
            self._watched_fd = fd

    def _forget_store(self) -> None:
        if self._watched_fd >= 0:
            with contextlib.suppress(KeyError, ValueError):
                self.loop.remove(self._watched_fd)
            self._watched_fd = -1

    def _store_ready(self) -> None:
        self.guarded(self._handle_events)

    def _handle_events(self) -> None:
        for path, token in self.store.events():
            if token in _DOMAINS:
                self.rescan()
            else:
                self._device_event(path, token)

    def guarded(self, work: Callable[[], None]) -> None:
        """Runs work; if XenStore breaks under it, connects anew and looks at everything again."""
        try:
            work()
        except Xen9pError as error:
            self._recover(error)
        self._drain_soon()

    def _recover(self, error: Xen9pError) -> None:
        """Logs what went wrong, and has everything looked at again."""
        log.error("%s", error)
        if isinstance(error, XenStoreError) and not isinstance(error, XenStoreErrnoError):
            self._forget_store()
            self.store.close()
        # An errno is a node that vanished or was refused between two looks; the next look sorts it out.
        self._resync_later()

    def _drain_soon(self) -> None:
        # Events that arrived while a request waited for its answer make no descriptor readable.
        if self.store.pending and self.store.connected:
            self.loop.after(0, self._store_ready)

    def _resync_later(self) -> None:
        if not self._resync_timer:
            self._resync_timer = self.loop.after(RECONNECT, self._resync)

    def _resync(self) -> None:
        self._resync_timer = 0

        def work() -> None:
            self.store.connect()
            self._follow_store()
            self.rescan()
            for guest in list(self.guests.values()):
                for managed in list(guest.devices.values()):
                    self._republish(managed)
                    self._look(managed)

        self.guarded(work)

    def _republish(self, managed: Managed) -> None:
        """Writes our state again if the break kept it from being written."""
        domid, devid = managed.owner.id.domid, managed.devid
        there = xenbus.state(self.store, xenbus.backend_path(domid, devid))
        if there is not None and there != managed.machine.published:
            xenbus.publish(self.store, domid, devid, managed.machine.published)

    # Guests.

    def rescan(self) -> None:
        """Compares the guests that are there with those that we know."""
        present = {g.domid: g for g in xenbus.guests(self.store)}
        for domid, guest in list(self.guests.items()):
            if present.get(domid) is None or present[domid].uuid != guest.id.uuid:
                self._guest_gone(guest)
        for domid, who in present.items():
            if domid not in self.guests:
                self.guests[domid] = Guest(who)
                log.info("guest=%s domain=%d seen", who.name, domid, extra={"fields": journal.fields(who.name, domid)})
            self.give(self.guests[domid])

    def give(self, guest: Guest) -> None:
        """Attaches what the policy gives this guest by itself and it does not have."""
        for grant in self.policy.resolve(guest.id.name, guest.id.uuid):
            if not grant.auto or grant.tag in guest.detached or guest.by_tag(grant.tag) is not None:
                continue
            problems = self._problems(grant)
            for problem in problems:
                self._say_once(guest, f"tag={grant.tag} not attached: {problem}")
            if problems:
                continue
            try:
                self.attach(guest, grant)
            except NoGuestError:
                return
            except PolicyError as error:
                self._say_once(guest, f"tag={grant.tag} not attached: {error}")

    def _problems(self, grant: Grant) -> list[str]:
        """What keeps an export from being served now, a line each."""
        if grant.of is not None:
            try:
                snapshot.provide(grant.of.name, grant.of.path)
            except Xen9pError as error:
                return [str(error)]
        return policy.path_problems(policy.Export(grant.export, grant.path)) or self._hold(grant.path)

    def _hold(self, path: Path) -> list[str]:
        """Has the filesystem enforce a directory's quota, if it has one; what keeps it from that, a line each."""
        most = self.policy.quotas().get(path)
        return [] if most is None else self._quotas.hold(path, most)

    def _give_all(self) -> None:
        """What kept guests from an export may be over."""

        def work() -> None:
            for guest in list(self.guests.values()):
                for managed in list(guest.devices.values()):
                    for problem in self._hold(managed.grant.path):
                        managed.say("error", problem)
                self.give(guest)

        self.guarded(work)

    def _say_once(self, guest: Guest, text: str) -> None:
        if text not in guest.refused:
            guest.refused.add(text)
            log.error("guest=%s %s", guest.id.name, text, extra={"fields": guest.fields})

    def _guest_gone(self, guest: Guest) -> None:
        log.info("guest=%s domain=%d gone", guest.id.name, guest.id.domid, extra={"fields": guest.fields})
        del self.guests[guest.id.domid]
        for managed in list(guest.devices.values()):
            self._perform(managed, managed.machine.domain_gone())

    # Devices.

    def attach(self, guest: Guest, grant: Grant, *, narrowed: bool = False) -> Managed:
        """Makes a new device for a guest and waits for its frontend. NoGuestError if it has gone."""
        devid = guest.new_devid(xenbus.used_devids(self.store, guest.id.domid))
        managed = Managed(guest, devid, grant, Device())
        managed.terms, managed.narrowed = _terms(grant), narrowed
        xenbus.create(self.store, guest.id, devid, grant, narrowed=narrowed)
        guest.devices[devid] = managed
        managed.say("info", f"attached export={grant.export} access={_access(grant)} path={grant.path}")
        self._watch(managed)
        self._prepare(managed)
        return managed

    def _watch(self, managed: Managed) -> None:
        self.store.watch(f"{managed.front}/state", managed.token)

    def _unwatch(self, managed: Managed) -> None:
        self.store.unwatch(f"{managed.front}/state", managed.token)

    def _find(self, token: str) -> Managed | None:
        domid, _, devid = token.partition("/")
        guest = self.guests.get(int(domid))
        return guest.devices.get(int(devid)) if guest else None

    def _device_event(self, path: str, token: str) -> None:
        managed = self._find(token)
        # The guest may write beneath its state node; that says nothing.
        if managed is not None and path.endswith("/state"):
            managed.dirty = True
            self._serve_guest(managed.owner)

    def _serve_guest(self, guest: Guest) -> None:
        """Looks at the guest's devices that changed, as far as its budget goes, the rest later."""
        for managed in list(guest.devices.values()):
            if not managed.dirty:
                continue
            wait = guest.budget.take(1, time.monotonic())
            if wait:
                if not guest.waiting:
                    guest.waiting = True
                    self.loop.after(wait, partial(self._serve_late, guest))
                return
            self._look(managed)

    def _serve_late(self, guest: Guest) -> None:
        guest.waiting = False
        if self.guests.get(guest.id.domid) is guest:
            self.guarded(partial(self._serve_guest, guest))

    def _look(self, managed: Managed) -> None:
        managed.dirty = False
        who = managed.owner.id
        state = xenbus.state(self.store, managed.front)
        if state is None and xenbus.uuid_of(self.store, who.domid) != who.uuid:
            self.rescan()
            return
        self._perform(managed, managed.machine.frontend_state(state))

    def _perform(self, managed: Managed, actions: Actions) -> None:
        """Does what the state machine says."""
        for action in actions:
            match action:
                case device.Log(level, text):
                    managed.say(level, text)
                case device.Publish(state):
                    self._publish(managed, state)
                case device.ReadRings():
                    self._read_rings(managed)
                case device.Spawn(rings):
                    self._spawn(managed, rings)
                case device.Stop() | device.Kill():
                    if managed.worker is not None:
                        managed.worker.stop() if isinstance(action, device.Stop) else managed.worker.kill()
                case device.Timer(seconds, epoch):
                    self._set_timer(managed, seconds, epoch)
                case device.Recreate():
                    self._recreate(managed)
                case device.Remove():
                    self._remove(managed)

    def _read_rings(self, managed: Managed) -> None:
        try:
            rings = xenbus.read_rings(self.store, managed.front)
        except ViolationError as error:
            self._perform(managed, managed.machine.violation(error.message))
        else:
            self._perform(managed, managed.machine.rings(rings))

    def _publish(self, managed: Managed, state: XenbusState) -> None:
        domid, devid = managed.owner.id.domid, managed.devid
        if self.guests.get(domid) is not managed.owner:
            return
        if managed.machine.phase is Phase.FAILED:
            xenbus.note_failed(self.store, domid, devid, managed.machine.reason)
        xenbus.publish(self.store, domid, devid, state)
        if state == XenbusState.CONNECTED:
            managed.say("info", f"connected worker={managed.worker.pid if managed.worker else '-'}")
        elif state == XenbusState.CLOSED:
            managed.say("info", "closed")
            if managed.machine.phase is Phase.FAILED:
                self._end_unused(managed)
        elif state == XenbusState.INIT_WAIT:
            self._prepare(managed)

    def _set_timer(self, managed: Managed, seconds: float, epoch: int) -> None:
        def fire() -> None:
            self.guarded(lambda: self._perform(managed, managed.machine.timer(epoch)))

        self.loop.cancel(managed.timer)
        managed.timer = self.loop.after(seconds, fire)

    def _recreate(self, managed: Managed) -> None:
        guest = managed.owner
        wait = guest.budget.take(COST_REBUILD, time.monotonic())
        if wait:
            managed.timer = self.loop.after(wait, lambda: self.guarded(lambda: self._recreate(managed)))
            return
        if managed.machine.phase is not Phase.WAITING or self.guests.get(guest.id.domid) is not guest:
            return
        self._renew(managed)
        old, domid = managed.devid, guest.id.domid
        new = guest.new_devid(xenbus.used_devids(self.store, domid))
        self._unwatch(managed)
        self._end_unused(managed)
        xenbus.remove(self.store, guest.id, old)
        del guest.devices[old]
        managed.devid = new
        try:
            xenbus.create(self.store, guest.id, new, managed.grant, narrowed=managed.narrowed)
        except NoGuestError:
            self.rescan()
            return
        guest.devices[new] = managed
        managed.say("info", f"attached anew after device={domid}/{old} was closed")
        self._watch(managed)
        self._prepare(managed)

    def _remove(self, managed: Managed) -> None:
        guest = managed.owner
        self.loop.cancel(managed.timer)
        self._end_unused(managed)
        if guest.devices.get(managed.devid) is managed:
            del guest.devices[managed.devid]
        successor = self.guests.get(guest.id.domid)
        # A new guest under the same number may have a device of the same number already.
        if successor is None or managed.devid not in successor.devices:
            self._unwatch(managed)
            xenbus.remove(self.store, guest.id, managed.devid)
        managed.say("info", "removed")
        for waiter in managed.waiters:
            waiter()

    # What the policy says about devices that are there.

    def _now(self, managed: Managed) -> Grant | None:
        """What the policy gives for a device's tag now, as far as it was not narrowed by hand."""
        who = managed.owner.id
        grants = self.policy.resolve(who.name, who.uuid)
        now = next((grant for grant in grants if grant.tag == managed.grant.tag), None)
        return dataclasses.replace(now, readonly=True) if now and managed.narrowed else now

    def _settle(self, managed: Managed) -> None:
        """Has a device's worker take the terms of the policy as it is now; says what cannot change under a mount."""
        now, was = self._now(managed), managed.grant
        if now is not None and (now.export, now.path) == (was.export, was.path):
            managed.refusal = ""
            try:
                terms = _terms(now)
            except PolicyError as error:
                managed.refusal = str(error)
                managed.say("error", f"keeps its terms: {error}")
                terms = managed.terms
            managed.grant = dataclasses.replace(was, terms=now.terms, cache=now.cache)  # cache: for its next worker
            if terms != managed.terms:
                managed.terms = terms
                if managed.worker is not None and not managed.deaf:
                    managed.worker.settle(terms)
                    managed.say("info", "takes the policy's new terms")
        later = was.later(now)
        if managed.deaf:
            later += (", " if later else "") + "its terms (the worker is of an earlier version)"
        if later and later != managed.later:
            managed.say("warning", f"stays as it is until its next attach; then: {later}")
        managed.later = later
        for problem in self._hold(was.path):
            managed.say("error", problem)

    def _renew(self, managed: Managed) -> None:
        """A device that is made anew is made by the policy of now; without a rule as it was."""
        now = self._now(managed)
        if now is None:
            return
        problems = self._problems(now)
        try:
            terms = _terms(now)
        except PolicyError as error:
            problems = [*problems, str(error)]
        for problem in problems:
            managed.say("error", f"is made anew as it was: {problem}")
        if not problems:
            managed.grant, managed.terms, managed.later, managed.refusal = now, terms, "", ""

    # Workers.

    def _new_worker(self, managed: Managed) -> Worker:
        def ready() -> None:
            self.guarded(lambda: self._perform(managed, managed.machine.worker_ready()))

        def gone(last: str, reason: str) -> None:
            if worker.pid:
                lease_table.recover(self.runtime, worker.pid)
            if managed.worker is worker:
                managed.worker = None
            machine = managed.machine
            if not worker.has_rings:
                if last == "failed":  # asked to map, the next one fails the same way, and then it counts
                    managed.say("warning", f"its worker could not get ready: {reason}")
                return
            if last == "hangup":
                actions = machine.frontend_gone()
            elif last in ("failed", "ended"):
                actions = machine.worker_failed(reason)
            elif last == "stopped" and machine.phase is not Phase.STOPPING:
                actions = machine.worker_gone(time.monotonic(), "stopped unasked")
            else:
                actions = machine.worker_gone(time.monotonic(), f"died ({reason})" if reason else "died")
            self.guarded(lambda: self._perform(managed, actions))

        path = workers.socket_path(self.runtime, managed.owner.id.domid, managed.devid)
        managed.worker = worker = Worker(self.loop, path, ready, gone)
        worker.learned = partial(self.caching.learned, managed.owner.id)
        return worker

    def _spawn(self, managed: Managed, rings: tuple[device.Ring, ...]) -> None:
        self._prepare(managed).map(_plain(rings))

    def _end_unused(self, managed: Managed) -> None:
        """Ends a worker that has no rings: its device is closing before it was ever used."""
        if managed.worker is not None and not managed.worker.has_rings:
            managed.worker.kill()
            managed.worker = None

    def _prepare(self, managed: Managed) -> Worker:
        """The device's worker: one that waits for its rings already, or a new one.

        It is started ahead of its rings, because the guest waits from the moment that it has published them.
        """
        if managed.worker is not None:
            return managed.worker
        who, grant = managed.owner.id, managed.grant
        managed.deaf = False
        worker = self._new_worker(managed)
        request: Object = {
            "domid": who.domid,
            "devid": managed.devid,
            "guest": who.name,
            "uuid": who.uuid,
            "tag": grant.tag,
            "export": grant.export,
            "path": str(grant.path),
            "readonly": grant.readonly,
            "keys": str(grant.keys) if grant.keys else None,
            "leases": self._leases(managed),
            **managed.terms,
            **self.caching.plan(grant),
            "socket": str(workers.socket_path(self.runtime, who.domid, managed.devid)),
        }
        worker.born = partial(self.caching.weigh, who, grant.cache.weight)
        self.zygote.spawn(worker, request)
        if not grant.readonly:
            self.blink.joined((managed.name, grant.path, worker))
        return worker

    def _leases(self, managed: Managed) -> Object | None:
        """The lease table of a device and its term; None where nobody can have leases."""
        grant, term = managed.grant, managed.grant.leases
        try:
            table = lease_table.path_of(self.runtime, grant.path)
        except OSError:
            return None  # the export is missing, and so the worker will fail
        if term and (deaf := [name for name, _, worker in self._writers() if not worker.knows_leases]):
            managed.say("warning", f"gets no leases: the worker of {deaf[0]} is of an earlier version; attach it anew")
            term = 0.0
        return {"table": str(table), "term": term}

    # After a restart of ours.

    def _adopt(self) -> None:
        """Takes over devices and workers that an earlier supervisor left; clears away what nobody needs."""
        found = {w.device: w for w in workers.find(self.runtime)}
        present = {g.domid: g for g in xenbus.guests(self.store)}
        for left in xenbus.left_devices(self.store):
            who = present.get(left.domid)
            worker = found.get((left.domid, left.devid))
            if who is not None and not left.uuid:
                log.warning("guest=%s device=%d/%d is not ours: left alone", who.name, left.domid, left.devid)
                continue
            if who is None or left.uuid != who.uuid or not left.grant.tag:
                xenbus.remove(self.store, GuestId(left.domid, "?", left.uuid or "?"), left.devid)
                log.info("domain=%d device=%d of a guest that has gone: removed", left.domid, left.devid)
                continue
            if worker is not None and worker.hello.get("uuid") != who.uuid:
                worker = None
            guest = self.guests.setdefault(left.domid, Guest(who))
            self._adopt_device(guest, left, worker)
            if worker is not None:
                del found[left.domid, left.devid]
        for stray in found.values():
            log.warning("worker pid=%d serves nobody: stopped", stray.pid)
            end = Worker(self.loop, stray.path, lambda: None, lambda *_: None)
            end.adopt(stray.pid, stray.sock, stray.hello)
            end.stop()
            self.loop.after(device.STOP_TIMEOUT, end.kill)

    def _adopt_device(self, guest: Guest, left: xenbus.Left, found: workers.Found | None) -> None:
        published = XenbusState(left.state) if left.state in list(XenbusState) else XenbusState.CLOSED
        rings: tuple[device.Ring, ...] = ()
        if left.failed:
            phase = Phase.FAILED
        elif published == XenbusState.INIT_WAIT and (found is None or found.hello.get("state") == "prepared"):
            phase = Phase.WAITING
        elif found is not None or published == XenbusState.CONNECTED:
            phase = Phase.STARTING
        else:
            phase = Phase.CLOSED
        problem = ""
        if phase is Phase.STARTING:
            try:
                rings = xenbus.read_rings(self.store, xenbus.frontend_path(left.domid, left.devid, left.grant.frontend))
            except ViolationError as error:
                problem = error.message
        machine = Device(phase, published, rings)
        machine.reason = left.failed
        managed = Managed(guest, left.devid, left.grant, machine)
        managed.narrowed = left.narrowed
        # Of a worker that is gone nobody knows; then what is safest, until _settle() finds a rule.
        managed.deaf = found is not None and not found.hello.keys() >= set(TERMS)
        known = found is not None and not managed.deaf
        managed.terms = {name: found.hello[name] for name in TERMS} if found and known else _terms(left.grant)
        guest.devices[left.devid] = managed
        if found is not None:
            managed.say("info", f"taken over worker={found.pid}")
            worker = self._new_worker(managed)
            worker.adopt(found.pid, found.sock, found.hello)
            if phase is not Phase.WAITING:
                machine.adopted()
            if phase is Phase.STARTING and not worker.has_rings and not problem:
                worker.map(_plain(rings))
        self._settle(managed)
        if problem and not (managed.worker and managed.worker.has_rings):
            self._perform(managed, machine.violation(problem))
        elif phase is Phase.STARTING and found is None:
            managed.say("warning", "its worker died while no supervisor was there; starting another")
            self._perform(managed, machine.orphaned())
        self._watch(managed)

    # Control.

    def handle(self, request: Request, answer: Answer) -> None:
        """Answers one request of the xen9p command; raises what is to be said to it."""
        try:
            self._handle(request, answer)
        except XenStoreError as error:
            self._recover(error)
            raise
        finally:
            self._drain_soon()

    def _handle(self, request: Request, answer: Answer) -> None:
        match request:
            case Status():
                self._collect("stats", lambda: answer({"ok": True, **self.status()}))
            case Metrics():
                self._collect("metrics", lambda: answer({"ok": True, **self.metrics()}))
            case Reload():
                self.reload()
                answer({"ok": True, "rules": len(self.policy.rules)})
            case Attach():
                self._attach_by_hand(request, answer)
            case Detach():
                self._detach_by_hand(request, answer)
            case Learn():
                self._learn(request, answer)
            case Pause(paths, force):
                self.blink.begin(paths, self._writers(), force, answer)
            case Resume():
                self.blink.end(answer)

    def _writers(self) -> Iterator[tuple[str, Path, Worker]]:
        """The devices whose guests can write, and that have a worker."""
        for guest in self.guests.values():
            for managed in guest.devices.values():
                if managed.worker is not None and not managed.grant.readonly:
                    yield managed.name, managed.grant.path, managed.worker

    def reload(self) -> None:
        """Reads the policy again. A bad one changes nothing and raises PolicyError; a missing path is only said."""
        old = self.policy
        try:
            self.policy = policy.load(Path(old.source), check_paths=False)
        except PolicyError as error:
            for line in error.message.splitlines():
                log.error("policy not reloaded: %s", line)
            raise
        log.info("policy reloaded: %d rules", len(self.policy.rules))
        for problem in policy.missing_paths(self.policy):
            log.warning("policy: %s", problem)
        self._quotas.keep(self.policy.quotas())
        for guest in list(self.guests.values()):
            guest.refused.clear()
            # What somebody took away stays away, unless the policy says something new about it.
            before = old.resolve(guest.id.name, guest.id.uuid)
            after = self.policy.resolve(guest.id.name, guest.id.uuid)
            guest.detached -= {grant.tag for grant in after if grant not in before}
            for managed in list(guest.devices.values()):
                self._settle(managed)
        # Last: XenStore may break under it, and that must leave no worker with the old terms.
        for guest in list(self.guests.values()):
            self.give(guest)

    def _named(self, name: str) -> Guest:
        found = [g for g in self.guests.values() if g.id.name == name or g.id.uuid == name.lower()]
        if not found:
            there = ", ".join(sorted(g.id.name for g in self.guests.values())) or "none"
            raise ControlError(f"no guest {name} is running", f"running guests: {there}")
        return max(found, key=lambda g: g.id.domid)

    def _attach_by_hand(self, request: Attach, answer: Answer) -> None:
        guest = self._named(request.guest)
        grants = self.policy.resolve(guest.id.name, guest.id.uuid)
        grants = [g for g in grants if g.export == request.export and request.tag in ("", g.tag)]
        if not grants:
            what = f"export {request.export}" + (f" as tag {request.tag}" if request.tag else "")
            raise RefusedError(
                f"the policy gives guest {guest.id.name} no {what}",
                f"add a rule to {self.policy.source} and run: systemctl reload xen9pd",
            )
        grant = next((g for g in grants if guest.by_tag(g.tag) is None), grants[0])
        if request.readonly:
            grant = dataclasses.replace(grant, readonly=True)
        for problem in self._problems(grant):
            raise ControlError(problem)

        def attach() -> None:
            guest.detached.discard(grant.tag)
            try:
                made = self.attach(guest, grant, narrowed=request.readonly)
            except (NoGuestError, PolicyError) as error:
                answer(refusal(error))
                return
            answer({"ok": True, "domid": guest.id.domid, "devid": made.devid, "tag": grant.tag})

        old = guest.by_tag(grant.tag)
        if old is None:
            attach()
        elif old.machine.phase is Phase.FAILED:
            old.waiters.append(attach)
            self._perform(old, old.machine.detach())
        else:
            raise ControlError(
                f"guest {guest.id.name} has tag {grant.tag} already",
                f"to attach it anew: xen9p detach {guest.id.name} {grant.tag}",
            )

    def _detach_by_hand(self, request: Detach, answer: Answer) -> None:
        guest = self._named(request.guest)
        managed = guest.by_tag(request.tag)
        if managed is None:
            tags = ", ".join(sorted(d.grant.tag for d in guest.devices.values())) or "none"
            raise ControlError(f"guest {guest.id.name} has no tag {request.tag}", f"its tags: {tags}")
        guest.detached.add(request.tag)
        managed.waiters.append(lambda: answer({"ok": True}))
        self._perform(managed, managed.machine.detach())

    def _learn(self, request: Learn, answer: Answer) -> None:
        guest = self._named(request.guest)
        managed = guest.by_tag(request.tag)
        if managed is None or managed.worker is None or not managed.worker.is_ready:
            tags = ", ".join(sorted(d.grant.tag for d in guest.devices.values())) or "none"
            raise ControlError(f"guest {guest.id.name} has no tag {request.tag} that is served", f"its tags: {tags}")
        if not managed.grant.cache.prefetch:
            raise RefusedError(
                f"the policy wants nothing learned of guest {guest.id.name}, tag {request.tag}",
                f"add cache = {{prefetch = true}} to its rule in {self.policy.source}, reload, start the guest anew",
            )
        managed.worker.learn()
        answer({"ok": True, "seconds": managed.grant.cache.learn})

    def _collect(self, what: str, done: Callable[[], None]) -> None:
        """Fetches fresh stats or metrics of all workers, then calls done; those that are slow keep their old ones."""
        missing = 0
        finished = False
        timer = 0

        def finish() -> None:
            nonlocal finished
            if not finished:
                finished = True
                self.loop.cancel(timer)
                done()

        def one() -> None:
            nonlocal missing
            missing -= 1
            if missing == 0:
                finish()

        for guest in self.guests.values():
            for managed in guest.devices.values():
                if managed.worker is not None and managed.worker.ask(what, one):
                    missing += 1
        if missing:
            timer = self.loop.after(STATS_TIMEOUT, finish)
        else:
            finish()

    def summary(self) -> str:
        """How much there is, for systemctl status."""
        count = sum(len(g.devices) for g in self.guests.values())
        return f"STATUS={len(self.guests)} guests, {count} devices"

    def status(self) -> Object:
        """Host, guests and devices, with the stats of the last time they were asked for."""
        guests = [self.guests[domid] for domid in sorted(self.guests)]
        return {
            "host": {
                "version": __version__,
                "xen": xen_version(),
                "pid": os.getpid(),
                "zygote": self.zygote.pid,
                "policy": self.policy.source,
                "rules": len(self.policy.rules),
                "xenstore": self.store.connected,
            },
            "guests": [
                {
                    "domid": g.id.domid,
                    "name": g.id.name,
                    "uuid": g.id.uuid,
                    "tags": sorted(d.grant.tag for d in g.devices.values()),
                }
                for g in guests
            ],
            "devices": [_device_status(d) for g in guests for _, d in sorted(g.devices.items())],
        }

    def metrics(self) -> Object:
        """status(), and for each device all that its worker and the supervisor count."""
        found = self.status()
        there = {(d["domid"], d["devid"]): d for d in found["devices"]}
        for guest in self.guests.values():
            for managed in guest.devices.values():
                there[guest.id.domid, managed.devid] |= {
                    "detail": managed.worker.detail if managed.worker else {},
                    "restarts": managed.machine.restarts,
                    "violations": managed.machine.violations,
                }
        return found


def _plain(rings: tuple[device.Ring, ...]) -> list[Object]:
    return [{"ref": r.ref, "port": r.port} for r in rings]


def _terms(grant: Grant) -> Object:
    """What a worker is told of a grant's terms. PolicyError if the host's groups are too many."""
    return {"users": grant.terms.users().plain(), "limits": dict(grant.terms.limits)}


def _access(grant: Grant) -> str:
    return "ro" if grant.readonly else "rw"


def _device_status(managed: Managed) -> Object:
    who, grant, machine, worker = managed.owner.id, managed.grant, managed.machine, managed.worker
    known = machine.frontend in list(XenbusState) or machine.frontend is None
    return {
        "domid": who.domid,
        "devid": managed.devid,
        "guest": who.name,
        "tag": grant.tag,
        "export": grant.export,
        "path": str(grant.path),
        "access": _access(grant),
        "frontend_kind": grant.frontend,
        "checks": "server" if grant.terms.checks else "guest",
        "pending": managed.later,
        "problem": managed.refusal or (worker.refusal if worker else ""),
        "state": XenbusState.named(machine.published).lower(),
        "frontend": XenbusState.named(machine.frontend).lower() if known else str(machine.frontend),
        "phase": machine.phase.value,
        "reason": machine.reason,
        "pid": worker.pid if worker else None,
        **dict.fromkeys(_STATS, 0),
        **(worker.stats if worker else {}),
    }


def xen_version() -> str:
    """The hypervisor's version as it says itself, "" where there is none."""
    folder = Path("/sys/hypervisor/version")
    try:
        major, minor, extra = ((folder / n).read_text().strip() for n in ("major", "minor", "extra"))
    except OSError:
        return ""
    return f"{major}.{minor}{extra}"
