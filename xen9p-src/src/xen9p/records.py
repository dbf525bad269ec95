"""The records of a trace: one for each request, with its reply, its times and the path of its fid.

The data plane (dataplane/observe.c) packs them; file data in them is cut, all other fields are whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from xen9p import codec
from xen9p.codec import Message
from xen9p.errors import ProtocolError

_HEAD: Final = struct.Struct("<IHHII5Q")
_HEADER: Final = struct.Struct("<IBH")
_COUNT_AT: Final = {codec.Twrite.type: 19, codec.Rread.type: 7, codec.Rreaddir.type: 7}
"""Where messages with file data have its count[4]; the data comes right after."""


@dataclass(frozen=True, slots=True)
class Half:
    """A request or a reply: what is known of it.

    Attributes:
        type: the number of its kind.
        size: bytes of the whole message on the wire, of which raw holds the first ones.
        data_size: bytes of file data in the whole message; 0 for messages without.
        message: its fields, with the data cut; None if they do not parse.
    """

    type: int
    tag: int
    size: int
    raw: bytes
    data_size: int
    message: Message | None


def half(raw: bytes) -> Half | None:
    """What raw, the begin of a message, says; None if not even a header is there."""
    if len(raw) < _HEADER.size:
        return None
    raw, _ = codec.strip_lease(raw)
    size, type_, tag = _HEADER.unpack_from(raw)
    data_size = 0
    whole = raw
    at = _COUNT_AT.get(type_)
    if at is not None and len(raw) >= at + 4:
        data_size = int.from_bytes(raw[at : at + 4], "little")
        if len(raw) < size and data_size == size - at - 4:
            # As it would be if the message held no more data than this.
            count = (len(raw) - at - 4).to_bytes(4, "little")
            whole = len(raw).to_bytes(4, "little") + raw[4:at] + count + raw[at + 4 :]
    try:
        message: Message | None = codec.decode(whole)[1]
    except ProtocolError:
        message = None
    return Half(type_, tag, size, raw, data_size, message)


@dataclass(frozen=True)
class Exchange:
    """A request with its reply.

    Attributes:
        link: the ring (or other link) of the device that it came on.
        path: of the file behind the request's fid, from the export's root on, as it was when the record was
            read; b"" if there is none.
        times: nanoseconds since 1970: it was in the ring, was taken, was begun, was done by the filesystem, its reply
            was out; 0 for what never happened.
    """

    link: int
    path: bytes
    times: tuple[int, int, int, int, int]
    request: Half
    reply: Half | None

    @property
    def began(self) -> int:
        """When it came, in nanoseconds since 1970."""
        return self.times[0]

    @cached_property
    def stages(self) -> dict[str, int | None]:
        """Nanoseconds in the ring, in the queue, in the filesystem, and in all; None for what did not come to be."""
        seen, taken, begun, done, sent = self.times
        return {
            "ring": max(0, taken - seen),
            "queue": max(0, begun - taken),
            "filesystem": max(0, done - begun) if done else None,
            "total": max(0, sent - seen) if sent else None,
        }

    @property
    def errno(self) -> int | None:
        """What it failed with; 0 if it worked, None without a reply."""
        if self.reply is None:
            return None
        message = self.reply.message
        return message.ecode if isinstance(message, codec.Rlerror) else 0

    @cached_property
    def target(self) -> bytes:
        """The path of what the request is about: its fid's, and behind it the names in the request."""
        names: tuple[bytes, ...] = ()
        match self.request.message:
            case codec.Twalk(wnames=wnames):
                names = wnames
            case codec.Trenameat(oldname=name) | codec.Tlcreate(name=name) | codec.Tmkdir(name=name):
                names = (name,)
            case codec.Tsymlink(name=name) | codec.Tmknod(name=name) | codec.Tunlinkat(name=name):
                names = (name,)
            case codec.Tlink(name=name):
                names = (name,)
            case codec.Tattach():
                return b"/"
        path = self.path
        for name in names:
            path = path.rstrip(b"/") + b"/" + name
        return path


def unpack(batch: bytes) -> Iterator[Exchange]:
    """The records in what DataPlane.trace_read() gave.

    Raises:
        ProtocolError: it is cut, or was made by another version.
    """
    at = 0
    while at < len(batch):
        if len(batch) - at < _HEAD.size:
            raise ProtocolError("a record of the trace is cut")
        size, link, path_len, request_len, reply_len, *times = _HEAD.unpack_from(batch, at)
        if size != _HEAD.size + path_len + request_len + reply_len or size > len(batch) - at:
            raise ProtocolError("a record of the trace has a wrong size")
        start = at + _HEAD.size
        path = batch[start : start + path_len]
        start += path_len
        request = half(batch[start : start + request_len])
        reply = half(batch[start + request_len : at + size])
        at += size
        if request is not None:
            yield Exchange(link, path, tuple(times), request, reply)
