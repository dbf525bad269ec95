"""Values per student: the same for the same course, student and lab, and nobody's without the key.

    student's key = HMAC-SHA256(course's seed, "student\0" NAME)
    value's bytes = HMAC-SHA256(student's key, "value\0" LAB "\0" VALUE "\0" COUNTER)

So a student who has their own key on a laptop knows nothing of the others' values.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from string import Template
from typing import Any, Final

from labkit.errors import LabError, SpecError

Value = int | str
Values = dict[str, Value]

_WORDS: Final = (
    "amber", "anchor", "basil", "beacon", "birch", "bramble", "canyon", "cedar", "cinder", "clover", "cobalt",
    "copper", "coral", "cricket", "dahlia", "delta", "ember", "fennel", "fern", "flint", "garnet", "ginger",
    "glacier", "granite", "harbor", "hazel", "heron", "indigo", "iris", "ivory", "jasper", "juniper", "kelp",
    "lagoon", "lantern", "laurel", "linden", "lotus", "maple", "marble", "meadow", "mica", "myrtle", "nectar",
    "nutmeg", "olive", "onyx", "opal", "orchid", "otter", "pebble", "pepper", "plover", "poplar", "quartz", "raven",
    "reef", "russet", "saffron", "sage", "slate", "sorrel", "spruce", "thistle", "topaz", "tulip", "umber",
    "walnut",
)  # fmt: skip


class Stream:
    """As many even bits as wanted, from a key and a name."""

    def __init__(self, key: bytes, name: str) -> None:
        self._key = key
        self._name = name.encode()
        self._count = 0

    def below(self, bound: int) -> int:
        """An even choice of 0 to *bound* - 1."""
        if bound < 1:
            raise ValueError("bound must be 1 or more")
        self._count += 1
        block = hmac.digest(self._key, b"value\0" + self._name + b"\0" + str(self._count).encode(), "sha256")
        # 256 bits over a bound of at most 64: the bias is below 2^-190.
        return int.from_bytes(block, "big") % bound

    def pick(self, of: Sequence[Any]) -> Any:
        """One of several."""
        return of[self.below(len(of))]


def student_key(seed: bytes, name: str) -> bytes:
    """The 32 bytes that a student's values and signatures come from."""
    return hmac.digest(seed, b"student\0" + name.encode(), "sha256")


# The generators. Each takes the stream and the options of lab.yml; the schema says which there are.


def _int(stream: Stream, options: Mapping[str, Any]) -> Value:
    low, high, step = int(options["min"]), int(options["max"]), int(options.get("step", 1))
    return low + step * stream.below((high - low) // step + 1)


def _choice(stream: Stream, options: Mapping[str, Any]) -> Value:
    chosen: Value = stream.pick(options["of"])
    return chosen


def _size(stream: Stream, options: Mapping[str, Any]) -> Value:
    """Bytes; never a whole number of pages, so that the last request of a file is a short one."""
    value = int(_int(stream, options))
    return value if value % 4096 else value + 1 + stream.below(4095)


def _offset(stream: Stream, options: Mapping[str, Any]) -> Value:
    return _int(stream, {"min": 0, "step": options.get("align", 1), **options})


def _tag(stream: Stream, _: Mapping[str, Any]) -> Value:
    return f"{stream.pick(_WORDS)}{stream.below(90) + 10}"


def _word(stream: Stream, _: Mapping[str, Any]) -> Value:
    return f"{stream.pick(_WORDS)}-{stream.pick(_WORDS)}-{stream.below(9000) + 1000}"


def _uid(stream: Stream, options: Mapping[str, Any]) -> Value:
    return _int(stream, {"min": 20000, "max": 59999, **options})


def _content(stream: Stream, options: Mapping[str, Any]) -> Value:
    lines = int(options.get("lines", 3))
    return "\n".join(" ".join(stream.pick(_WORDS) for _ in range(6)) for _ in range(lines)) + "\n"


GENERATORS: Final[Mapping[str, tuple[Callable[[Stream, Mapping[str, Any]], Value], str]]] = {
    "int": (_int, "A whole number from `min` to `max`, in steps of `step` (1)."),
    "choice": (_choice, "One of the list `of`."),
    "size": (_size, "Bytes from `min` to `max`, or up to a page more: never a whole number of pages."),
    "offset": (_offset, "Bytes from 0 (`min`) to `max`, a multiple of `align` (1) above `min`."),
    "tag": (_tag, "A word with two digits: fit for a tag, a file or a directory."),
    "word": (_word, "Two words with four digits: long enough that nobody guesses it."),
    "uid": (_uid, "A uid or gid from 20000 to 59999, or from `min` to `max`."),
    "content": (_content, "Text of `lines` lines (3)."),
}
"""Type of a value -> its generator, and what it makes."""


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """A value as lab.yml describes it."""

    name: str
    type: str
    options: Mapping[str, Any]
    hidden: bool
    about: str


def generate(specs: Sequence[ValueSpec], key: bytes, lab: str) -> Values:
    """All values of one student in one lab."""
    return {s.name: GENERATORS[s.type][0](Stream(key, f"{lab}\0{s.name}"), s.options) for s in specs}


def spread(spec: ValueSpec) -> int:
    """How many different values there can be; two students have the same one by chance 1 : spread."""
    options = spec.options
    match spec.type:
        case "int" | "size" | "uid" | "offset":
            low = int(options.get("min", 20000 if spec.type == "uid" else 0))
            high = int(options.get("max", 59999))
            return max(0, (high - low) // int(options.get("step", options.get("align", 1))) + 1)
        case "choice":
            return len(options["of"])
        case "tag":
            return len(_WORDS) * 90
    return len(_WORDS) ** 2 * 9000


def fill(text: str, values: Mapping[str, Value]) -> str:
    """*text* with ${name} put in from *values*.

    Raises:
        SpecError: there is no such value.
    """
    try:
        return Template(text).substitute(values)
    except KeyError as error:
        raise SpecError(
            f"{text!r} asks for the value {error.args[0]!r}, which is not there", "add it to values"
        ) from None
    except ValueError:
        raise SpecError(f"{text!r} has a $ that begins no ${{name}}", "write $$ for one $") from None


def others(answer: str, name: str, specs: Sequence[ValueSpec], keys: Mapping[str, bytes], lab: str) -> Iterator[str]:
    """The students for whom *answer* would be the value *name*."""
    spec = next((s for s in specs if s.name == name), None)
    if spec is None:
        raise LabError(f"lab {lab} has no value {name}")
    for student, key in keys.items():
        if str(generate([spec], key, lab)[name]) == answer:
            yield student


def fingerprint(key: bytes) -> str:
    """Eight hexadecimal digits by which people tell keys apart."""
    return sha256(b"fingerprint\0" + key).hexdigest()[:8]
