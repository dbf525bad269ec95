"""Taking locks in a guest from a test."""

from __future__ import annotations

import shlex

from testinfra.host import Host

# Takes a lock and keeps it until it is killed; says "held" or the errno. Only what python3-minimal has.
_HOLD = """
import fcntl, os, sys, time
file = os.open({path!r}, {flags})
try:
    {call}
except OSError as error:
    print(error.errno, flush=True)
else:
    print("held", flush=True)
    time.sleep(600)
"""


def posix(exclusive: bool, start: int = 0, length: int = 0) -> str:
    """The call of fcntl(2)'s lock, without waiting."""
    kind = "LOCK_EX" if exclusive else "LOCK_SH"
    return f"fcntl.lockf(file, fcntl.{kind} | fcntl.LOCK_NB, {length}, {start})"


def flock(exclusive: bool) -> str:
    """The call of flock(2), without waiting."""
    return f"fcntl.flock(file, fcntl.{'LOCK_EX' if exclusive else 'LOCK_SH'} | fcntl.LOCK_NB)"


def hold(host: Host, path: str, call: str, flags: str = "os.O_RDWR") -> int:
    """Starts a process that holds a lock; its pid. It must get it."""
    program = shlex.quote(_HOLD.format(path=path, flags=flags, call=call))
    log = f"{path}.holder-{host.check_output('hostname')}"
    command = f"rm -f {log}; nohup python3 -c {program} > {log} 2>&1 < /dev/null & echo $!"
    pid = int(host.check_output(command))
    said = host.check_output(f"for i in $(seq 100); do [ -s {log} ] && break; sleep 0.1; done; cat {log}; rm {log}")
    assert said.strip() == "held", said
    return pid


def attempt(host: Host, path: str, call: str, flags: str = "os.O_RDWR") -> str:
    """What an attempt in a process of its own gives: "held" (and at once released), or the errno as a number."""
    program = _HOLD.format(path=path, flags=flags, call=call).replace("time.sleep(600)", "pass")
    return str(host.check_output(f"python3 -c {shlex.quote(program)}")).strip()
