"""Checks of the sample lab."""

from __future__ import annotations

from labkit.look import Look, Verdict, compare, failed, partial, passed


def secret(look: Look) -> Verdict:
    """The answer is the student's own."""
    return compare(look.answer("secret"), look.values["secret"], "secret=..., as your file has it")


def copied(look: Look) -> Verdict:
    """What is in the guest is what is on the host; half of it is half of the points."""
    there = look.read("host", "$part/own/long")
    copy = look.read("guest", "$LAB_WORK/copy")
    if copy is None or there is None:
        return failed("the file long in the guest's folder, as copy", "no such file")
    if copy == there:
        return passed()
    return (
        partial(0.5, f"all of the {len(there)} bytes", f"{len(copy)} bytes")
        if there.startswith(copy)
        else failed("the same bytes", "other bytes")
    )


def touched(look: Look) -> Verdict:
    """The file is there at this moment."""
    done = look.many("host", {"there": 'test -e "$part/own/touched"', "date": "date"})
    return passed() if done["there"].code == 0 else failed("a file touched in your export", "none")
