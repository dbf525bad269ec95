"""Action plugin: check guests, policy and memory on the controller, before a playbook changes anything.

Arguments: `exports` and `rules` of the policy, `guests` (names), `store` (mount point), `subvolumes` of the store,
`memory` (empty, or MiB: `guests`, the sum of all, `machine` and `dom0` of the nested host). Returns `elsewhere`:
name -> path of exports outside of the store, and `trees`: the guests' own, by their path below the store.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "module_utils")]
sys.path.append(str(Path(__file__).resolve().parents[2] / "xen9p-src" / "src"))

from guests import plan


class ActionModule(ActionBase):
    """Touches no host."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a result that fails with one line, or is unchanged."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        given = self._task.args
        problem = next(_problems(given), None)
        if problem is not None:
            return {**result, "changed": False, "failed": True, "msg": problem}
        outside = plan.elsewhere(given["exports"], given["store"])
        trees = [f"guests/{name}" for name in given["guests"]]
        return {**result, "changed": False, "elsewhere": outside, "trees": trees}


def _problems(given: Mapping[str, Any]) -> Iterator[str]:
    guests = [str(name) for name in given["guests"]]
    yield from plan.policy_problems(given["exports"], given["rules"], guests)
    yield from plan.path_problems(given["exports"], given["store"], given["subvolumes"], guests)
    if memory := given.get("memory"):
        yield from plan.memory_problems(int(memory["guests"]), int(memory["machine"]), int(memory["dom0"]))
