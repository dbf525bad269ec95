#!/usr/bin/python
"""Ansible module: the nested host as a QEMU process on overlays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testbed import accel, access, vm
from ansible.module_utils.testbed.errors import TestbedError

DOCUMENTATION = r"""
module: testbed_vm
short_description: Start, stop, reset or remove the virtual machine that is the nested Xen host
description:
  - Disks are overlays on an image of M(testbed_image), so that all of this takes seconds.
  - Also keeps the keys, the ssh config and the inventory by which the machine is reached.
options:
  state_dir: {type: path, required: true, description: [Where disks, keys, console and sockets live.]}
  state:
    type: str
    choices: [started, stopped, discarded, absent]
    default: started
    description: [discarded kills the machine and drops its disks; absent removes all of its state.]
  name: {type: str, default: lab, description: [What the machine is called.]}
  image: {type: path, description: [The image's directory; needed for started.]}
  accelerator: {type: str, choices: [auto, kvm, tcg], default: auto, description: [How to run it.]}
  cpus: {type: int, default: 2, description: [Virtual processors.]}
  memory: {type: int, default: 4096, description: [MiB of the whole machine.]}
  dom0_memory: {type: int, default: 1536, description: [MiB of dom0.]}
  store_size: {type: int, default: 20, description: [GiB of the second disk.]}
  ssh_port: {type: int, default: 2222, description: [The port of 127.0.0.1 that leads to its sshd.]}
  guests: {type: list, elements: dict, default: [], description: [Name and address of guests to reach.]}
  boot:
    type: str
    choices: [xen, disk]
    default: xen
    description: [xen lets QEMU start the image's Xen; disk starts the boot loader on the image's disk.]
author: [xen9p]
"""
EXAMPLES = r"""
- name: Stop the host
  testbed_vm: {state_dir: .lab/lab, state: stopped}
"""
RETURN = r"""
note: {type: str, returned: changed, description: What was done.}
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state_dir": {"type": "path", "required": True},
            "state": {"choices": ["started", "stopped", "discarded", "absent"], "default": "started"},
            "name": {"type": "str", "default": "lab"},
            "image": {"type": "path"},
            "accelerator": {"choices": ["auto", "kvm", "tcg"], "default": "auto"},
            "cpus": {"type": "int", "default": 2},
            "memory": {"type": "int", "default": 4096},
            "dom0_memory": {"type": "int", "default": 1536},
            "store_size": {"type": "int", "default": 20},
            "ssh_port": {"type": "int", "default": 2222},
            "guests": {"type": "list", "elements": "dict", "default": []},
            "boot": {"choices": ["xen", "disk"], "default": "xen"},
        },
        required_if=[("state", "started", ["image"])],
    )
    values: dict[str, Any] = module.params
    machine = vm.Vm(Path(values["state_dir"]))
    try:
        if values["state"] == "started":
            done = start(machine, values)
            module.exit_json(changed=bool(done), note="; ".join(done))
        action = {"stopped": machine.stop, "discarded": machine.discard, "absent": machine.remove}[values["state"]]
        module.exit_json(changed=action())
    except TestbedError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error}: see to the disk of {machine.dir}")


def start(machine: vm.Vm, values: dict[str, Any]) -> list[str]:
    """Bring up what is missing and return it in words."""
    done = (
        ["keys and ssh config written"] if access.write_all(machine.dir, values["ssh_port"], values["guests"]) else []
    )
    old = machine.recorded()
    # What runs was chosen before: the probe for KVM is for a machine that is about to start.
    runs = machine.pid() is not None and machine.status() in vm.RUNNING
    if old is not None and runs and values["accelerator"] in {"auto", old.accelerator}:
        accelerator = old.accelerator
    else:
        accelerator = accel.choose(values["accelerator"], vm.QEMU, Path(values["image"]))
    spec = vm.VmSpec(
        name=values["name"],
        image=values["image"],
        accelerator=accelerator,
        cpus=values["cpus"],
        memory=values["memory"],
        dom0_memory=values["dom0_memory"],
        store_size=values["store_size"],
        ssh_port=values["ssh_port"],
        boot=values["boot"],
    )
    done += machine.start(spec)
    return done


if __name__ == "__main__":
    main()
