"""A typo in a variable is one line with the closest name, before anything is changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from testbed import variables

REPOSITORY = Path(__file__).resolve().parents[2]
ROLES = {
    "guest": {"guest_memory": {"type": "int"}},
    "xen_host": {"xen_host_bridge": {"type": "str"}},
    "store": {},
}


def test_declared_names_and_foreign_names_pass() -> None:
    given = ["guest_memory", "xen_host_bridge", "ansible_host", "guests", "storehouse", "groups"]
    assert list(variables.unknown(given, ROLES)) == []


def test_a_typo_gets_the_closest_name() -> None:
    assert list(variables.unknown(["guest_memmory"], ROLES)) == [
        "unknown variable 'guest_memmory': did you mean 'guest_memory'?"
    ]


ALL = variables.declared(REPOSITORY / "roles")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tesbed_memory", "testbed_memory"),
        ("xenhost_bridge", "xen_host_bridge"),
        ("guests_memory", "guest_memory"),
        ("store_devcie", "store_device"),
    ],
)
def test_a_typo_in_the_prefix_is_seen_too(name: str, meant: str) -> None:
    assert list(variables.unknown([name], ALL)) == [f"unknown variable {name!r}: did you mean {meant!r}?"]


def test_names_of_ansible_and_of_others_pass() -> None:
    names = [
        *variables.MAGIC,
        "ansible_store_device",
        "__guest_memory",
        "guest",
        "molecule_yml",
        "my_guests",
        "ntp_servers",
    ]
    assert list(variables.unknown(names, ALL)) == []


def test_a_name_like_no_other_gets_a_place_to_look() -> None:
    (line,) = variables.unknown(["store_zzzzzz"], ROLES)
    assert line.startswith("unknown variable 'store_zzzzzz': see ")


def test_declarations_come_from_all_entry_points(tmp_path: Path) -> None:
    meta = tmp_path / "store" / "meta"
    meta.mkdir(parents=True)
    specs = {
        "main": {"options": {"store_a": {"type": "str"}}},
        "grow": {"options": {"store_b": {"type": "int"}}},
    }
    (meta / "argument_specs.yml").write_text(yaml.safe_dump({"argument_specs": specs}))
    assert set(variables.declared(tmp_path)["store"]) == {"store_a", "store_b"}


def test_every_default_of_every_role_is_declared() -> None:
    roles = variables.declared(REPOSITORY / "roles")
    for path in sorted(REPOSITORY.glob("roles/*/defaults/main.yml")):
        role = path.parent.parent.name
        defaults = set(yaml.safe_load(path.read_text()) or {})
        assert defaults <= set(roles[role]), f"{role}: not in meta/argument_specs.yml"
        assert all(name.startswith(f"{role}_") for name in defaults), f"{role}: a default without the role's prefix"


def test_every_variable_of_the_playbooks_is_known() -> None:
    known = {name for options in variables.PLAYBOOKS.values() for name in options}
    used = re.compile(rf"\b(?:{'|'.join(variables.PLAYBOOKS)})_[a-z]+\b")
    found = {name for path in REPOSITORY.glob("playbooks/*.yml") for name in used.findall(path.read_text())}
    assert found == known
    (line,) = variables.unknown(["snapshot_path"], variables.PLAYBOOKS)
    assert line == "unknown variable 'snapshot_path': did you mean 'snapshot_paths'?"


def test_every_variable_of_the_inventories_is_declared() -> None:
    roles = variables.declared(REPOSITORY / "roles")
    for path in sorted(REPOSITORY.glob("inventory/*/group_vars/*.yml")):
        assert list(variables.unknown(yaml.safe_load(path.read_text()) or {}, roles)) == [], path
