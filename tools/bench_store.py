"""What benchmarks on a btrfs of their own have in common: commands, what they need, a chart of bars, their results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from bench_chart import STYLE, WIDTH

MIB = 1 << 20
DROP = Path("/proc/sys/vm/drop_caches")


class BenchError(Exception):
    """One line: what is wrong."""


def run(*command: object, **more: Any) -> str:
    """What a command prints; BenchError if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, capture_output=True, text=True, **more)
    if done.returncode:
        raise BenchError(f"{' '.join(words[:3])}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    return str(done.stdout)


def missing(target: str) -> str:
    """What keeps `make *target*` from being run here, in words."""
    if os.geteuid():
        return f"it mounts filesystems: run it as root (sudo make {target})"
    for tool, package in (("mkfs.btrfs", "btrfs-progs"), ("mke2fs", "e2fsprogs"), ("losetup", "mount")):
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            return f"{tool} is missing: apt-get install {package}"
    return "" if Path("/dev/loop-control").exists() else "there are no loop devices: modprobe loop"


@contextmanager
def mounted(image: Path, point: Path) -> Iterator[str]:
    """A file mounted as the filesystem that it has; the loop device's name."""
    point.mkdir(exist_ok=True)
    loop = run("losetup", "--find", "--show", image).strip()
    try:
        run("mount", "-o", "noatime", loop, point)
        try:
            yield Path(loop).name
        finally:
            run("umount", point)
    finally:
        # Another copy has the same id: the kernel must not take it for an old state of this one.
        subprocess.run(["btrfs", "device", "scan", "--forget", loop], check=False, capture_output=True)
        run("losetup", "--detach", loop)


def read_from(loop: str) -> int:
    """Bytes that have been read from a loop device."""
    return int(Path(f"/sys/block/{loop}/stat").read_text().split()[2]) * 512


def used(point: Path) -> int:
    """Bytes in use of a filesystem, when all is on the disk."""
    run("btrfs", "filesystem", "sync", point)
    there = os.statvfs(point)
    return (there.f_blocks - there.f_bfree) * there.f_frsize


def mib(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / MIB:,.1f}"


def drop_caches() -> None:
    """Empty the page cache, when all is on the disk."""
    os.sync()
    DROP.write_text("3\n")


def bars_chart(
    title: str,
    groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]],
    *,
    left: int,
    room: int,
    top: int,
    bar: int,
) -> str:
    """Bars in labelled groups, as SVG.

    Args:
        groups: a label, and for each of its bars: a class of bench_chart.STYLE, how much, and what stands behind it.
        left: pixels for the labels; room: for what stands behind the longest bar; top: above the first.
        bar: pixels from one bar to the next of a group.
    """
    y, most = top, max(value for _, rows in groups for _, value, _ in rows)
    parts = [f'<text class="head" x="0" y="16">{escape(title)}</text>']
    for label, rows in groups:
        parts.append(f'<text x="{left - 10}" y="{y + bar + 4}" text-anchor="end">{escape(label)}</text>')
        for css, value, said in rows:
            length = max(value, 0) / most * (WIDTH - left - room)
            parts.append(f'<rect class="{css}" x="{left}" y="{y + 1}" width="{length:.1f}" height="{bar - 2}"/>')
            parts.append(f'<text class="quiet" x="{left + length + 6:.1f}" y="{y + 14}">{said}</text>')
            y += bar
        y += 12
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" aria-label="{escape(title)}">\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def machine() -> dict[str, Any]:
    """When and on what this was run."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
    }


def publish(
    name: str,
    given: argparse.Namespace,
    result: Mapping[str, Any],
    page: Callable[[dict[str, Any]], str],
    chart: Callable[[dict[str, Any]], str],
) -> None:
    """Keep a run's figures, print its page, and with --docs write page and chart of the documentation.

    Args:
        name: of the page's file and the chart's.
        given: with *results* (where figures go) and *docs* (a directory, or None).
        result: what was found; when and on what is added.
    """
    whole = {**machine(), **result}
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(whole, indent=1) + "\n")
    text = page(whole)
    print(text)
    print(f"all figures: {given.results}")
    if given.docs:
        given.docs.mkdir(parents=True, exist_ok=True)
        (given.docs / f"{name}.md").write_text(text)
        (given.docs / f"{name}.svg").write_text(chart(whole))
