"""An ext4 within an image, read from dom0 without mounting it, by debugfs(8) of e2fsprogs.

What is in the image is the guest's, and the guest may be writing it now. So no name of it ever gets into a command:
debugfs is asked for raw inodes, raw directories and block numbers, by number, read-only; it runs as nobody, with no
right but to read; and what it says is cut, checked and taken apart here. Sources: debugfs(8),
Documentation/filesystems/ext4 (super, inodes, directory).
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xen9p.errors import Xen9pError
from xen9p.escape import escape

ROOT: Final = 2
MAX_LINKS: Final = 40
"""Symbolic links on one way, as Linux bears them."""
MAX_LOOKUPS: Final = 128
"""Names on one way, with those in links: each costs two runs of debugfs, and the links are the guest's."""
TIMEOUT: Final = 30.0  # seconds for one question
MAX_DIRECTORY: Final = 64 << 20
"""Bytes of a directory that are looked through: a guest may make one of any size."""

_MAGIC: Final = 0xEF53
_RECOVER: Final = 0x4
_ENCRYPTED, _EXTENTS, _INLINE = 0x800, 0x80000, 0x10000000
_INODE: Final = struct.Struct("<HHI20xIII60s")  # mode, uid, size_lo, blocks_lo (at 28), flags, osd1, block
_ENTRY: Final = struct.Struct("<IHB")
_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_LINE: Final = re.compile(r"([0-7]{4,})  ((?:[0-9a-f]{4} ?){1,8})")
_BMAP: Final = re.compile(r"(\d+)( \(uninit\))?\s*")
_LEAST: Final = (
    "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search", "--bounding-set=-all,+dac_read_search",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Inode:
    """What is needed of an inode. content: the 60 bytes with its block map, or a short link's target."""

    number: int
    mode: int
    size: int
    flags: int
    content: bytes

    @property
    def inline(self) -> bool:
        """Whether its bytes are in the inode itself."""
        return bool(self.flags & _INLINE)


@dataclass(frozen=True, slots=True)
class Lookup:
    """A name that was found in a directory."""

    directory: int
    name: bytes
    inode: int


@dataclass(frozen=True, slots=True)
class Block:
    """Where a block of a file is: a block of the filesystem, 0 for a hole."""

    number: int
    unwritten: bool


class Ext4Image:
    """A filesystem in an image or on a block device.

    Args:
        path: of it, in dom0. A block device is read past dom0's cache, which does not see what a backend writes.

    Attributes:
        block: bytes of a block.
        blocks: how many there are.
        in_use: whether the journal holds what has not come to its place: mounted now, or not unmounted in order.

    Raises:
        Xen9pError: there is no ext4, or no debugfs.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.tool = shutil.which("debugfs", path=_PATH)
        if self.tool is None:
            raise Xen9pError("there is no debugfs to read the guest's ext4 with", "install e2fsprogs")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._direct = stat.S_ISBLK(os.fstat(fd).st_mode)
            os.posix_fadvise(fd, 0, 4096, os.POSIX_FADV_DONTNEED)
            super_block = os.pread(fd, 1024, 1024)
        finally:
            os.close(fd)
        if len(super_block) < 1024 or super_block[56:58] != _MAGIC.to_bytes(2, "little"):
            raise Xen9pError(
                f"there is no ext4 at the begin of {path}", "only disks that are one ext4 are followed, no partitions"
            )
        (shift,) = struct.unpack_from("<I", super_block, 24)
        (incompatible,) = struct.unpack_from("<I", super_block, 96)
        if shift > 6:
            raise Xen9pError(
                f"the ext4 in {path} has blocks of no known size", "is it sound? see: e2fsck -n, unmounted"
            )
        self.block: int = 1024 << shift
        low, high = struct.unpack_from("<I", super_block, 4)[0], struct.unpack_from("<I", super_block, 336)[0]
        self.blocks: int = low | (high << 32 if incompatible & 0x80 else 0)
        self.in_use = bool(incompatible & _RECOVER)

    def command(self, request: str) -> str:
        """What a student types for the same."""
        return f"debugfs {'-D ' if self._direct else ''}-R '{request}' {shlex.quote(self.path)}"

    def inode(self, number: int) -> Inode:
        """An inode by its number."""
        raw = hex_dump(self._ask(f"inode_dump <{number}>", 1 << 16).decode(errors="replace"))
        if len(raw) < 128:
            raise Xen9pError(f"inode {number} of {self.path} cannot be read", "is the guest writing it now? try again")
        mode, _, low, _, flags, _, content = _INODE.unpack_from(raw)
        (high,) = struct.unpack_from("<I", raw, 108)
        return Inode(number, mode, low | high << 32 if not stat.S_ISDIR(mode) else low, flags, content)

    def block_of(self, inode: int, logical: int) -> Block:
        """Where a block of a file is."""
        match = _BMAP.match(self._ask(f"bmap <{inode}> {logical}", 4096).decode(errors="replace"))
        if not match:
            raise Xen9pError(f"block {logical} of inode {inode} cannot be looked up", "is the guest writing it now?")
        number = int(match[1])
        if number >= self.blocks:
            raise Xen9pError(f"inode {inode} points to block {number}, beyond its filesystem", "the image is damaged")
        return Block(number, bool(match[2]))

    def resolve(self, path: bytes) -> tuple[Inode, list[Lookup]]:
        """The inode of a path, and each name that was looked up for it; links lead as they do in the guest.

        Raises:
            OSError: ENOENT, ENOTDIR, ELOOP as the guest would see them.
        """
        at, lookups, links = self.inode(ROOT), list[Lookup](), 0
        left = _names(path)
        while left:
            name = left.pop(0)
            if len(lookups) >= MAX_LOOKUPS:
                raise Xen9pError(f"more than {MAX_LOOKUPS} names are on the way", "name the file without its links")
            if not stat.S_ISDIR(at.mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            number = self._lookup(at, name)
            found = self.inode(number)
            lookups.append(Lookup(at.number, name, number))
            if stat.S_ISLNK(found.mode):
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = self._link(found)
                left = _names(target) + left
                found = self.inode(ROOT) if target.startswith(b"/") else at
            at = found
        return at, lookups

    def _lookup(self, directory: Inode, name: bytes) -> int:
        if directory.flags & (_INLINE | _ENCRYPTED):
            raise Xen9pError(f"directory {directory.number} is inline or encrypted", "these are not followed")
        for entry, number in entries(self._ask(f"cat <{directory.number}>", MAX_DIRECTORY), self.block):
            if entry == name:
                return number
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _link(self, inode: Inode) -> bytes:
        if inode.flags & (_INLINE | _ENCRYPTED) or inode.size > 4096:
            raise Xen9pError(
                f"the symbolic link in inode {inode.number} is of a kind that is not followed", "name its target"
            )
        if inode.size < 60 and not inode.flags & _EXTENTS:
            return inode.content[: inode.size]
        return self._ask(f"cat <{inode.number}>", 4096)

    def _ask(self, request: str, most: int) -> bytes:
        """What debugfs answers, at most so many bytes of it."""
        assert self.tool is not None
        command = [self.tool, *(["-D"] if self._direct else []), "-R", request, str(Path(self.path).absolute())]
        setpriv = shutil.which("setpriv", path=_PATH)
        if os.geteuid() == 0 and setpriv is not None:
            command = [setpriv, *_LEAST, *command]
        with subprocess.Popen(
            ["timeout", f"{TIMEOUT:g}", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": _PATH, "LC_ALL": "C", "DEBUGFS_PAGER": "cat"},
            cwd="/",
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            answer = process.stdout.read(most)
            if len(answer) == most:
                process.terminate()  # timeout(1) hands it on
                return answer
            said = process.stderr.read(4096)
        if process.returncode:
            last = escape(said.strip().rpartition(b"\n")[2][:200])
            raise Xen9pError(
                f"debugfs {request} failed on {self.path}: {last}", "is the guest writing it now? try again"
            )
        return answer


def _names(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def hex_dump(text: str) -> bytes:
    """The bytes in a dump of debugfs: octal offset, two bytes a word; * stands for lines like the last."""
    data = bytearray()
    line = b""
    for each in text.splitlines():
        match = _LINE.match(each)
        if not match:
            continue
        at = int(match[1], 8)
        while line and len(data) < min(at, 1 << 16):
            data += line
        line = bytes.fromhex(match[2].replace(" ", ""))
        data += line
    # A * at the end stands for zeros up to the inode's end, of which nothing is wanted.
    return bytes(data) + bytes(max(0, 128 - len(data)) if text.rstrip().endswith("*") else 0)


def entries(data: bytes, block: int) -> Iterator[tuple[bytes, int]]:
    """Name and inode of each entry of a raw directory; what is damaged is passed by, block by block."""
    for start in range(0, len(data), block):
        at, end = start, min(start + block, len(data))
        while at + 8 <= end:
            number, length, size = _ENTRY.unpack_from(data, at)
            length = 65536 if length in (0, 65535) and block == 65536 else length
            if length < 8 or at + length > end or size + 8 > length:
                break
            if number:
                yield data[at + 8 : at + 8 + size], number
            at += length
