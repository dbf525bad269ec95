"""The supervisor's part of caching: what workers are told at their start, what they have learned, weights of guests."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any, Final

from xen9p import btrfs, defaults, prefetch, weights
from xen9p.jsonlines import Object
from xen9p.loop import Loop
from xen9p.policy import Grant
from xen9p.xenbus import GuestId

log = logging.getLogger("xen9pd")

MOST_IMAGES: Final = 256
"""Profiles that are kept: an image is what somebody on the host has made, but a guest's clone may be one, too."""


class Caching:
    """What one supervisor knows of caching."""

    def __init__(self, loop: Loop, folder: Path = defaults.PROFILES) -> None:
        self.folder = folder
        self.weights = weights.Weights(loop)
        prefetch.sweep(folder)

    def plan(self, grant: Grant) -> Object:
        """What is added to the request that starts a worker; nothing if the policy wants nothing."""
        wanted = grant.cache
        if not (wanted.prefetch or wanted.share or wanted.policy):
            return {}
        image, origin = "", None
        try:
            image, origin = lineage(grant.path)
        except OSError as error:
            log.warning("export %s: it cannot be told what it is a clone of: %s", grant.export, error.strerror)
        cache: dict[str, Any] = {
            "policy": wanted.policy,
            "prefetch": wanted.prefetch,
            "learn": wanted.learn,
            "folder": str(self.folder),
            "image": image,
            "options": dict(wanted.options),
        }
        plan: Object = {"cache": cache} if wanted.prefetch or wanted.policy else {}
        if wanted.share and origin is not None:
            plan["origin"] = str(origin)
        return plan

    def learned(self, who: GuestId, event: Object) -> None:
        """Keeps what a worker has learned: a process that a guest may have taken over, so it is checked."""
        try:
            profile = prefetch.parse(event.get("profile"))
            image = str(event.get("image", ""))
            if (
                len(list(prefetch.images(self.folder))) >= MOST_IMAGES
                and not prefetch.place(self.folder, image).exists()
            ):
                raise ValueError(f"there are {MOST_IMAGES} profiles already; remove some: xen9p cache forget")
            prefetch.save(self.folder, image, profile)
        except (ValueError, OSError) as error:
            log.error("guest=%s what it has read at boot is not kept: %s", who.name, error)
            return
        log.info("guest=%s image=%s learned: %d files, %d bytes", who.name, image, len(profile.files), profile.bytes)

    def weigh(self, who: GuestId, weight: int, pid: int) -> None:
        """Has a guest's worker share memory and disk by its weight, if it has one."""
        if weight:
            self.weights.set(who.name, who.domid, weight, pid)


def lineage(path: Path) -> tuple[str, Path | None]:
    """What a tree is a clone of: the uuid that stands for its image, and that tree if it is still there, read-only.

    A tree that was not cloned is its own image. A directory that is no subvolume's top, or not on btrfs, has none.

    Raises:
        OSError: EPERM, this takes CAP_SYS_ADMIN; ENOENT, the export is missing.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_ino != btrfs.FIRST_FREE:
            return "", None
        try:
            mine = btrfs.subvolume(fd)
        except OSError as error:
            if error.errno in _NO_BTRFS:
                return "", None
            raise
        if not mine.born_of.int:
            return str(mine.uuid), None
        return str(mine.born_of), _origin(fd, mine)
    finally:
        os.close(fd)


_NO_BTRFS: Final = (errno.ENOTTY, errno.EOPNOTSUPP)


def _origin(fd: int, mine: btrfs.Subvolume) -> Path | None:
    """Where the tree is that another was cloned from, as the kernel calls it now."""
    trees = btrfs.Trees(fd)
    number = trees.subvolume_of(mine.born_of)
    top = None if number is None else trees.inode(number, btrfs.FIRST_FREE)
    if number is None or top is None:
        return None
    try:
        there = btrfs.open_file(fd, number, btrfs.FIRST_FREE, top.generation)
    except OSError:  # it is being removed
        return None
    try:
        if not btrfs.subvolume(there).readonly:
            return None  # it may have changed since, and will go on changing
        found = Path(os.readlink(f"/proc/self/fd/{there}"))
        return found if os.path.samestat(os.fstat(there), found.stat()) else None
    except OSError:
        return None
    finally:
        os.close(there)
