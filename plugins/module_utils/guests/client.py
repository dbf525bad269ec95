"""xen9p for a guest's user space: the host's own copy of it."""

from __future__ import annotations

from pathlib import Path

COMMAND = b"""#!/usr/bin/python3
import sys

from xen9p.cli import main

sys.exit(main())
"""


def files(prefix: Path) -> dict[str, tuple[bytes, int]]:
    """Path in a guest's tree -> content and mode, for xen9p as it is installed below *prefix*; {} if it is not."""
    found: dict[str, tuple[bytes, int]] = {}
    for package in prefix.glob("lib/python3*/site-packages/xen9p"):
        python = package.parents[1].name
        for path in sorted(package.rglob("*")):
            if path.is_file() and path.suffix in (".py", ".so"):
                where = path.relative_to(package.parent)
                found[f"/usr/local/lib/{python}/dist-packages/{where}"] = (path.read_bytes(), 0o644)
    if found:
        found["/usr/local/bin/xen9p"] = (COMMAND, 0o755)
    return found
