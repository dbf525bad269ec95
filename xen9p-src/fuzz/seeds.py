"""Real conversations to begin with: what the client library and Linux's v9fs say, recorded while a server answers."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from fuzz.steps import Conversation, Send, Wait
from fuzz.target import LIMITS, ORDER, Target
from xen9p import codec, lease_table, server
from xen9p.client import Client
from xen9p.dataplane import DataPlane
from xen9p.transport.memory import MemoryRing, MemoryRingTransport

MSIZE = 16384


class Recorder(MemoryRingTransport):
    """A frontend that keeps what it sends."""

    def __init__(self, ring: MemoryRing) -> None:
        super().__init__(ring)
        self.sent: list[bytes] = []

    def send(self, data: bytes, /) -> None:
        self.sent.append(bytes(data))
        super().send(data)

    def post(self, data: bytes, /) -> bool:
        posted = super().post(data)
        if posted:
            self.sent.append(bytes(data))
        return posted


def look(client: Client, root: int) -> None:
    """ls -l and cat."""
    client.statfs(root)
    for entry in client.listdir(root):
        client.stat(root, entry.name)
    client.read_file(root, b"f")
    with client.walked(root, b"link") as link:
        client.readlink(link)


def write(client: Client, root: int) -> None:
    """An editor that saves: a new file, fsync, rename over the old one."""
    fid = client.walk(root)
    client.lcreate(fid, b"new", os.O_RDWR, 0o640)
    client.write_all(fid, 0, b"0123456789" * 700)
    client.fsync(fid, datasync=True)
    client.setattr(fid, mode=0o600, size=100, mtime_ns=10**18)
    client.clunk(fid)
    client.renameat(root, b"new", root, b"f")
    client.stat(root, b"f")


def tree(client: Client, root: int) -> None:
    """What tar does when it unpacks: directories, links, nodes, owners, times."""
    client.mkdir(root, b"t", 0o755)
    with client.walked(root, b"t") as folder:
        client.symlink(folder, b"s", b"../f")
        client.mknod(folder, b"fifo", stat.S_IFIFO | 0o600)
        with client.walked(root, b"f") as file:
            client.link(folder, file, b"hard")
        client.write_file(folder, b"a", b"a" * 3000)
        with client.walked(folder, b"a") as file:
            client.setattr(file, uid=1000, gid=1000, atime_ns=1, mtime_ns=2)
    with client.walked(root, b"d/g") as file, client.walked(root, b"t") as folder:
        client.rename(file, folder, b"moved")
    for name in (b"s", b"fifo", b"hard", b"a", b"moved"):
        client.remove(client.walk(root, b"t", name))
    client.unlinkat(root, b"t", codec.AT_REMOVEDIR)


def deep(client: Client, root: int) -> None:
    """Walks up, down and nowhere, on clones and on itself."""
    for names in ((b"d", b"e", b"..", b"g"), (b"..", b"..", b"d"), (b"d", b"none"), (b"up", b"f"), (b"link",)):
        with contextlib.suppress(OSError), client.walked(root, b"/".join(names)) as fid:
            client.getattr(fid)


def special(client: Client, root: int) -> None:
    """Locks, extended attributes, Tauth, Tflush, what cannot be opened."""
    fid = client.walk(root, b"f")
    client.lopen(fid, os.O_RDWR)
    attempts: Sequence[Callable[[], object]] = (
        lambda: client.lock(fid, codec.LOCK_TYPE_WRLCK, 0, 10, proc_id=7, client_id=b"guest"),
        lambda: client.getlock(fid, codec.LOCK_TYPE_RDLCK, 0, 0, client_id=b"guest"),
        lambda: client.lock(fid, codec.LOCK_TYPE_UNLCK, client_id=b"guest"),
        lambda: client.xattrcreate(client.walk(root, b"f"), b"user.a", 4, 0),
        lambda: client.xattrwalk(fid, b"user.a"),
        lambda: client.xattrwalk(fid),
        lambda: client.rpc(codec.Tauth(90, b"root", b"", 0)),
        lambda: client.rpc(codec.Tattach(91, codec.NOFID, b"root", b"other", 0)),
        lambda: client.rpc(codec.Tflush(5)),
        lambda: client.lopen(client.walk(root, b"fifo")),
        lambda: client.read(fid, 2**63, 100),
    )
    for attempt in attempts:
        with contextlib.suppress(OSError):
            attempt()
    client.remove(fid)


def leases(client: Client, root: int) -> None:
    """A client that keeps what it has looked at, and changes it itself."""
    client.rpc(codec.Tlease(codec.LEASE_OPEN))
    look(client, root)
    waiting = client.submit(codec.Trevoke(0), codec.Rrevoke)
    client.write_file(root, b"f", b"new")
    client.rpc(codec.Tlease(codec.LEASE_RENEW))
    client.renameat(root, b"f", root, b"h")
    client.rpc(codec.Tlease(codec.LEASE_CLOSE))
    with contextlib.suppress(OSError):
        waiting.result()


def remount(client: Client, root: int) -> None:
    """A second Tversion with fids open."""
    client.lopen(client.walk(root, b"f"))
    client.version()
    look(client, client.attach(n_uname=1000))


SCRIPTS: tuple[Callable[[Client, int], None], ...] = (look, write, tree, deep, special, leases, remount)


def record(script: Callable[[Client, int], None], export: Path) -> Conversation:
    """What the client says when it runs a script against a server of its own."""
    ring = MemoryRing(ORDER)
    device = DataPlane(os.open(export, os.O_RDONLY | os.O_DIRECTORY), False, LIMITS)
    table = lease_table.new_table()
    device.set_leases(table, 30)
    ring.serve_with(device)
    thread = threading.Thread(target=device.run, args=(server.serve,))
    thread.start()
    recorder = Recorder(ring)
    try:
        client = Client(recorder, MSIZE)
        client.version()
        script(client, client.attach())
    finally:
        device.stop()
        thread.join()
        recorder.close()
        device.close()
        table.close()
        ring.close()
    return tuple(step for data in recorder.sent for step in (Send(spread(data), data), Wait()))


def spread(message: bytes) -> int:
    """Which of two rings Linux takes for a message: by its tag."""
    return message[5] & 1


def record_all(target: Target) -> list[Conversation]:
    """Every script, each on a clean export."""
    conversations = []
    for script in SCRIPTS:
        target.clean()
        conversations.append(record(script, target.export))
    target.clean()
    return conversations
