"""Snapshots of exports: made in one instant, listed, compared, thinned out, cloned.

They are read-only subvolumes STORE/.snapshots/EXPORT/NAME. What is known of a set that was made at one time is a file
STORE/.snapshots/.meta/ID.json, and a snapshot without one is none: so whoever is killed in the middle leaves at most
what the next one clears away. Their order is that of btrfs's generations, which no clock moves.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from xen9p import beneath, btrfs, subvolumes
from xen9p.errors import Xen9pError
from xen9p.quota import mount_of
from xen9p.treediff import Change, Tree, compare, parted

NOW: Final = "now"
"""What an export is called as it is, among its snapshots."""
LOCK_TIMEOUT: Final = 30.0
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TEMPORARY: Final = "tmp-"


class SnapshotError(Xen9pError):
    """A snapshot cannot be made, found, compared or deleted."""


class Blink(Protocol):
    """A moment in which nothing is written: how long it took in ms, and how many devices stood still. After the block,
    whether they did until its end."""

    held: bool
    ms: float
    devices: int


Pauser = Callable[[Sequence[Path]], AbstractContextManager[Blink]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot of one export."""

    export: str
    name: str
    path: Path
    time: datetime
    """By the clock of then, UTC."""
    generation: int
    """What orders snapshots, whatever clocks say."""
    guest: str
    """Whose exports were taken together, "" for an export alone."""
    reason: str
    together: tuple[str, ...]
    """The exports that were taken in the same instant."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "export": self.export,
            "name": self.name,
            "path": str(self.path),
            "time": self.time.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "generation": self.generation,
            "guest": self.guest,
            "reason": self.reason,
            "together": list(self.together),
        }


@dataclass(frozen=True, slots=True)
class Made:
    """What create() did."""

    snapshots: tuple[Snapshot, ...]
    pause_ms: float
    devices: int


def check_name(name: str) -> None:
    """Raises SnapshotError if a snapshot cannot have this name."""
    if not _NAME.fullmatch(name) or name == NOW:
        raise SnapshotError(
            f"{name!r:.80} is no name for a snapshot",
            f"use 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit, and not {NOW}",
        )


def check_export(export: str, path: Path) -> None:
    """Raises SnapshotError with the remedy if an export cannot have snapshots."""
    try:
        mount = mount_of(path)
        number = path.stat().st_ino
    except OSError as error:
        raise SnapshotError(f"export {export}: {path}: {error.strerror}", "create it or correct the policy") from None
    if mount.kind != "btrfs":
        raise SnapshotError(f"export {export}: {mount.kind} has no snapshots", "have the export on btrfs")
    if number != subvolumes.TOP:
        raise SnapshotError(
            f"export {export}: {path} is no btrfs subvolume",
            "move its files into one that was made with: btrfs subvolume create",
        )
    if path.resolve() == mount.point:
        raise SnapshotError(
            f"export {export}: {path} is the whole filesystem, so its snapshots would be in itself",
            "export a subvolume in it",
        )


def provide(export: str, path: Path) -> Path:
    """The directory of an export's snapshots, made if it is not there: for guests that may see them. SnapshotError."""
    check_export(export, path)
    folder = subvolumes.place(export, path)
    try:
        _have(folder.parent, 0o711)
        _have(folder, 0o755)
    except OSError as error:
        raise _failed(f"{folder} is not made", error) from None
    return folder


