"""The engine of the labs, with a lab that needs no Xen: real shells, a real btrfs, directories in place of machines."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import os
import re
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from labkit import course as courses
from labkit import grade, guide, lint, look, report, results, scaffold, setup, signing, spec, state, transport, values
from labkit.course import Course, Student
from labkit.errors import BusyError, LabError, SpecError, TamperedError
from labkit.grade import Graded
from labkit.look import Look, Verdict, failed, passed
from labkit.setup import Setup
from xen9p import policy

loopmount: Any = importlib.import_module("loopmount")  # of the package's tests, which mypy checks apart
MISSING: str = loopmount.MISSING
ROOT = Path(__file__).resolve().parents[2]
SAMPLES = Path(__file__).resolve().parent / "sample_labs"
SAMPLE = spec.load("sample", SAMPLES)
SEED = "5e" * 32
NAMES = ("ada", "bob", "cleo", "dan", "eve", "finn")
needs_btrfs = pytest.mark.skipif(bool(MISSING), reason=MISSING or "there")

Check = Callable[[Look], Verdict]


@dataclass
class Classroom:
    """Two hosts that share a btrfs, six students, each with a guest."""

    folder: Path
    course: Course
    file: Path

    def student(self, name: str = "ada") -> Student:
        return self.course.student(name)

    def system(self, name: str = "ada") -> transport.System:
        return transport.connect(self.student(name))

    def lab(self, name: str = "ada", lab: spec.Lab = SAMPLE) -> Setup:
        return Setup(lab, self.student(name), self.system(name), lambda _: None)

    def grade(self, name: str = "ada", checks: Mapping[str, Check] | None = None, **more: Any) -> Graded:
        return grade.grade(SAMPLE, self.student(name), self.system(name), course=self.course, checks=checks, **more)

    def follow(self, path: str, name: str = "ada") -> list[guide.Ran]:
        host = self.folder / self.student(name).host.name
        guest = self.student(name).guests[0]
        env = {"HOST": f"{host}/host", "GUEST": f"{host}/{guest}", "STUDENT": name}
        ran: list[guide.Ran] = []
        guide.follow(SAMPLE.read(path), path, self.system(name), env, ran.append)
        return ran

    def guest(self, name: str = "ada") -> Path:
        return self.folder / self.student(name).host.name / self.student(name).guests[0]

    def host(self, name: str = "ada") -> Path:
        return self.folder / self.student(name).host.name / "host"

    def work(self, name: str = "ada") -> Path:
        return self.host(name) / "root" / "labs" / name / "sample"

    def cli(self, *words: str, student: str | None = "ada") -> subprocess.CompletedProcess[str]:
        """The command, as it is run by hand, on the sample lab."""
        who = ["--student", student] if student else []
        command = [str(ROOT / "lab"), "--course", str(self.file), *who, *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "XEN9P_LABS": str(SAMPLES)}
        )


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with loopmount.mounted(tmp_path_factory.mktemp("labs"), mib=256) as store:
        yield store


@pytest.fixture
def room(disk: Path, tmp_path: Path) -> Iterator[Classroom]:
    document: dict[str, Any] = {"course": "os-course", "seed": SEED, "hosts": {}, "students": []}
    for host in ("north", "south"):
        document["hosts"][host] = {"local": str(tmp_path / host), "store": "/store"}
        (tmp_path / host / "host" / "root").mkdir(parents=True)
        store = disk / f"{tmp_path.name}-{host}"
        store.mkdir()
        (tmp_path / host / "host" / "store").symlink_to(store)
    for number, name in enumerate(NAMES):
        host = "north" if number < 3 else "south"
        document["students"].append({"name": name, "host": host, "guests": [f"g{number}"], "id": f"00{number}"})
        (tmp_path / host / f"g{number}" / "root").mkdir(parents=True)
    courses.write(tmp_path / "course.yml", document)
    room = Classroom(tmp_path, courses.load(tmp_path / "course.yml"), tmp_path / "course.yml")
    yield room
    listed = subprocess.run(["btrfs", "subvolume", "list", "-o", disk], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        subprocess.run(["btrfs", "-q", "subvolume", "delete", disk / line.split()[-1]], check=True, capture_output=True)


def statuses(done: Graded) -> dict[str, str]:
    return {outcome.name: outcome.status for outcome in done.outcomes}


def runs(pid: int) -> bool:
    """Whether a process is there, and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def only(check: Check, name: str = "touched") -> dict[str, Check]:
    """The lab's checks with one of them exchanged; the others pass."""
    return {c.name: check if c.name == name else lambda _: passed() for c in SAMPLE.checks}


# What every lab is tested by, here with the sample.


@needs_btrfs
def test_untouched_is_0_the_solution_100_and_each_wrong_turn_its_own(room: Classroom) -> None:
    made = room.lab()
    assert made.start() is True
    assert room.grade().score == 0
    for wrong in SAMPLE.wrong:
        made.reset()
        state.forget(room.system(), room.student(), "sample")
        made.start()
        if wrong.after == "solution":
            room.follow("solution/steps.md")
        room.follow(f"wrong/{wrong.name}.md")
        assert room.grade().score == wrong.score, wrong.name
    made.reset()
    room.follow("solution/steps.md")
    assert room.grade().score == 100


@needs_btrfs
def test_the_guide_runs_as_printed_in_shells_that_stay(room: Classroom) -> None:
    room.lab().start()
    ran = room.follow("guide.md")
    assert [r.block.place for r in ran] == ["host", "host", "host", "guest"]
    broken = SAMPLE.read("guide.md").replace('test -n "$mine"', 'test -z "$mine"; true')
    with pytest.raises(LabError, match="sample:11: on host failed"):
        guide.follow(broken, "sample", room.system(), {}, lambda _: None)
    with pytest.raises(LabError, match="was meant to fail and did not"):
        guide.follow("```console host fails\ntrue\n```\n", "sample", room.system(), {}, lambda _: None)


