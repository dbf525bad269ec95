"""Results as pages for people: one file each, with nothing loaded from elsewhere; drawings are inline SVG.

The colours follow the reader's light or dark scheme, and no meaning is in colour alone: each status has its sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

Results = Mapping[str, Any]

SIGNS: Final = {
    "passed": "✓",
    "partial": "◐",
    "failed": "✗",
    "not_tried": "·",
    "unreachable": "?",
    "error": "!",
}
WORDS: Final = {
    "passed": "passed",
    "partial": "in part",
    "failed": "not yet",
    "not_tried": "not tried",
    "unreachable": "could not look",
    "error": "the check broke",
}
_DOCS: Final = "docs/"

_STYLE: Final = """
:root { color-scheme: light dark; --text: #1b2733; --soft: #5a6b7b; --page: #fff; --line: #d5dce4; --link: #1d5fa8;
  --passed: #2f8a4c; --partial: #a87600; --failed: #bf5a35; --none: #8796a5; --trouble: #7a4fc0; --track: #e8edf2; }
@media (prefers-color-scheme: dark) { :root { --text: #e8eef4; --soft: #a9b8c7; --page: #14202e; --line: #33445a;
  --link: #7db7f5; --passed: #67b883; --partial: #e0b040; --failed: #e8906e; --none: #75869a; --trouble: #a989e6;
  --track: #26374b; } }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; color: var(--text); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); } a { color: var(--link); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.sign { font-weight: 700; white-space: nowrap; } svg { display: block; width: 100%; height: auto; max-width: 44rem; }
svg text { fill: var(--text); font: 15px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.passed { fill: var(--passed); color: var(--passed); } .partial { fill: var(--partial); color: var(--partial); }
.failed { fill: var(--failed); color: var(--failed); } .not_tried { fill: var(--none); color: var(--none); }
.unreachable, .error { fill: var(--trouble); color: var(--trouble); } .track { fill: var(--track); }
svg .mark { fill: var(--page); font-weight: 700; text-anchor: middle; } svg .end { text-anchor: end; }
svg .quiet { fill: var(--soft); font-size: 13px; }
"""


def student_page(results: Results) -> str:
    """One student's lab, for the student: what is for the instructor alone is not on it."""
    who = results.get("full_name") or results["student"]
    parts = [
        f"<h1>{escape(results['title'])}</h1>",
        f'<p class="soft">{escape(who)}, {escape(results["course"])}, {escape(results["graded_at"])}</p>',
        f"<p><strong>{results['score']:g} of {results['possible']:g} points</strong>{_incomplete(results)}</p>",
        _bar(results),
        "<h2>Checks</h2>",
        '<div class="wide"><table><thead><tr><th>check</th><th>now</th><th class="number">points now</th>'
        '<th class="number">once</th><th class="number">hints</th><th class="number">counted</th>'
        "<th>to do</th></tr></thead><tbody>",
        *(_row(check, results.get("site", "")) for check in results["checks"]),
        "</tbody></table></div>",
        f'<p class="soft">Signed by the {escape(results["signed_by"])}. Points that count are those of now, or those '
        "that were once reached where the check says so, less what hints cost.</p>",
    ]
    return _page(f"{who}: {results['title']}", parts)


def _incomplete(results: Results) -> str:
    if results["complete"]:
        return ""
    return (
        f"; {results['undecided']:g} points are undecided, because something could not be looked at: "
        "this is no grade yet"
    )


def _bar(results: Results) -> str:
    """The points as one bar, a piece for each check."""
    width, x, pieces = 700.0, 0.0, []
    for check in results["checks"]:
        full = width * check["possible"] / results["possible"]
        title = f"<title>{escape(check['title'])}: {check['counted']:g} of {check['possible']:g}</title>"
        pieces.append(
            f'<g>{title}<rect class="track" x="{x + 1:.1f}" y="0" width="{full - 2:.1f}" height="30" rx="3"/>'
        )
        done = full * check["counted"] / check["possible"]
        if done > 2:
            kind = "passed" if check["counted"] >= check["possible"] else "partial"
            pieces.append(f'<rect class="{kind}" x="{x + 1:.1f}" y="0" width="{done - 2:.1f}" height="30" rx="3"/>')
        sign = SIGNS[check["status"]]
        pieces.append(f'<text x="{x + full / 2:.1f}" y="50" text-anchor="middle">{sign}</text></g>')
        x += full
    label = f"{results['score']:g} of {results['possible']:g} points"
    return f'<svg viewBox="0 0 {width:.0f} 58" role="img" aria-label="{label}">{"".join(pieces)}</svg>'


def _row(check: Mapping[str, Any], site: str) -> str:
    status = check["status"]
    todo = ""
    if status == "not_tried":
        todo = f"first: {escape(check.get('parent', ''))}"
    elif status != "passed":
        expected, found = check.get("expected", ""), check.get("found", "")
        todo = "<br>".join(
            [f"expected: {escape(expected)}"] * bool(expected)
            + [f"found: {escape(found)}"] * bool(found)
            + [f"read on: {_link(check['read'], site)}"]
        )
    cost = f"-{check['hint_cost']:g}" if check["hint_cost"] else ""
    return (
        f"<tr><td>{escape(check['title'])}</td>"
        f'<td class="sign {status}">{SIGNS[status]} {WORDS[status]}</td>'
        f'<td class="number">{check["points"]:g} of {check["possible"]:g}</td>'
        f'<td class="number">{check["achieved"]:g}</td>'
        f'<td class="number">{cost}</td><td class="number">{check["counted"]:g}</td><td>{todo}</td></tr>'
    )


def where(read: str, site: str) -> str:
    """Where to read on: an address of the course's site, or the page in the repository."""
    page, hash_, anchor = read.partition("#")
    return f"{site.rstrip('/')}/{page.removesuffix('.md')}.html{hash_}{anchor}" if site else _DOCS + read


def _link(read: str, site: str) -> str:
    text = escape(where(read, site))
    return f'<a href="{text}">{escape(read)}</a>' if site else f"<code>{text}</code>"


def class_page(all_results: Sequence[Results], students: Sequence[str], title: str) -> str:
    """One lab of a class. *students*: all of them, also those of whom there are no results."""
    graded = [r for r in all_results if r["complete"]]
    parts = [f"<h1>{escape(title)}</h1>"]
    if not all_results:
        return _page(title, [*parts, "<p>Nobody has been graded yet.</p>"])
    mean = sum(r["score"] for r in graded) / len(graded) if graded else 0
    missing = [name for name in students if name not in {r["student"] for r in all_results}]
    parts.append(
        f'<p class="soft">{escape(all_results[0]["course"])}: {len(all_results)} of {len(students)} students, '
        f"{len(graded)} complete, {mean:.0f} points on average</p>"
    )
    if missing:
        parts.append(f"<p>No results: {escape(', '.join(missing))}</p>")
    parts += ["<h2>Who is where</h2>", _matrix(all_results), "<h2>Where the class got stuck</h2>", _stuck(all_results)]
    parts.append("<h2>Points</h2>" + _points(all_results))
    notes = [f"{r['student']}: {note}" for r in all_results for note in r.get("instructor", [])]
    if notes:
        parts.append("<h2>To look at</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    signs = ", ".join(f"{SIGNS[s]} {WORDS[s]}" for s in SIGNS)
    parts.append(f'<p class="soft">{signs}</p>')
    return _page(title, parts)


def _matrix(all_results: Sequence[Results]) -> str:
    """A row for each student, a column for each check."""
    checks = [check["name"] for check in all_results[0]["checks"]]
    left, cell, top = 150, 44, 8
    rows = []
    for number, results in enumerate(sorted(all_results, key=lambda r: str(r["student"]))):
        y = top + number * cell
        rows.append(f'<text x="{left - 12}" y="{y + 26}" class="end">{escape(results["student"])}</text>')
        for column, check in enumerate(results["checks"]):
            x = left + column * cell
            title = f"{results['student']}, {check['title']}: {WORDS[check['status']]}"
            rows.append(
                f'<g><title>{escape(title)}</title><rect class="{check["status"]}" x="{x}" y="{y}" width="{cell - 4}" '
                f'height="{cell - 4}" rx="4"/><text class="mark" x="{x + (cell - 4) / 2}" y="{y + 26}">'
                f"{SIGNS[check['status']]}</text></g>"
            )
        x = left + len(checks) * cell + 10
        rows.append(f'<text x="{x}" y="{y + 26}">{results["score"]:g}</text>')
    y = top + len(all_results) * cell + 14
    for column in range(len(checks)):
        rows.append(
            f'<text x="{left + column * cell + 20}" y="{y}" text-anchor="middle" class="quiet">{column + 1}</text>'
        )
    width, height = left + len(checks) * cell + 70, y + 8
    label = "For each student, a sign for each check and the points"
    box = f'viewBox="0 0 {width} {height}" style="max-width:{width}px"'
    return f'<svg {box} role="img" aria-label="{label}">{"".join(rows)}</svg>'


def _stuck(all_results: Sequence[Results]) -> str:
    """A bar for each check: how many have passed it, in part, not, and not come to it. Narrow, for phones."""
    checks = all_results[0]["checks"]
    width, row = 440, 58
    pieces = []
    for number, check in enumerate(checks):
        y = number * row
        statuses = [c["status"] for r in all_results for c in r["checks"] if c["name"] == check["name"]]
        pieces.append(f'<text x="0" y="{y + 18}">{number + 1}. {escape(_cut(check["title"], 50))}</text>')
        x = 0.0
        for status in SIGNS:
            count = statuses.count(status)
            if count:
                part = width * count / len(statuses)
                pieces.append(
                    f"<g><title>{escape(check['title'])}: {count} {WORDS[status]}</title>"
                    f'<rect class="{status}" x="{x:.1f}" y="{y + 26}" width="{part - 2:.1f}" height="24" rx="3"/>'
                    f'<text class="mark" x="{x + part / 2 - 1:.1f}" y="{y + 43}">{count} {SIGNS[status]}</text></g>'
                )
                x += part
    box = f'viewBox="0 0 {width} {len(checks) * row}" style="max-width:34rem"'
    label = "For each check, how many students have passed it"
    return f'<svg {box} role="img" aria-label="{label}">{"".join(pieces)}</svg>'


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _points(all_results: Sequence[Results]) -> str:
    rows = [
        f"<tr><td>{escape(r.get('full_name') or r['student'])}</td><td>{escape(r['host'])}</td>"
        f'<td class="number">{r["score"]:g}{"" if r["complete"] else " ?"}</td><td class="number">{r["attempts"]}</td>'
        f"<td>{escape(r['graded_at'])}</td><td>{escape(r['signed_by'])}</td></tr>"
        for r in sorted(all_results, key=lambda r: str(r["student"]))
    ]
    head = (
        '<tr><th>student</th><th>host</th><th class="number">points</th><th class="number">runs</th><th>graded</th>'
        "<th>signed by</th></tr>"
    )
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _page(title: str, parts: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
