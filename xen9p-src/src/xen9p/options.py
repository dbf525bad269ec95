"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from xen9p import policy


def policy_file(command: argparse.ArgumentParser) -> None:
    """Adds --policy FILE."""
    command.add_argument(
        "--policy", type=Path, default=policy.DEFAULT_PATH, metavar="FILE", help="default: %(default)s"
    )