def test_a_block_without_a_place_is_named() -> None:
    with pytest.raises(SpecError, match="guide:3: ```console needs a place"):
        guide.blocks("\n\n```console\nls\n```\n", "guide")
    with pytest.raises(SpecError, match="guide:1: this block has no end"):
        guide.blocks("```console host\nls\n", "guide")


# Reset.


@needs_btrfs
def test_a_mount_point_of_before_is_no_part_of_the_start(room: Classroom, tmp_path: Path) -> None:
    """Nobody has made it anew when a reset has taken it away."""
    point = tmp_path / "mounted"
    point.mkdir()
    made = room.lab()
    made.lab = dataclasses.replace(made.lab, mounts=(str(point),))
    made.start()
    assert not point.exists()
    point.mkdir()
    made.reset()
    assert not point.exists()


@needs_btrfs
def test_a_reset_brings_everything_back(room: Classroom) -> None:
    made = room.lab()
    made.start()
    before = made._manifest()
    room.follow("solution/steps.md")
    part = room.host() / "store" / "labs" / "ada" / "sample"
    (part / "own" / "long").write_text("short")
    os.setxattr(part / "own", "user.new", b"1")
    (part / "new").mkdir()
    (room.work() / "more").write_text("x")
    (room.guest() / "root" / "labs" / "ada" / "sample" / "README").unlink()
    shell = ". lab-values sample; sleep 600 > /dev/null 2>&1 < /dev/null & echo $!"
    pid = int(room.system().run("host", shell).out)
    changed = setup.differences(before, made._manifest())
    assert any("own/long" in line for line in changed)
    assert any("user.new" in line for line in changed)
    assert any("README" in line for line in changed)
    made.reset()
    assert setup.differences(before, made._manifest()) == []
    assert not runs(pid)
    assert not (part / "new").exists()


@needs_btrfs
@pytest.mark.parametrize("left", ["sample.new", "sample.old"])
def test_a_reset_that_was_cut_off_is_done_anew(room: Classroom, left: str) -> None:
    made = room.lab()
    made.start()
    part = room.host() / "store" / "labs" / "ada" / "sample"
    subprocess.run(["btrfs", "-q", "subvolume", "snapshot", part, part.with_name(left)], check=True)
    (part / "own" / "more").write_text("x")
    if left == "sample.old":
        subprocess.run(["btrfs", "-q", "subvolume", "delete", part], check=True)
    made.reset()
    assert not (part / "own" / "more").exists()
    assert [path.name for path in part.parent.iterdir()] == ["sample"]


@needs_btrfs
def test_a_reset_that_was_cut_off_without_the_folder_is_done_anew(room: Classroom) -> None:
    """What a lab takes away itself needs the values, and their file went with the folder."""
    lab = dataclasses.replace(SAMPLE, reset={"host": 'rm -f "$ROOT/root/made-by-$file"'})
    made = room.lab(lab=lab)
    made.start()
    (room.host() / "root" / f"made-by-{setup.values_of(lab, room.student())['file']}").write_text("x")
    (room.work() / "values").unlink()
    made.reset()
    assert not list((room.host() / "root").glob("made-by-*"))


@needs_btrfs
def test_what_a_reset_leaves_is_said(room: Classroom) -> None:
    """Somewhere that only `left` of lab.yml knows of."""
    lab = dataclasses.replace(SAMPLE, left={"host": 'ls "$ROOT/root"'})
    made = room.lab(lab=lab)
    made.start()
    (room.host() / "root" / "forgotten").write_text("x")
    with pytest.raises(LabError, match="left something: left over: host left forgotten"):
        made.reset()


@needs_btrfs
def test_the_end_leaves_points_and_nothing_else(room: Classroom) -> None:
    room.lab().start()
    room.follow("solution/steps.md")
    room.grade()
    assert room.cli("end", "sample").returncode == 0
    assert list((room.host() / "store" / "labs" / "ada").iterdir()) == []
    assert not room.work().exists()
    assert room.lab().start() is True
    done = room.grade()
    assert (done.score, {o.name: o.achieved for o in done.outcomes}["copied"]) == (20, 40)


@needs_btrfs
def test_a_second_start_leaves_the_work_alone(room: Classroom) -> None:
    made = room.lab()
    made.start()
    room.follow("solution/steps.md")
    assert made.start() is False
    assert room.grade().score == 100


@needs_btrfs
def test_the_times_of_a_start_can_be_brought_back_in_a_guest(room: Classroom) -> None:
    """Linux's 9P client sets whole seconds alone."""
    made = room.lab()
    made.start()
    files = [path for path in (room.host() / "store/labs/ada/sample").rglob("*") if path.is_file()]
    assert files
    assert all(path.stat().st_mtime_ns % 1_000_000_000 == 0 for path in files)


@needs_btrfs
def test_a_start_that_was_cut_off_is_done_anew(room: Classroom) -> None:
    made = room.lab()
    made.start()
    base = room.host() / "store" / "labs"
    subprocess.run(["btrfs", "-q", "subvolume", "delete", base / ".start" / "ada" / "sample"], check=True)
    (base / "ada" / "sample" / "own" / "half").write_text("x")
    state.forget(room.system(), room.student(), "sample")
    assert made.start() is True
    assert not (base / "ada" / "sample" / "own" / "half").exists()


