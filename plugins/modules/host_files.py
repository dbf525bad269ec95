#!/usr/bin/python3
"""Put many small files, directories and links in place in one remote task."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: host_files
short_description: Put many small files, directories and links in place in one task
description:
  - Each remote task costs seconds on an emulated host; this one does the work of a loop over
    M(ansible.builtin.copy) and M(ansible.builtin.file). Owner and group are those of the connection.
options:
  directories:
    description: Directories to have; missing parents are made with mode 0755.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path., type: path, required: true}
      mode: {description: Octal mode., type: str, default: '0755'}
  files:
    description: Files to have, with exactly this content.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path., type: path, required: true}
      content: {description: The whole text of the file., type: str, required: true}
      mode: {description: Octal mode., type: str, default: '0644'}
  links:
    description: Symbolic links to have.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Where the link is., type: path, required: true}
      target: {description: What it points to, as it is written into the link., type: str, required: true}
  absent:
    description: Files or links that shall not be there. Directories are refused.
    type: list
    elements: path
    default: []
author:
  - xen9p
"""

EXAMPLES = r"""
- name: Unit and its drop-in
  ansible.legacy.host_files:
    files:
      - path: /etc/systemd/system/example.service
        content: "{{ lookup('ansible.builtin.template', 'example.service.j2') }}"
"""

RETURN = r"""
paths:
  description: What was (in check mode, would be) changed.
  returned: always
  type: list
  elements: str
"""


def read(path: Path) -> str | None:
    """Content of a regular file, None if there is none (or something else is in its place)."""
    if path.is_symlink() or not path.is_file():
        return None
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def write(path: Path, content: str, mode: int) -> None:
    """Replace ``path`` in one step: a reader sees the old file or the new one, never a half."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(content)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


class Converger:
    """Compares, and unless ``dry`` changes; remembers what differed."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.paths: list[str] = []
        self.diffs: list[dict[str, str]] = []

    def directory(self, path: Path, mode: int) -> None:
        if path.is_dir() and mode_of(path) == mode:
            return
        self.paths.append(str(path))
        if not self.dry:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(mode)

    def file(self, path: Path, content: str, mode: int) -> None:
        old = read(path)
        if old == content and mode_of(path) == mode:
            return
        self.paths.append(str(path))
        self.diffs.append(
            {"before": old or "", "after": content, "before_header": str(path), "after_header": str(path)}
        )
        if not self.dry:
            write(path, content, mode)

    def link(self, path: Path, target: str) -> None:
        if path.is_symlink() and os.readlink(path) == target:
            return
        self.paths.append(str(path))
        if not self.dry:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink() or path.is_file():
                path.unlink()
            path.symlink_to(target)

    def gone(self, path: Path) -> None:
        if not path.is_symlink() and not path.exists():
            return
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(f"{path} is a directory; remove it by hand if it is not needed")
        self.paths.append(str(path))
        if not self.dry:
            path.unlink()


def suboptions(**extra: dict[str, Any]) -> dict[str, Any]:
    return {"path": {"type": "path", "required": True}, **extra}


def main() -> None:
    entry: dict[str, Any] = {"type": "list", "elements": "dict", "default": []}
    module = AnsibleModule(
        argument_spec={
            "directories": entry | {"options": suboptions(mode={"type": "str", "default": "0755"})},
            "files": entry
            | {
                "options": suboptions(
                    content={"type": "str", "required": True}, mode={"type": "str", "default": "0644"}
                )
            },
            "links": entry | {"options": suboptions(target={"type": "str", "required": True})},
            "absent": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    converger = Converger(dry=module.check_mode)
    try:
        for item in wanted["directories"]:
            converger.directory(Path(item["path"]), int(item["mode"], 8))
        for item in wanted["files"]:
            converger.file(Path(item["path"]), item["content"], int(item["mode"], 8))
        for item in wanted["links"]:
            converger.link(Path(item["path"]), item["target"])
        for item in wanted["absent"]:
            converger.gone(Path(item))
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"cannot put files in place: {error}", paths=converger.paths)
    module.exit_json(changed=bool(converger.paths), paths=converger.paths, diff=converger.diffs)


if __name__ == "__main__":
    main()
