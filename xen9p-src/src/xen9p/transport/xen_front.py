"""A ring that this guest shares with the host: the frontend's side of the Xen 9pfs handshake, in user space.

The host makes such devices under ``device/xen9p`` and not under ``device/9pfs``, which the guest's kernel claims
(policy: ``frontend = "user"``). One process at a time uses a device; a lock file says which. States as in
xen.git docs/misc/9pfs.pandoc: 1, then 3 with the rings published, 4 when the backend says 4; at the end 5 and 6.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xen9p._dataplane import ffi, lib
from xen9p.errors import Xen9pError
from xen9p.transport.ring_front import RingFront
from xen9p.xenstore import XenStore

DEVICES: Final = "device/xen9p"
"""Relative to the guest's own directory in XenStore."""
XENBUS: Final = "/dev/xen/xenbus"
LOCKS: Final = Path("/run/xen9p")
ORDER: Final = 8
"""2^8 pages and one more: three such devices fit into gntalloc's limit of 1024 pages a guest."""
MODULES: Final = ("xen-gntalloc", "xen-evtchn")
CONNECT_TIMEOUT: Final = 30.0
CLOSE_TIMEOUT: Final = 5.0
_INITIALISING, _INIT_WAIT, _INITIALISED, _CONNECTED, _CLOSING, _CLOSED = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class Device:
    """A device for user space, as XenStore has it. path is the frontend's directory, backend the other one."""

    tag: str
    path: str
    backend: str
    backend_domid: int


def find_all(store: XenStore) -> list[Device]:
    """Every device of this guest that is for user space."""
    found = []
    for devid in store.children(DEVICES):
        path = f"{DEVICES}/{devid}"
        tag, backend, domid = (store.read(f"{path}/{key}") for key in ("tag", "backend", "backend-id"))
        if tag and backend and domid and domid.isdigit():
            found.append(Device(tag, path, backend, int(domid)))
    return found


def find(store: XenStore, tag: str) -> Device:
    """The device with that tag; Xen9pError says which tags there are."""
    devices = find_all(store)
    for device in devices:
        if device.tag == tag:
            return device
    known = ", ".join(sorted(d.tag for d in devices)) or "none"
    raise Xen9pError(
        f"this guest has no device {tag} for user space",
        hint=f'its devices: {known}; the host gives one with frontend = "user" in a rule of its policy',
        errno=errno.ENODEV,
    )


def require_guest() -> None:
    """Xen9pError where there is no XenStore to be reached."""
    if not Path(XENBUS).exists():
        raise Xen9pError("this is no Xen guest", hint="to talk to a server on a socket use --unix or --tcp")
    if not os.access(XENBUS, os.R_OK | os.W_OK):
        raise Xen9pError(f"{XENBUS} cannot be opened", hint="run as root", errno=errno.EACCES)


def load_modules() -> None:
    """Loads what /dev/xen lacks; nothing does that when the guest starts."""
    for module in MODULES:
        if not Path("/dev/xen", module.removeprefix("xen-")).exists():
            with suppress(OSError):
                subprocess.run(["modprobe", "-q", module], check=False)


