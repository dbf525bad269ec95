"""The fuzzers themselves: their seeds are real and whole, and what they shall find they find when it is planted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fuzz import lifecycle
from fuzz.seeds import record_all
from fuzz.steps import Conversation, Index, Poke, Send, Wait, from_text, is_strict, to_text
from fuzz.target import FindingError, Target, check_reply, split
from hostile import REQUESTS
from xen9p import codec
from xen9p.dataplane import Verdict
from xen9p.device import Device, Timer


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path)


def spoken(*messages: codec.Message) -> Conversation:
    """A session with these messages in it, each after the reply of the one before."""
    begin = (codec.Tversion(8192, codec.VERSION), codec.Tattach(0, codec.NOFID, b"", b"", 0))
    steps = [(Send(0, codec.encode(message, tag)), Wait()) for tag, message in enumerate((*begin, *messages))]
    return tuple(step for pair in steps for step in pair)


def test_the_seeds_are_conversations_that_a_server_answers(target: Target) -> None:
    seeds = record_all(target)
    kinds = {kind for seed in seeds for step in seed if isinstance(step, Send) for kind, _ in split(step.data)}
    assert kinds == set(REQUESTS)
    for seed in seeds:
        target.clean()
        outcome = target.run(seed)
        sent = sum(isinstance(step, Send) for step in seed)
        assert outcome.verdict == Verdict.STOPPED
        assert outcome.messages == len(outcome.replies) == sent
    target.check_surroundings()


def test_a_planted_way_out_is_found(target: Target) -> None:
    os.link(target.canary, target.export / "leak")
    walk = codec.Twalk(0, 1, (b"leak",))
    with pytest.raises(FindingError, match="canary is on a ring"):
        target.run(spoken(walk, codec.Tlopen(1, os.O_RDONLY), codec.Tread(1, 0, 100)))
    with pytest.raises(FindingError, match="beside the export changed"):
        target.check_surroundings()  # its number of links


def test_a_planted_second_answer_is_found(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from xen9p.dataplane import DataPlane, Request  # noqa: PLC0415

    def twice(device: DataPlane, request: Request, message: bytes) -> None:
        reply = codec.decode(message)[1]
        if isinstance(reply, codec.Rmkdir):
            message = message + codec.encode(reply, request.tag)
        original(device, request, message)

    original = DataPlane.reply
    monkeypatch.setattr(DataPlane, "reply", twice)
    with pytest.raises(FindingError, match="tag 2 was answered 2 times"):
        target.run(spoken(codec.Tmkdir(0, b"made", 0o755, 0)))


@pytest.mark.parametrize(
    "reply",
    [b"\7\0\0\0\xff\0\0", codec.encode(codec.Tclunk(1), 1), codec.encode(codec.Rread(bytes(40000)), 1)],
    ids=["unknown", "request", "too large"],
)
def test_a_reply_that_is_none_is_found(reply: bytes) -> None:
    with pytest.raises(FindingError):
        check_reply(reply)


def test_a_planted_wait_without_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "_timer", lambda _device, seconds: Timer(seconds, -1))
    with pytest.raises(FindingError, match="for ever"):
        lifecycle.fuzz(seed=1, lives=200)


def test_lives_end() -> None:
    lives, events = lifecycle.fuzz(seed=3, lives=1000)
    assert lives == 1000
    assert events > 10_000


def test_a_conversation_survives_a_file() -> None:
    conversation = (Send(0, b"\0abc"), Wait(), Index(1, 68, 2**32 - 1), Poke(0, 4, b"\xff"), Send(1, b""))
    assert from_text(to_text(conversation)) == conversation
    assert not is_strict(conversation)
    with pytest.raises(ValueError, match="not a step"):
        from_text("send\n")


def test_tlcreate_on_a_fid_that_is_clunked_meanwhile(target: Target) -> None:
    """Once read the fid after giving it back. Seen by the sanitizers, for whom this runs it often enough."""
    walk, create = codec.Twalk(0, 1, (b"f",)), codec.Tlcreate(1, b"made", os.O_RDWR, 0o600, 0)
    race: list[Send | Wait] = []
    for tag in range(10, 400, 3):
        race += [Send(0, codec.encode(walk, tag)), Wait()]
        race += [Send(0, codec.encode(create, tag + 1)), Send(1, codec.encode(codec.Tclunk(1), tag + 2)), Wait()]
    assert target.run((*spoken(), *race)).verdict == Verdict.STOPPED
