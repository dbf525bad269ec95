"""The codec: what is written is read back, and nothing that is wrong is read at all."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xen9p import codec
from xen9p.codec import Dirent, Message, Qid, decode, encode
from xen9p.errors import ProtocolError, UnknownMessageError


def integers(size: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << 8 * size) - 1)


QIDS = st.builds(Qid, type=integers(1), version=integers(4), path=integers(8))
NAMES = st.binary(max_size=300)
FIELDS: dict[Any, st.SearchStrategy[Any]] = {
    codec.U8: integers(1),
    codec.U16: integers(2),
    codec.U32: integers(4),
    codec.U64: integers(8),
    codec.Name: NAMES,
    codec.Data: st.binary(max_size=5000),
    codec.QidField: QIDS,
    codec.Names: st.lists(NAMES, max_size=16).map(tuple),
    codec.Qids: st.lists(QIDS, max_size=16).map(tuple),
}


def instances(cls: type[Message]) -> st.SearchStrategy[Message]:
    hints = get_type_hints(cls, include_extras=True)
    return st.builds(cls, **{f.name: FIELDS[hints[f.name]] for f in fields(cls)})  # type: ignore[arg-type]


MESSAGES = st.sampled_from(list(codec.MESSAGES.values())).flatmap(instances)
TAGS = integers(2)


@given(MESSAGES, TAGS)
@settings(max_examples=500)
def test_what_is_encoded_is_decoded(msg: Message, tag: int) -> None:
    wire = encode(msg, tag)
    assert int.from_bytes(wire[:4], "little") == len(wire)
    assert wire[4] == msg.type
    assert decode(wire) == (tag, msg)
    assert decode(memoryview(wire)) == (tag, msg)


@pytest.mark.parametrize("cls", codec.MESSAGES.values(), ids=lambda c: c.__name__)
def test_every_truncation_is_refused(cls: type[Message]) -> None:
    @given(instances(cls), TAGS, st.data())
    @settings(max_examples=8)
    def check(msg: Message, tag: int, data: st.DataObject) -> None:
        wire = encode(msg, tag)
        cuts = range(len(wire)) if len(wire) < 300 else [data.draw(st.integers(0, len(wire) - 1))]
        for cut in cuts:
            short = wire[:cut]
            with pytest.raises(ProtocolError):
                decode(short)
            # And with a size that fits what is left, so that it is the fields that run out.
            if cut >= codec.HEADER_SIZE:
                with pytest.raises(ProtocolError):
                    decode(cut.to_bytes(4, "little") + short[4:])

    check()


@given(MESSAGES, TAGS, st.binary(min_size=1, max_size=20))
def test_trailing_bytes_are_refused(msg: Message, tag: int, rest: bytes) -> None:
    wire = encode(msg, tag) + rest
    with pytest.raises(ProtocolError, match="size says"):
        decode(wire)
    with pytest.raises(ProtocolError, match="after the last field"):
        decode(len(wire).to_bytes(4, "little") + wire[4:])


@given(st.binary(max_size=200), st.sampled_from([*codec.MESSAGES, 0, 106, 255]), st.booleans())
@settings(max_examples=1000)
@example(b"", 110, True)
def test_random_bytes_raise_nothing_else(rest: bytes, type_: int, framed: bool) -> None:
    wire = (len(rest) + 5).to_bytes(4, "little") + bytes([type_]) + rest if framed else rest
    try:
        tag, msg = decode(wire)
    except ProtocolError:
        return
    else:
        assert encode(msg, tag) == wire


@given(st.lists(st.builds(Dirent, qid=QIDS, offset=integers(8), type=integers(1), name=NAMES), max_size=20))
def test_directory_entries(entries: list[Dirent]) -> None:
    data = codec.encode_dirents(entries)
    assert list(codec.decode_dirents(data)) == entries
    if data:
        with pytest.raises(ProtocolError):
            list(codec.decode_dirents(data[:-1]))


@given(st.binary(max_size=200))
def test_random_directory_entries_raise_nothing_else(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        list(codec.decode_dirents(data))


# Bytes as the Linux kernel sends them (its p9_client_* format strings), written out by hand.
KNOWN = [
    (
        codec.Tversion(524288, b"9P2000.L"),
        0xFFFF,
        "15000000 64 ffff 00000800 0800 3950323030302e4c",
    ),
    (
        codec.Twalk(1, 2, (b"etc", b"fstab")),
        3,
        "1d000000 6e 0300 01000000 02000000 0200 0300657463 05006673746162",
    ),
    (codec.Tgetattr(7, codec.GETATTR_BASIC), 1, "13000000 18 0100 07000000 ff07000000000000"),
    (codec.Rlerror(2), 9, "0b000000 07 0900 02000000"),
    (codec.Twrite(4, 4096, b"hi"), 5, "19000000 76 0500 04000000 0010000000000000 02000000 6869"),
    (codec.Tflush(8), 9, "09000000 6c 0900 0800"),
    (
        codec.Rwalk((Qid(0x80, 1, 2),)),
        0,
        "16000000 6f 0000 0100 80 01000000 0200000000000000",
    ),
    (codec.Tunlinkat(1, b"x", codec.AT_REMOVEDIR), 2, "12000000 4c 0200 01000000 0100 78 00020000"),
]


@pytest.mark.parametrize(("msg", "tag", "text"), KNOWN, ids=lambda v: type(v).__name__)
def test_known_bytes(msg: Message, tag: int, text: str) -> None:
    assert encode(msg, tag) == bytes.fromhex(text)
    assert decode(bytes.fromhex(text)) == (tag, msg)


def test_every_message_is_there_with_its_reply() -> None:
    assert len(codec.MESSAGES) == 62
    for number, cls in codec.MESSAGES.items():
        other = codec.MESSAGES[number ^ 1]
        assert cls.__name__[1:] == other.__name__[1:]
        assert cls.__name__[0] == ("R" if number % 2 else "T")


def test_invalid_utf8_names_pass() -> None:
    msg = codec.Tmkdir(1, b"\xff\xfe\x00/", 0o755, 0)
    assert decode(encode(msg, 1)) == (1, msg)


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (b"", "shorter than its header"),
        (bytes.fromhex("08000000 78 0000"), "size says 8 bytes, 7 are there"),
        (bytes.fromhex("07000000 78 0000"), "Tclunk: fid needs 4 bytes at offset 7, 0 are left"),
        (bytes.fromhex("0d000000 10 0000 00000000 ffff"), "Tsymlink: name needs 65535 bytes"),
        (bytes.fromhex("11000000 6e 0000 00000000 00000000 1100"), "wnames: 17 elements, at most 16"),
    ],
)
def test_reasons_are_precise(wire: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        decode(wire)


def test_an_unknown_type_keeps_its_tag_for_the_reply() -> None:
    with pytest.raises(UnknownMessageError) as caught:
        decode(bytes.fromhex("07000000 6a 2a00"))
    assert (caught.value.type, caught.value.tag) == (106, 42)


@pytest.mark.parametrize(
    "msg",
    [
        codec.Tclunk(1 << 32),
        codec.Tclunk(-1),
        codec.Tlock(1, 256, 0, 0, 0, 0, b""),
        codec.Tmkdir(1, bytes(65536), 0, 0),
        codec.Rattach(Qid(256, 0, 0)),
        codec.Twalk(1, 2, (b"a",) * 17),
    ],
)
def test_what_does_not_fit_is_not_encoded(msg: Message) -> None:
    with pytest.raises(ProtocolError):
        encode(msg, 0)
    with pytest.raises(ProtocolError):
        encode(codec.Tclunk(1), 1 << 16)
