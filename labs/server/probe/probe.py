"""What the checks ask of a student's server.py: a real client talks to it over a ring in memory. Runs on the host.

probe.py NAME: prints, as JSON, for each part of that check "" if it holds, else [what was expected, what was found].
It lies beside rings.py and serve.py as they are handed out, and beside the student's server.py.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import serve
from rings import MemoryLink
from xen9p import codec
from xen9p.client import Client
from xen9p.codec import Message
from xen9p.errors import Xen9pError
from xen9p.transport.memory import MemoryRing, MemoryRingTransport

MANY: Final = 150
FREE: Final = 7777  # a fid that no client hands out so soon
PATIENCE: Final = 4.0

Found = str | tuple[str, str]
OK: Final = ""
SILENT: Final = "an answer"


@dataclass
class Tried:
    """A client that is attached, what the server serves, and the server's process."""

    client: Client
    root: int
    tree: Path
    outside: Path
    content: bytes
    pid: int

    def reply(self, message: Message) -> Message:
        """The reply, Rlerror too."""
        try:
            return self.client.rpc(message)
        except OSError as error:
            if error.errno is None or isinstance(error, TimeoutError):
                raise
            return codec.Rlerror(error.errno)

    def opened(self, *names: bytes, flags: int = os.O_RDONLY) -> int:
        """A fid of what lies there, open."""
        fid = self.client.walk(self.root, *names)
        self.client.lopen(fid, flags)
        return fid


def wanted(holds: bool, expected: str, found: object) -> Found:
    """Whether it is as expected."""
    return OK if holds else (expected, f"{found!r:.150}")


def refused(reply: Message, expected: str, *numbers: int) -> Found:
    """Whether it is an error, one of these if some are named."""
    holds = isinstance(reply, codec.Rlerror) and (not numbers or reply.ecode in numbers)
    return wanted(holds, expected, _short(reply))


def _short(reply: Message) -> str:
    if isinstance(reply, codec.Rlerror):
        return "EOPNOTSUPP" if reply.ecode == errno.EOPNOTSUPP else errno.errorcode.get(reply.ecode, str(reply.ecode))
    return type(reply).__name__


def inode(path: Path) -> int:
    """What a qid's path is."""
    return path.lstat().st_ino


# The checks, a function for each; their parts are in the order in which they are tried.


def clone(t: Tried) -> Found:
    fid = t.client.walk(t.root)
    return wanted(
        t.client.getattr(fid).qid.path == inode(t.tree), "without names: a second fid of the same file", "another"
    )


def deep(t: Tried) -> Found:
    reply = t.client.rpc(codec.Twalk(t.root, FREE, (b"a", b"b", b"file")))
    assert isinstance(reply, codec.Rwalk)
    paths = [inode(t.tree / "a"), inode(t.tree / "a/b"), inode(t.tree / "a/b/file")]
    if [qid.path for qid in reply.wqids] != paths:
        return "a qid for each of three names", f"{len(reply.wqids)} qids"
    size = t.client.getattr(FREE).size
    return wanted(size == len(t.content), "newfid is the file at the end of the names", f"one of {size} bytes")


def partial(t: Tried) -> Found:
    reply = t.reply(codec.Twalk(t.root, FREE, (b"a", b"nothing", b"file")))
    if not isinstance(reply, codec.Rwalk) or len(reply.wqids) != 1:
        return "one qid where the second name leads nowhere", _short(reply)
    return refused(t.reply(codec.Tgetattr(FREE, codec.GETATTR_BASIC)), "no newfid then (EBADF)", errno.EBADF)


def missing(t: Tried) -> Found:
    return refused(
        t.reply(codec.Twalk(t.root, FREE, (b"nothing",))), "ENOENT where the first name leads nowhere", errno.ENOENT
    )


def in_use(t: Tried) -> Found:
    other = t.client.walk(t.root, b"a")
    reply = t.reply(codec.Twalk(t.root, other, (b"top",)))
    return refused(reply, "EBADF for a newfid that is in use", errno.EBADF)


