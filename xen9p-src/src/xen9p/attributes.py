"""A file's attributes as both our clients use them."""

from __future__ import annotations

import stat
from dataclasses import dataclass

from xen9p.codec import Rgetattr


@dataclass(frozen=True, slots=True)
class Attributes:
    """What there is to know of a file. Times in ns since 1970, size in bytes, blocks of 512 bytes."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    blocks: int
    ino: int
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @classmethod
    def of(cls, reply: Rgetattr) -> Attributes:
        """The content of a Rgetattr."""
        return cls(
            reply.mode,
            reply.uid,
            reply.gid,
            reply.nlink,
            reply.size,
            reply.blocks,
            reply.qid.path,
            reply.rdev,
            _ns(reply.atime_sec, reply.atime_nsec),
            _ns(reply.mtime_sec, reply.mtime_nsec),
            _ns(reply.ctime_sec, reply.ctime_nsec),
        )


def _ns(seconds: int, rest: int) -> int:
    """Seconds of the wire are u64; before 1970 they are negative in two's complement."""
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * 10**9 + rest
