"""Changes to conversations: of a field, of bytes, of order, of the ring itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from fuzz.steps import Conversation, Index, Poke, Send, Step, Wait
from xen9p import codec
from xen9p.errors import Xen9pError
from xen9p.transport.memory import IN_CONS, IN_PROD, OUT_CONS, OUT_PROD, RING_ORDER

# fmt: off
NUMBERS = (
    0, 1, 2, 3, 6, 7, 8, 15, 16, 17, 100, 255, 256, 4095, 4096, 8191, 16384, 16385, 65535, 65536, 2**24, 2**31 - 1,
    2**31, 2**32 - 5, 2**32 - 2, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 0o40777, 0o100644, 0o10600, 0o20600,
    0o120777, 0x40, 0x200, 0x241, 0x4000, 0x10000, 0x410000,
)
NAMES = (
    b"", b".", b"..", b"/", b"a/b", b"../..", b"f", b"d", b"e", b"g", b"t", b"new", b"link", b"up", b"fifo", b"none",
    b"\0", b"a\0b", b"x" * 255, b"x" * 256, b"y" * 4095, b"/proc/self/root", b"\xff\xfe", b"9P2000.L",
    b"9P2000", b"user.a", b"security.capability", b"system.posix_acl_access", b"canary", b"../canary",
)
# fmt: on
FIDS = (0, 1, 2, 3, 4, 5, 90, codec.NOFID)
MOST_STEPS = 600
MOST_BYTES = 200_000


class Mutator:
    """Makes new conversations out of known ones.

    Args:
        chance: where all decisions come from, so that a run can be repeated.
        corpus: the conversations to begin with; the caller may append to it.
    """

    def __init__(self, chance: random.Random, corpus: list[Conversation]) -> None:
        self.chance = chance
        self.corpus = corpus
        self.short: list[Conversation] = []
        """Those that the server ends: of interest, but little follows from them."""

    def next(self) -> Conversation:
        """A conversation that differs from one of the corpus in a few places."""
        short = self.short and self.chance.random() < 0.15
        steps = list(self.chance.choice(self.short if short else self.corpus))
        for _ in range(self.chance.choice((0, 0, 1, 3))):
            steps += self._moved(self.chance.choice(self.corpus))
        if self.chance.random() < 0.92:  # all at once, but for the handshake
            steps = steps[:4] + [step for step in steps[4:] if not isinstance(step, Wait)]
        for _ in range(self.chance.choice((1, 1, 2, 3, 5, 8))):
            steps = self.chance.choice(_MUTATIONS)(self, steps)
        if self.chance.random() < 0.05:
            steps = self._break_ring(steps)
        return tuple(_bounded(steps))

    def _somewhere(self, steps: Sequence[Step]) -> int:
        """The place of a message, most often after the handshake."""
        places = [at for at, step in enumerate(steps) if isinstance(step, Send)]
        late = [at for at in places if at > 3]
        if late and self.chance.random() < 0.95:
            places = late
        return self.chance.choice(places) if places else -1

    def _field(self, steps: list[Step]) -> list[Step]:
        at = self._somewhere(steps)
        step = steps[at] if at >= 0 else None
        if not isinstance(step, Send):
            return steps
        try:
            tag, message = codec.decode(step.data)
            name = self.chance.choice([name for name, _ in message._plan])
            value = self._value(name, getattr(message, name))
            data = codec.encode(replace(cast(Any, message), **{name: value}), tag)
        except (Xen9pError, ValueError, OverflowError, IndexError, TypeError, AttributeError):
            return self._bytes(steps)  # not a message any more, or none with such a field
        return [*steps[:at], Send(step.ring, data), *steps[at + 1 :]]

    def _value(self, name: str, old: Any) -> Any:
        chance = self.chance
        if isinstance(old, int):
            if "fid" in name and chance.random() < 0.8:
                return chance.choice(FIDS)
            kinds = (chance.choice(NUMBERS), old ^ 1 << chance.randrange(32), (old + chance.randint(-3, 3)) % 2**32)
            return chance.choice(kinds)
        if isinstance(old, bytes):
            return chance.choice((chance.choice(NAMES), old + old, old[: len(old) // 2], bytes(chance.randrange(9000))))
        if isinstance(old, tuple):
            return tuple(chance.choice(NAMES[:24]) for _ in range(chance.randrange(codec.MAX_WALK + 1)))
        raise TypeError(name)

    def _bytes(self, steps: list[Step]) -> list[Step]:
        at = self._somewhere(steps)
        step = steps[at] if at >= 0 else None
        if not isinstance(step, Send) or not step.data:
            return steps
        data = bytearray(step.data)
        for _ in range(self.chance.randint(1, 3)):
            data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
        if self.chance.random() < 0.3:
            data = data[: self.chance.randrange(len(data) + 1)]
        if self.chance.random() < 0.6:  # a size that is right, so that what follows is looked at
            data[:4] = len(data).to_bytes(4, "little")
        return [*steps[:at], Send(step.ring, bytes(data)), *steps[at + 1 :]]

    def _tag(self, steps: list[Step]) -> list[Step]:
        at = self._somewhere(steps)
        step = steps[at] if at >= 0 else None
        if not isinstance(step, Send):
            return steps
        tag = self.chance.choice((0, 1, codec.NOTAG, self.chance.randrange(40)))
        return [
            *steps[:at],
            Send(step.ring, step.data[:5] + tag.to_bytes(2, "little") + step.data[7:]),
            *steps[at + 1 :],
        ]

    def _type(self, steps: list[Step]) -> list[Step]:
        at = self._somewhere(steps)
        step = steps[at] if at >= 0 else None
        if not isinstance(step, Send):
            return steps
        kind = self.chance.choice((*_REQUESTS, *_REQUESTS, self.chance.randrange(256)))
        return [*steps[:at], Send(step.ring, step.data[:4] + bytes([kind]) + step.data[5:]), *steps[at + 1 :]]

    def _drop(self, steps: list[Step]) -> list[Step]:
        at = self._somewhere(steps)
        return steps[:at] + steps[at + self.chance.randint(1, 4) :] if at >= 0 else steps

    def _again(self, steps: list[Step]) -> list[Step]:
        """A stretch twice; its tags differ, so that it is no protocol error at once."""
        at = self._somewhere(steps)
        some = self._moved(steps[at : at + self.chance.randint(1, 8)])
        to = self.chance.randrange(len(steps) + 1)
        return [*steps[:to], *some, *steps[to:]]

    def _moved(self, steps: Sequence[Step]) -> list[Step]:
        """The same with other tags: one that is in use already would end the device at once."""
        by = self.chance.randrange(60000)
        moved: list[Step] = []
        for step in steps:
            if isinstance(step, Send) and len(step.data) >= codec.HEADER_SIZE:
                tag = (int.from_bytes(step.data[5:7], "little") + by) % codec.NOTAG
                step = Send(step.ring, step.data[:5] + tag.to_bytes(2, "little") + step.data[7:])  # noqa: PLW2901
            moved.append(step)
        return moved

    def _splice(self, steps: list[Step]) -> list[Step]:
        other = self.chance.choice(self.corpus)
        at, since = self._somewhere(steps), self.chance.randrange(len(other) + 1)
        return [*steps[: max(at, 0)], *self._moved(other[since:]), *steps[max(at, 0) :]]

    def _swap(self, steps: list[Step]) -> list[Step]:
        first, second = self._somewhere(steps), self._somewhere(steps)
        if first >= 0:
            steps[first], steps[second] = steps[second], steps[first]
        return steps

    def _flush(self, steps: list[Step]) -> list[Step]:
        at = self._somewhere(steps)
        step = steps[at] if at >= 0 else None
        if not isinstance(step, Send) or len(step.data) < codec.HEADER_SIZE:
            return steps
        flush = codec.encode(codec.Tflush(int.from_bytes(step.data[5:7], "little")), 5000 + self.chance.randrange(9))
        return [*steps[: at + 1], Send(self.chance.randrange(2), flush), *steps[at + 1 :]]

    def _ring(self, steps: list[Step]) -> list[Step]:
        at = self._somewhere(steps)
        step = steps[at] if at >= 0 else None
        return [*steps[:at], Send(1 - step.ring, step.data), *steps[at + 1 :]] if isinstance(step, Send) else steps

    def _session(self, steps: list[Step]) -> list[Step]:
        """A Tversion in the middle of everything."""
        at = max(self._somewhere(steps), 0)
        msize = self.chance.choice((0, 4095, 4096, 8192, 2**32 - 1))
        message = codec.Tversion(msize, self.chance.choice((codec.VERSION, b"9P2000.L.more", b"9P2000", b"")))
        return [*steps[:at], Send(self.chance.randrange(2), codec.encode(message, codec.NOTAG)), *steps[at:]]

    def _break_ring(self, steps: list[Step]) -> list[Step]:
        at = self._somewhere(steps)
        step = steps[at] if at >= 0 else None
        if not isinstance(step, Send):
            return steps
        for _ in range(self.chance.randint(1, 4)):
            offset = self.chance.choice((IN_CONS, IN_PROD, OUT_CONS, OUT_PROD, OUT_PROD, RING_ORDER))
            data = bytes([self.chance.randrange(256)]) * self.chance.randint(1, 4)
            poke = Poke(step.ring, self.chance.randrange(30), data)
            index = Index(step.ring, offset, self.chance.choice((*NUMBERS, self.chance.randrange(2**17))) % 2**32)
            steps.insert(at + 1, self.chance.choice((poke, poke, index)))
        return steps


_REQUESTS = tuple(kind for kind in codec.MESSAGES if kind % 2 == 0)
_MUTATIONS: tuple[Callable[[Mutator, list[Step]], list[Step]], ...] = (
    *[Mutator._field] * 10, Mutator._bytes, Mutator._tag, Mutator._type, *[Mutator._drop] * 2, *[Mutator._again] * 2,
    *[Mutator._splice] * 2, *[Mutator._swap] * 2, *[Mutator._flush] * 2, *[Mutator._ring] * 2, *[Mutator._session] * 2,
)  # fmt: skip


def _bounded(steps: Sequence[Step]) -> list[Step]:
    """As much of a conversation as is worth a run."""
    kept: list[Step] = []
    size = 0
    for step in steps[:MOST_STEPS]:
        size += len(step.data) if isinstance(step, Send) else 0
        if size > MOST_BYTES:
            break
        kept.append(step)
    return kept