def itself(t: Tried) -> Found:
    fid = t.client.walk(t.root)
    t.client.rpc(codec.Twalk(fid, fid, (b"a", b"b")))
    return wanted(t.client.getattr(fid).qid.path == inode(t.tree / "a/b"), "newfid may be fid itself", "it was not")


def whole(t: Tried) -> Found:
    return wanted(t.client.read_file(t.root, "a/b/file") == t.content, "all bytes of a file", "other bytes")


def piece(t: Tried) -> Found:
    found = t.client.read(t.opened(b"a", b"b", b"file"), 1000, 50)
    return wanted(found == t.content[1000:1050], "50 bytes from byte 1000 on", found)


def end(t: Tried) -> Found:
    found = t.client.read(t.opened(b"a", b"b", b"file"), len(t.content) + 5, 50)
    return wanted(found == b"", "nothing behind the end", found)


def large(t: Tried) -> Found:
    reply = t.reply(codec.Tread(t.opened(b"a", b"b", b"file"), 0, 0xFFFFFFFF))
    if not isinstance(reply, codec.Rread):
        return "as much as a message holds, for a count of 4 GiB", _short(reply)
    holds = 0 < len(reply.data) <= t.client.msize - codec.READ_OVERHEAD and t.content.startswith(reply.data)
    return wanted(holds, "as much as a message holds, for a count of 4 GiB", f"{len(reply.data)} bytes")


def unopened(t: Tried) -> Found:
    fid = t.client.walk(t.root, b"top")
    return refused(t.reply(codec.Tread(fid, 0, 10)), "EBADF for a file that is not open", errno.EBADF)


def written(t: Tried) -> Found:
    data = secrets.token_bytes(40_000)
    t.client.write_all(t.opened(b"target", flags=os.O_RDWR), 3, data)
    return wanted((t.tree / "target").read_bytes() == b"old" + data, "40000 bytes written at byte 3", "others")


def readonly(t: Tried) -> Found:
    reply = t.reply(codec.Twrite(t.opened(b"target"), 0, b"x"))
    return refused(reply, "EBADF for writing to what is open for reading", errno.EBADF)


def names_of(t: Tried, count: int | None) -> list[bytes]:
    for number in range(MANY):
        (t.tree / "many" / f"a-file-with-a-long-name-{number}").touch()
    fid, found, offset = t.opened(b"many"), list[bytes](), 0
    while entries := t.client.readdir(fid, offset, count):
        found += [entry.name for entry in entries]
        offset = entries[-1].offset
        if len(found) > 3 * MANY:
            break
    return [name for name in found if name not in (b".", b"..")]


def _listed(found: list[bytes]) -> Found:
    right = sorted(os.fsencode(f"a-file-with-a-long-name-{n}") for n in range(MANY))
    expected = f"each of {MANY} names once"
    if sorted(found) == right:
        return OK
    return expected, f"{len(found)} names, {len(set(found))} different ones"


def every(t: Tried) -> Found:
    return _listed(names_of(t, None))


def small(t: Tried) -> Found:
    return _listed(names_of(t, 200))


def of_file(t: Tried) -> Found:
    return refused(t.reply(codec.Treaddir(t.opened(b"top"), 0, 1000)), "an error for Treaddir of a file")


def gone(t: Tried) -> Found:
    fid = t.client.walk(t.root, b"top")
    t.client.rpc(codec.Tclunk(fid))
    return refused(t.reply(codec.Tgetattr(fid, codec.GETATTR_BASIC)), "EBADF for a fid after Tclunk", errno.EBADF)


def unknown(t: Tried) -> Found:
    return refused(t.reply(codec.Tclunk(FREE)), "EBADF for a fid that is none", errno.EBADF)


def descriptors(t: Tried) -> Found:
    def held() -> int:
        return len(os.listdir(f"/proc/{t.pid}/fd"))

    def round_() -> None:
        for names in ((b"top",), (b"many",)):
            t.client.clunk(t.opened(*names))

    round_()
    before = held()
    for _ in range(30):
        round_()
    return wanted(held() - before < 10, "no more descriptors after 60 files than before", f"{held() - before} more")


