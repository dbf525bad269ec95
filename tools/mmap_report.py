"""Make the documentation's table of mmap(2) in v9fs's cache modes from what tests/lab/test_mmap.py found.

Usage: mmap_report.py .lab/lab/mmap.json docs/results/mmap.md
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab_report import write_pages

HEAD = """# Mappings and cache modes

<!-- Written by tools/mmap_report.py from a run of tests/lab/test_mmap.py: changes are lost. -->

What mmap(2) does in a mount of xen9p through the guest's own v9fs (Linux {kernel}), by the mount option `cache`. Each
cell is an attempt in a guest: ✓ works, ✗ gives what is old, or the errno.
"""

FOOT = """
Where a shared mapping can be written, its pages reach dom0 by `msync(2)`, by `munmap(2)` (`cache=mmap`), or when the
guest's kernel writes them back. No mode tells a guest that dom0 or another guest has changed a file: for what several
sides write, use `cache=none`.
"""


def page(found: Mapping[str, Any]) -> str:
    """Return the page in Markdown.

    Args:
        found: {"kernel": release, "modes": {mode: {case: "yes", "no" or an errno's name}}}
    """
    modes: Mapping[str, Mapping[str, str]] = found["modes"]
    cases = list(dict.fromkeys(case for results in modes.values() for case in results))
    rows = [f"| | {' | '.join(f'`{mode}`' for mode in modes)} |", f"| --- |{' --- |' * len(modes)}"]
    for case in cases:
        rows.append(f"| {case} | {' | '.join(_cell(results.get(case, '')) for results in modes.values())} |")
    return "\n".join([HEAD.format(kernel=found["kernel"]), *rows, FOOT])


def _cell(result: str) -> str:
    return {"yes": "✓", "no": "✗", "": ""}.get(result, f"`{result}`")


def main() -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("found", type=Path, metavar="mmap.json", help="what the test has written")
    parser.add_argument("page", type=Path, metavar="PAGE.md", help="where the page goes")
    given = parser.parse_args()
    return write_pages("mmap_report", "tests/lab/test_mmap.py", given.found, lambda found: {given.page: page(found)})


if __name__ == "__main__":
    raise SystemExit(main())
