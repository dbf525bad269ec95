"""Which files the kernel knows of a FUSE mount, and the fid that stands for each.

A fid pins its file on the server, so an inode number cannot come to mean another file while its node is here.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field

from xen9p.codec import Qid

ROOT: int = 1
_AWAY = 1 << 63


@dataclass(slots=True)
class Node:
    """A file that the kernel knows. fid is None for one that a directory listing has only named."""

    ino: int
    fid: int | None
    lookups: int = 0
    changes: int = 0
    """Counts what has been done to it: an answer that was asked for before the last change is old."""
    asked: bool = False
    """The kernel has asked for its attributes: it has an inode for it, which what is revoked can be dropped from."""
    no_capability_until: float = 0.0
    """It had no security.capability a moment ago (time.monotonic()); the kernel asks before every write."""


@dataclass(slots=True)
class Nodes:
    """All nodes by inode number, the root's being ROOT as FUSE wants it."""

    root: Node
    root_path: int
    _by_ino: dict[int, Node] = field(default_factory=dict)

    @classmethod
    def of(cls, root_fid: int, qid: Qid) -> Nodes:
        """The nodes of a mount that knows nothing but its root."""
        root = Node(ROOT, root_fid, lookups=1)
        return cls(root, qid.path, {ROOT: root})

    def ino(self, path: int) -> int:
        """The inode number of the file whose qid has that path."""
        if path == self.root_path:
            return ROOT
        return path if path > ROOT else path | _AWAY

    def get(self, ino: int) -> Node | None:
        """The node, if the kernel knows it."""
        return self._by_ino.get(ino)

    def known(self, ino: int) -> Node:
        """The node of a request; OSError ESTALE if there is none."""
        node = self._by_ino.get(ino)
        if node is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node

    def fid(self, ino: int) -> int:
        """The fid of a request's node; OSError ESTALE if it has none."""
        fid = self.known(ino).fid
        if fid is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fid

    def add(self, ino: int, fid: int | None) -> tuple[Node, int | None]:
        """Counts one lookup of a file. Returns its node, and the fid if the node had one already: it is not needed."""
        node = self._by_ino.get(ino)
        if node is None:
            node = self._by_ino[ino] = Node(ino, fid)
            spare = None
        elif node.fid is None:
            node.fid, spare = fid, None
        else:
            spare = fid
        node.lookups += 1
        return node, spare

    def forget(self, ino: int, lookups: int) -> Node | None:
        """The kernel gives back lookups; the node if those were the last."""
        node = self._by_ino.get(ino)
        if node is None or node is self.root:
            return None
        node.lookups -= lookups
        if node.lookups > 0:
            return None
        return self._by_ino.pop(ino)
