"""Check the variables of an inventory against what the roles declare, before anything is changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

# How alike (0 to 1, difflib) a name without any role's prefix has to be to count as a slip of the pen.
NEAR = 0.85
# What playbooks have as variables of their own, by the prefix of their names, as argument_specs would say it.
PLAYBOOKS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "snapshot": {
        **{f"snapshot_{name}": {"type": "str"} for name in ("target", "name", "state", "reason", "new")},
        **{f"snapshot_{name}": {"type": "bool"} for name in ("online", "force")},
        "snapshot_paths": {"type": "list", "elements": "str"},
        "snapshot_keep": {"type": "dict"},
    },
    "cache": {
        **{f"cache_{name}": {"type": "str"} for name in ("guest", "address", "device")},
        **{f"cache_{name}": {"type": "int"} for name in ("rounds", "iops")},
    },
    "scaling": {
        "scaling_rounds": {"type": "int"},
        "scaling_publish": {"type": "bool"},
        "scaling_results": {"type": "path"},
    },
    "translations": {
        "translations_rounds": {"type": "int"},
        "translations_publish": {"type": "bool"},
        "translations_sides": {"type": "raw"},
        "translations_workloads": {"type": "raw"},
    },
}
# What Ansible itself gives each host.
MAGIC = frozenset(
    {
        "environment",
        "group_names",
        "groups",
        "hostvars",
        "inventory_dir",
        "inventory_file",
        "inventory_hostname",
        "inventory_hostname_short",
        "module_setup",
        "omit",
        "play_hosts",
        "playbook_dir",
        "role_name",
        "role_names",
        "role_path",
        "vars",
    }
)


def declared(roles_dir: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, for each role, the options of all its entry points by their names.

    Read from `meta/argument_specs.yml`; a role that has none declares nothing.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(roles_dir.glob("*/meta/argument_specs.y*ml")):
        specs = (yaml.safe_load(path.read_text()) or {}).get("argument_specs") or {}
        options: dict[str, dict[str, Any]] = {}
        for entry in specs.values():
            options |= (entry or {}).get("options") or {}
        found[path.parent.parent.name] = options
    return found


def unknown(given: Iterable[str], roles: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each given name that no role declares and that begins, or nearly is, like one that does.

    Ansible's own names and internal ones (`__x`) pass, and so does what is far from every declared name.
    """
    known = sorted({name for options in roles.values() for name in options})
    prefixes = tuple(f"{role}_" for role in roles)
    for name in sorted(set(given) - set(known) - MAGIC):
        if name.startswith(("ansible_", "__")):
            continue
        # Under a role's prefix nothing else may stand; elsewhere only a near miss of the whole name is suspicious.
        cutoff = 0.6 if name.startswith(prefixes) else NEAR
        close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
        if not close and not name.startswith(prefixes):
            continue
        hint = f"did you mean {close[0]!r}?" if close else "see docs/reference for the variables of the roles"
        yield f"unknown variable {name!r}: {hint}"


def without_demands(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return an option's specification for checking a given value: its defaults and demands are the role's affair."""
    return {key: value for key, value in spec.items() if key not in {"required", "default", "description"}}
