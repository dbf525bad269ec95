"""A chart of benchmark results as SVG: horizontal bars in groups, in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from bench_stats import SIDES, Result

WIDTH, LABEL, BAR, GAP, TOP = 760, 150, 18, 16, 44
ROOM = 170  # to the right of the longest bar, for its figures
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #222 }
.quiet { fill: #666 } .head { font-weight: 600 }
.ours { fill: #0b7a75 } .cached { fill: #4d9f8f } .fuse { fill: #8fc1b5 } .theirs { fill: #c9772b }
.block { fill: #8a8fa3 } .qdisk { fill: #b3a0b8 } .floor { fill: #c9b458 } .line { fill: none; stroke-width: 2 }
.ours-line { stroke: #0b7a75 } .cached-line { stroke: #c9772b } .fuse-line { stroke: #6a6fb0 }
.ours-dot { fill: #0b7a75 } .cached-dot { fill: #c9772b } .fuse-dot { fill: #6a6fb0 }
.grid { stroke: #8a8fa3; stroke-width: .5; opacity: .6 }
.spread { stroke: #222; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e6e6 } .quiet { fill: #a8a8a8 } .spread { stroke: #e6e6e6 }
  .ours { fill: #35b5ae } .cached { fill: #2b8a80 } .fuse { fill: #1f6560 } .theirs { fill: #e09a56 }
  .ours-line { stroke: #35b5ae } .cached-line { stroke: #e09a56 } .fuse-line { stroke: #9aa0e0 }
  .block { fill: #9aa0b8 } .qdisk { fill: #8d7793 } .floor { fill: #a8943c }
}
"""


def chart(title: str, groups: Sequence[tuple[str, Result]], own_scale: bool = False) -> str:
    """Return the SVG: for each labelled result a bar a side (median seconds), with its quartiles and ratio.

    With *own_scale* the longest bar of each result is as long as there is room.
    """
    longest = max(spread.high for _, found in groups for spread in found.sides.values())
    most = max(spread.q3 for _, found in groups for spread in found.sides.values())
    parts = [f'<text class="head" x="0" y="16">{escape(title)}</text>']
    y = TOP
    for label, found in groups:
        scale = (WIDTH - LABEL - ROOM) / (max(spread.q3 for spread in found.sides.values()) if own_scale else most)
        parts.append(f'<text class="head" x="0" y="{y - 6}">{escape(label)}</text>')
        for side, spread in found.sides.items():
            end = LABEL + spread.median * scale
            middle = y + BAR / 2
            ratio = "" if side == "ours" else f", {found.ratio[side]:.1f} times ours"
            parts += [
                f'<text class="quiet" x="{LABEL - 8}" y="{middle + 4.5}" text-anchor="end">'
                f"{escape(SIDES[side])}</text>",
                f'<rect class="{side}" x="{LABEL}" y="{y + 1}" width="{spread.median * scale:.1f}" '
                f'height="{BAR - 2}"/>',
                f'<line class="spread" x1="{LABEL + spread.q1 * scale:.1f}" x2="{LABEL + spread.q3 * scale:.1f}" '
                f'y1="{middle}" y2="{middle}"/>',
                f'<text x="{max(end, LABEL + spread.q3 * scale) + 6:.1f}" y="{middle + 4.5}">'
                f"{seconds(spread.median)}{ratio}</text>",
            ]
            y += BAR
        y += GAP + 14
    height = y - 8
    summary = f"{title}; the longest sample took {seconds(longest)}"
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(summary)}">\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def seconds(value: float) -> str:
    """Return a time with its unit: s, or what is finer where seconds would be 0.00."""
    if value >= 0.02:
        return f"{figure(value)} s"
    return f"{value * 1e3:.2f} ms" if value >= 0.0005 else f"{value * 1e6:.0f} µs"


def figure(value: float) -> str:
    """Return seconds with as many digits as they are worth."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def lines(title: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Return the SVG: a line for each named series of (size, value); sizes on a logarithmic scale, values from 0."""
    points = [point for line in series.values() for point in line]
    sizes = sorted({size for size, _ in points})
    top, bottom, left, right = TOP, 300, 56, WIDTH - ROOM
    first, last = math.log10(sizes[0]), math.log10(sizes[-1])
    most = max(value for _, value in points) * 1.1

    def x(size: int) -> float:
        return left + (math.log10(size) - first) / ((last - first) or 1) * (right - left)

    def y(value: float) -> float:
        return bottom - value / most * (bottom - top)

    parts = [f'<text class="head" x="0" y="16">{escape(title)}</text>']
    for value in (0, most / 2, most):
        parts.append(f'<text class="quiet" x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0f}</text>')
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
    for size in sizes:
        parts.append(f'<text class="quiet" x="{x(size):.1f}" y="{bottom + 20}" text-anchor="middle">{size:,}</text>')
    # A series' colour is a side's, without meaning it.
    labels = sorted(((line[-1][1], name) for name, line in series.items()), reverse=True)
    heights = dict(zip((name for _, name in labels), _apart([y(value) for value, _ in labels]), strict=True))
    for colour, (name, line) in zip(SIDES, series.items(), strict=False):
        path = " ".join(f"{x(size):.1f},{y(value):.1f}" for size, value in line)
        parts.append(f'<polyline class="line {colour}-line" points="{path}"/>')
        parts += [f'<circle class="{colour}-dot" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.5"/>' for s, v in line]
        parts.append(f'<text x="{right + 10}" y="{heights[name] + 4:.1f}">{escape(name)}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 32}" role="img" '
        f'aria-label="{escape(title)}">\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def _apart(heights: Sequence[float], least: float = 16) -> list[float]:
    """Move labels down until none covers another; they come from top to bottom."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + least) if placed else height)
    return placed
