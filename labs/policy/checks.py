"""Checks of the lab policy."""

from __future__ import annotations

import base64
import json
import secrets
from typing import Any, Final

from labkit.look import Look, Verdict, compare, failed, parts, passed
from labkit.transport import quote

EXPORTS: Final = ("notice", "site", "drop", "ledger", "vault")
HOST_PYTHON: Final = "${XEN9P_PYTHON:-/opt/xen9p/bin/python3}"
GUEST_PYTHON: Final = "${XEN9P_PYTHON:-python3}"
FLOOD_SECONDS: Final = 2
RESOLVE: Final = """
import json, sys
from pathlib import Path
from xen9p import policy
found = policy.load(Path(sys.argv[1]), check_paths=False)
print(json.dumps({
    name: [
        {"path": str(g.path), "tag": g.tag, "ro": g.readonly, "frontend": g.frontend, "limits": dict(g.terms.limits)}
        for g in found.resolve(name, uuid)
    ]
    for name, uuid in (each.split("=") for each in sys.argv[2:])
}))
"""


def gets(look: Look, *names: str) -> dict[str, list[dict[str, Any]]]:
    """What the host's policy gives to guests of these names, as far as it is the student's: name -> its grants."""
    known = {g["name"]: g["uuid"] for g in look.status()["guests"]}
    asked = " ".join(quote(f"{name}={known.get(name, '')}") for name in names)
    done = look.run(
        "host", f'"{HOST_PYTHON}" -c {quote(RESOLVE)} "${{ROOT:-}}/etc/xen9p/policy.toml" {asked}; echo "$part"'
    )
    text, _, part = done.out.rstrip("\n").rpartition("\n")
    found: dict[str, list[dict[str, Any]]] = json.loads(text)
    return {name: [g for g in grants if f"{g['path']}/".startswith(f"{part}/")] for name, grants in found.items()}


def device(look: Look, place: str, tag: str, access: str, folder: str) -> Verdict:
    """Whether the guest has a device of the student's with that tag, with that access, to that folder of the part."""
    found = look.device(place, tag)
    if found is None or not found["path"].endswith(f"/{look.lab.name}/{folder}"):
        return failed(f"{look.system.name(place)} has a device with tag {tag} that leads to {folder}", "none")
    if found["access"] != access:
        return failed(f"device {tag} of {look.system.name(place)} is {access}", found["access"])
    return passed()


def reader(look: Look) -> Verdict:
    """g1 sees what is written on the host, and the server lets it write nothing."""
    name, nonce = f"proof-{secrets.token_hex(4)}", secrets.token_hex(12)
    look.run("host", f'echo {nonce} > "$part/site/{name}"')
    done = look.many(
        "guest", {"read": f"cat ${{ROOT:-}}/mnt/site/{name}", "write": f"echo x > ${{ROOT:-}}/mnt/site/{name}x"}
    )
    look.run("host", f'rm -f "$part/site/{name}" "$part/site/{name}x"')
    if done["read"].out.strip() != nonce:
        return failed("your first guest reads site, mounted at /mnt/site", done["read"].out.strip() or "nothing")
    there = device(look, "guest", "site", "ro", "site")
    if there.part == 1 and done["write"].code == 0:
        there = failed("it cannot write there", "it can")
    return parts({"reads": passed(), "read-only": there})


def dropbox(look: Look) -> Verdict:
    """What root and a user of each guest make belongs to one user of the host; special files are refused."""
    name = f"proof-{secrets.token_hex(4)}"
    drop = "${ROOT:-}/mnt/drop"
    user = f"setpriv --reuid 1234 --regid 1234 --clear-groups sh -c 'echo user > {drop}/{name}-user-'"
    wanted = f"{look.values['uid']}:{look.values['uid']}"
    found: dict[str, Verdict] = {}
    for place in ("guest", "guest2"):
        guest = look.system.name(place)
        made = f"echo root > {drop}/{name}-root-{guest}; {user}{guest}; mkfifo {drop}/{name}-fifo && echo special"
        said = look.run(place, f"({made}) 2>&1")
        owners = look.out("host", f'cd "$part/drop" && stat -c %u:%g {name}-root-{guest} {name}-user-{guest}').split()
        if owners != [wanted] * 2:
            wish = f"files of root and of uid 1234, in /mnt/drop, are uid and gid {look.values['uid']} on the host"
            found[guest] = failed(wish, " ".join(owners) or said.out.strip() or "no files")
        elif "special" in said.out:
            found[guest] = failed("no special files", "a FIFO can be made")
        else:
            found[guest] = passed()
    look.run("host", f'rm -f "$part/drop/{name}"*')
    return parts(found)


def ledger(look: Look) -> Verdict:
    """g2's users are a range of the host's; it is g2's alone."""
    name, base = f"proof-{secrets.token_hex(4)}", int(look.values["base"])
    folder = "${ROOT:-}/mnt/ledger"
    user = f"setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'echo x > {folder}/{name}-u'"
    said = look.run("guest2", f"(echo x > {folder}/{name}-r; {user}; cat {folder}/book) 2>&1").out
    owners = look.out("host", f'cd "$part/ledger" && stat -c %u {name}-r {name}-u; rm -f {name}-*').split()
    if owners != [str(base), str(base + 1000)]:
        wish = f"in /mnt/ledger, root of your second guest is {base} on the host, and uid 1000 is {base + 1000}"
        return failed(wish, " ".join(owners) or said.strip() or "no files")
    there = device(look, "guest2", "ledger", "rw", "ledger")
    others = look.device("guest", "ledger")
    return parts({"range": there, "alone": passed() if others is None else failed("not your first guest's", "it is")})


