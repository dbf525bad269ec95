"""What the checks ask of the auditor's device, in the guest: access or attack. Prints JSON.

auditor.py KEYS access: who gets in, and what they may do then.
auditor.py KEYS attack: which errno an attack gets, and how many answers a flood gets within SECONDS.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from attack import flood
from xen9p import auth
from xen9p.client import Client
from xen9p.errors import AuthError, Xen9pError
from xen9p.transport.xen_front import connect

SECONDS = 2.0


def result(action: Callable[[], object]) -> str:
    """The name of the errno that it ends with; "" if it works; "refused" for a key that is."""
    try:
        action()
    except AuthError:
        return "refused"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")
    return ""


def access(client: Client, key: auth.Key) -> dict[str, str]:
    """Without a key, with a wrong one, and with the right one."""
    found = {"none": result(client.attach)}
    other = auth.Key(key.name, secrets.token_bytes(auth.KEY_SIZE))
    found["other"] = result(lambda: client.enter(b"", 0, other))
    root = client.enter(b"", 0, key)
    found["book"] = client.read_file(root, "proof").decode()
    found["make"] = result(lambda: client.lcreate(client.walk(root), b"made", os.O_WRONLY))
    found["write"] = result(lambda: client.lopen(client.walk(root, b"proof"), os.O_WRONLY))
    return found


def attack(client: Client, key: auth.Key) -> dict[str, str | int]:
    """The attacks of the guide."""
    found: dict[str, str | int] = {"forged": result(lambda: client.enter(b"vault", 0, key))}
    root = client.enter(b"", 0, key)
    found["slash"] = result(lambda: client.walk(root, b"../vault"))
    found["link"] = result(lambda: client.lopen(client.walk(root, b"proof-link")))
    found["flood"] = flood(client, root, SECONDS)
    return found


def main() -> int:
    """Prints what was found, or one line that says why nothing was."""
    try:
        key = auth.choose(Path(sys.argv[1]), None)
        with Client(connect("audit")) as client:
            client.version()
            print(json.dumps((access if sys.argv[2] == "access" else attack)(client, key)))
    except (Xen9pError, OSError, EOFError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
