"""The benchmark of the host's caching: its bars, page and chart, and a small run of the real thing."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import bench_cache
import bench_store

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "bench_cache.py")]
MIB = bench_store.MIB


def boots(**seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Three rounds of each boot, the second as given."""
    return {
        name: [{"seconds": seconds.get(name, 4.0) + off, "misses": 1} for off in (-0.5, 0.0, 0.5)]
        for name in bench_cache.BOOTS
    }


def result(kept: int, **seconds: float) -> dict[str, Any]:
    streams = {
        f"{often}-{how}": {"hits_before": 100, "hits_after": kept, "dropped": MIB, "seconds": 1.0}
        for often in ("once", "often")
        for how in ("with", "without")
    }
    sizes = {"rounds": 3, "tree_mib": 1, "clones": 2, "memory_mib": 1, "hot_mib": 1, "stream_mib": 4, "think": 0.005}
    found: dict[str, Any] = {
        "date": "2026-01-01 00:00 UTC",
        "kernel": "6.1",
        "processors": 2,
        "sizes": sizes,
        "files": 10,
        "profile": {"files": 10, "bytes": MIB},
        "boots": {"disk": boots(**seconds), "plain": boots()},
        "streams": streams,
        "copies": {"clones": 4 * MIB, "sharing": MIB, "images_host": 5 * MIB, "images_guests": 4 * MIB},
    }
    return found | {"bars": bench_cache.bars(found)}


def test_bars_are_held_or_missed() -> None:
    good = result(95, first=8.0)
    assert all(bar["held"] for bar in good["bars"])
    bad = result(80, first=4.0, **{"warm-ahead": 5.0})
    assert [bar["held"] for bar in bad["bars"]] == [False, False, False, True, True, False, False]
    assert bench_cache.page(bad).count("**missed**") == 5


def test_the_chart_is_svg() -> None:
    chart = ET.fromstring(bench_cache.chart(result(95, first=8.0)))
    bars = [float(bar.get("width", "")) for bar in chart.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(bars) == 2 * len(bench_cache.BOOTS)
    assert max(bars) == bars[0]


@pytest.mark.parametrize("words", [["--clones", "1"], ["--rounds", "0"], ["--think", "2"]])
def test_bad_input_is_one_line(words: list[str]) -> None:
    done = subprocess.run([*TOOL, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(bool(bench_cache.missing()), reason=bench_cache.missing() or "-")
def test_a_small_run(tmp_path: Path) -> None:
    sizes = ["--rounds", "1", "--tree-mib", "2", "--clones", "2", "--hot-mib", "16"]
    more = ["--memory-mib", "128", "--stream-mib", "160", "--think", "0.001", "--folder", str(tmp_path)]
    places = ["--results", str(tmp_path / "cache.json"), "--docs", str(tmp_path / "docs")]
    done = subprocess.run([*TOOL, *sizes, *more, *places], check=False, capture_output=True, text=True)
    if "no cgroup controller" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cache.json").read_text())
    disk = {name: rows[0] for name, rows in found["boots"]["disk"].items()}
    assert disk["first"]["misses"] > 10 >= disk["lead"]["misses"]
    assert disk["shared"]["shared"] > MIB
    assert disk["off"]["ahead"] == 0 < disk["second"]["ahead"]
    assert found["copies"]["clones"] > 1.5 * found["copies"]["sharing"]
    assert (tmp_path / "docs/cache.md").read_text() == bench_cache.page(found)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("xen9p-cache")] == []
