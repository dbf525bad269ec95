"""What the policy gives to a guest, and why: the answer of `xen9p policy explain`."""

from __future__ import annotations

import dataclasses
from typing import Any

from xen9p import policy, quota, snapshot
from xen9p.policy import LIMITS, Policy, Rule, Terms
from xen9p.sizes import size_text

_WORDS = {
    "own": "each user's own alone, called as the user is",
    "host": "those that the host's passwd and group say",
    "table": "those that the rule lists, for others their own alone",
}


def explain(rules: Policy, guest: str, uuid: str) -> dict[str, Any]:
    """All rules, in their order and each with its outcome, for a guest of that name and uuid ("": none is known)."""
    winners = {rule.number: winner for rule, winner in rules.matching(guest, uuid)}
    found: dict[str, Any] = {"guest": guest, "uuid": uuid, "policy": rules.source, "gets": [], "lost": [], "others": []}
    for rule in rules.rules:
        winner = winners.get(rule.number)
        told = {"rule": rule.number, "for": rule.subject, "tag": rule.tag, "export": rule.export}
        if winner is None:
            found["others"].append(told | {"why": _why_not(rule, guest, uuid)})
        elif winner is not rule:
            found["lost"].append(told | {"why": f"rule {winner.number} gives this tag and comes first"})
        else:
            found["gets"].append(told | _given(rules, rule))
    return found


def _why_not(rule: Rule, guest: str, uuid: str) -> str:
    if rule.guest is not None:
        return f'"{guest}" is not "{rule.guest}"' + (" (case matters)" if _only_case(rule, guest) else "")
    return f"the guest's uuid is {uuid}" if uuid else "no uuid is given (--uuid)"


def _only_case(rule: Rule, guest: str) -> bool:
    return rule.guest is not None and rule.guest.lower() == guest.lower()


def _given(rules: Policy, rule: Rule) -> dict[str, Any]:
    grant = rules.grant(rule)
    most = rules.quotas().get(grant.path)
    problems = policy.path_problems(policy.Export(grant.export, grant.path))
    problems += policy.key_problems(rule) + policy.group_problems(rule)
    if not problems and rule.snapshots:
        try:
            snapshot.check_export(rule.export, grant.path)
        except snapshot.SnapshotError as error:
            problems = [str(error)]
    if not problems and most is not None:
        problems = quota.problems({grant.path: most})
    return {
        "path": str(grant.path),
        "access": "ro" if grant.readonly else "rw",
        "attach": "auto" if grant.auto else "manual",
        "frontend": grant.frontend,
        "keys": str(grant.keys) if grant.keys else None,
        **_terms(grant.terms),
        "leases": rule.leases,
        "quota": None if most is None else {"bytes": most.bytes, "files": most.files},
        "snapshots": rule.snapshots or None,
        "cache": dataclasses.asdict(rule.cache) | {"options": dict(rule.cache.options)},
        "problems": problems,
    }


def _terms(terms: Terms) -> dict[str, Any]:
    theirs = {ours: name for name, ours in LIMITS.items()}
    return {
        "checks": "server" if terms.checks else "guest",
        "identity": str(terms.identity),
        "groups": terms.groups if terms.checks else None,
        "special": terms.special,
        "limits": {theirs[ours]: value for ours, value in terms.limits if ours in theirs},
        "streams": dict(terms.limits).get("stream_bytes"),
    }


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    who = f"guest {found['guest']}" + (f", uuid {found['uuid']}" if found["uuid"] else "")
    lines = [f"{who}, by {found['policy']}"]
    for one in found["gets"]:
        lines += ["", f"tag {one['tag']}: rule {one['rule']} ({one['for']})", *(f"  {line}" for line in _lines(one))]
    if not found["gets"]:
        lines += ["", "gets nothing: no rule is about it"]
    if found["lost"] or found["others"]:
        lines.append("")
    lines += [f"rule {o['rule']} ({o['for']}) does not give its tag {o['tag']}: {o['why']}" for o in found["lost"]]
    lines += [f"rule {o['rule']} ({o['for']}) is not about it: {o['why']}" for o in found["others"]]
    return "\n".join(lines)


def _lines(one: dict[str, Any]) -> list[str]:
    when = "as soon as it runs" if one["attach"] == "auto" else "by xen9p attach only"
    checks = "the host's kernel" if one["checks"] == "server" else "the guest's kernel; its root may do everything"
    most = one["quota"]
    limits = [f"{name} {_amount(name, value)}" for name, value in one["limits"].items()]
    rows = [
        ("export", f"{one['export']}, {one['path']}, {one['access']}"),
        ("attached", f"{when}, for {'its kernel' if one['frontend'] == 'kernel' else 'its user space'}"),
        ("keys", f"one of {one['keys']} has to be proved" if one["keys"] else ""),
        ("checks", checks),
        ("identity", one["identity"]),
        ("groups", _WORDS.get(str(one["groups"]), "")),
        ("special", "device nodes, FIFOs and sockets " + ("may be made" if one["special"] else "are refused")),
        ("limits", ", ".join(limits) or "the worker's own"),
        ("quota", "none" if most is None else f"{quota.Quota(**most)}, for all guests of the directory together"),
        ("leases", f"for {one['leases']:g} s without a word of the client" if one["leases"] else "none"),
        ("snapshots", f"read-only, as tag {one['snapshots']}" if one["snapshots"] else "not shown"),
        ("cache", _cache(one)),
        *(("problem", problem) for problem in one["problems"]),
    ]
    return [f"{name:<9} {value}" for name, value in rows if value]


def _cache(one: dict[str, Any]) -> str:
    said = one["cache"]
    streams = one["streams"]
    words = [
        "its boot is learned and read ahead of" if said["prefetch"] else "",
        "unchanged files are read through the tree that it was cloned from" if said["share"] else "",
        "no streams" if streams == 0 else f"streams from {size_text(streams)} on" if streams else "",
        f"weight {said['weight']}" if said["weight"] else "",
        f"policy {said['policy']}" if said["policy"] else "",
    ]
    return ", ".join(word for word in words if word)


def _amount(name: str, value: int) -> str:
    return size_text(value) if name.startswith("bytes") else str(value)
