"""xen9p cache show, learn and forget: what they do. Their options are in cache_options.py."""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import stat
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from xen9p import control, page_cache, policy, prefetch
from xen9p.caching import lineage
from xen9p.errors import ControlError, Xen9pError
from xen9p.policy import Export, Policy

Key = tuple[int, int]

_COUNTS: Final = (
    "read_hits", "read_misses", "hit_bytes", "miss_bytes", "streams", "streamed_bytes", "dropped_bytes", "spared_bytes",
    "shared_bytes", "cache_events_lost",
)  # fmt: skip


def command(args: argparse.Namespace) -> int:
    """Does what the command line asks for."""
    match args.verb:
        case "show":
            return _show(args)
        case "learn":
            answer = control.ask(control.Learn(args.guest, args.tag), args.runtime_dir)
            print(f"learning what {args.guest} reads from {args.tag}, for at most {answer['seconds']} s")
            return 0
        case _:
            return _forget(args)


# Show.


@dataclass(slots=True)
class Tree:
    """A directory tree, and what of it is in memory."""

    name: str
    path: Path
    exports: list[str]
    image: str = ""
    count: page_cache.Count = field(default_factory=page_cache.Count)
    resident: int = 0
    files: int = 0
    problem: str = ""
    by_inode: dict[Key, page_cache.Found] = field(default_factory=dict)
    twice: int = 0


def _show(args: argparse.Namespace) -> int:
    rules = policy.load(args.policy, check_paths=False)
    devices = _devices(args.runtime_dir)
    exports = _wanted(rules, devices, args.what)
    tell = _tell if sys.stderr.isatty() or not args.json else _silent
    trees, origins = survey(exports, 0 if args.quick else args.most, tell)
    answer: dict[str, Any] = {
        "quick": args.quick,
        "exports": [_plain(tree, rules, devices, args.top) for tree in trees],
        "origins": [_plain(tree, rules, [], args.top) for tree in origins],
        "devices": [_device(d) for d in devices if d["export"] in {export.name for export in exports}],
        "profiles": list(_profiles(args.state_dir)),
        "files": [_file(path) for path in args.file],
    }
    print(json.dumps(answer, indent=2) if args.json else "\n".join(_lines(answer)), flush=True)
    return 0


def _tell(text: str) -> None:
    print(f"xen9p: {text}", file=sys.stderr, flush=True)


def _silent(_: str) -> None:
    """Nobody watches."""


def _devices(runtime: Path) -> list[dict[str, Any]]:
    """What the supervisor knows of all devices; nothing if it does not run: files are in memory all the same."""
    try:
        found: list[dict[str, Any]] = control.ask(control.Metrics(), runtime)["devices"]
    except ControlError as error:
        print(f"xen9p: only what is in memory, without guests: {error}", file=sys.stderr)
        return []
    return found


def _wanted(rules: Policy, devices: Iterable[dict[str, Any]], what: str) -> list[Export]:
    """The exports that a word means: an export's name, or a guest's, by what it has or what rules give it.

    Raises:
        Xen9pError: it is neither.
    """
    if not what:
        return list(rules.exports.values())
    if what in rules.exports:
        return [rules.exports[what]]
    names = {d["export"] for d in devices if d["guest"] == what}
    names |= {grant.export for grant in rules.resolve(what, "") if any(rule.guest == what for rule in rules.rules)}
    if found := [export for name, export in rules.exports.items() if name in names]:
        return found
    known = ", ".join(sorted(rules.exports)) or "none"
    raise Xen9pError(f"unknown export or guest {what}", f"{rules.source} has the exports {known}")


