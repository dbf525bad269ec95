"""Counting translations: tracefs, Xen's trace, what raw numbers say, the work on a plain directory, the report."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bench_report
import bench_translations
import translations_copies
from modules import shipped
from xen9p import metrics, path

ROOT = Path(__file__).resolve().parents[2]
FILES, UTILS = ROOT / "roles/bench/files", ROOT / "plugins/module_utils/bench"
counted, host, meters = shipped("bench.counted"), shipped("bench.host"), shipped("bench.meters")
settings, sides, tracefs = shipped("bench.settings"), shipped("bench.sides"), shipped("bench.tracefs")
translations, xentrace = shipped("bench.translations"), shipped("bench.xentrace")
SIDES = {side.name: side for side in sides.SIDES}
SVG = "{http://www.w3.org/2000/svg}"


# tracefs.


HISTOGRAM = """# event histogram
#
# trigger info: hist:keys=dev,rwbs:vals=hitcount,nr_sector:sort=hitcount:size=2048 [active]
#

{ dev:  211812384, rwbs: RM                                                } hitcount:          2  nr_sector:         16
{ dev:  211812352, rwbs: RA                                                } hitcount:          5  nr_sector:        328

Totals:
    Hits: 7
    Entries: 2
    Dropped: 0
"""


def test_rows_of_a_histogram() -> None:
    assert tracefs.rows(HISTOGRAM) == [
        {"dev": "211812384", "rwbs": "RM", "hits": 2, "nr_sector": 16},
        {"dev": "211812352", "rwbs": "RA", "hits": 5, "nr_sector": 328},
    ]


@pytest.fixture
def tracing(tmp_path: Path) -> Iterator[Path]:
    """The kernel's own tracefs."""
    try:
        with tracefs.mounted(tmp_path / "tracing") as folder:
            yield folder
    except tracefs.TraceError as error:
        pytest.skip(str(error))


def test_the_kernel_counts_and_nothing_is_left(tracing: Path) -> None:
    if not (tracing / "events/sched/sched_process_fork/hist").exists():
        pytest.skip("this kernel has no histograms of events")
    events = [
        tracefs.Event("forked", "sched/sched_process_fork", "parent_pid"),
        tracefs.Event("synced", "ksys_sync", "common_pid"),
        tracefs.Event("nothing", "no_such_function_of_any_kernel", "common_pid"),
        tracefs.Event("nowhere", "sched/no_such_event", "common_pid"),
    ]
    counting = tracefs.Counting(tracing, events)
    counting.open()
    try:
        assert counting.missing["nothing"].endswith("has no function no_such_function_of_any_kernel that can be probed")
        assert counting.missing["nowhere"].startswith("this kernel has no event sched/no_such_event")
        subprocess.run(["sh", "-c", "true & wait"], check=True)
        counting.clear()
        done = subprocess.run(["sh", "-c", "echo $$; true & true & true & wait"], check=True, capture_output=True)
        forks = {row["parent_pid"]: row["hits"] for row in counting.read()["forked"]}
        assert forks[done.stdout.decode().strip()] == 3
        assert "synced" in counting.read() or "probed" in counting.missing["synced"]
        assert (tracing / "instances" / tracefs.NAME).is_dir()
    finally:
        counting.close()
    assert not (tracing / "instances" / tracefs.NAME).exists()
    assert tracefs.NAME not in (tracing / "kprobe_events").read_text()
    assert tracefs.remove(tracing) is False


# Xen's trace.


def line(time: float, domain: int, call: str) -> str:
    """As xenalyze --dump-all of Xen 4.17 prints it."""
    return f"   {time:.9f} x- d{domain}v0 hypercall {call}"


def trace(first: int = 64, second: int = 64, work: tuple[str, ...] = ("20 (evtchn_op)",)) -> list[str]:
    lines, time = ["   0.860093881 -x d?v? runstate_change d15v0 runnable->running"], 1.0

    def add(domain: int, call: str) -> None:
        nonlocal time
        time += 0.0001
        lines.append(line(time, domain, call))

    def mark(count: int) -> None:
        for number in range(count):
            if number == 40:  # a tick in between
                for call in ("18 (vcpu_op) set_singleshot_timer vcpu 0", " 3 (stack_switch)") * 4:
                    add(15, call)
            add(15, "11 (xen_version)")
            add(15, "17 (iret)")

    add(15, "11 (xen_version)")
    for _ in range(20):
        add(15, " 3 (stack_switch)")
    mark(first)
    for call in work:
        add(15, call)
        add(0, "20 (evtchn_op)")
        add(0, "14 (grant_table_op) copy 2 ops")
        add(14, "14 (grant_table_op) copy 5 ops")
        add(14, " 3 (stack_switch)")
    mark(second)
    add(0, "20 (evtchn_op)")
    return lines


