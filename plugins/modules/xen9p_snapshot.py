#!/usr/bin/python
"""Ansible module: snapshots of exports and guests, by the command xen9p snapshot of the host."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: xen9p_snapshot
short_description: Make, delete, restore, clone and thin out snapshots of exports and guests
description:
  - Runs C(xen9p snapshot) on a Xen host whose exports are btrfs subvolumes.
  - A snapshot of a guest is one of all exports that it can write to, of one instant. Guests that write there wait for
    it and notice nothing else.
options:
  target:
    type: str
    required: true
    description: [An export of the policy; or a guest, which means all exports that it can write to.]
  name:
    type: str
    description:
      - Name of the snapshot. Needed for all states but V(present) and V(pruned). With V(present) and without a name,
        each run makes a new one, which is called by the time.
  state:
    type: str
    choices: [present, absent, restored, cloned, pruned]
    default: present
    description:
      - V(restored) brings O(paths), or all, back to what they are in the snapshot; what guests have made since is lost.
      - V(cloned) makes a writable copy with the name O(new) beside the export; of a guest, of its root.
      - V(pruned) deletes all snapshots but those that O(keep) says.
  reason:
    type: str
    default: ""
    description:
      - Is listed with a new snapshot.
      - With V(pruned), only those that were made with it are looked at; without it all are, those of a schedule too.
  paths:
    type: list
    elements: str
    default: []
    description: [What to restore, from the top of one export. All of it if there are none.]
  online:
    type: bool
    default: false
    description: [Restore all of an export while guests have it attached, file by file.]
  force:
    type: bool
    default: false
    description:
      - Restore also files that a guest has open.
      - Make a snapshot also if requests of a guest do not end.
  new: {type: str, description: [Name of the clone.]}
  keep:
    type: dict
    description: [How many snapshots to keep; at least one of these.]
    suboptions:
      last: {type: int, default: 0, description: [The last ones.]}
      hourly: {type: int, default: 0, description: [The last one of each of the last hours that have any.]}
      daily: {type: int, default: 0, description: [The same for days.]}
      weekly: {type: int, default: 0, description: [The same for weeks.]}
      monthly: {type: int, default: 0, description: [The same for months.]}
      yearly: {type: int, default: 0, description: [The same for years.]}
  command: {type: str, default: /usr/local/bin/xen9p, description: [The command on the host.]}
  policy: {type: path, default: /etc/xen9p/policy.toml, description: [The policy that names the exports.]}
  runtime_dir: {type: path, default: /run/xen9p, description: [Of xen9pd.]}
author: [xen9p]
"""
EXAMPLES = r"""
- name: Before the exercise
  xen9p_snapshot: {target: g1, name: before, reason: start of the exercise}

- name: One file is back
  xen9p_snapshot: {target: home, name: before, state: restored, paths: [alice/thesis.tex]}

- name: Keep a week
  xen9p_snapshot: {target: home, state: pruned, keep: {last: 3, hourly: 24, daily: 7}}
"""
RETURN = r"""
snapshots: {type: list, elements: dict, returned: for present and absent, description: What is there, or was deleted.}
exports: {type: dict, returned: for restored, description: What was (in check mode, would be) taken back, by export.}
deleted: {type: list, elements: dict, returned: for pruned, description: What was (in check mode, would be) deleted.}
path: {type: str, returned: for cloned, description: Where the clone is or would be.}
pause_ms: {type: float, returned: when a snapshot was made, description: How long devices stood still.}
"""

SPANS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
PREFIX = "xen9p: error: "

Ask = Callable[..., dict[str, Any]]


class SnapshotError(Exception):
    """One line: what is wrong; what to do."""


