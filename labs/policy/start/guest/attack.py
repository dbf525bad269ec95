#!/usr/bin/python3
"""Says to a server what no kernel would say. Each attack prints what came back.

attack.py TAG KEY walk NAME [NAME...]: walks to names as they are, dots and slashes too.
attack.py TAG KEY attach ANAME: attaches to a tree of that name.
attack.py TAG KEY open NAME: opens what lies there, to read.
attack.py TAG KEY flood SECONDS: asks as fast as it can.
attack.py TAG KEY break SIZE: begins a message of so many bytes.
KEY is a file of keys, or - for none.
"""

from __future__ import annotations

import argparse
import errno
import os
import struct
import sys
import time
from pathlib import Path

from xen9p import auth, codec
from xen9p.client import Client
from xen9p.errors import Xen9pError
from xen9p.transport.xen_front import connect

WINDOW = 16  # requests under way


def flood(client: Client, root: int, seconds: float) -> int:
    """How many answers there are within some seconds."""
    end = time.monotonic() + seconds
    waiting = [client.submit(codec.Tgetattr(root, codec.GETATTR_BASIC), codec.Rgetattr) for _ in range(WINDOW)]
    count = 0
    while time.monotonic() < end:
        waiting.pop(0).result()
        count += 1
        waiting.append(client.submit(codec.Tgetattr(root, codec.GETATTR_BASIC), codec.Rgetattr))
    for pending in waiting:
        pending.result()
    return count


def attack(client: Client, key: auth.Key | None, what: str, words: list[str]) -> str:
    """One attack; what came of it in words. Raises what the server's answer is as OSError."""
    names = [os.fsencode(word) for word in words]
    if what == "attach":
        client.enter(names[0], 0, key)
        return "attached"
    root = client.enter(b"", 0, key)
    if what == "walk":
        return f"there: {client.getattr(client.walk(root, *names)).qid}"
    if what == "open":
        fid = client.walk(root, *names[0].split(b"/"))
        client.lopen(fid)
        return f"open: {client.read(fid, 0, 100)!r}"
    if what == "flood":
        return f"{flood(client, root, float(words[0]))} answers in {words[0]} s"
    client.send_raw(struct.pack("<IBH", int(words[0]), codec.Tread.type, 1))
    return f"answered: {client.recv_raw()!r:.60}"


def main() -> int:
    """Runs the command; 0 if the server did what it was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", metavar="TAG")
    parser.add_argument("key", metavar="KEY")
    parser.add_argument("what", choices=("walk", "attach", "open", "flood", "break"))
    parser.add_argument("words", nargs="+", metavar="WORD")
    given = parser.parse_args()
    try:
        key = None if given.key == "-" else auth.choose(Path(given.key), None)
        client = Client(connect(given.tag))
        with client:
            client.version()
            print(attack(client, key, given.what, given.words))
    except Xen9pError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except (OSError, EOFError) as error:
        number = getattr(error, "errno", None)
        print(f"refused: {errno.errorcode.get(number, error) if number else error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
