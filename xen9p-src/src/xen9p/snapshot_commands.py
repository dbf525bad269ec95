"""What `xen9p snapshot ...` does; its options are in snapshot_options.py."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from xen9p import control, defaults, policy, quota, restore, snapshot, timers
from xen9p.cli import size, table
from xen9p.errors import NobodyError
from xen9p.escape import escape
from xen9p.meter import Meter
from xen9p.policy import Policy
from xen9p.snapshot import NOW, Keep, Snapshot, SnapshotError, Store

ROOT_TAG = "root"
SCHEDULED: Final = "schedule:"
"""The reason of what a schedule made begins so; what it is for follows. It deletes no other ones."""
_IN_A_UNIT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST_SHOWN = 4  # ranges of a file


class Moment:
    """A moment in which devices stand still, as it turned out."""

    def __init__(self) -> None:
        self.held = True
        self.ms = 0.0
        self.devices = 0


def pauser(runtime: Path, *, force: bool = False) -> snapshot.Pauser:
    """Has the supervisor make such moments. Without one, nobody may be served: then there is nothing to do."""

    @contextmanager
    def pause(paths: Sequence[Path]) -> Iterator[Moment]:
        moment = Moment()
        try:
            conversation = control.Conversation(runtime)
        except NobodyError:
            if list(runtime.glob("worker-*.sock")):
                raise
            yield moment
            return
        with conversation:
            moment.devices = conversation.ask(control.Pause(tuple(map(str, paths)), force))["devices"]
            yield moment
            answer = conversation.ask(control.Resume())
            moment.held, moment.ms = answer["held"], answer["ms"]

    return pause


class Target:
    """What a command is about: an export, or the exports that a guest can write to."""

    def __init__(self, name: str, rules: Policy, running: Mapping[str, str]) -> None:
        self.guest = ""
        self.tags: dict[str, str] = {}
        """Of a guest: its tag by export."""
        if name in rules.exports:
            self.exports = {name: rules.exports[name].path}
        else:
            grants = [g for g in rules.resolve(name, running.get(name, "")) if not g.readonly]
            self.guest = name
            self.exports = {g.export: g.path for g in grants}
            self.tags = {g.export: g.tag for g in grants}
        if not self.exports:
            raise SnapshotError(
                f"{rules.source} has no export {name:.80}, and no guest of that name can write to one",
                f"its exports: {', '.join(sorted(rules.exports)) or 'none'}",
            )
        self.exports = {export: Path(os.path.realpath(path)) for export, path in self.exports.items()}
        for export in self.exports:
            snapshot.check_export(export, self.exports[export])
        self.store = Store.of(self.exports)
        inside = [e.name for e in rules.exports.values() if self.store.folder.is_relative_to(os.path.realpath(e.path))]
        if inside:
            raise SnapshotError(
                f"export {inside[0]} has {self.store.folder} in it, so its guests would see all snapshots",
                "export a directory beside it",
            )

    def one(self, what: str) -> tuple[str, Path]:
        """Its export, if there is but one. SnapshotError."""
        if len(self.exports) > 1:
            raise SnapshotError(
                f"guest {self.guest} has {len(self.exports)} exports, and {what} is of one",
                f"name it: {', '.join(self.exports)}",
            )
        return next(iter(self.exports.items()))


def run(args: argparse.Namespace) -> int:
    """Runs one command; 0 if all is well."""
    rules = policy.load(args.policy, check_paths=False)
    commands: dict[str, Callable[[argparse.Namespace, Target, Policy], Any]] = {
        "create": _create, "list": _list, "diff": _diff, "restore": _restore, "delete": _delete, "prune": _prune,
        "clone": _clone,
    }  # fmt: skip
    if args.verb == "schedule":
        said = _schedule(args, rules)  # one can end that of an export which is gone
    else:
        said = commands[args.verb](args, Target(args.target, rules, _running(args.runtime_dir)), rules)
    if args.json:
        print(json.dumps(said, indent=2), flush=True)
    return 0


def _running(runtime: Path) -> dict[str, str]:
    """The uuids of the guests that run, by name."""
    try:
        return {guest["name"]: guest["uuid"] for guest in control.ask(control.Status(), runtime)["guests"]}
    except NobodyError:
        return {}


def _say(args: argparse.Namespace, *lines: str) -> None:
    if not args.json:
        print(*lines, sep="\n", flush=True)


def _create(args: argparse.Namespace, target: Target, _: Policy) -> dict[str, Any]:
    made = target.store.create(
        target.exports, args.name, pauser(args.runtime_dir, force=args.force), guest=target.guest, reason=args.reason
    )
    what = ", ".join(s.export for s in made.snapshots)
    _say(
        args, f"snapshot {made.snapshots[0].name} of {what}: {made.devices} devices stood still {made.pause_ms:.0f} ms"
    )
    return {
        "changed": True,
        "snapshots": [s.plain() for s in made.snapshots],
        "pause_ms": round(made.pause_ms, 3),
        "devices": made.devices,
    }


def _list(args: argparse.Namespace, target: Target, _: Policy) -> dict[str, Any]:
    found = [s for export in target.exports for s in target.store.all(export)]
    if found:
        _say(args, *table([("EXPORT", "NAME", "TIME", "GUEST", "REASON"), *map(_row, found)], right=5))
    else:
        _say(args, f"no snapshots of {', '.join(target.exports)}")
    return {"exports": sorted(target.exports), "snapshots": [s.plain() for s in found]}


def _row(one: Snapshot) -> tuple[str, ...]:
    when = one.time.strftime("%Y-%m-%d %H:%M:%S")
    return one.export, one.name, when, one.guest or "-", _printable(one.reason)


def _diff(args: argparse.Namespace, target: Target, _: Policy) -> dict[str, Any]:
    said = {}
    for export, path in target.exports.items():
        with _progress("comparing") as step:
            found = target.store.diff(export, path, args.older, args.newer or NOW, content=not args.quick, step=step)
        said[export] = [change.plain() for change in found]
        _say(args, *([f"{export}:"] if len(target.exports) > 1 else []), *map(_difference, said[export]))
    return {"changed": any(said.values()), "exports": said}


_SIGNS = {"created": "+", "deleted": "-", "renamed": ">", "modified": "M", "metadata": "m"}


def _difference(change: Mapping[str, Any]) -> str:
    """One line for a change."""
    path = _printable(change["path"])
    if change["change"] == "renamed":
        path = f"{_printable(change['from'])} -> {path}"
    notes = []
    if ranges := change.get("ranges") if change["change"] in ("modified", "renamed") else None:
        shown = ", ".join(f"{start}+{length}" for start, length in ranges[:MOST_SHOWN])
        notes.append(f"bytes {shown}" + (f" and {len(ranges) - MOST_SHOWN} more" if len(ranges) > MOST_SHOWN else ""))
    if change["change"] == "created" and change["type"] == "file":
        notes.append(size(change["size"]))
    notes += change.get("what", [])
    slash = "/" if change["type"] == "directory" else ""
    return f"{_SIGNS[change['change']]} {path or '.'}{slash}" + (f"  ({', '.join(notes)})" if notes else "")


def _printable(text: str) -> str:
    """What a guest or somebody else wrote, without what would move a terminal's cursor."""
    return escape(text.encode(errors="surrogateescape"))