class Lock:
    """Keeps other processes of this guest from a device while this one uses it.

    Raises:
        Xen9pError: EBUSY, somebody else does; the message names the process.
    """

    def __init__(self, tag: str, folder: Path = LOCKS) -> None:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._fd = os.open(folder / f"front-{tag}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(self._fd, 20).decode(errors="replace").strip() or "?"
            self.release()
            raise Xen9pError(
                f"device {tag} is in use by process {pid}",
                hint="a device serves one process at a time: use what that one has mounted, or end it",
                errno=errno.EBUSY,
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Lets others in; twice is allowed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class XenTransport(RingFront):
    """The frontend's end of a ring that this process shares with the backend. Made by connect()."""

    def __init__(self, store: XenStore, device: Device, lock: Lock, front: Any, order: int) -> None:
        super().__init__(front, 1 << (order + 11), None)
        self.device = device
        self.order = order
        self._store = store
        self._lock = lock
        # One descriptor for events of the ring and of XenStore: the backend says there that it closes.
        self._epoll = select.epoll()
        self._epoll.register(super().fileno(), select.EPOLLIN)
        self._epoll.register(store.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when the backend has sent an event or changed its state."""
        return self._epoll.fileno()

    def poll(self) -> bytes | None:
        """Takes one message off the ring if it is there. ConnectionResetError when the backend has closed."""
        message = super().poll()
        if message is None and self._store.events():
            self._look()
        return message

    def _look(self) -> None:
        if _state(self._store, self.device.backend) != _CONNECTED:
            raise ConnectionResetError(errno.ECONNRESET, f"the host has closed device {self.device.tag}")

    def recv(self, timeout: float | None = None) -> bytes:
        """Waits for one message, or for the backend to close."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (message := self.poll()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._epoll.poll(left) and left is not None:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        return message

    def send(self, data: bytes, /) -> None:
        """Puts one message into the ring; waits for room."""
        while not self.post(data):
            self._epoll.poll(1.0)
            self._look()

    def close(self) -> None:
        """Closes the device in order: the backend unmaps first. What it leaves is ready for the next process."""
        if self._front is None:
            return
        try:
            with suppress(Xen9pError, OSError):
                _close(self._store, self.device)
        finally:
            self._epoll.close()
            super().close()
            self._store.close()
            self._lock.release()


def connect(tag: str, *, order: int | None = None, timeout: float = CONNECT_TIMEOUT) -> XenTransport:
    """Shares a ring with the host and waits until the device with that tag is connected.

    Args:
        order: 2^order pages; None for as many as the guest's limit leaves, at most ORDER.
        timeout: seconds for the whole handshake.

    Raises:
        Xen9pError: no such device, it is in use, this is no Xen guest, or the host does not answer.
    """
    require_guest()
    load_modules()
    lock = Lock(tag)
    store = XenStore(XENBUS)
    front: Any = None
    deadline = time.monotonic() + timeout
    try:
        device = _claim(store, tag, deadline)
        front, order = _share(device.backend_domid, order)
        _publish(store, device, front)
        _await(store, device, (_CONNECTED,), deadline)
        store.write(f"{device.path}/state", str(_CONNECTED))
        return XenTransport(store, device, lock, front, order)
    except BaseException:
        if front is not None:
            with suppress(Xen9pError):
                store.write(f"{device.path}/state", str(_CLOSING))
            lib.x9_front_free(front)
        store.close()
        lock.release()
        raise


def _claim(store: XenStore, tag: str, deadline: float) -> Device:
    """The device with both sides at the start: 1 here, 2 there. What an earlier process left is closed first."""
    while True:
        device = find(store, tag)
        store.watch(f"{device.backend}/state", "backend")
        ours, theirs = _state(store, device.path), _state(store, device.backend)
        if theirs == _INIT_WAIT and ours == _INITIALISING:
            return device
        # A device whose directory has gone comes again under another number: find() sees that.
        if theirs in (_CLOSING, _CLOSED) and ours != _INITIALISING:
            store.write(f"{device.path}/state", str(_INITIALISING))
        elif theirs == _CONNECTED and ours not in (_CLOSING, _CLOSED):
            store.write(f"{device.path}/state", str(_CLOSING))
        _wait_event(store, device, deadline)


def _share(domid: int, order: int | None) -> tuple[Any, int]:
    """(an x9_front, its order): the largest that the guest's limit allows, if none is asked for."""
    err, reason = ffi.new("int *"), ffi.new("char[80]")
    for attempt in (order,) if order is not None else range(ORDER, 2, -1):
        front = lib.x9_front_new_xen(domid, attempt, err, reason, len(reason))
        if front != ffi.NULL:
            return front, attempt
        if err[0] not in (errno.ENOSPC, errno.ENOMEM):
            break
    hints = {
        errno.ENOENT: f"load it: modprobe {' '.join(MODULES)}",
        errno.ENOSPC: "this guest shares as many pages as it may: raise xen_gntalloc.limit, or end another mount",
    }
    what = ffi.string(reason).decode()
    raise Xen9pError(f"{what}: {os.strerror(err[0])}", hint=hints.get(err[0], "see dmesg"), errno=err[0])


def _publish(store: XenStore, device: Device, front: Any) -> None:
    def write(t: XenStore) -> None:
        for key, value in (
            ("version", 1),
            ("num-rings", 1),
            ("ring-ref0", lib.x9_front_ref(front)),
            ("event-channel-0", lib.x9_front_port(front)),
            ("state", _INITIALISED),
        ):
            t.write(f"{device.path}/{key}", str(int(value)))

    store.transaction(write)


def _close(store: XenStore, device: Device) -> None:
    deadline = time.monotonic() + CLOSE_TIMEOUT
    store.write(f"{device.path}/state", str(_CLOSING))
    _await(store, device, (_CLOSING, _CLOSED), deadline)
    store.write(f"{device.path}/state", str(_CLOSED))
    _await(store, device, (_CLOSED,), deadline)
    # The backend makes the device anew if nobody wants this one; the next process can have it right away.
    store.write(f"{device.path}/state", str(_INITIALISING))


def _await(store: XenStore, device: Device, wanted: tuple[int, ...], deadline: float) -> None:
    while (state := _state(store, device.backend)) not in wanted:
        if wanted == (_CONNECTED,) and state in (_CLOSING, _CLOSED, None):
            raise Xen9pError(
                f"the host has closed device {device.tag}",
                hint="see what it says: xen9p status and journalctl -u xen9pd, on the host",
                errno=errno.ECONNREFUSED,
            )
        _wait_event(store, device, deadline)


def _wait_event(store: XenStore, device: Device, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise Xen9pError(
            f"the host does not answer for device {device.tag}",
            hint="is xen9pd running there? see: xen9p status, on the host",
            errno=errno.ETIMEDOUT,
        )
    # The watch can miss a directory that is made anew, so look once a second anyway.
    if not store.pending:
        select.select([store.fileno()], [], [], min(left, 1.0))
    store.events()


def _state(store: XenStore, directory: str) -> int | None:
    text = store.read(f"{directory}/state")
    return int(text) if text is not None and text.isdigit() else None
