"""What a conversation is made of: what a hostile guest does to its rings, one step after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from xen9p import codec


@dataclass(frozen=True, slots=True)
class Send:
    """Puts bytes on a ring and publishes them. They need not be one message, or a message at all."""

    ring: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Index:
    """Overwrites a u32 of a ring's interface page, at an offset in bytes."""

    ring: int
    offset: int
    value: int


@dataclass(frozen=True, slots=True)
class Poke:
    """Overwrites bytes of what was sent last on a ring, so many bytes from its start, while the server may read it."""

    ring: int
    at: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Wait:
    """Goes on when the server has answered what it has."""


Step: TypeAlias = Send | Index | Poke | Wait
Conversation: TypeAlias = tuple[Step, ...]


def is_strict(conversation: Conversation) -> bool:
    """Whether every reply can be foretold: nothing was changed after it was published, and nothing waits for others."""
    return all(
        isinstance(step, Wait) or (isinstance(step, Send) and step.data[4:5] != bytes((codec.Trevoke.type,)))
        for step in conversation
    )


def to_text(conversation: Conversation) -> str:
    """A conversation as lines of text that from_text() reads, for a file of a finding."""
    lines = []
    for step in conversation:
        match step:
            case Send(ring, data):
                lines.append(f"send {ring} {data.hex()}")
            case Index(ring, offset, value):
                lines.append(f"index {ring} {offset} {value}")
            case Poke(ring, at, data):
                lines.append(f"poke {ring} {at} {data.hex()}")
            case Wait():
                lines.append("wait")
    return "\n".join(lines) + "\n"


def from_text(text: str) -> Conversation:
    """The conversation in such a file.

    Raises:
        ValueError: a line is none of ours.
    """
    steps: list[Step] = []
    for line in text.splitlines():
        match line.split(" "):
            case ["send", ring, data]:
                steps.append(Send(int(ring), bytes.fromhex(data)))
            case ["index", ring, offset, value]:
                steps.append(Index(int(ring), int(offset), int(value)))
            case ["poke", ring, at, data]:
                steps.append(Poke(int(ring), int(at), bytes.fromhex(data)))
            case ["wait"]:
                steps.append(Wait())
            case _:
                raise ValueError(f"not a step of a conversation: {line[:40]!r}")
    return tuple(steps)
