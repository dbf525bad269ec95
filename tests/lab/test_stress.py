"""A mount of a guest under what others have written to torture filesystems: what passes on dom0's btrfs passes there.

The programs are dom0's: they and their libraries are put into the guest's tree. XEN9P_STRESS says for how many seconds
each of stress-ng's works, and is a measure of the others'.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

import stress
from lab import Dom0, connect, home_mounted, scratch, wait_until

SECONDS = int(os.environ.get("XEN9P_STRESS", "1"))
SCRIPT = Path(__file__).with_name("stress.py")
PROGRAMS = "stress-ng dbench postmark fio"
HERE, THERE, LOCAL = "/home/stress", "/srv/xen9p/home/stress", "/srv/xen9p/stress-local"
NO_HOLES = "9P2000.L has no message for it, and v9fs says EOPNOTSUPP"
NO_IOCTL = "v9fs sends no ioctl(2)"
# What passes on btrfs and cannot on v9fs, and why.
LACKS = {
    "fallocate": NO_HOLES,
    "fpunch": NO_HOLES,
    "fiemap": "9P knows no extents: FS_IOC_FIEMAP is EOPNOTSUPP",
    "chattr": NO_IOCTL,
    "inode-flags": NO_IOCTL,
    "verity": NO_IOCTL,
    "handle": "v9fs gives no file handles: name_to_handle_at(2) is EOPNOTSUPP",
}
# With a cache only what the cache may get wrong.
CACHED = (
    "dentry", "dir", "dirmany", "hdd", "iomix", "rename", "sync-file", "dbench", "postmark",
    "fio-verify", "fio-verify-large",
)  # fmt: skip


@pytest.fixture(scope="module")
def tools(dom0: Dom0) -> Iterator[str]:
    """The programs in a directory of the guest."""
    missing = dom0.out(f"for p in {PROGRAMS}; do command -v $p > /dev/null || echo $p; done").split()
    assert not missing, f"on the host: apt-get install --no-install-recommends {' '.join(missing)}"
    # Another name each time: the guest's root is cached, and the tree is changed under it.
    with scratch(connect("g1"), f"/opt/stress-{secrets.token_hex(4)}") as path:
        there = f"/srv/xen9p/guests/g1{path}"
        dom0.out(f"mkdir {there}/bin {there}/lib && cat > {there}/stress.py <<'END'\n{SCRIPT.read_text()}\nEND")
        dom0.out(
            f"cd {there} && for p in {PROGRAMS}; do cp $(command -v $p) bin && ldd bin/$p; done"
            " | grep -o '/[^ )]*[.]so[^ )]*' | sort -u | xargs cp -Lt lib"
            " && mv lib/ld-linux-x86-64.so.2 ld.so && cp /usr/share/dbench/client.txt ."
        )
        yield path


def parsed(printed: str) -> dict[str, tuple[str, str]]:
    """Result and last words of each work."""
    return {one["name"]: (one["result"], one["said"]) for one in map(json.loads, printed.splitlines())}


@pytest.fixture(scope="module")
def local(dom0: Dom0, tools: str) -> Iterator[str]:
    """The same on dom0's own filesystem, begun and not waited for: what it prints comes into this file."""
    with scratch(dom0.host, LOCAL):
        script = f"/srv/xen9p/guests/g1{tools}/stress.py"
        work = f"timeout 900 python3 {script} {LOCAL}/work --seconds {SECONDS} > {LOCAL}/said 2> {LOCAL}/wrong"
        dom0.out(f"setsid sh -c '{work}; touch {LOCAL}/done' > /dev/null 2>&1 < /dev/null &")
        yield f"{LOCAL}/said"


@pytest.mark.long
@pytest.mark.parametrize("mode", ["none", "loose"])
def test_what_passes_on_dom0_passes_on_the_mount(dom0: Dom0, tools: str, local: str, mode: str) -> None:
    only = "".join(f" --only {name}" for name in CACHED) if mode == "loose" else ""
    with scratch(dom0.host, THERE), home_mounted(mode, "locktimeout=1"):
        options = f"--tools {tools} --seconds {SECONDS}{only}"
        done = connect("g1").run(f"timeout -k 5 1800 python3 {tools}/stress.py {HERE}/work {options}")
    assert done.rc == 0, f"{done.stdout[-1000:]}\n{done.stderr}"
    there = parsed(done.stdout)
    wait_until("dom0's own run", lambda: dom0.host.file(f"{LOCAL}/done").exists, 900)
    here = parsed(dom0.out(f"cat {local}"))
    assert list(here) == [work.name for work in stress.works("", SECONDS, "")], dom0.out(f"cat {LOCAL}/wrong")
    assert there.keys() == (set(CACHED) if mode == "loose" else here.keys())
    for name, (result, said) in there.items():
        print(f"{name}: {result}, on dom0 {here[name][0]} {said}")
    assert sum(result == "passed" for result, _ in here.values()) > 30, here
    worse = {n: said for n, (result, said) in there.items() if result != "passed" and here[n][0] == "passed"}
    assert not {name: said for name, said in worse.items() if name not in LACKS}
