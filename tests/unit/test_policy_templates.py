"""What roles/guest and roles/xen9p make of their variables is a policy, and the one that was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from guests import plan
from xen9p import policy
from xen9p.quota import Quota
from xen9p.users import Identity

ROLES = Path(__file__).parents[2] / "roles"


def render(template: str, variables: dict[str, Any]) -> str:
    """A template of a role as Ansible renders it."""
    text = (ROLES / template).read_text()
    templar = Templar(loader=DataLoader(), variables=variables)
    return str(templar.template(trust_as_template(text), convert_data=False))


def policy_of(
    rules: list[dict[str, Any]], exports: dict[str, Any], more: dict[str, Any], cache_policy: str = ""
) -> policy.Policy:
    """What the service gets."""
    variables = {
        "xen9p_exports": exports,
        "xen9p_guest_exports": more["exports"],
        "xen9p_rules": rules,
        "xen9p_guest_rules": more["rules"],
        "xen9p_cache_policy": cache_policy,
    }
    return policy.parse(render("xen9p/templates/policy.toml.j2", variables))


def test_everything_that_a_rule_may_say() -> None:
    rules: list[dict[str, Any]] = [
        {"guest": "a", "export": "e", "tag": "t"},
        {"guest": "b", "export": "e", "tag": "t", "identity": "as-is", "groups": "host", "special": True},
        {
            "guest": "c",
            "export": "e",
            "tag": "t",
            "identity": {"squash": {"uid": 5, "gid": 6}},
            "quota": {"bytes": "2G"},
        },
        {
            "guest": "d",
            "export": "e",
            "tag": "t",
            "identity": {"map": [[0, 100000, 65536], [70000, 300000, 1]]},
            "groups": {1000: [1000, 100], "1001": [1001]},
            # An option of argument_specs that is not given is there as None.
            "limits": {"fids": 100, "requests": None, "bytes_in_flight": "8M", "operations_per_second": 5},
            "quota": {"bytes": "2G", "files": None},
        },
        {"guest": "f", "uuid": None, "export": "e", "tag": "t", "checks": "guest", "identity": None, "limits": None},
    ]
    assert list(plan.policy_problems({"e": {"path": "/e"}}, rules, ["a", "b"])) == []
    got = policy_of(rules, {"e": {"path": "/e"}}, {"exports": {}, "rules": []})
    terms = {guest: got.resolve(guest, "")[0].terms for guest in "abcdf"}
    assert terms["a"] == policy.Terms()
    assert (terms["b"].groups, terms["b"].special) == ("host", True)
    assert terms["c"].identity == Identity("all", 5, 6)
    assert terms["d"].identity.uids == terms["d"].identity.gids == ((0, 100000, 65536), (70000, 300000, 1))
    assert terms["d"].table == ((1000, (1000, 100)), (1001, (1001,)))
    assert dict(terms["d"].limits) == {"max_fids": 100, "max_bytes": 8 << 20, "ops_per_second": 5}
    assert not terms["f"].checks
    assert got.quotas() == {Path("/e"): Quota(2 << 30)}


def test_guests_check_their_own_roots_and_the_host_checks_what_they_share() -> None:
    defaults = yaml.safe_load((ROLES / "guest/defaults/main.yml").read_text())
    variables = {
        name: defaults[name] for name in ("guest_guests", "guest_mounts", "guest_user_devices", "guest_root_cache")
    }
    variables |= {
        "guest_store": "/srv/xen9p",
        "guest_exports": {n: {"path": f"/srv/xen9p/{n}"} for n in ("home", "course")},
    }
    variables["guest_mounts"][1]["limits"] = {"fids": 5000}
    variables["guest_mounts"][1]["cache"] = {"streams": False}
    variables["guest_guests"][1]["cache"] = {"share": False, "weight": 200}
    made = json.loads(render("guest/templates/policy.json.j2", variables))
    got = policy_of([], {}, made)
    grants = {(guest, grant.tag): grant for guest in ("g1", "g2") for grant in got.resolve(guest, "")}
    for guest in ("g1", "g2"):
        root, home, course, user = (grants[guest, tag] for tag in ("root", "home", "course", "user"))
        assert (root.terms.checks, root.terms.special, root.readonly) == (False, True, False)
        assert (home.terms.checks, home.terms.special, home.readonly) == (True, True, False)
        assert (course.terms.checks, course.terms.special, course.readonly) == (True, False, True)
        assert (user.terms.checks, user.frontend, user.leases) == (True, "user", 10.0)
        assert dict(course.terms.limits) == {"max_fids": 5000, "stream_bytes": 0}
        assert (root.cache.prefetch, home.cache.prefetch) == (True, False)
        assert (root.cache.share, root.cache.weight) == ((True, 0) if guest == "g1" else (False, 200))


def test_another_caching_policy() -> None:
    rules = [
        {"guest": "a", "export": "e", "tag": "t", "cache": {"prefetch": True, "streams": "4M", "options": {"n": 3}}}
    ]
    got = policy_of(rules, {"e": {"path": "/e"}}, {"exports": {}, "rules": []}, "ours.caching:Eager")
    (grant,) = got.resolve("a", "")
    assert grant.cache == policy.Cache(prefetch=True, policy="ours.caching:Eager", options=(("n", 3),))
    assert dict(grant.terms.limits) == {"stream_bytes": 4 << 20}
