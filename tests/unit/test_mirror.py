"""The mirror is found in the controller's own apt sources, in either format."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed import mirror

DEB822 = """\
Types: deb
# a comment in the middle
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""


def controller(tmp_path: Path, distribution: str = "debian", **sources: str) -> tuple[Path, Path]:
    """A machine with these apt sources (name_extension=text): its /etc/apt and its /etc/os-release."""
    (tmp_path / "sources.list.d").mkdir()
    for name, text in sources.items():
        file = "sources.list" if name == "sources_list" else f"sources.list.d/{name.replace('_', '.')}"
        (tmp_path / file).write_text(text)
    (tmp_path / "os-release").write_text(f'NAME="whatever"\nID={distribution}\n')
    return tmp_path, tmp_path / "os-release"


def test_deb822(tmp_path: Path) -> None:
    machine = controller(tmp_path, debian_sources=DEB822)
    assert mirror.debian_mirror("bookworm", *machine) == "http://mirror.example/debian"


@pytest.mark.parametrize(
    "line",
    [
        "deb http://m.example/debian bookworm main contrib",
        "deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian/ bookworm main # ours",
        "deb [ arch=amd64 ] http://m.example/debian bookworm main",
    ],
)
def test_one_line(tmp_path: Path, line: str) -> None:
    machine = controller(tmp_path, sources_list=f"# deb http://old.example/debian bookworm main\n{line}\n")
    assert mirror.debian_mirror("bookworm", *machine) == "http://m.example/debian"


def test_another_release_uses_the_same_archive(tmp_path: Path) -> None:
    machine = controller(tmp_path, debian_sources=DEB822)
    assert mirror.debian_mirror("trixie", *machine) == "http://mirror.example/debian"


def test_all_sources_of_the_release(tmp_path: Path) -> None:
    machine = controller(tmp_path, debian_sources=DEB822)
    assert mirror.debian_sources("bookworm", *machine) == [
        "deb http://mirror.example/debian bookworm main",
        "deb http://mirror.example/debian bookworm-updates main",
        "deb http://mirror.example/debian-security bookworm-security main",
    ]
    assert mirror.debian_sources("trixie", *machine) == []


def test_vendors_are_not_debian(tmp_path: Path) -> None:
    machine = controller(tmp_path, vendor_list="deb http://vendor.example/apt stable main\n")
    assert mirror.debian_mirror("bookworm", *machine) is None


def test_disabled_and_source_only_stanzas_do_not_count(tmp_path: Path) -> None:
    text = DEB822.replace("Types: deb\n", "Types: deb-src\n", 1)
    machine = controller(tmp_path, a_sources=text, b_sources="Enabled: no\n" + DEB822)
    assert mirror.debian_mirror("bookworm", *machine) is None


def test_other_distributions_have_no_debian_mirror(tmp_path: Path) -> None:
    machine = controller(tmp_path, distribution="ubuntu", debian_sources=DEB822)
    assert mirror.debian_mirror("bookworm", *machine) is None


def test_no_sources_at_all(tmp_path: Path) -> None:
    assert mirror.debian_mirror("bookworm", tmp_path, tmp_path / "nothing") is None


def test_what_is_given_comes_first() -> None:
    assert mirror.sources("bookworm", "http://m.example/debian") == ["http://m.example/debian"]
