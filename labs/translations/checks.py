"""Checks of the lab translations."""

from __future__ import annotations

import secrets
from typing import Any

from labkit.errors import CouldNotLookError
from labkit.look import Look, Verdict, compare, failed, partial, parts, passed

INPUT = "input/of/this/workload"
FULL, HALF = 250, 800
"""Requests that the workload may take for all of the points, and for half of them."""


def at(way: dict[str, Any], space: str, key: str) -> Any:
    """A number of the first point of a way that is in a space."""
    for step in way["steps"]:
        if step["to"]["space"] == space:
            return step["to"].get(key)
    return None


def files(look: Look) -> Verdict:
    """How many translations, and where the byte is on the store's device."""
    way = look.path('"$guest:narrow:/data" --offset "$offset"')
    if way["device"] is None:
        raise CouldNotLookError(f"the way over 9P ends early: {way['end']}", "sync, in guest and host")
    return parts(
        {
            "nine": compare(look.answer("nine"), way["translations"], "nine=..., the number of translations over 9P"),
            "nine_byte": compare(
                look.answer("nine_byte"), way["device"]["byte"], "nine_byte=..., the byte of the device"
            ),
        }
    )


def blocks(look: Look) -> Verdict:
    """A twin of the file on a disk, how many translations there, and its sector in the guest."""
    domid = look.domid("guest")
    there = look.many(
        "host",
        {
            # By name: a directory may be there without a device in it.
            "disk": f"vbd=/local/domain/0/backend/vbd/{domid}\n"
            "for each in $(xenstore-list $vbd 2>/dev/null); do xenstore-read $vbd/$each/dev; done | grep -qx xvdb",
            "sum": 'sha256sum < "$part/own/data"',
        },
    )
    if there["disk"].code != 0:
        return failed("a disk of your guest's, xvdb, served by blkback", "no block device")
    way = look.path('"$guest:/data" --disk xvdb --offset "$offset"')
    seen = look.out("guest", "sha256sum < /mnt/twin/data 2>/dev/null")
    twin = ("the same file data, in the guest at /mnt/twin", "another one, or none")
    return parts(
        {
            "twin": passed() if seen.strip() == there["sum"].out.strip() else failed(*twin),
            "disk": compare(look.answer("disk"), way["translations"], "disk=..., how many translations over blocks"),
            "sector": compare(
                look.answer("sector"), at(way, "virtual disk sector", "sector"), "sector=..., of the guest's disk"
            ),
        }
    )


def predict(look: Look) -> Verdict:
    """The answer is how many Tread the same dd takes now."""
    options = look.out("guest", "awk '$2 == \"/mnt/narrow\" { print $4 }' /proc/mounts").strip().split(",")
    if "msize=8192" not in options or any(word in o for o in options for word in ("loose", "mmap", "fscache")):
        return failed(
            "tag narrow mounted at /mnt/narrow with msize=8192 and cache=none", ",".join(options) or "no mount"
        )
    before = look.counters("guest", "narrow")
    done = look.run("guest", 'dd if=/mnt/narrow/data of=/dev/null bs="$block" status=none')
    if done.code != 0:
        raise CouldNotLookError(f"/mnt/narrow/data cannot be read: {done.said}")
    after = look.counters("guest", "narrow")
    took = after.get("Tread", 0) - before.get("Tread", 0)
    if took < 0:
        raise CouldNotLookError("the counters went back", "the device was attached anew meanwhile: check again")
    if took == 0:
        return failed("reads that reach the host", "none: is it mounted with cache=none?")
    return compare(look.answer("reads"), int(took), "reads=..., how many Tread that dd takes")


def fewer(look: Look) -> Verdict:
    """The student's workload, on files that have just changed: the right result, with few requests."""
    nonce = secrets.token_hex(16)
    folder = f'"$part/own/{INPUT}"'
    wanted = look.out("host", f"cd {folder} && echo {nonce} > nonce && cat * | sha256sum").strip()
    if not wanted:
        raise CouldNotLookError("the files of the workload are gone", "lab reset translations brings them back")
    # All of them: another device may lead to the same files.
    before = look.all_counters("guest")
    done = look.run("guest", 'cd "$LAB_WORK" && timeout 40 sh ./workload /mnt/work 2>&1 </dev/null')
    after = look.all_counters("guest")
    said = done.out.strip()
    if said.split()[:1] != wanted.split()[:1]:
        return failed("the checksum of what the files hold now", said[-100:] or f"nothing (exit code {done.code})")
    took = int(after["requests"] - before["requests"])
    if took < 0:
        raise CouldNotLookError("the counters went back", "a device was attached anew meanwhile: check again")
    if took < 10:
        return failed("a workload that reads over the device work", f"{took} requests")
    if took <= FULL:
        return passed()
    wish = f"the right checksum with {FULL} requests at the most"
    return partial(0.5, wish, f"{took} requests") if took <= HALF else failed(wish, f"{took} requests")
