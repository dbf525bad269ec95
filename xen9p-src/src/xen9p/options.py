"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from xen9p import defaults


def policy_file(command: argparse.ArgumentParser) -> None:
    """Adds --policy FILE."""
    command.add_argument("--policy", type=Path, default=defaults.POLICY, metavar="FILE", help="default: %(default)s")
