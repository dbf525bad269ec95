"""Checks of the lab snapshots."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from labkit.errors import CouldNotLookError
from labkit.look import Look, Verdict, compare, failed, partial, parts, passed
from labkit.setup import where

LOOKS = 14
"""Snapshots that are made of the student's program: of one that is wrong half of the time, one at least is wrong."""
SNAPSHOTS = '"${part%/labs/*}/.snapshots/$export_work"'
MOUNT = "mount -t 9p -o trans=xen,version=9p2000.L,msize=65536,cache=none"
START, END = "monday: all is well", "tuesday: something is wrong"
LISTED = """find "$victim" "$broken" -printf '%p %y %m %U:%G\\n' 2>/dev/null | sort
find "$victim" "$broken" -type f -exec sha256sum {} + 2>/dev/null | sort -k 2
stat -c 'inode %i' "$victim" 2>/dev/null || true"""


def back(look: Look) -> Verdict:
    """What the disaster took is as it was at the start, and what was written after the snapshot is still there."""
    pristine = where(look.lab.name, look.student).pristine
    found = look.many(
        "host",
        {
            "diary": 'cat "$part/src/diary"',
            "was": f'cd "{pristine}/src" && {LISTED}',
            "is": f'cd "$part/src" && {LISTED}',
            "early": f"""cd {SNAPSHOTS} 2>/dev/null || exit 0
                for each in *; do
                  [ -d "$each/src/$victim/deep/down" ] && [ "$(cat "$each/src/diary")" = "{START}" ] && echo "$each"
                done""",
        },
    )
    was, now = found["was"].out.splitlines(), found["is"].out.splitlines()
    kept = END in found["diary"].out
    inode = [line for line in was if line.startswith("inode ")]
    if inode and inode[0] in now:
        found_so = "$victim is still the directory of the start" if kept else "nothing has happened yet"
        return failed("sh disaster /mnt/keep, in the guest", found_so)
    if not found["early"].out.strip():
        return failed("a snapshot from before the disaster", "none has all that was there then")
    broken = str(look.values["broken"])
    file = _about(was, broken) == _about(now, broken)
    directory = _about(was, str(look.values["victim"])) == _about(now, str(look.values["victim"]))
    if not directory or not file:
        what = ["$victim is not"] * (not directory) + ["$broken is not"] * (not file)
        return partial(
            0.2 + 0.3 * directory + 0.3 * file,
            "in src: names, modes, owners and bytes as they were before the disaster",
            " and ".join(what),
        )
    if not kept:
        return partial(0.8, "what was written into src/diary after the snapshot is still there", "it is lost")
    return passed()


def _about(listed: list[str], name: str) -> list[str]:
    return [line for line in listed if not line.startswith("inode ") and name in line]


def changed(look: Look) -> Verdict:
    """The one file that differs between the snapshots clean and tampered, and its first byte that does."""
    done = look.run(
        "host",
        f"""cd {SNAPSHOTS} 2>/dev/null && [ -d clean/data ] && [ -d tampered/data ] || exit 4
        for each in clean/data/*; do cmp -l "$each" "tampered/data/${{each##*/}}" | sed "s|^|${{each##*/}} |"; done""",
    )
    if done.code == 4:
        return failed("two snapshots of the export, clean and tampered", "not both of them")
    differs = [line.split()[:2] for line in done.out.splitlines()]
    if len({name for name, _ in differs}) != 1:
        what = "one file in data that differs between them"
        return failed(what, f"{len({name for name, _ in differs})} files")
    name, first = differs[0][0], int(differs[0][1]) - 1  # cmp(1) counts from 1
    return parts(
        {
            "file": compare((look.answer("file") or "").removeprefix("data/"), name, "file=..., which file of data"),
            "at": compare(look.answer("at"), first, "at=..., the first byte that is another, counted from 0"),
        }
    )


