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