def _restore(args: argparse.Namespace, target: Target, rules: Policy) -> dict[str, Any]:
    paths = [restore.clean(path) for path in args.paths]
    if paths:
        target.one("a path")
    for export in target.exports:
        target.store.get(export, args.name)
    whole = not paths or b"" in paths
    if whole and not args.online and not args.dry_run:
        for export, path in target.exports.items():
            _refuse_attached(args.runtime_dir, export, path)
    said = {}
    for export, path in target.exports.items():
        swap = whole and not args.online
        changes = []
        with _progress("restoring") as step:
            for one in [b""] if whole else paths:
                changes += restore.restore(
                    target.store, export, path, args.name, one,
                    runtime=args.runtime_dir, force=args.force, dry_run=args.dry_run or swap, step=step,
                )  # fmt: skip
        if swap and changes and not args.dry_run:
            target.store.swap(export, args.name, path)
            if (most := rules.quotas().get(rules.exports[export].path)) is not None:
                quota.enforce(path, most)  # it is another subvolume
        said[export] = [change.plain() for change in changes]
        done = "would take back" if args.dry_run else "took back"
        _say(args, f"{export}: {done} {len(changes)} changes since {args.name}")
        if args.dry_run:
            _say(args, *map(_difference, said[export]))
    return {"changed": any(said.values()), "exports": said}