def dotdot(t: Tried) -> Found:
    for names in ((b"..",), (b"a", b"..", b"..", b"..")):
        reply = t.reply(codec.Twalk(t.root, FREE, names))
        if not isinstance(reply, codec.Rwalk) or [qid.path for qid in reply.wqids][-1:] != [inode(t.tree)]:
            return "'..' at the root stays at the root", _short(reply)
        t.client.rpc(codec.Tclunk(FREE))
    return OK


def slash(t: Tried) -> Found:
    for name in (b"a/b", b"../" + os.fsencode(t.outside.name), b"", b".", b"a\0"):
        reply = t.reply(codec.Twalk(t.root, FREE, (name,)))
        if not isinstance(reply, codec.Rlerror):
            return f"an error for the name {name!r}", _short(reply)
    return OK


def link(t: Tried) -> Found:
    reply = t.reply(codec.Twalk(t.root, FREE, (b"out", b"secret")))
    if isinstance(reply, codec.Rwalk) and len(reply.wqids) == 2:
        return "nothing below a symbolic link", "what it leads to"
    fid = t.client.walk(t.root, b"out-file")
    return refused(t.reply(codec.Tlopen(fid, os.O_RDONLY)), "an error for opening a symbolic link")


def moved(t: Tried) -> Found:
    fid = t.client.walk(t.root, b"leaves", b"below")
    (t.tree / "leaves").rename(t.outside / "left")
    reply = t.reply(codec.Twalk(fid, FREE, (b"..", b"..")))
    away = {inode(t.outside), inode(t.outside / "left")}
    holds = not isinstance(reply, codec.Rwalk) or not away & {qid.path for qid in reply.wqids}
    return wanted(holds, "no way out by '..' from a directory that was moved away", "what lies above it now")


def fifo(t: Tried) -> Found:
    fid = t.client.walk(t.root, b"fifo")
    return refused(t.reply(codec.Tlopen(fid, os.O_RDONLY)), "an error for opening a FIFO")


CHECKS: Final[dict[str, tuple[Callable[[Tried], Found], ...]]] = {
    "walk": (clone, deep, partial, missing, in_use, itself),
    "data": (whole, piece, end, large, unopened, written, readonly),
    "entries": (every, small, of_file),
    "clunk": (gone, unknown, descriptors),
    "safe": (dotdot, slash, link, moved, fifo),
}


def tree(folder: Path, content: bytes) -> tuple[Path, Path]:
    """What is served, and what lies beside it."""
    inside, outside = folder / "served", folder / "outside"
    for path in (inside / "a/b", inside / "many", inside / "leaves/below", outside):
        path.mkdir(parents=True)
    (inside / "a/b/file").write_bytes(content)
    (inside / "top").write_text("top\n")
    (inside / "target").write_text("old")
    (outside / "secret").write_text("secret\n")
    (inside / "out").symlink_to("../outside")
    (inside / "out-file").symlink_to("../outside/secret")
    os.mkfifo(inside / "fifo")
    return inside, outside


def part(try_one: Callable[[Tried], Found]) -> Found:
    """One part, with a server and a client of its own."""
    ring = MemoryRing(serve.RING_ORDER)
    with tempfile.TemporaryDirectory() as folder:
        content = secrets.token_bytes(100_000)
        inside, outside = tree(Path(folder), content)
        pid = os.fork()
        if pid == 0:
            try:
                with open(os.devnull, "w") as null:
                    os.dup2(null.fileno(), 1)
                serve.Session(serve.make(inside, ring.half // 2), MemoryLink(ring)).run()
            finally:
                os._exit(1)
        try:
            client, root = Client.connect(MemoryRingTransport(ring, timeout=PATIENCE))
            return try_one(Tried(client, root, inside, outside, content, pid))
        except TimeoutError:
            gone = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return SILENT, "the server has ended: see ./serve.py try" if gone else "none: it hangs"
        except (OSError, Xen9pError) as error:
            return "no error", str(error)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def main() -> int:
    """Tries the parts of one check; one that gets no answer ends it."""
    found: dict[str, Found] = {}
    silent = False
    for try_one in CHECKS[sys.argv[1]]:
        one = (SILENT, "not tried") if silent else part(try_one)
        silent = silent or one[:1] == (SILENT,)
        found[try_one.__name__] = one
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
