"""Action plugin: check inventory and variables, and claim the lab, before a playbook changes anything.

Arguments: `roles_dir` (where the roles are), `state_dir` and `name` of the lab to claim (leave `state_dir` out
to claim nothing), `group` (the group that needs at least one host; empty for none).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from testbed import lock, variables
from testbed.errors import TestbedError


class ActionModule(ActionBase):
    """Runs on the controller, in a process forked from ansible-playbook, which is the one that holds the lab."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a result that fails with one line, or is unchanged."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments, given = self._task.args, task_vars or {}
        problem = next(_problems(arguments, given), None)
        if problem is None and arguments.get("state_dir"):
            try:
                lock.claim(Path(arguments["state_dir"]) / "lock", os.getppid(), str(arguments.get("name", "lab")))
            except TestbedError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{error}: set testbed_state_dir to a directory that can be written"
        if problem is not None:
            return {**result, "changed": False, "failed": True, "msg": problem}
        # The callback learns from this where the modules of this run say what they are doing.
        progress = f"{arguments['state_dir']}/progress" if arguments.get("state_dir") else ""
        return {**result, "changed": False, "progress": progress}


def _problems(arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    groups: Mapping[str, list[str]] = given.get("groups", {})
    group = str(arguments.get("group") or "")
    if group and not groups.get(group):
        yield (
            f"the inventory has no host in group {group!r}: name a file or directory with -i that has one, "
            "see inventory/classroom/ for an example"
        )
    roles = {**variables.declared(Path(arguments["roles_dir"])), **variables.PLAYBOOKS}
    hosts = sorted({*groups.get("all", []), str(given.get("inventory_hostname", ""))} - {""})
    names: set[str] = set(given)
    for host in hosts:
        names.update(given["hostvars"].get(host, {}))
    yield from variables.unknown(names, roles)
    for host in hosts:
        yield from _ill_typed(host, given["hostvars"].get(host, {}), roles)


def _ill_typed(
    host: str, values: Mapping[str, Any], roles: Mapping[str, Mapping[str, dict[str, Any]]]
) -> Iterator[str]:
    """Check the values that the inventory gives, as the roles would later: by then much would have been done."""
    for options in roles.values():
        present = {name: variables.without_demands(spec) for name, spec in options.items() if name in values}
        if not present:
            continue
        verdict = ArgumentSpecValidator(present).validate({name: values[name] for name in present})
        for message in verdict.error_messages:
            yield f"{host}: {message}"
