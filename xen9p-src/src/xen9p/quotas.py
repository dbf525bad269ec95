"""The quotas that a host has in force: set when an export is given, taken away when the policy no longer has them.

They are the filesystem's and outlive the service and a restart of the host, so a file says which are ours. A tree that
has to join a project first (ext4, xfs) does so in a process of its own: that takes as long as it is large, and no other
guest is to wait for it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from xen9p import quota
from xen9p.errors import Xen9pError
from xen9p.loop import Loop
from xen9p.quota import Quota

log = logging.getLogger("xen9pd")

STATE: Final = Path("/var/lib/xen9p")
FILE: Final = "quotas.json"


class Quotas:
    """What is in force, and what is on its way.

    Args:
        loop: hears of trees that have joined.
        file: where the directories with a quota of ours are remembered.
        changed: called when a quota has come into force that was on its way, or could not.
    """

    def __init__(self, loop: Loop, file: Path, changed: Callable[[], None]) -> None:
        self._loop = loop
        self._file = file
        self._changed = changed
        self._held: dict[Path, tuple[Quota, int, int]] = {}  # in force, and of which directory
        self._wanted: dict[Path, Quota] = {}
        self._joining: set[Path] = set()
        self._failed: dict[Path, str] = {}  # to be said once
        self._ours, self._unjoined = _load(file)

    def hold(self, path: Path, most: Quota) -> list[str]:
        """Has the filesystem enforce a directory's quota; what keeps it from that now, a line each."""
        self._wanted[path] = most
        if path in self._joining:
            return [_waiting(path)]
        if path in self._failed:
            return [self._failed.pop(path)]
        try:
            found = path.stat()
            if self._held.get(path) == (held := (most, found.st_dev, found.st_ino)):
                return []
            if command := quota.joining(path, again=path in self._unjoined):
                self._join(path, command)
                return [_waiting(path)]
            quota.enforce(path, most)
        except OSError as error:
            return [f"quota of {path}: {error.strerror}"]
        except Xen9pError as error:
            return [str(error)]
        self._in_force(path, held)
        return []

    def keep(self, wanted: Mapping[Path, Quota]) -> None:
        """Takes away those of ours that are not wanted any more. The others are set again when they are held next."""
        self._wanted = dict(wanted)
        self._held.clear()
        self._failed.clear()
        for path in sorted(self._ours - wanted.keys()):
            if not path.exists():
                continue  # it may come back, and its quota with it
            try:
                quota.enforce(path, Quota())
            except Xen9pError as error:
                log.warning("%s", error)
                continue
            self._ours.discard(path)
            log.info("quota of %s: none any more", path)
        self._save()

    def _in_force(self, path: Path, held: tuple[Quota, int, int]) -> None:
        self._held[path] = held
        self._ours.add(path)
        self._save()
        log.info("quota of %s: %s", path, held[0])

    def _join(self, path: Path, command: list[str]) -> None:
        self._unjoined.add(path)  # until all of it has: a process that was cut off leaves a part
        self._save()
        try:
            # It goes on if this process ends: the next one waits for another, which finds little to do.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise Xen9pError(f"quota of {path}: {command[0]}: {error.strerror}", "install e2fsprogs") from None
        log.info("quota of %s: what is there joins its project (pid %d)", path, process.pid)
        self._joining.add(path)
        fd = os.pidfd_open(process.pid)

        def ended() -> None:
            self._loop.remove(fd)
            os.close(fd)
            process.wait()
            self._joining.discard(path)
            self._joined(path)

        self._loop.add(fd, ended)

    def _joined(self, path: Path) -> None:
        most = self._wanted.get(path)
        if most is None:
            return  # the policy has changed meanwhile
        try:
            quota.enforce(path, most, join=False)
            found = path.stat()
        except (Xen9pError, OSError) as error:
            self._failed[path] = str(error)
        else:
            self._unjoined.discard(path)
            self._in_force(path, (most, found.st_dev, found.st_ino))
        self._changed()

    def _save(self) -> None:
        text = json.dumps({"quotas": sorted(map(str, self._ours)), "unjoined": sorted(map(str, self._unjoined))})
        part = self._file.with_suffix(".part")
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.write_text(text + "\n")
            part.replace(self._file)
        except OSError as error:
            log.warning("%s: %s: after a restart, quotas that the policy drops will stay", self._file, error.strerror)


def _waiting(path: Path) -> str:
    return f"quota of {path}: what is there joins its project first (wait: it takes as long as the tree is large)"


def _load(file: Path) -> tuple[set[Path], set[Path]]:
    try:
        found = json.loads(file.read_text())
        return set(map(Path, found["quotas"])), set(map(Path, found["unjoined"]))
    except FileNotFoundError:
        pass  # there were none
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s does not make sense (%s): quotas of before are forgotten", file, error)
    return set(), set()
