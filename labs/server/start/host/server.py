"""A 9P server of your own. Six messages are missing: what answers them is for you to write, in this file.

A message comes as an object with the fields that the protocol has (xen9p.codec), and its answer goes back as one. An
OSError becomes Rlerror with its errno. Nothing here knows of rings: serve.py calls answer(), message by message.

What a client says is not to be trusted. It may be a guest that wants to see more than this directory.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from xen9p import codec
from xen9p.codec import Message, Qid

SMALLEST: Final = 4096
"""Bytes of the smallest msize; Linux refuses less."""


def failure(number: int) -> OSError:
    """What to raise, for an errno: raise failure(errno.ENOENT)."""
    return OSError(number, os.strerror(number))


@dataclass
class File:
    """What a fid stands for."""

    names: tuple[bytes, ...]
    """The way to it from the root on; () is the root."""
    fd: int
    """A descriptor with O_PATH: it holds the file and opens nothing. Whoever ends the fid closes it."""
    open_fd: int | None = None
    """For reading and writing, from Tlopen on."""
    entries: list[bytes] = field(default_factory=list)
    """Of an open directory: the names in it, as they were at Tlopen."""


class Server:
    """Serves a directory to one client.

    Args:
        root: the directory.
        most: bytes of the largest message that the client may ask for.
    """

    def __init__(self, root: Path, most: int) -> None:
        self.root = root
        self.most = most
        self.msize = SMALLEST
        self.fids: dict[int, File] = {}
        self.answers: dict[type[Message], Callable[[Any], Message]] = {
            codec.Tversion: self.version,
            codec.Tattach: self.attach,
            codec.Tflush: self.flush,
            codec.Tgetattr: self.getattr,
            # To be written:
            codec.Twalk: self.walk,
            codec.Tlopen: self.lopen,
            codec.Tread: self.read,
            codec.Twrite: self.write,
            codec.Treaddir: self.readdir,
            codec.Tclunk: self.clunk,
        }

    def answer(self, message: Message) -> Message:
        """The reply to one message. A message that we do not have is EOPNOTSUPP: clients do without."""
        handler = self.answers.get(type(message))
        if handler is None:
            raise failure(errno.EOPNOTSUPP)
        return handler(message)

    # What is there.

    def version(self, message: codec.Tversion) -> Message:
        """The beginning: the largest message, and that we speak 9P2000.L. All fids of before are forgotten."""
        for file in self.fids.values():
            self.close(file)
        self.fids.clear()
        if not message.version.startswith(codec.VERSION):
            return codec.Rversion(message.msize, codec.VERSION_UNKNOWN)
        self.msize = max(SMALLEST, min(message.msize, self.most))
        return codec.Rversion(self.msize, codec.VERSION)

    def attach(self, message: codec.Tattach) -> Message:
        """A fid for the root."""
        if message.fid in self.fids:
            raise failure(errno.EBADF)
        fd = os.open(self.root, os.O_PATH | os.O_DIRECTORY)
        self.fids[message.fid] = File((), fd)
        return codec.Rattach(self.qid(fd))

    def flush(self, message: codec.Tflush) -> Message:
        """Each message is answered before the next one is taken: there is nothing to give up."""
        return codec.Rflush()

    def getattr(self, message: codec.Tgetattr) -> Message:
        """What fstat(2) says."""
        fd = self.file(message.fid).fd
        st = os.fstat(fd)
        sizes = (st.st_nlink, st.st_rdev, st.st_size, st.st_blksize, st.st_blocks)
        times = (*divmod(st.st_atime_ns, 10**9), *divmod(st.st_mtime_ns, 10**9), *divmod(st.st_ctime_ns, 10**9))
        unknown = (0, 0, 0, 0)
        return codec.Rgetattr(
            codec.GETATTR_BASIC, self.qid(fd), st.st_mode, st.st_uid, st.st_gid, *sizes, *times, *unknown
        )

    def file(self, fid: int) -> File:
        """What a fid stands for; EBADF if it is none."""
        found = self.fids.get(fid)
        if found is None:
            raise failure(errno.EBADF)
        return found

    def qid(self, fd: int) -> Qid:
        """A file's identity: for its kind, whether it has changed, and which one it is."""
        st = os.fstat(fd)
        kinds = {stat.S_IFDIR: codec.QT_DIR, stat.S_IFLNK: codec.QT_SYMLINK}
        return Qid(kinds.get(stat.S_IFMT(st.st_mode), codec.QT_FILE), st.st_mtime_ns & 0xFFFFFFFF, st.st_ino)

    def close(self, file: File) -> None:
        """Gives back the descriptors of a file."""
        for fd in (file.fd, file.open_fd):
            if fd is not None:
                os.close(fd)

    # What is missing.

    def walk(self, message: codec.Twalk) -> Message:
        """newfid becomes what lies at wnames, a name at a time, from fid on; Rwalk has a qid for each name.

        Without names newfid is a second fid for the same file. newfid may be fid itself, and must not be any other that
        is in use (EBADF). If the first name leads nowhere, that is the error. If a later one does, Rwalk has the qids
        up to there, and newfid does not come to be. ".." at the root stays at the root. A symbolic link is the client's
        to follow: nothing lies below it here.
        """
        raise failure(errno.EOPNOTSUPP)

    def lopen(self, message: codec.Tlopen) -> Message:
        """Opens the file of a fid, to read or write as flags (those of open(2)) say; Rlopen has its qid, and iounit 0.

        A regular file or a directory, and nothing else: a FIFO would hold the server up, a device is the host's.
        """
        raise failure(errno.EOPNOTSUPP)

    def read(self, message: codec.Tread) -> Message:
        """count bytes of an open file from offset on, fewer at the end; no more than a message holds."""
        raise failure(errno.EOPNOTSUPP)

    def write(self, message: codec.Twrite) -> Message:
        """Writes data at offset of an open file; Rwrite says how many bytes."""
        raise failure(errno.EOPNOTSUPP)

    def readdir(self, message: codec.Treaddir) -> Message:
        """Entries of an open directory, whole ones only, at most count bytes and no more than a message holds.

        An entry's offset is where the next Treaddir goes on: it comes back in message.offset, which is 0 at first.
        No entries: the end. codec.Dirent and codec.encode_dirents() have the layout.
        """
        raise failure(errno.EOPNOTSUPP)

    def clunk(self, message: codec.Tclunk) -> Message:
        """The client does not need the fid any more."""
        raise failure(errno.EOPNOTSUPP)
