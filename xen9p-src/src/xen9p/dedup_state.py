"""What de-duplication remembers of a store between runs: the change journal of each tree, and an index of contents.

The journal is a number: every extent of a tree with data of generation *base* or before has been looked at. btrfs
itself keeps what changed since (decision 0023). Besides there are the files that were left alone because they were
being written. Whatever is lost or forgotten here makes the next run look at more than it must, and never at less.

One SQLite file a store, so that journal and index go on together: a kill at any time leaves the last commit.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from xen9p.errors import Xen9pError

MOST_CONTENTS: Final = 2_000_000
"""Rows of the index, some 100 bytes each; the oldest go first."""
MOST_WAITING: Final = 10_000
"""Files of a tree that are left for later; if there are more, the tree's base stays where it is."""
ALTERNATIVES: Final = 3
"""So many places of one content are remembered, in case that some change."""
MOST_USES: Final = 2000
"""So often one place is shared: btrfs becomes slow with blocks that have very many owners."""
_VERSION: Final = 2
_SCHEMA: Final = """
CREATE TABLE tree (id INTEGER PRIMARY KEY, uuid TEXT NOT NULL, base INTEGER NOT NULL DEFAULT 0,
    target INTEGER NOT NULL DEFAULT 0, cursor INTEGER NOT NULL DEFAULT 0, shared INTEGER NOT NULL DEFAULT 0,
    scanned INTEGER NOT NULL DEFAULT 0, finished REAL NOT NULL DEFAULT 0, covered TEXT NOT NULL DEFAULT '');
CREATE TABLE waiting (tree INTEGER NOT NULL, number INTEGER NOT NULL, base INTEGER NOT NULL,
    PRIMARY KEY (tree, number)) WITHOUT ROWID;
CREATE TABLE content (id INTEGER PRIMARY KEY, digest BLOB NOT NULL, tree INTEGER NOT NULL, number INTEGER NOT NULL,
    generation INTEGER NOT NULL, start INTEGER NOT NULL, uses INTEGER NOT NULL DEFAULT 0);
CREATE INDEX content_digest ON content (digest);
"""


