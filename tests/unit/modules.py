"""Ansible modules of ours for tests: loaded by path, with the names under which Ansible ships what they share."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import ansible.module_utils

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"

ansible.module_utils.__path__.append(str(PLUGINS / "module_utils"))


def shipped(name: str) -> ModuleType:
    """Return the module *name* of plugins/module_utils, as a module of ours on a host imports it."""
    return importlib.import_module(f"ansible.module_utils.{name}")


def load(name: str) -> ModuleType:
    """Return the module *name* of plugins/modules."""
    spec = importlib.util.spec_from_file_location(f"module_{name}", PLUGINS / "modules" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