def test_hypercalls_between_the_marks_are_counted_by_domain() -> None:
    work = ("20 (evtchn_op)", " 3 (stack_switch)", "11 (xen_version)", "20 (evtchn_op)")
    found = xentrace.between_marks(xentrace.calls(trace(work=work)), 15)
    own = xentrace.by_name(found, 15)
    assert own.pop("iret") == 1  # of the last read of the first mark
    assert own == {"evtchn_op": 2, "stack_switch": 1, "xen_version": 1}
    assert xentrace.by_name(found, 0) == {"evtchn_op": 4, "grant_table_op": 4}
    assert xentrace.grants(found, 0) == {"copy": 8}


def test_work_without_any_hypercall_is_nothing_and_not_an_error() -> None:
    assert xentrace.by_name(xentrace.between_marks(xentrace.calls(trace(work=())), 15), 15) == {"iret": 1}


def test_a_mark_is_found_although_the_guest_makes_such_hypercalls_itself() -> None:
    lines = trace(work=("20 (evtchn_op)", *["19 (set_segment_base)"] * 20, "11 (xen_version)") * 20)
    strays = [line(0.5 + number / 100, 15, "11 (xen_version)") for number in range(3)]
    own = xentrace.by_name(xentrace.between_marks(xentrace.calls([*strays, *lines]), 15), 15)
    assert own["evtchn_op"] == 20
    assert own["xen_version"] == 20


@pytest.mark.parametrize(("first", "second"), [(62, 64), (64, 62), (60, 60), (64, 64)])
def test_the_work_is_found_between_marks_of_which_some_is_missing(first: int, second: int) -> None:
    lines = trace(first, second, work=(" 3 (stack_switch)",) * 100)
    assert xentrace.by_name(xentrace.between_marks(xentrace.calls(lines), 15), 15) == {"stack_switch": 100, "iret": 1}


@pytest.mark.parametrize(("first", "second"), [(64, 0), (0, 0), (64, 20), (20, 64)])
def test_marks_that_are_not_there_are_said(first: int, second: int) -> None:
    with pytest.raises(xentrace.XenTraceError, match="instead of 128"):
        xentrace.between_marks(xentrace.calls(trace(first, second)), 15)


def test_lost_records_are_no_count() -> None:
    with pytest.raises(xentrace.XenTraceError, match="some hypercalls are missing"):
        xentrace.calls([*trace(), "   1.000000001 x- lost_records count 12 d0v1 (cur d0v1) first_tsc 5"])


# Meters.


INTERRUPTS = """           CPU0       CPU1
 24:     152164          0  xen-percpu    -virq      timer0
 76:       1570          3  xen-dyn-lateeoi    -event     blkif-backend
 81:          1         58  xen-dyn-lateeoi    -event     evtchn:x9 bench-full/o
  9:          4          0   unused
NMI:          0          0   Non-maskable interrupts
ERR:          0
"""


def test_interrupts_have_names_with_spaces() -> None:
    found = meters.interrupts(INTERRUPTS)
    assert found == {"24": ("timer0", 152164), "76": ("blkif-backend", 1573), "81": ("evtchn:x9 bench-full/o", 59)}


def test_meters_of_this_machine() -> None:
    assert meters.switches(Path("/proc/stat").read_text()) > 0
    import os
    import time

    before = meters.own_switches([os.getpid()])
    for _ in range(5):
        time.sleep(0.001)
    assert meters.own_switches([os.getpid()]) > before
    assert os.getpid() in meters.threads([os.getpid()])
    assert meters.own_switches([2**22 + 1]) == 0


def test_requests_of_a_disk() -> None:
    stat = (
        "     130        0    18840     1682       33      992     8192     3617        0     1852  5481 7 0 0 0 1 180"
    )
    assert meters.completed(stat) == {
        **{"reads": 130, "read_sectors": 18840, "writes": 33, "written_sectors": 8192, "discards": 7, "flushes": 1},
    }


