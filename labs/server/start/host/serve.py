#!/opt/xen9p/bin/python3
"""Runs the server in server.py: for a client in this process (try), or for a guest of this host (guest).

serve.py try DIR: a client talks to the server over a ring in memory, and says what it gets.
serve.py guest NAME TAG NUMBER DIR: gives a running guest a device with that tag and number, and serves it; --talk FILE
writes down what the guest asks, a line for each request.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

from rings import Link, MemoryLink, XenLink
from xen9p import codec, xenbus
from xen9p.client import Client
from xen9p.codec import Message
from xen9p.device import XenbusState
from xen9p.errors import ProtocolError, Xen9pError
from xen9p.transport.memory import MemoryRing, MemoryRingTransport
from xen9p.xenstore import XenStore

KIND: Final = "xen9p_lab"
"""A backend kind of our own, so that neither xen9pd nor QEMU takes the device for theirs."""
RING_ORDER: Final = 5  # of a ring in memory: 64 KiB each way
PATIENCE: Final = 30.0  # seconds for the guest to offer rings, and to let go of them


class Server(Protocol):
    """What server.py has."""

    def answer(self, message: Message) -> Message:
        """The reply to one message."""


def reply(server: Server, message: Message) -> Message:
    """The answer to a request. An OSError becomes Rlerror; another exception is a mistake, and is said here, too."""
    try:
        return server.answer(message)
    except OSError as error:
        return codec.Rlerror(error.errno or errno.EIO)
    except Exception:
        print(f"{type(message).__name__}:", file=sys.stderr)
        traceback.print_exc(limit=-2)
        return codec.Rlerror(errno.EIO)


class Session:
    """Serves a link until it is told to stop.

    A guest that has mounted waits for its answers as long as it takes, and cannot be made to stop: so a server that is
    told to end while there is a mount goes on, and answers what it may not do any more with EIO, until the umount.
    """

    def __init__(self, server: Server, link: Link, talk: TextIO | None = None) -> None:
        self._server = server
        self._link = link
        self._talk = talk
        self._roots: set[int] = set()
        self._stop = False

    @property
    def mounted(self) -> bool:
        """Whether somebody has a root's fid."""
        return bool(self._roots)

    def stop(self, *_: object) -> None:
        """Ends as soon as nobody has it mounted; a handler of signals."""
        if self.mounted and not self._stop:
            print("still mounted: everything is EIO now, until the guest has unmounted", file=sys.stderr)
        self._stop = True

    def run(self, over: Callable[[], bool] = lambda: False) -> None:
        """Answers until stop(), or until over() says so; it is asked when there is nothing else to do.

        Raises:
            ProtocolError: the client sends what is no message.
        """
        while not (self._stop and not self.mounted):
            busy = False
            for ring in self._link.rings:
                request = ring.take(ring.half // 2)
                if request is not None:
                    tag, message = codec.decode(request)
                    ring.put(codec.encode(self._answer(message), tag))
                    busy = True
            if not busy:
                if over():
                    return
                self._link.wait(0.5)

    def _answer(self, message: Message) -> Message:
        if self._talk is not None:
            print(type(message).__name__, file=self._talk, flush=True)
        if self._stop and not isinstance(message, codec.Tclunk | codec.Tversion | codec.Tflush):
            return codec.Rlerror(errno.EIO)
        answer = reply(self._server, message)
        if isinstance(message, codec.Tversion):
            self._roots.clear()
        elif isinstance(message, codec.Tattach) and isinstance(answer, codec.Rattach):
            self._roots.add(message.fid)
        elif isinstance(message, codec.Tclunk):
            self._roots.discard(message.fid)
        return answer


def make(directory: Path, most: int) -> Server:
    """The server of server.py."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    made: Server = importlib.import_module("server").Server(directory, most)
    return made


# A client in another process, over a ring in memory.


def attempt(directory: Path) -> int:
    """Talks to the server message by message, and prints what comes back."""
    ring = MemoryRing(RING_ORDER)
    child = os.fork()
    if child == 0:
        link = MemoryLink(ring)
        try:
            Session(make(directory, ring.half // 2), link).run()
        finally:
            os._exit(0)
    try:
        talk(Client(MemoryRingTransport(ring, timeout=5.0)))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return 0


def talk(client: Client) -> None:
    """One message of each kind, and what came of it."""
    seen: dict[str, Any] = {}

    def step(name: str, action: Callable[[], object]) -> None:
        try:
            seen[name] = action()
            print(f"{name:12} {seen[name]!r:.100}")
        except (OSError, Xen9pError) as error:
            print(f"{name:12} {error}")

    step("Tversion", client.version)
    step("Tattach", client.attach)
    if "Tattach" not in seen:
        return
    root = seen["Tattach"]
    step("Tgetattr", lambda: oct(client.getattr(root).mode))
    step("Twalk", lambda: client.walk(root))
    directory = seen.get("Twalk", root)
    step("Tlopen", lambda: client.lopen(directory, os.O_RDONLY | os.O_DIRECTORY))
    step("Treaddir", lambda: [entry.name.decode() for entry in client.readdir(directory)])
    step("Tclunk", lambda: client.clunk(directory))
    names = [name for name in seen.get("Treaddir", []) if name not in (".", "..")]
    for name in names[:3]:
        step(f"read {name}", lambda name=name: client.read_file(root, name))  # type: ignore[misc]


# A guest.


def serve_guest(name: str, tag: str, number: int, directory: Path, talk: TextIO | None) -> int:
    """Gives the guest a device, or takes over the one that an earlier run has left, and serves it until a signal."""
    store = XenStore()
    domid = next((guest.domid for guest in xenbus.guests(store) if guest.name == name), None)
    if domid is None:
        raise Xen9pError(f"no guest {name} is running", hint="see xl list")
    back, front = f"/local/domain/0/backend/{KIND}/{domid}/{number}", f"/local/domain/{domid}/device/9pfs/{number}"
    if store.read(f"{front}/backend") != back:
        create(store, domid, tag, back, front)
    print(f"waiting for {name}", flush=True)
    await_state(store, front, (XenbusState.INITIALISED, XenbusState.CONNECTED), f"{name} offers no rings")
    offered = [(ring.ref, ring.port) for ring in xenbus.read_rings(store, front)]
    link = XenLink(domid, offered)
    session = Session(make(directory, link.rings[0].half // 2), link, talk)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, session.stop)
    store.write(f"{back}/state", str(int(XenbusState.CONNECTED)))
    print(f"{name} has tag {tag}", flush=True)
    try:
        session.run(over=lambda: store.read(f"{front}/state") not in ("3", "4"))
    finally:
        remove(store, link, back, front)
    return 0


def create(store: XenStore, domid: int, tag: str, back: str, front: str) -> None:
    """Both directories in one transaction, permissions first: as in the lab tour."""
    content = {
        back: {
            "frontend": front,
            "frontend-id": str(domid),
            "online": "1",
            "tag": tag,
            "versions": "1",
            "max-rings": str(xenbus.MAX_RINGS),
            # Not less: Linux takes the least that any device had as the most for all that are mounted later.
            "max-ring-page-order": str(xenbus.MAX_RING_ORDER),
            "state": str(int(XenbusState.INIT_WAIT)),
        },
        front: {"backend": back, "backend-id": "0", "tag": tag, "state": str(int(XenbusState.INITIALISING))},
    }

    def write(t: XenStore) -> None:
        if t.read(f"{front}/state") is not None:
            raise Xen9pError(f"{front} is there already", hint="take another number, or detach that device")
        for path, permissions in ((front, [f"n{domid}", "r0"]), (back, ["n0", f"r{domid}"])):
            t.remove(path)
            t.mkdir(path)
            t.set_permissions(path, permissions)
            for key, value in content[path].items():
                t.write(f"{path}/{key}", value)

    store.transaction(write)


def await_state(store: XenStore, directory: str, wanted: tuple[XenbusState, ...], what: str) -> None:
    """Waits for a side's state; Xen9pError after PATIENCE seconds."""
    store.watch(f"{directory}/state", "state")
    deadline = time.monotonic() + PATIENCE
    while xenbus.state(store, directory) not in wanted:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Xen9pError(f"{what} within {PATIENCE:g} s", hint="see dmesg in the guest")
        if not store.pending:
            select.select([store.fileno()], [], [], min(left, 1.0))
        store.events()
    store.unwatch(f"{directory}/state", "state")


def remove(store: XenStore, link: Link, back: str, front: str) -> None:
    """Closes in order: what is mapped goes first, so that the guest can take its pages back."""
    if xenbus.state(store, front) is not None:
        store.write(f"{back}/state", str(int(XenbusState.CLOSING)))
        with suppress(Xen9pError):
            await_state(store, front, (XenbusState.CLOSING, XenbusState.CLOSED), "the guest does not close")
    link.close()
    store.write(f"{back}/state", str(int(XenbusState.CLOSED)))
    for path in (front, back):
        store.remove(path)
    above = back.rpartition("/")[0]
    if not store.children(above):
        store.remove(above)


def main() -> int:
    """Runs the command; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("try", help="have a client talk to the server over a ring in memory")
    two = commands.add_parser("guest", help="serve a guest until Ctrl-C")
    two.add_argument("guest", metavar="NAME")
    two.add_argument("tag", metavar="TAG")
    two.add_argument("number", type=int, metavar="NUMBER", help="of the device")
    two.add_argument("--talk", type=argparse.FileType("a"), metavar="FILE", help="write down each request")
    for each in (one, two):
        each.add_argument("directory", type=Path, metavar="DIR")
    given = parser.parse_args()
    try:
        if not given.directory.is_dir():
            raise Xen9pError(f"{given.directory} is no directory", hint="name the one to serve")
        if given.command == "try":
            return attempt(given.directory)
        return serve_guest(given.guest, given.tag, given.number, given.directory, given.talk)
    except (Xen9pError, ProtocolError, OSError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
