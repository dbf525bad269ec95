"""The policy: what it grants, and that each mistake is one line that names the thing and the remedy."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen9p import policy
from xen9p.errors import PolicyError
from xen9p.policy import Grant

UUID = "0b1c2d3e-0000-4000-8000-00000000000a"
GOOD = f"""
version = 1
[exports.g1-root]
path = "/srv/xen9p/guests/g1"
[exports.home]
path = "/srv/xen9p/home"
[[rules]]
guest = "g1"
export = "g1-root"
tag = "root"
access = "rw"
[[rules]]
guest = "g*"
export = "home"
access = "rw"
attach = "manual"
[[rules]]
uuid = "{UUID.upper()}"
export = "home"
tag = "shared"
"""


def test_what_a_guest_gets() -> None:
    got = policy.parse(GOOD)
    root = Grant("g1-root", Path("/srv/xen9p/guests/g1"), "root", False, True)
    home = Grant("home", Path("/srv/xen9p/home"), "home", False, False)
    shared = Grant("home", Path("/srv/xen9p/home"), "shared", True, True)
    other = str(uuid.uuid4())
    assert got.resolve("g1", other) == [root, home]
    assert got.resolve("g2", UUID) == [home, shared]
    assert got.resolve("h1", UUID.upper()) == [shared]
    assert got.resolve("h1", other) == []
    # Case matters, and a name is no path or prefix.
    assert got.resolve("G1", other) == []
    assert got.resolve("xg1", other) == []


def test_who_serves_the_guests_end() -> None:
    text = 'version=1\n[exports.a]\npath="/a"\n[[rules]]\nguest="g"\nexport="a"\n'
    assert policy.parse(text).resolve("g", "")[0].frontend == "kernel"
    assert policy.parse(text + 'frontend="user"\n').resolve("g", "")[0].frontend == "user"
    with pytest.raises(PolicyError, match='frontend is \'both\' \\(write "kernel" or "user"\\)'):
        policy.parse(text + 'frontend="both"\n')


def test_overlapping_patterns_give_the_first() -> None:
    text = 'version=1\n[exports.a]\npath="/a"\n[exports.b]\npath="/b"\n'
    text += '[[rules]]\nguest="g*"\nexport="a"\ntag="t"\n[[rules]]\nguest="*1"\nexport="b"\ntag="t"\n'
    assert [g.export for g in policy.parse(text).resolve("g1", "")] == ["a"]


RULE = 'version=1\n[exports.home]\npath="/srv"\n[[rules]]\n'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "version is missing"),
        ("version=2", r"version is 2 \(this xen9p reads version = 1\)"),
        ("version=true", "version is True"),
        ("version=1\n[export.home]", r'unknown key "export" \(did you mean "exports"\?\)'),
        ("version=1\nexports=3", "exports is not a table"),
        ("version=1\n[exports]\nhome=3", "export home is not a table"),
        ('version=1\n[exports."a/b"]\npath="/"', "export 'a/b': bad name"),
        ("version=1\n[exports.home]", "export home: path is missing"),
        ('version=1\n[exports.home]\npath="srv"', r'export home: path "srv" is relative'),
        ('version=1\n[exports.home]\npath="/srv/../etc"', r'component "\.\."'),
        ("version=1\n[exports.home]\npath=7", "export home: path is 7"),
        ('version=1\n[exports.home]\npath=""', "export home: path is ''"),
        ('version=1\n[exports.home]\npath="/"\nmode="rw"', 'export home: unknown key "mode"'),
        ("version=1\n[rules]\nguest=1", r"write \[\[rules\]\] with two brackets"),
        ("version=1\nrules=[1]", "rule 1 is not a table"),
        (RULE + 'export="home"', "rule 1: neither guest nor uuid"),
        (RULE + f'guest="g1"\nuuid="{UUID}"\nexport="home"', "rule 1: both guest and uuid"),
        (RULE + 'uuid="g1"\nexport="home"', 'rule 1: bad uuid "g1"'),
        (RULE + 'guest="g 1"\nexport="home"', 'rule 1: bad guest "g 1"'),
        (RULE + 'guest="g1"', "rule 1: export is missing"),
        (
            RULE + 'guest="g1"\nexport="hom"',
            r'rule 1: unknown export "hom" \(did you mean "home"\?\)',
        ),
        (
            RULE + 'guest="g1"\nexport="xyz"',
            r'rule 1: unknown export "xyz" \(add \[exports.xyz\]',
        ),
        (RULE + 'guest="g1"\nexport="home"\ntag="a/b"', 'rule 1: bad tag "a/b"'),
        (RULE + 'guest="g1"\nexport="home"\naccess="rx"', "rule 1: access is 'rx'"),
        (RULE + 'guest="g1"\nexport="home"\naccess=["rw"]', r"rule 1: access is \['rw'\]"),
        (RULE + 'guest="g1"\nexport="home"\nattach="later"', "rule 1: attach is 'later'"),
        (RULE + 'guest="g1"\nexport="home"\nacess="rw"', r'unknown key "acess" \(did you mean "access"'),
        (
            RULE + 'guest="g1"\nexport="home"\n[[rules]]\nguest="g*"\nexport="home"',
            r'tag "home" is given twice to guest "g\*"',
        ),
        ("version = ", "Invalid value"),
    ],
)
def test_mistakes_are_named(text: str, line: str) -> None:
    with pytest.raises(PolicyError, match=line) as caught:
        policy.parse(text, "p.toml")
    assert caught.value.exit_code == 78
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("p.toml: ")
    assert lines[0].endswith(")")


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(PolicyError) as caught:
        policy.parse('version=1\n[exports.a]\npath="x"\n[[rules]]\nguest="g"\nexport="b"\naccess="w"')
    assert len(str(caught.value).splitlines()) == 3


def test_paths_are_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    with pytest.raises(PolicyError, match="does not exist"):
        policy.load(file, check_paths=True)
    file.write_bytes(b"\xff")
    with pytest.raises(PolicyError, match="not UTF-8"):
        policy.load(file, check_paths=True)
    file.write_text(f'version=1\n[exports.a]\npath="{tmp_path}/no"\n[exports.b]\npath="{file}"\n')
    with pytest.raises(PolicyError) as caught:
        policy.load(file, check_paths=True)
    first, second = str(caught.value).splitlines()
    assert f"export a: {tmp_path}/no does not exist" in first
    assert "is not a directory" in second
    assert set(policy.load(file, check_paths=False).exports) == {"a", "b"}


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    try:
        policy.parse("version = 1\n" + text)
    except PolicyError as error:
        for line in str(error).splitlines():
            assert line.startswith("policy: ")
