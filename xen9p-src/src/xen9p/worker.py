"""A worker: the process that serves one device, and the server behind `xen9p serve`.

A worker knows no XenStore and no policy. Its request says which directory to serve to whom. It is started when the
device is attached, so that it is prepared when the guest has made its rings; an order says then which grants to map. It
reports over its own Unix socket, in JSON lines, so that a restarted supervisor finds it again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from xen9p import auth, journal, lease_table, sandbox, server, tracer
from xen9p.cache_runner import CacheRunner, Plan
from xen9p.dataplane import DataPlane, Leases, Limits, Verdict, keep_capabilities
from xen9p.errors import Xen9pError, describe
from xen9p.prefetch import Profile
from xen9p.terms import TERMS
from xen9p.users import Users, from_plain

LOG = logging.getLogger(__name__)
SEND_TIMEOUT = struct.pack("ll", 2, 0)
MOST_FIDS = 1 << 18
RESERVED_FDS = 128  # for what is no fid: rings, sockets, the export
MOST_EVENTS = 4096  # SLOTS in cache_events.c
HELLO_FIELDS = ("domid", "devid", "guest", "uuid", "tag", "export", "readonly")
PR_SET_NAME = 15
STAND_STILL = 2.0
"""Seconds after which a paused device goes on by itself, whatever became of who asked for it."""
FINISH = 0.5
"""Seconds that a pause waits for what is being done to files."""
LOOK = 0.02
LAST_WORDS = 2.0  # seconds that a worker waits for somebody to tell why it failed


def open_export(path: str) -> int:
    """A descriptor of an export's root directory.

    Raises:
        Xen9pError: it is missing, or no directory.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Xen9pError(
            f"cannot serve {path}: {error.strerror}",
            hint="an export is an existing directory",
            errno=error.errno,
        ) from None


def prepare_process() -> None:
    """What every serving process needs before its first thread: exact modes, and rights that setfsuid(2) leaves."""
    os.umask(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError):  # without CAP_SETPCAP files just belong to who runs the server
        keep_capabilities()


