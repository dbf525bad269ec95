"""What an operator sees of a known workload: metrics, top, trace, the journal."""

from __future__ import annotations

import json
import re
import time

import pytest

from lab import TAGS, Dom0, connect, scratch


def sample(text: str, name: str, **labels: str) -> float:
    """The sum of the samples of a metric that have these labels."""
    found = 0.0
    for line in text.splitlines():
        if line.startswith(f"{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
            found += float(line.rsplit(" ", 1)[1])
    return found


def test_ten_files_are_counted(dom0: Dom0) -> None:
    g1 = connect("g1")
    labels = {"guest": "g1", "tag": "home"}
    with scratch(g1, "/home/observe") as folder:
        before = dom0.out("xen9p metrics")
        g1.check_output(f"for i in 0 1 2 3 4 5 6 7 8 9; do echo 12345678 > {folder}/f$i; done")
        after = dom0.out("xen9p metrics")

    def grown(name: str, **more: str) -> float:
        return sample(after, name, **labels, **more) - sample(before, name, **labels, **more)

    assert grown("xen9p_operations_total", type="Tlcreate") == 10
    assert grown("xen9p_operations_total", type="Twrite") == 10
    assert grown("xen9p_written_bytes_total") == 90
    assert grown("xen9p_request_duration_seconds_count", group="change", stage="total") >= 10
    seconds = grown("xen9p_request_duration_seconds_sum", group="change", stage="total")
    assert 0 < seconds < 10
    assert sample(after, "xen9p_device_state", **labels, state="connected") == 1
    assert sample(after, "xen9p_fids", **labels) >= 1


def test_the_trace_shows_the_very_write(dom0: Dom0) -> None:
    g1 = connect("g1")
    command = "xen9p trace g1:home --json --filter type=Twrite --filter 'path=*/traced' --count 1 --duration 60"
    dom0.out(f"nohup {command} > /tmp/trace.json 2> /tmp/trace.err < /dev/null & sleep 0.1")
    end = time.monotonic() + 60
    while "tracing g1:home" not in dom0.run("cat /tmp/trace.err").stdout:
        assert time.monotonic() < end, dom0.run("cat /tmp/trace.err").stdout
        time.sleep(0.5)
    with scratch(g1, "/home/observe") as folder:
        g1.check_output(f"printf 'hello trace' > {folder}/traced")
        text = ""
        while not text and time.monotonic() < end:
            text = dom0.run("cat /tmp/trace.json").stdout
            time.sleep(0.5)
    dom0.run("rm -f /tmp/trace.json /tmp/trace.err")
    found = json.loads(text)
    assert found["request"]["data"] == "hello trace"
    assert found["request"]["count"] == 11
    assert found["reply"] == {"type": "Rwrite", "tag": found["request"]["tag"], "size": 11, "count": 11}
    assert found["path"] == "/observe/traced"
    parts = [found["seconds"][stage] for stage in ("ring", "queue", "filesystem")]
    assert 0 < sum(parts) <= found["seconds"]["total"] < 10


def test_a_capture_file_is_written(dom0: Dom0) -> None:
    g1 = connect("g1")
    dom0.out("nohup xen9p trace g1:home --pcap /tmp/g1.pcap --duration 8 > /tmp/trace.err 2>&1 < /dev/null & sleep 4")
    g1.check_output("ls -la /home > /dev/null")
    end = time.monotonic() + 30
    while " requests" not in dom0.run("cat /tmp/trace.err").stdout and time.monotonic() < end:
        time.sleep(1)
    assert dom0.out("od -An -tx4 -N4 /tmp/g1.pcap").strip() == "a1b23c4d"
    assert int(dom0.out("stat -c %s /tmp/g1.pcap")) > 24
    dom0.run("rm -f /tmp/g1.pcap /tmp/trace.err")


@pytest.mark.parametrize("options", ["--once", "--once --json"])
def test_top_shows_the_devices(dom0: Dom0, options: str) -> None:
    text = dom0.out(f"COLUMNS=80 xen9p top {options} --interval 1")
    if "--json" in options:
        devices = json.loads(text)["devices"]
        assert {"g1", "g2"} <= {d["guest"] for d in devices}
        assert all(d["state"] == "connected" for d in devices if d["tag"] in TAGS)
    else:
        assert re.search(r"^g1:home +\d", text, re.M)
        assert text.startswith("DEVICE")


def test_the_journal_knows_the_guest(dom0: Dom0) -> None:
    lines = dom0.out("journalctl GUEST=g1 TAG=home -o json --no-pager -n 50").splitlines()
    records = [json.loads(line) for line in lines]
    assert any("connected" in r["MESSAGE"] for r in records)
    assert all(r["_SYSTEMD_UNIT"] == "xen9pd.service" for r in records)
    last = records[-1]
    assert last["EXPORT"]
    assert last["DOMID"].isdigit()
    assert "guest=g2" not in dom0.out("journalctl GUEST=g1 -o cat --no-pager -n 200")
