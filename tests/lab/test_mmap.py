"""mmap(2) in the cache modes of v9fs. What works in which goes to mmap.json of the lab, for tools/mmap_report.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab import STATE, Dom0, connect

MODES = ("none", "mmap", "loose", "fscache")
PROBE = Path(__file__).with_name("mmap_probe.py")
MODULES = "/usr/lib/python3.11/lib-dynload"


@pytest.fixture(scope="module")
def found(dom0: Dom0) -> dict[str, dict[str, str]]:
    """Case -> result, for each mode; of a mode that cannot be mounted, nothing."""
    g1 = connect("g1")
    dom0.out(f"mkdir -p /srv/xen9p/home/mmap && cp {MODULES}/mmap.*.so /srv/xen9p/home/mmap")
    dom0.out(f"cat > /srv/xen9p/home/mmap/probe.py <<'END'\n{PROBE.read_text()}\nEND")
    g1.check_output("mkdir -p /run/mmap && cp /home/mmap/* /run/mmap")
    results: dict[str, dict[str, str]] = {}
    try:
        for mode in MODES:
            options = f"rw,trans=xen,version=9p2000.L,msize=524288,cache={mode}"
            g1.check_output("umount /home")
            if g1.run(f"mount -t 9p home /home -o {options}").rc == 0:
                results[mode] = json.loads(g1.check_output("cd /run/mmap && python3 probe.py /home/mmap"))
            else:
                g1.check_output("mount /home")
    finally:
        g1.check_output("umount /home; mount /home; rm -r /run/mmap")
        dom0.out("rm -r /srv/xen9p/home/mmap")
    (STATE / "mmap.json").write_text(json.dumps({"kernel": g1.check_output("uname -r"), "modes": results}, indent=1))
    return results


@pytest.mark.parametrize("mode", ["none", "mmap", "loose"])
def test_what_every_mode_does(found: dict[str, dict[str, str]], mode: str) -> None:
    for case in ("private, read", "private, written (copy on write)", "a program is run"):
        assert found[mode][case] == "yes", case
    assert found[mode]["shared, read, descriptor for reading"] == "yes"


def test_shared_writing_needs_a_caching_mode(found: dict[str, dict[str, str]]) -> None:
    assert found["none"]["shared, written"] == "EINVAL"
    assert found["mmap"]["shared, written"] == "yes"
    assert found["loose"]["shared, written"] == "yes"


def test_there_is_no_nameless_file(found: dict[str, dict[str, str]]) -> None:
    """9P2000.L has no message for it; programs then make a file with a name and unlink it."""
    assert {results["`O_TMPFILE`"] for results in found.values()} == {"EOPNOTSUPP"}
