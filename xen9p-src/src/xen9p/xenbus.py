"""What a 9pfs device looks like in XenStore: paths, creation, removal, and the frontend's rings.

The frontend's directory belongs to the guest, which may write anything there at any time: it is read for the
state and the rings only, checked, and never believed about who it is. What we have to know again after a
restart is under the backend's ``host`` node, which only dom0 can read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xen9p.device import Ring, XenbusState
from xen9p.errors import Xen9pError
from xen9p.policy import Grant
from xen9p.xenstore import XenStore

BACKENDS: Final = "/local/domain/0/backend/xen9p"
FRONTENDS: Final = {"kernel": "9pfs", "user": "xen9p"}
"""Directory below the guest's device/, by who serves that end. Linux claims every device/9pfs there is."""
MAX_RINGS: Final = 4
MAX_RING_ORDER: Final = 9
_U32: Final = re.compile(r"[0-9]{1,10}")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class ViolationError(Xen9pError):
    """The guest wrote something into its directory that no frontend writes."""


class NoGuestError(Xen9pError):
    """The guest has gone, or its number is another's now."""


@dataclass(frozen=True, slots=True)
class GuestId:
    """A guest as dom0 knows it. A domid is reused, so it counts only together with the uuid."""

    domid: int
    name: str
    uuid: str


@dataclass(frozen=True, slots=True)
class Left:
    """A device that an earlier supervisor left in XenStore."""

    domid: int
    devid: int
    uuid: str
    grant: Grant
    state: int | None
    failed: str
    narrowed: bool = False
    """To "ro", by hand."""


def backend_path(domid: int, devid: int) -> str:
    """The backend's directory."""
    return f"{BACKENDS}/{domid}/{devid}"


def frontend_path(domid: int, devid: int, frontend: str = "kernel") -> str:
    """The frontend's directory; frontend as in the policy."""
    return f"/local/domain/{domid}/device/{FRONTENDS[frontend]}/{devid}"


def guests(store: XenStore) -> list[GuestId]:
    """Every guest that is there now, by domid; those still without a name or uuid are left out."""
    found = (guest(store, int(n)) for n in store.children("/local/domain") if n.isdigit() and n != "0")
    return sorted((g for g in found if g is not None), key=lambda g: g.domid)


def guest(store: XenStore, domid: int) -> GuestId | None:
    """The guest with that number now."""
    uuid = uuid_of(store, domid)
    name = store.read(f"/local/domain/{domid}/name")
    return GuestId(domid, name, uuid) if name and uuid else None


def uuid_of(store: XenStore, domid: int) -> str | None:
    """The uuid of the guest that has the number now. xl writes it as /vm/UUID, with -1 after a move."""
    vm = store.read(f"/local/domain/{domid}/vm") or ""
    uuid = vm.removeprefix("/vm/").lower()[:36]
    return uuid if _UUID.fullmatch(uuid) else None


def state(store: XenStore, directory: str) -> int | None:
    """A side's xenbus state; None if there is none, -1 for what is no number."""
    text = store.read(f"{directory}/state")
    if text is None:
        return None
    return int(text) if _U32.fullmatch(text) else -1


def create(store: XenStore, who: GuestId, devid: int, grant: Grant, *, narrowed: bool = False) -> None:
    """Makes both directories anew in one transaction; the backend waits for the frontend's rings (2).

    Permissions come before content, which inherits them. All that a frontend reads is there together with
    the states, because kernels before 6.13 read it when they see the device and not when we say 2.
    NoGuestError if the guest has gone meanwhile.
    """
    domid = who.domid
    back, front = backend_path(domid, devid), frontend_path(domid, devid, grant.frontend)

    def write(t: XenStore) -> None:
        if uuid_of(t, domid) != who.uuid:
            raise NoGuestError(f"guest {who.name} (domain {domid}) has gone")
        for directory, permissions in ((front, [f"n{domid}", "r0"]), (back, ["n0", f"r{domid}"])):
            t.remove(directory)
            t.mkdir(directory)
            t.set_permissions(directory, permissions)
        t.mkdir(f"{back}/host")
        t.set_permissions(f"{back}/host", ["n0"])
        for key, value in (
            ("host/guest", who.name),
            ("host/uuid", who.uuid),
            ("host/export", grant.export),
            ("host/path", str(grant.path)),
            ("host/access", "ro" if grant.readonly else "rw"),
            ("host/narrowed", "1" if narrowed else "0"),
            ("host/keys", str(grant.keys or "")),
            ("frontend", front),
            ("frontend-id", str(domid)),
            ("online", "1"),
            ("tag", grant.tag),
            ("versions", "1"),
            ("max-rings", str(MAX_RINGS)),
            ("max-ring-page-order", str(MAX_RING_ORDER)),
            ("state", str(int(XenbusState.INIT_WAIT))),
        ):
            t.write(f"{back}/{key}", value)
        for key, value in (
            ("backend", back),
            ("backend-id", "0"),
            ("tag", grant.tag),
            ("state", str(int(XenbusState.INITIALISING))),
        ):
            t.write(f"{front}/{key}", value)

    store.transaction(write)


