"""Checks of the lab dedup."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import count

from labkit.errors import CouldNotLookError
from labkit.look import Look, Verdict, compare, failed, partial, parts, passed

GUESTS = ("guest", "guest2")
SMALL = 60000
"""Bytes of all small files together."""
FULL, MOST = 0.985, 0.9
"""Which part of what is equal has to be shared for all of the points of `improve`, and for 0.7 of them."""
PLACES = """find {} -type f -exec filefrag -v -b4096 {{}} + 2>/dev/null"""


@dataclass(frozen=True)
class Package:
    """What install installs, for one number: the content of each of its files."""

    boot: bytes
    common: bytes
    small: bytes
    index: bytes

    @property
    def size(self) -> int:
        """Bytes that are equal in both guests."""
        return len(self.boot) + len(self.common) + len(self.small) + len(self.index)


def package(look: Look, number: int) -> Package:
    """As `install` in the start folder makes it."""
    boot, common, index = (int(look.values[name]) for name in ("boot", "package", "index"))
    return Package(
        _numbers(number, boot),
        _numbers(number + 1000000, common),
        _numbers(number + 2000000, SMALL),
        _numbers(number + 3000000, index),
    )


def shown(look: Look, place: str, number: int) -> str:
    """What `show` has to write out in a guest, as sha256sum(1) says it."""
    name = str(look.values[place])
    size = int(look.values["own"]) + (0 if place == "guest" else 4096 * int(look.values["more"]))
    steps = b"".join(b"%s: step %d\n" % (name.encode(), n) for n in range(1, size // 8 + 2))[:size]
    what = package(look, number)
    head = steps[-(size % 3000 + 100) :] + b"\nindex\n"
    return sha256(what.boot + steps + what.common + what.small + head + what.index).hexdigest()


def _numbers(first: int, size: int) -> bytes:
    """As `seq FIRST ... | head -c SIZE`."""
    text = bytearray()
    for number in count(first):
        if len(text) >= size:
            break
        text += b"%d\n" % number
    return bytes(text[:size])


def predict(look: Look) -> Verdict:
    """What of all that is equal lies so that a run finds it."""
    what = package(look, int(look.values["start"]))
    found = look.out("host", 'cd "$part" && cat {one,two}/lib/common 2>/dev/null | sha256sum').split()
    if found[:1] != [sha256(what.common * 2).hexdigest()]:
        return failed("sh install /mnt/drift, in both guests", "not installed in both of them")
    share = len(what.boot) + len(what.common)
    return parts(
        {
            "share": compare(look.answer("share"), share, "share=..., how many bytes a run finds in both guests"),
            "lost": compare(look.answer("lost"), what.size - share, "lost=..., how many are equal and not found"),
        }
    )


def shared(look: Look) -> Verdict:
    """boot/kernel and lib/common of both guests lie at one place, and both guests read what they should."""
    what = package(look, int(look.values["start"]))
    names = "boot/kernel lib/common"
    found = look.many(
        "host",
        {
            "one": f'cd "$part/one" && sync -f . && {PLACES.format(names)}',
            "two": f'cd "$part/two" && {PLACES.format(names)}',
        },
    )
    one, two = (blocks(found[name].out) for name in ("one", "two"))
    wanted = len(what.boot) + len(what.common)
    if not one or not two:
        return failed("sh install /mnt/drift, in both guests", "not installed in both of them")
    same = len(one & two) * 4096
    if same < 0.95 * wanted:
        return failed(
            "boot/kernel and lib/common of both guests at the same places", f"{same} bytes at the same places"
        )
    right = sha256(what.boot + what.common).hexdigest()
    for place in GUESTS:
        if right not in look.out(place, f"cd /mnt/drift && cat {names} | sha256sum"):
            return partial(0.5, "both guests still read what they have installed", f"${place} reads something else")
    return passed()


def images(look: Look) -> Verdict:
    """Two images with both trees in them, and how much of them is shared."""
    what = package(look, int(look.values["start"]))
    read = "debugfs -R 'cat /lib/common' \"$part/disks/{}.img\" 2>/dev/null | sha256sum"
    found = look.many(
        "host",
        {
            "sums": f'sync -f "$part"; {read.format("one")}; {read.format("two")}',
            "one": 'filefrag -v -b4096 "$part/disks/one.img"',
            "two": 'filefrag -v -b4096 "$part/disks/two.img"',
        },
    )
    if re.findall(r"[0-9a-f]{64}", found["sums"].out) != [sha256(what.common).hexdigest()] * 2:
        return failed("ext4 in $part/disks/one.img and two.img, with the trees of both guests", "not so")
    same = len(blocks(found["one"].out) & blocks(found["two"].out)) * 4096
    if not same:
        return failed("a run of de-duplication on the export of the images", "they share nothing yet")
    return compare(look.answer("images"), same, "images=..., how many bytes of both images lie at the same place")


def improve(look: Look) -> Verdict:
    """The student's installer, with a number that nobody knew: what of its files is shared after a run."""
    number = 1000000 + secrets.randbelow(3000000)
    script = (
        'cd "$LAB_WORK" && grep -q " /mnt/drift " /proc/mounts || exit 3\n'
        f"rm -rf /mnt/drift/look; timeout 40 sh ./install /mnt/drift/look {number} >&2 </dev/null\n"
        "sync -f /mnt/drift\n"
        "timeout 25 sh ./show /mnt/drift/look </dev/null | sha256sum"
    )
    try:
        with ThreadPoolExecutor(2) as pool:
            done = list(pool.map(lambda place: look.run(place, script), GUESTS))
        for place, one in zip(GUESTS, done, strict=True):
            if one.code == 3:
                return failed("drift mounted at /mnt/drift in both guests", f"it is not in ${place}")
            if one.out[:64] != shown(look, place, number):
                return failed(
                    "sh install DIRECTORY NUMBER, and then from show the same bytes as at the start",
                    f"${place} shows others" + (f": {one.said}" if one.err.strip() else ""),
                )
        return _share(look, package(look, number).size)
    finally:
        look.run("host", 'rm -rf "${part:?}/one/look" "${part:?}/two/look"')


