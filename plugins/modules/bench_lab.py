#!/usr/bin/python
"""Ansible module: the parts of a benchmark run that happen in dom0."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.bench import boots, files, full, translations, trees
from ansible.module_utils.bench.host import BenchError, alone, run
from ansible.module_utils.bench.settings import Settings
from ansible.module_utils.bench.tracefs import TraceError

DOCUMENTATION = r"""
module: bench_lab
short_description: Prepare, measure and clean up after benchmarks on a Xen host
description:
  - The guests are its own and gone afterwards. Whatever fails, C(do=clean) leaves nothing behind.
options:
  do:
    type: str
    required: true
    choices: [prepare, prepare_full, prepare_translations, boots, files, full, translations, ways, clean]
    description: [Which part of a run.]
  settings: {type: dict, required: true, description: [Names and paths; all of one run must be equal.]}
  rounds: {type: int, default: 5, description: [How often each thing is measured.]}
  round: {type: int, default: 0, description: [Which round of C(do=full) or C(do=translations) this is; from 0.]}
  workload: {type: str, default: "", description: [What C(do=translations) counts.]}
  program: {type: str, default: "", description: [Text of the program that works with files in the guest.]}
  programs: {type: dict, default: {}, description: [Texts of the programs of the guest that has all sides, by name.]}
author: [xen9p]
"""
EXAMPLES = r"""
- name: Leave nothing behind
  bench_lab: {do: clean, settings: "{{ __bench_settings }}"}
"""
RETURN = r"""
result: {type: dict, returned: success, description: Samples and what is known about the machine.}
"""


PARTS = (
    *("prepare", "prepare_full", "prepare_translations"),
    *("boots", "files", "full", "translations", "ways", "clean"),
)


def facts(given: Settings) -> dict[str, Any]:
    """Return what a reader has to know about the host."""
    xen = dict(line.split(":", 1) for line in run("xl", "info").splitlines() if ":" in line)
    told = {key.strip(): value.strip() for key, value in xen.items()}
    store = run("findmnt", "--noheadings", "--output", "UUID", given.store).strip()
    checksum = Path("/sys/fs/btrfs", store, "checksum").read_text().split()[0]
    qemu = run("/usr/libexec/xen-qemu-system-i386", "--version").splitlines()[0]
    return {
        "kernel": platform.release(),
        "xen": told.get("xen_version", "unknown"),
        "processors": int(told.get("nr_cpus", "0")),
        "dom0_processors": len([name for name in run("xl", "vcpu-list", "0").splitlines()[1:] if name]),
        "qemu": qemu.removeprefix("QEMU emulator version ").split()[0],
        "xen9p": run("xen9p", "--version").strip(),
        "guest_memory_mib": given.memory,
        "store": f"btrfs, {checksum}",
    }


def perform(given: Settings, asked: dict[str, Any]) -> tuple[bool, dict[str, Any], str]:
    """Do one part: whether it changed the host, what it found, and a note for whoever watches."""
    what, rounds = asked["do"], asked["rounds"]
    if what == "clean":
        found = full.stop() | translations.stop(given) | trees.clean(given)
        return found, {}, "removed" if found else ""
    if what == "prepare":
        machine = facts(given)
        machine["golden"] = trees.prepare(given)
        return True, {"machine": machine}, f"golden tree {machine['golden']}"
    if what in {"prepare_full", "prepare_translations"}:
        part = full if what == "prepare_full" else translations
        machine = facts(given)
        machine["golden"] = trees.prepare(given, part.add)
        started = part.start(given, asked["programs"])
        soon = ", ".join(f"{tag} {seconds:.2f} s" for tag, seconds in started["ready"].items())
        return True, {"machine": machine} | started, f"ready after {soon}"
    if what == "full":
        measured = full.measure(given, asked["round"])
        spent = sum(item["wall"] for item in measured["costs"])
        return True, measured, f"{len(measured['samples'])} samples in {spent:.0f} s"
    if what == "translations":
        measured = translations.measure(given, asked["workload"], asked["round"])
        done = [item for item in measured["counts"] if not item["failed"]]
        return True, measured, f"{len(done)} of {len(measured['counts'])} sides"
    if what == "ways":
        shown = translations.ways(given)
        return True, {"ways": shown}, ", ".join(item["side"] for item in shown)
    if what == "boots":
        samples = boots.measure(given, rounds)
        return True, {"samples": samples}, ", ".join(f"{item['side']} {item['seconds']:.1f} s" for item in samples)
    measured = files.measure(given, rounds, asked["program"])
    return True, measured, f"{len(measured['samples'])} samples"


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "do": {"type": "str", "required": True, "choices": list(PARTS)},
            "settings": {"type": "dict", "required": True},
            "rounds": {"type": "int", "default": 5},
            "round": {"type": "int", "default": 0},
            "workload": {"type": "str", "default": ""},
            "program": {"type": "str", "default": ""},
            "programs": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False, result={}, note="not in check mode")
    values: dict[str, Any] = module.params
    try:
        given = Settings(**values["settings"])
        with alone():
            changed, result, note = perform(given, values)
    except (BenchError, TraceError, OSError) as error:
        module.fail_json(msg=f"benchmark: {error}")
    module.exit_json(changed=changed, result=result, note=note)


if __name__ == "__main__":
    main()
