"""xen9p cache: what it says of memory is so, and what it cannot do is one line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loopmount import MISSING, mounted, subvolume
from test_streams import forget
from xen9p import cli, page_cache, policy, prefetch
from xen9p.caching import Caching
from xen9p.loop import Loop
from xen9p.policy import Cache, Grant
from xen9p.prefetch import BLOCK, Profile
from xen9p.weights import Weights, join, low, protect, scope, start
from xen9p.xenbus import GuestId

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
MIB = 1 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A golden tree with two clones, and a shared directory; nothing of them is in memory."""
    with mounted(tmp_path_factory.mktemp("cache"), mib=300) as point:
        golden = subvolume(point / "golden")
        for name in ("lib", "other"):
            (golden / name).write_bytes(os.urandom(MIB))
        subprocess.run(["btrfs", "property", "set", golden, "ro", "true"], check=True, capture_output=True)
        for name in ("one", "two"):
            subprocess.run(["btrfs", "subvolume", "snapshot", golden, point / name], check=True, capture_output=True)
        (point / "home").mkdir()
        (point / "home/file").write_bytes(os.urandom(3 * MIB))
        subprocess.run(["sync", "-f", point], check=True)
        yield point


@pytest.fixture
def place(store: Path, tmp_path: Path) -> Path:
    """A policy file for it; nothing of the store is in memory."""
    for path in store.rglob("*"):
        if path.is_file():
            forget(path)
    names = ("one", "two", "home")
    exports = "".join(f'[exports.{name}]\npath = "{store / name}"\n' for name in names)
    rules = "".join(f'[[rules]]\nguest = "g-{name}"\nexport = "{name}"\n' for name in names)
    path = tmp_path / "policy.toml"
    path.write_text(f"version = 1\n{exports}{rules}")
    return path


def run(capsys: pytest.CaptureFixture[str], place: Path, *words: str) -> tuple[int, str, str]:
    """What the command gives, says, and complains of."""
    folders = ["--policy", str(place)] if words[0] != "learn" else []
    folders += ["--state-dir", str(place.parent / "state")] if words[0] != "learn" else []
    folders += ["--runtime-dir", str(place.parent)] if words[0] != "forget" else []
    code = cli.main(["cache", *words, *folders])
    done = capsys.readouterr()
    return code, done.out, done.err


def show(capsys: pytest.CaptureFixture[str], place: Path, *words: str) -> dict[str, Any]:
    code, out, _ = run(capsys, place, "show", "--json", *words)
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    return found


