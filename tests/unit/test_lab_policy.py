"""The lab policy without Xen: the solution's rules as the policy has them, and the attacks on a ring in memory."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import attack
import auditor
from lab_parts import Bench, bench
from labkit.look import load_checks
from xen9p import auth
from xen9p.auth import Authenticator
from xen9p.client import Client
from xen9p.dataplane import Limits
from xen9p.errors import AuthError
from xen9p.transport.memory import MemoryRingTransport

serve_memory: Any = importlib.import_module("serving").serve_memory  # of the package's tests, which mypy checks apart

XEN9P = """#!/bin/bash
[ "$1" = policy ] || { cat "$ROOT/status.json"; exit; }
exec "$XEN9P_PYTHON" -c 'import sys; from xen9p.cli import main; sys.exit(main())' "$@"
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = bench("policy", tmp_path, monkeypatch)
    host = tmp_path / "host"
    for name, text in (("xen9p", XEN9P), ("systemctl", "#!/bin/sh\necho reloaded >> $ROOT/reloads\n")):
        (host / "usr/local/bin" / name).write_text(text)
        (host / "usr/local/bin" / name).chmod(0o755)
    (host / "status.json").write_text(json.dumps({"guests": [], "devices": []}))
    (host / "etc/xen9p").mkdir(parents=True)
    (host / "etc/xen9p/policy.toml").write_text("version = 1\n")
    (host / "var/lib/xen9p/labs").mkdir(parents=True)
    return made


def run(lab: Bench, script: str) -> str:
    done = lab.look.run("host", f'cd "$LAB_WORK"\n{script}')
    assert done.code == 0, done.err + done.out
    return done.out


def solve(lab: Bench) -> None:
    """The solution's rules, without what needs guests."""
    text = lab.lab.read("solution/steps.md").split("```console host\n", 1)[1].split("for try", 1)[0]
    lines = [line for line in text.splitlines() if not line.startswith(("install ", "xen9p key make"))]
    xen9p_key = 'xen9p() { "$ROOT/usr/local/bin/xen9p" "$@"; }\n'
    keys = Path(run(lab, 'echo "$LAB_WORK/audit.keys"').strip())
    auth.make(keys, "auditor")
    run(lab, xen9p_key + "\n".join(lines))


def grants(lab: Bench) -> dict[str, Any]:
    load_checks(lab.lab)
    found: dict[str, Any] = sys.modules["labkit_checks_policy"].gets(lab.look, "g1", "g2", "stranger")
    return found


def test_the_solutions_rules_give_what_is_wanted_and_to_nobody_else(lab: Bench) -> None:
    solve(lab)
    assert lab.check("nobody").part == 1
    found = grants(lab)
    assert {(g["tag"], g["ro"], g["frontend"]) for g in found["g1"]} == {
        ("site", True, "kernel"),
        ("drop", False, "kernel"),
        ("audit", True, "user"),
    }
    assert {(g["tag"], g["ro"]) for g in found["g2"]} == {("drop", False), ("ledger", False)}
    limits = next(g["limits"] for g in found["g1"] if g["tag"] == "audit")
    assert limits == {"ops_per_second": lab.look.values["rate"]}


@pytest.mark.parametrize("guest", ["*", "g1*", "[Gg]1", "str*"])
def test_a_rule_for_others_is_found(lab: Bench, guest: str) -> None:
    solve(lab)
    rule = f'[[rules]]\nguest = "{guest}"\nexport = "$export_vault"\ntag = "more"\nattach = "manual"\n'
    run(lab, f"cat >> rules.toml <<END\n{rule}END\n./apply")
    assert lab.check("nobody").part == 0


def test_a_faulty_file_changes_nothing(lab: Bench) -> None:
    solve(lab)
    policy = lab.part.parents[3] / "etc/xen9p/policy.toml"
    before = policy.read_text()
    done = lab.look.run("host", 'cd "$LAB_WORK" && echo nonsense >> rules.toml && ./apply')
    assert done.code == 1
    assert "nothing has changed" in done.err
    assert policy.read_text() == before
    assert list(policy.parent.iterdir()) == [policy]


def test_apply_takes_the_place_of_what_it_put_there_and_reset_takes_it_away(lab: Bench) -> None:
    policy = lab.part.parents[3] / "etc/xen9p/policy.toml"
    solve(lab)
    once = policy.read_text()
    run(lab, "./apply")
    assert policy.read_text() == once
    assert run(lab, lab.lab.left["host"]).count("begin") == 1
    run(lab, lab.lab.reset["host"])
    assert policy.read_text() == "version = 1\n"


def test_the_probe_of_the_auditor(tmp_path: Path) -> None:
    """On a real server that wants a key, on a ring in memory."""
    key = auth.Key("auditor", os.urandom(auth.KEY_SIZE))
    (tmp_path / "proof").write_text("nonce\n")
    (tmp_path / "book").write_text("1\n")
    (tmp_path / "proof-link").symlink_to("../vault/secret")
    rate = Limits(ops_per_second=100)
    options: dict[str, Any] = {"readonly": True, "authenticator": Authenticator({"auditor": key}), "limits": rate}
    with serve_memory(tmp_path, rings=2, **options) as (rings, _):
        client = Client(MemoryRingTransport(rings[0]))
        client.version()
        assert auditor.access(client, key) == {
            "none": "ENOKEY",
            "other": "refused",
            "book": "nonce\n",
            "make": "EROFS",
            "write": "EROFS",
        }
        found = auditor.attack(client, key)
        assert found["flood"] < 100 * (auditor.SECONDS + 1)  # type: ignore[operator]
        assert (found["forged"], found["link"]) == ("ENOENT", "ELOOP")
        assert found["slash"] in ("EINVAL", "ENOENT")
        client.close()


def test_each_attack_is_refused_and_what_is_allowed_is_not(tmp_path: Path) -> None:
    key = auth.Key("auditor", os.urandom(auth.KEY_SIZE))
    (tmp_path / "book").write_text("1\n")
    options: dict[str, Any] = {"readonly": True, "authenticator": Authenticator({"auditor": key})}
    with serve_memory(tmp_path, **options) as (rings, served):
        client = Client(MemoryRingTransport(rings[0]))
        client.version()
        assert "there" in attack.attack(client, key, "walk", ["book"])
        assert "1" in attack.attack(client, key, "open", ["book"])
        with pytest.raises(AuthError):
            attack.attack(client, None, "walk", ["book"])
        with pytest.raises(OSError, match="Twalk"):
            attack.attack(client, key, "walk", ["../book"])
        with pytest.raises((OSError, EOFError)):
            attack.attack(client, key, "break", ["4000000"])
        assert served.join().name == "PROTOCOL"
        assert "4000000" in served.device.reason
        client.close()
