"""Tests of the documentation pages.

Links lead to existing files and headings, examples print the output that they show, the minutes of
the reading order follow from the numbers of lines, and `make docs` builds a site with every public
name and no dead link.
"""

import doctest
import re
import subprocess
import sys

import pytest

import minilora as ml
from helpers.source import ROOT, lines, text

PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
]
PAGES += ["kernels/README.md"]
NOTEBOOKS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("notebooks/*.py"))]


def prose(page: str) -> str:
    """Return a page without its fenced code, or the comments of a notebook."""
    said = text(page)
    if page.endswith(".py"):
        said = "\n".join(
            line.removeprefix("#").strip() for line in said.splitlines() if line.startswith("#")
        )
    return re.sub(r"^```.*?^```", "", said, flags=re.M | re.S)


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_equal_those_of_github():
    assert {"reading-order", "limits-and-what-to-use-instead"} <= anchors("README.md")


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS])
def test_links_lead_to_existing_files_and_headings(page: str):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", prose(page)):
        there = (ROOT / page).parent / target if target else ROOT / page
        assert there.exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(there.resolve().relative_to(ROOT).as_posix()), (
                f"{page}: no heading {anchor}"
            )


def test_the_site_lists_every_page():
    listed = set(re.findall(r'"([\w/]+\.md)"', text("docs/site/zensical.toml")))
    asked = {page for page in PAGES if page.startswith("docs/")} | {
        page[:-3] + ".md" for page in NOTEBOOKS
    }
    assert listed == asked | {"README.md", "kernels/README.md"}


@pytest.mark.parametrize("page", [page for page in PAGES if ">>> " in text(page)])
def test_examples_print_the_output_that_they_show(page: str):
    failed, tried = doctest.testfile(str(ROOT / page), module_relative=False)
    assert tried and not failed


def test_minutes_of_the_reading_order_follow_from_the_lines():
    """The README assumes about twenty lines per minute."""
    steps = re.findall(
        r"^\d+\. \[`([\w/]+\.py)`\]\(\S+\), (\d+) minutes", text("README.md"), flags=re.M
    )
    assert len(steps) >= 15
    for path, minutes in steps:
        assert abs(int(minutes) - lines(path) / 20) <= 1, f"{path} has {lines(path)} lines"


@pytest.mark.slow  # imports nbconvert, describes every public name
def test_the_site_is_built_and_describes_every_public_name():
    for command in (
        ["docs/site/pages.py"],
        ["-m", "zensical", "build", "-s", "-f", "out/zensical.toml"],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    site = ROOT / "out" / "site"
    reference = (site / "docs" / "reference.html").read_text(encoding="utf-8")
    assert not [name for name in ml.__all__ if name[0] != "_" and f">ml.{name}<a" not in reference]
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert site / "index.html" in pages and len(pages) > len(PAGES) + len(NOTEBOOKS)
    assert not [
        page
        for page, html in pages.items()
        if re.search(r'src="https?:|<link[^>]*stylesheet[^>]*https?:', html)
    ]
    book = pages[site / "notebooks" / "1_lora_from_scratch.html"]
    assert (
        '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"' in book
        and "\\cdot" not in book
    )