@dataclass(slots=True)
class Progress:
    """How far a tree has been looked at.

    base: all of this generation and before has been. target and cursor: a run that was cut off was about to reach this
    generation, and has done all files before this one. shared, scanned: bytes, of all runs. finished: when the last run
    was through, in seconds since 1970; 0 for never. covered: of which part of the tree all this is true, as directories
    with lines of their own; "" for all of it.
    """

    base: int = 0
    target: int = 0
    cursor: int = 0
    shared: int = 0
    scanned: int = 0
    finished: float = 0.0
    covered: str = ""

    def covers(self, wanted: str) -> bool:
        """Whether it is about all of *wanted*, directories as in `covered`."""
        if not self.covered:
            return True
        roots = [Path(line) for line in self.covered.split("\n")]
        return wanted != "" and all(
            any(Path(line).is_relative_to(root) for root in roots) for line in wanted.split("\n")
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a content has been seen: of a file of a tree, from *start* on. uses: how often it has been shared."""

    id: int
    tree: int
    number: int
    generation: int
    start: int
    uses: int


class State:
    """The state file of one store.

    Args:
        folder: where state files are; made if it is missing.
        store: the filesystem.
        write: False for one that is only read, and may be missing.

    Raises:
        Xen9pError: it cannot be used.
    """

    def __init__(self, folder: Path, store: UUID, *, write: bool = True, most: int = MOST_CONTENTS) -> None:
        self.path = folder / f"{store}.sqlite"
        self.most = most
        with self._explained():
            if write:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = str(self.path) if write or self.path.exists() else ":memory:"
            self._db = sqlite3.connect(name, timeout=30, isolation_level=None)
            try:
                self._prepare(write)
            except BaseException:
                self._db.close()
                raise

    def _prepare(self, write: bool) -> None:
        if write:
            # A kill loses nothing that was committed; a power cut may lose the last commits, which are then done again.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if write and 0 < version < _VERSION:
            # What it knows can be found again; how it was written down cannot be understood.
            drop = "; ".join(f"DROP TABLE IF EXISTS {name}" for name in ("tree", "waiting", "content"))
            self._db.executescript(f"BEGIN; {drop}; PRAGMA user_version = 0; COMMIT")
            version = 0
        if version == 0 and not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT")
        elif version != _VERSION:
            raise Xen9pError(
                f"{self.path} is of another version of xen9p", f"remove it: the next run begins anew; rm {self.path}*"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "full" in str(error):
                raise Xen9pError(f"{self.path}: {error}", "make room there") from None
            if isinstance(error, sqlite3.OperationalError):
                raise Xen9pError(
                    f"{self.path}: {error}", "run it as root; see that the directory can be written"
                ) from None
            raise Xen9pError(
                f"{self.path} is damaged: {error}", f"the next run begins anew after: rm {self.path}*"
            ) from None
        except OSError as error:
            raise Xen9pError(
                f"{self.path.parent}: {error.strerror}", "run it as root, or name another --state-dir"
            ) from None

    def close(self) -> None:
        """What is not committed is as if it had not been."""
        self._db.close()

    @contextlib.contextmanager
    def transaction(self, *, keep: bool = True) -> Iterator[None]:
        """All or nothing; with keep=False nothing."""
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._trim()
            except BaseException:
                self._back()
                raise
            if keep:
                self._db.execute("COMMIT")
            else:
                self._back()

    def commit(self) -> None:
        """Makes sure of what has been done, within a transaction."""
        self._trim()
        self._db.execute("COMMIT")
        self._db.execute("BEGIN IMMEDIATE")

    def _back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _trim(self) -> None:
        first, last = self._db.execute("SELECT min(id), max(id) FROM content").fetchone()
        if first is not None and last - first >= self.most:
            self._db.execute("DELETE FROM content WHERE id <= ?", (last - self.most,))

    # The journal.

    def progress(self, tree: int, uuid: UUID) -> Progress:
        """How far a tree has been looked at; all is new of one that is not known."""
        row = self._db.execute(
            "SELECT base, target, cursor, shared, scanned, finished, covered FROM tree WHERE id = ? AND uuid = ?",
            (tree, str(uuid)),
        ).fetchone()
        return Progress(*row) if row else Progress()

    def note(self, tree: int, uuid: UUID, progress: Progress) -> None:
        """Writes down how far a tree has been looked at."""
        p = progress
        self._db.execute(
            "INSERT OR REPLACE INTO tree (id, uuid, base, target, cursor, shared, scanned, finished, covered)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (tree, str(uuid), p.base, p.target, p.cursor, p.shared, p.scanned, p.finished, p.covered),
        )

    def trees(self) -> list[tuple[int, UUID]]:
        """All trees that are known."""
        return [(tree, UUID(text)) for tree, text in self._db.execute("SELECT id, uuid FROM tree")]

    def forget(self, tree: int) -> bool:
        """A tree is gone; whether the index had contents of it."""
        self._db.execute("DELETE FROM tree WHERE id = ?", (tree,))
        self._db.execute("DELETE FROM waiting WHERE tree = ?", (tree,))
        return self._db.execute("DELETE FROM content WHERE tree = ?", (tree,)).rowcount > 0

    def restart(self) -> None:
        """All of every tree is to be looked at again."""
        self._db.execute("UPDATE tree SET base = 0, target = 0, cursor = 0")

    def wait(self, tree: int, number: int, base: int) -> bool:
        """Leaves a file for later: what is newer than base is to be looked at. False if too many wait already."""
        (count,) = self._db.execute("SELECT count(*) FROM waiting WHERE tree = ?", (tree,)).fetchone()
        if count >= MOST_WAITING:
            return False
        self._db.execute(
            "INSERT INTO waiting VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET base = min(base, excluded.base)",
            (tree, number, base),
        )
        return True

    def waiting(self, tree: int) -> list[tuple[int, int]]:
        """The files that were left for later, each with its base."""
        return self._db.execute("SELECT number, base FROM waiting WHERE tree = ?", (tree,)).fetchall()

    def waited(self, tree: int, number: int) -> None:
        """A file that was left for later has been done."""
        self._db.execute("DELETE FROM waiting WHERE tree = ? AND number = ?", (tree, number))

    # The index.

    def find(self, digest: bytes) -> list[Place]:
        """Where a content has been seen, the oldest first."""
        rows = self._db.execute(
            "SELECT id, tree, number, generation, start, uses FROM content WHERE digest = ? ORDER BY id", (digest,)
        )
        return [Place(*row) for row in rows]

    def add(self, digest: bytes, tree: int, number: int, generation: int, start: int) -> None:
        """A content has been seen."""
        self._db.execute(
            "INSERT INTO content (digest, tree, number, generation, start) VALUES (?, ?, ?, ?, ?)",
            (digest, tree, number, generation, start),
        )

    def drop(self, place: Place) -> None:
        """Something else is there now."""
        self._db.execute("DELETE FROM content WHERE id = ?", (place.id,))

    def used(self, place: Place) -> None:
        """A place has been shared once more."""
        self._db.execute("UPDATE content SET uses = uses + 1 WHERE id = ?", (place.id,))

    def contents(self) -> int:
        """Rows of the index."""
        (count,) = self._db.execute("SELECT count(*) FROM content").fetchone()
        return int(count)


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Holds the lock that one run at a time has. The kernel gives it back when the process ends, however it does.

    Raises:
        Xen9pError: another has it.
    """
    path = folder / "lock"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Xen9pError(f"{path}: {error.strerror}", "run it as root, or name another --state-dir") from None
    try:
        for patience in (0.1, 0.2, 0.4, 0.0):  # running() has it for a moment
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not patience:
                    raise Xen9pError(
                        f"another run is under way (pid {running(folder) or '?'})", "see: xen9p dedup status"
                    ) from None
                time.sleep(patience)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {time.time():.0f}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def running(folder: Path) -> int:
    """The process id of the run that is under way; 0 if there is none."""
    try:
        fd = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int((os.read(fd, 40).split() or [b"0"])[0])
    else:
        return 0
    finally:
        os.close(fd)
