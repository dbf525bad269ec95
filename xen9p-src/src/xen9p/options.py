"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xen9p import defaults

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]
else:
    Subparsers = argparse._SubParsersAction


def policy_file(command: argparse.ArgumentParser) -> None:
    """Adds --policy FILE."""
    command.add_argument("--policy", type=Path, default=defaults.POLICY, metavar="FILE", help="default: %(default)s")


def runtime_dir(command: argparse.ArgumentParser) -> None:
    """Adds --runtime-dir DIR."""
    command.add_argument(
        "--runtime-dir", type=Path, default=defaults.RUNTIME, metavar="DIR", help="of xen9pd; default: %(default)s"
    )


def schedule(command: argparse.ArgumentParser, usual: str) -> None:
    """Adds --on, --off and --unit-dir; usual: when it is by --on alone. See timers.py."""
    command.add_argument("--on", nargs="?", const=usual, metavar="WHEN", help=f"as systemd.time(7) has it; {usual}")
    command.add_argument("--off", action="store_true", help="no more")
    command.add_argument("--unit-dir", type=Path, default=defaults.UNITS, metavar="DIR", help="default: %(default)s")
