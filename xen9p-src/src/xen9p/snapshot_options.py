"""Options of `xen9p snapshot`. What it does is in snapshot_commands.py."""

from __future__ import annotations

import argparse
from typing import Final

from xen9p import options
from xen9p.options import Subparsers

WHEN: Final = "hourly"
_TARGET = "an export of the policy; or a guest: all exports that it can write to"


def add(commands: Subparsers) -> None:
    """Adds the command to the parser of xen9p."""
    top = commands.add_parser(
        "snapshot",
        help="snapshots of exports and guests",
        description="Make, compare and restore snapshots of exports on btrfs.",
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, help_: str, description: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs.add_parser(name, help=help_, description=description)
        made.add_argument("target", metavar="EXPORT|GUEST", help=_TARGET)
        return made

    def last(made: argparse.ArgumentParser) -> None:
        made.add_argument("--json", action="store_true", help="as one JSON object")
        options.policy_file(made)
        options.runtime_dir(made)

    create = verb("create", "make one", "Make a snapshot of one instant; devices that write there stand still for it.")
    create.add_argument("name", nargs="?", default="", metavar="NAME", help="default: the time, UTC")
    create.add_argument("--reason", default="", metavar="TEXT", help="is listed with it")
    create.add_argument(
        "--force", action="store_true", help="also if requests of a guest do not end: they may be in it by half"
    )
    last(create)

    last(verb("list", "list them, the oldest first", "List snapshots in the order in which they were made."))

    diff = verb("diff", "which files and bytes differ", "Show what differs between two snapshots, or since one.")
    diff.add_argument("older", metavar="NAME", help="a snapshot")
    diff.add_argument("newer", nargs="?", default="", metavar="NAME2", help="another one; default: the export as it is")
    diff.add_argument(
        "--quick", action="store_true", help="do not look into files: what is not shared on disk is different"
    )
    last(diff)

    restore = verb(
        "restore",
        "bring back files, or all",
        "Make files, directories or a whole export what they are in a snapshot. What guests have made since is lost.",
    )
    restore.add_argument("name", metavar="NAME", help="a snapshot")
    restore.add_argument("paths", nargs="*", metavar="PATH", help="from the export's top; default: all of it")
    restore.add_argument("--online", action="store_true", help="all of it while it is attached, file by file")
    restore.add_argument("--force", action="store_true", help="also files that a guest has open")
    restore.add_argument("--dry-run", action="store_true", help="only say what would be taken back")
    last(restore)

    delete = verb("delete", "delete one", "Delete a snapshot.")
    delete.add_argument("name", metavar="NAME", help="a snapshot")
    last(delete)

    def keep(made: argparse.ArgumentParser) -> None:
        made.add_argument("--keep-last", dest="last", type=_number, default=0, metavar="N", help="the last ones")
        for span in ("hour", "day", "week", "month", "year"):
            word = "daily" if span == "day" else f"{span}ly"
            help_ = f"the last one of each of the last {span}s that have any"
            made.add_argument(f"--keep-{word}", dest=word, type=_number, default=0, metavar="N", help=help_)

    prune = verb("prune", "delete what a schedule does not keep", "Delete all snapshots but those that are to be kept.")
    keep(prune)
    prune.add_argument(
        "--reason", metavar="TEXT", help="look only at those that were made with it; default: at all of them"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    last(prune)

    schedule = verb(
        "schedule",
        "have one made by itself, again and again",
        "Have systemd make a snapshot at certain times, and delete of those that it made what is not to be kept. "
        "Without options, say what is set up.",
    )
    options.schedule(schedule, WHEN)
    keep(schedule)
    last(schedule)

    clone = verb(
        "clone", "a writable copy", "Make a writable copy of a snapshot beside its export; of a guest's, its root."
    )
    clone.add_argument("name", metavar="NAME", help="a snapshot")
    clone.add_argument("new", metavar="NEW", help="name of the new directory")
    clone.add_argument("--dry-run", action="store_true", help="only say where it would be, and whether it is there")
    last(clone)


def _number(text: str) -> int:
    if not text.isdigit() or int(text) > 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of snapshots")
    return int(text)
