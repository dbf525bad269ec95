"""Count the tests of a run from its JUnit reports, in one line: the last words of .ci/run.

Usage: count_tests.py STATUS [FOLDER], with the exit status of `make test`. Reads the reports of its steps in FOLDER
(default: here): junit-unit.xml, junit-package.xml, junit-store.xml, junit-long.xml, junit-lab.xml; and
junit-real-host.xml if `make test-real-host` wrote one. A report that is missing or broken is a line of its own. Exits
with 1 if any test failed, none ran, or a report is not whole.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

REPORTS = {
    "junit-unit.xml": "the unit tests",
    "junit-package.xml": "the tests of the package",
    "junit-store.xml": "the tests of stores and mounts",
    "junit-long.xml": "the tests of labs, benchmarks and whole stores",
    "junit-lab.xml": "the tests of the lab",
    "junit-real-host.xml": "the tests of the real host",
}
OPTIONAL = {"junit-real-host.xml"}
COUNTS = ("tests", "failures", "errors", "skipped")


def count(report: Path) -> dict[str, int]:
    """Return the counts of all suites in *report*. Raises OSError or ET.ParseError."""
    total = dict.fromkeys(COUNTS, 0)
    for suite in ET.parse(report).getroot().iter("testsuite"):
        for key in COUNTS:
            total[key] += int(suite.get(key, 0))
    return total


def summary(folder: Path, status: int) -> tuple[list[str], bool]:
    """Return the lines to print, and whether all of it is well."""
    lines: list[str] = []
    total = dict.fromkeys(COUNTS, 0)
    for name, what in REPORTS.items():
        try:
            found = count(folder / name)
        except FileNotFoundError:
            if name in OPTIONAL:
                continue
            lines.append(f"error: {what} did not run to their end (no {name}): see what failed above")
        except (OSError, ValueError, ET.ParseError) as error:
            lines.append(f"error: {name} cannot be read ({error}): {what} were cut off")
        else:
            total = {key: total[key] + found[key] for key in COUNTS}
    failed = total["failures"] + total["errors"]
    passed = total["tests"] - failed - total["skipped"]
    if status != 0:
        lines.append(f"error: make test failed with exit status {status}")
    well = not lines and not failed and passed > 0
    return [*lines, f"{passed} passed, {failed} failed, {total['skipped']} skipped"], well


def main() -> int:
    """Print the summary."""
    lines, well = summary(Path(sys.argv[2] if len(sys.argv) > 2 else "."), int(sys.argv[1]))
    print("\n".join(lines))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