def limits(wanted: Mapping[str, int] | None = None, request: Mapping[str, Any] | None = None) -> Limits:
    """The limits of a device: as wanted, but no more fids than the process may have descriptors for.

    A guest with cache=loose keeps a fid for every name that it has in its dentry cache, so there are many; an open
    fid has two descriptors, or three with an origin. Events that a caching policy has not seen yet keep theirs.

    Args:
        request: what started the worker, if it is one.

    Raises:
        Xen9pError: a limit is unknown or out of range.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    each = 3 if request and request.get("origin") else 2
    reserved = RESERVED_FDS + (each * MOST_EVENTS if request and request.get("cache") else 0)
    most = MOST_FIDS if soft == resource.RLIM_INFINITY else min(MOST_FIDS, (soft - reserved) // each)
    try:
        found = Limits(**({"max_fids": MOST_FIDS} | dict(wanted or {})))
    except TypeError:
        unknown = sorted(set(wanted or {}) - {field.name for field in fields(Limits)})
        raise Xen9pError(f"there is no limit called {', '.join(unknown)}", errno=errno.EINVAL) from None
    return replace(found, max_fids=min(found.max_fids, max(most, 16)))


class Worker:
    """Serves the device that a spawn request describes, and answers its supervisor."""

    def __init__(self, request: Mapping[str, Any], listener: socket.socket) -> None:
        self.request = request
        self.listener = listener
        self.device: DataPlane | None = None
        self._made: DataPlane | None = None  # the same from its making on, before it serves
        self._clients: list[socket.socket] = []
        self._lock = threading.Lock()  # of everything below, and of the device's life
        self._told = threading.Condition(self._lock)
        self._stopping = False
        self._rings: list[dict[str, int]] | None = None
        self._ready: dict[str, Any] | None = None
        self._last: dict[str, Any] | None = None
        self._tracers: set[threading.Thread] = set()
        self._limits = Limits()
        self._pauser: socket.socket | None = None
        self._plan = Plan({})
        self._caching: CacheRunner | None = None

    def run(self) -> int:
        """Prepares, waits for the rings, maps, serves, ends.

        Returns:
            The exit code: 0 stopped, 1 the host's fault, 3 the guest's.
        """
        prepare_process()
        device, failure = None, Xen9pError("")
        try:
            device = self._open()
        except Xen9pError as error:
            failure = error
        self._made = device
        # Not before: a thread that runs already would stay outside the walls.
        threading.Thread(target=self._listen, name="control", daemon=True).start()
        if device is None:
            return self._fail(failure)
        if caching := self._plan.runner(device, self._learned):
            self._caching = caching
            caching.start()  # now: what the guest will read can be there before it asks
        try:
            rings = self._wait_for_rings()
            self._map(device, rings)
        except Xen9pError as error:
            return self._fail(error)
        with self._lock:
            self.device = device
            device.set_limits(self._limits)  # they may have been changed since it was made
            if self._stopping:  # asked while it was mapping, or for its rings
                device.stop()
            else:
                self._ready = {"event": "ready", "order": device.order, "rings": len(rings)}
                self._tell(self._ready)
        verdict = device.run(server.serve)
        self._end_caching()
        reason = device.reason
        self._withdraw()
        device.close()
        event = {Verdict.STOPPED: "stopped", Verdict.HANGUP: "hangup"}.get(verdict, "ended")
        self._finish({"event": event, "reason": reason} if event == "ended" else {"event": event})
        return 0 if event != "ended" else 3 if verdict == Verdict.PROTOCOL else 1

    def _withdraw(self) -> None:
        """Nobody looks at the device from here on: it may be closed."""
        with self._lock:  # nobody asks for statistics meanwhile
            self.device = self._made = None
        for thread in list(self._tracers):  # each looks once more and leaves
            thread.join()

    def _open(self) -> DataPlane:
        """The device, and the process shut in with it: no byte of the guest's has been seen yet."""
        readonly = bool(self.request["readonly"])
        keys = self.request.get("keys")  # a path; the policy says whether this device wants a key
        authenticator = auth.Authenticator(auth.load(Path(keys))) if keys else None
        self._plan = Plan(self.request)  # it reads files and imports what there will be no way to
        shared = self.request.get("leases")
        table = lease_table.open_table(Path(shared["table"])) if shared else None
        origin, origin_fd = self.request.get("origin"), -1
        root = sandbox.cage(self.request["path"], readonly, origin)
        if origin:
            try:
                origin_fd = sandbox.open_origin()
            except OSError:
                self._plan.problems.append(f"nothing is shared with {origin}: it cannot be mounted")
        self._limits = limits(self.request.get("limits"), self.request)
        users = from_plain(self.request["users"]) if "users" in self.request else None
        device = DataPlane(root, readonly, self._limits, authenticator, users, origin_fd=origin_fd)
        try:
            if table is not None and shared:
                device.set_leases(table, float(shared["term"]), int(self.request["domid"]))
            device.open_xen()
            missing = sandbox.shut(root, readonly, origin_fd)
        except Xen9pError:
            device.close()
            raise
        for what in [*missing, *self._plan.problems]:
            print(f"xen9p: worker {self.request['domid']}/{self.request['devid']}: {what}", file=sys.stderr, flush=True)
        return device

    def _learned(self, profile: Profile) -> None:
        """Has the supervisor keep a profile; one that is not there now misses it, and the next boot is learned."""
        with self._lock:
            self._tell({"event": "learned", "image": self._plan.image, "profile": profile.plain()})

    def _end_caching(self) -> None:
        caching, self._caching = self._caching, None
        if caching is not None:
            caching.close()

    def _fail(self, error: Xen9pError) -> int:
        """Says why there will be no service, if need be to a supervisor that is just about to connect."""
        self._end_caching()
        with self._told:
            self._last = {"event": "failed", "reason": str(error)}
            if self._clients:
                self._tell(self._last)
            else:
                self._told.wait_for(lambda: self._clients, timeout=LAST_WORDS)
        return 3 if error.errno == errno.EPROTO else 1

    def _wait_for_rings(self) -> list[dict[str, int]]:
        """What the guest has granted; nothing if the worker is to stop before that."""
        with self._told:
            self._told.wait_for(lambda: self._rings is not None or self._stopping)
            return self._rings or []

    def _map(self, device: DataPlane, rings: Sequence[Mapping[str, int]]) -> None:
        try:
            for ring in rings:
                device.add_xen_ring(self.request["domid"], ring["ref"], ring["port"])
        except Xen9pError:
            with self._lock:
                self._made = None
            self._end_caching()
            device.close()
            raise

    # The supervisor's side.

    def _hello(self) -> dict[str, Any]:
        state = "serving" if self._ready else "prepared" if self._rings is None else "starting"
        said = {name: self.request[name] for name in HELLO_FIELDS}
        terms = {"users": Users().plain(), "limits": {}} | {n: self.request[n] for n in TERMS if n in self.request}
        return {"event": "hello", "pid": os.getpid(), "state": state, "pauses": True, "leases": True} | said | terms

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED):
                    return
                time.sleep(1)  # the guest may have used up the descriptors; it will not for ever
                continue
            # A supervisor that has stopped reading must not hold up the end.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SEND_TIMEOUT)
            threading.Thread(target=self._converse, args=(client,), name="supervisor", daemon=True).start()

    def _converse(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as lines:
            with self._lock:
                self._clients.append(client)
                self._send(client, self._hello())
                for event in (self._ready, self._last):
                    if event:
                        self._send(client, event)
                self._told.notify_all()
            with contextlib.suppress(OSError, ValueError):
                for line in lines:
                    order = json.loads(line)
                    if order.get("do") == "trace":
                        self._trace(client, int(order.get("data", tracer.DATA)))
                        break
                    if order.get("do") == "pause":
                        self._pause(client, order.get("id", 0))
                    else:
                        self._obey(client, order)
            with self._lock:
                if client in self._clients:
                    self._clients.remove(client)
                self._resume(client)  # nobody else would

    def _trace(self, client: socket.socket, data: int) -> None:
        """Makes of this conversation a trace, until the client hangs up or the device ends."""
        me = threading.current_thread()
        with self._lock:
            self._clients.remove(client)  # events would come into the middle of its lines
            device = self.device
            if device is None:
                return
            self._tracers.add(me)
        try:
            tracer.ship(device, client, data, lambda: self.device is not device)
        finally:
            self._tracers.discard(me)

    def _obey(self, client: socket.socket, order: Mapping[str, Any]) -> None:
        with self._lock:
            match order.get("do"):
                case "map":
                    if self._rings is None:
                        self._rings = order["rings"]
                        self._told.notify_all()
                case "settle" if self._made:
                    self._send(client, {"event": "settled", "problem": self._settle(self._made, order)})
                case "resume":
                    self._send(client, {"event": "resumed", "held": self._resume(client)})
                case "stop":
                    self._stopping = True
                    self._told.notify_all()
                    if self.device:
                        self.device.stop()
                case "stats" if self.device:
                    self._send(client, {"event": "stats"} | dict(self.device.stats()))
                case "metrics" if self.device:
                    caching = {"cache": self._caching.report()} if self._caching else {}
                    self._send(client, {"event": "metrics"} | seen(self.device) | caching)
                case "learn":
                    if self._caching is not None:
                        self._caching.learn()

    def _pause(self, client: socket.socket, number: object) -> None:
        """Has the device stand still, and says how much does not: 0 for a moment that a snapshot can be taken in."""
        until = time.monotonic() + FINISH
        with self._lock:
            if (device := self._made) is not None:
                self._pauser = client
                device.pause(STAND_STILL)
        left = 0
        while device is not None:
            with self._lock:  # not for long: others have orders too, and the device may end
                if self._made is not device:
                    break
                left = device.quiet(LOOK)
            if not left or time.monotonic() > until:
                break
        with self._lock:
            self._send(client, {"event": "paused", "id": number, "left": left})

    def _resume(self, client: socket.socket) -> bool:
        """Ends a client's pause; whether it was in force until now. With no guest's requests to take it always was."""
        if self._pauser is not client:
            return False
        self._pauser = None
        return self._made.resume() if self._made else True

    def _settle(self, device: DataPlane, order: Mapping[str, Any]) -> str:
        """Other terms from now on; what keeps them from being taken, in words."""
        try:
            users, wanted = from_plain(order["users"]), limits(order["limits"], self.request)
            device.set_users(users)
        except (Xen9pError, KeyError, TypeError, ValueError) as error:
            return str(error) or type(error).__name__
        self._limits = wanted
        device.set_limits(wanted)
        self.request = {**self.request, **{name: order[name] for name in TERMS}}
        return ""

    def _finish(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._last = event
            self._tell(event)

    def _tell(self, event: Mapping[str, Any]) -> None:
        for client in self._clients:
            self._send(client, event)

    @staticmethod
    def _send(client: socket.socket, event: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            client.sendall(json.dumps(event).encode() + b"\n")


def seen(device: DataPlane) -> dict[str, Any]:
    """All that a device counts: stats(), by_type, errnos and times."""
    return {
        **device.stats(),
        "by_type": dict(device.stats_by_type()),
        "errnos": dict(device.errnos()),
        "times": dict(device.times()),
        "leases": dict(device.lease_stats()),
    }


def main(request: Mapping[str, Any], listener: socket.socket) -> int:
    """What the zygote runs in a new child. The socket that listener listens on is request["socket"]."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # No slash: the kernel names the event channel's interrupt after the process, in /proc/irq.
    title = f"x9 {request['guest']}:{request['tag']}".replace("/", "_")
    ctypes.CDLL(None).prctl(PR_SET_NAME, title.encode()[:15], 0, 0, 0)
    journal.speak_for(
        journal.fields(
            request["guest"], request["domid"], request["devid"], request["tag"], str(request.get("export", ""))
        )
    )
    try:
        return Worker(request, listener).run()
    except Exception as error:
        LOG.critical("worker ends: %s", describe(error))
        return 1


@dataclass(frozen=True, slots=True)
class Service:
    """What a server on a socket gives: the directory behind a descriptor; if there are keys, to those who have one."""

    export: int
    readonly: bool
    keys: Mapping[str, auth.Key] | None = None
    trace: tracer.Sink | None = None
    leases: Leases | None = None
    term: float = 0.0
    """Seconds that a lease session goes on without its client."""


def serve_connection(stream: socket.socket, service: Service) -> Verdict:
    """Serves one connected socket until it ends."""
    with stream:
        try:
            root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=service.export)
        except OSError as error:
            raise Xen9pError(f"cannot serve a client: {error.strerror}", errno=error.errno) from None
        authenticator = auth.Authenticator(service.keys) if service.keys is not None else None
        device = DataPlane(root, service.readonly, limits(), authenticator)
        try:
            if service.leases is not None:
                device.set_leases(service.leases, service.term)
            device.add_stream(stream)
            name, trace = f"client:{stream.fileno()}", service.trace
            with contextlib.closing(tracer.Recorder(device, name, trace)) if trace else contextlib.nullcontext():
                return device.run(server.serve)
        finally:
            device.close()


Live = dict[socket.socket, threading.Thread]


def _serve_client(stream: socket.socket, service: Service, live: Live) -> None:
    """A client's thread: what is wrong costs this client its connection, in one line."""
    try:
        serve_connection(stream, service)
    except Xen9pError as error:
        print(f"xen9p: error: {error}", file=sys.stderr, flush=True)
    finally:
        live.pop(stream, None)


def _accept_until_told(listener: socket.socket, told: socket.socket, service: Service) -> None:
    live: Live = {}
    while told not in select.select([listener, told], [], [])[0]:
        client, _ = listener.accept()
        thread = threading.Thread(target=_serve_client, args=(client, service, live), name="client", daemon=True)
        live[client] = thread
        thread.start()
    for stream, thread in list(live.items()):
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_RDWR)
        thread.join(2)


def _listen_at(address: tuple[str, int] | str) -> socket.socket:
    try:
        if isinstance(address, str):
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.lstat(address).st_mode):
                    os.unlink(address)  # a socket that an earlier server left
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(address)
            listener.listen()
            return listener
        return socket.create_server(address)
    except OSError as error:
        raise Xen9pError(
            f"cannot listen on {address}: {error.strerror}", hint="choose another address", errno=error.errno
        ) from None


def serve_socket(
    path: str,
    readonly: bool,
    address: tuple[str, int] | str,
    trace: tracer.Sink | None = None,
    *,
    keys: Path | None = None,
    term: float = 0.0,
) -> int:
    """Serves a directory on a Unix socket (a path) or TCP (host, port), a thread a client, until SIGINT or SIGTERM.

    It stays the directory that it is now, whatever takes its name later.

    Args:
        trace: gets every request of every client.
        keys: a file of keys; each client has to prove that it has one of them.
        term: seconds that a client's lease session goes on without it; 0 for no leases.

    Raises:
        Xen9pError: the directory, the address or the file is not usable.
    """
    known = auth.load(keys) if keys else None  # now: the process shuts itself in
    export = open_export(path)
    service = Service(export, readonly, known, trace, lease_table.new_table() if term else None, term)
    prepare_process()
    told, tell = socket.socketpair()
    tell.setblocking(False)
    # Word is left at once, and not when this thread comes to run a handler: it may be about to wait for clients. And no
    # exception out of nowhere, which could get lost in a finalizer.
    before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    with told, tell, _listen_at(address) as listener:
        print(f"serving {path} on {listener.getsockname()}", file=sys.stderr, flush=True)
        for missing in sandbox.confine_server(export, readonly, address):
            print(f"xen9p: {missing}", file=sys.stderr, flush=True)
        _accept_until_told(listener, told, service)
        signal.set_wakeup_fd(before)
    os.close(export)
    if isinstance(address, str):
        Path(address).unlink(missing_ok=True)
    return 0