def _share(look: Look, equal: int) -> Verdict:
    """How much of the two installed trees is at one place after a run."""
    # There is one run at a time on a host, and others may have begun theirs.
    done = look.run(
        "host",
        """said="$LAB_WORK/.run"
        for try in $(seq 30); do
          xen9p dedup run "$export_one" "$export_two" --settle 0 --json 2>"$said"
          code=$?
          [ $code -ne 0 ] && grep -q 'another run' "$said" || break
          sleep 1
        done
        cat "$said" >&2
        rm -f "$said"
        exit $code""",
    )
    if done.code != 0:
        raise CouldNotLookError(f"xen9p dedup run: {done.said}", "does another run take place? xen9p dedup status")
    json.loads(done.out)
    found = look.many("host", {name: PLACES.format(f'"$part/{name}/look"') for name in ("one", "two")})
    part = min(1.0, len(blocks(found["one"].out) & blocks(found["two"].out)) * 4096 / equal)
    if part >= FULL:
        return passed()
    wish = f"{FULL:.1%} of what is equal in both guests is shared after a run"
    return partial(0.7, wish, f"{part:.1%}") if part >= MOST else failed(wish, f"{part:.1%}")


def blocks(text: str) -> set[int]:
    """The blocks of 4 KiB on the disk, from `filefrag -v -b4096`; what lies in metadata has none."""
    return set(_blocks(text))


def _blocks(text: str) -> Iterator[int]:
    for line in text.splitlines():
        match = re.match(r"\s*\d+:\s*\d+\.\.\s*\d+:\s*(\d+)\.\.\s*(\d+):", line)
        if match and not re.search(r"inline|unknown|delalloc", line):
            yield from range(int(match[1]), int(match[2]) + 1)
