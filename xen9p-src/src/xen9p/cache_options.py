"""Options of xen9p cache show, learn and forget. What they do is in cache_commands.py, which takes longer to load."""

from __future__ import annotations

import argparse
from pathlib import Path

from xen9p import defaults, options
from xen9p.options import Subparsers


def add(commands: Subparsers) -> None:
    """Adds the commands to the parser of xen9p."""
    cache = commands.add_parser(
        "cache", help="what of guests' files is in memory", description="See and steer what is in dom0's page cache."
    )
    verbs = cache.add_subparsers(dest="verb", metavar="VERB", required=True)
    show = verbs.add_parser(
        "show",
        help="what is in memory, who shares it, hits, gains",
        description="Show how much of each export is in dom0's page cache, who shares it, what reads have hit, and "
        "what reading ahead, streams and shared origins have brought.",
    )
    show.add_argument("what", nargs="?", default="", metavar="EXPORT|GUEST", help="default: every export of the policy")
    show.add_argument("--top", type=_count, default=0, metavar="N", help="and the N files that have most in memory")
    show.add_argument(
        "--file",
        action="append",
        type=Path,
        default=[],
        metavar="PATH",
        help="and how much of this file, such as a disk image, is in memory; may be given several times",
    )
    show.add_argument("--quick", action="store_true", help="do not look at the exports' files: counters alone")
    show.add_argument(
        "--most",
        type=_count,
        default=500_000,
        metavar="N",
        help="files of one export that are looked at; default: %(default)s",
    )
    show.add_argument("--json", action="store_true", help="as one JSON object")
    _places(show)
    options.runtime_dir(show)

    learn = verbs.add_parser(
        "learn",
        help="learn anew what a guest reads, from now on",
        description="Have what a running guest reads from now on learned, in place of what is known of its image.",
    )
    learn.add_argument("guest", metavar="GUEST", help="name or uuid of a running guest")
    learn.add_argument("--tag", default="root", help="of which device; default: %(default)s")
    options.runtime_dir(learn)

    forget = verbs.add_parser(
        "forget",
        help="forget what is known of images",
        description="Forget what has been learned of an image, or of the one that an export is a clone of.",
    )
    forget.add_argument("what", nargs="?", default="", metavar="IMAGE|EXPORT", help="an image's uuid, or an export")
    forget.add_argument("--all", action="store_true", help="of every image")
    _places(forget)


def _places(command: argparse.ArgumentParser) -> None:
    options.policy_file(command)
    command.add_argument(
        "--state-dir", type=Path, default=defaults.PROFILES, metavar="DIR", help="profiles; default: %(default)s"
    )


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 10_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 10000000")
    return int(text)
