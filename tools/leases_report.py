"""Make the documentation's page of what coherent leases are worth from what tests/lab/test_coherent.py measured.

Usage: leases_report.py .lab/lab/leases.json docs/results
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_stats import spread
from bench_store import bars_chart
from lab_report import write_pages

LEAST = 5
"""How many times as fast as cache=none it shall be."""
NAMES = {"v9fs": "v9fs, `cache=none`", "coherent": "`xen9p mount --cache coherent`"}
HEAD = """# What leases are worth

<!-- Written by tools/leases_report.py from a run of tests/lab/test_coherent.py: changes are lost. -->

Measured {date} in a guest (Linux {kernel}) of a nested Xen host, on one tree: what `git status` asks a filesystem for,
{calls:.0f} calls. Every file by *lstat*(2), a name that is not there in each directory, every directory listed. The
median of {rounds} rounds, by turns, and the middle half of them; a round before them fills what can be filled.

![Milliseconds of a round](leases.svg)

| mount | ms | calls a second | |
| --- | ---: | ---: | ---: |
"""


def page(found: Mapping[str, Any]) -> str:
    """Return the page in Markdown.

    Args:
        found: {"date", "kernel", "mounts": {"v9fs" and "coherent": what bench_leases.measure() gives}}
    """
    mounts: Mapping[str, Mapping[str, Any]] = found["mounts"]
    base = spread(mounts["v9fs"]["rounds"])
    one = mounts["coherent"]
    text = HEAD.format(date=found["date"], kernel=found["kernel"], calls=one["calls"], rounds=len(one["rounds"]))
    for name, label in NAMES.items():
        took = spread(mounts[name]["rounds"])
        rate = 1000 * mounts[name]["calls"] / took.median
        times = f"{base.median / took.median:.1f} times"
        text += f"| {label} | {took.median:.0f} ({took.q1:.0f} to {took.q3:.0f}) | {rate:.0f} | {times} |\n"
    ratio = base.median / spread(one["rounds"]).median
    held = "held" if ratio >= LEAST else "**missed**"
    return f"{text}\nThe bar is {LEAST} times: {held}.\n"


def chart(found: Mapping[str, Any]) -> str:
    """Return the chart as SVG."""
    css = {"v9fs": "theirs", "coherent": "ours"}
    rows = []
    for name, label in NAMES.items():
        median = spread(found["mounts"][name]["rounds"]).median
        rows.append((label.replace("`", ""), [(css[name], median, f"{median:.0f} ms")]))
    return bars_chart("Milliseconds of a round of git status", rows, left=240, room=90, top=34, bar=22)


def main() -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("found", type=Path, metavar="leases.json", help="what the test has written")
    parser.add_argument("docs", type=Path, metavar="DIR", help="where page and chart go")
    given = parser.parse_args()
    return write_pages(
        "leases_report",
        "tests/lab/test_coherent.py",
        given.found,
        lambda found: {given.docs / "leases.md": page(found), given.docs / "leases.svg": chart(found)},
    )


if __name__ == "__main__":
    raise SystemExit(main())
