"""What pages that are made from a lab test's findings have in common: read, make, write, and one line if that fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench_stats import ReportError


def write_pages(tool: str, test: str, found: Path, make: Callable[[Any], Mapping[Path, str]]) -> int:
    """Write the files that *make* makes of what a test wrote into *found*; the exit code."""
    try:
        pages = make(json.loads(found.read_text()))
        for path, text in pages.items():
            path.write_text(text)
    except OSError as error:
        print(f"{tool}: {error}: run {test} on a lab first", file=sys.stderr)
        return 1
    except (LookupError, TypeError, AttributeError, ValueError, ReportError):
        print(f"{tool}: {found} is not what {test} writes: run it again", file=sys.stderr)
        return 1
    return 0
