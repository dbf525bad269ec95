"""xen9p dedup run, status and schedule: what they do. Their options are in dedup_options.py."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from xen9p import btrfs, policy, timers
from xen9p.dedup import Counts, Deduper, Options, Tree, be_gentle, open_directory, survey, usage
from xen9p.dedup_state import State, only_run, running
from xen9p.errors import Xen9pError
from xen9p.policy import Export, Policy
from xen9p.sizes import size_text

SAY: Final = 5.0
"""Seconds between lines about how far a run is."""


def command(args: argparse.Namespace) -> int:
    """Does what the command line asks for."""
    match args.verb:
        case "run":
            return _run(args)
        case "status":
            return _status(args)
        case _:
            return _schedule(args)


@dataclass(slots=True)
class Store:
    """A filesystem with exports on it; fd is a descriptor on it."""

    id: UUID
    fd: int
    exports: list[Export] = field(default_factory=list)


@contextlib.contextmanager
def stores(rules: Policy, names: Sequence[str]) -> Iterator[tuple[list[Store], list[str]]]:
    """The filesystems of the named exports, or of all of them that can be used; and what is wrong with the others.

    Raises:
        Xen9pError: an export is unknown, or one that is named cannot be used, or none can.
    """
    for name in names:
        if name not in rules.exports:
            known = ", ".join(sorted(rules.exports)) or "none"
            raise Xen9pError(f"unknown export {name}", f"{rules.source} has: {known}")
    found: dict[UUID, Store] = {}
    wrong: list[Xen9pError] = []
    with contextlib.ExitStack() as held:
        for export in [rules.exports[name] for name in dict.fromkeys(names)] or rules.exports.values():
            try:
                fd = _on_btrfs(export)
            except Xen9pError as error:
                if names:
                    raise
                wrong.append(error)
                continue
            held.callback(os.close, fd)
            there = btrfs.filesystem(fd)
            found.setdefault(there.id, Store(there.id, fd)).exports.append(export)
        if not found:
            raise (
                wrong[0] if wrong else Xen9pError(f"{rules.source} has no exports", "add [exports.NAME] with its path")
            )
        yield list(found.values()), [str(error) for error in wrong]


def _on_btrfs(export: Export) -> int:
    """A descriptor of an export that can be de-duplicated."""
    fd = open_directory(export)
    try:
        btrfs.filesystem(fd)
        # What takes root says so here, and not in the middle.
        next(btrfs.Trees(fd).changes(btrfs.subvolume(fd).id, (1 << 64) - 1), None)
    except OSError as error:
        os.close(fd)
        raise Xen9pError(*btrfs.explain(error, f"export {export.name}: {export.path}")) from None
    return fd


def _run(args: argparse.Namespace) -> int:
    rules = policy.load(args.policy, check_paths=False)
    options = Options(args.full, args.dry_run, args.limit, args.settle)
    answer: dict[str, Any] = {"dry_run": args.dry_run, "full": args.full, "stores": [], "skipped": []}
    with stores(rules, args.exports) as (found, wrong), only_run(args.state_dir):
        be_gentle()
        answer["skipped"] = wrong
        for line in wrong:
            print(f"xen9p: left out: {line}", file=sys.stderr)
        for store in found:
            with _told(args.state_dir) as tell:
                answer["stores"].append(run_store(store, args.state_dir, options, tell, everything=not args.exports))
    if args.json:
        print(json.dumps(answer, indent=2), flush=True)
    else:
        print("\n".join(_run_lines(answer)), flush=True)
    return 0


def run_store(
    store: Store, folder: Path, options: Options, tell: Callable[[str], None], *, everything: bool
) -> dict[str, Any]:
    """One run over a store; what it did, for JSON.

    Args:
        folder: where the state is.
        everything: whether the exports are all that there are.

    Raises:
        Xen9pError: the store is full, or the state cannot be written.
    """
    began = time.monotonic()
    state = State(folder, store.id)
    try:
        btrfs.sync(store.fd)
        before = _used(store.fd)
        with state.transaction(keep=not options.dry_run):
            trees = survey(store.exports, store.fd)
            deduper = Deduper(store.fd, state, trees, options, tell)
            deduper.run(everything=everything)
            contents = state.contents()
    except OSError as error:
        raise Xen9pError(*btrfs.explain(error, f"store {store.id}")) from None
    finally:
        state.close()
    if not options.dry_run:
        btrfs.sync(store.fd)  # what is free now is free on the disk
    total = Counts()
    for counts in deduper.counts.values():
        for name in Counts.__dataclass_fields__:
            setattr(total, name, getattr(total, name) + getattr(counts, name))
    return {
        "id": str(store.id),
        "seconds": round(time.monotonic() - began, 3),
        "freed": before - _used(store.fd),
        "contents": contents,
        "total": total.plain(),
        "trees": [{"name": t.name, "exports": t.exports, **deduper.counts[t.name].plain()} for t in trees],
    }


def _used(fd: int) -> int:
    """Bytes that a filesystem has in use; other writers change it, too."""
    there = os.fstatvfs(fd)
    return (there.f_blocks - there.f_bfree) * there.f_frsize


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[Callable[[str], None]]:
    """Says how far a run is: at times to people, and always to `status`."""
    path = folder / "progress"
    said = time.monotonic()

    def tell(text: str) -> None:
        nonlocal said
        fresh = path.with_suffix(".new")
        fresh.write_text(text + "\n")
        fresh.rename(path)
        if time.monotonic() - said >= SAY:
            said = time.monotonic()
            print(f"xen9p: {text}", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        path.unlink(missing_ok=True)


def _run_lines(answer: dict[str, Any]) -> list[str]:
    from xen9p.cli import size, table  # noqa: PLC0415

    lines = []
    verb = "would be shared" if answer["dry_run"] else "shared"
    for store in answer["stores"]:
        rows = [["TREE", "FILES", "LATER", "NEW", "ALREADY", "SHARED", "READ"]]
        for one in [*store["trees"], {"name": "together", **store["total"]}]:
            amounts = one["looked"], one["already"], one["equal" if answer["dry_run"] else "shared"], one["scanned"]
            rows.append([one["name"], str(one["files"]), str(one["later"]), *(size(amount) for amount in amounts)])
        total = store["total"]
        lines += [*table(rows, right=1), ""]
        got = size(total["equal"] if answer["dry_run"] else total["shared"])
        lines.append(f"{got} {verb}, {size(total['scanned'])} read ({_per(total)}), {store['seconds']:.1f} s")
        if total["later"]:
            lines.append(f"{total['later']} files are being written and were left for the next run")
        if total["failed"]:
            lines.append(f"{size(total['failed'])} seemed equal, and the kernel did not want to share them")
    return lines


def _per(total: dict[str, Any]) -> str:
    per = total["scanned_per_saved"]
    return "nothing was saved" if per is None else f"{per:.2f} a byte saved"


def _status(args: argparse.Namespace) -> int:
    rules = policy.load(args.policy, check_paths=False)
    pid = running(args.state_dir)
    answer: dict[str, Any] = {"running": None, "stores": [], "skipped": []}
    if pid:
        with contextlib.suppress(OSError):
            answer["running"] = {"pid": pid, "progress": (args.state_dir / "progress").read_text().strip()}
        answer["running"] = answer["running"] or {"pid": pid, "progress": ""}
    with stores(rules, []) as (found, wrong):
        answer["skipped"] = wrong
        for store in found:
            state = State(args.state_dir, store.id, write=False)
            try:
                answer["stores"].append(_store_status(store, state, rules))
            except OSError as error:
                raise Xen9pError(*btrfs.explain(error, f"store {store.id}")) from None
            finally:
                state.close()
    print(json.dumps(answer, indent=2) if args.json else "\n".join(_status_lines(answer)), flush=True)
    return 0


def _store_status(store: Store, state: State, rules: Policy) -> dict[str, Any]:
    trees = survey(store.exports, store.fd)
    known = {tree.id: state.progress(tree.id, tree.subvolume.uuid) for tree in trees}
    used = usage(store.fd, trees, {number: one.base for number, one in known.items()})
    told = []
    for tree in trees:
        one, past = used[tree.id], known[tree.id]
        told.append(
            {
                "name": tree.name,
                "exports": tree.exports,
                "guests": _guests(tree, rules),
                "logical": one.logical,
                "exclusive": one.exclusive,
                "shared": one.shared,
                "changed": one.changed,
                "saved": past.shared,
                "scanned": past.scanned,
                "scanned_per_saved": round(past.scanned / past.shared, 3) if past.shared else None,
                "last_run": past.finished or None,
                "generation": past.base,
                "waiting": len(state.waiting(tree.id)),
            }
        )
    return {"id": str(store.id), "contents": state.contents(), "trees": told}


def _guests(tree: Tree, rules: Policy) -> list[str]:
    """Whom rules give an export of a tree, as they say it."""
    subjects = (rule.guest or rule.uuid for rule in rules.rules if rule.export in tree.exports)
    return list(dict.fromkeys(subject for subject in subjects if subject))


def _status_lines(answer: dict[str, Any]) -> list[str]:
    from xen9p.cli import size, table  # noqa: PLC0415

    lines = [f"running (pid {answer['running']['pid']}): {answer['running']['progress']}"] if answer["running"] else []
    for store in answer["stores"]:
        rows = [
            ["TREE", "GUESTS", "LAST RUN", "LOGICAL", "EXCLUSIVE", "SHARED", "CHANGED", "SAVED", "SCANNED", "PER SAVED"]
        ]
        for one in store["trees"]:
            last = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["last_run"])) if one["last_run"] else "never"
            amounts = (one[key] for key in ("logical", "exclusive", "shared", "changed", "saved", "scanned"))
            per = "-" if one["scanned_per_saved"] is None else f"{one['scanned_per_saved']:.2f}"
            rows.append([one["name"], ",".join(one["guests"]) or "-", last, *(size(amount) for amount in amounts), per])
        lines += [*table(rows, right=3), ""]
    return [*lines, *(f"left out: {line}" for line in answer["skipped"])]


# The schedule.


def service(limit: int) -> str:
    """What runs by itself, with what rights, as a service of systemd has it."""
    options = f" --limit {size_text(limit)}" if limit else ""
    return f"""ExecStart={timers.program()} dedup run{options}
# Not idle: a guest's writer may wait for a file that this has locked.
Nice=10
IOSchedulingClass=best-effort
IOSchedulingPriority=7
StateDirectory=xen9p/dedup
StateDirectoryMode=0700
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_DAC_READ_SEARCH CAP_FOWNER
"""


def _schedule(args: argparse.Namespace) -> int:
    if args.limit and args.on is None:
        raise Xen9pError("--limit says nothing without --on", "add --on")
    about = "Share what the exports of xen9p have in common"
    timer = timers.Timer("xen9p-dedup", args.unit_dir, "xen9p dedup schedule", about)
    print(timer.change(args.on, args.off, service(args.limit))[1])
    return 0
