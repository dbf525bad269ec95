"""Bytes that a guest chose, made fit for a terminal, a log or JSON."""

from __future__ import annotations

_SHORT = {ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r", ord("\\"): "\\\\", ord('"'): '\\"'}


def escape(data: bytes) -> str:
    r"""Readable text that holds all of the bytes: what cannot be printed becomes \n, \t, \r or \xNN.

    Control characters, invalid UTF-8, and characters that Unicode calls formatting or separators (they can turn or
    hide the text around them) never come through.
    """
    out = []
    for char in data.decode(errors="surrogateescape"):
        if (short := _SHORT.get(ord(char))) is not None:
            out.append(short)
        elif char.isprintable():
            out.append(char)
        else:
            out += [f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape")]
    return "".join(out)
