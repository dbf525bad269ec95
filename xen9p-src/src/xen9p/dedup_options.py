"""Options of xen9p dedup run, status and schedule. What they do is in dedup_commands.py, which takes longer to load."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Final

from xen9p import options
from xen9p.options import Subparsers
from xen9p.sizes import parse_size

STATE: Final = Path("/var/lib/xen9p/dedup")
WHEN: Final = "*-*-* 03:30:00"
SETTLE: Final = 10.0
"""Seconds for which a file must not have been changed; until then it is left for the next run."""


def add(commands: Subparsers) -> None:
    """Adds the commands to the parser of xen9p."""
    dedup = commands.add_parser(
        "dedup", help="share what files have in common", description="Share equal extents of all exports of a store."
    )
    verbs = dedup.add_subparsers(dest="verb", metavar="VERB", required=True)
    run = verbs.add_parser(
        "run",
        help="look at what has changed, and share what is equal",
        description="Look at what has changed since the last run, and have the kernel share what is equal.",
    )
    run.add_argument(
        "exports", nargs="*", metavar="EXPORT", help="default: every export of the policy that is on btrfs"
    )
    run.add_argument("--full", action="store_true", help="look at everything, changed or not")
    run.add_argument(
        "--limit", type=_rate, default=0, metavar="BYTES/s", help="of file data that is read, as in 50M; default: none"
    )
    run.add_argument("--dry-run", action="store_true", help="say what would be shared, and change nothing")
    run.add_argument(
        "--settle",
        type=_settle,
        default=SETTLE,
        metavar="S",
        help="leave files alone that were changed so many seconds ago or less; default: %(default)g",
    )
    run.add_argument("--json", action="store_true", help="as one JSON object")
    _places(run)
    status = verbs.add_parser(
        "status",
        help="what exports have, share and have saved",
        description="Show what each export has, what it shares with others, and what runs have saved.",
    )
    status.add_argument("--json", action="store_true", help="as one JSON object")
    _places(status)
    schedule = verbs.add_parser(
        "schedule",
        help="have it run by itself",
        description="Have systemd run it at certain times. Without options, say what is set up.",
    )
    options.schedule(schedule, WHEN)
    schedule.add_argument("--limit", type=_rate, default=0, metavar="BYTES/s", help="for its runs")


def _places(command: argparse.ArgumentParser) -> None:
    options.policy_file(command)
    command.add_argument(
        "--state-dir", type=Path, default=STATE, metavar="DIR", help="journal and index; default: %(default)s"
    )


def _rate(text: str) -> int:
    value = parse_size(text)
    if value is None or value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate from 64K on")
    return value


def _settle(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return value
