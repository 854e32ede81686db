"""Tests that the README, the packages and the pages name files that exist.

The README lists the packages and one reading order. The docstring of a package's `__init__.py`
lists the package's files.
"""

import re

import pytest

from helpers.source import ALL_FILES, LIBRARY, ROOT, text

ROOMS = sorted(path.parent for folder in LIBRARY for path in (ROOT / folder).rglob("__init__.py"))


def files_of(room) -> set[str]:
    """Return the names of a package's files and folders, without caches and `__init__`."""
    names = {
        path.name for path in room.iterdir() if path.suffix in (".py", ".html") or path.is_dir()
    }
    return names - {"__init__.py", "__main__.py", "__pycache__"}


@pytest.mark.parametrize("room", ROOMS, ids=[str(room.relative_to(ROOT)) for room in ROOMS])
def test_a_package_lists_its_files(room):
    """The README lists the packages of minilora."""
    listing = text((room / "__init__.py").relative_to(ROOT).as_posix())
    if room.name == "minilora":
        listing = text("README.md")
    for name in files_of(room):
        stem = name.removesuffix(".py")
        assert re.search(rf"\b{re.escape(stem)}\b", listing), (
            f"{room.name}/__init__.py does not list {name}"
        )


def test_the_readme_lists_every_package_of_the_library():
    for entry in files_of(ROOT / "minilora"):
        path = f"minilora/{entry}" + ("/" if "." not in entry else "")
        assert f"`{path}`" in text("README.md"), f"the README does not list {path}"


def test_the_readme_is_short():
    assert len(text("README.md").splitlines()) <= 200


def test_the_readme_numbers_the_reading_order():
    section = text("README.md").partition("## Reading order")[2].partition("\n## ")[0]
    steps = re.findall(r"^(\d+)\. \[`([\w./]+\.py)`\]\(([\w./]+)\)", section, flags=re.M)
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    for _, name, link in steps:
        assert name == link and name in ALL_FILES, f"{name} does not exist"
    notebooks = [name for _, name, _ in steps if name.startswith("notebooks/")]
    expected = [path for path in ALL_FILES if path.startswith("notebooks/")]
    expected.sort(key=lambda path: int(re.findall(r"\d+", path)[0]))
    assert notebooks == expected


def test_every_claim_about_peers_cites_its_test():
    rows = [
        line.split("|") for line in text("docs/peers.md").splitlines() if line.startswith("| ")
    ][1:]
    for *_, cited, _ in rows:
        names = re.findall(r"`(test_\w+\.py)`", cited)
        assert names and all(
            any(path.endswith(f"/{name}") for path in ALL_FILES) for name in names
        ), cited
    assert len(rows) >= 10