def _have(folder: Path, mode: int) -> None:
    """A directory, with just this mode if it is new: guests' users look into some."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return
    folder.chmod(mode)


class Store:
    """The snapshots of one btrfs.

    Args:
        root: where it is mounted.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / subvolumes.SNAPSHOTS
        self.meta = self.folder / subvolumes.META

    @classmethod
    def of(cls, exports: Mapping[str, Path]) -> Store:
        """The one that all these exports are in. SnapshotError if there is none."""
        for export, path in exports.items():
            check_export(export, path)
        points = {mount_of(path).point for path in exports.values()}
        if len(points) > 1:
            raise SnapshotError(
                f"{', '.join(exports)} are on {len(points)} filesystems, of which no snapshot can be one instant",
                "snapshot each export by itself",
            )
        return cls(points.pop())

    # Looking.

    def all(self, export: str | None = None) -> list[Snapshot]:
        """The snapshots of an export, or of all, the oldest first."""
        found = [s for file in self._files() for s in self._read(file) if export in (None, s.export)]
        return sorted(found, key=lambda s: (s.generation, s.export, s.name))

    def get(self, export: str, name: str) -> Snapshot:
        """One of them. SnapshotError names those that are there."""
        there = self.all(export)
        for one in there:
            if one.name == name:
                return one
        names = ", ".join(s.name for s in there[-5:]) or "none"
        raise SnapshotError(f"export {export} has no snapshot {name:.80}", f"its latest: {names}")

    def _files(self) -> Sequence[Path]:
        return sorted(self.meta.glob("*.json")) if self.meta.is_dir() else []

    def _read(self, file: Path) -> Iterator[Snapshot]:
        with suppress(OSError, ValueError, KeyError, TypeError):  # of a file that is none of ours
            said = json.loads(file.read_text())
            when = datetime.strptime(said["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
            for export in said["exports"]:
                path = self.folder / export / said["name"]
                with suppress(OSError), subvolumes.opened(path) as fd:
                    one = btrfs.subvolume(fd)
                    if one.readonly and os.fstat(fd).st_ino == subvolumes.TOP:
                        yield Snapshot(
                            export, said["name"], path, when, one.born, said["guest"], said["reason"],
                            tuple(said["exports"]),
                        )  # fmt: skip

    # Changing. All of it with the lock, so that nobody takes for a leftover what another is about to finish.

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone, and what others have left half done is cleared away."""
        try:
            _have(self.folder, 0o711)
            _have(self.meta, 0o700)
            lock = os.open(self.meta / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _failed(f"{self.folder} cannot be used", error) from None
        try:
            until = time.monotonic() + LOCK_TIMEOUT
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise SnapshotError(f"another xen9p snapshot is at work on {self.root}", "try later") from None
                    time.sleep(0.02)
            self._tidy()
            yield
        finally:
            os.close(lock)

    def _tidy(self) -> None:
        for file in self.meta.glob("*.json.new"):
            with suppress(ValueError, KeyError, TypeError):
                said = json.loads(file.read_text())
                for export in said["exports"]:
                    for name in (_unfinished(said["name"]), said["name"]):
                        with suppress(FileNotFoundError):
                            self._destroy(self.folder / export, name)
            file.unlink()
        for part in self.meta.glob("*.part"):
            part.unlink()
        for left in self.meta.glob(f"{_TEMPORARY}*"):
            with suppress(OSError), subvolumes.opened(left) as fd:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # who compares with it holds this
                self._destroy(self.meta, left.name)
        for file in self._files():
            with suppress(OSError, ValueError, KeyError, TypeError):
                said = json.loads(file.read_text())
                if not any((self.folder / export / said["name"]).exists() for export in said["exports"]):
                    file.unlink()

    @staticmethod
    def _destroy(folder: Path, name: str) -> None:
        with subvolumes.opened(folder) as fd:
            subvolumes.destroy(fd, name)

    def create(
        self, exports: Mapping[str, Path], name: str, pauser: Pauser, *, guest: str = "", reason: str = ""
    ) -> Made:
        """Snapshots of several exports, of one instant: all of them or none.

        Args:
            exports: by name; as Store.of() was given.
            name: "" for the time.
            pauser: makes the moment in which nothing is written to these directories.

        Raises:
            SnapshotError: one line; nothing is changed.
        """
        if name:
            check_name(name)
        with self.locked():
            name = self._free_name(exports, name)
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            said = {"name": name, "exports": sorted(exports), "time": now, "guest": guest, "reason": reason}
            intent = self.meta / f"{secrets.token_hex(8)}.json.new"
            try:
                self._write(intent, said)
                with ExitStack() as stack:
                    blink = self._take(exports, name, pauser, stack)
                if not blink.held:
                    raise SnapshotError(
                        f"the snapshot took longer ({blink.ms:.0f} ms) than devices stand still, so it is no instant",
                        "try again when the disk has less to do",
                    )
                for export in exports:
                    self._rename(self.folder / export, _unfinished(name), name)
                self._rename(self.meta, intent.name, intent.name.removesuffix(".new"))
            except OSError as error:
                self._undo()
                raise _failed(f"no snapshot of {', '.join(exports)}", error) from None
            except BaseException:
                self._undo()
                raise
        made = tuple(s for export in sorted(exports) for s in self.all(export) if s.name == name)
        return Made(made, blink.ms, blink.devices)

    def _free_name(self, exports: Mapping[str, Path], name: str) -> str:
        def taken(wanted: str) -> str:
            return next((e for e in exports if os.path.lexists(self.folder / e / wanted)), "")

        if name:
            if export := taken(name):
                raise SnapshotError(
                    f"export {export} has a snapshot {name} already", "choose another name, or delete that one"
                )
            return name
        name = stem = datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")
        count = 1
        while taken(name):  # twice within a second, or the clock went back
            count += 1
            name = f"{stem}-{count}"
        return name

    def _take(self, exports: Mapping[str, Path], name: str, pauser: Pauser, stack: ExitStack) -> Blink:
        pairs = []
        for export, path in exports.items():
            _have(self.folder / export, 0o755)
            source = stack.enter_context(subvolumes.opened(path))
            pairs.append((source, stack.enter_context(subvolumes.opened(self.folder / export))))
        btrfs.sync(pairs[0][0])  # so that little is left to be written while guests wait
        pool = stack.enter_context(ThreadPoolExecutor(len(pairs)))
        list(pool.map(lambda _: None, pairs))  # its threads are there before anybody waits
        with pauser(list(exports.values())) as blink:
            # At the same time: then they share one commit of btrfs.
            done = [pool.submit(subvolumes.snapshot, *pair, _unfinished(name), readonly=True) for pair in pairs]
            for one in done:
                one.result()
        return blink

    def _undo(self) -> None:
        with suppress(OSError):
            self._tidy()

    def delete(self, export: str, name: str) -> Snapshot:
        """Deletes one; its room comes back in the course of time. SnapshotError."""
        with self.locked():
            one = self.get(export, name)
            self._delete(one)
            return one

    def _delete(self, one: Snapshot) -> None:
        try:
            self._destroy(one.path.parent, one.name)
        except OSError as error:
            raise _failed(f"snapshot {one.name} of {one.export} is not deleted", error) from None

    def prune(
        self, export: str, keep: Keep, *, reason: str | None = None, dry_run: bool = False
    ) -> tuple[Sequence[Snapshot], Sequence[Snapshot]]:
        """Deletes what a schedule does not keep: (kept, deleted), the oldest first.

        Args:
            reason: look only at those that were made with this one; others are not counted.
        """
        with self.locked():
            there = [one for one in self.all(export) if reason is None or one.reason == reason]
            kept = keep.of(there)
            gone = [one for one in there if one not in kept]
            if not dry_run:
                for one in gone:
                    self._delete(one)
            return kept, gone

    def clone(self, export: str, name: str, path: Path, new: str) -> Path:
        """A writable copy of a snapshot beside the export at path; where it is. SnapshotError."""
        if not _NAME.fullmatch(new):
            raise SnapshotError(f"{new!r:.80} is no name for a clone", "use letters, digits, '.', '_' and '-'")
        with self.locked():
            one = self.get(export, name)
            target = path.parent / new
            if os.path.lexists(target):
                raise SnapshotError(f"{target} exists already", "choose another name")
            try:
                with subvolumes.opened(one.path) as source, subvolumes.opened(path.parent) as folder:
                    subvolumes.snapshot(source, folder, new, readonly=False)
            except OSError as error:
                raise _failed(f"{target} is not made", error) from None
            return target

    def swap(self, export: str, name: str, path: Path) -> None:
        """Puts a copy of a snapshot in the place of an export that nobody serves, at once or not. SnapshotError."""
        with self.locked():
            one = self.get(export, name)
            fresh = f"{_TEMPORARY}{secrets.token_hex(8)}"
            try:
                with (
                    subvolumes.opened(one.path) as source,
                    subvolumes.opened(self.meta) as meta,
                    subvolumes.opened(path.parent) as folder,
                ):
                    subvolumes.snapshot(source, meta, fresh, readonly=False)
                    try:
                        beneath.exchange(meta, fresh, folder, path.name)
                    finally:
                        subvolumes.destroy(meta, fresh)  # the old tree by now; or the copy
            except OSError as error:
                raise _failed(f"{export} is not restored", error) from None

    # Comparing.

    @contextmanager
    def tree(self, export: str, name: str, path: Path) -> Iterator[Tree]:
        """A snapshot to be compared; NOW is one of the export at path that is gone afterwards. SnapshotError."""
        if name != NOW:
            with subvolumes.opened(self.get(export, name).path) as fd:
                yield Tree(fd)
            return
        temporary = f"{_TEMPORARY}{secrets.token_hex(8)}"
        with ExitStack() as stack:
            try:
                with self.locked(), subvolumes.opened(path) as source, subvolumes.opened(self.meta) as meta:
                    subvolumes.snapshot(source, meta, temporary, readonly=True)
                    fd = stack.enter_context(subvolumes.opened(self.meta / temporary))
                    fcntl.flock(fd, fcntl.LOCK_SH)
            except OSError as error:
                raise _failed(f"no snapshot of {export} to compare with", error) from None
            stack.callback(self._forget, temporary)
            yield Tree(fd)

    def _forget(self, temporary: str) -> None:
        with suppress(OSError):
            self._destroy(self.meta, temporary)

    def since(self, older: Tree, newer: Tree, path: Path) -> int | None:
        """parted() of two trees of the export at path."""
        known = {}
        for one in [*(s.path for s in self.all()), path]:
            with suppress(OSError), subvolumes.opened(one) as fd:
                said = btrfs.subvolume(fd)
                known[said.uuid] = said
        return parted(btrfs.subvolume(older.fd), btrfs.subvolume(newer.fd), known)

    def diff(
        self,
        export: str,
        path: Path,
        older: str,
        newer: str = NOW,
        *,
        content: bool = True,
        step: Callable[[int, int], None] | None = None,
    ) -> list[Change]:
        """What differs between two snapshots of an export, or between one and the export. SnapshotError."""
        with self.tree(export, older, path) as one, self.tree(export, newer, path) as other:
            since = self.since(one, other, path)
            return [] if since is None else compare(one, other, since, content=content, step=step)

    # Files that are whole or not there.

    def _write(self, file: Path, said: Mapping[str, Any]) -> None:
        partial = file.with_suffix(".part")
        with partial.open("w") as out:
            json.dump(said, out)
            out.flush()
            os.fsync(out.fileno())
        self._rename(self.meta, partial.name, file.name)

    @staticmethod
    def _rename(folder: Path, old: str, new: str) -> None:
        with subvolumes.opened(folder) as fd:
            os.rename(old, new, src_dir_fd=fd, dst_dir_fd=fd)
            os.fsync(fd)


def _unfinished(name: str) -> str:
    return f".{name}.new"


@dataclass(frozen=True, slots=True)
class Keep:
    """A schedule: how many to keep, of the last ones, and of one each in the last hours, days, ... that have any."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    def of(self, snapshots: Sequence[Snapshot]) -> Sequence[Snapshot]:
        """Those of a list, the oldest first, that are kept. Clocks name the hours, generations say which came last."""
        kept = set()
        newest_first = list(reversed(snapshots))
        for count, form in (
            (self.hourly, "%Y-%m-%d %H"),
            (self.daily, "%Y-%m-%d"),
            (self.weekly, "%G-%V"),
            (self.monthly, "%Y-%m"),
            (self.yearly, "%Y"),
        ):
            seen: set[str] = set()
            for one in newest_first:
                span = one.time.strftime(form)
                if span not in seen and len(seen) < count:
                    seen.add(span)
                    kept.add(one)
        kept |= set(newest_first[: self.last])
        return [one for one in snapshots if one in kept]


def _failed(what: str, error: OSError) -> SnapshotError:
    hints = {
        errno.ENOSPC: "the store is full: delete files or snapshots (xen9p snapshot prune)",
        errno.EDQUOT: "the quota is used up: raise it, or delete files",
        errno.EROFS: "mount it for writing",
        errno.EPERM: "run it as root",
        errno.EACCES: "run it as root",
        errno.ETXTBSY: "swap files in it are in use",
    }
    return SnapshotError(f"{what}: {error.strerror}", hints.get(error.errno or 0, ""), error.errno)
