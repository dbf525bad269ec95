"""The full benchmark: what is asked of the agent, its answers on a plain directory, meters, bars, page and charts."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import bench_chart
import bench_full
import bench_report
import bench_scaling
import bench_stats
from modules import shipped

ROOT = Path(__file__).resolve().parents[2]
content, cost, host = (shipped(f"bench.{name}") for name in ("content", "cost", "host"))
plan, policy = shipped("bench.plan"), shipped("bench.policy")
settings, sides = shipped("bench.settings"), shipped("bench.sides")
SVG = "{http://www.w3.org/2000/svg}"
EVERY = [side.name for side in sides.SIDES]


def given(**changes: Any) -> Any:
    values: dict[str, Any] = dict.fromkeys(settings.Settings.__dataclass_fields__, "")
    numbers = {"file_mib": 16, "section_seconds": 1.5, "small_files": 20, "sides": EVERY, "groups": [], "store": "/s"}
    return settings.Settings(**(values | numbers | changes))


# What is measured.


def test_each_section_has_bytes_and_areas_that_fit() -> None:
    for group in plan.groups(given()):
        for section in group.request.get("sections", []):
            assert section["bytes"] >= section["bs"]
            assert section["bytes"] <= section["area"]
            assert section["area"] * section["jobs"] <= 16 << 20


def test_a_cold_section_has_a_file_of_its_own() -> None:
    for group in plan.groups(given()):
        if group.cold and "sections" in group.request:
            files = [section["file"] for section in group.request["sections"]]
            assert len(set(files)) == len(files)


def test_every_size_and_job_count_is_read_and_written() -> None:
    names = {section["name"] for group in plan.groups(given()) for section in group.request.get("sections", [])}
    for size in ("4k", "64k", "1m"):
        for jobs in (1, 16):
            for pattern in ("seq", "rand"):
                # 16 writers of 1 MiB would fill the ring, and Linux's frontend wakes nobody who waits for room.
                writers = 4 if (size, jobs) == ("1m", 16) else jobs
                kinds = {f"read-{pattern}-{size}-{jobs}-cold", f"write-{pattern}-{size}-{writers}"}
                assert kinds <= names


def test_the_floor_only_reads_what_it_has() -> None:
    floor = sides.SIDES[-1]
    assert floor.name == "floor"
    for group in plan.groups(given()):
        if group.fits(floor):
            assert all(section["rw"] in {"read", "randread"} for section in group.request["sections"])
            assert all(section["file"].startswith("read-") for section in group.request["sections"])


def test_the_turns_differ_from_group_to_group_and_from_round_to_round() -> None:
    every = list(sides.SIDES)
    begins = {plan.order(every, number, 0)[0].name for number in range(len(every))}
    assert len(begins) > 3
    assert plan.order(every, 0, 1)[0] != plan.order(every, 0, 0)[0]
    for number in range(3):
        assert sorted(side.name for side in plan.order(every, number, 2)) == sorted(EVERY)


def test_groups_can_be_chosen() -> None:
    assert [group.name for group in plan.groups(given(groups=["create", "stat"]))] == ["create", "stat"]
    with pytest.raises(host.BenchError, match="bench_groups has erase, which is none of read-4k-cold, "):
        plan.groups(given(groups=["erase", "stat"]))


# The policy and dom0.


def test_the_policy_gives_each_side_of_ours_a_device() -> None:
    import tomllib

    text = policy.block(given())
    read = tomllib.loads("version = 1\n" + text)
    full = {rule["tag"]: rule for rule in read["rules"] if rule["guest"] == "bench-full"}
    assert set(full) == {"ours", "cached", "fuse"}
    assert full["fuse"]["frontend"] == "user"
    assert all(rule["export"] in read["exports"] for rule in read["rules"])
    assert policy.without_block(f"before\n{text}") == "before\n"


@pytest.mark.parametrize(
    ("name", "disks", "tagged"),
    [("bench-9p", 0, False), ("bench-blk", 1, False), ("bench-io", 1, True), ("bench-full", 3, True)],
)
def test_each_guest_has_its_disks_and_qemus_tag(name: str, disks: int, tagged: bool) -> None:
    trees = shipped("bench.trees")
    text = trees._config(given(address="10.9.0.250", memory=512), name, Path("/boot/x"))
    assert text.count("target=/s/bench/") == disks
    assert text.count("backendtype=qdisk") == (1 if name == "bench-full" else 0)
    assert ("tag=theirs" in text) == tagged
    # xl's syntax is Python's, as far as this goes.
    values: dict[str, Any] = {}
    exec(text, {}, values)
    assert len(values.get("disk", [])) == disks


def test_libraries_of_ldd() -> None:
    printed = (
        "\tlinux-vdso.so.1 (0x00007ffc5b5f6000)\n"
        "\tlibaio.so.1 => /lib/x86_64-linux-gnu/libaio.so.1 (0x00007f0000000000)\n"
        "\t/lib64/ld-linux-x86-64.so.2 (0x00007f0000000000)\n"
    )
    found = [str(path) for path in content.libraries(printed)]
    assert found == ["/lib/x86_64-linux-gnu/libaio.so.1", "/lib64/ld-linux-x86-64.so.2"]


def test_busy_leaves_idle_and_stolen_time_out() -> None:
    line = "cpu  100 20 30 9999 8888 5 15 7777 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert cost.busy(line) == 170 / os.sysconf("SC_CLK_TCK")


def test_a_process_that_works_is_seen_to() -> None:
    before = cost.process(os.getpid())
    end = before + 0.05
    while cost.process(os.getpid()) < end:
        sum(range(10000))
    assert cost.process(os.getpid()) >= end
    assert cost.process(2**22 + 1) == 0.0


# The agent.


@contextmanager
def agent(tools: Path) -> Iterator[Any]:
    program = str(ROOT / "roles/bench/files/agent.py")
    with subprocess.Popen(
        [sys.executable, program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"BENCH_TOOLS": str(tools)},
    ) as process:
        assert process.stdin is not None

        def ask(request: dict[str, Any]) -> Any:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()
        assert process.wait(10) == 0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plan, "MANY", 50)
    monkeypatch.setattr(plan, "FEW", 30)
    folder = tmp_path / "place"
    folder.mkdir()
    content.fill(folder, 1)
    subprocess.run(["tar", "-cf", str(tmp_path / "tree.tar"), "-C", str(folder), "tree"], check=True)
    return folder


def test_the_agent_works_with_small_files(tmp_path: Path, place: Path) -> None:
    with agent(tmp_path) as ask:
        for group in plan.groups(given()):
            if group.request["do"] == "fio":
                continue
            asked = group.request | {"name": group.name, "round": 3, "place": str(place)}
            if group.warm:
                assert ask({"do": "warm", "work": asked}) == {}
            answer = ask(asked)
            assert answer["sections"][group.name]["operations"] > 0, answer
            assert answer["sections"][group.name]["seconds"] > 0
            if group.name == "create":
                assert len(list((place / "new").iterdir())) == 20
            if group.name == "unlink":
                assert not list((place / "new").iterdir())
            if group.name == "find-cold":
                assert answer["sections"][group.name]["operations"] == plan.TREE[0] * plan.TREE[1]
        assert len(list((place / "untar-3").rglob("*"))) == 1 + plan.TREE[0] * (1 + plan.TREE[1])


def test_the_agent_says_what_it_cannot_do_and_goes_on(tmp_path: Path, place: Path) -> None:
    with agent(tmp_path) as ask:
        asked = {"do": "unlink", "name": "unlink", "count": 1, "place": str(place)}
        assert "No such file" in ask(asked)["error"]
        assert "error" in ask({"do": "nothing"})
        assert ask({**asked, "do": "stat", "name": "stat"})["sections"]["stat"]["operations"] == 1


FIO = """#!/bin/sh
cat > {folder}/asked
printf '%s' '{{"jobs": [{{"jobname": "read-seq-4k-1-warm", "error": {error}, "read": {{"total_ios": {ios}, \
"runtime": 250}}, "write": {{"total_ios": 0, "runtime": 0}}}}]}}'
"""


@pytest.mark.parametrize(
    ("error", "ios", "said"), [(0, 500, ""), (5, 500, "Input/output error"), (0, 0, "did nothing")]
)
def test_fio_is_asked_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, ios: int, said: str
) -> None:
    fake = tmp_path / "fio"
    fake.write_text(FIO.format(folder=tmp_path, error=error, ios=ios))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    group = next(group for group in plan.groups(given()) if group.name == "read-4k-warm")
    request = group.request | {"sections": group.request["sections"][:1], "place": str(tmp_path)}
    with agent(tmp_path) as ask:
        assert "read-0" in ask({"do": "warm", "work": request})["error"], "what is not there cannot be read before"
        (tmp_path / "read-0").write_bytes(bytes(3 << 20))
        assert ask({"do": "warm", "work": request}) == {}
        answer = ask(request)
    if said:
        assert said in answer["error"]
        return
    assert answer["sections"] == {"read-seq-4k-1-warm": {"operations": 500, "seconds": 0.25}}
    asked = (tmp_path / "asked").read_text().splitlines()
    assert {"rw=read", "bs=4096", "numjobs=1", "filename=read-0", "runtime=1500ms", "stonewall"} <= set(asked)


# The report.

SPEED = {"ours": 1.0, "cached": 0.9, "fuse": 3.0, "theirs": 5.0, "block": 1.2, "qdisk": 1.4, "floor": 0.8}


@pytest.fixture
def run() -> dict[str, Any]:
    """A run in which every bar is held: QEMU takes five times as long as ours, blkback a fifth more."""
    rounds = []
    for number in range(5):
        samples, costs = [], []
        for group in plan.groups(given()):
            names = [section["name"] for section in group.request.get("sections", [])] or [group.name]
            for side in sides.SIDES:
                if not group.fits(side):
                    continue
                where = {"round": number, "side": side.name}
                for name in names:
                    faster = 1.3 if "-16" in name else 1.0
                    seconds = SPEED[side.name] * (1 + number / 100) / faster
                    samples.append(where | {"workload": name, "operations": 1000, "seconds": seconds})
                costs.append(where | {"group": group.name, "operations": 1000, "dom0": 0.5, "backend": 0.25})
        rounds.append({"samples": samples, "costs": costs, "pss_kib": {"ours": 8000 + number, "theirs": 30000}})
    return {
        "date": "2026-11-23 01:00 UTC",
        "machine": {"xen": "4.17.7", "kernel": "6.1.0", "guest_memory_mib": 512, "store": "btrfs"},
        "virtual_machine": {"accelerator": "tcg", "cpus": 2},
        "settings": {"memory": 512, "file_mib": 16, "section_seconds": 2.0},
        "full": {
            "rounds": rounds,
            "ready": {"ours": 0.02},
            "mounts": {"ours": "9p rw,cache=none"},
            "guest_kernel": "6.1.0",
        },
    }


def slower(run: dict[str, Any], factor: float, side: str, *names: str) -> dict[str, Any]:
    changed = copy.deepcopy(run)
    for one in changed["full"]["rounds"]:
        for sample in one["samples"]:
            if sample["side"] == side and sample["workload"] in names:
                sample["seconds"] *= factor
    return changed


def test_all_bars_held(run: dict[str, Any]) -> None:
    found = bench_full.verdicts(run)
    assert len(found) == len(bench_full.BARS) + 3
    assert [item.text for item in found if not item.held] == []


@pytest.mark.parametrize(
    ("side", "name", "bar", "said"),
    [
        ("ours", "create", 0, "create small files (2.50)"),
        ("ours", "read-rand-4k-1-cold", 0, "read 4k, random, 1 job, cold (2.50)"),
        ("ours", "write-seq-1m-4", 1, "write 1m, sequential, 4 jobs, fsync (2.50)"),
        ("ours", "read-seq-64k-1-cold", 2, "read 64k, sequential, 1 job, cold (0.60)"),
        ("cached", "write-rand-4k-1", 3, "write 4k, random, 1 job, fsync (0.67)"),
        ("cached", "list-1000", 4, "ls -l of 1,000 (0.67)"),
        ("ours", "read-seq-4k-1-warm", 5, "read 4k, sequential, 1 job, warm (0.40)"),
    ],
)
def test_a_bar_that_is_missed_says_where_and_by_how_much(
    run: dict[str, Any], side: str, name: str, bar: int, said: str
) -> None:
    found = bench_full.verdicts(slower(run, 2, side, name))[bar]
    assert not found.held
    assert found.said.endswith(f"missed: {said}")


def test_reads_that_do_not_grow_memory_and_readiness_are_missed(run: dict[str, Any]) -> None:
    changed = slower(run, 1.5, "ours", "read-rand-4k-16-warm")
    changed["full"]["rounds"][2]["pss_kib"]["cached"] = 16 * 1024
    changed["full"]["ready"]["fuse"] = 1.5
    growth, memory, ready = bench_full.verdicts(changed)[-3:]
    assert (growth.held, memory.held, ready.held) == (False, False, False)
    assert "random 0.87, the floor 1.30" in growth.said
    assert memory.said == "16.0 MiB at the most"
    assert ready.said == "1.50 s at the most"


def test_bars_of_what_was_not_measured_are_left_out(run: dict[str, Any]) -> None:
    for one in run["full"]["rounds"]:
        one["samples"] = [sample for sample in one["samples"] if sample["side"] in {"ours", "theirs"}]
    assert not any("blkback" in item.text or "floor" in item.text for item in bench_full.verdicts(run))


def test_times_are_of_one_operation() -> None:
    samples = [{"round": 0, "side": "ours", "seconds": 2.0, "operations": 4000}]
    assert bench_stats.result("x", samples).sides["ours"].median == 0.0005


def test_page_has_rates_ratios_costs_and_memory(run: dict[str, Any]) -> None:
    text = bench_report.full_page(run, "full")
    for expected in (
        "| xen9p at least 4 times QEMU's 9P, metadata and 4k | held | in all 20: 5.00 to 5.00 |",
        "| create small files | 980 |",
        "**5.00** (5.00 to 5.00)",
        "500 (250)",
        "| xen9p | 7.8 MiB | 0.02 s |",
        "`9p rw,cache=none`",
        "emulated (TCG",
        "full-4k.svg",
        "| kernel of the guest | 6.1.0 |",
    ):
        assert expected in text
    assert "cut off" not in text


def test_the_page_says_when_a_run_went_on(run: dict[str, Any]) -> None:
    run["full"]["parts"] = ["2026-01-02 03:04 UTC"]
    assert "cut off" not in bench_report.full_page(run, "full")
    run["full"]["parts"].append("2026-01-03 03:04 UTC")
    text = bench_report.full_page(run, "full")
    assert "begun 2026-01-02 03:04 UTC, 2026-01-03 03:04 UTC. Each round is whole." in text


def test_charts_have_a_bar_a_side_within_their_room(run: dict[str, Any]) -> None:
    drawn = bench_full.charts(run, "full")
    assert set(drawn) == {"full-4k.svg", "full-large.svg", "full-files.svg"}
    for text in drawn.values():
        bars = list(ET.fromstring(text).iter(f"{SVG}rect"))
        assert len(bars) > 20
        for bar in bars:
            assert float(bar.attrib["x"]) + float(bar.attrib["width"]) <= bench_chart.WIDTH - bench_chart.ROOM + 1


def test_the_command_writes_samples_page_and_charts(tmp_path: Path, run: dict[str, Any]) -> None:
    command = [sys.executable, str(ROOT / "tools/bench_report.py"), "--results", str(tmp_path / "full.json")]
    command += ["--docs", str(tmp_path / "docs")]
    done = subprocess.run(command, input=json.dumps(run), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bar: ") == len(bench_full.BARS) + 3
    assert json.loads((tmp_path / "full.json").read_text())["full"] == run["full"]
    names = {"full.md", "full-4k.svg", "full-large.svg", "full-files.svg"}
    assert {path.name for path in (tmp_path / "docs").iterdir()} == names


@pytest.mark.parametrize("full", [{"rounds": []}, {"rounds": [{}]}, {"rounds": [{"samples": [{}]}]}])
def test_a_run_without_samples_is_one_line(tmp_path: Path, full: dict[str, Any]) -> None:
    command = [sys.executable, str(ROOT / "tools/bench_report.py"), "--results", str(tmp_path / "full.json")]
    text = json.dumps({"full": full, "machine": {}, "settings": {}})
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("bench_report: ")
    assert done.stderr.count("\n") == 1


# What grows.


def test_scaling_page_and_charts_say_what_was_measured(tmp_path: Path) -> None:
    run: dict[str, Any] = {
        "date": "today",
        "where": "in dom0 of a Xen host",
        "kernel": "6.1",
        "processors": 2,
        "rounds": 2,
    }
    for scale in bench_scaling.SCALES:
        samples = [
            {"size": size, "operation": name, "round": number, "us": us + number}
            for size, us in ((10, 9.5), (1000, 19.5))
            for name in bench_scaling.OPERATIONS
            for number in range(2)
        ]
        run[scale] = {"samples": samples, "memory": [{"size": 10, "kib": 5}, {"size": 1000, "kib": 77}]}
    text = bench_scaling.page(run)
    assert "- Twalk and Tclunk: 2.00 times as long with 1,000 as with 10." in text
    assert "| 1,000 | 20.00 (19.75 to 20.25) |" in text
    (tmp_path / "run.json").write_text(json.dumps(run))
    command = [sys.executable, str(ROOT / "tools/bench_scaling.py"), "--docs", str(tmp_path), "--show"]
    assert subprocess.run([*command, str(tmp_path / "run.json")], check=False).returncode == 0
    assert (tmp_path / "scaling.md").read_text() == text
    (tmp_path / "run.json").write_text("{}")
    done = subprocess.run([*command, str(tmp_path / "run.json")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    for drawing in bench_scaling.charts(run).values():
        assert len(list(ET.fromstring(drawing).iter(f"{SVG}polyline"))) == len(bench_scaling.OPERATIONS)


def test_scaling_measures_small_sizes(tmp_path: Path) -> None:
    zygote = bench_scaling.Zygote(6)
    try:
        folder = bench_scaling.folder_of(tmp_path, 50)
        fids = bench_scaling.scale_fids(zygote, folder, [5, 20], 1)
        entries = bench_scaling.scale_entries(zygote, tmp_path, [3], 1)
        devices = bench_scaling.scale_devices(zygote, folder, [1, 2], 1)
    finally:
        zygote.close()
    assert {sample["size"] for sample in fids["samples"]} == {5, 20}
    assert all(sample["us"] > 0 for sample in fids["samples"] + entries["samples"] + devices["samples"])
    assert len(devices["samples"]) == 2 * 2 * len(bench_scaling.OPERATIONS)
    assert devices["memory"][1]["kib_each"] > 0
