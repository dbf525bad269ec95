"""Do guests, exports, rules and memory fit together? Each problem is one line with its remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from xen9p import policy
from xen9p.errors import PolicyError

# MiB that Xen itself takes of the machine.
XEN_MIB = 200
POLICY_VARIABLES = "xen9p_exports, xen9p_rules, guest_exports and guest_mounts"


def policy_problems(exports: Any, rules: Any, guests: Sequence[str]) -> Iterator[str]:
    """Yield what the service would refuse in its policy, and tags that patterns give to one of *guests* twice."""
    if isinstance(rules, list):
        # An option that is not given may be there as None.
        rules = [_given(rule) for rule in rules]
    try:
        checked = policy.from_document({"version": policy.VERSION, "exports": exports, "rules": rules})
    except PolicyError as error:
        for line in error.message.splitlines():
            yield f"{line.removeprefix('policy: ')}; correct it in {POLICY_VARIABLES}"
        return
    for guest in guests:
        given: dict[str, policy.Rule] = {}
        for rule in checked.rules:
            if rule.guest is None or not fnmatchcase(guest, rule.guest):
                continue
            if first := given.get(rule.tag):
                yield (
                    f"guest {guest} gets the tag {rule.tag} twice, by the rules for {first.subject} and "
                    f"{rule.subject}: give each its own tag in {POLICY_VARIABLES}"
                )
            given[rule.tag] = rule


def path_problems(
    exports: Mapping[str, Mapping[str, str]], store: str, subvolumes: Sequence[str], guests: Sequence[str]
) -> Iterator[str]:
    """Yield the exports that lie in the store, where nothing will be."""
    for name, export in exports.items():
        inside = _inside(export["path"], store)
        if inside is None or not inside:
            continue
        tree = len(inside) > 1 and inside[0] == "guests" and inside[1] in guests
        if inside[0] not in subvolumes or (inside[0] == "guests" and len(inside) > 1 and not tree):
            known = ", ".join(subvolumes)
            yield (
                f"export {name}: {export['path']} does not exist: add {inside[0]!r} to store_subvolumes ({known}), "
                "or correct xen9p_exports"
            )


def elsewhere(exports: Mapping[str, Mapping[str, str]], store: str) -> dict[str, str]:
    """Return name -> path of the exports outside of the store: only the host can tell whether they exist."""
    return {name: export["path"] for name, export in exports.items() if _inside(export["path"], store) is None}


def memory_problems(guests: int, machine: int, dom0: int) -> Iterator[str]:
    """Yield what does not fit into a nested host of *machine* MiB: *dom0*, and *guests* (the sum of all)."""
    needed = guests + dom0 + XEN_MIB
    if dom0 + XEN_MIB >= machine:
        yield (
            f"testbed_dom0_memory ({dom0} MiB) leaves nothing of testbed_memory ({machine} MiB) for Xen and guests: "
            "raise testbed_memory or lower testbed_dom0_memory"
        )
    elif needed > machine:
        yield (
            f"guests ({guests} MiB), dom0 ({dom0}) and Xen ({XEN_MIB}) need {needed} MiB, the nested host has "
            f"{machine}: set testbed_memory to {needed} or more, or lower guest_memory"
        )


def _given(value: Any) -> Any:
    """Return *value* as TOML would have it: without options that are None, and with keys that are text."""
    if not isinstance(value, dict):
        return value
    return {str(key): _given(inner) for key, inner in value.items() if inner is not None}


def _inside(path: str, store: str) -> tuple[str, ...] | None:
    """Return the parts of *path* below *store*, None when it is not there."""
    try:
        return PurePosixPath(path).relative_to(store).parts
    except ValueError:
        return None
