"""The policy: what it grants, and that each mistake is one line that names the thing and the remedy."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import re
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen9p import auth, cli, explain, policy, quota, users, worker
from xen9p.errors import PolicyError
from xen9p.policy import Grant
from xen9p.quota import Quota
from xen9p.sizes import parse_size, size_text
from xen9p.users import Identity, Users

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


GIVEN = 'version=1\n[exports.home]\npath="/srv"\n[[rules]]\nguest="g1"\nexport="home"\n'
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
        (GIVEN + 'checks="none"', "rule 1: checks is 'none'"),
        (GIVEN + 'identity="mapped"', r"rule 1: identity is 'mapped' \(write \"as-is\""),
        (GIVEN + "identity={squash={uid=5,gid=5},map=[[0,1,1]]}", "rule 1: identity is"),
        (GIVEN + "identity={uids=[[0,1,1]]}", "rule 1: identity is"),
        (GIVEN + "identity={squash={uid=5}}", r"rule 1: identity.squash.gid is missing \(write a number from 0"),
        (GIVEN + "identity={squash={uid=-1,gid=5}}", "rule 1: identity.squash.uid is -1"),
        (GIVEN + "identity={squash={uid=true,gid=5}}", "rule 1: identity.squash.uid is True"),
        (GIVEN + "identity={squash={uid=5,gid=5,user=5}}", 'rule 1: identity.squash: unknown key "user"'),
        (GIVEN + 'identity={squash={uid=5,gid=5,who="some"}}', "rule 1: identity.squash: who is 'some'"),
        (GIVEN + "identity={squash={uid=0,gid=0}}", "rule 1: identity makes root of every user"),
        (GIVEN + "identity={map=[]}", r"rule 1: identity.map is \[\]"),
        (GIVEN + "identity={map=[[0,1]]}", r"rule 1: identity.map has \[0, 1\]"),
        (GIVEN + "identity={map=[[0,1,true]]}", r"rule 1: identity.map has \[0, 1, True\]"),
        (GIVEN + "identity={map=[[0,4294967295,1]]}", "rule 1: identity.map has .*numbers are from 0"),
        (GIVEN + "identity={map=[[0,4294967290,9]]}", "rule 1: identity.map has .*numbers are from 0"),
        (GIVEN + "identity={map=[[0,1,0]]}", "rule 1: identity.map has .*at least one"),
        (GIVEN + "identity={map=[[0,100,10],[9,200,1]]}", r"share some of the guest's numbers"),
        (GIVEN + "identity={map=[[0,100,10],[20,109,5]]}", r"share some of the host's numbers"),
        (GIVEN + 'groups="all"', "rule 1: groups is 'all'"),
        (GIVEN + "groups={alice=[5]}", 'rule 1: groups has a user "alice"'),
        (GIVEN + 'groups={"²"=[5]}', 'rule 1: groups has a user "²"'),
        (GIVEN + "groups={01000=[5], 1000=[6]}", 'rule 1: groups has a user "01000"'),
        (GIVEN + "groups={" + "9" * 5000 + "=[5]}", 'rule 1: groups has a user "9{40}"'),
        ("version = " + "9" * 5000, "Exceeds the limit"),
        ("a = " + "[" * 100_000, "recursion"),
        (GIVEN + "groups={1000=[]}", r"rule 1: groups of user 1000 are \[\]"),
        (GIVEN + 'groups={1000=["staff"]}', "rule 1: groups of user 1000 are"),
        (GIVEN + 'groups="host"\nchecks="guest"', "rule 1: groups have no use with checks"),
        (GIVEN + 'keys="a.keys"\nfrontend="user"', r'rule 1: keys "a.keys" is relative'),
        (GIVEN + 'keys="/a.keys"', r'rule 1: keys have no use with frontend = "kernel"'),
        (GIVEN + 'keys=""\nfrontend="user"', "rule 1: keys is ''"),
        (GIVEN + 'special="yes"', r"rule 1: special is 'yes' \(write true or false\)"),
        (GIVEN + "limits=5", r"rule 1: limits is 5 \(write \[rules.limits\]"),
        (GIVEN + "limits={fid=5}", r'rule 1: limits: unknown key "fid" \(did you mean "fids"\?\)'),
        (GIVEN + "limits={fids=1}", "rule 1: limits.fids is 1 .write a number from 16 to"),
        (GIVEN + 'limits={requests="many"}', "rule 1: limits.requests is 'many'"),
        (GIVEN + 'limits={bytes_in_flight="1K"}', "rule 1: limits.bytes_in_flight is '1K' .* from 1M to 2G"),
        (GIVEN + "leases=true", "rule 1: leases is True"),
        (GIVEN + 'frontend="user"\nleases=0.1', "rule 1: leases is 0.1 .write 0 for none, or seconds from 0.5 to 60"),
        (GIVEN + "leases=3", r'rule 1: leases have no use with frontend = "kernel"'),
        (GIVEN + "quota={}", r"rule 1: quota is \{\}"),
        (GIVEN + 'quota="2G"', "rule 1: quota is '2G'"),
        (GIVEN + 'quota={bytes="2 GB"}', "rule 1: quota.bytes is '2 GB'"),
        (GIVEN + 'quota={size="2G"}', 'rule 1: quota: unknown key "size"'),
        (GIVEN + "quota={files=true}", "rule 1: quota.files is True"),
        (
            GIVEN + 'quota={bytes="2G"}\n[[rules]]\nguest="h"\nexport="home"\nquota={bytes="3G"}',
            "rule 2: quota of 3G bytes for /srv, of which rule 1 says 2G bytes",
        ),
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


def terms(lines: str) -> policy.Terms:
    return policy.parse(GIVEN + lines).resolve("g1", "")[0].terms


def test_what_is_not_said_is_the_safe_thing() -> None:
    """The host checks, nothing special is made; nobody becomes root who was not."""
    assert terms("") == policy.Terms(checks=True, identity=Identity(), groups="own", special=False, limits=())
    assert terms("").users() == Users(Identity(), checks=True, special=False)


def test_who_a_guests_users_are() -> None:
    assert terms("identity={squash={uid=5,gid=6}}").identity == Identity("all", 5, 6)
    assert terms('identity={squash={uid=65534,gid=65534,who="root"}}').identity == Identity("root", 65534, 65534)
    both = terms("identity={map=[[0,100000,1000],[1000,1000,1]]}").identity
    assert both.uids == both.gids == ((0, 100000, 1000), (1000, 1000, 1))
    assert [both.host_uid(uid) for uid in (0, 999, 1000, 1001)] == [100000, 100999, 1000, None]
    apart = terms("identity={uids=[[0,1,1]],gids=[[0,2,1]]}").identity
    assert (apart.host_uid(0), apart.host_gid(0)) == (1, 2)
    found = terms('checks="guest"\nspecial=true\nidentity={squash={uid=0,gid=0}}').users()
    assert found == Users(Identity("all"), checks=False, special=True)


def test_groups_of_a_table_and_of_the_host() -> None:
    found = terms("identity={map=[[0,100000,2000]]}\ngroups={1000=[1000,100],5=[9000]}")
    assert found.users().groups == ((101000, (101000, 100100)),)
    host = dict(terms('groups="host"').users().groups)
    for user in pwd.getpwall():
        if user.pw_uid:
            assert host[user.pw_uid][0] == user.pw_gid
            assert set(host[user.pw_uid]) == set(os.getgrouplist(user.pw_name, user.pw_gid))
    assert 0 not in host
    daemon = pwd.getpwnam("daemon")
    only = terms(f'groups="host"\nidentity={{map=[[1000,{daemon.pw_uid},1]]}}').users().groups
    assert [uid for uid, _ in only] == [daemon.pw_uid]


def test_limits_by_the_data_planes_names() -> None:
    found = terms(
        'limits={fids=1000,requests=32,bytes_in_flight="8M",operations_per_second=500,bytes_per_second=1000000,'
        'bytes_in_write="64K"}'
    )
    assert dict(found.limits) == {
        "max_fids": 1000,
        "max_queued": 32,
        "max_bytes": 8 << 20,
        "ops_per_second": 500,
        "bytes_per_second": 1000000,
        "max_write": 65536,
    }
    assert worker.limits(dict(found.limits)).ops_per_second == 500
    assert worker.limits(dict(terms("").limits)) == worker.limits()


def test_quotas_are_the_directorys() -> None:
    text = GIVEN + 'quota={bytes="1.5G",files=1000}\n[[rules]]\nguest="h*"\nexport="home"\n'
    assert policy.parse(text).quotas() == {Path("/srv"): Quota(3 << 29, 1000)}
    assert str(Quota(3 << 29, 1000)) == "1536M bytes and 1000 files"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096), (4096, 4096), ("64K", 1 << 16), ("1.5G", 3 << 29), ("2GiB", 2 << 30), ("1MB", 1 << 20),
        ("", None), ("-1", None), ("1 G", None), ("1e9", None), (1.5, None), (True, None), (None, None),
    ],
)  # fmt: skip
def test_sizes(text: object, size: int | None) -> None:
    assert parse_size(text) == size
    assert size is None or parse_size(size_text(size)) == size


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["squash", "map", "uids", "gids", "uid", "gid", "who", "bytes"]), inner)
        ),
    )
)
def test_nothing_makes_a_term_without_a_line_about_it(value: object) -> None:
    """Whatever stands there: a policy, or one line for each problem, and never another exception."""
    problems: list[str] = []
    rule = {"guest": "g", "export": "e"} | dict.fromkeys(("identity", "groups", "limits", "quota", "special"), value)
    try:
        policy.from_document({"version": 1, "exports": {"e": {"path": "/e"}}, "rules": [rule]})
    except PolicyError as error:
        problems = str(error).splitlines()
    assert all(line.startswith("policy: ") for line in problems)


# Explaining.

FOUR = """
version = 1
[exports.home]
path = "/"
[exports.gone]
path = "/nowhere"
[[rules]]
guest = "g*"
export = "home"
access = "rw"
identity = {squash = {uid = 5, gid = 6, who = "root"}}
limits = {fids = 1000, bytes_per_second = "1M"}
[[rules]]
guest = "G1"
export = "home"
tag = "other"
[[rules]]
guest = "*1"
export = "home"
[[rules]]
uuid = "0b1c2d3e-0000-4000-8000-00000000000a"
export = "gone"
checks = "guest"
attach = "manual"
quota = {bytes = "2G"}
"""


def test_what_a_guest_gets_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(FOUR)
    assert cli.main(["policy", "explain", "g1", "--policy", str(path)]) == 0
    text = capsys.readouterr().out
    assert 'tag home: rule 1 (guest "g*")' in text
    assert "identity  root is uid 5, gid 6, others as they are" in text
    assert "limits    fids 1000, bytes_per_second 1M" in text
    assert 'rule 2 (guest "G1") is not about it: "g1" is not "G1" (case matters)' in text
    assert 'rule 3 (guest "*1") does not give its tag home: rule 1 gives this tag and comes first' in text
    assert f"rule 4 (uuid {UUID}) is not about it: no uuid is given (--uuid)" in text

    assert cli.main(["policy", "explain", "g1", "--uuid", UUID.upper(), "--json", "--policy", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["rule"], one["tag"], one["access"]) for one in found["gets"]] == [(1, "home", "rw"), (4, "gone", "ro")]
    assert [one["rule"] for one in found["lost"]] == [3]
    assert [one["rule"] for one in found["others"]] == [2]
    last = found["gets"][1]
    assert (last["checks"], last["special"], last["quota"]) == ("guest", False, {"bytes": 2 << 30, "files": 0})
    assert last["problems"] == ["export gone: /nowhere does not exist (create it or correct the path)"]
    assert found["gets"][0]["limits"] == {"fids": 1000, "bytes_per_second": 1 << 20}


def test_snapshots_of_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read-only, at the store's top, by the terms of the rule, and only where a rule says so."""
    store = quota.mount_of(tmp_path).point / ".snapshots"
    (tmp_path / "home").mkdir()
    file = tmp_path / "policy.toml"
    text = (
        f'version = 1\n[exports.home]\npath = "{tmp_path}/home"\n'
        '[[rules]]\nguest = "g1"\nexport = "home"\naccess = "rw"\nspecial = true\nsnapshots = true\n'
        '[[rules]]\nguest = "g2"\nexport = "home"\nsnapshots = "old"\nattach = "manual"\n'
        '[[rules]]\nguest = "g3"\nexport = "home"\nsnapshots = false\n'
    )
    file.write_text(text)
    rules = policy.load(file, check_paths=True)
    home, snapshots = rules.resolve("g1", "")
    assert (snapshots.tag, snapshots.export, snapshots.readonly) == ("home-snapshots", "home.snapshots", True)
    assert (snapshots.path, snapshots.terms, snapshots.auto) == (store / "home", home.terms, True)
    assert snapshots.of == rules.exports["home"]
    assert [(g.tag, g.auto) for g in rules.resolve("g2", "")] == [("home", False), ("old", False)]
    assert [g.tag for g in rules.resolve("g3", "")] == ["home"]
    assert cli.main(["policy", "explain", "g1", "--policy", str(file)]) == 0
    assert "snapshots read-only, as tag home-snapshots" in capsys.readouterr().out
    for wrong, says in (
        ("snapshots = 1", r"rule 1: snapshots is 1 \(write true, false or a tag\)"),
        ('snapshots = ""', 'rule 1: snapshots: bad tag ""'),
        ('snapshots = "a/b"', 'rule 1: snapshots: bad tag "a/b"'),
        (f'tag = "{"x" * 31}"\nsnapshots = true', "bad tag"),
        ('snapshots = "home"', 'tag "home" is given twice'),
    ):
        with pytest.raises(PolicyError, match=says):
            policy.parse(text.replace("snapshots = true", wrong))


