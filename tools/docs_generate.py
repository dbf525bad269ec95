"""Reference pages that are made from the code: roles' variables, the commands' help, the table of messages.

Nothing here is committed as text: tools/docs_hooks.py puts the pages into the site when it is built, so they cannot
be out of date. Every function is pure: the repository's root in, Markdown out.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

import docs_labs

ROLES = ("testbed", "xen_host", "store", "xen9p", "guest", "lab")
COMMANDS = (("xen9p", "xen9p.parser"), ("xen9pd", "xen9p.daemon"), ("lab", "labkit.cli"))
PACKAGE = Path("xen9p-src/src/xen9p")
LONG_LIST = 4  # a default with more elements folds up


# --- variables of the roles ---


def variables(root: Path) -> str:
    """Return the page of every role's variables, from meta/argument_specs.yml and defaults/main.yml."""
    parts = [
        "# Variables of the roles\n",
        "Set them in your inventory (`group_vars/`, `host_vars/`), or for one run with `-e name=value`. A name that "
        "no role knows, or a value of the wrong type, is refused before anything is changed.\n",
    ]
    parts += [_role(root, name) for name in roles(root)]
    return "\n".join(parts)


def roles(root: Path) -> list[str]:
    """Return the roles that declare their variables, in the order in which site.yml runs them."""
    found = {path.parents[1].name for path in root.glob("roles/*/meta/argument_specs.yml")}
    return [name for name in ROLES if name in found] + sorted(found - set(ROLES))


def _role(root: Path, name: str) -> str:
    spec = _yaml(root / "roles" / name / "meta" / "argument_specs.yml").get("argument_specs", {})
    defaults = _yaml(root / "roles" / name / "defaults" / "main.yml")
    main: Mapping[str, Any] = spec.get("main", {})
    lines = [f"## {name}\n", f"{_sentence(main.get('short_description', ''))}\n"]
    lines += [_markup(text) + "\n" for text in _texts(main.get("description"))]
    options = list(_options(main.get("options") or {}, defaults))
    return "\n".join([*lines, *(options or ["It has no variables.\n"])])


