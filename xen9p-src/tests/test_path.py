"""The way of a byte: followed on real filesystems, and read back from the device where it is said to be."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from confined import has_capability
from loopmount import NO_MOUNTS, mounted, tools, unmount
from observed import Host, host
from serving import memory_session
from xen9p import blocktrace, cli, disk_path, extents, file_path, in_root, path
from xen9p.device import Ring
from xen9p.errors import Xen9pError
from xen9p.escape import escape
from xen9p.ext4_image import Ext4Image, entries, hex_dump
from xen9p.file_path import Target, parse_target
from xen9p.path import Point, Way

MIB = 1 << 20
CORRUPTED = 25
BLOCK = 4096
root_only = pytest.mark.skipif(bool(NO_MOUNTS), reason=NO_MOUNTS)


class Store:
    """XenStore's nodes; XenStore itself needs Xen: tests/lab."""

    def __init__(self, nodes: dict[str, str]) -> None:
        self.nodes = nodes

    def read(self, path: str) -> str | None:
        below = any(node.startswith(f"{path}/") for node in self.nodes)
        return self.nodes.get(path, "" if below else None)

    def children(self, path: str) -> list[str]:
        start = f"{path}/"
        return sorted({node.removeprefix(start).split("/")[0] for node in self.nodes if node.startswith(start)})