def test_what_is_in_memory(store: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [one["resident_bytes"] for one in show(capsys, place)["exports"]] == [0, 0, 0]
    with (store / "home/file").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(MIB)
        file.read(MIB)
    (home,) = show(capsys, place, "home", "--top", "3")["exports"]
    assert (home["files"], home["bytes"], home["resident_bytes"]) == (1, 3 * MIB, MIB)
    assert home["top"] == [{"path": "/file", "size": 3 * MIB, "resident": MIB}]
    assert home["given_to"] == ["g-home"]
    # To look brings nothing in, and both ways to look agree.
    with (store / "home/file").open("rb") as file:
        assert page_cache.resident(file.fileno(), 3 * MIB) == MIB
        assert sum(piece.count(1) for piece in page_cache.pages(file.fileno(), 3 * MIB)) * page_cache.PAGE == MIB


def test_clones_that_hold_the_same_file_twice(store: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (store / name / "lib").read_bytes()
    found = show(capsys, place)
    twice = {one["name"]: one["resident_twice_bytes"] for one in found["exports"]}
    assert sum(twice.values()) == MIB
    assert twice["home"] == 0
    (origin,) = found["origins"]
    assert (origin["path"], origin["resident_bytes"]) == (str(store / "golden"), 0)
    assert found["exports"][0]["image"] == found["exports"][1]["image"] == origin["image"]
    (store / "two/lib").touch()  # it is another file by now, as far as anybody can tell
    assert sum(one["resident_twice_bytes"] for one in show(capsys, place)["exports"]) == 0


def test_of_a_guest_a_file_and_profiles(store: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = show(capsys, place, "one", "--quick")["exports"][0]["image"]
    prefetch.save(place.parent / "state", image, Profile({b"lib": [(0, BLOCK)]}, "g1", 5, 2.0))
    (store / "home/file").read_bytes()
    found = show(capsys, place, "g-one", "--quick", "--file", str(store / "home/file"))
    assert [one["name"] for one in found["exports"]] == ["one"]
    assert found["files"] == [{"path": str(store / "home/file"), "bytes": 3 * MIB, "resident_bytes": 3 * MIB}]
    assert found["profiles"][0] | {"made": 0} == {
        "image": image, "guest": "g1", "made": 0, "seconds": 2.0, "files": 1, "bytes": BLOCK, "problem": None,
    }  # fmt: skip
    code, out, err = run(capsys, place, "show")
    assert code == 0
    assert image in out
    assert "xen9pd is not running" in err


def test_few_files_of_many(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = show(capsys, place, "one", "--most", "1")["exports"]
    assert (one["files"], one["complete"]) == (1, False)


def test_forgetting(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = show(capsys, place, "one", "--quick")["exports"][0]["image"]
    for what in (image, "two", "--all"):
        prefetch.save(place.parent / "state", image, Profile())
        code, out, _ = run(capsys, place, "forget", what)
        assert (code, out) == (0, f"forgotten: {image}\n")
        assert show(capsys, place, "--quick")["profiles"] == []
    assert run(capsys, place, "forget", "--all")[1] == "forgotten: nothing was known\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "nobody"], "unknown export or guest nobody"),
        (["show", "--quick", "--file", "/nowhere"], "/nowhere: No such file"),
        (["show", "--quick", "--file", "/dev/null"], "/dev/null is no file"),
        (["forget"], "say of what to forget"),
        (["forget", "one", "--all"], "say of what to forget"),
        (["forget", "home"], "of no image"),
        (["forget", "nothing"], "neither a uuid nor an export"),
        (["forget", "0b1c2d3e-0000-4000-8000-00000000000a"], "nothing is known of"),
        (["learn", "g1"], "xen9pd is not running"),
    ],
)
def test_bad_input_is_one_line(place: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    code, out, err = run(capsys, place, *words)
    assert (code, out) == (1, "")
    line = err.strip().splitlines()[-1]
    assert line.startswith("xen9p: error: ")
    assert said in line


# The supervisor's part.


def test_what_a_worker_is_told(store: Path, tmp_path: Path) -> None:
    caching = Caching(Loop(), tmp_path)
    grant = Grant("one", store / "one", "root", False, True, cache=Cache(prefetch=True, share=True, learn=9))
    plan = caching.plan(grant)
    assert plan["origin"] == str(store / "golden")
    assert (plan["cache"]["prefetch"], plan["cache"]["learn"], plan["cache"]["folder"]) == (True, 9, str(tmp_path))
    assert caching.plan(Grant("one", store / "one", "root", False, True)) == {}
    assert "origin" not in caching.plan(Grant("h", store / "home", "h", False, True, cache=Cache(share=True)))
    gone = Grant("h", store / "gone", "h", False, True, cache=Cache(prefetch=True))
    assert caching.plan(gone)["cache"]["image"] == ""


def test_what_a_worker_has_learned_is_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caching, who = Caching(Loop(), tmp_path), GuestId(1, "g1", "u")
    image = "0b1c2d3e-0000-4000-8000-00000000000a"
    good = Profile({b"a": [(0, BLOCK)]}, "g1", 1, 1.0)
    for bad in (
        {"image": image, "profile": {"format": 1}},
        {"image": "../../etc/passwd", "profile": good.plain()},
        {"image": "", "profile": good.plain()},
        {"image": image, "profile": good.plain() | {"files": [["../x", 0, 1]]}},
        {},
    ):
        caplog.clear()
        caching.learned(who, bad)
        assert "is not kept" in caplog.text
        assert list(tmp_path.iterdir()) == []
    caching.learned(who, {"image": image, "profile": good.plain()})
    assert prefetch.load(tmp_path, image) == good


def test_weights_as_systemd_is_asked_for_them() -> None:
    total = 16 << 30
    assert low(100, total) == 2 << 30
    assert low(200, total) == 4 << 30
    assert low(10_000, total) == 8 << 30  # no more than the slice has
    words = start("web 1/x", 7, 200, 4711, total)
    assert words[-2:] == ["true", "0"] or words[-1] == "0"
    assert "xen9p-web_1_x-7.scope" in words
    assert words[words.index("PIDs") + 1 : words.index("PIDs") + 4] == ["au", "1", "4711"]
    assert words[words.index("MemoryLow") + 2] == str(4 << 30)
    assert words[words.index("IOWeight") + 2] == "200"
    assert join("g1", 1, 5)[-4:] == [scope("g1", 1), "", "1", "5"]
    assert protect(total)[-1] == str(8 << 30)


def test_without_systemd_it_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several workers, one line, and everything else goes on."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nowhere")
    loop = Loop()
    weights = Weights(loop)
    for pid in (1, 2, 3):
        weights.set("g1", 1, 100, pid)
    for _ in range(200):
        if not weights._waiting:
            break
        loop.after(0.05, lambda: None)
        loop.step()
    assert not weights._waiting
    assert caplog.text.count("guests have no weights") == 1


def test_what_the_policy_may_say() -> None:
    text = 'version = 1\n[exports.e]\npath = "/e"\n[[rules]]\nguest = "g"\nexport = "e"\n'
    good = policy.parse(text + 'cache = {prefetch = true, share = true, streams = "4M", weight = 50, learn = 30}\n')
    (grant,) = good.resolve("g", "")
    assert grant.cache == Cache(True, True, 50, 30)
    assert dict(grant.terms.limits) == {"stream_bytes": 4 << 20}
    assert dict(policy.parse(text + "cache = {streams = false}\n").resolve("g", "")[0].terms.limits) == {
        "stream_bytes": 0
    }
    for bad, words in (
        ("cache = 5", "cache is 5"),
        ("cache = {prefetch = 1}", "cache.prefetch is 1"),
        ("cache = {prefech = true}", 'did you mean "prefetch"?'),
        ("cache = {weight = 0}", "cache.weight is 0"),
        ("cache = {streams = 5}", "cache.streams is 5"),
        ("cache = {learn = 1.5}", "cache.learn is 1.5"),
        ("cache = {options = {a = [1]}}", "cache.options is"),
    ):
        with pytest.raises(policy.PolicyError, match="rule 1: ") as caught:
            policy.parse(f"{text}{bad}\n")
        assert words in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(policy.PolicyError, match="cache_policy is"):
        policy.parse('cache_policy = "os.system"\n' + text)
