"""A mount of a guest under torture: one file as fsx does, a tree as fsstress does, and in the end dom0 has the same.

XEN9P_TORTURE says for how many seconds in each cache mode; the rest of a test takes about as long as the default does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

from lab import REPOSITORY, Dom0, connect, home_mounted, scratch

SECONDS = float(os.environ.get("XEN9P_TORTURE", "12"))
SCRIPT = REPOSITORY / "xen9p-src" / "tests" / "torture.py"
HERE, THERE = "/home/torture", "/srv/xen9p/home/torture"
# What v9fs has not: 9P2000.L has no message for holes, and without a cache nothing can be mapped for writing.
LACKS = {"none": {"map_write", "punch", "zero"}, "loose": {"punch", "zero"}}


@pytest.fixture(scope="module")
def script(dom0: Dom0) -> Iterator[str]:
    """The name of the script in a directory that guest and dom0 share."""
    with scratch(dom0.host, THERE):
        dom0.out(f"cat > {THERE}/torture.py <<'END'\n{SCRIPT.read_text()}\nEND")
        yield "torture.py"


@pytest.mark.parametrize("mode", ["none", "loose"])
def test_the_tree_is_sound_and_dom0_has_the_same(dom0: Dom0, script: str, mode: str) -> None:
    dom0.out(f"mkdir {THERE}/{mode}")
    # In loose mode the guest counts the links of directories itself, from what the host's file system says (btrfs: 1).
    options = f"--seconds {SECONDS} --drop-caches{' --loose' if mode == 'loose' else ''}"
    with home_mounted(mode):
        limit = int(SECONDS) + 180
        done = connect("g1").run(f"timeout -k 5 {limit} python3 {HERE}/{script} run {HERE}/{mode} {options}")
    assert done.rc == 0, f"{done.stdout[-1000:]}\n{done.stderr}"
    file, tree, *here = done.stdout.splitlines()
    for summary in (file, tree):
        operations = re.search(r"(\d+) operations", summary)
        assert operations is not None, summary
        assert int(operations[1]) > 20, summary
    assert set(re.findall(r"no (\w+) \(", file)) == LACKS[mode], file
    assert here == dom0.out(f"python3 {THERE}/{script} report {THERE}/{mode}").splitlines()
