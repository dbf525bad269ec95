"""A picture of the ways to a file as SVG: for each way its stations in a row, with counts, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, BOX, HIGH, GAP, TOP, ROW = 1000, 104, 62, 7, 40, 122
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #222 }
.head, .count { font-weight: 600 } .quiet { fill: #666; font-size: 12px } .small { font-size: 10.5px }
.guest { fill: #d9ece9; stroke: #0b7a75 } .dom0 { fill: #f5e3d0; stroke: #c9772b } .none { fill: none; stroke: #8a8fa3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e6e6 } .quiet { fill: #a8a8a8 }
  .guest { fill: #123d3a; stroke: #35b5ae } .dom0 { fill: #4a3018; stroke: #e09a56 }
}
"""

# A station is narrow.
SHORT = {"guest filesystem block": "ext4 block", "virtual disk sector": "disk sector"}

Row = tuple[str, str, list[tuple[str, str, str]]]
"""Head, line below, and the stations: how often, by whom, what becomes what."""


def picture(title: str, rows: Sequence[Row]) -> str:
    """Return the SVG. A station of the guest has the guest's colour, one of dom0 dom0's; the ring is between them."""
    parts = [f'<text class="head" x="0" y="16">{escape(title)}</text>']
    for number, (head, under, stations) in enumerate(rows):
        y = TOP + number * ROW
        parts.append(f'<text class="head" x="0" y="{y + 12}">{escape(head)}</text>')
        for place, (count, by, what) in enumerate(stations):
            parts += _station(place * (BOX + GAP), y + 20, count, by, what)
        parts.append(f'<text class="quiet" x="0" y="{y + 20 + HIGH + 16}">{escape(under)}</text>')
    height = TOP + len(rows) * ROW
    body = "\n".join(parts)
    summary = "; ".join(head for head, _, _ in rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(f"{title}: {summary}")}">\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def _station(x: int, y: int, count: str, by: str, what: str) -> list[str]:
    kind = "guest" if by.startswith("guest") else "dom0" if by.startswith("dom0") else "none"
    source, target = (SHORT.get(space, space) for space in what.split(" → "))
    middle = x + BOX / 2
    lines = [("count", 16, count), ("small", 31, source), ("small", 44, f"→ {target}"), ("small", 57, by)]
    parts = [f'<rect class="{kind}" x="{x}" y="{y}" width="{BOX}" height="{HIGH}" rx="5"/>']
    parts += [
        f'<text class="{style}" x="{middle}" y="{y + down}" text-anchor="middle"{_squeezed(text)}>{escape(text)}</text>'
        for style, down, text in lines
    ]
    return parts


def _squeezed(text: str) -> str:
    """What does not fit into a station is made narrower, never longer."""
    return f' textLength="{BOX - 8}" lengthAdjust="spacingAndGlyphs"' if len(text) > 18 else ""
