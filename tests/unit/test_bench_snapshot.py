"""The benchmark of snapshots: its bars, page and chart, who writes meanwhile, and a small run of the real thing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import bench_snapshot
import bench_store

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "bench_snapshot.py")]
MISSING = bench_store.missing("bench-snapshot")


def result(pause: float = 0.01, missing: int = 0) -> dict[str, Any]:
    taken = {
        way: [{"seconds": 0.02, "pause": pause, "missing": missing}, {"seconds": 0.04, "pause": 0.001, "missing": 0}]
        for way in bench_snapshot.WAYS
    }
    known = {"room": 1 << 20, "diff": 0.5, "diff_read": 3 << 20, "named": 7, "restored": 0.25}
    ways = {
        "ours": known | {"bytes_named": 700},
        "frozen": known | {"blocks": 0.1, "blocks_read": 1 << 20, "bytes_apart": 8192},
    }
    found: dict[str, Any] = {
        "date": "2026-01-01 00:00 UTC",
        "kernel": "6.1",
        "processors": 2,
        "sizes": {"files": [10, 1000], "rounds": 2, "changes": 7},
        "taken": {"10": taken, "1000": taken},
        "afterwards": {"10": ways, "1000": ways},
    }
    return found | {"bars": bench_snapshot.bars(found)}


def test_bars_are_held_or_missed() -> None:
    assert [bar["held"] for bar in result()["bars"]] == [True, True]
    bad = result(pause=0.2, missing=3)
    assert [bar["held"] for bar in bad["bars"]] == [False, False]
    assert bench_snapshot.page(bad).count("**missed**") == 2
    assert "1,000 files" in bad["bars"][0]["text"]


def test_every_row_of_a_table_has_all_cells() -> None:
    text = bench_snapshot.page(result())
    assert text.count("| xen9p snapshot create | 30.0 (20.0 to 40.0) |") == 2
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [8, 8, 4]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_the_chart_is_svg() -> None:
    chart = ET.fromstring(bench_snapshot.chart(result()))
    assert len(list(chart.iter("{http://www.w3.org/2000/svg}rect"))) == 6


def test_a_pause_is_of_the_writes_that_met_the_snapshot() -> None:
    writes = [(0.0, 0.9), (1.0, 0.1), (2.0, 0.5), (3.0, 0.1), (4.0, 0.1)]
    assert bench_snapshot.pause(writes, 2.2, 2.3) == pytest.approx(0.4)
    assert bench_snapshot.pause(writes, 2.6, 2.8) == 0, "it met none"


def test_who_writes_counts_and_says_when_it_cannot() -> None:
    written: list[bytes] = []
    writer = bench_snapshot.Writer(written.append, 7)
    while writer.last < 10:
        time.sleep(0.01)
    assert len(writer.end()) == len(written) == writer.last - 7
    assert [int(data[:16]) for data in written] == list(range(8, writer.last + 1))

    def refuse(_: bytes) -> None:
        raise OSError("the disk is full")

    writer = bench_snapshot.Writer(refuse)
    writer.join(5)
    with pytest.raises(bench_store.BenchError, match="the disk is full"):
        writer.end()


def test_trees_differ_by_name_mode_and_byte(tmp_path: Path) -> None:
    for tree in ("one", "other"):
        (tmp_path / tree / "d").mkdir(parents=True)
        for name in ("same", "d/byte", "mode"):
            (tmp_path / tree / name).write_text("text")
    (tmp_path / "other/d/byte").write_text("test")
    (tmp_path / "other/mode").chmod(0o600)
    (tmp_path / "one/gone").touch()
    (tmp_path / "other/new").touch()
    found = bench_snapshot.differing(tmp_path / "one", tmp_path / "other")
    assert found == {"d/byte", "mode", "gone", "new"}


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--changes", "0"], ["--files", "10", "--changes", "11"]])
def test_bad_input_is_one_line(words: list[str]) -> None:
    done = subprocess.run([*TOOL, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
def test_a_small_run(tmp_path: Path) -> None:
    sizes = ["--files", "120", "--rounds", "2", "--changes", "5"]
    places = ["--results", str(tmp_path / "r.json"), "--docs", str(tmp_path / "docs"), "--folder", str(tmp_path)]
    done = subprocess.run([*TOOL, *sizes, *places], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert {way: len(rows) for way, rows in found["taken"]["120"].items()} == dict.fromkeys(bench_snapshot.WAYS, 2)
    missing = {way: [row["missing"] for row in rows] for way, rows in found["taken"]["120"].items()}
    assert missing["ours"] == missing["frozen"] == [0, 0]
    assert min(missing["unasked"]) > 0, "what a guest has in memory is not on its disk"
    ours, image = (found["afterwards"]["120"][way] for way in ("ours", "frozen"))
    assert (ours["named"], ours["bytes_named"], image["named"]) == (5, 500, 5)
    assert image["bytes_apart"] >= 5 * 4096
    assert (tmp_path / "docs/snapshot.md").read_text() in done.stdout
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("xen9p-")] == []
