"""Standard output of our playbooks: what runs, for how long, what failed in one line, and where the time went."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = r"""
name: progress
type: stdout
short_description: Progress with times, errors in one line
description:
  - Prints each task when it begins, and a sign of life when nothing has been printed for a while, with the
    line that a long task keeps in the lab's progress file.
  - A failure is one line; run with C(-v) for all of the result.
  - Ends with the time of each role, the slowest tasks, and the usual recap.
options:
  silence:
    description: Seconds after which silence is broken.
    type: int
    default: 10
    env: [{name: XEN9P_SILENCE}]
    ini: [{section: callback_progress, key: silence}]
"""

SLOWEST = 8
# What only brings in other tasks is not shown: they speak for themselves.
INCLUDES = frozenset(f"ansible.builtin.{verb}_{noun}" for verb in ("include", "import") for noun in ("role", "tasks"))

# Messages of Ansible that leave the reason to the output of what ran.
EMPTY_MESSAGES = ("non-zero return code", "failed to validate", "MODULE FAILURE", "Module result")
# A ticket of `sudo -v` belongs to a terminal, and Ansible's workers have none: only -K helps.
NO_PASSWORD = "sudo: a password is required"
PASSWORD_REMEDY = "sudo wants a password: run again with -K (`make lab ARGS=-K`), or run as root"


class CallbackModule(CallbackBase):
    """See DOCUMENTATION."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "progress"

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()
        self._printed = time.monotonic()
        self._step: tuple[str, str] | None = None
        self._step_began = time.monotonic()
        self._host_began: dict[tuple[str, str], float] = {}
        self._tasks: list[tuple[str, str, float]] = []
        self._file: Path | None = None
        self._silence = 10
        self._over = threading.Event()
        self._last_note = ""

    # Life cycle

    def set_options(self, task_keys: Any = None, var_options: Any = None, direct: Any = None) -> None:
        """Take over the options, once Ansible has read them."""
        super().set_options(task_keys=task_keys, var_options=var_options, direct=direct)
        self._silence = self.get_option("silence")

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Begin to watch for silence."""
        self._say(f"PLAYBOOK {Path(playbook._file_name).name}")
        threading.Thread(target=self._heartbeat, daemon=True).start()

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Print the play's name."""
        self._end_step()
        self._say(f"\nPLAY [{play.get_name().strip()}] {self._clock()}")

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        """Print the task when it begins, not when it ends."""
        self._begin_step(task, "TASK")

    def v2_playbook_on_handler_task_start(self, task: Any) -> None:
        """Print the handler when it begins."""
        self._begin_step(task, "RUNNING HANDLER")

    def v2_playbook_on_include(self, included_file: Any) -> None:
        """Stay silent: what is included speaks for itself."""

    def v2_playbook_on_no_hosts_matched(self) -> None:
        """Say why nothing happens."""
        self._say("skipping: no hosts in this play", constants.COLOR_SKIP)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Print where the time went, and the recap in the form that tools parse."""
        self._end_step()
        self._over.set()
        self._say_times()
        self._say("\nPLAY RECAP " + "*" * 40)
        for host in sorted(stats.processed):
            counts = stats.summarize(host)
            bad = counts["failures"] or counts["unreachable"]
            color = (
                constants.COLOR_ERROR if bad else constants.COLOR_CHANGED if counts["changed"] else constants.COLOR_OK
            )
            self._say(
                f"{host:<20} : ok={counts['ok']} changed={counts['changed']} unreachable={counts['unreachable']} "
                f"failed={counts['failures']} skipped={counts['skipped']} rescued={counts['rescued']} "
                f"ignored={counts['ignored']}",
                color,
            )
        self._say(f"took {_span(time.monotonic() - self._began)}")

    # Results

    def v2_runner_on_start(self, host: Any, task: Any) -> None:
        """Remember when this host began this task."""
        self._host_began[host.get_name(), task._uuid] = time.monotonic()

    def v2_runner_on_ok(self, result: Any) -> None:
        """Print host, outcome, time, and the module's own note."""
        self._handle_warnings_and_exception(result)
        if result.task.action in INCLUDES:
            return
        data = result.result
        if result.task.action == "lab_preflight" and data.get("progress"):
            self._file = Path(data["progress"])
        word, color = ("changed", constants.COLOR_CHANGED) if data.get("changed") else ("ok", constants.COLOR_OK)
        note = f"  {data['note']}" if isinstance(data.get("note"), str) and data["note"] else ""
        if result.task.action in {"ansible.builtin.debug", "debug"} and isinstance(data.get("msg"), str):
            note = f"  {data['msg']}"
        self._say(f"{word}: [{result.host.get_name()}] {self._spent(result)}{note}", color)
        self._details(result)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """Print one line that names the error."""
        host, data = result.host.get_name(), result.result
        if ignore_errors:
            self._say(f"ignored: [{host}] {_reason(data)}", constants.COLOR_SKIP)
        else:
            self._say(f"failed: [{host}] {self._spent(result)}", constants.COLOR_ERROR)
            self._say(f"error: {_reason(data)}", constants.COLOR_ERROR)
        self._details(result)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """Print one line that names the host and the remedy."""
        host = result.host.get_name()
        reason = _reason(result.result)
        self._say(f"error: {host} cannot be reached by ssh: {reason}", constants.COLOR_ERROR)
        self._details(result)

    def v2_runner_on_skipped(self, result: Any) -> None:
        """Print that it is skipped, unless it would only have brought in other tasks."""
        if result.task.action not in INCLUDES:
            self._say(f"skipping: [{result.host.get_name()}]", constants.COLOR_SKIP)

    def v2_runner_item_on_failed(self, result: Any) -> None:
        """Print the failure of one item of a loop."""
        self._say(f"error: {_reason(result.result)}", constants.COLOR_ERROR)

    def v2_runner_retry(self, result: Any) -> None:
        """Print that a task is tried again: it is a sign of life."""
        self._say(f"retrying: [{result.host.get_name()}] {result.result.get('attempts', '')}")

    def v2_on_file_diff(self, result: Any) -> None:
        """Print differences with --diff."""
        for item in [result.result, *result.result.get("results", [])]:
            if item.get("diff") and item.get("changed"):
                self._say(self._get_diff(item["diff"]))

    # Inside

    def _begin_step(self, task: Any, word: str) -> None:
        self._end_step()
        role = task._role.get_name() if task._role else ""
        name = task.get_name().strip()
        short = name.removeprefix(f"{role} : ") if role else name
        self._step, self._step_began = (role or "(playbook)", short), time.monotonic()
        if task.action not in INCLUDES:
            self._say(f"{word} [{name}] {self._clock()}")

    def _end_step(self) -> None:
        if self._step is not None:
            self._tasks.append((*self._step, time.monotonic() - self._step_began))
            self._step = None

    def _say(self, text: str, color: str | None = None) -> None:
        self._printed = time.monotonic()
        self._display.display(text, color=color)

    def _details(self, result: Any) -> None:
        if self._display.verbosity:
            self._say(self._dump_results(result.result, indent=2))

    def _clock(self) -> str:
        return f"({_span(time.monotonic() - self._began)})"

    def _spent(self, result: Any) -> str:
        began = self._host_began.pop((result.host.get_name(), result.task._uuid), self._step_began)
        return f"({time.monotonic() - began:.1f} s)"

    def _heartbeat(self) -> None:
        """Break silence: with the progress file's line as soon as it is news, with the elapsed time at the latest."""
        while not self._over.wait(1.0):
            step, silent = self._step, time.monotonic() - self._printed
            if step is None:
                continue
            note = self._note()
            news = note and note != self._last_note and silent >= self._silence / 2
            if not news and silent < self._silence:
                continue
            self._last_note = note
            self._printed = time.monotonic()
            elapsed = _span(time.monotonic() - self._step_began)
            line = f"    ... {elapsed} {note or step[1]}\n"
            sys.stdout.flush()
            # One unbuffered write: no lock that a process forked meanwhile could inherit held.
            os.write(1, line.encode())

    def _note(self) -> str:
        if self._file is None:
            return ""
        try:
            if time.time() - self._file.stat().st_mtime > 60:
                return ""
            return self._file.read_text(errors="replace").strip().partition("\n")[0]
        except OSError:
            return ""

    def _say_times(self) -> None:
        if time.monotonic() - self._began < 3.0:
            return
        roles: dict[str, float] = defaultdict(float)
        for role, _, seconds in self._tasks:
            roles[role] += seconds
        self._say("\nTIME")
        for seconds, name in _earlier_steps():
            self._say(f"  {_span(seconds):>7}  {name}")
        for role, seconds in roles.items():
            self._say(f"  {_span(seconds):>7}  {role}")
        slow = sorted(self._tasks, key=lambda task: task[2], reverse=True)[:SLOWEST]
        slow = [task for task in slow if task[2] >= 3.0]
        if slow:
            self._say("  slowest tasks:")
        for role, name, seconds in slow:
            self._say(f"  {_span(seconds):>7}  {role} : {name}")