def problems(given: dict[str, Any]) -> list[str]:
    """Return what is wrong with the arguments, before anything is asked of the host."""
    state, found = given["state"], []
    keep = given["keep"] or {}
    if state in {"absent", "restored", "cloned"} and not given["name"]:
        found.append(f"state {state} needs the name of a snapshot")
    if state == "cloned" and not given["new"]:
        found.append("state cloned needs new, the name of the clone")
    if state == "pruned" and not any(keep.values()):
        found.append("state pruned needs keep with at least one number above 0; it would delete every snapshot")
    found += [f"keep.{span} is {keep[span]}; write 0 or more" for span in SPANS if keep.get(span, 0) < 0]
    words = {"target": given["target"], "name": given["name"], "new": given["new"]}
    # What begins with a dash would be an option of the command.
    found += [
        f"{key} is {value!r}; it cannot begin with a dash" for key, value in words.items() if (value or "")[:1] == "-"
    ]
    if given["paths"] and state != "restored":
        found.append("paths are for state restored")
    return found


def asker(given: dict[str, Any]) -> Ask:
    """Return what runs a verb of the command and returns what it says."""

    def ask(verb: str, *words: str, paths: list[str] | None = None) -> dict[str, Any]:
        options = ["--json", "--policy", given["policy"], "--runtime-dir", given["runtime_dir"]]
        command = [given["command"], "snapshot", verb, *options, *words, *(["--", *paths] if paths else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise SnapshotError(f"{given['command']}: {error.strerror}; run roles/xen9p on this host first") from None
        if done.returncode != 0:
            words_ = (done.stderr.strip().splitlines() or [f"{PREFIX}exit code {done.returncode}"])[-1]
            raise SnapshotError(words_.removeprefix(PREFIX))
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    return ask


def work(given: dict[str, Any], dry: bool, ask: Ask) -> dict[str, Any]:
    """Bring about the state, or with *dry* say what that would change."""
    target, name = given["target"], given["name"]
    trial = ["--dry-run"] if dry else []
    force = ["--force"] if given["force"] else []
    match given["state"]:
        case "present":
            return present(given, dry, ask, force)
        case "absent":
            found = [one for one in ask("list", target)["snapshots"] if one["name"] == name]
            if found and not dry:
                ask("delete", target, name)
            return {"changed": bool(found), "snapshots": found}
        case "restored":
            options = trial + force + (["--online"] if given["online"] else [])
            return ask("restore", *options, target, name, paths=given["paths"])
        case "cloned":
            would = ask("clone", "--dry-run", target, name, given["new"])
            return would if dry or not would["changed"] else ask("clone", target, name, given["new"])
        case _:
            keep = [f"--keep-{span}={given['keep'][span]}" for span in SPANS if given["keep"].get(span)]
            own = [f"--reason={given['reason']}"] if given["reason"] else []
            return ask("prune", *trial, *own, *keep, target)


def present(given: dict[str, Any], dry: bool, ask: Ask, force: list[str]) -> dict[str, Any]:
    """Make the snapshot unless every export of the target has one of that name."""
    target, name = given["target"], given["name"]
    there = ask("list", target)
    found = [one for one in there["snapshots"] if name and one["name"] == name]
    if found and {one["export"] for one in found} == set(there["exports"]):
        return {"changed": False, "snapshots": found}
    if dry:
        return {"changed": True, "snapshots": found}
    words = [target, name] if name else [target]
    return ask("create", *force, f"--reason={given['reason']}", *words)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "target": {"type": "str", "required": True},
            "name": {"type": "str"},
            "state": {
                "type": "str",
                "choices": ["present", "absent", "restored", "cloned", "pruned"],
                "default": "present",
            },
            "reason": {"type": "str", "default": ""},
            "paths": {"type": "list", "elements": "str", "default": []},
            "online": {"type": "bool", "default": False},
            "force": {"type": "bool", "default": False},
            "new": {"type": "str"},
            "keep": {"type": "dict", "options": {span: {"type": "int", "default": 0} for span in SPANS}},
            "command": {"type": "str", "default": "/usr/local/bin/xen9p"},
            "policy": {"type": "path", "default": "/etc/xen9p/policy.toml"},
            "runtime_dir": {"type": "path", "default": "/run/xen9p"},
        },
        supports_check_mode=True,
    )
    given: dict[str, Any] = module.params
    if wrong := problems(given):
        module.fail_json(msg=f"snapshots: {'; '.join(wrong)}")
    try:
        result = work(given, module.check_mode, asker(given))
    except SnapshotError as error:
        module.fail_json(msg=f"snapshots: {error}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
