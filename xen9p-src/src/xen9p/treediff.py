"""What differs between two snapshots of a subvolume: names, byte ranges and attributes.

btrfs stamps every inode with the generation of its last change. So only inodes younger than the point at which the two
parted are looked at, and parts of the trees that have none are skipped unread. Names come from the inodes' own
references and from the directories that changed; ranges from the extents that are not shared, by comparing them.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from xen9p.beneath import open_beneath
from xen9p.btrfs import EXTENT_DATA, FIRST_FREE, INODE_ITEM, LAST_FREE, MOST, OWN, Key, Subvolume, search
from xen9p.subvolumes import TOP

BLOCK: Final = 4096
# Types of items that only this reads.
INODE_REF, INODE_EXTREF, XATTR_ITEM, DIR_INDEX = 12, 13, 24, 96

_ROOM: Final = 1 << 16
_CHUNK: Final = 1 << 20
_INODE: Final = struct.Struct("<5Q4I3Q32xQIQIQIQI")
_STAMPS: Final = struct.Struct("<QQ36xI")
_EXTENT: Final = struct.Struct("<QQBBHB")
_PLACE: Final = struct.Struct("<4Q")
_ENTRY: Final = struct.Struct("<QBQQHHB")
_INLINE, _PREALLOCATED = 0, 2
_TYPES: Final = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "character device", stat.S_IFBLK: "block device",
}  # fmt: skip

Link = tuple[int, bytes]
"""A directory's inode and a name in it."""
Range = tuple[int, int]
"""First byte, and how many."""


@dataclass(frozen=True, slots=True)
class Node:
    """An inode: what a change of metadata changes, and its names."""

    number: int
    generation: int
    changed: int
    size: int
    uid: int
    gid: int
    mode: int
    rdev: int
    mtime: int
    links: frozenset[Link]
    xattrs: Mapping[bytes, bytes]

    @property
    def kind(self) -> str:
        """In words."""
        return _TYPES.get(stat.S_IFMT(self.mode), "unknown")

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Tree:
    """A subvolume, read by its items. The descriptor is borrowed, of its top, and nothing may change meanwhile."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._paths: dict[int, bytes] = {TOP: b""}

    def _items(self, first: Key, last: Key, newer: int = 0, room: int = _ROOM) -> Iterator[tuple[Key, bytes]]:
        return search(self.fd, OWN, first, last, newer=newer, room=room)

    def young(self, since: int) -> dict[int, bool]:
        """The inodes that changed after a generation; False for those that were no directory before."""
        found = {}
        for (number, kind, _), content in self._items((FIRST_FREE, 0, 0), (LAST_FREE, 255, MOST), since + 1, _CHUNK):
            if kind == INODE_ITEM:
                made, changed, mode = _STAMPS.unpack_from(content)
                if changed > since:
                    found[number] = made > since or stat.S_ISDIR(mode)
        return found

    def node(self, number: int) -> Node | None:
        """An inode; None if it is not there, or has no name (its file was deleted while it was open)."""
        values: tuple[Any, ...] = ()
        links: set[Link] = set()
        xattrs: dict[bytes, bytes] = {}
        for (_, kind, offset), content in self._items((number, 0, 0), (number, XATTR_ITEM, MOST)):
            if kind == INODE_ITEM:
                values = _INODE.unpack_from(content)
            elif kind == INODE_REF:
                links |= {(offset, name) for name in _names(content, "<QH")}
            elif kind == INODE_EXTREF:
                links |= {(parent, name) for parent, name in _far_names(content)}
            elif kind == XATTR_ITEM:
                xattrs |= {name: value for name, value, _, _ in _entries(content)}
        if not values or not (links or number == TOP):
            return None
        if number == TOP:
            links = set()
        generation, changed, size, _, _, _, uid, gid, mode, rdev, _, _, _, _, _, _, seconds, ns, _, _ = values
        mtime = seconds * 1_000_000_000 + ns
        return Node(number, generation, changed, size, uid, gid, mode, rdev, mtime, frozenset(links), xattrs)

    def entries(self, number: int) -> dict[bytes, int]:
        """A directory's names and their inodes; other subvolumes in it are none of this one."""
        first, last = (number, DIR_INDEX, 0), (number, DIR_INDEX, MOST)
        return {
            name: inode
            for _, content in self._items(first, last)
            for name, _, inode, kind in _entries(content)
            if kind == INODE_ITEM
        }

    def path(self, number: int) -> bytes:
        """A directory's path from the top, b"" for the top itself. KeyError, it has none."""
        above: list[Link] = []
        here = number
        while here not in self._paths:
            node = self.node(here)
            if node is None:
                raise KeyError(number)
            parent, name = next(iter(node.links))
            above.append((here, name))
            here = parent
        for below, name in reversed(above):
            self._paths[below] = _join(self._paths[here], name)
            here = below
        return self._paths[number]

    def named(self, link: Link) -> bytes:
        """The path that a link makes."""
        return _join(self.path(link[0]), link[1])

    def extents(self, number: int, size: int) -> list[tuple[int, int, object]]:
        """Where a file's bytes are: (first, end, token) without gaps; same tokens at the same place are the same bytes.
        A hole has the token 0.
        """
        found: list[tuple[int, int, object]] = []
        end = 0
        first, last = (number, EXTENT_DATA, 0), (number, EXTENT_DATA, MOST)
        for (_, _, start), content in self._items(first, last):
            _, _, compression, _, _, kind = _EXTENT.unpack_from(content)
            token: object = 0
            if kind == _INLINE:
                length = size - start
                token = (content[_EXTENT.size :], compression)
            else:
                disk, _, offset, length = _PLACE.unpack_from(content, _EXTENT.size)
                if disk and kind != _PREALLOCATED:
                    token = (disk, offset - start, compression)
            if start >= size:
                break
            if start > end:
                found.append((end, start, 0))
            end = min(start + length, size)
            found.append((start, end, token))
        if end < size:
            found.append((end, size, 0))
        return found


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name


