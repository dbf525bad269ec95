#!/usr/bin/python
"""Ansible module: build the root image of the nested Xen host, or find it in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testbed import disk, image, manifest, mirror
from ansible.module_utils.testbed.errors import TestbedError
from ansible.module_utils.testbed.progress import Progress

DOCUMENTATION = r"""
module: testbed_image
short_description: Build the root image of the nested Xen host, or find it in the cache
description:
  - The image lives in a directory named by a hash of its inputs; a manifest beside it says what they were.
  - On a miss the note says which input changed. Building needs root, looking (check mode) does not.
options:
  cache_dir: {type: path, required: true, description: [Where images are kept.]}
  progress: {type: path, description: [A file that always holds the step under way.]}
  suite: {type: str, required: true, description: [The Debian release.]}
  mirror:
    type: str
    default: ""
    description: [The archive to use; empty for the controller's own.]
  packages: {type: list, elements: str, required: true, description: [What is installed.]}
  excludes: {type: list, elements: str, default: [], description: [Patterns of files never to be unpacked.]}
  masked_units: {type: list, elements: str, default: [], description: [Units that shall not run.]}
  files: {type: dict, default: {}, description: [Text files, by path.]}
  size: {type: int, required: true, description: [Size of the root filesystem in GiB.]}
  boot:
    type: str
    choices: [xen, disk]
    default: xen
    description: [xen is a filesystem with Xen beside it; disk is a whole disk with GRUB that boots by itself.]
author: [xen9p]
"""
EXAMPLES = r"""
- name: Look into the cache
  testbed_image: {cache_dir: /var/cache/xen9p, suite: bookworm, packages: [openssh-server], size: 8}
  check_mode: true
"""
RETURN = r"""
directory: {type: str, returned: always, description: Where the image is or will be.}
cached: {type: bool, returned: always, description: Whether it was there already.}
note: {type: str, returned: always, description: Which inputs changed.}
steps: {type: list, returned: when built, description: What was done and the seconds that it took.}
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "cache_dir": {"type": "path", "required": True},
            "progress": {"type": "path"},
            "suite": {"type": "str", "required": True},
            "mirror": {"type": "str", "default": ""},
            "packages": {"type": "list", "elements": "str", "required": True},
            "excludes": {"type": "list", "elements": "str", "default": []},
            "masked_units": {"type": "list", "elements": "str", "default": []},
            "files": {"type": "dict", "default": {}},
            "size": {"type": "int", "required": True},
            "boot": {"choices": ["xen", "disk"], "default": "xen"},
        },
        supports_check_mode=True,
    )
    values: dict[str, Any] = module.params
    cache = Path(values["cache_dir"])
    kind = disk.DiskSpec if values["boot"] == "disk" else image.ImageSpec
    spec = kind(
        suite=values["suite"],
        sources=mirror.sources(values["suite"], values["mirror"]),
        packages=values["packages"],
        excludes=values["excludes"],
        masked=values["masked_units"],
        files={str(name): str(text) for name, text in values["files"].items()},
        size_mib=values["size"] * 1024,
    )
    target = image.location(cache, spec)
    cached = manifest.read(target) == spec.inputs()
    reasons = [] if cached else manifest.changes(manifest.newest(cache, spec.prefix), spec.inputs())
    note = f"image {target.name} is in the cache" if cached else f"a new image is needed: {'; '.join(reasons)}"
    result: dict[str, Any] = {"directory": str(target), "cached": cached, "note": note}
    if cached or module.check_mode:
        module.exit_json(changed=not cached, **result)
    progress = Progress(Path(values["progress"]) if values["progress"] else None)
    try:
        image.build(cache, spec, progress)
    except TestbedError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"the host image could not be built: {error}: see to the disk of {cache}")
    steps = [f"{name}: {seconds} s" for name, seconds in progress.steps]
    module.exit_json(changed=True, steps=steps, **{**result, "note": "; ".join(steps)})


if __name__ == "__main__":
    main()
