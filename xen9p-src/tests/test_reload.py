"""Reloading: only the grants of a missing directory wait, and what is attached changes without being disturbed."""

from __future__ import annotations

import json
import logging
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving import memory_session
from xen9p import control, daemon, jsonlines, policy, quota, users, xenbus
from xen9p import worker as worker_module
from xen9p.cli import status_text
from xen9p.device import Device
from xen9p.errors import ControlError, PolicyError, Xen9pError, XenStoreError
from xen9p.loop import Loop
from xen9p.quota import Quota
from xen9p.supervisor import Guest, Managed, Supervisor, _device_status
from xen9p.users import Identity, Users, from_plain
from xen9p.workers import Worker
from xen9p.xenbus import GuestId

UUID = "6d2a9b1e-0000-4000-8000-000000000001"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A policy that gives g1 a directory that is there and one that is not."""
    (tmp_path / "here").mkdir()
    path = tmp_path / "policy.toml"
    path.write_text(
        "version = 1\n"
        f'[exports.gone]\npath = "{tmp_path}/gone"\n[exports.here]\npath = "{tmp_path}/here"\n'
        '[[rules]]\nguest = "g1"\nexport = "gone"\n[[rules]]\nguest = "g1"\nexport = "here"\n'
    )
    return path


@pytest.fixture
def given(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Supervisor, list[str]]:
    """A supervisor that knows g1, and the tags that it attaches."""
    nothing: Any = None
    supervisor = Supervisor(Loop(), nothing, nothing, policy.Policy(source=str(file)), file.parent)
    supervisor.guests[1] = Guest(GuestId(1, "g1", "u"))
    tags: list[str] = []
    monkeypatch.setattr(supervisor, "attach", lambda _guest, grant: tags.append(grant.tag))
    return supervisor, tags


def test_a_missing_directory_stops_no_start(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken(_runtime: Path) -> int:
        raise ControlError("the policy was taken")  # nothing after this works without Xen

    monkeypatch.setattr(daemon, "lock", taken)
    assert daemon.main(["--policy", str(file), "--runtime-dir", str(file.parent)]) == 1
    assert "the policy was taken" in capsys.readouterr().err


def test_a_policy_that_does_not_parse_stops_the_start(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("version = \n")
    assert daemon.main(["--policy", str(file), "--runtime-dir", str(file.parent)]) == 78
    assert capsys.readouterr().err.count("\n") == 1


def test_only_the_grants_of_a_missing_directory_wait(
    file: Path, given: tuple[Supervisor, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    supervisor, tags = given
    with caplog.at_level(logging.WARNING):
        supervisor.reload()
    assert tags == ["here"]
    said = {(r.levelname, r.getMessage().partition(" (")[0]) for r in caplog.records}
    missing = f"export gone: {file.parent}/gone does not exist"
    assert said == {("WARNING", f"policy: {missing}"), ("ERROR", f"guest=g1 tag=gone not attached: {missing}")}
    (file.parent / "gone").mkdir()
    tags.clear()
    supervisor.reload()
    assert tags == ["gone", "here"]


def test_a_faulty_policy_is_not_taken(file: Path, given: tuple[Supervisor, list[str]]) -> None:
    supervisor, tags = given
    before = supervisor.policy
    file.write_text('version = 1\n[exports.a]\npath = "relative"\n')
    with pytest.raises(PolicyError, match="relative"):
        supervisor.reload()
    assert supervisor.policy is before
    assert not tags


# What changes under devices that are attached.


class Recorder:
    """Stands for a worker: remembers what it is told."""

    pid = 1
    refusal = ""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.stats: dict[str, int] = dict.fromkeys(
            ("requests", "read_bytes", "written_bytes", "errors", "fids", "in_flight", "queued"), 0
        )

    def settle(self, terms: dict[str, Any]) -> None:
        self.told.append(terms)


@pytest.fixture
def attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Supervisor, Managed, Recorder, Path]:
    """g1 with tag home, as the policy in the file says."""
    nothing: Any = None
    (tmp_path / "home").mkdir()
    file = tmp_path / "policy.toml"
    write(file)
    supervisor = Supervisor(Loop(), nothing, nothing, policy.load(file, check_paths=True), tmp_path)
    guest = supervisor.guests[1] = Guest(GuestId(1, "g1", UUID))
    grant = supervisor.policy.resolve("g1", UUID)[0]
    managed = guest.devices[0] = Managed(guest, 0, grant, Device())
    managed.terms = {"users": grant.terms.users().plain(), "limits": dict(grant.terms.limits)}
    recorder: Any = Recorder()
    managed.worker = recorder
    monkeypatch.setattr(supervisor, "attach", lambda *_: pytest.fail("attached"))
    return supervisor, managed, recorder, file


def write(file: Path, rule: str = "", path: str = "home") -> None:
    file.write_text(
        f'version = 1\n[exports.home]\npath = "{file.parent}/{path}"\n'
        f'[[rules]]\nguest = "g1"\nexport = "home"\nattach = "manual"\n{rule}\n'
    )


def test_new_terms_go_to_the_worker(attached: tuple[Supervisor, Managed, Recorder, Path]) -> None:
    supervisor, managed, worker, file = attached
    supervisor.reload()
    assert worker.told == []
    for rule, wanted, limits in (
        ('checks = "guest"', Users(Identity(), checks=False, special=False), {}),
        ("special = true", Users(Identity(), checks=True, special=True), {}),
        ("identity = {squash = {uid = 5, gid = 6}}", Users(Identity("all", 5, 6), checks=True, special=False), {}),
        ("limits = {fids = 100}", Users(Identity(), checks=True, special=False), {"max_fids": 100}),
    ):
        write(file, rule)
        supervisor.reload()
        supervisor.reload()  # nothing new: nothing is said again
        told = worker.told.pop()
        assert worker.told == []
        assert (from_plain(told["users"]), told["limits"]) == (wanted, limits)
        assert managed.terms == told  # for the next worker, if this one dies
        assert managed.later == ""


def test_what_only_the_next_attach_brings_is_said(
    attached: tuple[Supervisor, Managed, Recorder, Path], caplog: pytest.LogCaptureFixture
) -> None:
    supervisor, managed, worker, file = attached
    before = managed.grant
    (file.parent / "other").mkdir()
    for rule, path, later in (
        ('access = "rw"', "home", "access rw"),
        ('frontend = "user"', "home", "frontend user"),
        ("special = true", "other", f"path {file.parent}/other"),
        ('tag = "another"', "home", "no rule gives it any more"),
    ):
        write(file, rule, path)
        caplog.clear()
        supervisor.reload()
        supervisor.reload()
        assert managed.later == later
        lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert lines == [f"guest=g1 device=1/0 tag=home stays as it is until its next attach; then: {later}"]
        device = _device_status(managed)
        assert (device["pending"], device["access"], device["path"]) == (later, "ro", str(before.path))
        shown = {
            "host": {"xen": "", "version": "", "pid": 1, "policy": "", "rules": 1},
            "guests": [],
            "devices": [device],
        }
        assert f"pending g1 home: at its next attach: {later}" in status_text(shown)
    # Terms of another directory's rule are not for the device of this one.
    assert worker.told == []
    write(file)
    supervisor.reload()
    assert managed.later == ""


def test_a_worker_of_an_earlier_version_takes_no_terms(attached: tuple[Supervisor, Managed, Recorder, Path]) -> None:
    supervisor, managed, worker, file = attached
    managed.deaf = True
    write(file, "special = true")
    supervisor.reload()
    assert worker.told == []
    assert managed.later == "its terms (the worker is of an earlier version)"
    assert from_plain(managed.terms["users"]).special, "the next worker gets them"


def test_what_was_narrowed_by_hand_is_not_pending(attached: tuple[Supervisor, Managed, Recorder, Path]) -> None:
    supervisor, managed, _, file = attached
    managed.narrowed = True
    write(file, 'access = "rw"')
    supervisor.reload()
    assert managed.later == ""


def test_what_was_narrowed_by_hand_stays_so_over_a_restart(
    attached: tuple[Supervisor, Managed, Recorder, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, made, _, file = attached
    write(file, 'access = "rw"')
    supervisor.reload()
    nodes: dict[str, str] = {}
    store: Any = SimpleNamespace(
        transaction=lambda write: write(store),
        read=lambda path: "/vm/" + made.owner.id.uuid if path.endswith("/vm") else nodes.get(path),
        write=nodes.__setitem__,
        **dict.fromkeys(("remove", "mkdir", "set_permissions"), lambda *_: None),
    )
    for narrowed in (True, False):
        xenbus.create(store, made.owner.id, 0, made.grant, narrowed=narrowed)
        guest = Guest(made.owner.id)
        monkeypatch.setattr(supervisor, "_watch", lambda _: None)
        supervisor._adopt_device(guest, xenbus._left(store, 1, 0), None)
        supervisor._renew(guest.devices[0])
        assert guest.devices[0].grant.readonly is narrowed


def test_a_device_is_made_anew_as_it_was_if_its_groups_are_too_many(
    attached: tuple[Supervisor, Managed, Recorder, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    supervisor, managed, _, file = attached
    before = managed.terms
    write(file, 'groups = "host"\naccess = "rw"')
    monkeypatch.setattr(users, "MOST_NUMBERS", 0)
    supervisor.reload()
    supervisor._renew(managed)
    assert managed.terms == before
    assert managed.grant.readonly
    assert "is made anew as it was: the host has more than 0 users and groups" in caplog.text


def test_terms_that_are_not_taken_are_in_the_status(
    attached: tuple[Supervisor, Managed, Recorder, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, managed, _, file = attached

    def shown() -> str:
        host = {"xen": "", "version": "", "pid": 1, "policy": "", "rules": 1}
        text = status_text({"host": host, "guests": [], "devices": [_device_status(managed)]})
        return "".join(line for line in text.splitlines() if line.startswith("problem"))

    worker = managed.worker = Worker(Loop(), tmp_path / "worker.sock", lambda: None, lambda *_: None)
    managed.worker.stats = Recorder().stats
    worker._received({"event": "settled", "problem": "there is no limit called max_apples"})
    assert shown() == "problem g1 home: keeps its terms: there is no limit called max_apples"
    worker._received({"event": "settled", "problem": ""})
    assert shown() == ""
    write(file, 'groups = "host"')
    with monkeypatch.context() as few:
        few.setattr(users, "MOST_NUMBERS", 0)
        supervisor.reload()
    assert "keeps its terms: the host has more than 0 users and groups" in shown()
    supervisor.reload()
    assert shown() == ""


def test_the_last_terms_count_if_the_worker_is_not_there_yet(tmp_path: Path) -> None:
    worker = Worker(Loop(), tmp_path / "worker.sock", lambda: None, lambda *_: None)
    worker.map([])
    for number in (1, 2, 1):
        worker.settle({"limits": {"max_fids": number}})
    assert worker._wanted == [{"do": "map", "rings": []}, {"do": "settle", "limits": {"max_fids": 1}}]


def test_new_terms_reach_all_workers_before_xenstore_is_asked(
    attached: tuple[Supervisor, Managed, Recorder, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, managed, worker, file = attached
    first = supervisor.guests.pop(1)
    supervisor.guests = {0: Guest(GuestId(0, "g0", "v")), 1: first}

    def broken(_guest: Guest) -> None:
        raise XenStoreError("xenstored has gone")

    monkeypatch.setattr(supervisor, "give", broken)
    write(file, "special = true")
    with pytest.raises(XenStoreError):
        supervisor.reload()
    assert worker.told == [managed.terms]
    assert from_plain(managed.terms["users"]).special


def test_a_quota_that_cannot_be_had_keeps_the_export_back(
    file: Path, given: tuple[Supervisor, list[str]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, tags = given
    (file.parent / "gone").mkdir()
    file.write_text(file.read_text().replace('export = "here"\n', 'export = "here"\nquota = {bytes = "2M"}\n'))
    enforced: list[tuple[Path, Quota]] = []

    def enforce(path: Path, most: Quota) -> None:
        enforced.append((path, most))
        if len(enforced) == 1:
            raise Xen9pError("no quotas here", "have some")

    monkeypatch.setattr(quota, "enforce", enforce)
    monkeypatch.setattr(quota, "joining", lambda *_, **__: [])
    supervisor.reload()
    assert tags == ["gone"]
    assert "tag=here not attached: no quotas here (have some)" in caplog.text
    tags.clear()
    supervisor.reload()
    assert tags == ["gone", "here"]
    here = file.parent / "here"
    assert enforced == [(here, Quota(2 << 20))] * 2
    supervisor.give(supervisor.guests[1])
    assert len(enforced) == 2, "it is in force"
    file.write_text(file.read_text().replace('quota = {bytes = "2M"}\n', ""))
    supervisor.reload()
    assert enforced[2:] == [(here, Quota())]


def test_a_worker_takes_other_terms_over_its_socket(tmp_path: Path) -> None:
    """The order as the supervisor sends it; the mount's fids and files stay."""
    export = tmp_path / "export"
    export.mkdir()
    (export / "f").write_text("content")
    (export / "f").chmod(0o600)
    path = tmp_path / "worker.sock"
    request = dict.fromkeys(worker_module.HELLO_FIELDS, "x") | {"domid": 1, "devid": 0, "readonly": False}
    with memory_session(export) as session:
        device = session.served.device
        made = worker_module.Worker(request, jsonlines.listen(path))
        made.device = made._made = device
        threading.Thread(target=made._listen, daemon=True).start()
        alice = session.client.attach(n_uname=1000)
        fid = session.client.walk(alice, b"f")
        session.client.lopen(fid)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(path))
            lines = sock.makefile("rwb")

            def ask(order: dict[str, Any]) -> dict[str, Any]:
                lines.write(json.dumps(order).encode() + b"\n")
                lines.flush()
                answer: dict[str, Any] = json.loads(lines.readline())
                return answer

            assert from_plain(json.loads(lines.readline())["users"]) == Users()
            terms = {"users": Users(checks=True).plain(), "limits": {"max_fids": 50}}
            assert ask({"do": "settle", **terms}) == {"event": "settled", "problem": ""}
            assert device.users == Users(checks=True)
            assert device.limits.max_fids == 50
            assert session.client.read(fid, 0, 10) == b"content"
            with pytest.raises(PermissionError):
                session.client.read_file(alice, b"f")
            for bad in ({}, {"users": {}, "limits": {}}, {**terms, "limits": {"max_apples": 5}}):
                assert ask({"do": "settle", **bad})["problem"]
            assert ask({"do": "stats"})["event"] == "stats"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(path))
            hello = json.loads(sock.makefile("rb").readline())
        assert {name: hello[name] for name in terms} == terms, "so the next supervisor knows"
        made.listener.shutdown(socket.SHUT_RDWR)
        made.listener.close()


