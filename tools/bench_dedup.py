"""Measure de-duplication: guests that drifted apart, on 9P and as disk images, ours against full scans by duperemove.

Needs root, loop devices, btrfs-progs and the package; no Xen. Some guests are clones of a golden tree; then each gets
the same packages, written file by file, between things of its own. The same is done to ext4 images on a btrfs. All
sides work on copies of the same store. Writes .lab/dedup.json, and with --docs the documentation's page and chart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_store
from bench_store import MIB, BenchError, bars_chart, mib, mounted, read_from, run, used

ROOT = Path(__file__).resolve().parents[1]
SIDES = {
    "ours": "xen9p dedup run",
    "full": "xen9p dedup run --full, knowing nothing",
    "files": "duperemove on the files, 4 KiB",
    "files-128k": "duperemove on the files, 128 KiB",
    "images": "duperemove on disk images, 128 KiB",
    "images-4k": "duperemove on disk images, 4 KiB",
}
PROGRAM = [sys.executable, "-c", "import sys; from xen9p.cli import main; sys.exit(main())", "dedup"]


def exclusive(point: Path) -> int:
    """Bytes of all files that are on blocks of no other."""
    return int(run("btrfs", "filesystem", "du", "-s", "--raw", point).splitlines()[-1].split()[1])


def digest(point: Path) -> str:
    """A digest of all files below a directory, with their names."""
    found = hashlib.sha256()
    for path in sorted(point.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found.update(f"{path.relative_to(point)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def content(dice: random.Random, mib: float, prefix: str) -> dict[str, bytes]:
    """Files as packages have them, by name: nine of ten are small, and half of the bytes are in large ones."""
    files: dict[str, bytes] = {}
    left = int(mib * MIB)
    while left > 0:
        small = len(files) % 10 or left < MIB
        size = min(left, dice.randrange(3000, 60_000) if small else dice.randrange(200_000, 600_000))
        files[f"{prefix}/{len(files) // 50}/{len(files)}"] = dice.randbytes(size)
        left -= size
    return files


def write(tree: Path, files: dict[str, bytes]) -> None:
    """Write files below a directory, one after the other."""
    for name, data in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def drift(tree: Path, packages: dict[str, bytes], number: int, noise_mib: float) -> None:
    """What happens to one guest: the packages in an order of its own, and in between what nobody else has.

    At times it waits until the disk has it, as dpkg does: else all of it would be one extent of a disk image.
    """
    dice = random.Random(1000 + number)
    own = list(content(dice, noise_mib, "var/own").items())
    names = list(packages)
    dice.shuffle(names)
    for place, name in enumerate(names):
        write(tree, {name: packages[name]})
        write(tree, dict(own[place * len(own) // len(names) : (place + 1) * len(own) // len(names)]))
        if place % 5 == 4:
            with (tree / name).open("rb") as file:
                os.fsync(file.fileno())


class Bench:
    """The stores, and the sides that work on copies of them."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.folder, self.given = folder, given
        self.point = folder / "store"
        self.state, self.policy = folder / "state", folder / "policy.toml"
        self.files, self.images = folder / "files.img", folder / "images.img"
        dice = random.Random(42)
        self.golden = content(dice, given.golden_mib, "usr")
        self.packages = content(dice, given.packages_mib, "opt")
        names = [f"g{number}" for number in range(given.guests)]
        self.guests = names
        exports = "".join(f'[exports.{name}]\npath = "{self.point}/{name}"\n' for name in names)
        self.policy.write_text(f"version = 1\n{exports}")
        self.env = {**os.environ, "PYTHONPATH": str(ROOT / "xen9p-src" / "src")}

    def dedup(self, *words: str) -> dict[str, Any]:
        """`xen9p dedup run` with more options; its answer for the store."""
        command = [*PROGRAM, "run", "--settle", "0", "--json", *words]
        places = ["--policy", self.policy, "--state-dir", self.state]
        answer: dict[str, Any] = json.loads(run(*command, *places, env=self.env))["stores"][0]
        return answer

    def make_files(self) -> dict[str, Any]:
        """The store with trees; what the first run and a clone cost before anything has drifted."""
        with self.files.open("wb") as file:
            file.truncate(self.size())
        run("mkfs.btrfs", "-q", self.files)
        with mounted(self.files, self.point) as loop:
            run("btrfs", "-q", "subvolume", "create", self.point / "golden")
            write(self.point / "golden", self.golden)
            run("btrfs", "-q", "property", "set", self.point / "golden", "ro", "true")
            before = used(self.point)
            for name in self.guests:
                run("btrfs", "-q", "subvolume", "snapshot", self.point / "golden", self.point / name)
            clones = used(self.point) - before
        with mounted(self.files, self.point) as loop:
            before, began = read_from(loop), time.monotonic()
            self.dedup()
            first = {"read": read_from(loop) - before, "seconds": round(time.monotonic() - began, 2)}
        with mounted(self.files, self.point):
            for number, name in enumerate(self.guests):
                drift(self.point / name, self.packages, number, self.given.noise_mib)
        return {"clones": clones, "first": first}

    def make_images(self) -> None:
        """The store with disk images of the same content."""
        tree, image = self.folder / "golden", self.folder / "golden.ext4"
        write(tree, self.golden)
        room = self.given.golden_mib + 2 * (self.given.packages_mib + self.given.noise_mib) + 40
        run(
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-E",
            "lazy_itable_init=0,lazy_journal_init=0",
            "-d",
            tree,
            image,
            f"{room:.0f}M",
        )
        with self.images.open("wb") as file:
            file.truncate(self.size())
        run("mkfs.btrfs", "-q", self.images)
        with mounted(self.images, self.point):
            run("cp", "--sparse=always", image, self.point / "golden.ext4")
            for number, name in enumerate(self.guests):
                one = self.point / f"{name}.ext4"
                run("cp", "--reflink=always", self.point / "golden.ext4", one)
                with mounted(one, self.folder / "guest"):
                    drift(self.folder / "guest", self.packages, number, self.given.noise_mib)
        shutil.rmtree(tree)
        image.unlink()

    def size(self) -> int:
        """Bytes of a store that has room for everything twice."""
        each = self.given.packages_mib + self.given.noise_mib
        return int(2 * (self.given.golden_mib + self.given.guests * each) + 800) * MIB

    def measure(self, store: Path, work: Callable[[], None]) -> dict[str, Any]:
        """One side on a copy of a store that it meets with empty caches."""
        copy = self.folder / "copy.img"
        run("cp", "--sparse=always", store, copy)
        try:
            with mounted(copy, self.point):
                own = exclusive(self.point)
            with mounted(copy, self.point) as loop:
                full = used(self.point)
                before, began = read_from(loop), time.monotonic()
                work()
                seconds = time.monotonic() - began
                run("btrfs", "filesystem", "sync", self.point)
                read = read_from(loop) - before
                # A transaction more, so that what nobody owns any more is free.
                (self.point / "done").touch()
                saved = full - used(self.point)
                (self.point / "done").unlink()
            with mounted(copy, self.point):
                after = digest(self.point)
                joined = own - exclusive(self.point)
            run("btrfs", "check", copy)
        finally:
            copy.unlink()
        with mounted(store, self.point):
            whole = digest(self.point) == after
        if not whole:
            raise BenchError("a byte has changed")
        return {
            "read": read,
            "saved": saved,
            "joined": joined,
            "seconds": round(seconds, 2),
            "read_per_saved": round(read / saved, 2) if saved > 0 else None,
        }

    def ours(self) -> None:
        """A run that knows of the time before."""
        self.dedup()

    def full(self) -> None:
        """A run that knows nothing."""
        shutil.rmtree(self.state)
        self.dedup("--full")

    def duperemove(self, block: str) -> None:
        """The existing tool, over everything; also parts of extents, which it leaves out by default."""
        hashes = self.folder / "hashes"
        options = ["-q", "-r", "-d", "--dedupe-options=partial", "-b", block, f"--hashfile={hashes}"]
        run("duperemove", *options, self.point)
        for path in self.folder.glob("hashes*"):
            path.unlink()

    def again(self) -> dict[str, Any]:
        """After a run of ours: the next one, and a new guest."""
        with mounted(self.files, self.point) as loop:
            self.dedup()
            before = used(self.point)
            run("btrfs", "-q", "subvolume", "snapshot", self.point / "golden", self.point / "late")
            clone = used(self.point) - before
            self.policy.write_text(f'{self.policy.read_text()}[exports.late]\npath = "{self.point}/late"\n')
            at = read_from(loop)
            answer = self.dedup()
            return {"clone": clone, "read": read_from(loop) - at, "scanned": answer["total"]["scanned"]}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    with tempfile.TemporaryDirectory(prefix="xen9p-dedup-", dir=given.folder) as temporary:
        bench = Bench(Path(temporary), given)
        print("    trees", flush=True)
        found: dict[str, Any] = {"before": bench.make_files(), "sides": {}}
        known = bench.folder / "known"
        shutil.copytree(bench.state, known)
        works: dict[str, tuple[Path, Callable[[], None]]] = {
            "ours": (bench.files, bench.ours),
            "full": (bench.files, bench.full),
        }
        if shutil.which("duperemove"):
            print("    images", flush=True)
            bench.make_images()
            works |= {
                "files": (bench.files, lambda: bench.duperemove("4k")),
                "files-128k": (bench.files, lambda: bench.duperemove("128k")),
                "images": (bench.images, lambda: bench.duperemove("128k")),
                "images-4k": (bench.images, lambda: bench.duperemove("4k")),
            }
            found["duperemove"] = run("duperemove", "--version").split()[-1].removeprefix("v")
        else:
            found["duperemove"] = None
            print("duperemove is not installed: its columns are left out (apt-get install duperemove)")
        for name, (store, work) in works.items():
            print(f"    {SIDES[name]}", flush=True)
            found["sides"][name] = bench.measure(store, work)
        shutil.rmtree(bench.state)
        shutil.copytree(known, bench.state)
        found["again"] = bench.again()
        found["logical"] = given.guests * (given.golden_mib + given.packages_mib + given.noise_mib) * MIB
        return found


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project has set itself, and what came of it."""
    sides = found["sides"]
    said = []
    for rival in ("full", "files"):
        if rival in sides:
            part = sides["ours"]["saved"] / sides[rival]["saved"] if sides[rival]["saved"] > 0 else 0.0
            said.append(
                {"text": f"saves at least 90 % of what {SIDES[rival]} does", "value": part, "held": part >= 0.9}
            )
    if "files" in sides:
        part = sides["ours"]["read"] / sides["files"]["read"]
        said.append(
            {"text": f"reads at most a tenth of what {SIDES['files']} does", "value": part, "held": part <= 0.1}
        )
    return said


def page(run_: dict[str, Any]) -> str:
    """The page of the documentation, in Markdown."""
    sizes, again, before = run_["sizes"], run_["again"], run_["before"]
    text = [
        "# De-duplication: drifted guests",
        "",
        "<!-- Written by tools/bench_dedup.py (`make bench-dedup`): changes are lost. -->",
        "",
        f"Measured {run_['date']} on a btrfs in a file, without Xen; Linux {run_['kernel']},",
        f"{run_['processors']} processors, duperemove {run_['duperemove'] or 'not installed'}.",
        f"{sizes['guests']} guests are clones of a golden tree of {sizes['golden_mib']:g} MiB. Then each gets the same",
        f"{sizes['packages_mib']:g} MiB of files, in an order of its own, with {sizes['noise_mib']:g} MiB between them",
        "that nobody else has. The content is random, the sizes are those of packages: nine of ten files are small.",
        "The images are ext4 with the same content, clones of one image, changed the same way.",
        "",
        "*Read* is what came from the store's block device from empty caches on: metadata and the comparing are in it.",
        "*Joined* is what was on blocks of its own before and is not afterwards. *Saved* is what the filesystem has",
        "in use less: btrfs frees an extent when nobody uses any of it, and one of a disk image holds pieces of many",
        "files. Every byte of every file was compared after each side, and `btrfs check` was content.",
        "",
        "![MiB read and saved](dedup.svg)",
        "",
        "| | read, MiB | joined, MiB | saved, MiB | read a byte saved | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in run_["sides"].items():
        per = f"{one['read_per_saved']:.2f}" if one["saved"] > MIB else "-"
        cells = [mib(one["read"]), mib(one["joined"]), mib(one["saved"]), per, f"{one['seconds']:.1f}"]
        text.append(f"| {SIDES[name]} | {' | '.join(cells)} |")
    text += ["", "| bar | here | |", "| --- | ---: | --- |"]
    text += [
        f"| {bar['text']} | {bar['value']:.1%} | {'held' if bar['held'] else '**missed**'} |" for bar in run_["bars"]
    ]
    text += [
        "",
        f"- The guests together have {mib(run_['logical'])} MiB of files.",
        f"- {sizes['guests']} clones took {mib(before['clones'])} MiB. The first run over them read",
        f"  {mib(before['first']['read'])} MiB in {before['first']['seconds']:.1f} s: metadata alone.",
        f"- One more clone after the run took {mib(again['clone'])} MiB, and the next run read",
        f"  {mib(again['read'])} MiB.",
    ]
    return "\n".join([*text, ""])


def chart(run_: dict[str, Any]) -> str:
    """Two bars a side, MiB read and MiB saved, as SVG."""
    kinds = (("read", "theirs"), ("saved", "ours"))
    groups = [
        (SIDES[name], [(css, one[kind], f"{mib(one[kind])} {kind}") for kind, css in kinds])
        for name, one in run_["sides"].items()
    ]
    title = f"MiB read and saved, {run_['sizes']['guests']} drifted guests"
    return bars_chart(title, groups, left=290, room=130, top=34, bar=18)


def missing() -> str:
    """What keeps this from being run here, in words."""
    return bench_store.missing("bench-dedup")


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--guests", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--golden-mib", type=float, default=80, metavar="MIB", help="default: %(default)s")
    parser.add_argument(
        "--packages-mib", type=float, default=4, metavar="MIB", help="for each guest; default: %(default)s"
    )
    parser.add_argument(
        "--noise-mib", type=float, default=1, metavar="MIB", help="for each guest; default: %(default)s"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where the stores are while it runs; some GiB, sparse"
    )
    parser.add_argument("--results", type=Path, default=ROOT / ".lab/dedup.json", metavar="FILE.json")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write the documentation's page and chart, too")
    given = parser.parse_args()
    problem = missing()
    if not problem and (given.guests < 2 or min(given.golden_mib, given.packages_mib, given.noise_mib) <= 0):
        problem = "--guests is 2 or more, and the sizes are more than 0"
    if problem:
        print(f"bench_dedup: {problem}", file=sys.stderr)
        return 1
    try:
        found = measure(given)
    except (BenchError, OSError) as error:
        print(f"bench_dedup: {error}", file=sys.stderr)
        return 1
    sizes = {name: getattr(given, name) for name in ("guests", "golden_mib", "packages_mib", "noise_mib")}
    result = {"sizes": sizes, **found, "bars": bars(found)}
    bench_store.publish("dedup", given, result, page, chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
