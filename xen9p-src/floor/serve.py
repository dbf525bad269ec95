"""The floor as a process in dom0, and how soon a worker is ready: what a benchmark needs there besides xen9p itself.

serve.py build: compiles the floor.
serve.py serve GUEST TAG: gives the guest a device that the floor serves, until SIGTERM.
serve.py ready GUEST COUNT: waits for COUNT devices of xen9p and prints, for each, the seconds from the guest's rings to
the backend's state 4.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import cffi

from xen9p import xenbus
from xen9p.device import XenbusState
from xen9p.errors import Xen9pError
from xen9p.xenstore import XenStore

HERE: Final = Path(__file__).resolve().parent
DATAPLANE: Final = ("ring.c", "xen.c", "wait.c", "clock.c")
DECLARATIONS: Final = """
typedef struct floor_server floor_server;
floor_server *floor_new(uint64_t size, uint32_t files, uint32_t spin_us);
int floor_add_memory(floor_server *floor, uint8_t *page, uint8_t *data, uint32_t order, int wait_fd, int notify_fd);
int floor_add_xen(floor_server *floor, uint32_t domid, uint32_t ref, uint32_t port);
void floor_run(floor_server *floor);
void floor_stop(floor_server *floor);
uint64_t floor_requests(floor_server *floor);
const char *floor_reason(floor_server *floor);
void floor_free(floor_server *floor);
uint32_t x9_spin_us(void);
"""
BACKENDS: Final = "/local/domain/0/backend/xen9p_floor"
"""A kind of its own, so that neither xen9pd nor QEMU takes the device for theirs."""
DEVID: Final = 90
PATIENCE: Final = 60.0


def build(source: Path, library: Path) -> Path:
    """Compile the floor with the data plane in *source* into *library*.

    Raises:
        Xen9pError: it does not compile; the message has the compiler's first error.
    """
    units = [str(HERE / "floor.c"), *(str(source / name) for name in DATAPLANE)]
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-shared", "-fPIC", "-pthread"]
    command = ["gcc", *options, f"-I{source}", *units, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = [line for line in done.stderr.splitlines() if "error" in line] or ["no output"]
        raise Xen9pError(f"the floor does not compile: {words[0]}", hint=f"is {source} the data plane of this xen9p?")
    return library


class Floor:
    """A floor that serves *files* files of *size* bytes, read-0 and so on, to one peer.

    Args:
        library: what build() has made.
        spin_us: as a worker's; None for what pays on this machine.
    """

    def __init__(self, library: Path, size: int, files: int, spin_us: int | None = None) -> None:
        self.ffi = cast(Any, cffi.FFI())
        self.ffi.cdef(DECLARATIONS)
        self.lib: Any = self.ffi.dlopen(str(library))
        self._keep: list[Any] = []
        self._floor = self.lib.floor_new(size, files, self.lib.x9_spin_us() if spin_us is None else spin_us)
        if self._floor == self.ffi.NULL:
            raise Xen9pError("cannot make a floor", hint="out of memory")

    def add_memory_ring(self, page: Any, data: Any, order: int, wait_fd: int, notify_fd: int) -> None:
        """Serves a ring in memory; the arguments are those of DataPlane.add_memory_ring."""
        page, data = (self.ffi.from_buffer("uint8_t[]", part, require_writable=True) for part in (page, data))
        self._keep += [page, data]
        self._check(self.lib.floor_add_memory(self._floor, page, data, order, wait_fd, notify_fd))

    def add_xen_ring(self, domid: int, ref: int, port: int) -> None:
        """Maps a guest's ring and binds its event channel."""
        self._check(self.lib.floor_add_xen(self._floor, domid, ref, port))

    def _check(self, err: int) -> None:
        if err:
            reason = self.ffi.string(self.lib.floor_reason(self._floor)).decode(errors="replace")
            raise Xen9pError(f"the floor: {reason or os.strerror(err)}", errno=err)

    @property
    def requests(self) -> int:
        """How many messages it has answered."""
        return int(self.lib.floor_requests(self._floor))

    def run(self) -> None:
        """Serves until stop(), or until the peer has gone."""
        self.lib.floor_run(self._floor)

    def stop(self) -> None:
        """Makes run() return; from any thread, or from a signal's handler."""
        self.lib.floor_stop(self._floor)

    def close(self) -> None:
        """Frees everything, once run() has returned."""
        self.lib.floor_free(self._floor)
        for part in self._keep:
            self.ffi.release(part)


def create(store: XenStore, domid: int, tag: str) -> tuple[str, str]:
    """Make both directories of the device, in one transaction, as xenbus.create() does; (backend's, frontend's)."""
    back, front = f"{BACKENDS}/{domid}/{DEVID}", f"/local/domain/{domid}/device/9pfs/{DEVID}"
    content: Mapping[str, Mapping[str, str]] = {
        front: {"backend": back, "backend-id": "0", "tag": tag, "state": "1"},
        back: {
            "frontend": front,
            "frontend-id": str(domid),
            "online": "1",
            "tag": tag,
            "versions": "1",
            "max-rings": str(xenbus.MAX_RINGS),
            "max-ring-page-order": str(xenbus.MAX_RING_ORDER),
            "state": str(int(XenbusState.INIT_WAIT)),
        },
    }

    def write(t: XenStore) -> None:
        for directory, permissions in ((front, [f"n{domid}", "r0"]), (back, ["n0", f"r{domid}"])):
            t.remove(directory)
            t.mkdir(directory)
            t.set_permissions(directory, permissions)
        for directory in (back, front):
            for key, value in content[directory].items():
                t.write(f"{directory}/{key}", value)

    store.transaction(write)
    return back, front


