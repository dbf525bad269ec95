#!/usr/bin/python
"""Ansible module: wait until the nested host answers by ssh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testbed import vm, wait
from ansible.module_utils.testbed.errors import TestbedError
from ansible.module_utils.testbed.progress import Progress

DOCUMENTATION = r"""
module: testbed_wait
short_description: Wait until the nested host answers by ssh
description:
  - Fails at once when its QEMU dies, and shows the console's last line while it waits.
options:
  state_dir: {type: path, required: true, description: [The state directory of M(testbed_vm).]}
  progress: {type: path, description: [A file that always holds the step under way.]}
  ssh_port: {type: int, required: true, description: [The port of 127.0.0.1 that leads to its sshd.]}
  timeout: {type: int, default: 240, description: [Seconds until it is an error.]}
author: [xen9p]
"""
EXAMPLES = r"""
- name: Wait for the host
  testbed_wait: {state_dir: .lab/lab, ssh_port: 2222}
"""
RETURN = r"""
seconds: {type: float, returned: success, description: How long it took.}
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state_dir": {"type": "path", "required": True},
            "progress": {"type": "path"},
            "ssh_port": {"type": "int", "required": True},
            "timeout": {"type": "int", "default": 240},
        },
        supports_check_mode=True,
    )
    values: dict[str, Any] = module.params
    machine = vm.Vm(Path(values["state_dir"]))
    progress = Progress(Path(values["progress"]) if values["progress"] else None)
    try:
        seconds = wait.wait_for_ssh(machine, values["ssh_port"], values["timeout"], progress)
    except TestbedError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, seconds=round(seconds, 1), note=f"the host answered after {seconds:.0f} s")


if __name__ == "__main__":
    main()
