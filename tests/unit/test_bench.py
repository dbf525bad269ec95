"""The benchmark's arithmetic and its report, the policy block, and the workloads themselves on a directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import bench_chart
import bench_report
import bench_stats
from modules import shipped

ROOT = Path(__file__).resolve().parents[2]
host, policy = shipped("bench.host"), shipped("bench.policy")


def sample(side: str, seconds: float, number: int = 0, workload: str = "read_big") -> dict[str, Any]:
    return {"round": number, "workload": workload, "side": side, "seconds": seconds}


def run(samples: list[dict[str, Any]], boots: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "date": "2026-11-23 01:00 UTC",
        "profile": "quick",
        "machine": {"xen": "4.17.7", "kernel": "6.1.0", "qemu": "7.2", "guest_memory_mib": 384, "store": "btrfs"},
        "virtual_machine": {"accelerator": "tcg", "cpus": 2},
        "settings": {"memory": 384, "msize": 262144, "cache": "none"},
        "files": {"samples": samples, "pss_kib": {"worker": 5120, "qemu": 36864}},
        "boot": {"samples": boots or []},
    }


@pytest.fixture
def full() -> dict[str, Any]:
    """A run in which QEMU takes thrice as long in every workload and blkback half as long."""
    samples = [
        sample(side, base * factor * (1 + number / 10), number, workload)
        for workload, base in zip(bench_stats.WORKLOADS, (0.6, 0.4, 0.7, 1.4, 0.5), strict=True)
        for side, factor in (("ours", 1), ("theirs", 3), ("block", 0.5))
        for number in range(5)
    ]
    boots = [
        sample(side, 30 + 10 * (side == "block") + number, number) for side in ("ours", "block") for number in range(3)
    ]
    return run(samples, boots)


def test_spread_of_known_values() -> None:
    assert bench_stats.spread([4, 1, 3, 2, 5]) == bench_stats.Spread(3, 2, 4, 1, 5, 5)
    assert bench_stats.spread([7]) == bench_stats.Spread(7, 7, 7, 7, 7, 1)


def test_ratio_is_of_the_medians_and_its_spread_of_the_rounds() -> None:
    samples = [sample("ours", 1, 0), sample("theirs", 3, 0), sample("ours", 10, 1), sample("theirs", 20, 1)]
    found = bench_stats.result("read_big", samples)
    assert found.ratio == {"theirs": pytest.approx(11.5 / 5.5, abs=1e-3)}
    assert (found.rounds["theirs"].low, found.rounds["theirs"].high) == (2, 3)


def test_a_round_that_one_side_lacks_is_left_out_of_the_ratios() -> None:
    found = bench_stats.result("read_big", [sample("ours", 1, 0), sample("theirs", 3, 0), sample("theirs", 9, 1)])
    assert found.rounds["theirs"].count == 1


@pytest.mark.parametrize("samples", [[], [sample("theirs", 1)], [sample("ours", 0.0)]])
def test_samples_that_say_nothing_are_refused(samples: list[dict[str, Any]]) -> None:
    with pytest.raises(bench_stats.ReportError):
        bench_stats.summarise(run(samples))


def test_table_and_verdicts(full: dict[str, Any]) -> None:
    found = bench_stats.summarise(full)
    text = bench_report.table(found)
    assert "held by all" in text
    assert text.count("3.00") == 5
    assert "sooner than the twin on blkback: held" in text


def test_a_workload_below_the_bar_is_named(full: dict[str, Any]) -> None:
    for item in full["files"]["samples"]:
        if item["workload"] == "write" and item["side"] == "theirs":
            item["seconds"] /= 2
    (files, _) = bench_report.verdicts(bench_stats.summarise(full))
    assert "missed by: write 25 MiB, 256 KiB a time, and fsync (1.50)" in files


def test_a_boot_slower_than_the_twin_is_missed(full: dict[str, Any]) -> None:
    for item in full["boot"]["samples"]:
        item["seconds"] += 50 * (item["side"] == "ours")
    assert bench_report.verdicts(bench_stats.summarise(full))[1].endswith("missed")


def test_charts_are_xml_with_a_bar_for_each_median(full: dict[str, Any]) -> None:
    drawn = bench_report.charts(bench_stats.summarise(full), "quick")
    assert set(drawn) == {"quick-files.svg", "quick-boot.svg"}
    space = "{http://www.w3.org/2000/svg}"
    bars = {name: len(ET.fromstring(text).findall(f"{space}rect")) for name, text in drawn.items()}
    assert bars == {"quick-files.svg": 15, "quick-boot.svg": 2}


def test_bars_stay_inside_the_chart(full: dict[str, Any]) -> None:
    for text in bench_report.charts(bench_stats.summarise(full), "quick").values():
        for bar in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}rect"):
            assert float(bar.attrib["x"]) + float(bar.attrib["width"]) <= bench_chart.WIDTH - bench_chart.ROOM + 1


def test_page_says_how_it_was_measured(full: dict[str, Any]) -> None:
    text = bench_report.page(full, bench_stats.summarise(full), "quick")
    for expected in (
        "msize=262144, cache=none",
        "emulated (TCG",
        "our worker 5.0 MiB",
        "| **3.00** |",
        "quick-files.svg",
    ):
        assert expected in text


def report(tmp_path: Path, text: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "tools/bench_report.py"),
        "--results",
        str(tmp_path / "new/quick.json"),
        *more,
    ]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_command_writes_samples_summary_and_page(tmp_path: Path, full: dict[str, Any]) -> None:
    done = report(tmp_path, json.dumps(full), "--docs", str(tmp_path / "docs"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "new/quick.json").read_text())
    assert written["files"]["samples"] == full["files"]["samples"]
    assert [item["name"] for item in written["summary"]] == [*bench_stats.WORKLOADS, "boot"]
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"quick.md", "quick-files.svg", "quick-boot.svg"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {"samples": [{}]}}'])
def test_bad_input_is_one_line(tmp_path: Path, text: str) -> None:
    done = report(tmp_path, text)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("bench_report: ")


def test_the_policy_block_goes_without_a_trace() -> None:
    before = "version = 1\n[exports.home]\npath = '/srv/home'\n"
    assert policy.without_block(before + policy.BEGIN + "anything\n" + policy.END) == before
    assert policy.without_block(before) == before


def test_one_benchmark_at_a_time_on_a_host(tmp_path: Path) -> None:
    with host.alone(tmp_path / "lock"), pytest.raises(host.BenchError, match=r"pid \d+"), host.alone(tmp_path / "lock"):
        pass
    with host.alone(tmp_path / "lock"):
        pass


def test_workloads_run_on_a_plain_directory(tmp_path: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
    program = str(ROOT / "roles/bench/files/workloads.py")
    command = [sys.executable, program, "2", f"ours={tmp_path}/a", f"theirs={tmp_path}/b"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    order = [line.split()[3] for line in lines]
    assert len(lines) == 2 * 2 * len(bench_stats.WORKLOADS)
    assert order[:2] == ["ours", "theirs"]
    assert order[-2:] == ["theirs", "ours"]
    assert not list((tmp_path / "a/new").iterdir())


def test_a_kernel_thread_has_no_memory_of_its_own() -> None:
    """Seen with blkback's threads: the kernel has no such file for them, and says so when it is read."""
    threads = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if not (path / "cmdline").read_bytes() and "PPid:\t2\n" in (path / "status").read_text():
                threads.append(int(path.name))
    if not threads:
        pytest.skip("no kernel thread is visible here")
    assert host.pss(threads[0]) == 0
    assert host.pss(os.getpid()) > 1000
