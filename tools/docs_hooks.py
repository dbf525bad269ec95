"""What mkdocs does besides Markdown, without plugins: generated pages, drawings in the page, times of the README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import docs_generate
import docs_labs

ROOT = Path(__file__).resolve().parents[1]
TIMES = "<!-- times -->"
_IMAGE = re.compile(r'<p><img alt="([^"]*)" src="[^"]*assets/([a-z-]+)\.svg" /></p>')


def on_config(config: Any) -> Any:
    """Add the labs' guides to the navigation, and the published results of benchmarks, if there are any."""
    for entry in config.nav:
        if isinstance(entry, dict) and "Labs" in entry:
            entry["Labs"][1:1] = list(docs_labs.guides(ROOT))
    pages = [f"results/{path.name}" for path in sorted((ROOT / "docs" / "results").glob("*.md"))]
    if pages and all(isinstance(entry, dict) for entry in config.nav):
        titles = [next(iter(entry)) for entry in config.nav]
        config.nav.insert(titles.index("Reference"), {"Results": pages})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, generate in docs_generate.PAGES.items():
        files.append(File.generated(config, path, content=generate(ROOT)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the README's table of times, and those of the labs, where a page asks for them."""
    markdown = docs_labs.marked(markdown, ROOT)
    return markdown.replace(TIMES, times(ROOT)) if TIMES in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Put drawings into the page itself, so that they follow its light or dark scheme."""
    return _IMAGE.sub(lambda match: figure(ROOT, match[2], match[1]), html)


def times(root: Path) -> str:
    """Return the table between the README's two marks: measured once, written once."""
    return (root / "README.md").read_text().split(TIMES)[1].strip()


def figure(root: Path, name: str, alt: str) -> str:
    """Return a drawing as part of a page: without its own style, which is for viewers outside of the site."""
    svg = (root / "docs" / "assets" / f"{name}.svg").read_text()
    svg = re.sub(r"<\?xml.*?\?>\s*|<style>.*?</style>\s*", "", svg, flags=re.DOTALL)
    # Several drawings share a page: what they refer to by name must not be each other's.
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace("url(#", f"url(#{name}-")
    return f'<figure class="drawing" aria-label="{alt}">{svg}</figure>'
