#!/usr/bin/python
"""Ansible module: guests run and answer by ssh; all of them are started and waited for at once."""

from __future__ import annotations

import subprocess
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.guests import ssh

DOCUMENTATION = r"""
module: guest_up
short_description: Start the guests that do not run and wait until their sshd answers
options:
  guests:
    type: list
    elements: dict
    required: true
    description: [The guests, which all have a /etc/xen/NAME.cfg.]
    suboptions:
      name: {type: str, required: true, description: [Name of the domain.]}
      address: {type: str, required: true, description: [IP address of its sshd.]}
  timeout: {type: int, default: 180, description: [Seconds for all of them together.]}
author: [xen9p]
"""
EXAMPLES = r"""
- name: Both guests
  guest_up: {guests: [{name: g1, address: 10.9.0.11}, {name: g2, address: 10.9.0.12}]}
"""
RETURN = r"""
started: {type: list, elements: str, returned: always, description: Which were (in check mode, would be) started.}
seconds: {type: dict, returned: always, description: Seconds from the start of each guest to its ssh banner.}
"""

# Seconds for the banner of one guest, while the others wait for their turn.
PATIENCE = 5.0


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def domains() -> set[str]:
    listed = run("xl", "list")
    if listed.returncode != 0:
        raise RuntimeError("`xl list` failed: the host does not run under Xen; run roles/xen_host first")
    return {line.split()[0] for line in listed.stdout.splitlines()[1:]}


def state_of(name: str) -> str:
    """What is known about a guest that does not answer, in a few words."""
    lines = run("xl", "list", name).stdout.splitlines()
    if len(lines) < 2:
        return f"{name} is not running any more; look with: xl create -c /etc/xen/{name}.cfg"
    return f"{name} is up (state {lines[1].split()[4]}) but its sshd does not answer; look with: xl console {name}"


def main() -> None:
    """Run the module."""
    guest_options: dict[str, Any] = {
        "name": {"type": "str", "required": True},
        "address": {"type": "str", "required": True},
    }
    module = AnsibleModule(
        argument_spec={
            "guests": {"type": "list", "elements": "dict", "required": True, "options": guest_options},
            "timeout": {"type": "int", "default": 180},
        },
        supports_check_mode=True,
    )
    guests: dict[str, str] = {guest["name"]: guest["address"] for guest in module.params["guests"]}
    seconds: dict[str, float] = {}
    started: dict[str, float] = {}
    try:
        present = domains()
    except RuntimeError as error:
        module.fail_json(msg=f"guests: {error}")
    missing = [name for name in guests if name not in present]
    if module.check_mode:
        module.exit_json(changed=bool(missing), started=missing, seconds={})
    deadline = time.monotonic() + module.params["timeout"]
    for name in missing:
        started[name] = time.monotonic()
        created = run("xl", "create", "-q", f"/etc/xen/{name}.cfg")
        if created.returncode != 0:
            words = (created.stderr.strip().splitlines() or ["no output"])[-1]
            module.fail_json(msg=f"guests: xl cannot create {name}: {words}; see /var/log/xen/xl-{name}.log")
    waiting = dict(guests)
    while waiting:
        for name, address in list(waiting.items()):
            if ssh.answers(address, PATIENCE):
                seconds[name] = round(time.monotonic() - started.get(name, time.monotonic()), 1)
                del waiting[name]
        if waiting and time.monotonic() > deadline:
            module.fail_json(
                msg=f"guests: after {module.params['timeout']} s {'; '.join(state_of(name) for name in waiting)}",
                seconds=seconds,
            )
        if waiting:
            time.sleep(0.5)
    module.exit_json(changed=bool(missing), started=missing, seconds=seconds)


if __name__ == "__main__":
    main()
