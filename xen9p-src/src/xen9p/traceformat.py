"""A trace as text, a line a request, and as JSON lines. What a guest chose is escaped in both."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, Protocol

from xen9p import codec
from xen9p.codec import Message, Qid
from xen9p.escape import escape
from xen9p.records import Exchange, Half

_OCTAL: Final = ("mode",)
_HEX: Final = ("valid", "request_mask")
_ACCESS: Final = ("O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE")
_FLAGS: Final = {
    0o100: "O_CREAT",
    0o200: "O_EXCL",
    0o400: "O_NOCTTY",
    0o1000: "O_TRUNC",
    0o2000: "O_APPEND",
    0o4000: "O_NONBLOCK",
    0o40000: "O_DIRECT",
    0o100000: "O_LARGEFILE",
    0o200000: "O_DIRECTORY",
    0o400000: "O_NOFOLLOW",
    0o2000000: "O_CLOEXEC",
    0o4010000: "O_SYNC",
    0o10000: "O_DSYNC",
}
_FIDS: Final = ("fid", "dfid", "olddirfid", "dirfid")
_SHOWN: Final = {"ring": "ring", "queue": "queue", "filesystem": "fs", "total": "total"}


class Format(Protocol):
    """Turns exchanges into what is written to a file."""

    def start(self) -> bytes:
        """What comes first in the file."""
        ...

    def one(self, device: str, exchange: Exchange) -> bytes:
        """What is written for one exchange of a device, GUEST:TAG."""
        ...

    def end(self) -> bytes:
        """What has been held back."""
        ...


class Text:
    """One line a request."""

    def start(self) -> bytes:
        return b""

    def one(self, device: str, exchange: Exchange) -> bytes:
        seconds, rest = divmod(exchange.began, 1_000_000_000)
        clock = time.strftime("%H:%M:%S", time.localtime(seconds))
        stages = " ".join(
            f"{_SHOWN[name]}={duration(ns)}" for name, ns in exchange.stages.items() if name != "queue" or ns
        )
        line = f"{clock}.{rest // 1000:06d} {device} {_request(exchange)} = {_outcome(exchange)}  {stages}\n"
        return line.encode()

    def end(self) -> bytes:
        return b""


class JsonLines:
    """One JSON object a request."""

    def start(self) -> bytes:
        return b""

    def one(self, device: str, exchange: Exchange) -> bytes:
        guest, _, tag = device.partition(":")
        value: dict[str, Any] = {
            "time": exchange.began / 1e9,
            "guest": guest,
            "tag": tag,
            "link": exchange.link,
            "path": escape(exchange.target),
            "request": _json_half(exchange.request),
            "reply": None if exchange.reply is None else _json_half(exchange.reply),
            "errno": error_name(exchange.errno) if exchange.errno else None,
            "seconds": {name: None if ns is None else ns / 1e9 for name, ns in exchange.stages.items()},
        }
        return json.dumps(value).encode() + b"\n"

    def end(self) -> bytes:
        return b""


def error_name(number: int) -> str:
    """'ENOENT' for 2; the number for one that has no name."""
    return errno.errorcode.get(number, str(number))


def duration(ns: int | None) -> str:
    """Nanoseconds for people, in three figures or less: 1234 -> 1.2us."""
    if ns is None:
        return "-"
    value = float(ns)
    for unit in ("ns", "us", "ms"):
        if value < 999.5:
            return f"{value:.1f}{unit}" if value < 9.95 and unit != "ns" else f"{value:.0f}{unit}"
        value /= 1000
    return f"{value:.1f}s" if value < 9.95 else f"{value:.0f}s"


def _request(exchange: Exchange) -> str:
    part = exchange.request
    if part.message is None:
        return _unparsed(part)
    return _text(part, exchange.path)


def _outcome(exchange: Exchange) -> str:
    if exchange.reply is None:
        return "? (no reply)"
    if exchange.errno:
        return f"{error_name(exchange.errno)} ({os.strerror(exchange.errno)})"
    return _text(exchange.reply, b"") if exchange.reply.message else _unparsed(exchange.reply)


def _unparsed(part: Half) -> str:
    return (
        f"{codec.message_name(part.type)}(tag={part.tag}, {part.size} bytes that do not parse: {part.raw[:32].hex()})"
    )


def _text(part: Half, path: bytes) -> str:
    message = part.message
    assert message is not None
    shown = [f"tag={part.tag}"]
    for field in fields(message):  # type: ignore[arg-type]  # every message is a dataclass
        value = getattr(message, field.name)
        text = f"{field.name}={_value(message, field.name, value)}"
        if field.name == "data" and part.data_size:
            dots = "..." if len(value) < part.data_size else ""
            text += f"{dots}, count={part.data_size}"
        elif field.name in _FIDS and path:
            text += f"<{escape(path)}>"
            path = b""  # it is the first fid's
        shown.append(text)
    return f"{type(message).__name__}({', '.join(shown)})"


def _value(message: Message, name: str, value: Any) -> str:
    match value:
        case bytes():
            return f'"{escape(value)}"'
        case Qid(type=kind, version=version, path=path):
            return f"{kind:02x}.{version:x}.{path:x}"
        case tuple():
            return "[" + " ".join(_value(message, name, each) for each in value) + "]"
    if name in _OCTAL:
        return f"{value:#o}"
    if name in _HEX:
        return f"{value:#x}"
    if name == "flags" and isinstance(message, codec.Tlopen | codec.Tlcreate):
        return open_flags(value)
    if value == codec.NOFID and (name.endswith("fid") or name == "n_uname"):
        return "-1"
    return str(value)


def open_flags(value: int) -> str:
    """open(2)'s flags by name: O_RDWR|O_CREAT."""
    names = [_ACCESS[value & 3]]
    value &= ~3
    for bits, name in sorted(_FLAGS.items(), reverse=True):
        if value & bits == bits:
            names.append(name)
            value &= ~bits
    return "|".join(names + ([f"{value:#o}"] if value else []))


def _json_half(part: Half) -> Mapping[str, Any]:
    value: dict[str, Any] = {"type": codec.message_name(part.type), "tag": part.tag, "size": part.size}
    if part.message is None:
        return value | {"raw": part.raw.hex()}
    for field in fields(part.message):  # type: ignore[arg-type]
        value[field.name] = _plain(getattr(part.message, field.name))
    if "data" in value:
        value["count"] = part.data_size
    return value


def _plain(value: Any) -> Any:
    match value:
        case bytes():
            return escape(value)
        case Qid(type=kind, version=version, path=path):
            return {"type": kind, "version": version, "path": path}
        case tuple():
            return [_plain(each) for each in value]
    return value