def _names(content: bytes, form: str) -> Iterator[bytes]:
    head = struct.Struct(form)
    at = 0
    while at < len(content):
        _, length = head.unpack_from(content, at)
        at += head.size
        yield content[at : at + length]
        at += length


def _far_names(content: bytes) -> Iterator[Link]:
    at = 0
    while at < len(content):
        parent, _, length = struct.unpack_from("<QQH", content, at)
        at += 18
        yield parent, content[at : at + length]
        at += length


def _entries(content: bytes) -> Iterator[tuple[bytes, bytes, int, int]]:
    """(name, data, inode, type of what it leads to) of a directory's entry or an attribute."""
    at = 0
    while at < len(content):
        inode, kind, _, _, data_length, name_length, _ = _ENTRY.unpack_from(content, at)
        at += _ENTRY.size
        data = at + name_length
        yield content[at:data], content[data : data + data_length], inode, kind
        at = data + data_length


@dataclass(slots=True)
class Change:
    """One name that differs. Paths are from the top of the export."""

    kind: str
    """"created", "deleted", "renamed", "modified" (what is in it), "metadata" (only what is about it)."""
    path: bytes
    """In the newer one; of what was deleted, in the older one."""
    type: str
    old: bytes | None = None
    """Its path in the older one, where it was another."""
    size: int = 0
    old_size: int = 0
    ranges: list[Range] = field(default_factory=list)
    """Every byte that differs is in one of them; a range begins and ends with a byte that does, and may have others
    within a block. What one of both does not have counts as different."""
    what: list[str] = field(default_factory=list)
    """Of mode, owner, group, xattrs, device, mtime: what else is not the same."""
    node: int = 0
    """Its inode in the older one, 0 if it has none."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"change": self.kind, "path": os.fsdecode(self.path), "type": self.type}
        if self.old is not None:
            found["from"] = os.fsdecode(self.old)
        if self.type == "file":
            found |= {"size": self.size, "old_size": self.old_size, "ranges": [list(r) for r in self.ranges]}
        return found | ({"what": self.what} if self.what else {})


def parted(first: Subvolume, second: Subvolume, known: Mapping[UUID, Subvolume]) -> int | None:
    """The generation up to which two subvolumes are the same one's history; None: they are one, 0: nothing is known.

    Args:
        known: other subvolumes, by their uuid: those through which the two descend from each other.
    """
    lines = [dict(_ancestors(one, known)) for one in (first, second)]
    for uuid, left in lines[0].items():
        if uuid in lines[1]:
            point = min(left, lines[1][uuid])
            return None if point == MOST else point
    return 0


def _ancestors(one: Subvolume, known: Mapping[UUID, Subvolume]) -> Iterator[tuple[UUID, int]]:
    """What a subvolume descends from, nearest first, and the generation in which its line left that one."""
    left, here = MOST, one
    seen = set()
    while here.uuid not in seen:
        seen.add(here.uuid)
        yield here.uuid, left
        if not here.born_of.int:
            return
        left = here.born
        above = known.get(here.born_of)
        if above is None:
            yield here.born_of, left
            return
        here = above


def compare(
    older: Tree, newer: Tree, since: int, *, content: bool = True, step: Callable[[int, int], None] | None = None
) -> list[Change]:
    """All that differs, by path.

    Args:
        since: parted() of both.
        content: whether to look into the files that changed; without, a range is what is not shared on the disk.
        step: told how many inodes have been looked at, and of how many.
    """
    return sorted(_Comparison(older, newer, content).run(since, step), key=lambda change: change.path)


class _Comparison:
    def __init__(self, older: Tree, newer: Tree, content: bool) -> None:
        self.older = older
        self.newer = newer
        self.content = content
        self.gone: dict[bytes, Node] = {}
        self.new: dict[bytes, Node] = {}
        self.found: list[Change] = []
        self.dated: dict[bytes, Change] = {}

    def run(self, since: int, step: Callable[[int, int], None] | None) -> list[Change]:
        young = [tree.young(since) for tree in (self.older, self.newer)]
        candidates = young[0].keys() | young[1].keys()
        self._add_gone(candidates, [n for n in candidates if young[0].get(n) or young[1].get(n)])
        for done, number in enumerate(sorted(candidates)):
            if step and done % 256 == 0:
                step(done, len(candidates))
            self._look(number)
        for path in self.gone.keys() & self.new.keys():
            old, new = self.gone[path], self.new[path]
            if stat.S_IFMT(old.mode) == stat.S_IFMT(new.mode):
                del self.gone[path], self.new[path]
                self._same_name(path, path, old, new)
        for path, old in self.gone.items():
            self.found.append(Change("deleted", path, old.kind, old_size=old.size, node=old.number))
        for path, new in self.new.items():
            ranges = [(0, new.size)] if new.is_file and new.size else []
            self.found.append(Change("created", path, new.kind, size=new.size, ranges=ranges))
        above = {path.rpartition(b"/")[0] for c in self.found for path in (c.path, c.old) if path}
        # That a directory has another time is no news where something in it has changed.
        return self.found + [change for path, change in self.dated.items() if path not in above]

    def _add_gone(self, candidates: set[int], todo: list[int]) -> None:
        """What is in no directory of one any more leaves no trace but in the directories of the other."""
        while todo:
            number = todo.pop()
            before, after = self.older.entries(number), self.newer.entries(number)
            for name, inode in before.items() ^ after.items():
                for there in (inode, before.get(name, inode), after.get(name, inode)):
                    if there not in candidates:
                        candidates.add(there)
                        todo.append(there)

    def _look(self, number: int) -> None:
        old, new = self.older.node(number), self.newer.node(number)
        if old and new and old.generation == new.generation and stat.S_IFMT(old.mode) == stat.S_IFMT(new.mode):
            lost = sorted(self.older.named(link) for link in old.links - new.links)
            won = sorted(self.newer.named(link) for link in new.links - old.links)
            same = set(lost) & set(won)  # the directory is another one, and its path the same
            pairs = [(self.older.named(link), self.newer.named(link)) for link in old.links & new.links]
            pairs += [(path, path) for path in same]
            for was, path in pairs if number != TOP else [(b"", b"")]:
                self._same_name(was, path, old, new)
            lost, won = [p for p in lost if p not in same], [p for p in won if p not in same]
            for was, path in zip(lost, won, strict=False):
                change = Change("renamed", path, new.kind, was, new.size, old.size)
                self.found.append(self._difference(change, was, old, new))
            lost, won = lost[len(won) :], won[len(lost) :]
        else:
            lost = [self.older.named(link) for link in old.links] if old else []
            won = [self.newer.named(link) for link in new.links] if new else []
        if old:
            self.gone |= dict.fromkeys(lost, old)
        if new:
            self.new |= dict.fromkeys(won, new)

    def _same_name(self, was: bytes, path: bytes, old: Node, new: Node) -> None:
        change = Change("metadata", path, new.kind, None if was == path else was, new.size, old.size)
        self._difference(change, was, old, new)
        if change.ranges or change.size != change.old_size or "target" in change.what:
            change.kind = "modified"
        if change.kind == "modified" or change.what:
            self.found.append(change)
        elif new.is_dir and old.mtime != new.mtime:
            change.what.append("mtime")
            self.dated[path] = change

    def _difference(self, change: Change, was: bytes, old: Node, new: Node) -> Change:
        change.node = old.number
        if new.is_file:
            change.ranges = self._ranges(was, change.path, old, new)
        else:
            change.size = change.old_size = 0
        if stat.S_ISLNK(new.mode) and self._target(self.older, was) != self._target(self.newer, change.path):
            change.what.append("target")
        for name, before, after in (
            ("mode", old.mode, new.mode),
            ("owner", old.uid, new.uid),
            ("group", old.gid, new.gid),
            ("xattrs", old.xattrs, new.xattrs),
            ("device", old.rdev, new.rdev),
        ):
            if before != after:
                change.what.append(name)
        if new.is_file and old.mtime != new.mtime and not change.ranges:
            change.what.append("mtime")
        return change

    @staticmethod
    def _target(tree: Tree, path: bytes) -> bytes:
        fd = open_beneath(tree.fd, path, os.O_PATH)
        try:
            return os.readlink(b"", dir_fd=fd)
        finally:
            os.close(fd)

    def _ranges(self, was: bytes, path: bytes, old: Node, new: Node) -> list[Range]:
        common = min(old.size, new.size)
        suspect = unshared(self.older.extents(old.number, old.size), self.newer.extents(new.number, new.size), common)
        if suspect and self.content:
            suspect = self._really(was, path, suspect)
        if old.size != new.size:
            suspect.append((common, max(old.size, new.size) - common))
        return _merged(suspect)

    def _really(self, was: bytes, path: bytes, suspect: list[Range]) -> list[Range]:
        before = open_beneath(self.older.fd, was, os.O_RDONLY)
        try:
            after = open_beneath(self.newer.fd, path, os.O_RDONLY)
            try:
                return [r for start, length in suspect for r in differing(before, after, start, length)]
            finally:
                os.close(after)
        finally:
            os.close(before)


def unshared(one: list[tuple[int, int, object]], other: list[tuple[int, int, object]], size: int) -> list[Range]:
    """The ranges of the first size bytes of two files that are not the same place on the disk; see Tree.extents()."""
    found = []
    i = k = at = 0
    while at < size:
        while one[i][1] <= at:
            i += 1
        while other[k][1] <= at:
            k += 1
        end = min(one[i][1], other[k][1], size)
        if one[i][2] != other[k][2]:
            found.append((at, end - at))
        at = end
    return _merged(found)


def _merged(ranges: list[Range]) -> list[Range]:
    found: list[Range] = []
    for start, length in ranges:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def differing(one: int, other: int, start: int, length: int) -> list[Range]:
    """The ranges of a range in which two files differ, by blocks whose equal ends are cut off."""
    found: list[Range] = []
    for chunk in range(start, start + length, _CHUNK):
        size = min(_CHUNK, start + length - chunk)
        a, b = (os.pread(fd, size, chunk) for fd in (one, other))
        if a == b:
            continue
        for at in range(0, size, BLOCK):
            x, y = a[at : at + BLOCK], b[at : at + BLOCK]
            if x != y:
                found.append((chunk + at, max(len(x), len(y))))
    return [_cut(one, other, r) for r in _merged(found)]


def _cut(one: int, other: int, found: Range) -> Range:
    """A range without the bytes that are the same at its ends."""
    start, length = found
    head = [os.pread(fd, min(BLOCK, length), start) for fd in (one, other)]
    first = next(i for i, (x, y) in enumerate(zip(*head, strict=True)) if x != y)
    tail_at = start + max(0, length - BLOCK)
    tail = [os.pread(fd, start + length - tail_at, tail_at) for fd in (one, other)]
    last = next(i for i in range(len(tail[0]) - 1, -1, -1) if tail[0][i] != tail[1][i])
    return start + first, tail_at + last + 1 - (start + first)
