"""Checks of the lab capstone.

In one run the student's build and the given one on the block path, two rounds of each by turns: what is counted are
requests and bytes over both rounds, and of the times the better one of each. Everything is a ratio.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from labkit.errors import CouldNotLookError
from labkit.look import Look, Verdict, compare, failed, partial, parts, passed

GUESTS = ("guest", "guest2")
ROUNDS = 2
UNITS = 12
LEAST = 20
"""Seconds that a build has at least; it has 4 times as long as its rival."""
OBJECT = 68
"""Bytes of an object, a line of sha256sum(1)."""
STEPS = {"requests": (4.5, 9.0), "read": (1.2, 3.0), "written": (0.1, 0.3), "time": (1.5, 3.0)}
"""What the student's build may cost of what the block path does, for all of the points and for half of them. Once, on
the nested host while others worked there, the solution took: requests 3.29, read 0.85, written 0.00, time 0.78."""

PREPARE = """
import hashlib, os, random, sys
os.chdir(sys.argv[1])
units = sorted(os.listdir("src"))
with open("include/nonce", "w") as file:
    file.write(os.urandom(16).hex() + "\\n")
with open("src/" + random.choice(units), "r+") as file:
    file.write(os.urandom(16).hex())
head = hashlib.sha256()
for name in sorted(os.listdir("include")):
    head.update(open("include/" + name, "rb").read())
app = hashlib.sha256()
for name in units:
    unit = head.copy()
    unit.update(open("src/" + name, "rb").read())
    app.update(unit.hexdigest().encode() + b"  -\\n")