def audit(look: Look, mode: str) -> dict[str, Any] | Verdict:
    """What the probe in the first guest finds, with the student's key; a verdict if it finds nothing."""
    there = device(look, "guest", "audit", "ro", "ledger")
    if there.part < 1:
        return there
    files = {"auditor.py": look.lab.folder / "probe/auditor.py", "attack.py": look.lab.folder / "start/guest/attack.py"}
    unpack = [f"base64 -d <<<{base64.b64encode(p.read_bytes()).decode()} > {name}" for name, p in files.items()]
    script = [
        "d=$(mktemp -d)", "trap 'rm -rf \"$d\"' EXIT", 'cd "$d" || exit', *unpack,
        f'"{GUEST_PYTHON}" auditor.py "$LAB_WORK/audit.keys" {mode}',
    ]  # fmt: skip
    done = look.run("guest", "\n".join(script))
    if done.code != 0:
        return failed("with audit.keys, in your folder in your first guest, the tag audit opens", done.said)
    found: dict[str, Any] = json.loads(done.out)
    return found


def auditor(look: Look) -> Verdict:
    """Who has the key reads, and that is all; at most so many requests a second."""
    nonce = secrets.token_hex(12)
    look.run("host", f'cd "$part/ledger" && echo {nonce} > proof && chmod 644 proof')
    found = audit(look, "access")
    look.run("host", 'rm -f "$part/ledger/proof" "$part/ledger/made"')
    if isinstance(found, Verdict):
        return found
    guest = look.system.name("guest")
    given = sum(g["limits"].get("ops_per_second", 0) for g in gets(look, guest)[guest] if g["tag"] == "audit")
    rate = look.values["rate"]
    locked = (found["none"], found["other"]) == ("ENOKEY", "refused")
    shut = bool(found["make"] and found["write"])
    return parts(
        {
            "key": passed() if locked else failed("no way in without the key", "one without, or with another one"),
            "reads": passed() if found["book"].strip() == nonce else failed("with it, what is in ledger", "other data"),
            "read-only": passed() if shut else failed("and no writing", "it can write"),
            "rate": passed()
            if given == rate
            else failed(f"{rate} requests a second at the most", given or "any number"),
        }
    )


def nobody(look: Look) -> Verdict:
    """The grants of the student's two guests are the ones that are wanted, and others have none."""
    first, second = look.system.name("guest"), look.system.name("guest2")
    # Also those that a pattern for both guests would fit, and that are not there today.
    likely = (f"{first}0", f"{second}x", f"x{first}", f"{first[:-1]}_", f"{first[:-1]}8")
    strangers = ("stranger", first.upper(), *(name for name in likely if name not in (first, second)))
    found = gets(look, first, second, *strangers)
    wanted = {first: {"site", "drop", "audit"}, second: {"drop", "ledger"}}
    for name, grants in found.items():
        tags = {g["tag"] for g in grants if not g["path"].endswith("/notice")}
        if more := sorted(tags - wanted.get(name, set())):
            return failed(
                "nothing of yours for anybody who should not have it", f"a guest {name} gets {', '.join(more)}"
            )
        if name in strangers and grants:
            return failed("nothing of yours for other guests", f"a guest {name} gets {grants[0]['tag']}")
    return passed()


def attacks(look: Look) -> Verdict:
    """The answers are what the same attacks get now; and a flood gets no more answers than the limit lets through."""
    look.run("host", 'ln -sf ../vault/secret "$part/ledger/proof-link"')
    found = audit(look, "attack")
    look.run("host", 'rm -f "$part/ledger/proof-link"')
    if isinstance(found, Verdict):
        return found
    rate = int(look.values["rate"])
    # Half a second's worth may be saved up, and time is counted at both ends.
    most = rate * (FLOOD_SECONDS + 1)
    slowed = (
        passed() if found["flood"] <= most else failed(f"a flood gets at most {rate} answers a second", "it gets more")
    )
    asked = {
        "slash": "slash=..., the errno of a name with a slash in it",
        "forged": "forged=..., the errno of attaching to vault",
        "link": "link=..., the errno of opening a symbolic link",
    }
    return parts(
        {name: compare(look.answer(name), found[name], what) for name, what in asked.items()} | {"flood": slowed}
    )


def log(look: Look) -> Verdict:
    """The host's journal has the message that was too long, since the lab was begun or reset."""
    since = 'journalctl GUEST="$guest" TAG=audit -p warning --since "@$(stat -c %W "$LAB_WORK")" -o cat --no-pager'
    script = f'{since} | grep -cE "size $bad([^0-9]|$)"'
    count = look.out("host", script).strip()
    wish = "a warning about device audit of your first guest, with the length that a message claimed: yours, $bad"
    return passed() if count.isdigit() and int(count) > 0 else failed(wish, "none since you have begun")