def _options(options: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a definition for each variable; what a list of dictionaries holds comes after it, as list[].key."""
    for name, option in options.items():
        kind = str(option.get("type", "str"))
        if kind == "list":
            kind = f"list of {option.get('elements', 'str')}"
        facts = [f"*{kind}*"]
        if option.get("required"):
            facts.append("required")
        if "default" in option or (name in defaults and not prefix):
            facts.append(f"default {_default(option.get('default', defaults.get(name)))}")
        if option.get("choices"):
            facts.append("one of " + ", ".join(f"`{choice}`" for choice in option["choices"]))
        meaning = " ".join(_markup(text) for text in _texts(option.get("description")))
        yield f"`{prefix}{name}`\n:   {meaning}<br>{', '.join(facts)}\n"
        if option.get("options"):
            inner = f"{prefix}{name}[]." if option.get("type") == "list" else f"{prefix}{name}."
            yield from _options(option["options"], {}, inner)


def _default(value: Any) -> str:
    if isinstance(value, list) and len(value) > LONG_LIST:
        inside = " ".join(f"<code>{_plain(item)}</code>" for item in value)
        return f"<details markdown='0'><summary>{len(value)} entries</summary>{inside}</details>"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value == "":
        return '""'
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    return " ".join(str(value).split())


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(value)] if isinstance(value, str) else [str(item) for item in value]


def _sentence(text: str) -> str:
    return text if text.endswith(".") or not text else f"{text}."


def _markup(text: str) -> str:
    """Ansible's own markup, as in C(code) and O(option), as Markdown."""
    text = re.sub(r"\b[CVOEMP]\(([^()]*)\)", r"`\1`", text)
    return re.sub(r"\b[IB]\(([^()]*)\)", r"*\1*", text)


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return yaml.safe_load(path.read_text()) or {}


# --- the commands ---


def commands(root: Path) -> str:
    """Return the page of the commands, from the help that they print themselves."""
    parts = [
        "# Commands\n",
        "What each command says with `--help`. Every error is one line on standard error with the remedy in it, and an "
        "exit code that is not 0; 78 is a policy that is not usable.\n",
    ]
    with _package(root), _width(88):
        for command, module in COMMANDS:
            parser = _parser(command, module)
            parts += [_help(path, each) for path, each in _walk(command, parser)]
    return "\n".join(parts)


def _parser(command: str, module: str) -> argparse.ArgumentParser:
    build: Callable[[], argparse.ArgumentParser] = importlib.import_module(module).build_parser
    parser = build()
    parser.prog = command
    return parser


def _walk(path: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                child.prog = f"{path} {name}"
                yield from _walk(f"{path} {name}", child)


def _help(path: str, parser: argparse.ArgumentParser) -> str:
    level = "##" if path.count(" ") == 0 else "###"
    text = parser.format_help().rstrip()
    return f"{level} {path}\n\n```text\n{text}\n```\n"


@contextmanager
def _width(columns: int) -> Iterator[None]:
    old = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    try:
        yield
    finally:
        if old is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = old


@contextmanager
def _package(root: Path) -> Iterator[None]:
    """Lets the package be imported from its source; its C module need not be built."""
    source = str(root / PACKAGE.parent)
    sys.path.insert(0, source)
    try:
        yield
    finally:
        sys.path.remove(source)


# --- the messages ---


@dataclass(frozen=True, slots=True)
class Handled:
    """Where one request is answered."""

    name: str
    number: int
    layout: str
    where: str
    by: str
    mutates: bool


NOTES = {
    # By handler, so that a note goes when its handler does.
    "_auth": "answers `ENOENT` where no key is wanted: the domain behind the ring is the identity",
    "_attach": "with the fid of a `Tauth` where a key is wanted",
    "h_xattrwalk": "on the reader while nothing else is under way, else in the pool",
    "h_lock": "the host's kernel keeps the locks; a lock in the way is `P9_LOCK_BLOCKED` at once",
    "h_getlock": "kind `P9_LOCK_TYPE_UNLCK`, which v9fs sends, asks for any lock",
    "h_clunk": "of an attribute that is set, in the pool: its reply says how that went",
    "h_read": "page cache to ring, without a copy between; what is not cached goes to the pool",
    "h_write": "ring to page cache, without a copy between; what would wait goes to the pool",
    "h_walk": "what is not in the dentry cache goes to the pool, or is looked up by chance",
    "h_lease": "ours: a [lease session](../decisions/0025-leases.md) is opened, renewed or ended",
    "h_revoke": "ours: waits until the client has to give something up; the next one says that it has",
    "h_lopen": "with `O_TRUNC` in the pool",
    "h_lcreate": "or on the reader, by chance",
    "h_unlinkat": "or on the reader, by chance",
    "h_setattr": "without a new size also on the reader, by chance",
    "h_readdir": "in the pool; where the answer before had the end of the directory, the reader says so again",
}


def messages(root: Path) -> str:
    """Return the page of the messages: number, fields, and where each is answered."""
    rows = handled(root)
    count = {where: sum(row.where == where for row in rows) for where in ("reader", "pool", "Python")}
    lines = [
        "# Messages\n",
        "Every request of 9P2000.L and two of our own, and where a worker answers it. The page is made from the codec "
        "(`codec.py`) and from the tables of the data plane (`dataplane/fs.c`) and of the server (`server.py`).\n",
        f"- **reader**: the C thread that takes messages off the rings answers at once ({count['reader']} messages).",
        f"- **pool**: a C thread that may sleep answers ({count['pool']} messages).",
        f"- **Python**: a Python thread answers ({count['Python']} messages).\n",
        "*By chance*: the reader does it, while nothing else is under way and nothing has been slow just before "
        "([inside a worker](../architecture.md#inside-a-worker)).\n",
        "A message marked ✎ changes something: on a read-only device it gets `EROFS`.\n",
        "| message | where | how |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        how = f"`{row.by}`" + (f": {NOTES[row.by]}" if row.by in NOTES else "")
        lines.append(f"| `{row.name}` {row.number}{' ✎' if row.mutates else ''} | {row.where} | {how} |")
    lines += [
        "\n## Layouts\n",
        "A message is `size[4] type[1] tag[2]` and then its fields, little-endian; the number in brackets is bytes. "
        "`s` is a string (`length[2]` and its bytes), `data` has `count[4]` before it, a `qid` is 13 bytes: "
        "`type[1] version[4] path[8]`. `n*` is a list with `count[2]` before it.\n",
        "```text",
    ]
    lines += [_layout_pair(root, row) for row in rows]
    lines += [
        "```",
        "",
        "A request that fails is answered by `Rlerror 7: ecode[4]`, a Linux errno. "
        "To a client with a lease session the highest "
        "bit of a reply's type says that nothing of it may be kept.\n",
    ]
    return "\n".join(lines)


def handled(root: Path) -> list[Handled]:
    """Return every request of the data plane's table, by number."""
    source = (root / PACKAGE / "dataplane" / "fs.c").read_text()
    header = (root / PACKAGE / "dataplane" / "x9.h").read_text()
    numbers = {name: int(number) for name, number in re.findall(r"\bP9_(T\w+) = (\d+)", header)}
    table = re.findall(r"\[P9_(T\w+)\] = \{(\w+), ([A-Z |]+)\}", source)
    if not table:
        raise ValueError("dataplane/fs.c: the table of messages was not found; tools/docs_generate.py reads it")
    codec_messages, python = _codec(root), _python_handlers(root)
    rows = []
    for constant, function, flags in table:
        number = numbers[constant]
        cls = codec_messages[number]
        if "COLD" in flags:
            where, by = "Python", python[cls.__name__]
        elif function == "NULL":
            where, by = "reader", f"{cls.__name__[1:]}"
        else:
            where, by = "pool" if "POOL" in flags else "reader", function
        rows.append(Handled(cls.__name__, number, _layout(cls), where, by, "MUTATES" in flags))
    return sorted(rows, key=lambda row: row.number)


def _codec(root: Path) -> dict[int, Any]:
    with _package(root):
        return dict(importlib.import_module("xen9p.codec").MESSAGES)


def _python_handlers(root: Path) -> dict[str, str]:
    """Message name to handler, read off server.py without importing it: that would need the C module."""
    tree = ast.parse((root / PACKAGE / "server.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "_HANDLERS":
            table = node.value
            if isinstance(table, ast.Dict):
                return {
                    key.attr: value.id
                    for key, value in zip(table.keys, table.values, strict=True)
                    if isinstance(key, ast.Attribute) and isinstance(value, ast.Name)
                }
    raise ValueError("server.py: the table _HANDLERS was not found; tools/docs_generate.py reads it")


_KINDS = {
    "U8": "[1]",
    "U16": "[2]",
    "U32": "[4]",
    "U64": "[8]",
    "Name": "[s]",
    "Data": "[data]",
    "QidField": "[qid]",
    "Names": "[n*s]",
    "Qids": "[n*qid]",
}


def _layout(cls: Any) -> str:
    return " ".join(f"{field.name}{_KINDS[str(field.type)]}" for field in fields(cls))


def _layout_pair(root: Path, row: Handled) -> str:
    reply = _codec(root)[row.number + 1]
    lines = ((row.name, row.number, row.layout), (reply.__name__, reply.type, _layout(reply)))
    return "\n".join(f"{name + ' ' + str(number):16}{layout}".rstrip() for name, number, layout in lines)


PAGES: dict[str, Callable[[Path], str]] = {
    "reference/variables.md": variables,
    "reference/commands.md": commands,
    "reference/messages.md": messages,
    **docs_labs.guides(Path(__file__).resolve().parents[1]),
}
"""Path below docs/ to the function that makes the page."""
