"""The server under fuzz: the real device on rings in memory, with what it must not touch beside its export."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.steps import Conversation, Index, Poke, Send, Step, Wait, is_strict
from xen9p import codec, lease_table, server
from xen9p.dataplane import DataPlane, Leases, Limits, Verdict
from xen9p.errors import ProtocolError
from xen9p.transport.memory import IN_CONS, IN_PROD, OUT_CONS, OUT_PROD, RING_ORDER, MemoryRing, MemoryRingTransport
from xen9p.users import Identity, Users

RINGS = 2
ORDER = 4
MAX_MSIZE = 1 << (ORDER + 10)
BATCH = 1 << (ORDER + 10)
PATIENCE = 10.0  # seconds until an answer that is due counts as missing
# Rates that count and hardly ever hold anything back.
LIMITS = Limits(
    max_fids=64,
    max_queued=16,
    max_bytes=2 * MAX_MSIZE,
    ops_per_second=10**6,
    bytes_per_second=10**9,
    pool_threads=2,
    python_threads=2,
    spin_us=0,
)
LEASE_TERM = 0.1  # seconds
USERS = (
    None,
    Users(checks=True, groups=((1000, (1000, 100)),)),
    Users(Identity(uids=((0, 100000, 1000),), gids=((0, 100000, 1000),)), checks=True, special=False),
    Users(Identity("root", 1000, 1000)),
)
SECRET = b"5d1f0c7e-what-no-guest-may-see"
"""The content of the file beside the export: it must never show up on a ring."""


class FindingError(Exception):
    """What the server must never do, in one line."""


@dataclass
class Outcome:
    """How a conversation went: messages that the server took, and how it ended."""

    messages: int = 0
    verdict: Verdict = Verdict.STOPPED
    replies: list[bytes] = field(default_factory=list)


class Target:
    """An export with a canary beside it, served anew for each conversation.

    Args:
        folder: an empty directory, for this object alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.export = folder / "export"
        self.canary = folder / "canary"
        self.canary.write_bytes(SECRET)
        self.clean()
        self._before = self._surroundings()
        self._rings = [MemoryRing(ORDER) for _ in range(RINGS)]
        self._leases = lease_table.new_table()

    def clean(self) -> None:
        """Makes the export's content anew."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.export)
        (self.export / "d" / "e").mkdir(parents=True)
        (self.export / "f").write_bytes(b"content of f\n" * 500)
        (self.export / "d" / "g").write_bytes(b"g")
        (self.export / "link").symlink_to(f"../{self.canary.name}")
        (self.export / "up").symlink_to("..")
        os.mkfifo(self.export / "fifo")

    def close(self) -> None:
        """Removes everything."""
        for ring in self._rings:
            ring.close()
        self._leases.close()
        shutil.rmtree(self.folder)

    def _surroundings(self) -> tuple[object, ...]:
        canary = self.canary.stat()
        kept = canary.st_ino, canary.st_mode, canary.st_uid, canary.st_nlink, canary.st_mtime_ns, canary.st_ctime_ns
        return sorted(os.listdir(self.folder)), self.canary.read_bytes(), kept

    def check_surroundings(self) -> None:
        """Raises FindingError if anything beside the export has changed."""
        if self._surroundings() != self._before:
            raise FindingError(f"what is beside the export changed: {self._surroundings()} was {self._before}")

    def run(self, conversation: Conversation) -> Outcome:
        """Has one conversation with a fresh device on the export as it is.

        Raises:
            FindingError: an answer too many, too few or wrong, the canary on a ring, no end.
        """
        return _Run(self.export, self._rings, self._leases, conversation).go()


class _Run:
    def __init__(self, export: Path, rings: list[MemoryRing], leases: Leases, conversation: Conversation) -> None:
        self.conversation = conversation
        self.rings = rings
        self.strict = is_strict(conversation)
        for ring in rings:
            ring.start_at(0)
            ring.write_index(RING_ORDER, ORDER)
            ring.data[:] = bytes(len(ring.data))
            for fd in (ring.to_back, ring.to_front):
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
        # Always the same for a conversation, so that it can be run again.
        users = USERS[zlib.crc32(repr(conversation[:4]).encode()) % len(USERS)] if os.geteuid() == 0 else None
        self.device = DataPlane(os.open(export, os.O_RDONLY | os.O_DIRECTORY), False, LIMITS, users=users)
        self.device.set_leases(leases, LEASE_TERM)
        for ring in rings:
            ring.serve_with(self.device)
        self.fronts = [MemoryRingTransport(ring, timeout=0) for ring in rings]
        self.sent = [bytearray() for _ in rings]
        self.replies: list[list[bytes]] = [[] for _ in rings]
        self.outcome = Outcome()
        self.thread = threading.Thread(target=self._serve)
        self.done = False

    def _serve(self) -> None:
        self.outcome.verdict = self.device.run(server.serve)
        self.done = True

    def go(self) -> Outcome:
        self.thread.start()
        try:
            self._talk()
            if self.strict:
                self._await_replies()
            else:
                time.sleep(0.001)  # something may yet happen, but nobody can say what
        finally:
            self.device.stop()
            self.thread.join(PATIENCE)
            if self.thread.is_alive():
                # Nothing can be freed under a running device.
                raise FindingError(f"the device does not end within {PATIENCE:g} s")
            self._receive()
            self.outcome.messages = self.device.stats()["requests"]
            reason = self.device.reason
            for front in self.fronts:
                front.close()
            self.device.close()
        # Indices that nobody uses any more mean a frontend that has gone; who writes to them can say so.
        fair = {Verdict.STOPPED, Verdict.PROTOCOL} | (set() if self.strict else {Verdict.HANGUP})
        if self.outcome.verdict not in fair:
            raise FindingError(f"the device ended with {self.outcome.verdict.name}: {reason}")
        self._check_memory()
        if self.strict:
            self._check_replies()
        self.outcome.replies = [reply for replies in self.replies for reply in replies]
        return self.outcome

    def _talk(self) -> None:
        for step in batched(self.conversation) if self.strict else self.conversation:
            if self.done:
                return
            if isinstance(step, Wait):
                self._settle()
                continue
            ring = self.rings[step.ring]
            match step:
                case Send(number, data):
                    self._send(number, data)
                case Index(_, offset, value):
                    ring.write_index(offset, value)
                    ring.wake_backend()
                case Poke(_, at, data):
                    start = (ring.index(OUT_PROD) - len(self.sent[step.ring]) + at) % ring.half
                    data = data[: ring.half - start]
                    ring.data[ring.half + start : ring.half + start + len(data)] = data

    def _send(self, number: int, data: bytes) -> None:
        if len(data) >= self.rings[number].half:
            return
        deadline = time.monotonic() + PATIENCE
        while not self.done:
            try:
                self.fronts[number].send(data)
            except (TimeoutError, ProtocolError) as error:
                if isinstance(error, ProtocolError) or not self.strict:
                    return  # we have broken the ring ourselves
                self._receive()
                if time.monotonic() > deadline:
                    raise FindingError("the server takes nothing off its ring any more") from None
                time.sleep(0.0002)
            else:
                self.sent[number] += data if self.strict else b""
                if not self.strict:
                    self.sent[number][:] = data
                break
        self._receive()

    def _receive(self) -> int:
        """Takes what replies there are off the rings."""
        count = 0
        for ring, front, replies in zip(self.rings, self.fronts, self.replies, strict=True):
            while ring.index(IN_PROD) != ring.index(IN_CONS):
                try:
                    replies.append(front.recv())
                    count += 1
                except (TimeoutError, ProtocolError, OSError) as error:
                    if self.strict:
                        raise FindingError(f"what is on the ring is no reply: {error}") from None
                    break
        return count

    def _idle(self) -> bool:
        """Whether the server has taken all that it can and has nothing in work."""
        taken = (
            ring.index(OUT_CONS) == ring.index(OUT_PROD) or not complete(sent)
            for ring, sent in zip(self.rings, self.sent, strict=True)
        )
        return all(taken) and self.device.stats()["in_flight"] == 0

    def _settle(self) -> None:
        deadline = time.monotonic() + (PATIENCE if self.strict else 0.01)
        while not self.done and not self._idle() and time.monotonic() < deadline:
            self._receive()
            time.sleep(0)

    def _await_replies(self) -> None:
        """Until as many answers are there as are due; those of flushed requests may stay out."""
        deadline = time.monotonic() + PATIENCE
        due = sum(len(requests) for requests in map(split, self.sent))
        flushes = sum(kind == codec.Tflush.type for sent in self.sent for kind, _ in split(sent))
        quiet = 0
        while not self.done:
            if self._receive():
                quiet = 0
                continue
            missing = due - sum(map(len, self.replies))
            if missing <= 0:
                return
            quiet += self._idle()
            if quiet > 3 and missing <= flushes:
                return
            if time.monotonic() > deadline:
                raise FindingError(f"{missing} answers are missing after {PATIENCE:g} s, with {flushes} Tflush")
            time.sleep(0.0002)

    def _check_memory(self) -> None:
        for ring in self.rings:
            # The half that the server writes to, and never the one that we fill ourselves.
            if SECRET in ring.data[: ring.half]:
                raise FindingError("the canary is on a ring: something beside the export was read")

    def _check_replies(self) -> None:
        for sent, replies in zip(self.sent, self.replies, strict=True):
            asked = Counter(split(sent))
            tags = Counter(tag for _, tag in split(sent))
            answers: Counter[int] = Counter()
            for reply in replies:
                tag, message = check_reply(reply)
                answers[tag] += 1
                if answers[tag] > tags[tag]:
                    raise FindingError(f"tag {tag} was answered {answers[tag]} times and used {tags[tag]} times")
                if not isinstance(message, codec.Rlerror) and not asked[message.type - 1, tag]:
                    raise FindingError(f"tag {tag} was answered with {type(message).__name__}, which nobody asked for")


def check_reply(reply: bytes) -> tuple[int, codec.Message]:
    """A reply's tag and content. Raises FindingError if it is too large or does not parse."""
    if len(reply) > MAX_MSIZE:
        raise FindingError(f"a reply has {len(reply)} bytes, more than any msize")
    try:
        tag, message = codec.decode(codec.strip_lease(reply)[0])
        if isinstance(message, codec.Rreaddir):
            for entry in codec.decode_dirents(message.data):
                if b"/" in entry.name or not entry.name:
                    raise FindingError(f"a directory entry is named {entry.name!r}")
    except ProtocolError as error:
        raise FindingError(f"a reply does not parse: {error}") from None
    if message.type % 2 == 0:
        raise FindingError(f"the server sent a request: {type(message).__name__}")
    return tag, message