def wait_events(store: XenStore, deadline: float, what: str) -> list[tuple[str, str]]:
    """Return the next events of *store*; Xen9pError naming *what* when none comes until *deadline* (monotonic)."""
    while not (events := store.events()):
        left = deadline - time.monotonic()
        if left <= 0:
            raise Xen9pError(f"{what} within {PATIENCE:.0f} s", hint="see xenstore-ls and the guest's dmesg")
        select.select([store.fileno()], [], [], left)
    return events


def find(store: XenStore, name: str) -> int:
    """The domid of a guest by name."""
    for guest in xenbus.guests(store):
        if guest.name == name:
            return guest.domid
    raise Xen9pError(f"no guest {name}", hint="see xl list")


def serve(name: str, tag: str, library: Path, size: int, files: int) -> int:
    """Serve a device of guest *name* until SIGTERM, and take it away again."""
    store = XenStore()
    domid = find(store, name)
    floor = Floor(library, size, files)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: floor.stop())
    back, front = create(store, domid, tag)
    try:
        store.watch(f"{front}/state", "state")
        deadline = time.monotonic() + PATIENCE
        while xenbus.state(store, front) != XenbusState.INITIALISED:
            wait_events(store, deadline, f"{name} does not offer rings for the tag {tag}")
        for ring in xenbus.read_rings(store, front):
            floor.add_xen_ring(domid, ring.ref, ring.port)
        store.write(f"{back}/state", str(int(XenbusState.CONNECTED)))
        print("serving", flush=True)
        # In a thread of its own: a signal's handler runs in this one, and between two instructions of Python only.
        _run_beside(floor)
    finally:
        floor.close()
        store.write(f"{back}/state", str(int(XenbusState.CLOSED)))
        store.remove(f"{BACKENDS}/{domid}")
    return 0


def _run_beside(floor: Floor) -> None:
    thread = threading.Thread(target=floor.run)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)


def ready(name: str, count: int) -> int:
    """Print, as JSON, for *count* devices of guest *name*: tag -> seconds from published rings to connected."""
    store = XenStore()
    domid = find(store, name)
    published: dict[str, float] = {}
    found: dict[str, float] = {}
    fronts = tuple(f"/local/domain/{domid}/device/{kind}" for kind in xenbus.FRONTENDS.values())
    for path in (*fronts, f"{xenbus.BACKENDS}/{domid}"):
        store.watch(path, "any")
    print("watching", flush=True)
    deadline = time.monotonic() + PATIENCE
    # The guest's own state may have gone on when we read it; its first ring is published once.
    told = re.compile(r".*/(\d+)/(?:state|ring-ref0)")
    while len(found) < count:
        events = wait_events(store, deadline, f"only {len(found)} of {count} devices of {name} were connected")
        now = time.monotonic()
        for path, _ in events:
            if not (match := told.fullmatch(path)):
                continue
            devid = match[1]
            if path.startswith(fronts):
                if path.endswith("/ring-ref0"):
                    published.setdefault(devid, now)
            elif devid in published and store.read(path) == "4":
                tag = store.read(f"{xenbus.BACKENDS}/{domid}/{devid}/tag") or devid
                found.setdefault(tag, round(now - published[devid], 4))
    print(json.dumps(found), flush=True)
    return 0


def main() -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    make = commands.add_parser("build", help="compile the floor")
    make.add_argument("--source", type=Path, required=True, metavar="DIR", help="xen9p's data plane, in C")
    make.add_argument(
        "--library",
        type=Path,
        required=True,
        metavar="FILE.so",
        help="what to make, on a filesystem that may hold programs",
    )
    one = commands.add_parser("serve", help="serve a device of a guest until SIGTERM")
    one.add_argument("guest", metavar="GUEST")
    one.add_argument("tag", metavar="TAG")
    one.add_argument("--library", type=Path, required=True, metavar="FILE.so", help="what build has made")
    one.add_argument("--size", type=int, required=True, metavar="BYTES", help="of each file")
    one.add_argument("--files", type=int, required=True, metavar="N", help="how many")
    two = commands.add_parser("ready", help="measure how soon devices are connected")
    two.add_argument("guest", metavar="GUEST")
    two.add_argument("count", type=int, metavar="COUNT")
    given = parser.parse_args()
    try:
        if given.command == "ready":
            return ready(given.guest, given.count)
        if given.command == "build":
            build(given.source, given.library)
            return 0
        return serve(given.guest, given.tag, given.library, given.size, given.files)
    except (Xen9pError, OSError) as error:
        print(f"floor: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