def survey(exports: Iterable[Export], most: int, tell: Callable[[str], None]) -> tuple[list[Tree], list[Tree]]:
    """What of exports is in memory, each directory once, and of the trees that they were cloned from.

    Args:
        most: files of a tree that are looked at; 0 for none.
        tell: is told how far it is.
    """
    trees: dict[Path, Tree] = {}
    origins: dict[Path, Tree] = {}
    for export in exports:
        path = export.path.resolve()
        if path in trees:
            trees[path].exports.append(export.name)
            continue
        tree = trees[path] = Tree(export.name, path, [export.name])
        try:
            tree.image, origin = lineage(path)
        except OSError as error:
            tree.problem = error.strerror or str(error)
            continue
        if origin is not None:
            origins.setdefault(origin, Tree(f"origin {origin.name}", origin, [], tree.image))
    for tree in (*trees.values(), *origins.values()):
        if not tree.problem and most:
            tell(f"looking at {tree.path}")
            for found in page_cache.walk(tree.path, tree.count, tell, most):
                tree.resident += found.resident
                tree.files += 1
                tree.by_inode[found.device, found.inode] = found
    _count_twice([*trees.values(), *origins.values()])
    return list(trees.values()), list(origins.values())


def _count_twice(trees: list[Tree]) -> None:
    """Bytes of each tree that another one of its image has in memory, too: the same file, unchanged in both."""
    copies: dict[tuple[str, int, int, int], list[tuple[Tree, int]]] = defaultdict(list)
    for tree in trees:
        if tree.image:
            for found in tree.by_inode.values():
                copies[tree.image, found.inode, found.size, found.changed].append((tree, found.resident))
    for there in copies.values():
        # The first one to have most of it counts as the copy, the others as too many.
        for tree, resident in sorted(there, key=lambda one: -one[1])[1:]:
            tree.twice += resident


def _plain(tree: Tree, rules: Policy, devices: list[dict[str, Any]], top: int) -> dict[str, Any]:
    guests = sorted({d["guest"] for d in devices if d["export"] in tree.exports})
    found: dict[str, Any] = {
        "name": tree.name,
        "exports": tree.exports,
        "path": str(tree.path),
        "image": tree.image or None,
        "guests": guests,
        "given_to": sorted({r.guest or r.uuid or "" for r in rules.rules if r.export in tree.exports}),
        "files": tree.count.files,
        "bytes": tree.count.bytes,
        "resident_files": tree.files,
        "resident_bytes": tree.resident,
        "resident_twice_bytes": tree.twice,
        "failed": tree.count.failed,
        "complete": tree.count.complete,
        "problem": tree.problem or None,
    }
    if top:
        largest = heapq.nlargest(top, tree.by_inode.values(), key=lambda one: one.resident)
        found["top"] = [
            {"path": one.path.decode(errors="backslashreplace"), "size": one.size, "resident": one.resident}
            for one in largest
        ]
    return found


def _device(device: dict[str, Any]) -> dict[str, Any]:
    detail = device.get("detail") or {}
    found = {name: int(detail.get(name, 0)) for name in _COUNTS}
    reads = found["read_hits"] + found["read_misses"]
    return {
        "guest": device["guest"],
        "tag": device["tag"],
        "export": device["export"],
        **found,
        "hit_ratio": round(found["read_hits"] / reads, 4) if reads else None,
        "ahead": detail.get("cache"),
    }


def _profiles(folder: Path) -> Iterable[dict[str, Any]]:
    for image in prefetch.images(folder):
        try:
            known = prefetch.load(folder, image)
        except Xen9pError as error:
            yield {"image": image, "problem": str(error)}
            continue
        if known is not None:
            yield {
                "image": image,
                "guest": known.guest,
                "made": known.made,
                "seconds": known.seconds,
                "files": len(known.files),
                "bytes": known.bytes,
                "problem": None,
            }