def run(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


@dataclass
class Mounted:
    """A filesystem on a loop device on a file."""

    point: Path
    image: Path
    device: str

    def at(self, byte: int, length: int) -> bytes:
        """What the device has there, read past its cache by the command that students are given."""
        run("sync", "-f", self.point)
        shown = subprocess.run(
            path.look(self.device, byte).replace("| head -c 64 | od -A d -t x1z", f"| head -c {length}"),
            shell=True,
            check=True,
            capture_output=True,
        )
        return shown.stdout


def over(served: Host) -> None:
    """Waits until the worker has noticed that nobody reads its trace any more."""
    device = served.devices[0].session.served.device
    for _ in range(100):
        with suppress(OSError):  # EBUSY
            device.trace_start(0)
            device.trace_stop()
            return
        time.sleep(0.05)
    raise AssertionError("it still traces")


@contextmanager
def loop(image: Path, *options: str) -> Iterator[str]:
    done = subprocess.run(["losetup", "-f", "--show", *options, image], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop device here: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@contextmanager
def filesystem(folder: Path, *make: str, options: str = "noatime") -> Iterator[Mounted]:
    with mounted(folder, make, options, mib=500) as point:
        yield Mounted(point, folder / "image", run("findmnt", "-no", "SOURCE", point).strip())


@pytest.fixture
def btrfs(tmp_path: Path) -> Iterator[Mounted]:
    with filesystem(tmp_path, "mkfs.btrfs", "-q") as made:
        yield made


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Mounted]:
    with filesystem(tmp_path, "mkfs.ext4", "-q") as made:
        yield made


def pattern(blocks: int) -> bytes:
    """Blocks that are all different, and at no offset alike."""
    return b"".join(b"".join(b"%07d:%07d;" % (n, i) for i in range(BLOCK // 16)) for n in range(blocks))


def write(file: Path, data: bytes) -> None:
    with file.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def store_of(served: Host) -> Store:
    front = "/local/domain/3/device/9pfs/0"
    values = {"version": "1", "num-rings": "2", "ring-ref0": "8", "event-channel-0": "12"}
    values |= {"ring-ref1": "521", "event-channel-1": "13"}
    return Store({f"{front}/{key}": value for key, value in values.items()})


def over_9p(folder: Path, name: bytes, offset: int, more: Callable[[Path], None] = lambda _: None) -> Way:
    """The way of a byte of a file in an export in that folder."""
    with host(folder, "g1:home") as served:
        more(folder / "export-0")
        return file_path.follow(Target("g1", "home", name), offset, folder, store_of(served))


def device_of(way: Way) -> tuple[str, int]:
    assert way.device is not None, path.text(way)
    return str(way.device["device"]), int(way.device["byte"])


# On real filesystems.


class TestStore:
    """From a file of an export to the device."""

    pytestmark = root_only

    @pytest.mark.parametrize("offset", [0, 8192, 5 * BLOCK + 1234, 2 * MIB + 16])
    @pytest.mark.parametrize("kind", ["btrfs", "ext4"])
    def test_bytes_are_there(self, kind: str, offset: int, request: pytest.FixtureRequest) -> None:
        there: Mounted = request.getfixturevalue(kind)
        data = pattern(3 * MIB // BLOCK)
        way = over_9p(there.point, b"/x", offset, lambda export: write(export / "x", data))
        device, byte = device_of(way)
        assert device == there.device
        assert there.at(byte, 64) == data[offset : offset + 64]
        assert way.translations == (5 if kind == "btrfs" else 4), path.text(way)
        inode = next(step.target.values["inode"] for step in way.steps if step.target.space == path.INODE)
        assert inode == (there.point / "export-0" / "x").stat().st_ino
        if kind == "btrfs":
            address = next(step.target.values["address"] for step in way.steps if step.target.space == path.ADDRESS)
            tools("btrfs-map-logical")
            said = run("btrfs-map-logical", "-l", str(address), there.device)
            assert f"physical {byte} device {there.device}" in said

    def test_a_file_behind_a_hole_and_the_hole(self, btrfs: Mounted) -> None:
        data = pattern(16)

        def more(export: Path) -> None:
            with (export / "x").open("wb") as file:
                file.seek(MIB)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        way = over_9p(btrfs.point, b"/x", MIB + BLOCK, more)
        assert btrfs.at(device_of(way)[1], 64) == data[BLOCK : BLOCK + 64]
        shutil.rmtree(btrfs.point / "export-0")
        hole = over_9p(btrfs.point, b"/x", 5000, more)
        assert "hole" in hole.end
        assert hole.device is None
        assert hole.steps[-1].target.values == {"hole": True}

    def test_shared_inline_and_not_yet_written(self, btrfs: Mounted) -> None:
        data = pattern(4)

        def more(export: Path) -> None:
            write(export / "x", data)
            run("cp", "--reflink=always", export / "x", export / "y")
            write(export / "small", b"hello")
            run("sync", "-f", export)
            (export / "fresh").write_bytes(data)

        with host(btrfs.point, "g1:home") as served:
            more(btrfs.point / "export-0")
            ways = {
                name: file_path.follow(Target("g1", "home", f"/{name}".encode()), 0, btrfs.point, store_of(served))
                for name in ("x", "y", "small", "fresh")
            }
        assert device_of(ways["x"]) == device_of(ways["y"])
        assert any("shared" in note for step in ways["y"].steps for note in step.notes)
        assert "inline" in ways["small"].end
        assert "sync" in ways["fresh"].end

    def test_compressed_has_no_byte(self, tmp_path: Path) -> None:
        with filesystem(tmp_path, "mkfs.btrfs", "-q", options="compress-force=zlib") as there:
            way = over_9p(there.point, b"/x", 4096, lambda export: write(export / "x", b"a" * 100_000))
        assert "compressed" in way.end
        assert way.device is None

    def test_dup_has_two_places(self, tmp_path: Path) -> None:
        with filesystem(tmp_path, "mkfs.btrfs", "-q", "-d", "dup") as there:
            data = pattern(4)
            way = over_9p(there.point, b"/x", BLOCK, lambda export: write(export / "x", data))
            assert way.device is not None
            copies = way.device["copies"]
            assert len({copy["byte"] for copy in copies}) == 2
            for copy in copies:
                assert there.at(copy["byte"], 32) == data[BLOCK : BLOCK + 32]

    def test_a_subvolume_below(self, btrfs: Mounted) -> None:
        """Its numbers are mixed as the server mixes them."""

        def more(export: Path) -> None:
            run("btrfs", "subvolume", "create", export / "sub")
            write(export / "sub" / "x", pattern(2))

        with host(btrfs.point, "g1:home") as served:
            more(btrfs.point / "export-0")
            way = file_path.follow(Target("g1", "home", b"/sub/x"), 0, btrfs.point, store_of(served))
            session = served.devices[0].session
            with session.client.walked(session.root, b"sub/x") as fid:
                told = session.client.getattr(fid).qid
        assert way.steps[0].target.values["qid"] == {"type": told.type, "version": told.version, "path": told.path}
        assert any("subvolume" in note for step in way.steps for note in step.notes)


@contextmanager
def disk_image(folder: Path, fill: Callable[[Path], None], *options: str) -> Iterator[Path]:
    """An ext4 that was never mounted, as a guest's disk."""
    tools("mke2fs", "debugfs")
    tree, image = folder / "tree", folder / "disk.img"
    tree.mkdir()
    fill(tree)
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    run("mke2fs", "-q", "-t", "ext4", *options, "-d", tree, image)
    image.chmod(0o600)  # as the images of a host are: who reads them is nobody
    yield image


def disk_store(params: str, kind: str = "vbd", **more: str) -> Store:
    back, front = f"/local/domain/0/backend/{kind}/5/51712", "/local/domain/5/device/vbd/51712"
    nodes = {"/local/domain/5/name": "twin", "/local/domain/0/name": "Domain-0", f"{back}/dev": "xvda"}
    nodes |= {f"{back}/params": params, f"{back}/sector-size": "512", f"{front}/ring-ref": "8"}
    nodes |= {f"{front}/event-channel": "15"} | {f"{back}/{key}": value for key, value in more.items()}
    return Store(nodes)


def on_disk(name: bytes, offset: int, store: Store) -> Way:
    return disk_path.follow(Target("twin", "", name), "xvda", offset, store)


DATA = pattern(100)


def tree_with_links(tree: Path) -> None:
    (tree / "etc" / "deep").mkdir(parents=True)
    (tree / "etc" / "deep" / "x").write_bytes(DATA)
    (tree / "abs").symlink_to("/etc/deep")
    (tree / "etc" / "abs").symlink_to("/etc/deep")
    (tree / "etc" / "up").symlink_to("../../../etc/deep/x")
    (tree / "long").symlink_to("/etc/" + "./" * 60 + "deep/x")
    (tree / "circle").symlink_to("circle")
    (tree / "out").symlink_to("/secret")
    (tree / "slow").symlink_to("etc/../" * 50 + "slower")
    (tree / "slower").symlink_to("etc/../" * 50 + "etc")
    for i in range(400):  # a directory of many blocks
        (tree / f"{i:03d}-{'n' * 60}").touch()


class TestDisk:
    """From a file in a guest's image to the image, and to the device below."""

    @pytest.mark.parametrize(
        "name", [b"/etc/deep/x", b"/abs/x", b"/etc/abs/x", b"/etc/up", b"/long", b"//etc/./deep/../deep/x"]
    )
    def test_offset_in_the_image(self, name: bytes, tmp_path: Path) -> None:
        with disk_image(tmp_path, tree_with_links) as image:
            offset = 37 * BLOCK + 100
            way = Way("block", "", "twin", "xvda", "", offset)
            there = Ext4Image(str(image))
            inode, lookups = there.resolve(name)
            byte = disk_path._in_guest(way, there, inode, lookups, offset)
            assert byte is not None
            with image.open("rb") as file:
                file.seek(byte)
                assert file.read(64) == DATA[offset : offset + 64]
            assert lookups[-1].name == b"x"
            assert lookups[0].directory == 2
            assert way.translations == 4

    @pytest.mark.parametrize(
        ("name", "what"),
        [
            (b"/nothing", "/nothing: No such file"),
            (b"/etc/deep/x/y", "Not a directory"),
            (b"/circle", "symbolic links"),
            (b"/slow/x", "more than 128 names"),
            (b"/etc", "/etc is a directory"),
            (b"/out", "No such file"),
            (b"/ev\x1bil\n", r"/ev\x1bil\n: No such file"),
        ],
    )
    def test_what_cannot_be_followed(self, name: bytes, what: str, tmp_path: Path) -> None:
        with disk_image(tmp_path, tree_with_links) as image, pytest.raises(Xen9pError) as caught:
            on_disk(name, 0, disk_store(str(image)))
        assert what in str(caught.value)
        assert caught.value.hint
        assert str(caught.value).isprintable()

    def test_images_that_are_damaged(self, tmp_path: Path) -> None:
        """Whatever a guest has put into its image, it is followed or refused in one line."""
        with disk_image(tmp_path, tree_with_links, "-b", str(BLOCK), "-O", "^metadata_csum") as image:
            sound = image.read_bytes()
            where = Ext4Image(str(image))
            table = int.from_bytes(sound[BLOCK + 8 : BLOCK + 12], "little")  # inodes, by the first group descriptor
            blocks = [0, 1, table, where.block_of(2, 0).number]
            blocks += [where.block_of(where.resolve(name)[0].number, 0).number for name in (b"/etc", b"/etc/deep")]
            spots = [block * BLOCK for block in blocks]
            dice = random.Random(7)
            ends = set()
            for _ in range(CORRUPTED):
                with image.open("r+b") as file:
                    for _ in range(dice.randrange(1, 60)):
                        at = dice.choice(spots) + dice.randrange(4096)
                        file.seek(at)
                        file.write(dice.randbytes(1))
                try:
                    way = on_disk(b"/etc/deep/x", 5 * BLOCK, disk_store(str(image)))
                except Xen9pError as error:
                    ends.add(str(error).isprintable())
                else:
                    assert path.text(way).replace("\n", "").isprintable()
                    ends.add("followed")
                with image.open("r+b") as file:
                    for spot in spots:
                        file.seek(spot)
                        file.write(sound[spot : spot + 4096])
            assert ends == {"followed", True}

    def test_hole_and_end(self, tmp_path: Path) -> None:
        def fill(tree: Path) -> None:
            with (tree / "x").open("wb") as file:
                file.seek(MIB)
                file.write(b"end")

        with disk_image(tmp_path, fill) as image:
            way = on_disk(b"/x", 5000, disk_store(str(image)))
            assert "hole" in way.end
            with pytest.raises(Xen9pError, match=r"has 1048579 bytes, none at offset 1048579"):
                on_disk(b"/x", MIB + 3, disk_store(str(image)))

    def test_no_ext4(self, tmp_path: Path) -> None:
        image = tmp_path / "disk.img"
        image.write_bytes(bytes(8192))
        with pytest.raises(Xen9pError, match="there is no ext4"):
            on_disk(b"/x", 0, disk_store(str(image)))

    def test_no_debugfs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("xen9p.ext4_image._PATH", str(tmp_path))
        with pytest.raises(Xen9pError, match="install e2fsprogs"):
            Ext4Image("/dev/null")

    def test_no_disk_no_guest_no_image(self, tmp_path: Path) -> None:
        store = disk_store(str(tmp_path / "gone"))
        with pytest.raises(Xen9pError, match=r"no guest g9 \(running: twin\)"):
            disk_path.find("g9", "xvda", store)
        with pytest.raises(Xen9pError, match=r"no disk xvdb \(it has: xvda"):
            disk_path.find("twin", "xvdb", store)
        with pytest.raises(Xen9pError, match="cannot be found"):
            disk_path.find("twin", "xvda", store)
        with pytest.raises(Xen9pError, match="only raw"):
            disk_path.find("twin", "xvda", disk_store("qcow2:/x", "qdisk"))

    def test_what_a_guest_publishes_is_escaped(self, tmp_path: Path) -> None:
        with disk_image(tmp_path, tree_with_links) as image:
            store = disk_store(str(image))
            store.nodes["/local/domain/5/device/vbd/51712/ring-ref"] = "\x1b[2J" + "8" * 500
            found = disk_path.find("twin", "xvda", store)
        shown = disk_path._ring_text(found)
        assert shown.isprintable()
        assert len(shown) < 200

    @pytest.mark.skipif(not has_capability(21), reason="as somebody else takes root")
    def test_debugfs_may_only_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever an image makes of debugfs has nobody's rights."""
        fake = tmp_path / "bin" / "debugfs"
        fake.parent.mkdir()
        fake.write_text("#!/bin/sh\nid -u; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status\n")
        tmp_path.chmod(0o755)
        for folder in (fake, fake.parent, *tmp_path.parents):
            if str(folder).startswith(str(tmp_path.parent.parent)):
                folder.chmod(0o755)
        with disk_image(tmp_path, tree_with_links) as image:
            there = Ext4Image(str(image))
            there.tool = str(fake)
            said = there._ask("stat", 4096).decode().split()
        assert said[0] == "65534"
        assert said[said.index("CapEff:") + 1] == "0000000000000004"  # CAP_DAC_READ_SEARCH
        assert said[said.index("CapBnd:") + 1] == "0000000000000004"
        assert said[said.index("NoNewPrivs:") + 1] == "1"

    @pytest.mark.parametrize("kind", ["blkback", "qdisk"])
    def test_down_to_the_device(self, kind: str, btrfs: Mounted) -> None:
        if not has_capability(21):
            pytest.skip("mounting takes CAP_SYS_ADMIN")
        with disk_image(btrfs.point, tree_with_links) as image:
            offset = 11 * BLOCK + 48
            if kind == "qdisk":
                way = on_disk(b"/abs/x", offset, disk_store(f"aio:{image}", "qdisk"))
                assert way.translations == 8, path.text(way)
            else:
                with loop(image, "-o", str(0)) as device:
                    number = os.stat(device).st_rdev
                    physical = {"physical-device": f"{os.major(number):x}:{os.minor(number):x}"}
                    way = on_disk(b"/abs/x", offset, disk_store(str(image), **physical))
                assert way.translations == 9, path.text(way)
            assert btrfs.at(device_of(way)[1], 64) == DATA[offset : offset + 64]

    def test_a_block_device_is_the_end(self, tmp_path: Path, btrfs: Mounted) -> None:
        """A loop device that begins within its file."""
        other = btrfs.point / "shifted.img"
        (tmp_path / "in").mkdir()
        with disk_image(tmp_path / "in", tree_with_links) as image:
            other.write_bytes(bytes(MIB) + image.read_bytes())
        with loop(other, "-o", str(MIB)) as device:
            way = on_disk(b"/etc/deep/x", BLOCK, disk_store(device))
        inside = next(step.target.values["offset"] for step in way.steps if step.target.space == path.IMAGE)
        with other.open("rb") as file:
            file.seek(inside)
            assert file.read(64) == DATA[BLOCK : BLOCK + 64]
        assert btrfs.at(device_of(way)[1], 64) == DATA[BLOCK : BLOCK + 64]

    def test_a_mounted_one_is_warned_of(self, ext4: Mounted) -> None:
        write(ext4.point / "x", DATA)
        run("sync")
        way = on_disk(b"/x", BLOCK, disk_store(ext4.device))
        assert "sync in the guest" in way.notes[0]
        sector = next(step.target.values["sector"] for step in way.steps if step.target.space == path.SECTOR)
        assert ext4.at(sector * 512, 64) == DATA[BLOCK : BLOCK + 64]


# Waiting for a real request.


def test_a_real_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xen9p.store_path.follow", lambda *_: None)
    with host(tmp_path, "g1:home") as served:
        export, session = tmp_path / "export-0", served.devices[0].session
        (export / "x").write_bytes(DATA)
        (export / "y").write_bytes(DATA)
        (export / "link").symlink_to("x")
        opened: list[int] = []

        def ask() -> None:
            with session.client.walked(session.root, b"y") as other, session.client.walked(session.root, b"x") as fid:
                opened.append(fid)
                for each in (other, fid):
                    session.client.lopen(each, os.O_RDWR)
                session.client.read(other, 8192, 100)  # another file
                session.client.read(fid, 8193, 100)  # another place
                session.client.write(fid, 8000, b"w" * 200)

        threads = [threading.Thread(target=ask)]
        way = file_path.follow(
            Target("g1", "home", b"/link"), 8192, tmp_path, store_of(served), wait=20, ready=threads[0].start
        )
        threads[0].join()
        over(served)
        told = session.client.getattr(session.root).qid
    values = {step.target.space: step.target.values for step in reversed(way.steps)}
    assert told.path != values[path.FID]["qid"]["path"]
    assert values[path.FID]["fid"] == opened[0]
    assert values[path.FID]["qid"]["path"] == (export / "x").stat().st_ino
    request = next(step.source.values for step in way.steps if step.source.space == path.REQUEST)
    assert {k: request[k] for k in ("type", "offset", "count")} == {"type": "Twrite", "offset": 8000, "count": 200}
    assert values[path.RING]["ring"] == 0
    assert values[path.RING]["rings"][1] == {"ring": 1, "ring-ref": 521, "event-channel": 13, "order": None}
    assert values[path.RING]["ns"]["total"] > 0
    assert "symbolic links lead to /x" in way.steps[0].notes


def test_no_request_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xen9p.store_path.follow", lambda *_: None)
    with host(tmp_path, "g1:home") as served:
        (tmp_path / "export-0" / "x").write_bytes(DATA)
        way = file_path.follow(Target("g1", "home", b"/x"), 0, tmp_path, store_of(served), wait=0.2)
        over(served)
    assert "no request for this byte came" in way.notes[-1]
    assert way.steps[0].target.values["fid"] is None


@pytest.fixture
def tracing(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "tracing"
    point.mkdir()
    if subprocess.run(["mount", "-t", "tracefs", "tracefs", point], check=False, capture_output=True).returncode:
        pytest.skip("tracefs cannot be mounted here")
    try:
        yield point
    finally:
        unmount(point)


def test_a_request_of_a_disk_is_seen(tracing: Path, tmp_path: Path) -> None:
    if not (tracing / "events" / "block" / "block_rq_issue").exists():
        pytest.skip("this kernel has no events of block devices")
    image = tmp_path / "i"
    image.write_bytes(bytes(4 * MIB))
    with loop(image) as device:

        def read() -> None:
            for block in (100, 512):
                run("dd", f"if={device}", "of=/dev/null", "bs=4096", f"skip={block}", "count=1", "iflag=direct")

        reader = threading.Thread(target=read)
        number = os.stat(device).st_rdev
        seen = blocktrace.watch(number, 2 * MIB + 1000, 10, reader.start, tracing)
        reader.join()
        assert seen is not None
        assert (seen.kind[0], seen.sector, seen.count, seen.task) == ("R", 4096, 8, "dd")
        assert blocktrace.watch(number, 0, 0.1, lambda: None, tracing) is None
    assert not list((tracing / "instances").glob("xen9p-*"))


@pytest.mark.parametrize("kind", ["blkback", "qdisk"])
def test_a_request_of_a_guests_disk(kind: str, tracing: Path, btrfs: Mounted) -> None:
    """What a backend reads, read here: the loop device as blkback does, the image past the cache as QEMU does."""
    offset = 3 * BLOCK
    with disk_image(btrfs.point, tree_with_links, "-b", str(BLOCK)) as image, loop(image) as device:
        run("sync", "-f", btrfs.point)
        number = os.stat(device).st_rdev
        physical = {"physical-device": f"{os.major(number):x}:{os.minor(number):x}"}
        store = disk_store(str(image), **physical) if kind == "blkback" else disk_store(f"aio:{image}", "qdisk")
        first = on_disk(b"/etc/deep/x", offset, store)
        at = next(step.target.values["sector"] for step in first.steps if step.target.space == path.SECTOR) // 8
        source = device if kind == "blkback" else image

        def read() -> None:
            # Some versions of btrfs read by way of the cache even if that is not wanted.
            run("dd", f"if={image}", "of=/dev/null", "iflag=nocache", "count=0")
            run("dd", f"if={source}", "of=/dev/null", "bs=4096", f"skip={at}", "count=1", "iflag=direct")

        reader = threading.Thread(target=read)
        waiting = disk_path.Waiting(20, reader.start, tracing)
        way = disk_path.follow(Target("twin", "", b"/etc/deep/x"), "xvda", offset, store, wait=waiting)
        reader.join()
    seen = re.match(r"seen on \S+: R\S*, sectors (\d+) to (\d+), ", way.notes[-1].replace("the store's device", "it"))
    assert seen, way.notes
    sector = at * 8 if kind == "blkback" else device_of(way)[1] // 512
    assert int(seen[1]) <= sector <= int(seen[2])


def test_lines_of_a_trace() -> None:
    line = "   2.xvda-0-kworker-811   [000] .....  6512.391523: block_rq_issue: 7,3 WS 4096 () 8192 + 8 [kworker/u4:1]"
    seen = blocktrace.parse(line)
    assert seen is not None
    assert (seen.device, seen.kind, seen.sector, seen.count) == ((7, 3), "WS", 8192, 8)
    newer = line.replace("+ 8 [", "+ 8 none,0,0 [")
    assert blocktrace.parse(newer) == seen
    assert blocktrace.parse("# tracer: nop") is None


# What has no filesystem in it.


def test_links_stay_in_the_export(tmp_path: Path) -> None:
    export = tmp_path / "export"
    (export / "etc").mkdir(parents=True)
    (export / "etc" / "passwd").write_text("the guest's")
    (tmp_path / "secret").write_text("the host's")
    (export / "absolute").symlink_to("/etc/passwd")
    (export / "up").symlink_to("../../../../../etc/passwd")
    (export / "out").symlink_to(f"{tmp_path}/secret")
    (export / "magic").symlink_to("/proc/self/root/etc/passwd")
    os.mkfifo(export / "fifo")
    root = os.open(export, os.O_PATH)
    try:
        for name in (b"/absolute", b"up", b"/../../etc/passwd"):
            fd = in_root.resolve(root, name)
            assert in_root.name_of(fd) == os.fsencode(export / "etc" / "passwd")
            os.close(fd)
        for name in (b"/out", b"/magic", b"/../secret"):
            with pytest.raises(FileNotFoundError):
                in_root.resolve(root, name)
        fd = in_root.resolve(root, b"/fifo")
        assert in_root.open_regular(fd) is None, "opening it would wait"
        os.close(fd)
    finally:
        os.close(root)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("g1:home:/a/b", Target("g1", "home", b"/a/b")),
        ("g1:/a:b", Target("g1", "", b"/a:b")),
        ("g1:home:/", Target("g1", "home", b"/")),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["", "g1", "g1/x", ":/x", "g1:home/x", "g1:a:b:/x", "g1:x"])
def test_no_targets(text: str) -> None:
    with pytest.raises(Xen9pError, match="no path of a guest"):
        parse_target(text)


@pytest.mark.parametrize(
    "case",
    [
        ("g2:home:/x", 0, "there is no guest g2 (running: g1)"),
        ("g1:/x", 0, "g1 has no tag root (it has: home"),
        ("g1:home:/nothing", 0, "/nothing: No such file"),
        ("g1:home:/d", 0, "/d is a directory"),
        ("g1:home:/x/y", 0, "/x/y: Not a directory"),
        ("g1:home:/circle", 0, "symbolic links"),
        ("g1:home:/fifo", 0, "/fifo is a FIFO"),
        ("g1:home:/x", 5, "/x has 5 bytes, none at offset 5 (take --offset from 0 to 4)"),
        ("g1:home:/e\x1b", 0, r"/e\x1b: No such file"),
    ],
)
def test_errors_are_one_line(
    case: tuple[str, int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, offset, what = case
    with host(tmp_path, "g1:home") as served:
        monkeypatch.setattr("xen9p.xenstore.XenStore", lambda: store_of(served))
        export = tmp_path / "export-0"
        (export / "x").write_text("12345")
        (export / "d").mkdir()
        (export / "circle").symlink_to("circle")
        os.mkfifo(export / "fifo")
        assert cli.main(["path", target, "--offset", str(offset), "--runtime-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert what in error
    assert error.count("\n") == 1
    assert error.rstrip().endswith(")"), "there is no hint"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xen9p.store_path.follow", lambda *_: None)
    with host(tmp_path, "g1:root") as served:
        monkeypatch.setattr("xen9p.xenstore.XenStore", lambda: store_of(served))
        (tmp_path / "export-0" / "x").write_text("12345")
        command = ["path", "g1:/x", "--offset", "4", "--runtime-dir", str(tmp_path)]
        assert cli.main([*command, "--json"]) == 0
        one = tmp_path / "one.json"
        one.write_text(capsys.readouterr().out)
        assert json.loads(one.read_text())["name"] == "root"
        assert cli.main([*command, "--beside", str(one)]) == 0
        shown = capsys.readouterr().out
        assert "ring 1: grant 521, event channel 13" in shown
        assert "--wait S shows those of a real one" in shown
        assert shown.splitlines()[-1].split() == ["=", "3", "translations", "3", "translations"]
        assert cli.main([*command, "--beside", str(one), "--json"]) == 0
        assert [way["translations"] for way in json.loads(capsys.readouterr().out)] == [3, 3]
        one.write_text("{}")
        assert cli.main([*command, "--beside", str(one)]) == 1
        assert cli.main(["path", "g1:root:/x", "--disk", "xvda"]) == 1
        assert "not both" in capsys.readouterr().err


def test_qids_are_the_servers(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    (tmp_path / "d").mkdir()
    (tmp_path / "l").symlink_to("x")
    with memory_session(tmp_path) as session:
        for name in ("x", "d", "l"):
            with session.client.walked(session.root, name.encode()) as fid:
                told = session.client.getattr(fid).qid
            assert file_path.qid_of(os.lstat(tmp_path / name), tmp_path.stat().st_dev) == told


def test_orders_of_rings() -> None:
    maps = (
        "7f0000000000-7f0000200000 rw-s 00001000 00:05 12 /dev/xen/gntdev\n"
        "7f0000300000-7f0000301000 rw-s 00000000 00:05 12 /dev/xen/gntdev\n"
        "7f0000400000-7f0000420000 rw-s 00202000 00:05 12 /dev/xen/gntdev\n"
        "7f0000500000-7f0000501000 rw-s 00201000 00:05 12 /dev/xen/gntdev\n"
        "7f0000600000-7f0000700000 rw-p 00000000 00:00 0 \n"
    )
    assert file_path.ring_orders(maps) == (9, 5)
    assert file_path.ring_orders("") == ()
    rings = (Ring(8, 12), Ring(521, 13))
    device = file_path.Device("g1", "home", 3, 0, "home", Path("/"), 1, "guest's v9fs", rings, (9, 5))
    shown = file_path._ring(device, None)
    assert [ring["order"] for ring in shown.values["rings"]] == [9, 5]
    assert "ring 1: grant 521, event channel 13, order 5, 32 pages, 65536 bytes each way" in shown.text


def test_words_for_a_shell() -> None:
    for name in (b"plain", b"with blank", b"it's", b"\x1b[2J\n", b"a\\'\xff0", "ä\u202eb".encode()):
        word = path.shell_word(name)
        assert word.isprintable()
        said = subprocess.run(["bash", "-c", f"printf %s {word}"], check=True, capture_output=True).stdout
        assert said == name


def small(kind: str = "9P") -> Way:
    way = Way(kind, "somebody", "g1", "home", "/x", 7)
    way.add("a", Point("path", '"/x"'), Point("fid", "3", {"fid": 3}), "look", "a note")
    way.add("b", Point("file offset", "7"), Point("file offset", "7"))
    way.add("c", Point("file offset", "7"), Point(path.DEVICE, "d byte 9", {"device": "d", "byte": 9}))
    return way


def test_translations_are_counted() -> None:
    way = small()
    assert way.translations == 2
    assert "2 translations in 3 steps; 1 leave" in path.text(way)
    way.add("d", Point("x", ""), Point("y", ""))
    assert way.translations == 3


def test_json_there_and_back() -> None:
    way = small()
    value = json.loads(json.dumps(path.to_json(way)))
    assert value["translations"] == 2
    assert value["device"] == {"device": "d", "byte": 9}
    value["translations"] = 99
    again = path.from_json(value)
    assert again == way
    assert again.translations == 2
    for wrong in ({}, [], None, {**value, "steps": [{}]}, {**value, "guest": "\x1b[2J"}):
        with pytest.raises(Xen9pError):
            path.from_json(wrong)


def test_side_by_side() -> None:
    longer = small("block")
    longer.add("d", Point("x", ""), Point("y", ""))
    lines = path.compare(small(), longer).splitlines()
    assert lines[-1].split() == ["=", "2", "translations", "3", "translations"]
    assert lines[3].split() == ["3", "x", "->", "y"]


def test_dumps_of_debugfs() -> None:
    head = "0000  a481 0000 0102 0304 0000 0000 0000 0000  ................\n"
    assert hex_dump(f"{head}*\n0060  ffff  ..\n")[:16] == bytes.fromhex("a481000001020304") + bytes(8)
    assert hex_dump(f"{head}*\n0060  ffff  ..\n")[32:50] == bytes.fromhex("a481000001020304") + bytes(8) + b"\xff\xff"
    assert hex_dump("nothing here\n") == b""


def test_directories_that_are_damaged() -> None:
    good = (12).to_bytes(4, "little") + (12).to_bytes(2, "little") + b"\x03\x01abc\0"
    assert list(entries(good * 2, 1024)) == [(b"abc", 12)] * 2
    deleted = bytes(4) + good[4:]
    assert list(entries(deleted + good, 1024)) == [(b"abc", 12)]
    for bad in (bytes(1024), b"\xff" * 1024, good[:4] + b"\0\0" + good[6:], good[:4] + b"\x0c\0\xff" + good[7:]):
        assert list(entries(bad.ljust(1024, b"\0") + good, 1024)) == [(b"abc", 12)]


def test_another_filesystem_is_said_to_be(tmp_path: Path) -> None:
    fd = os.open("/proc/self/status", os.O_RDONLY)
    try:
        with pytest.raises(Xen9pError, match="not followed"):
            extents.filesystem_of(fd, "x")
    finally:
        os.close(fd)
    assert stat.S_ISDIR(tmp_path.stat().st_mode)
    assert escape(b"\x1b") == "\\x1b"
