"""`lab new`: a folder that is complete, passes `lab lint`, and shows each part of the format once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from labkit import spec
from labkit.errors import LabError
from labkit.spec import LABS

_FILES: Final = {
    "lab.yml": """\
---
# What each key means: docs/labs/format.md, made from the schema.
title: {title}
number: {number}
minutes: 60
summary: One sentence that says what it is about.
objectives:
  - say what you can do afterwards
guests: 1

values:
  code: {{type: word, hidden: true}}
  file: {{type: tag, about: the file in which your code is}}

exports:
  - {{name: own, tag: own, access: rw}}

files:
  - {{path: "own/${{file}}", text: "the code is ${{code}}\\n"}}

mounts: [/mnt/{name}]

checks:
  - name: code
    title: The code that only you have
    points: 60
    read: getting-started.md#attach-a-device-by-hand
    answers: [code]
    hints:
      - {{text: "The tag is own; mount it in the guest."}}
      - {{text: "cat /mnt/{name}/$file", cost: 10}}
  - name: mounted
    title: Your export, mounted in your guest
    points: 40
    needs: [code]
    read: getting-started.md#attach-a-device-by-hand

wrong:
  - {{name: guessed, about: the code was guessed, score: 0}}
""",
    "guide.md": """\
## Background

What one has to know, with a drawing if there is one.

## Steps

In the guest:

```console guest
. lab-values {name}
mkdir -p /mnt/{name}
mount -t 9p -o trans=xen,version=9p2000.L,cache=none own /mnt/{name}
ls /mnt/{name}
```

What is the code in your file `$file`? Write it down on the host: `echo code=THE-CODE >> answers`.

```console host
. lab-values {name}
touch answers
```
""",
    "checks.py": '''\
"""Checks of the lab {name}."""

from __future__ import annotations

from labkit.look import Look, Verdict, compare, failed, passed


def code(look: Look) -> Verdict:
    """The answer is the student's own code."""
    return compare(look.answer("code"), look.values["code"], "code=..., from your file in the export")


def mounted(look: Look) -> Verdict:
    """The export is mounted, and what is in it is what the host has there."""
    seen = look.out("guest", "cat /mnt/{name}/$file 2>/dev/null")
    there = look.out("host", 'cat "$part/own/$file"')
    if seen == there != "":
        return passed()
    return failed("your file, seen in the guest below /mnt/{name}", "another one, or none")
''',
    "solution/steps.md": """\
```console guest
. lab-values {name}
mkdir -p /mnt/{name}
mount -t 9p -o trans=xen,version=9p2000.L,cache=none own /mnt/{name}
```

```console host
. lab-values {name}
echo "code=$(sed 's/the code is //' "$part/own/$file")" >> answers
```
""",
    "wrong/guessed.md": """\
```console host
. lab-values {name}
echo code=amber-amber-1000 >> answers
```
""",
    "start/host/answers": "# A line for each answer, like code=...; the last one of a name counts.\n",
}


def make(name: str, root: Path = LABS) -> Path:
    """Makes the folder. LabError if the name is not usable or there is such a lab."""
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name) or name == "engine":
        raise LabError(
            f"{name!r} is no name for a lab", "lower-case letters, digits and dashes, beginning with a letter"
        )
    folder = root / name
    if folder.exists():
        raise LabError(f"there is a {name} already", "choose another name")
    numbers = [spec._number(root / other / "lab.yml") for other in spec.names(root)]
    number = max((n for n in numbers if n < 1000), default=-1) + 1
    for path, text in _FILES.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.format(name=name, title=name.replace("-", " ").capitalize(), number=number))
    return folder