def half(look: Look) -> Verdict:
    """The snapshot half has less money than there is, and the student knows how much less."""
    done = look.run("host", f"cd {SNAPSHOTS}/half/bank 2>/dev/null && head -qn 1 a b | grep -v '^$'")
    if done.code != 0:
        return failed("a snapshot of the export, half", "none")
    total = int(look.values["first"]) + int(look.values["second"])
    accounts = [int(line) for line in done.out.split() if line.isdigit()]
    there = sum(accounts)
    if there == total:
        return failed("a snapshot in which money is missing", "there it is all there: delete it and try again")
    # Between taking and giving one step is missing; while a file is being written anew it is empty.
    if len(accounts) == 2 and total - there != int(look.values["step"]):
        return failed("a snapshot that was made while ledger runs", "an amount is missing that ledger never moves")
    return compare(look.answer("missing"), total - there, "missing=..., how much is missing in the snapshot half")


def ledger(look: Look) -> Verdict:
    """The student's program works on new accounts, over the slow device, while snapshots are made of it.

    These are btrfs's own, a fraction of a second each under emulation: the promise is the same for one program.
    """
    a, b = 30000 + secrets.randbelow(9000), 10000 + secrets.randbelow(9000)
    folder = f"look-{secrets.token_hex(4)}"
    made = look.run("host", f'cd "$part" && mkdir {folder} && echo {a} > {folder}/a && echo {b} > {folder}/b')
    if made.code != 0:
        raise CouldNotLookError(f"no directory in the export: {made.said}", "is the store full?")
    began = look.run(
        "guest",
        f"""mine=
        if ! grep -q ' /mnt/keep-slow ' /proc/mounts; then
          mkdir -p /mnt/keep-slow && {MOUNT} keep-slow /mnt/keep-slow || exit 3
          mine=mine
        fi
        cd "$LAB_WORK" || exit 3
        setsid sh ./ledger /mnt/keep-slow/{folder} > /dev/null 2>&1 < /dev/null &
        echo $! $mine""",
    )
    try:
        if began.code == 3:
            raise CouldNotLookError(f"the device keep-slow cannot be mounted: {began.said}", "lab reset snapshots")
        return _seen(look, folder, a, b)
    finally:
        pid, _, mine = began.out.strip().partition(" ")
        end = f"kill -9 -{pid} {pid} 2>/dev/null\n" if pid.isdigit() else ""
        look.run("guest", end + ("umount -l /mnt/keep-slow; rmdir /mnt/keep-slow" if mine else "true"))
        look.run(
            "host",
            f"""rm -rf "${{part:?}}/{folder}"
            set -- "$part".look-*
            [ ! -d "$1" ] || btrfs -q subvolume delete "$@" > /dev/null""",
        )


def _seen(look: Look, folder: str, a: int, b: int) -> Verdict:
    # The first transaction takes some 3 s: of 20 requests a second, a shell's read takes one for each character.
    said = look.out(
        "host",
        f"""cd "$LAB_WORK" && sleep 2
        for n in $(seq {LOOKS}); do btrfs -q subvolume snapshot -r "$part" "$part".look-$n > /dev/null; sleep 0.31; done
        for n in $(seq {LOOKS}); do
          timeout 5 sh ./balance "$part".look-$n/{folder} 2>&1 < /dev/null | tail -n 1
        done""",
    )
    seen = list(_balances(said))
    numbers = [one for one in seen if one is not None]
    if len(numbers) < LOOKS:
        return failed("two numbers, A B, of each snapshot: sh balance DIRECTORY", said.strip()[-80:] or "nothing")
    wrong = [one for one in numbers if sum(one) != a + b]
    if wrong:
        return failed(f"all the money in each of {LOOKS} snapshots", f"not so in {len(wrong)} of them")
    moved = {a - one[0] for one in numbers}
    if len(moved) < 2 or any(amount % int(look.values["step"]) for amount in moved):
        return failed("accounts that change by $step at a time while the program runs", "no such change")
    return passed()


def _balances(text: str) -> Iterator[tuple[int, int] | None]:
    for line in text.splitlines():
        words = line.split()
        good = len(words) == 2 and all(word.lstrip("-").isdigit() for word in words)
        yield (int(words[0]), int(words[1])) if good else None
