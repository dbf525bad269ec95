"""The documentation's table of mappings, from what the lab's test found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "mmap_report.py"


def run(found: Path, page: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, found, page], capture_output=True, text=True, check=False)


def test_the_table_has_each_case_and_mode(tmp_path: Path) -> None:
    modes = {"none": {"read": "yes", "write": "EINVAL"}, "loose": {"read": "no"}}
    (tmp_path / "found.json").write_text(json.dumps({"kernel": "6.1.0-test", "modes": modes}))
    assert run(tmp_path / "found.json", tmp_path / "page.md").returncode == 0
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert "| | `none` | `loose` |" in lines
    assert "| read | ✓ | ✗ |" in lines
    assert "| write | `EINVAL` |  |" in lines
    assert any("6.1.0-test" in line for line in lines)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text("[]")
    for name in ("found.json", "none.json"):
        done = run(tmp_path / name, tmp_path / "page.md")
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert name in done.stderr