# What raw numbers say.


def raw(**changes: Any) -> Any:
    empty: dict[str, Any] = {"guest_rows": {}, "dom0_rows": {}, "guest_irqs": {}, "dom0_irqs": {}}
    numbers = {"guest_switches": 9, "own_switches": 4, "backend_seconds": 0.0025, "disk": 5, "loop": 6, "store": 7}
    return counted.Raw(
        **(empty | numbers | {"domain": 15, "threads": frozenset({100, 101})} | {"kernel": frozenset({50})} | changes)
    )


def test_a_9p_side_is_counted_by_message_and_checked_against_the_worker() -> None:
    rows = {
        "request": [{"common_pid": "9", "hits": 6}],
        "walk": [{"names": "0", "hits": 2}, {"names": "1", "hits": 3}],
        "notify": [{"irq": "12", "hits": 5}, {"irq": "10", "hits": 40}],
    }
    dom0 = {
        "evtchn": [
            {"cmd": "44504", "common_pid": "100", "hits": 4},
            {"cmd": "44504", "common_pid": "3", "hits": 7},
            {"cmd": "44500", "common_pid": "100", "hits": 1},
        ],
        "copied": [{"common_pid": "3", "hits": 1, "grants": 30}],
        "mapped": [],
        "switched": [{"prev_pid": "101", "hits": 4}, {"prev_pid": "0", "hits": 99}],
        "issued": [
            {"dev": "7", "rwbs": "RA", "common_pid": "100", "hits": 1, "nr_sector": 8},
            {"dev": "7", "rwbs": "W", "common_pid": "50", "hits": 1, "nr_sector": 8},
            {"dev": "7", "rwbs": "RA", "common_pid": "3", "hits": 30, "nr_sector": 999},
            {"dev": "8", "rwbs": "W", "common_pid": "50", "hits": 1, "nr_sector": 8},
        ],
        "extent": [{"common_pid": "100", "hits": 1}, {"common_pid": "50", "hits": 1}, {"common_pid": "3", "hits": 9}],
        "chunk": [{"common_pid": "100", "hits": 1}],
    }
    one = raw(
        guest_rows=rows,
        dom0_rows=dom0,
        guest_irqs={"12": ("xen_9pfs-frontend", 3), "13": ("xen_9pfs-frontend", 1), "10": ("vif0-q0-tx", 8)},
        dom0_irqs={"81": ("evtchn:x9 bench-full/o", 5), "83": ("evtchn:x9 bench-full/c", 0)},
        messages={"Twalk": 5, "Tread": 1, "Tflush": 1},
        file_bytes=4096,
        calls=[xentrace.Call(1, 15, "stack_switch", "")] * 8 + [xentrace.Call(1, 0, "evtchn_op", "")] * 3,
    )
    found = counted.figures(SIDES["ours"], one)
    assert found.counts | {"file_system_calls": 0} == {
        **{"requests": 6, "sent_by_guest": 5, "sent_by_dom0": 4, "hypercalls_guest": 8, "hypercalls_dom0": 3},
        **{"switches_guest": 9, "switches_dom0": 0, "switches_backend": 4, "grants_copied": 0, "grants_mapped": 0},
        **{"backend_us": 2500, "store_requests": 2, "store_bytes": 8192, "ring_bytes": 4096, "file_system_calls": 0},
    }
    assert found.checks["requests"] == [6, 7]
    assert found.checks["sent_by_guest"] == [5, 5]
    assert found.checks["sent_by_dom0"] == [4, 4]
    assert found.checks["switches_guest"] == [9, 8]
    assert [(step["from"], step["to"], step["count"]) for step in counted.steps(SIDES["ours"], one)] == [
        ("path", "fid", 3),
        ("9P request", "ring", 7),
        ("fid", "inode", 6),
        ("file offset", "store address", 2),
        ("store address", "device byte", 1),
    ]