def remove(store: XenStore, who: GuestId, devid: int) -> None:
    """Removes both directories, the frontend's only while the domain is still the same guest."""
    domid = who.domid

    def write(t: XenStore) -> None:
        t.remove(backend_path(domid, devid))
        if uuid_of(t, domid) == who.uuid:
            for frontend in FRONTENDS:  # a number is used once, whichever end has it
                t.remove(frontend_path(domid, devid, frontend))
        if not t.children(f"{BACKENDS}/{domid}"):
            t.remove(f"{BACKENDS}/{domid}")

    store.transaction(write)


def publish(store: XenStore, domid: int, devid: int, new: XenbusState) -> None:
    """Writes the backend's state."""
    store.write(f"{backend_path(domid, devid)}/state", str(int(new)))


def note_failed(store: XenStore, domid: int, devid: int, reason: str) -> None:
    """Remembers, beyond a restart of ours, that the device is not to be opened again."""
    store.write(f"{backend_path(domid, devid)}/host/failed", reason[:200])


def read_rings(store: XenStore, front: str) -> tuple[Ring, ...]:
    """The rings that the frontend with that directory offers; ViolationError names what is wrong with them."""
    return parse_rings(lambda key: store.read(f"{front}/{key}"))


def parse_rings(read: Callable[[str], str | None]) -> tuple[Ring, ...]:
    """The rings in a frontend's directory, of which read() returns a node's value or None."""
    version = read("version")
    if version != "1":
        raise ViolationError(f"frontend version is {_short(version)}, not 1")
    count = _number(read, "num-rings")
    if not 1 <= count <= MAX_RINGS:
        raise ViolationError(f"num-rings is {count}, not within 1..{MAX_RINGS}")
    rings = tuple(Ring(_number(read, f"ring-ref{i}"), _number(read, f"event-channel-{i}")) for i in range(count))
    if len({r.ref for r in rings}) < count or len({r.port for r in rings}) < count:
        raise ViolationError("two rings share a grant reference or an event channel")
    return rings


def _number(read: Callable[[str], str | None], key: str) -> int:
    text = read(key)
    if text is None or not _U32.fullmatch(text) or int(text) >= 1 << 32:
        raise ViolationError(f"{key} is {_short(text)}, not a number of 32 bits")
    return int(text)


def _short(text: str | None) -> str:
    return "missing" if text is None else f"{text!r:.40}"


def used_devids(store: XenStore, domid: int) -> set[int]:
    """The numbers of 9pfs devices that the guest has, whoever made them."""
    names = store.children(f"{BACKENDS}/{domid}")
    for kind in FRONTENDS.values():
        names += store.children(f"/local/domain/{domid}/device/{kind}")
    return {int(n) for n in names if n.isdigit()}


def left_devices(store: XenStore) -> list[Left]:
    """Every device of our kind in XenStore; what cannot be understood has an empty uuid."""
    found = []
    for domid in store.children(BACKENDS):
        for devid in store.children(f"{BACKENDS}/{domid}"):
            if domid.isdigit() and devid.isdigit():
                found.append(_left(store, int(domid), int(devid)))
    return found


def _left(store: XenStore, domid: int, devid: int) -> Left:
    back = backend_path(domid, devid)
    grant = Grant(
        export=store.read(f"{back}/host/export") or "",
        path=Path(store.read(f"{back}/host/path") or "/nonexistent"),
        tag=store.read(f"{back}/tag") or "",
        readonly=store.read(f"{back}/host/access") != "rw",
        auto=True,
        keys=Path(keys) if (keys := store.read(f"{back}/host/keys")) else None,
        frontend="user" if (store.read(f"{back}/frontend") or "").split("/")[-2:-1] == ["xen9p"] else "kernel",
    )
    uuid = store.read(f"{back}/host/uuid") or ""
    failed, narrowed = store.read(f"{back}/host/failed") or "", store.read(f"{back}/host/narrowed") == "1"
    return Left(domid, devid, uuid, grant, state(store, back), failed, narrowed)
