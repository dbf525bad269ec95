"""The devices of a lab's guests, on the host, as xen9pd has them.

    devices.py SOCKET detach PART GUEST...   takes away all that lead into a directory, whoever made them
    devices.py SOCKET attach                 gives what standard input says, GUEST EXPORT TAG FRONTEND a line
    devices.py SOCKET list PART GUEST...     prints a line for each that leads there

Over the control socket, all at once, and not by the xen9p command: each start of that takes a second under emulation.
What is spoken there: xen9p/control.py.
"""

import json
import socket
import sys
import time
from contextlib import ExitStack
from typing import Any, NoReturn

CONTROL, VERB, *WORDS = sys.argv[1:]
PAUSE = 0.25  # seconds between two looks
PATIENCE = 30.0  # seconds, for each of two steps
SILENT = "xen9pd does not answer: systemctl status xen9pd"


def fail(why: str) -> NoReturn:
    print(f"error: {why}", file=sys.stderr)
    raise SystemExit(3)


def ask(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to requests that are under way at the same time."""
    with ExitStack() as stack:
        lines = []
        for request in requests:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(30)
            sock.connect(CONTROL)
            sock.sendall(json.dumps(request).encode() + b"\n")
            lines.append(stack.enter_context(sock.makefile("rb")))
        return [json.loads(line.readline()) for line in lines]


def devices(guests: list[str]) -> list[dict[str, Any]]:
    """Those of some guests, in the order of their names and tags."""
    there = [device for device in ask([{"do": "status"}])[0]["devices"] if device["guest"] in guests]
    return sorted(there, key=lambda device: (device["guest"], device["tag"]))


def into(part: str, guests: list[str]) -> list[dict[str, Any]]:
    """Those that lead into a directory: other labs have devices of the same guests."""
    return [device for device in devices(guests) if (device["path"] + "/").startswith(part + "/")]


def detach(part: str, guests: list[str]) -> None:
    found = into(part, guests)
    answers = ask([{"do": "detach", "guest": device["guest"], "tag": device["tag"]} for device in found])
    for device, answer in zip(found, answers, strict=True):
        # Somebody else may have taken it away meanwhile, or the guest has ended.
        if not answer["ok"] and not any(gone in answer["error"] for gone in ("has no tag", "is running")):
            fail(f"{device['guest']} keeps {device['tag']}: {answer['error']}")


def refused(wanted: list[list[str]]) -> list[tuple[list[str], str]]:
    """Asks for devices; those that are not given, each with the reason."""
    requests = [
        {"do": "attach", "guest": guest, "export": export, "tag": tag, "readonly": False}
        for guest, export, tag, _ in wanted
    ]
    try:
        answers = ask(requests)
    except (OSError, ValueError):  # it is being started anew, or talks to too many at once
        return [(each, SILENT) for each in wanted]
    # What a rule attaches by itself may be there already.
    return [
        (each, answer["error"])
        for each, answer in zip(wanted, answers, strict=True)
        if not answer["ok"] and "has tag" not in answer["error"]
    ]


def attach(wanted: list[list[str]]) -> None:
    """Returns when all are there, and a kernel's connected. Those for user space are when somebody uses them."""
    end = time.monotonic() + PATIENCE
    # The service takes a reload up a moment later.
    while left := refused(wanted):
        (guest, export, *_), error = left[0]
        if "is running" in error:
            fail(f"{guest} does not run: xl create /etc/xen/{guest}.cfg")
        if time.monotonic() > end:
            fail(error if error == SILENT else f"{guest} does not get {export} within {PATIENCE:g} s: {error}")
        time.sleep(PAUSE)
    kernels = {(guest, tag) for guest, _, tag, frontend in wanted if frontend == "kernel"}
    names = sorted({guest for guest, _ in kernels})
    end = time.monotonic() + PATIENCE
    while missing := kernels - {(d["guest"], d["tag"]) for d in devices(names) if d["state"] == "connected"}:
        if time.monotonic() > end:
            those = ", ".join(f"{guest} {tag}" for guest, tag in sorted(missing))
            fail(f"a guest does not take its device ({those}): see xen9p status, and dmesg in the guest")
        time.sleep(PAUSE)


def main() -> None:
    match VERB:
        case "detach":
            detach(WORDS[0], WORDS[1:])
        case "attach":
            attach([line.split() for line in sys.stdin if line.strip()])
        case "list":
            for d in into(WORDS[0], WORDS[1:]):
                print("device", d["guest"], d["tag"], d["export"], d["access"], d["path"])


try:
    main()
except (OSError, ValueError):
    fail(SILENT)