def _earlier_steps() -> list[tuple[float, str]]:
    """Return what tools/bootstrap did before this run, with its seconds."""
    try:
        lines = Path(os.environ["XEN9P_STEPS"]).read_text().splitlines()
        return [(float(line.split()[0]), line.partition(" ")[2]) for line in lines if line]
    except (KeyError, OSError, ValueError):
        return []


def _span(seconds: float) -> str:
    """Return minutes and seconds, `2:07`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _reason(data: dict[str, Any]) -> str:
    """Return one line: the message, or for a command that failed the last telling line of what it printed."""
    for item in data.get("results", []):
        if isinstance(item, dict) and item.get("failed"):
            return _reason(item)
    message = str(data.get("msg") or "").strip()
    if NO_PASSWORD in message:
        return PASSWORD_REMEDY
    # What runs a command or a check of its own keeps the reason in its output.
    if not message or message.removeprefix("Task failed: ").startswith(EMPTY_MESSAGES):
        command = data.get("cmd")
        words = [str(word) for word in command] if isinstance(command, list) else str(command or "").split()
        # A shell's script speaks for itself.
        shown = "" if words and Path(words[0]).name == "sh" else " ".join(words)
        prefix = f"{shown[:60]}: " if shown else ""
        message = f"{prefix}{_last_line(data) or message or 'no message'}"
    return " ".join(message.split())


def _last_line(data: dict[str, Any]) -> str:
    """Return the last line of what a program printed that says anything, its errors first."""
    for key in ("stderr", "module_stderr", "stdout", "module_stdout"):
        for line in reversed(str(data.get(key) or "").splitlines()):
            if any(character.isalnum() for character in line) and not line.startswith("Shared connection to "):
                return line.strip()
    return ""
