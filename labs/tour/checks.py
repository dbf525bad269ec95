"""Checks of the lab tour."""

from __future__ import annotations

import json
import secrets
from typing import Any

from labkit.errors import CouldNotLookError
from labkit.look import Look, Verdict, compare, failed, partial, parts, passed
from labkit.transport import quote

FRONT = "/local/domain/{domid}/device/9pfs/{devid}"
BACK = "/local/domain/0/backend/xen9p/{domid}/{devid}"


def tour(look: Look) -> dict[str, Any]:
    """The device tour as xen9pd knows it."""
    found = look.device("guest", "tour")
    if found is None or found["state"] != "connected":
        raise CouldNotLookError("the device tour is not connected", "lab reset tour brings it back")
    return found


def ring(look: Look) -> Verdict:
    """Domain, device, and the first ring's grant and event channel."""
    device = tour(look)
    front = FRONT.format(**device)
    ref, port = look.nodes([f"{front}/ring-ref0", f"{front}/event-channel-0"])
    if ref is None or port is None:
        raise CouldNotLookError("the device tour has no rings", "lab reset tour brings it back")
    return parts(
        {
            "domid": compare(look.answer("domid"), device["domid"], "domain id of your guest"),
            "devid": compare(look.answer("device"), device["devid"], "device=..., its number"),
            "ring_ref": compare(look.answer("ring_ref"), ref, "grant reference of the first ring"),
            "event_channel": compare(look.answer("event_channel"), port, "event channel of the first ring"),
        }
    )


def worker(look: Look) -> Verdict:
    """The process and the order of its rings."""
    device = tour(look)
    way = look.path('"$guest:tour:/long"')
    rings: list[dict[str, Any]] = next(
        (step["to"]["rings"] for step in way["steps"] if step["to"]["space"] == "ring"), []
    )
    if not rings or rings[0].get("order") is None:
        raise CouldNotLookError("the order of the rings cannot be seen", "is the worker of this version?")
    return parts(
        {
            "worker": compare(look.answer("worker"), device["pid"], "process id of the worker"),
            "order": compare(look.answer("order"), rings[0]["order"], "order of the ring: 2^order pages of data"),
        }
    )


def byhand(look: Look) -> Verdict:
    """The device is there, leads to the right directory, works, and no rule has made it."""
    domid, devid, tag = look.domid("guest"), look.values["devid"], look.values["tag"]
    front, back = FRONT.format(domid=domid, devid=devid), BACK.format(domid=domid, devid=devid)
    names = [
        f"{front}/tag",
        f"{front}/backend",
        f"{front}/state",
        f"{back}/frontend",
        f"{back}/state",
        f"{back}/host/path",
    ]
    front_tag, backend, front_state, frontend, back_state, path = look.nodes(names)
    if backend != back or frontend != front:
        return failed(
            "two directories with your number that name each other", f"backend={backend}, frontend={frontend}"
        )
    wanted = look.out("host", 'echo "$part/byhand"').strip()
    if front_tag != tag or path != wanted:
        return partial(0.2, "your tag, and host/path to byhand in your part", f"tag={front_tag}, host/path={path}")
    if (front_state, back_state) != ("4", "4"):
        return partial(0.4, "both states are 4", f"frontend {front_state}, backend {back_state}")
    mounted = look.many(
        "guest", {"mount": 'awk -v tag="$tag" \'$1 == tag && $3 == "9p" { print $2 }\' /proc/mounts | head -n 1'}
    )["mount"].out.strip()
    # Through the mount: whatever a directory on the host says, the guest has to see it.
    name, nonce = f"proof-{secrets.token_hex(4)}", secrets.token_hex(8)
    look.run("host", f'echo {nonce} > "$part/byhand/{name}"')
    seen = look.out("guest", f"cd {quote(mounted)} && cat {name}; cat word").split() if mounted else []
    look.run("host", f'rm -f "$part/byhand/{name}"')
    if seen != [nonce, str(look.values["word"])]:
        works = "a mount that works" if nonce in seen else f"mount {mounted or 'none'}"
        what = f"{works}, word {' '.join(seen[1:]) or 'none'}"
        return partial(0.7 if nonce in seen else 0.4, "mounted in the guest, and your word in a file word", what)
    return passed()


def asked(look: Look) -> Verdict:
    """The name, without .lock."""
    return compare(look.answer("asked"), look.values["asked"], "asked=..., the file whose .lock was asked for")


def trace(look: Look) -> Verdict:
    """The student's own trace has the conversation, and its file's qid is named."""
    raw = look.read("host", "$LAB_WORK/talk.json", limit=1 << 20)
    if raw is None:
        return failed("a trace in talk.json, in your folder on the host", "no such file")
    try:
        lines = [json.loads(line) for line in raw.decode().splitlines()]
        walks = [x for x in lines if x["request"]["type"] == "Twalk" and x["errno"] == "ENOENT"]
        in_vain = {name for x in walks for name in x["request"].get("wnames", [])}
        were_read = {x["path"].rpartition("/")[2] for x in lines if x["request"]["type"] == "Tread"}
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, or not what a trace writes
        return failed("talk.json as xen9p trace --json writes it: a JSON object a line", "something else")
    name = str(look.values["asked"])
    seen, read = f"{name}.lock" in in_vain, name in were_read
    inode = look.out("host", f'stat -c %i "$part/tour/box/{name}"').strip()
    return parts(
        {
            "talk.json": passed()
            if seen and read
            else failed("a whole run of talk", f"{len(lines)} requests of others"),
            "qid_path": compare(look.answer("qid_path"), inode, "qid path of the file that said speak"),
        }
    )