# Snapshots.


def test_snapshots_that_cannot_be_keep_only_themselves_back(
    given: tuple[Supervisor, list[str]], file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor, tags = given
    file.write_text(
        f'version = 1\n[exports.here]\npath = "{file.parent}/here"\n'
        '[[rules]]\nguest = "g1"\nexport = "here"\nsnapshots = true\n'
    )
    supervisor.reload()
    assert tags == ["here"]
    assert "tag=here-snapshots not attached: export here: " in caplog.text


def test_devices_that_write_nothing_do_not_stand_still(given: tuple[Supervisor, list[str]], file: Path) -> None:
    supervisor, _ = given
    guest = supervisor.guests[1]
    worker: Any = SimpleNamespace(pauses=True, pause=lambda told: told(0), resume=lambda told: told(True))
    for devid, (readonly, has_worker) in enumerate([(False, True), (True, True), (False, False)]):
        grant = policy.Grant("here", file.parent / "here", f"t{devid}", readonly, True)
        managed = guest.devices[devid] = Managed(guest, devid, grant, Device())
        managed.worker = worker if has_worker else None
    assert [name for name, _, _ in supervisor._writers()] == ["g1 t0"]
    answers: list[dict[str, Any]] = []
    supervisor._handle(control.Pause((f"{file.parent}/here",)), answers.append)
    supervisor._handle(control.Resume(), answers.append)
    assert answers[0] == {"ok": True, "devices": 1}
    assert (answers[1]["held"], answers[1]["ms"] >= 0) == (True, True)
