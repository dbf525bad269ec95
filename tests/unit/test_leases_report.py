"""The page of what leases are worth: its ratio and bar, its chart, and input that is none."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import leases_report

TOOL = [sys.executable, str(Path(__file__).resolve().parents[2] / "tools/leases_report.py")]


def found(coherent: float) -> dict[str, Any]:
    mounts = {
        name: {"ms": ms, "calls": 500, "rounds": [ms - 1, ms, ms + 1]}
        for name, ms in (("v9fs", 3000.0), ("coherent", coherent))
    }
    return {"date": "today", "kernel": "6.1", "mounts": mounts}


@pytest.mark.parametrize(("ms", "times", "bar"), [(300.0, "10.0 times", "held"), (1000.0, "3.0 times", "**missed**")])
def test_the_page_says_how_many_times_and_whether_it_is_enough(tmp_path: Path, ms: float, times: str, bar: str) -> None:
    (tmp_path / "leases.json").write_text(json.dumps(found(ms)))
    done = subprocess.run([*TOOL, str(tmp_path / "leases.json"), str(tmp_path)], check=False)
    assert done.returncode == 0
    page = (tmp_path / "leases.md").read_text()
    assert f"| {times} |" in page
    assert page.endswith(f"The bar is 5 times: {bar}.\n")
    bars = list(ET.fromstring((tmp_path / "leases.svg").read_text()).iter("{http://www.w3.org/2000/svg}rect"))
    assert len(bars) == len(leases_report.NAMES)


@pytest.mark.parametrize("text", [None, "{}", '{"mounts": {"v9fs": {"rounds": []}}}', "[1]"])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "leases.json").write_text(text)
    done = subprocess.run(
        [*TOOL, str(tmp_path / "leases.json"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert not (tmp_path / "leases.md").exists()