def test_a_disk_is_counted_by_its_number_and_checked_against_blkback() -> None:
    issued = [{"dev": "5", "rwbs": "R", "hits": 3, "nr_sector": 24}, {"dev": "4", "rwbs": "R", "hits": 9}]
    one = raw(
        guest_rows={"issued": issued, "bio": [{"dev": "5", "hits": 4}], "map": [{"common_pid": "1", "hits": 2}]},
        dom0_rows={
            "issued": [{"dev": "6", "rwbs": "R", "common_pid": "8", "hits": 3, "nr_sector": 24}],
            "notify": [{"irq": "78", "hits": 3}, {"irq": "62", "hits": 50}],
        },
        guest_irqs={"8": ("blkif", 3)},
        dom0_irqs={"78": ("blkif-backend", 2), "62": ("vif15.0-q0-tx", 9)},
        blkback={"rd_req": 3, "wr_req": 0, "f_req": 0, "rd_sect": 24, "oo_req": 5},
        calls="xentrace is not installed",
    )
    found = counted.figures(SIDES["block"], one)
    assert found.counts["requests"] == 3
    assert found.checks["requests"] == [3, 3]
    assert found.counts["sent_by_dom0"] == 3
    assert found.checks["ring_bytes"] == [24 * 512, 24 * 512]
    assert found.left_out == dict.fromkeys(
        ("hypercalls_guest", "hypercalls_dom0", "switches_dom0"), "xentrace is not installed"
    )
    steps = {(step["from"], step["to"]): step["count"] for step in counted.steps(SIDES["block"], one)}
    assert steps["guest filesystem block", "virtual disk sector"] == 4
    assert steps["virtual disk sector", "ring"] == steps["ring", "loop device byte"] == 3
    assert steps["loop device byte", "image offset"] == 3
    assert len(steps) == 9
    assert len(counted.steps(SIDES["qdisk"], one)) == 8


def test_grants_are_those_of_the_backends_threads_and_of_xens_trace() -> None:
    copied = [{"common_pid": "100", "hits": 2, "grants": 12}, {"common_pid": "8", "hits": 1, "grants": 3}]
    calls = [xentrace.Call(1, 0, "grant_table_op", "copy 8 ops"), xentrace.Call(1, 0, "grant_table_op", "copy 4 ops")]
    one = raw(dom0_rows={"copied": copied}, calls=calls)
    found = counted.figures(SIDES["qdisk"], one)
    assert found.checks["grants_copied"] == [12, 12]
    assert "grants_copied" not in counted.figures(SIDES["ours"], one).checks
    assert counted.figures(SIDES["block"], one).checks["grants_mapped"] == [0, 0]


def test_what_a_kernel_lacks_is_left_out_and_never_nought() -> None:
    missing = {"guest request": "in the guest, no function p9_xen_request", "dom0 chunk": "in dom0, no function"}
    one = raw(missing=missing, messages={"Tread": 1}, dom0_rows={"extent": []})
    found = counted.figures(SIDES["ours"], one)
    assert "requests" not in found.counts
    assert found.left_out["requests"] == "in the guest, no function p9_xen_request"
    last = counted.steps(SIDES["ours"], one)[-1]
    assert (last["count"], last["why"]) == (None, "in dom0, no function")


@pytest.mark.parametrize("name", ["ours", "cached", "fuse", "block", "qdisk"])
def test_the_steps_are_those_of_xen9p_path(name: str) -> None:
    spaces = {value for key, value in vars(path).items() if key.isupper() and isinstance(value, str)}
    steps = counted.steps(SIDES[name], raw())
    assert {step[end] for step in steps for end in ("from", "to")} <= spaces
    assert steps[0]["from"] == "path"
    assert steps[-1]["to"] == "device byte"
    assert all(step["from"] != step["to"] for step in steps)


def test_the_workers_counters_are_read_as_xen9p_metrics_writes_them() -> None:
    def device(guest: str, tag: str, count: int) -> dict[str, Any]:
        detail = {"by_type": {"110": count, "116": 2}, "read_bytes": 8192, "written_bytes": 5, "fids": 3}
        return {"guest": guest, "tag": tag, "export": "e", "domid": 1, "devid": 0, "phase": "connected"} | {
            "detail": detail
        }

    devices = [device("bench-full", "ours", 7), device("bench-full", "cached", 9), device("g1", "ours", 11)]
    text = metrics.text({"host": {"version": "1", "xen": "4.17"}, "guests": [], "devices": devices})
    assert translations.counters(text, "ours") == {"Twalk": 7, "Tread": 2, "read_bytes": 8192, "written_bytes": 5}
    later = text.replace('type="Twalk"} 7', 'type="Twalk"} 10').replace("8192", "12288")
    assert translations._since(SIDES["ours"], text, later) == ({"Twalk": 3}, 4096)


