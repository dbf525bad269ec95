"""A cached artefact vouches for its inputs, and a miss says which of them changed."""

from __future__ import annotations

from pathlib import Path

from testbed import manifest

INPUTS = {"suite": "bookworm", "packages": ["fio", "strace"], "files": {"/etc/hosts": "1a"}, "size_mib": 8192}


def test_equal_inputs_have_equal_names() -> None:
    assert manifest.digest(INPUTS) == manifest.digest(dict(reversed(INPUTS.items())))
    assert manifest.digest(INPUTS) != manifest.digest({**INPUTS, "suite": "trixie"})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    manifest.write(tmp_path, INPUTS, steps=[("one", 1.5)])
    assert manifest.read(tmp_path) == INPUTS


def test_a_half_finished_artefact_has_no_inputs(tmp_path: Path) -> None:
    assert manifest.read(tmp_path) is None
    (tmp_path / manifest.MANIFEST).write_text('{"inputs": {"sui')
    assert manifest.read(tmp_path) is None


def test_the_newest_complete_one_is_compared_with(tmp_path: Path) -> None:
    (tmp_path / "host-part-1").mkdir()
    assert manifest.newest(tmp_path, "host-") is None
    (tmp_path / "host-a").mkdir()
    manifest.write(tmp_path / "host-a", INPUTS)
    assert manifest.newest(tmp_path, "host-") == INPUTS


def test_changes_are_said_in_words() -> None:
    new = {"suite": "trixie", "packages": ["fio", "perf"], "files": {"/etc/hosts": "2b"}, "size_mib": 8192}
    assert manifest.changes(INPUTS, new) == [
        "files: /etc/hosts",
        "packages: +perf -strace",
        "suite: bookworm -> trixie",
    ]
    assert manifest.changes(INPUTS, INPUTS) == []
    assert manifest.changes(None, INPUTS) == ["nothing in the cache yet"]
