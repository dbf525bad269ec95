"""Guests, policy, exports and memory are checked together on the controller, each problem in one line."""

from __future__ import annotations

from typing import Any

import pytest

from guests import plan

EXPORTS = {"home": {"path": "/srv/xen9p/home"}, "g1-root": {"path": "/srv/xen9p/guests/g1"}}
SUBVOLUMES = ["home", "course", "golden", "guests"]


def rule(guest: str, tag: str, **more: Any) -> dict[str, Any]:
    return {"guest": guest, "export": "home", "tag": tag, **more}


def test_what_fits_has_no_problems() -> None:
    rules = [rule("g1", "home", access="rw", attach="auto"), rule("g*", "course"), rule("g1", "x", uuid=None)]
    assert list(plan.policy_problems(EXPORTS, rules, ["g1", "g2"])) == []
    assert list(plan.path_problems(EXPORTS, "/srv/xen9p", SUBVOLUMES, ["g1"])) == []
    assert list(plan.memory_problems(768, 4096, 1536)) == []


@pytest.mark.parametrize(
    ("exports", "rules", "said"),
    [
        ({"x": {"pth": "/a"}}, [], 'export x: unknown key "pth" (did you mean "path"?)'),
        ({"x": {"path": "a"}}, [], 'export x: path "a" is relative'),
        ({"x": "/a"}, [], "export x is not a table"),
        ({"x": {"path": 5}}, [], "export x: path is 5"),
        (EXPORTS, [{"guest": "g1", "tag": "home"}], "rule 1: export is missing"),
        (EXPORTS, [rule("g1", "home", acess="rw")], 'unknown key "acess" (did you mean "access"?)'),
        (EXPORTS, [rule("g1", "home"), rule("g1", "home")], 'tag "home" is given twice to guest "g1"'),
        (EXPORTS, [rule("[fg]*", "home"), rule("?1", "home")], "guest g1 gets the tag home twice"),
    ],
)
def test_what_the_service_would_refuse(exports: Any, rules: Any, said: str) -> None:
    line = next(plan.policy_problems(exports, rules, ["g1"]))
    assert said in line
    assert "xen9p_exports" in line
    assert "\n" not in line


@pytest.mark.parametrize("path", ["/srv/xen9p/hoem", "/srv/xen9p/guests/g9"])
def test_an_export_that_nothing_makes(path: str) -> None:
    (line,) = plan.path_problems({"x": {"path": path}}, "/srv/xen9p", SUBVOLUMES, ["g1"])
    assert line.startswith(f"export x: {path} does not exist: ")
    assert "correct xen9p_exports" in line


def test_only_the_host_knows_of_paths_outside_of_the_store() -> None:
    exports = {**EXPORTS, "x": {"path": "/opt/data"}, "all": {"path": "/srv/xen9p"}}
    assert list(plan.path_problems(exports, "/srv/xen9p", SUBVOLUMES, ["g1"])) == []
    assert plan.elsewhere(exports, "/srv/xen9p") == {"x": "/opt/data"}


def test_memory_of_the_nested_host() -> None:
    (line,) = plan.memory_problems(3000, 4096, 1536)
    assert "set testbed_memory to 4736 or more" in line
    (line,) = plan.memory_problems(384, 1536, 1536)
    assert "raise testbed_memory or lower testbed_dom0_memory" in line
