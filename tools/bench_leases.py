"""Measure what keeping things is worth in stat-heavy work, mount by mount, and print it.

Without directories it serves a tree of its own and mounts it here through FUSE with each cache; that takes root,
pyfuse3 and the built data plane: sudo /usr/bin/python3 tools/bench_leases.py. With directories it measures those,
which are the same tree by different mounts, as in tests/lab/test_coherent.py.

The work is that of `git status`: every file and directory by lstat(2), a name that is not there in each directory,
every directory listed. Medians of rounds in turns; a round before them fills what can be filled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "xen9p-src" / "src"
COMMAND = [sys.executable, "-c", "import sys; from xen9p.cli import main; sys.exit(main())"]
CACHES = ("none", "timed", "coherent")


def make_tree(top: Path, folders: int, files: int) -> None:
    """Make a tree of folders with some small files each."""
    for i in range(folders):
        folder = top / f"d{i % 4}" / f"e{i}"
        folder.mkdir(parents=True, exist_ok=True)
        for j in range(files):
            (folder / f"f{j}").write_text(f"{i} {j}\n")


def index(top: str) -> list[str]:
    """Return what a version control system has in its index: every file's path."""
    return [os.path.join(folder, name) for folder, _, files in os.walk(top) for name in files]


def status(top: str, files: list[str]) -> int:
    """Do what `git status` asks a file system for; return how many calls that were."""
    calls = 0
    for path in files:
        os.lstat(path)
        calls += 1
    for folder, folders, names in os.walk(top):
        os.path.lexists(os.path.join(folder, ".gitignore"))
        calls += 2 + len(folders) + len(names)
    return calls


def measure(tops: dict[str, str], rounds: int) -> dict[str, dict[str, Any]]:
    """Return for each mount what each round took in ms, the median of that, and how many calls it was."""
    files = {name: index(top) for name, top in tops.items()}
    taken: dict[str, list[float]] = {name: [] for name in tops}
    calls = 0
    for i in range(rounds + 1):
        for name, top in tops.items():
            began = time.perf_counter()
            calls = status(top, files[name])
            if i:
                taken[name].append((time.perf_counter() - began) * 1000)
    return {name: {"ms": statistics.median(times), "calls": calls, "rounds": times} for name, times in taken.items()}


@contextmanager
def mounted(folder: Path) -> Iterator[dict[str, str]]:
    """Serve folder/tree and mount it with each cache."""
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    socket = folder / "socket"
    with ExitStack() as stack:
        serve = [*COMMAND, "serve", "--export", str(folder / "tree"), "--unix", str(socket), "--leases", "3"]
        server = stack.enter_context(subprocess.Popen(serve, env=env, stderr=subprocess.DEVNULL))
        stack.callback(server.kill)
        while not socket.exists():
            if server.poll() is not None:
                raise SystemExit("error: the server does not start: build the data plane, see CONTRIBUTING.md")
            time.sleep(0.05)
        tops = {}
        for cache in CACHES:
            place = folder / cache
            place.mkdir()
            mount = [*COMMAND, "mount", "--unix", str(socket), str(place), "--cache", cache]
            subprocess.run(mount, env=env, check=True)
            stack.callback(subprocess.run, ["umount", "-l", str(place)], check=False)
            tops[cache] = str(place)
        yield tops


def report(found: dict[str, dict[str, Any]], base: str) -> str:
    """Return a line for each mount, with how many times as fast as the base it is."""
    return "\n".join(
        f"{name:10} {one['ms']:10.2f} ms {one['calls']:7.0f} calls {found[base]['ms'] / one['ms']:8.1f}x {base}"
        for name, one in found.items()
    )


def main() -> int:
    """Measure, print, and return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mounts", nargs="*", metavar="NAME=DIR", help="mounts of one tree; the first is the base")
    parser.add_argument("--make", metavar="DIR", type=Path, help="make the tree there first")
    parser.add_argument("--folders", type=int, default=40, metavar="N", help="in the tree; default: %(default)s")
    parser.add_argument("--files", type=int, default=25, metavar="N", help="in each; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    options = parser.parse_args()
    for pair in options.mounts:
        if "=" not in pair or not Path(pair.partition("=")[2]).is_dir():
            parser.error(f"{pair} is no NAME=DIR with a directory")
    if options.make:
        make_tree(options.make, options.folders, options.files)
    if options.mounts:
        tops = dict(pair.split("=", 1) for pair in options.mounts)
        found = measure(tops, options.rounds)
    else:
        with tempfile.TemporaryDirectory(prefix="xen9p-bench-") as name:
            make_tree(Path(name) / "tree", options.folders, options.files)
            with mounted(Path(name)) as tops:
                found = measure(tops, options.rounds)
    print(json.dumps(found) if options.json else report(found, next(iter(found))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
