#!/usr/bin/python
"""Ansible module: is the controller fit to run the testbed?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testbed import image, machine, manifest, vm

DOCUMENTATION = r"""
module: testbed_preflight
short_description: Check that the controller can run the testbed, before anything is changed
description:
  - Fails with one line for the first thing that is missing, and its remedy.
options:
  state_dir: {type: path, required: true, description: [Where the lab's state will live.]}
  cache_dir: {type: path, required: true, description: [Where images will be kept.]}
  ssh_port: {type: int, required: true, description: [The port that has to be free.]}
  memory: {type: int, required: true, description: [MiB of memory that the machine will have.]}
  disk: {type: int, default: 10, description: [GiB that a first run has to find free.]}
author: [xen9p]
"""
EXAMPLES = r"""
- name: Check the controller
  testbed_preflight: {state_dir: .lab/lab, cache_dir: ~/.cache/xen9p, ssh_port: 2222, memory: 4096}
"""
RETURN = r"""
needs_root: {type: bool, returned: always, description: Whether something has to be built, which needs root.}
"""

# What QEMU itself and the tools around it take beside the machine's memory, MiB.
OVERHEAD = 1536


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state_dir": {"type": "path", "required": True},
            "cache_dir": {"type": "path", "required": True},
            "ssh_port": {"type": "int", "required": True},
            "memory": {"type": "int", "required": True},
            "disk": {"type": "int", "default": 10},
        },
        supports_check_mode=True,
    )
    values: dict[str, Any] = module.params
    host = vm.Vm(Path(values["state_dir"]))
    old = host.recorded()
    running = host.pid() is not None
    # The golden tree of the guests is built by a role of its own, into the same cache.
    cached = all(manifest.newest(Path(values["cache_dir"]), prefix) for prefix in (image.PREFIX, "golden-"))
    found = machine.problems(
        memory_mib=0 if running else values["memory"] + OVERHEAD,
        # With image and golden tree in the cache a run needs room for the overlays only.
        disk_gib=2 if cached else values["disk"],
        directories=sorted({Path(values["state_dir"]), Path(values["cache_dir"])}),
        port=None if running and old is not None and old.ssh_port == values["ssh_port"] else values["ssh_port"],
        needs_root=not cached,
    )
    problem = next(found, None)
    if problem is not None:
        module.fail_json(msg=problem)
    module.exit_json(changed=False, needs_root=not cached)


if __name__ == "__main__":
    main()
