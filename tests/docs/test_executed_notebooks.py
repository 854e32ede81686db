"""Tests of docs/site/executed_notebooks.py, which executes the notebooks for the site.

Property: a notebook is executed again if its source or the address changes, and only then; messages
on stderr are left out. The cells for Google Colab name the address of the repository, and no
address of a stranger appears without one.
"""

from pathlib import Path

import pytest

from docs.site import executed_notebooks as site

CELLS = """# %% [markdown]
# # A title
#
# Text.

# %%
import sys

print("to stdout", flush=True)
print("to stderr", file=sys.stderr, flush=True)
print("again")
"""
ADDRESS = "https://github.com/owner/name.git"


@pytest.fixture
def source(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(site, "OUT", tmp_path / "out")
    monkeypatch.setattr(site, "repository", lambda: None)
    path = tmp_path / "1_name.py"
    path.write_text(CELLS)
    monkeypatch.setattr(site, "sources", lambda: [path])
    return path


def test_a_notebook_is_executed_once_for_each_source(source: Path, monkeypatch, capsys):
    assert site.current(source) is None
    site.main()
    notebook = site.current(source)
    assert notebook is not None
    assert [output.text for output in notebook.cells[1].outputs] == ["to stdout\nagain\n"]
    site.main()
    said = capsys.readouterr().out.splitlines()
    assert "executed in" in said[0] and said[1].endswith("unchanged")
    monkeypatch.setattr(site, "repository", lambda: ADDRESS)
    assert site.current(source) is None
    monkeypatch.setattr(site, "repository", lambda: None)
    assert site.current(source) is not None
    source.write_text(CELLS + "\n1 + 1\n")
    assert site.current(source) is None


def test_cells_for_colab_name_the_repository(source: Path):
    notebook = site.read(source, ADDRESS)
    first, install, code = (cell.source for cell in notebook.cells)
    link = "https://colab.research.google.com/github/owner/name/blob/notebooks/notebooks/"
    assert first == f"# A title\n\n[Open in Google Colab]({link}1_name.ipynb)\n\nText."
    assert f"git+{ADDRESS}" in install and "google.colab" in install
    assert "http" not in str(site.read(source, None)) and code.startswith("import sys")


def test_the_address_is_that_of_pyproject_or_of_github_actions(monkeypatch):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert site.repository() is None or site.repository().startswith("https://")
    monkeypatch.setenv("GITHUB_REPOSITORY", "owner/name")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    urls = (site.ROOT / "pyproject.toml").read_text().partition("[project.urls]")[2]
    assert urls or site.repository() == "https://github.com/owner/name"


def test_notebooks_are_in_the_order_of_their_numbers():
    numbers = [site.number(path) for path in site.sources()]
    assert numbers == list(range(1, len(numbers) + 1))