def _refuse_attached(runtime: Path, export: str, path: Path) -> None:
    try:
        devices = control.ask(control.Status(), runtime)["devices"]
    except NobodyError:
        if list(runtime.glob("worker-*.sock")):
            raise
        return
    for device in devices:
        there = Path(os.path.realpath(device["path"]))
        if device["pid"] is not None and (there.is_relative_to(path) or path.is_relative_to(there)):
            raise SnapshotError(
                f"{export} is attached to guest {device['guest']} as {device['tag']}",
                f"shut it down, or: xen9p detach {device['guest']} {device['tag']}; or restore with --online",
            )


def _delete(args: argparse.Namespace, target: Target, _: Policy) -> dict[str, Any]:
    gone = []
    there = [e for e in target.exports if any(s.name == args.name for s in target.store.all(e))]
    for export in there or target.exports:
        gone.append(target.store.delete(export, args.name))
    _say(args, *(f"deleted snapshot {s.name} of {s.export}" for s in gone))
    return {"changed": True, "snapshots": [s.plain() for s in gone]}


def _keep(args: argparse.Namespace) -> Keep:
    return Keep(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Keep)})


def _prune(args: argparse.Namespace, target: Target, _: Policy) -> dict[str, Any]:
    keep = _keep(args)
    if keep == Keep():
        raise SnapshotError("this would delete every snapshot", "say what to keep, for instance --keep-last 1")
    gone: list[Snapshot] = []
    kept: list[Snapshot] = []
    for export in target.exports:
        stay, go = target.store.prune(export, keep, reason=args.reason, dry_run=args.dry_run)
        kept, gone = [*kept, *stay], [*gone, *go]
    word = "would delete" if args.dry_run else "deleted"
    _say(args, *(f"{word} {s.export} {s.name}" for s in gone), f"{word} {len(gone)}, kept {len(kept)}")
    return {"changed": bool(gone), "deleted": [s.plain() for s in gone], "kept": [s.plain() for s in kept]}


def service(args: argparse.Namespace, keep: Keep) -> str:
    """What a schedule runs, with what rights, as a service of systemd has it: first a new one, then old ones go."""
    places = (("policy", args.policy, defaults.POLICY), ("runtime-dir", args.runtime_dir, defaults.RUNTIME))
    where = "".join(f" --{name} {timers.word(path.absolute())}" for name, path, usual in places if path != usual)
    kept = " ".join(f"--keep-{span} {count}" for span, count in dataclasses.asdict(keep).items() if count)
    command, own = f"{timers.program()} snapshot", f"--reason {SCHEDULED}{args.target}"
    return f"""ExecStart={command} create {args.target} {own}{where}
ExecStart={command} prune {args.target} {own} {kept}{where}
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER
"""


def _schedule(args: argparse.Namespace, rules: Policy) -> dict[str, Any]:
    keep = _keep(args)
    on = args.on is not None
    if on and keep == Keep():
        raise SnapshotError("this would fill the store", "say what to keep, for instance --keep-hourly 24")
    if not on and keep != Keep():
        raise SnapshotError("what is kept says nothing without --on", "add --on")
    if not _IN_A_UNIT.fullmatch(args.target):
        raise SnapshotError(
            f"{args.target!r:.80} cannot have a schedule: its name would be part of a unit's",
            "take one with letters, digits, '.', '_' and '-' only",
        )
    if on:
        Target(args.target, rules, _running(args.runtime_dir))
    timer = timers.Timer(
        f"xen9p-snapshot-{args.target}",
        args.unit_dir,
        "xen9p snapshot schedule",
        f"Snapshots of {args.target}",
        slack="AccuracySec=1s",
        policy=args.policy.absolute(),
    )
    changed, said = timer.change(args.on, args.off, service(args, keep) if on else "")
    _say(args, said)
    return {"changed": changed, "said": said}


def _clone(args: argparse.Namespace, target: Target, _: Policy) -> dict[str, Any]:
    roots = [export for export, tag in target.tags.items() if tag == ROOT_TAG]
    export = roots[0] if roots else target.one("a clone")[0]
    if args.dry_run:
        target.store.get(export, args.name)
        made = target.exports[export].parent / args.new
        there = os.path.lexists(made)
        _say(args, f"{made} " + ("exists already" if there else "would be made"))
        return {"changed": not there, "path": str(made), "export": export}
    made = target.store.clone(export, args.name, target.exports[export], args.new)
    _say(args, f"{made} is a writable copy of {export} as it was in {args.name}")
    return {"changed": True, "path": str(made), "export": export}


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how far something is, to people and if it takes long."""
    with Meter() as meter:
        yield lambda done, total: meter.show(lambda _: f"{what}: {done} of {total}")
