"""Checks of the lab server."""

from __future__ import annotations

import base64
import json
import secrets
from typing import Final

from labkit.errors import CouldNotLookError
from labkit.look import Look, Verdict, compare, failed, parts, passed

HANDED_OUT: Final = ("probe/probe.py", "start/host/rings.py", "start/host/serve.py")
PYTHON: Final = "${XEN9P_PYTHON:-/opt/xen9p/bin/python3}"


def probe(look: Look, name: str) -> dict[str, Verdict]:
    """What a real client finds of the student's server.py, part by part; all else of it is as it was handed out."""
    code = look.read("host", "$LAB_WORK/server.py")
    if code is None:
        return {"server.py": failed("your server in server.py, in your folder on the host", "no such file")}
    files = {"server.py": code}
    files |= {path.rpartition("/")[2]: (look.lab.folder / path).read_bytes() for path in HANDED_OUT}
    unpack = [f"base64 -d <<<{base64.b64encode(text).decode()} > {file}" for file, text in files.items()]
    script = ["d=$(mktemp -d)", "trap 'rm -rf \"$d\"' EXIT", 'cd "$d" || exit', *unpack, f'"{PYTHON}" probe.py {name}']
    done = look.run("host", "\n".join(script))
    try:
        found = json.loads(done.out)
    except ValueError:
        raise CouldNotLookError(f"the probe does not run: {done.said}", "is xen9p in /opt/xen9p?") from None
    return {part: failed(*said) if said else passed() for part, said in found.items()}


def walk(look: Look) -> Verdict:
    """Twalk, in each of its forms."""
    return parts(probe(look, "walk"))


def data(look: Look) -> Verdict:
    """Tlopen, Tread, Twrite."""
    return parts(probe(look, "data"))


def entries(look: Look) -> Verdict:
    """Treaddir of a directory that needs several messages."""
    return parts(probe(look, "entries"))


def clunk(look: Look) -> Verdict:
    """Tclunk, and whether descriptors come back."""
    return parts(probe(look, "clunk"))


def safe(look: Look) -> Verdict:
    """All of it or nothing: one way out is as good as five."""
    verdict = parts(probe(look, "safe"))
    return passed() if verdict.part >= 1 else failed(verdict.expected, verdict.found)


def mounted(look: Look) -> Verdict:
    """Whether the guest has the student's device, served by serve.py, mounted at /mnt/own."""
    domid, devid, tag = look.domid("guest"), look.values["devid"], look.values["tag"]
    front = f"/local/domain/{domid}/device/9pfs/{devid}"
    backend, its_tag, state = look.nodes([f"{front}/backend", f"{front}/tag", f"{front}/state"])
    if backend != f"/local/domain/0/backend/xen9p_lab/{domid}/{devid}" or its_tag != tag:
        return failed(
            "a device of your guest with your number and tag, by serve.py", f"backend={backend}, tag={its_tag}"
        )
    mount = look.out("guest", 'awk -v tag="$tag" \'$1 == tag && $3 == "9p" { print $2 }\' /proc/mounts').split()
    if state != "4" or "/mnt/own" not in mount:
        return failed("connected, and mounted at /mnt/own", f"state {state}, mounted {', '.join(mount) or 'nowhere'}")
    return passed()


def bounded(command: str) -> str:
    """Shell text that gives up on a command after 8 s: what waits for a 9P server that is silent cannot be ended."""
    return (
        f"out=$(mktemp); (bash -c '{command}; echo :over' > $out 2>&1 < /dev/null &)\n"
        "for try in $(seq 40); do ! grep -q :over $out || break; sleep 0.2; done; cat $out; rm $out"
    )


def guest(look: Look) -> Verdict:
    """The guest reads, through the student's server, what was written a moment ago; and a file of many messages."""
    there = mounted(look)
    if there.part < 1:
        return there
    name, nonce = f"proof-{secrets.token_hex(4)}", secrets.token_hex(16)
    wanted = look.out(
        "host", f'cd "$part/own" && echo {nonce} > {name} && sha256sum < long && ls | sort | tr "\\n" " "'
    )
    seen = look.out("guest", bounded(f'cd /mnt/own && cat {name} && sha256sum < long && ls | sort | tr "\\n" " "'))
    look.run("host", f'rm "$part/own/{name}"')
    expected, found = [nonce, *wanted.split()], seen.split()
    if found[-1:] != [":over"]:
        return failed("an answer to each request of the guest", "it waits: the server hangs, or has ended")
    names = {"a file": (0, 1), "a long file": (1, 3), "the directory": (3, None)}
    return parts(
        {
            part: passed()
            if found[:-1][begin:end] == expected[begin:end]
            else failed(f"{part}, as the host has it", " ".join(found[:-1][begin:end]) or "nothing")
            for part, (begin, end) in names.items()
        }
    )


def requests(look: Look) -> Verdict:
    """The answer is how many requests the same cat takes now."""
    before, said, after = (
        look.out(place, script)
        for place, script in (
            ("host", 'wc -l < "$LAB_WORK/talk.log"'),
            ("guest", bounded('cat "/mnt/own/$deep/leaf"')),
            ("host", 'wc -l < "$LAB_WORK/talk.log"'),
        )
    )
    if ":over" not in said or not before.strip().isdigit():
        return failed("serve.py with --talk talk.log, and a guest that can read leaf", said.strip() or "no talk.log")
    took = int(after) - int(before)
    if took <= 0:
        return failed("requests in talk.log", "none: was serve.py started with --talk talk.log, in your folder?")
    # The first one after a mount asks for one thing more.
    answers = {str(count): count for count in (took, took + 1)}
    answer = look.answer("requests")
    return compare(answer, answers.get(answer or "", took), "requests=..., how many requests one cat of leaf takes")