def test_disks_have_their_numbers() -> None:
    assert translations._devid(SIDES["block"]) == 51728
    assert translations._devid(SIDES["qdisk"]) == 51744
    assert counted.kernel_number(202, 16) == 211812368


def test_a_workload_that_does_not_exist_is_refused() -> None:
    values: dict[str, Any] = dict.fromkeys(settings.Settings.__dataclass_fields__, "")
    given = settings.Settings(**(values | {"groups": ["stat", "dance"], "sides": []}))
    with pytest.raises(host.BenchError, match="has dance, which is none of idle, read-4k-cold"):
        translations.wanted(given)
    one = settings.Settings(**(values | {"groups": ["stat"], "sides": []}))
    assert [work.name for work in translations.wanted(one)] == ["idle", "stat"]


# The work.


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FILES))
    monkeypatch.syspath_prepend(str(UTILS))
    return importlib.import_module("counting")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What the benchmark's sides begin with, but small."""
    for number in range(4):
        (tmp_path / f"read-{number}").write_bytes(bytes(8 << 20))
    for name in ("few", "new", "tree/d0", "tree/d1"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(200):
        (tmp_path / "few" / f"f{number}").touch()
    for name in ("d0/a", "d0/b", "d1/a"):
        (tmp_path / "tree" / name).write_text("x")
    return tmp_path


def test_every_workload_does_what_it_says(counting: ModuleType, place: Path) -> None:
    assert list(counting.WORK) == [work.name for work in translations.WORKLOADS]
    assert counting.MARK == xentrace.MARK
    before = sorted(place.rglob("*"))
    expected = {
        **{"read-4k-cold": (4, 16384), "read-4k-warm": (64, 64 * 4096), "read-seq": (64, 4 << 20)},
        **{"write-seq": (64, 4 << 20), "create": (50, 250), "stat": (200, 0), "find": (5, 0), "list": (200, 0)},
        **{"mmap-read": (256, 1 << 20), "idle": (0, 0)},
    }
    for name, work in counting.WORK.items():
        at = counting.Place(str(place))
        work.before(at)
        assert work.run(at) == expected[name], name
        if name == "write-seq":
            assert (place / "counted").stat().st_size == 4 << 20
        at.close()
        work.after(at)
        assert sorted(place.rglob("*")) == before, name


def test_the_agent_counts_and_says_what_it_cannot_do(tracing: Path, place: Path) -> None:
    """The program as the guest runs it, with this kernel's tracefs; there is no Xen, so its marks are missing."""
    command = [sys.executable, str(FILES / "counting.py")]
    environment = {"PYTHONPATH": f"{FILES}:{UTILS}", "PATH": "/usr/bin:/bin"}
    begin = {"do": "prepare", "place": str(place), "device": ""}
    count = {"do": "count", "rest": 0}
    asked = [
        count,
        {"do": "open", "events": [tracefs.Event("looked", "syscalls/sys_enter_newfstatat", "common_pid").as_dict()]},
        begin | {"work": "stat"},
        count,
        {"do": "finish"},
        begin | {"work": "create"},
        count,
        {"do": "finish"},
        begin | {"work": "read-4k-cold", "place": f"{place}/nowhere"},
        count,
        begin | {"work": "read-seq", "place": f"{place}/nowhere"},
        {"do": "bytes", "place": str(place), "offset": 8192, "count": 4},
        {"do": "close"},
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        printed, _ = process.communicate("".join(json.dumps(one) + "\n" for one in asked), timeout=60)
    early, opened, *rest = (json.loads(text) for text in printed.splitlines())
    prepared, done, finished, _, created, _, _, failed, unprepared, data, closed = rest
    assert early == {"error": "open and prepare come first"}
    assert (prepared, finished, closed) == ({"failed": ""}, {}, {})
    assert (created["operations"], list((place / "new").iterdir())) == (50, [])
    assert unprepared == {"failed": "No such file or directory"}
    assert (done["operations"], done["failed"], done["disk_done"]) == (200, "", {})
    if "looked" not in opened["missing"]:
        # Those of the work; what was done before it, to make it warm, is not counted.
        assert 200 <= sum(row["hits"] for row in done["rows"]["looked"] if row["common_pid"] == str(process.pid)) < 220
    assert failed["failed"] == "No such file or directory"
    assert data == {"data": "00000000"}
    assert tracefs.remove(tracing) is False


# The report.


def one_count(workload: str, side: str, factor: int, number: int = 0, **changes: Any) -> dict[str, Any]:
    operations = 0 if workload == "idle" else 4
    steps = counted.steps(
        SIDES[side],
        raw(messages={"Tread": 4 * factor}, guest_rows={"map": [{"common_pid": "1", "hits": 8 * factor}]}),
    )
    names = ("requests", "sent_by_guest", "sent_by_dom0", "hypercalls_guest", "hypercalls_dom0", "switches_guest")
    more = {"switches_dom0": 3, "ring_bytes": 16384, "grants_copied": 0, "grants_mapped": 0, "store_requests": 1}
    return {
        **{"round": number, "workload": workload, "side": side, "operations": operations, "bytes": 8192},
        **{"seconds": 2.0, "failed": "", "counts": dict.fromkeys(names, 4 * factor) | more | {"backend_us": 100}},
        **{"checks": {"requests": [4 * factor, 4 * factor + number]}, "left_out": {}, "steps": steps},
    } | changes


@pytest.fixture
def run() -> dict[str, Any]:
    """Two rounds in which the disks take thrice as much as the 9P sides."""
    factors = {"ours": 1, "cached": 2, "fuse": 5, "block": 3, "qdisk": 3}
    parts = [
        {"counts": [one_count(workload, side, factor, number) for side, factor in factors.items()], "missing": {}}
        for number in range(2)
        for workload in ("idle", "read-4k-cold")
    ]
    ways = [{"side": side, "text": f"the way of {side}", "there": True, "json": "{}"} for side in ("ours", "block")]
    ways[1]["beside"] = "5 translations  9 translations"
    return {
        **{"date": "2026-11-27 20:30 UTC", "settings": {"memory": 512}, "machine": {"xen": "4.17.7"}},
        "virtual_machine": {"accelerator": "tcg", "cpus": 2},
        "translations": {
            **{"mounts": {"ours": "9p rw", "block": "ext4 rw"}, "bounced": {"block": True, "qdisk": False}},
            **{"workloads": {"idle": "nothing", "read-4k-cold": "a read"}, "parts": parts, "ways": ways},
        },
    }


def test_counts_are_of_one_operation_and_of_a_second_where_there_is_none(run: dict[str, Any]) -> None:
    found = {(entry.workload, entry.side): entry for entry in bench_translations.entries(run)}
    block = found["read-4k-cold", "block"]
    assert block.column("requests on the ring") == 3
    assert block.column("notifications") == 6
    # Two of three copies are of the 4096 bytes on the ring, one is of the program's 2048.
    assert block.column("bytes copied") == 2 * 4096 + 2048
    assert block.column("translations") == 2 * 2 * 3
    assert found["idle", "ours"].column("requests on the ring") == 2
    assert found["idle", "ours"].column("bytes copied") is None


def test_who_takes_less_and_who_more_is_said(run: dict[str, Any]) -> None:
    group = [entry for entry in bench_translations.entries(run) if entry.workload == "read-4k-cold"]
    said = bench_translations.compared(group)
    assert said[0].startswith("9P, v9fs cache=none against ext4 on blkback: less: translations 2 to 12; requests")
    assert ". more: bytes copied 12,288 to 10,240" in said[0]
    assert "9P, our FUSE mount against ext4 on qdisk: less: translations 10 to 12. more: requests" in said[3]
    assert "**9P, v9fs cache=none** takes the least: translations, requests on the ring" in (
        bench_translations.verdict(group)
    )


def test_what_was_left_out_is_a_dash_with_its_reason(run: dict[str, Any]) -> None:
    for part in run["translations"]["parts"]:
        for count in part["counts"]:
            del count["counts"]["hypercalls_guest"]
            count["left_out"]["hypercalls_guest"] = "xentrace is not installed"
    text = bench_translations.table(run)
    assert "left out: hypercalls guest: xentrace is not installed" in text
    page = "\n".join(bench_translations.page_parts(run, "translations"))
    assert "| hypercalls, guest | - | - | - | - | - |" in page
    assert "- hypercalls guest: xentrace is not installed." in page
    assert "hypercalls, guest 1 to" not in page


def test_a_side_that_cannot_do_it_is_said_to_be_so(run: dict[str, Any]) -> None:
    for part in run["translations"]["parts"]:
        for count in part["counts"]:
            if count["side"] == "fuse":
                count["failed"] = "No such device"
    assert "No such device" in bench_translations.table(run)
    page = "\n".join(bench_translations.page_parts(run, "translations"))
    assert "- 9P, our FUSE mount cannot do it: No such device." in page


def test_second_sources_are_told(run: dict[str, Any]) -> None:
    assert bench_translations.disagreements(run)["requests"] == (20, 10, 1)


def test_a_picture_has_every_station_within_its_room(run: dict[str, Any]) -> None:
    drawn = bench_translations.charts(run, "translations")
    assert list(drawn) == ["translations-read-4k-cold.svg"]
    tree = ET.fromstring(drawn["translations-read-4k-cold.svg"])
    width, height = map(float, tree.get("viewBox", "").split()[2:])
    boxes = list(tree.iter(f"{SVG}rect"))
    steps = [len(counted.steps(SIDES[side], raw())) for side in ("ours", "cached", "fuse", "block", "qdisk")]
    assert len(boxes) == sum(steps)
    for box in boxes:
        assert float(box.get("x", "")) + float(box.get("width", "")) <= width
        assert float(box.get("y", "")) + float(box.get("height", "")) <= height
    assert {box.get("class") for box in boxes} == {"guest", "dom0"}
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert "9P, v9fs cache=none: 2 translations" in texts


def test_the_command_writes_page_pictures_and_the_example(tmp_path: Path, run: dict[str, Any]) -> None:
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    mark = bench_translations.EXAMPLE
    (docs / "translations.md").write_text(f"# Before\n\n{mark}\nmade up\n{mark}\n\n## After\n")
    command = [sys.executable, bench_report.__file__, "--results", f"{tmp_path}/translations.json"]
    done = subprocess.run(
        [*command, "--docs", str(docs / "results")], input=json.dumps(run), capture_output=True, text=True, check=True
    )
    assert "read-4k-cold (per operation)" in done.stdout
    assert json.loads((tmp_path / "translations.json").read_text())["translations"]["ways"]
    page = (docs / "results/translations.md").read_text()
    assert "![The stations of each way, with counts](translations-read-4k-cold.svg)" in page
    assert (docs / "results/translations-read-4k-cold.svg").exists()
    example = (docs / "translations.md").read_text()
    assert "made up" not in example
    assert example.startswith(f"# Before\n\n{mark}\n")
    assert example.endswith(f"{mark}\n\n## After\n")
    assert "the way of ours" in example
    assert "5 translations  9 translations" in example
    assert max(map(len, page.splitlines())) < 2000


def test_a_run_that_followed_no_way_leaves_the_example(tmp_path: Path, run: dict[str, Any]) -> None:
    page = tmp_path / "translations.md"
    page.write_text("as it was")
    run["translations"]["ways"] = []
    bench_translations.write_example(tmp_path, run)
    assert page.read_text() == "as it was"


def test_a_run_that_counted_nothing_is_one_line(tmp_path: Path, run: dict[str, Any]) -> None:
    run["translations"]["parts"] = []
    command = [sys.executable, bench_report.__file__, "--results", f"{tmp_path}/x.json"]
    done = subprocess.run(command, input=json.dumps(run), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "bench_report: nothing was counted: run playbooks/translations.yml again\n"


@pytest.mark.parametrize("side", ["ours", "cached", "fuse", "block", "qdisk"])
def test_each_way_of_data_begins_and_ends_at_the_program(side: str) -> None:
    for workload in ("read-seq", "write-seq"):
        made = translations_copies.copies(workload, side, bounced=True)
        end = made[-1].what if workload == "read-seq" else made[0].what
        assert "program" in end, (side, workload)
        others = translations_copies.copies(workload, side, bounced=False)
        assert len(made) - len(others) == (1 if side in {"block", "qdisk"} else 0)
    assert translations_copies.copies("stat", side, bounced=True) == ()


def test_the_page_of_translations_has_the_marks() -> None:
    text = (ROOT / "docs/translations.md").read_text()
    assert text.count(bench_translations.EXAMPLE) == 2