def split(stream: bytes | bytearray) -> list[tuple[int, int]]:
    """(type, tag) of each whole message in a stream, as far as its sizes make sense."""
    found, at = [], 0
    while len(stream) - at >= codec.HEADER_SIZE:
        size = int.from_bytes(stream[at : at + 4], "little")
        if size < codec.HEADER_SIZE or size > len(stream) - at:
            break
        found.append((stream[at + 4], int.from_bytes(stream[at + 5 : at + 7], "little")))
        at += size
    return found


def batched(conversation: Conversation) -> Iterator[Step]:
    """The same conversation in larger pieces: what a ring gets between two waits goes at once, as far as it fits."""
    waiting = [bytearray() for _ in range(RINGS)]
    for step in conversation:
        if isinstance(step, Send) and len(waiting[step.ring]) + len(step.data) < BATCH:
            waiting[step.ring] += step.data
            continue
        for ring, data in enumerate(waiting):
            if data:
                yield Send(ring, bytes(data))
                data.clear()
        if isinstance(step, Send) and len(step.data) < BATCH:
            waiting[step.ring] += step.data
        else:
            yield step
    yield from (Send(ring, bytes(data)) for ring, data in enumerate(waiting) if data)


def complete(stream: bytes | bytearray) -> bool:
    """Whether a stream ends with the end of a message."""
    at = 0
    while len(stream) - at >= codec.HEADER_SIZE:
        size = int.from_bytes(stream[at : at + 4], "little")
        if size < codec.HEADER_SIZE or size > len(stream) - at:
            return False
        at += size
    return at == len(stream)