def test_a_reset_of_what_was_not_started_and_a_store_that_is_none(tmp_path: Path) -> None:
    document = {
        "course": "x",
        "seed": SEED,
        "hosts": {"h": {"local": str(tmp_path), "store": "/store"}},
        "students": [{"name": "ada", "host": "h", "guests": ["g1"]}],
    }
    for path in ("host/root", "host/store", "g1/root"):
        (tmp_path / path).mkdir(parents=True)
    student = courses.from_document(document).student("ada")
    made = Setup(SAMPLE, student, transport.connect(student), lambda _: None)
    with pytest.raises(LabError, match="has not started lab sample"):
        made.reset()
    with pytest.raises(LabError, match="is no btrfs"):
        made.start()


# What is no wrong answer.


def crash(_: Look) -> Verdict:
    return failed("", 1 // 0)


def leave(_: Look) -> Verdict:
    os._exit(7)


def hang(_: Look) -> Verdict:
    while True:
        pass


def hang_there(look: Look) -> Verdict:
    look.run("host", "sleep 60")
    return passed()


def elsewhere(look: Look) -> Verdict:
    look.read("guest9", "x")
    return passed()


def nonsense(_: Look) -> Any:
    return True


@needs_btrfs
@pytest.mark.parametrize(
    ("check", "status", "said"),
    [
        (crash, "error", "ZeroDivisionError"),
        (leave, "error", "ended with 7"),
        (hang, "error", "no end within"),
        (nonsense, "error", "which is no verdict"),
        (hang_there, "unreachable", "no end within"),
        (elsewhere, "error", "has no guest9"),
    ],
    ids=["crash", "exit", "hang", "nonsense", "slow host", "no such place"],
)
def test_a_broken_check_is_no_wrong_answer(
    room: Classroom, check: Check, status: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.lab().start()
    room.follow("solution/steps.md")
    assert room.grade().score == 100
    quick = dataclasses.replace(
        SAMPLE, checks=tuple(dataclasses.replace(c, seconds=1.0, counts="now") for c in SAMPLE.checks)
    )
    monkeypatch.setattr(grade, "GRACE", 0.5)
    done = grade.grade(quick, room.student(), room.system(), course=room.course, checks=only(check))
    outcome = next(o for o in done.outcomes if o.name == "touched")
    assert outcome.status == status
    assert said in outcome.trouble + outcome.found
    assert (outcome.points, done.undecided) == (0, 20)
    assert outcome.achieved == 20, "what was achieved is not lost"
    made = results.make(SAMPLE, room.student(), room.course, done)
    assert made["complete"] is False
    assert "000" not in results.moodle([made], room.course, "T"), "no grade is given, and none that is there is deleted"
    assert any(said in note for note in made["instructor"]) or status == "unreachable"


@needs_btrfs
def test_machines_that_are_off(room: Classroom) -> None:
    room.lab().start()
    room.follow("solution/steps.md")
    room.guest().rename(room.guest().with_name("off"))
    done = room.grade()
    assert statuses(done) == {"secret": "passed", "copied": "unreachable", "touched": "passed"}
    assert (done.score, done.undecided) == (60, 40)
    room.guest().with_name("off").rename(room.guest())
    assert room.grade().score == 100

    room.host().rename(room.host().with_name("away"))
    said = room.cli("check", "sample")
    room.host().with_name("away").rename(room.host())
    assert said.returncode == 69
    assert len(said.stderr.splitlines()) == 1
    assert "does not answer" in said.stderr
    assert room.grade().score == 100


@needs_btrfs
def test_a_full_disk_costs_no_points(room: Classroom) -> None:
    big = dataclasses.replace(SAMPLE, store_size=1 << 20)
    with pytest.raises(LabError, match=r"MiB free, this lab needs 1048576"):
        room.lab(lab=big).start()
    kept = room.host() / "var"
    kept.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", kept], check=True)
    try:
        room.lab().start()
        room.follow("solution/steps.md")
        assert room.grade().score == 100
        with suppress(OSError), (kept / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        said = room.cli("check", "sample")
        assert said.returncode == 1
        assert len(said.stderr.splitlines()) == 1, said.stderr
        assert "full" in said.stderr or "No space left" in said.stderr
        (kept / "filler").unlink()
        assert room.grade().kept.achieved.keys() == {"secret", "copied", "touched"}
    finally:
        subprocess.run(["umount", "-l", kept], check=True)


@needs_btrfs
def test_a_broken_answers_file_is_no_wrong_answer(room: Classroom) -> None:
    room.lab().start()
    (room.work() / "answers").write_bytes(b"what is this\n")
    done = room.grade()
    assert statuses(done) == {"secret": "unreachable", "copied": "unreachable", "touched": "failed"}
    assert done.undecided == 80
    assert "line 1 of your answers is 'what is this'" in done.outcomes[0].found


def test_answers_are_lines() -> None:
    assert look.parse_answers(b'# no\n\na=1\nb = two words \na="3"\n') == {"a": "3", "b": "two words"}
    for raw in (b"\xff\xfe", b"A=1", b"nothing"):
        with pytest.raises(LabError):
            look.parse_answers(raw)


@needs_btrfs
def test_a_check_after_one_that_failed_is_not_tried(room: Classroom) -> None:
    room.lab().start()
    done = room.grade()
    copied = next(o for o in done.outcomes if o.name == "copied")
    assert (copied.status, copied.parent, done.undecided) == ("not_tried", "secret", 0)


@needs_btrfs
def test_one_check_brings_what_it_needs(room: Classroom) -> None:
    room.lab().start()
    assert set(statuses(room.grade(only="copied"))) == {"secret", "copied"}
    with pytest.raises(LabError, match="has no check nothing"):
        room.grade(only="nothing")


# Points.


@needs_btrfs
def test_now_and_once(room: Classroom) -> None:
    room.lab().start()
    room.follow("solution/steps.md")
    room.grade()
    (room.host() / "store/labs/ada/sample/own/touched").unlink()
    (room.guest() / "root/labs/ada/sample/copy").unlink()
    done = {o.name: o for o in room.grade().outcomes}
    assert (done["touched"].points, done["touched"].achieved, done["touched"].counted) == (0, 20, 20)
    assert (done["copied"].points, done["copied"].achieved, done["copied"].counted) == (0, 40, 0)


@needs_btrfs
def test_hints_cost_what_they_say_and_ask_before(room: Classroom) -> None:
    room.lab().start()
    room.follow("solution/steps.md")
    assert "1. Look into the part" in room.cli("hint", "sample", "secret").stdout
    assert "costs 10 of 40" in room.cli("hint", "sample", "secret").stdout
    assert room.grade().score == 100
    assert "2. It stands" in room.cli("hint", "sample", "secret", "--yes").stdout
    assert room.grade().score == 90
    assert "no more hints" in room.cli("hint", "sample", "secret", "--yes").stdout
    assert room.grade().score == 90


# Secrets, and the answers of others.


@needs_btrfs
def test_no_output_has_the_hidden_value(room: Classroom, tmp_path: Path) -> None:
    room.lab().start()
    secret = str(setup.values_of(SAMPLE, room.student())["secret"])

    def tell(look: Look) -> Verdict:
        return failed(f"the answer {look.values['secret']}", f"not {look.values['secret']}.")

    done = room.grade(checks=only(tell, "secret"))
    made = results.make(SAMPLE, room.student(), room.course, done)
    assert "would have told the hidden value secret" in made["instructor"][0]
    shown = [results.dump(made), results.junit([made]), report.student_page(made)]
    shown.append(report.class_page([made], NAMES, "Sample"))
    for answer in ("", "secret=wrong"):
        (room.work() / "answers").write_text(answer + "\n")
        for words in (["check", "sample"], ["grade", "sample", "--out", str(tmp_path / "out")], ["progress"]):
            said = room.cli(*words)
            assert said.returncode in (0, 1), said.stderr
            shown += [said.stdout, said.stderr]
    shown += [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    shown += [(room.work() / "values").read_text(), guide.page(SAMPLE)]
    assert len(shown) > 12
    for text in shown:
        assert secret not in text
    (room.work() / "answers").write_text(f"secret={secret}\n")
    assert statuses(room.grade())["secret"] == "passed"


@needs_btrfs
def test_an_answer_of_another_student_is_told_to_the_instructor(room: Classroom) -> None:
    room.lab().start()
    of_bob = setup.values_of(SAMPLE, room.student("bob"))["secret"]
    (room.work() / "answers").write_text(f"secret={of_bob}\n")
    done = room.grade()
    assert done.score == 0
    assert done.notes == ["secret: the answer would be right for secret: bob"]
    made = results.make(SAMPLE, room.student(), room.course, done)
    assert "bob" in report.class_page([made], ["ada"], "Sample")
    assert "bob" not in report.student_page(made)
    assert "bob" not in room.cli("check", "sample").stdout
    (room.work() / "answers").write_text("secret=somewhat-else-1\n")
    assert room.grade().notes == []


def test_values_are_of_the_course_the_student_and_the_lab() -> None:
    keys = {name: values.student_key(bytes.fromhex(SEED), name) for name in NAMES}
    assert len({str(values.generate(SAMPLE.values, key, "sample")) for key in keys.values()}) == len(NAMES)
    one = values.generate(SAMPLE.values, keys["ada"], "sample")
    assert one == values.generate(SAMPLE.values, keys["ada"], "sample")
    assert one["secret"] != values.generate(SAMPLE.values, keys["ada"], "another")["secret"]
    assert one["secret"] != values.generate(SAMPLE.values, values.student_key(b"other", "ada"), "sample")["secret"]


@pytest.mark.parametrize(
    ("kind", "options", "holds"),
    [
        ("int", {"min": 3, "max": 11, "step": 4}, lambda v: v in (3, 7, 11)),
        ("choice", {"of": ["a", "b"]}, lambda v: v in ("a", "b")),
        ("size", {"min": 4096, "max": 8192}, lambda v: 4096 < v < 3 * 4096 and v % 4096),
        ("offset", {"max": 65536, "align": 4096}, lambda v: v % 4096 == 0 and 0 <= v <= 65536),
        ("tag", {}, lambda v: re.fullmatch(r"[a-z]+\d\d", v)),
        ("word", {}, lambda v: re.fullmatch(r"[a-z]+-[a-z]+-\d{4}", v)),
        ("uid", {}, lambda v: 20000 <= v <= 59999),
        ("content", {"lines": 2}, lambda v: len(v.splitlines()) == 2),
    ],
)
def test_each_generator_keeps_its_range_and_uses_it(
    kind: str, options: dict[str, Any], holds: Callable[[Any], Any]
) -> None:
    spec_ = values.ValueSpec("v", kind, options, False, "")
    made = {values.generate([spec_], bytes([n]), "lab")["v"] for n in range(100)}
    assert all(holds(value) for value in made), made
    assert len(made) == min(len(made), 100) > 1
    assert set(values.GENERATORS) == set(spec.schema("lab")["$defs"]["value"]["properties"]["type"]["enum"])


# One at a time, and nothing by hand.


@needs_btrfs
def test_a_second_run_at_the_same_time_is_refused(room: Classroom) -> None:
    room.lab().start()
    with state.held(room.system(), room.student(), "sample", seconds=60):
        for words in (["check", "sample"], ["reset", "sample"], ["start", "sample"]):
            said = room.cli(*words)
            assert said.returncode == BusyError.exit_code
            assert len(said.stderr.splitlines()) == 1
            assert "is being worked on by" in said.stderr
        assert room.cli("start", "sample", student="bob").returncode == 0, "others are not concerned"
    assert room.grade().score == 0


@needs_btrfs
def test_the_lock_of_a_run_that_was_killed_ends(room: Classroom) -> None:
    room.lab().start()
    with state.held(room.system(), room.student(), "sample", seconds=-1):
        assert room.grade().score == 0


@needs_btrfs
def test_a_run_in_the_middle_of_another_is_refused(room: Classroom) -> None:
    """Not with the lock alone, but with two commands."""
    room.lab().start()

    def slow(look: Look) -> Verdict:
        said = room.cli("check", "sample")
        return failed(f"{said.returncode}", said.stderr)

    done = room.grade(checks=only(slow))
    outcome = next(o for o in done.outcomes if o.name == "touched")
    assert outcome.expected == str(BusyError.exit_code), outcome.found


@needs_btrfs
def test_points_by_hand_do_not_count(room: Classroom) -> None:
    room.lab().start()
    room.grade()
    file = room.host() / "var/lib/xen9p/labs/ada/sample.json"
    document = json.loads(file.read_text())
    document["kept"]["achieved"] = {"touched": {"points": 20.0, "at": 0}}
    file.write_text(json.dumps(document))
    with pytest.raises(TamperedError):
        room.grade()
    assert room.cli("start", "sample", "--forget").returncode == 0
    assert room.grade().score == 0
    # Another student's file is signed, and not for this one.
    room.lab("bob").start()
    file.write_bytes((room.host() / "var/lib/xen9p/labs/bob/sample.json").read_bytes())
    with pytest.raises(TamperedError):
        room.grade()


@needs_btrfs
def test_results_are_signed(room: Classroom, tmp_path: Path) -> None:
    room.lab().start()
    made = results.make(SAMPLE, room.student(), room.course, room.grade())
    path = tmp_path / "ada.json"
    path.write_text(results.dump(made))
    assert results.read(path, room.course) == made
    for change in ({"score": 100}, {"student": "bob"}, {"signature": "0" * 64}, {"signed_by": "student"}):
        path.write_text(json.dumps({**made, **change}))
        with pytest.raises(TamperedError):
            results.read(path, room.course)
    path.write_text("{}")
    with pytest.raises(LabError, match="is a required property"):
        results.read(path, room.course)


@needs_btrfs
def test_a_students_own_file_signs_as_the_student(room: Classroom, tmp_path: Path) -> None:
    room.lab().start()
    room.follow("solution/steps.md")
    document = courses.handout(room.course, "ada")
    assert SEED not in str(document)
    document["hosts"] = {"host": {"local": str(tmp_path / "north"), "store": "/store"}}
    document["students"][0]["guests"] = ["g0"]
    own = courses.from_document(document)
    assert own.student("ada").key == room.student().key
    done = grade.grade(SAMPLE, own.student(None), room.system(), course=own)
    made = results.make(SAMPLE, own.student(None), own, done)
    assert (made["signed_by"], made["score"]) == ("student", 100)
    assert "instructor" not in made
    path = tmp_path / "ada.json"
    path.write_text(results.dump(made))
    assert room.cli("collect", "sample", str(path), "--out", str(tmp_path / "out"), student=None).returncode == 0
    assert "ada" in (tmp_path / "out/sample/class.html").read_text()
    path.write_text(results.dump(signing.sign({**made, "score": 50}, room.student("bob").key)))
    said = room.cli("collect", "sample", str(path), "--out", str(tmp_path / "out"), student=None)
    assert said.returncode == 1
    assert "is not what was signed" in said.stderr


# A class.


@needs_btrfs
def test_six_students_on_two_hosts(room: Classroom, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = room.cli("start", "sample", "--all", student=None)
    assert said.returncode == 0
    assert [line.split(": ", 1)[1] for line in said.stdout.splitlines()] == ["started"] * len(NAMES)
    for name in ("ada", "eve"):
        room.follow("solution/steps.md", name)
    room.guest("finn").rename(room.guest("finn").with_name("off"))
    # As the playbook does it: both hosts at the same time.
    with ThreadPoolExecutor() as pool:
        words = ("grade", "sample", "--all", "--out", str(out), "--host")
        both = list(pool.map(lambda host: room.cli(*words, host, student=None), ("north", "south")))
    assert [said.returncode for said in both] == [0, 0], "that a check before the dead guest's failed decides it"
    assert all("[3/3," in said.stdout for said in both)
    assert {path.name for path in (out / "sample").iterdir()} == {
        *(f"{name}.{kind}" for name in NAMES for kind in ("json", "xml", "html")),
        "class.html",
        "class.xml",
        "moodle.csv",
        "canvas.csv",
    }
    assert room.cli("grade", "sample", "--all", "--host", "west", student=None).returncode == 1
    room.guest("eve").rename(room.guest("eve").with_name("off-too"))
    assert room.cli("grade", "sample", "--all", "--host", "south", "--out", str(out), student=None).returncode == 69
    assert json.loads((out / "sample" / "eve.json").read_text())["undecided"] == 40
    assert "eve" not in (out / "sample/canvas.csv").read_text()
    room.guest("eve").with_name("off-too").rename(room.guest("eve"))
    assert room.cli("grade", "sample", "--out", str(out), student="eve").returncode == 0
    files = [str(out / "sample" / f"{name}.json") for name in NAMES]
    assert room.cli("collect", "sample", *files, "--out", str(out), student=None).returncode == 0
    scores = {name: json.loads((out / "sample" / f"{name}.json").read_text())["score"] for name in NAMES}
    assert scores == {"ada": 100, "bob": 0, "cleo": 0, "dan": 0, "eve": 100, "finn": 0}
    rows = list(csv.DictReader((out / "sample/moodle.csv").open()))
    assert {row["ID number"]: row["Sample"] for row in rows}["000"] == "100"
    canvas = list(csv.reader((out / "sample/canvas.csv").open()))
    assert canvas[0] == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "Sample"]
    assert canvas[1][0].strip() == "Points Possible"
    assert {row[3]: row[5] for row in canvas[2:]}["eve"] == "100"
    suites = ET.fromstring((out / "sample/class.xml").read_text())
    assert {suite.get("name"): suite.get("failures") for suite in suites}["ada.sample"] == "0"
    page = (out / "sample/class.html").read_text()
    for name in NAMES:
        assert name in page


def play(playbook: str, inventory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a playbook of the repository."""
    command = [str(ROOT / ".venv/bin/ansible-playbook"), "-i", str(inventory), f"playbooks/{playbook}.yml", *words]
    env = {**os.environ, "XEN9P_LABS": str(SAMPLES), "ANSIBLE_FORCE_COLOR": "false"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)


@needs_btrfs
def test_the_playbooks_start_grade_and_reset_a_class(room: Classroom, tmp_path: Path) -> None:
    inventory = tmp_path / "inventory" / "hosts.yml"
    inventory.parent.mkdir()
    hosts = {}
    for host in ("north", "south"):
        mine = [s for s in room.course.students if s.host.name == host]
        hosts[host] = {
            "lab_local": str(tmp_path / host),
            "store_mount": "/store",
            "guest_guests": [{"name": s.guests[0], "address": f"10.9.0.{n}"} for n, s in enumerate(mine, 11)],
            "lab_students": [{"name": s.name, "guests": list(s.guests)} for s in mine],
        }
    common = {"lab_dir": str(tmp_path / "labs"), "lab_seed_file": str(tmp_path / "seed"), "lab_course": "os"}
    inventory.write_text(json.dumps({"all": {"vars": common, "children": {"xen_hosts": {"hosts": hosts}}}}))

    first = play("lab", inventory, "-e", "lab=sample")
    assert first.returncode == 0, first.stdout
    again = play("lab", inventory, "-e", "lab=sample")
    assert re.findall(r"^(?:north|south) .* changed=(\d)", again.stdout, re.M) == ["0", "0"], again.stdout
    seed = (tmp_path / "seed").read_text()
    room.course = courses.load(tmp_path / "labs" / "course.yml")
    room.follow("solution/steps.md", "eve")
    graded = play("grade", inventory, "-e", "lab=sample")
    assert graded.returncode == 0, graded.stdout
    folder = tmp_path / "labs" / "results" / "sample"
    scores = {name: results.read(folder / f"{name}.json", room.course)["score"] for name in NAMES}
    assert scores == {**dict.fromkeys(NAMES, 0), "eve": 100}
    assert (folder / "class.html").exists()
    reset = play("reset", inventory, "-e", "lab=sample")
    assert reset.returncode == 0, reset.stdout
    assert statuses(room.grade("eve")) == {"secret": "failed", "copied": "not_tried", "touched": "failed"}
    assert (tmp_path / "seed").read_text() == seed


@needs_btrfs
def test_pages_load_nothing_and_escape_what_students_write(room: Classroom) -> None:
    room.lab().start()
    (room.work() / "answers").write_text("secret=<script>alert(1)</script>\n")
    made = results.make(SAMPLE, room.student(), room.course, room.grade())
    for page in (report.student_page(made), report.class_page([made], NAMES, "Sample")):
        ET.fromstring(re.search(r"<svg.*?</svg>", page, re.S)[0])  # type: ignore[index]
        assert "<script" not in page
        assert not re.search(r"(?:src|href)=|url\(|@import|https?:", page)
        assert "prefers-color-scheme: dark" in page
    assert "&lt;script&gt;" in report.student_page(made)


@needs_btrfs
def test_where_to_read_on_is_a_link_to_the_site(room: Classroom) -> None:
    room.lab().start()
    at = "https://labs.example.org/"
    made = results.make(SAMPLE, room.student(), dataclasses.replace(room.course, site=at), room.grade())
    assert f'href="{at}getting-started.html#files-from-both-sides"' in report.student_page(made)
    assert "docs/getting-started.md#files-from-both-sides" in room.cli("check", "sample").stdout


def class_of(*students: dict[str, str]) -> courses.Course:
    """A course with these students."""
    document = {"course": "c", "seed": "5e" * 32, "hosts": {"h": {"address": "192.0.2.1"}}}
    return courses.from_document(
        {**document, "students": [{"host": "h", "guests": [f"g{n}"], **one} for n, one in enumerate(students)]}
    )


def test_cells_are_no_formulas() -> None:
    made = {"student": "ada", "complete": True, "score": 5.5}
    text = results.canvas([made], class_of({"name": "ada", "full_name": "=1+1"}), "T")
    assert list(csv.reader(text.splitlines()))[2][0] == "'=1+1"


def test_who_has_no_grade_has_no_line_that_would_delete_one() -> None:
    both = [
        {"student": "bob", "id": "5", "complete": True, "score": 80.0},
        {"student": "ada", "complete": False, "score": 40.0},
    ]
    mine = class_of({"name": "ada", "id": "5", "email": "ada@example.org"}, {"name": "bob", "id": "7"})
    assert results.moodle(both, mine, "T") == "ID number,Email address,T\n7,,80\n", "Bob says that he is Ada"
    assert results.canvas(both, mine, "T").splitlines()[1:] == ["    Points Possible,,,,,100", "bob,,7,bob,,80"]
    for text, lines in ((results.canvas([], mine, "T"), 2), (results.moodle([], mine, "T"), 1)):
        assert [line.count(",") for line in text.splitlines()] == [text.splitlines()[0].count(",")] * lines


@needs_btrfs
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lab": "other"}, "are of lab other"),
        ({"possible": 99}, "are not those of lab sample"),
        ({"score": 100}, "do not add up"),
        ({"checks": []}, "are not those of lab sample"),
    ],
)
def test_what_does_not_add_up_is_not_taken_in(room: Classroom, change: dict[str, Any], says: str) -> None:
    room.lab().start()
    made = results.make(SAMPLE, room.student(), room.course, room.grade())
    results.check_fit(made, SAMPLE)
    with pytest.raises(LabError, match=says):
        results.check_fit({**made, **change}, SAMPLE)


@needs_btrfs
def test_an_ended_lab_keeps_its_last_points(room: Classroom) -> None:
    room.lab().start()
    room.follow("solution/steps.md")
    assert room.grade().score == 100
    room.lab().end()
    with pytest.raises(LabError, match="has ended lab sample"):
        room.grade()
    assert state.load(room.system(), room.student(), SAMPLE.name).last["score"] == 100


@needs_btrfs
def test_the_instructors_own_grading_is_not_replaced(room: Classroom, tmp_path: Path) -> None:
    room.lab().start()
    out = tmp_path / "out"
    assert room.cli("grade", "sample", "--out", str(out)).returncode == 0
    own = (out / "sample/ada.json").read_text()
    alone = dataclasses.replace(room.course, seed=None)
    room.follow("solution/steps.md")
    theirs = tmp_path / "theirs.json"
    theirs.write_text(results.dump(results.make(SAMPLE, room.student(), alone, room.grade())))
    said = room.cli("collect", "sample", str(theirs), "--out", str(out), student=None)
    assert (said.returncode, said.stderr.count("\n")) == (1, 1)
    assert "ada was graded by you" in said.stderr
    assert (out / "sample/ada.json").read_text() == own
    (out / "sample/ada.json").unlink()
    assert room.cli("collect", "sample", str(theirs), "--out", str(out), student=None).returncode == 0


def test_a_seats_file_has_the_students_guests_and_key_alone() -> None:
    document = {
        "course": "c",
        "seed": "5e" * 32,
        "hosts": {"h": {"address": "192.0.2.1", "guests": {"a1": "10.9.0.11", "b1": "10.9.0.12"}}},
        "students": [{"name": "ada", "host": "h", "guests": ["a1"]}, {"name": "bob", "host": "h", "guests": ["b1"]}],
    }
    whole = courses.from_document(document)
    mine = courses.parse(courses.handout(whole, "ada", seat=True), "ada.yml")
    assert (mine.seed, [s.name for s in mine.students]) == (None, ["ada"])
    assert mine.student(None).key == whole.student("ada").key
    assert mine.student(None).host.address == "192.0.2.1"
    assert mine.student(None).host.guests == (("a1", "10.9.0.11"),)
    testbed = {**document, "hosts": {"h": {"ssh_config": "x"}}}
    with pytest.raises(LabError, match="has no address"):
        courses.handout(courses.from_document(testbed), "ada", seat=True)


# Folders.


@pytest.mark.parametrize("name", spec.names())
def test_every_lab_is_in_order(name: str) -> None:
    assert lint.problems(name) == []


def test_no_two_labs_want_the_same_tag() -> None:
    """They may be on a host at the same time, and a guest has a tag once."""
    owner: dict[str, str] = {}
    for name in spec.names():
        for tag in {export.tag for export in spec.load(name).exports if export.attach != "none"}:
            assert owner.setdefault(tag, name) == name, f"tag {tag}"
    assert len(owner) > 6


def test_a_new_lab_is_in_order(tmp_path: Path) -> None:
    scaffold.make("my-lab", tmp_path)
    assert lint.problems("my-lab", tmp_path) == []
    with pytest.raises(LabError, match="there is a my-lab already"):
        scaffold.make("my-lab", tmp_path)
    with pytest.raises(LabError, match="is no name for a lab"):
        scaffold.make("My Lab", tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("lab.yml", "points: 60", "points: 50", "add up to 90"),
        ("lab.yml", "minutes: 60", "minutes: long", "minutes: 'long' is not of type 'integer'"),
        ("lab.yml", "title: My lab", "titel: My lab", "'titel' was unexpected"),
        ("lab.yml", "title: My lab", "title: [", "line"),
        ("lab.yml", "needs: [code]", "needs: [later]", "needs later, which is no check above it"),
        ("lab.yml", "cost: 10", "cost: 60", "its hints cost all of its points"),
        ("lab.yml", "getting-started.md#attach", "nothing.md#attach", "nothing.md, which is no page"),
        ("lab.yml", "#attach-a-device-by-hand", "#nowhere", "has no heading #nowhere"),
        ("lab.yml", "type: word", "type: choice, of: [1, 2]", "2 different values are few"),
        ("lab.yml", "own/${file}", "own/${nothing}", "asks for the value 'nothing'"),
        ("lab.yml", "own/${file}", "../${file}", "leads out of the student's part"),
        ("lab.yml", "name: guessed", "name: other", "wrong/other.md is missing"),
        ("checks.py", "def mounted", "def moved", "has no function mounted"),
        ("checks.py", "def mounted", "def mounted(", "SyntaxError"),
        ("guide.md", "```console guest", "```console", "needs a place"),
        ("guide.md", "```console guest", "```console guest2", "guest2, and the lab has 1 guests"),
        ("guide.md", "## Background", "# Background", "a title of its own"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path, file: str, old: str, new: str, says: str) -> None:
    folder = scaffold.make("my-lab", tmp_path)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    found = lint.problems("my-lab", tmp_path)
    assert any(says in line for line in found), found
    assert all("\n" not in line for line in found)


def _ada() -> Student:
    """The one student of a course, with guest g7 of a host that nobody asks."""
    return courses.from_document(
        {
            "course": "x",
            "seed": SEED,
            "hosts": {"h": {"address": "192.0.2.1"}},
            "students": [{"name": "ada", "host": "h", "guests": ["g7"]}],
        }
    ).student("ada")


def test_the_policys_block_is_a_policy(tmp_path: Path) -> None:
    scaffold.make("my-lab", tmp_path)
    lab = spec.load("my-lab", tmp_path)
    student = _ada()
    made = policy.parse("version = 1\n" + setup.policy_block(lab, student))
    assert [(r.guest, r.export, r.tag) for r in made.rules] == [("g7", "ada-0-own", "own")]
    assert made.exports["ada-0-own"].path == Path("/srv/xen9p/labs/ada/my-lab/own")


def test_all_of_the_part_can_be_an_export(tmp_path: Path) -> None:
    """As it has no other subvolume, and only of one there are snapshots. Under its own name, as xen9pd has it."""
    text = (scaffold.make("my-lab", tmp_path) / "lab.yml").read_text()
    assert "name: own" in text
    (tmp_path / "my-lab" / "lab.yml").write_text(text.replace("name: own", "name: own, path: ."))
    student = _ada()
    block = setup.policy_block(spec.load("my-lab", tmp_path), student)
    assert 'path = "/srv/xen9p/labs/ada/my-lab"' in block.splitlines()


# The course file.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"students": [{"name": "Ada L", "host": "h", "guests": []}]}, "does not match"),
        ({"students": [{"name": "ada", "host": "x", "guests": []}]}, "there is no host x"),
        (
            {"students": [{"name": n, "host": "h", "guests": ["g1"]} for n in ("ada", "bob")]},
            "guest g1 of host h is ada's and bob's",
        ),
        ({"hosts": {"h": {}}}, "needs one of ssh_config, address and local"),
        ({"seed": "short"}, "seed"),
    ],
)
def test_a_course_file_that_is_wrong(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    document = {
        "course": "x",
        "seed": SEED,
        "hosts": {"h": {"address": "192.0.2.1"}},
        "students": [{"name": "ada", "host": "h", "guests": ["g1"]}],
    }
    courses.write(tmp_path / "course.yml", {**document, **change})
    assert (tmp_path / "course.yml").stat().st_mode & 0o777 == 0o600
    with pytest.raises(LabError, match=re.escape(says)):
        courses.load(tmp_path / "course.yml")


def test_unknown_names_are_one_line(room: Classroom) -> None:
    for words, student, says in (
        (["check", "nothing"], "ada", "there is no lab nothing"),
        (["check", "sample"], "zoe", "has no student zoe"),
        (["check", "sample"], None, "which student?"),
        (["check", "sample", "nothing"], "ada", "has no check nothing"),
        (["reset", "sample"], "ada", "has not started lab sample"),
    ):
        said = room.cli(*words, student=student)
        assert said.returncode == 1
        assert says in said.stderr
        assert len(said.stderr.splitlines()) == 1, said.stderr


# The way to machines.


def test_the_ssh_config_of_a_classroom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "STATE", tmp_path)
    host = courses.Host("bench1", alias="bench1", address="192.0.2.1", guests=(("a1", "10.9.0.11"),))
    path = transport._config(host)
    asked = subprocess.run(["ssh", "-G", "-F", path, "a1"], capture_output=True, text=True, check=True).stdout
    assert "hostname 10.9.0.11" in asked
    assert "proxyjump bench1" in asked


def test_hosts_whose_guests_have_the_same_address_share_no_connection(tmp_path: Path) -> None:
    (tmp_path / "ssh_config").write_text("Host g1\n")
    made = []
    for name in ("north", "south"):
        host = courses.Host(name, ssh_config=str(tmp_path / "ssh_config"))
        made.append(transport.SshSystem(Student("ada", host, ("g1",), b"k", alone=True)).shell("guest"))
    paths = [next(word for word in command if word.startswith("ControlPath=")) for command in made]
    assert paths[0] != paths[1]


def test_a_machine_that_never_stops_talking_is_cut_off() -> None:
    with pytest.raises(LabError, match=f"it says more than {transport.OUTPUT_LIMIT} bytes"):
        transport._execute(transport.bounded(["sh", "-c", "exec yes"]), "", 60)


def test_a_script_keeps_its_code_and_reads_no_script(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    host = courses.Host("h", local=str(tmp_path))
    system = transport.LocalSystem(Student("ada", host, (), b"k", alone=True))
    done = system.run("host", "cat; echo after; exit 5\n" + "# filler\n" * 40000)
    assert (done.code, done.out) == (5, "after\n")
    assert system.run("host", "exit 255").code == 254
    began = time.monotonic()
    with pytest.raises(LabError, match="no end within 1 s"):
        system.run("host", "sleep 300 & echo $! > pid; wait", 1)
    assert time.monotonic() - began < 30
    pid = int((tmp_path / "host" / "pid").read_text())
    while runs(pid):
        assert time.monotonic() - began < 30
        time.sleep(0.05)
