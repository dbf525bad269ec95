"""The documentation: it builds, it loads nothing from elsewhere, and what it names is there."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
MARKDOWN = [*OUTSIDE, *sorted(ROOT.glob("roles/*/README.md")), *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("docs_generate")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def package() -> None:
    sys.path.insert(0, str(ROOT / "xen9p-src" / "src"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; building it is strict, so a broken link or anchor fails here."""
    config = pytest.importorskip("mkdocs.config")
    build = importlib.import_module("mkdocs.commands.build")
    target = tmp_path_factory.mktemp("site")
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(target), strict=True))
    return target


def test_every_page_is_there(site: Path, generate: ModuleType) -> None:
    for page in generate.PAGES:
        assert (site / page).with_suffix(".html").is_file()


def test_guides_are_there_and_solutions_are_not(site: Path) -> None:
    text = "\n".join(page.read_text() for page in (site / "labs").glob("*.html"))
    index = (site / "search" / "search_index.json").read_text()
    for lab in ROOT.glob("labs/*/lab.yml"):
        assert (site / "labs" / f"{lab.parent.name}.html").is_file()
        for path in (lab.parent / "solution").rglob("*.md"):
            for line in path.read_text().splitlines():
                # What the guide prints may stand in the solution, too.
                if len(line) > 40 and line not in (lab.parent / "guide.md").read_text():
                    assert line not in text + index, f"{path} is on the site: {line}"


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures are local: the site works without a network."""
    pattern = re.compile(r"""<(?:script|img|iframe)[^>]*\ssrc="?(https?:)?//|<link[^>]*\shref="?(https?:)?//""")
    for page in site.rglob("*.html"):
        assert not pattern.search(page.read_text()), page.name
    for sheet in DOCS.rglob("*.css"):
        assert "http" not in sheet.read_text()


def test_drawings_are_put_into_the_page(site: Path) -> None:
    html = (site / "architecture.html").read_text()
    assert html.count('<figure class="drawing"') == (DOCS / "architecture.md").read_text().count("](assets/")
    assert "assets/data-path.svg" not in html


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path, generate: ModuleType) -> None:
    for target in LINK.findall(path.read_text()):
        name = target.partition("#")[0]
        if not name or re.match(r"[a-z]+:", name):
            continue
        there = (path.parent / name).resolve()
        generated = there.is_relative_to(DOCS) and str(there.relative_to(DOCS)) in generate.PAGES
        assert generated or there.exists(), f"{path.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_of_the_repository_exist(path: Path) -> None:
    """`playbooks/reset.yml` in the text is a file here; other names in code style are of other machines."""
    for name in re.findall(r"`?((?:playbooks|plugins|tools|inventory/classroom|tests)/[\w./-]+\w)", path.read_text()):
        assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


def test_the_tests_that_security_names_exist() -> None:
    sources = [*(ROOT / "xen9p-src" / "tests").glob("test_*.py"), *(ROOT / "tests").rglob("test_*.py")]
    defined = set(re.findall(r"^\s*def (test_\w+)", "\n".join(path.read_text() for path in sources), re.M))
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "security.md").read_text()))
    assert named
    assert named <= defined, named - defined


def test_the_policy_examples_are_policies(package: None) -> None:
    policy = importlib.import_module("xen9p.policy")
    examples = re.findall(r"```toml\n(.*?)```", (DOCS / "reference" / "policy.md").read_text(), re.S)
    assert examples
    for text in examples:
        assert policy.parse(text, "example").rules


def test_the_policy_reference_names_every_key(package: None) -> None:
    text = (DOCS / "reference" / "policy.md").read_text()
    source = (ROOT / "xen9p-src/src/xen9p/policy.py").read_text()
    keys = {
        key for group in re.findall(r"_known\([^)]*?\((\"[^)]*)\)", source) for key in re.findall(r'"(\w+)"', group)
    }
    policy = importlib.import_module("xen9p.policy")
    keys |= {*policy._RULE_KEYS, *policy.LIMITS}
    assert keys >= {"version", "path", "guest", "uuid", "export", "tag", "access", "attach", "checks", "bytes", "fids"}
    for key in keys - {"exports", "rules"}:
        assert f"| `{key}` |" in text, key


def test_every_request_has_its_place(generate: ModuleType, package: None) -> None:
    messages = importlib.import_module("xen9p.codec").MESSAGES
    requests = {cls.__name__ for number, cls in messages.items() if number % 2 == 0} - {"Tlerror"}
    rows = generate.handled(ROOT)
    assert {row.name for row in rows} == requests
    assert {row.where for row in rows} == {"reader", "pool", "Python"}


def test_every_note_belongs_to_a_handler(generate: ModuleType) -> None:
    assert set(generate.NOTES) <= {row.by for row in generate.handled(ROOT)}


def test_every_variable_is_listed(generate: ModuleType) -> None:
    text = generate.variables(ROOT)
    for path in ROOT.glob("roles/*/defaults/main.yml"):
        for name in re.findall(r"^([a-z]\w*):", path.read_text(), re.M):
            assert f"`{name}`" in text, f"{path.relative_to(ROOT)} has {name}, its argument_specs.yml has not"


def test_every_command_is_listed(generate: ModuleType) -> None:
    text = generate.commands(ROOT)
    for heading in ("## xen9p\n", "### xen9p status\n", "### xen9p policy check\n", "## xen9pd\n"):
        assert heading in text


def test_generated_pages_do_not_vary(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for page, make in generate.PAGES.items():
        monkeypatch.setenv("COLUMNS", "40")
        narrow = make(ROOT)
        monkeypatch.setenv("COLUMNS", "200")
        assert make(ROOT) == narrow, page
        assert str(Path.home()) not in narrow, page


def test_drawings_share_one_style() -> None:
    """Those of extra.css, once more for viewers that show a drawing by itself."""
    rules = [line for line in (DOCS / "assets" / "extra.css").read_text().splitlines() if ".d-" in line]
    wanted = {line.removeprefix('[data-md-color-scheme="slate"] ') for line in rules}
    drawings = [path for path in DOCS.glob("assets/*.svg") if path.name != "logo.svg"]
    assert drawings
    for path in drawings:
        style = re.search(r"<style>(.*?)</style>", path.read_text(), re.S)
        assert style, path.name
        assert {line.strip() for line in style[1].splitlines() if ".d-" in line} == wanted, path.name


def test_every_metric_is_in_the_documentations_table() -> None:
    text = (ROOT / "docs/observability.md").read_text()
    named = set(re.findall(r"`(xen9p_[a-z_]+)`", text))
    source = (ROOT / "xen9p-src/src/xen9p/metrics.py").read_text()
    plain = re.findall(r'^ {4}(?:\("|\(\n {8}")([a-z_]+)", ?\n? *"(?:counter|gauge)"', source, re.M)
    assert len(plain) > 20
    assert {f"xen9p_{name}" for name in plain} <= named


def test_every_make_target_of_the_documentation_is_there() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {(page.name, name) for page in pages for name in re.findall(r"`make ([a-z-]+)", page.read_text())}
    named |= {(page.name, name) for page in pages for name in re.findall(r"^make ([a-z-]+)", page.read_text(), re.M)}
    assert len(named) > 20
    assert sorted(one for one in named if one[1] not in targets) == []
