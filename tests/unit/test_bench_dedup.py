"""The benchmark of de-duplication: a small run of it, its bars, page and chart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import bench_dedup
import bench_store

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "bench_dedup.py")]
MIB = bench_store.MIB


def side(read: int, saved: int) -> dict[str, Any]:
    return {"read": read * MIB, "saved": saved * MIB, "joined": saved * MIB, "seconds": 1.0, "read_per_saved": 2.0}


def result(**sides: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": "2026-01-01 00:00 UTC",
        "kernel": "6.1",
        "processors": 2,
        "duperemove": "0.11.2",
        "sizes": {"guests": 10, "golden_mib": 80.0, "packages_mib": 4.0, "noise_mib": 1.0},
        "before": {"clones": 0, "first": {"read": MIB, "seconds": 0.1}},
        "again": {"clone": 0, "read": 0, "scanned": 0},
        "logical": 850 * MIB,
        "sides": sides,
    }
    return found | {"bars": bench_dedup.bars(found)}


def test_bars_are_held_or_missed() -> None:
    good = result(ours=side(40, 36), full=side(41, 36), files=side(900, 37))
    assert [bar["held"] for bar in good["bars"]] == [True, True, True]
    bad = result(ours=side(100, 30), full=side(41, 36), files=side(900, 37))
    assert [bar["held"] for bar in bad["bars"]] == [False, False, False]
    assert bench_dedup.page(bad).count("**missed**") == 3


def test_without_duperemove_its_columns_are_left_out() -> None:
    found = result(ours=side(40, 36), full=side(41, 36))
    assert len(found["bars"]) == 1
    assert "duperemove on" not in bench_dedup.page(found | {"duperemove": None})


def test_the_chart_is_svg() -> None:
    chart = ET.fromstring(bench_dedup.chart(result(ours=side(40, 36), files=side(900, 37))))
    bars = [float(bar.get("width", "")) for bar in chart.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(bars) == 4
    assert max(bars) == bars[2]


@pytest.mark.parametrize("words", [["--guests", "1"], ["--golden-mib", "0"]])
def test_bad_input_is_one_line(words: list[str]) -> None:
    done = subprocess.run([*TOOL, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(bool(bench_dedup.missing()), reason=bench_dedup.missing() or "-")
def test_a_small_run(tmp_path: Path) -> None:
    sizes = ["--guests", "2", "--golden-mib", "3", "--packages-mib", "1", "--noise-mib", "0.2"]
    places = ["--results", str(tmp_path / "r.json"), "--docs", str(tmp_path / "docs"), "--folder", str(tmp_path)]
    # Without duperemove: that takes longest, and is not ours.
    path = ":".join(part for part in os.environ["PATH"].split(":") if not (Path(part) / "duperemove").exists())
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("btrfs", "mkfs.btrfs", "mount", "umount", "losetup", "cp", "mke2fs"):
        for folder in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
            if (Path(folder) / name).exists() and not (tools / name).exists():
                (tools / name).symlink_to(Path(folder) / name)
    env = {**os.environ, "PATH": f"{tools}:{path}"}
    done = subprocess.run([*TOOL, *sizes, *places], check=False, capture_output=True, text=True, env=env)
    if "mount" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "r.json").read_text())
    assert run["sides"]["ours"]["saved"] > 0.8 * MIB
    assert run["sides"]["ours"]["read"] < 4 * MIB
    assert "duperemove is not installed" in done.stdout or run["duperemove"]
    assert (tmp_path / "docs/dedup.md").read_text() == bench_dedup.page(run)
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if str(tmp_path) in line]
