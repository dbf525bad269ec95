"""The commands: exit codes, one line for what is wrong, and what status looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from xen9p import cli, daemon, file_options, parser


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        ([], 2, "required: COMMAND"),
        (["frob"], 2, "invalid choice"),
        (["attach", "g1"], 2, "required: EXPORT"),
        (["serve", "--export", "/", "--tcp", "nowhere"], 2, "is not HOST:PORT"),
        (["serve", "--export", "/"], 2, "one of the arguments --unix --tcp is required"),
    ],
)
def test_wrong_usage(args: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == code
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert error.startswith("xen9p: error: ")


def test_each_command_has_its_options_alone_too(capsys: pytest.CaptureFixture[str]) -> None:
    """main() builds no more than the command that is asked for: it must be the same as among all."""
    everything = parser.build_parser()
    names = parser.names()
    assert names[-len(file_options.ADD) :] == tuple(file_options.ADD)
    assert {"status", "snapshot", "mount"} < set(names)
    for name in names:
        helps = []
        for built in (everything, parser.build_parser(name)):
            with pytest.raises(SystemExit):
                built.parse_args([name, "--help"])
            helps.append(capsys.readouterr().out)
        assert helps[0] == helps[1]
        assert helps[0].startswith(f"usage: xen9p {name} ")


def test_no_supervisor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--runtime-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("xen9p: error: xen9pd is not running")
    assert error.count("\n") == 1


def test_policy_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.toml"
    file.write_text(f'version = 1\n[exports.a]\npath = "{tmp_path}"\n')
    assert cli.main(["policy", "check", str(file)]) == 0
    assert "1 exports, 0 rules" in capsys.readouterr().out
    file.write_text('version = 1\n[exports.a]\npath = "x"\n[exports.b]\npath = "y"\n')
    assert cli.main(["policy", "check", str(file)]) == 78
    assert capsys.readouterr().err.count("xen9p: error: ") == 2
    assert cli.main(["policy", "check", str(tmp_path / "none")]) == 78
    assert daemon.main(["--policy", str(file), "--runtime-dir", str(tmp_path)]) == 78


def test_status_is_aligned() -> None:
    device = {
        "domid": 3,
        "devid": 0,
        "guest": "g1",
        "tag": "root",
        "export": "g1-root",
        "access": "rw",
        "state": "connected",
        "phase": "connected",
        "reason": "",
        "pid": 4711,
        "requests": 12345,
        "read_bytes": 5 << 20,
        "written_bytes": 17,
        "errors": 0,
        "fids": 9,
    }
    failed = {**device, "devid": 1, "tag": "home", "phase": "failed", "reason": "num-rings is 0", "pid": None}
    text = cli.status_text(
        {
            "host": {"xen": "4.17.5", "version": "0.1.0", "pid": 1, "policy": "/p", "rules": 2},
            "guests": [{"domid": 3, "name": "g1", "uuid": "u", "tags": ["home", "root"]}],
            "devices": [device, failed],
        }
    )
    lines = text.splitlines()
    assert lines[0].startswith("host    Xen 4.17.5")
    assert lines[1] == "guest   g1 (domain 3): home, root"
    assert lines[3].split()[:3] == ["DEVICE", "GUEST", "TAG"]
    assert " ".join(lines[4].split()) == "3/0 g1 root g1-root rw connected 4711 12345 5.0M 17B 0 9"
    assert lines[5].split()[5:] == ["failed"] + ["-"] * 6
    assert lines[6] == "failed  g1 home: num-rings is 0"
    assert len(lines[3]) == len(lines[4]) == len(lines[5])


@pytest.mark.parametrize(("count", "text"), [(0, "0B"), (1023, "1023B"), (1536, "1.5K"), (1 << 50, "1024.0T")])
def test_sizes(count: int, text: str) -> None:
    assert cli.size(count) == text