print(app.hexdigest())
"""
"""Changes the nonce and one unit, sizes stay; prints the checksum of what the app has to be then."""

# What the given build does, on the disk, with none of the sources in the page cache (dd(1)). All caches must not be
# dropped: the guest's own root, with its programs, would have to come again as well, and the times would be of that.
TWIN = """cd /mnt/disk && rm -rf out && echo {nonce} > include/nonce && sync -f . || exit 3
for each in include/* src/*; do dd if="$each" iflag=nocache count=0 status=none; done
{stat}
{now}
mkdir -p out
for unit in src/*; do
  name=${{unit##*/}}
  cat include/* "$unit" > "out/$name.i"
  sha256sum < "out/$name.i" > "out/$name.o"
done
cat out/*.o > out/app
{now}
sync -f .; {stat}"""
MINE = """cd "$LAB_WORK" && {stat}
{now}
timeout {limit} sh ./build /mnt/build {number} {count} >&2 < /dev/null
code=$?
{now}
{stat}; exit $code"""
# Requests and sectors read, the same written, of the disk (Documentation/block/stat.rst).
STAT = """awk '{ print "stat", $1, $3, $5, $7 }' "/sys/dev/block/$(mountpoint -d /mnt/disk)/stat" """
NOW = "date +'time %s%N'"


@dataclass
class Work:
    """What was counted: requests, bytes, and the seconds of the slower guest of each round."""

    requests: float = 0
    read: float = 0
    written: float = 0
    times: list[float] = field(default_factory=list)

    def count(self, texts: Sequence[str], *, writes: bool) -> None:
        """Adds what a round says of the disks."""
        for text in texts:
            stats = [list(map(int, line.split()[1:])) for line in text.splitlines() if line.startswith("stat ")]
            reads, sectors, wrote, out = (last - first for first, last in zip(stats[0], stats[-1], strict=True))
            self.requests += reads + wrote * writes
            self.read += 512 * sectors
            self.written += 512 * out * writes

    def took(self, texts: Sequence[str]) -> None:
        """Adds what a round took."""
        marks = [list(map(int, re.findall(r"(?m)^time (\d+)$", text))) for text in texts]
        self.times.append(max(end - begin for begin, end in marks) / 1e9)


def predict(look: Look) -> Verdict:
    """What the given build reads and writes over 9P, in one guest that does not cache: by the sizes of the files."""
    sizes = look.out("host", 'cd "$part/tree" && stat -c "%n %s" include/* src/*')
    found = dict(line.split() for line in sizes.splitlines())
    head = sum(int(size) for name, size in found.items() if name.startswith("include/"))
    units = [int(size) for name, size in found.items() if name.startswith("src/")]
    if not units or not head:
        raise CouldNotLookError("the sources are gone", "lab reset capstone brings them back")
    whole = sum(head + size for size in units)
    objects = OBJECT * len(units)
    return parts(
        {
            "read": compare(look.answer("read"), 2 * whole + objects, "read=..., bytes that one build reads"),
            "written": compare(look.answer("written"), whole + 2 * objects, "written=..., bytes that it writes"),
        }
    )


def twins(look: Look) -> Verdict:
    """Each guest has the tree on a disk of its own."""
    # All of it counts: a larger twin would be an easier rival. A check changes the nonce and how a unit begins.
    sizes = {"include/common": look.values["header"], "include/nonce": 33}
    sizes |= {f"src/unit-{number:02}": look.values["unit"] for number in range(1, UNITS + 1)}
    listed = [f"{name} {size}" for name, size in sorted(sizes.items())]
    script = "LC_ALL=C; export LC_ALL; find include src -type f -printf '%p %s\\n' 2>/dev/null | sort; " + (
        "for each in include/common src/*; do tail -c +33 $each | sha256sum; done 2>/dev/null"
    )
    wanted = look.out("host", f'cd "$part/tree" && {{ {script}; }}').splitlines()
    if wanted[: len(listed)] != listed:
        return failed("the sources with the sizes that they had at the start", "others: lab reset capstone")
    mount = "awk '$2 == \"/mnt/disk\" { print $3, $4 }' /proc/mounts | tail -n 1"
    for place in GUESTS:
        about, _, there = look.out(place, f"{mount}; cd /mnt/disk && {{ {script}; }}").partition("\n")
        kind, _, options = about.partition(" ")
        if not kind.startswith("ext"):
            return failed("an ext4 at /mnt/disk in both guests", f"{kind or 'nothing'} in ${place}")
        if {"sync", "dirsync"} & set(options.split(",")):
            return failed("it is mounted as mount(8) does by itself", f"{options} in ${place}")
        if there.splitlines() != wanted:
            return failed("the same include and src in it", f"something else in ${place}")
    return passed()


def race(look: Look) -> Verdict:
    """The student's build against the given one on disks."""
    for place in GUESTS:
        if look.run(place, "grep -q ' /mnt/build ' /proc/mounts && [ -d /mnt/build/src ]").code != 0:
            return failed("the tree at /mnt/build in both guests", f"not in ${place}")
    mine, theirs = Work(), Work()
    before = look.all_counters(*GUESTS)
    for _ in range(ROUNDS):
        theirs_said = _both(look, TWIN)
        theirs.count(theirs_said, writes=True)
        theirs.took(theirs_said)
        done = look.run("host", f"cd \"$part/tree\" && rm -rf out && mkdir out && python3 -I -c '{PREPARE}' .")
        if done.code != 0:
            raise CouldNotLookError(f"the sources cannot be changed: {done.said}", "lab reset capstone")
        limit = max(LEAST, round(4 * theirs.times[-1]))
        mine_said = _both(look, MINE, limit)
        app = look.out("host", 'sha256sum < "$part/tree/out/app" 2>/dev/null')
        if app[:64] != done.out.strip():
            wish = f"out/app, made from the sources as they are now, in {limit} s"
            return failed(wish, "another one" if app else "none")
        mine.count(mine_said, writes=False)  # who reads the disk instead has that counted, too
        mine.took(mine_said)
    after = look.all_counters(*GUESTS)
    requests, read, written = (after.get(k, 0) - before.get(k, 0) for k in ("requests", "read_bytes", "written_bytes"))
    mine.requests += requests
    mine.read += read
    mine.written += written
    if mine.requests <= 0:
        raise CouldNotLookError("the counters went back", "a device was attached anew meanwhile: check again")
    verdict = score(mine, theirs)
    lines = [f"{name}: {a:.6g} of {b:.6g}, {a / b:.2f}" for name, (a, b) in amounts(mine, theirs).items()]
    look.run("host", "cat > \"$LAB_WORK/race\" <<'END'\n" + "\n".join(lines) + "\nEND")
    return verdict


def amounts(mine: Work, theirs: Work) -> dict[str, tuple[float, float]]:
    """What each of both took, by name."""
    return {
        "requests": (mine.requests, theirs.requests),
        "read": (mine.read, theirs.read),
        "written": (mine.written, theirs.written),
        "time": (min(mine.times), min(theirs.times)),
    }


def score(mine: Work, theirs: Work) -> Verdict:
    """The ratios, step by step. CouldNotLookError if the rival did nothing that can be compared with."""
    verdicts = {"result": passed()}
    for name, (mine_took, theirs_took) in amounts(mine, theirs).items():
        if theirs_took <= 0:
            raise CouldNotLookError(f"the build on the disks has no {name}", "are they disks of the guests' own?")
        ratio = mine_took / theirs_took
        full, half = STEPS[name]
        wish, is_so = f"at most {full:g} of what the disks take", f"{ratio:.2f}"
        verdicts[name] = (
            passed() if ratio <= full else partial(0.5, wish, is_so) if ratio <= half else failed(wish, is_so)
        )
    return parts(verdicts)


def _both(look: Look, script: str, limit: int = 0) -> list[str]:
    """A script in both guests at the same time; what each said."""

    def one(number: int) -> str:
        text = script.format(
            stat=STAT, now=NOW, nonce=secrets.token_hex(16), number=number, count=len(GUESTS), limit=limit
        )
        done = look.run(GUESTS[number - 1], text)
        if script is TWIN and done.code != 0:
            raise CouldNotLookError(
                f"the build on the disk of ${GUESTS[number - 1]} failed: {done.said}", "is it full?"
            )
        return done.out

    with ThreadPoolExecutor(len(GUESTS)) as pool:
        return list(pool.map(one, range(1, len(GUESTS) + 1)))