def _file(path: Path) -> dict[str, Any]:
    """How much of a file is in memory: of a disk image, what the block path spends in dom0."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            there = os.fstat(fd)
            if not stat.S_ISREG(there.st_mode):
                raise Xen9pError(f"{path} is no file", "name a disk image's file")
            return {"path": str(path), "bytes": there.st_size, "resident_bytes": page_cache.resident(fd, there.st_size)}
        finally:
            os.close(fd)
    except OSError as error:
        raise Xen9pError(f"{path}: {error.strerror}", "name a file that is there") from None


def _lines(answer: dict[str, Any]) -> list[str]:
    from xen9p.cli import size, table  # noqa: PLC0415

    rows = [["TREE", "GUESTS", "FILES", "BYTES", "IN MEMORY", "OF FILES", "TWICE"]]
    trees = [] if answer["quick"] else [*answer["exports"], *answer["origins"]]
    for one in trees:
        amounts = size(one["bytes"]), size(one["resident_bytes"]), str(one["resident_files"])
        more = "" if one["complete"] else "+"
        guests = ",".join(one["guests"]) or "-"
        rows.append([one["name"], guests, f"{one['files']}{more}", *amounts, size(one["resident_twice_bytes"])])
    lines = table(rows, right=2) if trees else []
    for one in trees:
        lines += [f"{one['name']}:{f['path']}  {size(f['resident'])}" for f in one.get("top", ())]
        lines += [f"{one['name']}: {one['problem']}"] if one["problem"] else []
    if answer["devices"]:
        rows = [
            ["GUEST", "TAG", "HITS", "OF BYTES", "SHARED", "STREAMS", "DROPPED", "SPARED", "AHEAD", "USED"],
        ]
        for one in answer["devices"]:
            ratio = "-" if one["hit_ratio"] is None else f"{100 * one['hit_ratio']:.1f} %"
            ahead = one["ahead"] or {}
            used = (ahead.get("gains") or {}).get("profile_used_bytes", 0)
            read = (one["hit_bytes"] + one["miss_bytes"], one["shared_bytes"])
            behind = (one["dropped_bytes"], one["spared_bytes"], ahead.get("ahead_bytes", 0), used)
            rows.append([one["guest"], one["tag"], ratio, *map(size, read), str(one["streams"]), *map(size, behind)])
        lines += ["", *table(rows, right=2)]
    if answer["profiles"]:
        rows = [["IMAGE", "LEARNED FROM", "AT", "BOOT", "FILES", "BYTES"]]
        for one in answer["profiles"]:
            if not one["problem"]:
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["made"]))
                rows.append(
                    [one["image"], one["guest"], when, f"{one['seconds']:.1f} s", str(one["files"]), size(one["bytes"])]
                )
        lines += ["", *table(rows, right=3), *(one["problem"] for one in answer["profiles"] if one["problem"])]
    if answer["files"]:
        rows = [["FILE", "BYTES", "IN MEMORY"]]
        rows += [[one["path"], size(one["bytes"]), size(one["resident_bytes"])] for one in answer["files"]]
        lines += ["", *table(rows, right=1)]
    return lines


# Forget.


def _forget(args: argparse.Namespace) -> int:
    if bool(args.what) == args.all:
        raise Xen9pError("say of what to forget", "an image's uuid, an export, or --all")
    images = list(prefetch.images(args.state_dir)) if args.all else [_image(args)]
    try:
        gone = [image for image in images if prefetch.forget(args.state_dir, image)]
    except OSError as error:
        raise Xen9pError(f"{args.state_dir}: {error.strerror}", "run it as root") from None
    if not gone and not args.all:
        known = ", ".join(prefetch.images(args.state_dir)) or "none"
        raise Xen9pError(f"nothing is known of {args.what}", f"known images: {known}")
    print(f"forgotten: {', '.join(gone) or 'nothing was known'}")
    return 0


def _image(args: argparse.Namespace) -> str:
    if policy.is_uuid(args.what):
        return str(args.what).lower()
    rules = policy.load(args.policy, check_paths=False)
    if args.what not in rules.exports:
        known = ", ".join(sorted(rules.exports)) or "none"
        raise Xen9pError(f"{args.what} is neither a uuid nor an export", f"{rules.source} has: {known}")
    with contextlib.suppress(OSError):
        if image := lineage(rules.exports[args.what].path)[0]:
            return image
    raise Xen9pError(f"export {args.what} is of no image", "only subvolumes of btrfs are")