def test_a_guest_that_gets_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("version = 1\n")
    assert cli.main(["policy", "explain", "g1", "--policy", str(path)]) == 0
    assert "gets nothing" in capsys.readouterr().out
    for arguments, line in (
        (["g1", "--uuid", "5", "--policy", str(path)], "'5' is no uuid (copy it from: xl list -v)"),
        (["g1", "--policy", str(tmp_path / "none")], "does not exist"),
    ):
        assert cli.main(["policy", "explain", *arguments]) != 0
        said = capsys.readouterr().err
        assert line in said
        assert said.count("\n") == 1


def test_a_rule_with_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the worker would refuse is said before; a key that is taken away or added counts at the next attach."""
    keys = tmp_path / "home.keys"
    (tmp_path / "srv").mkdir()
    rule = f'version=1\n[exports.home]\npath="{tmp_path}/srv"\n[[rules]]\nguest="g1"\nexport="home"\nfrontend="user"\n'
    path = tmp_path / "policy.toml"
    path.write_text(rule + f'keys="{keys}"\n')
    with pytest.raises(PolicyError, match=r"rule 1: keys: cannot read .*home\.keys: No such file.* xen9p key make"):
        policy.load(path, check_paths=True)
    auth.make(keys)
    keys.chmod(0o640)
    with pytest.raises(PolicyError, match=r"rule 1: keys: .* is open to others"):
        policy.load(path, check_paths=True)
    keys.chmod(0o600)
    (grant,) = policy.load(path, check_paths=True).resolve("g1", UUID)
    assert grant.keys == keys
    (without,) = policy.parse(rule).resolve("g1", UUID)
    assert without.keys is None
    assert without.later(grant) == f"keys {keys}"
    assert grant.later(without) == "keys none"
    assert without.later(dataclasses.replace(without, leases=2.5)) == "leases 2.5 s"
    both = policy.parse(rule + f'keys="{keys}"\nsnapshots=true\n').resolve("g1", UUID)
    assert [one.keys for one in both] == [keys, keys], "what is shown of the past wants the same key"
    assert cli.main(["policy", "explain", "g1", "--policy", str(path)]) == 0
    assert f"keys      one of {keys} has to be proved" in capsys.readouterr().out


def test_too_many_groups_of_the_host_are_said_by_policy_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stop no start: only the grants of that rule wait."""
    file = tmp_path / "policy.toml"
    rule = 'guest = "g"\nexport = "e"\ngroups = "host"\n'
    file.write_text(f'version = 1\n[exports.e]\npath = "{tmp_path}"\n[[rules]]\n{rule}')
    policy.load(file, check_paths=True)
    monkeypatch.setattr(users, "MOST_NUMBERS", 0)
    rules = policy.load(file, check_paths=False)
    line = "rule 1: groups: the host has more than 0 users and groups (list groups in the policy)"
    with pytest.raises(PolicyError, match=re.escape(line)):
        policy.load(file, check_paths=True)
    assert explain.explain(rules, "g", "")["gets"][0]["problems"] == [line]
