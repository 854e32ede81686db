"""Execute the notebooks and write them, with outputs and pictures, to out/notebooks.

    python docs/site/executed_notebooks.py

A written notebook holds a key: a hash of its source, of the settings, and of the versions of
minilora and torch. A notebook whose key is unchanged is not executed again, so only the first run
takes minutes. Remove out/notebooks to execute all of them.

The first cell gets a link that opens the notebook in Google Colab, and a second cell installs
minilora there. Both need the address of the repository: [project.urls] in pyproject.toml, or the
variables that GitHub Actions sets. Without an address both are left out.

MINILORA_SHORT=1 executes the short forms, with fewer rows and steps.
"""

import hashlib
import os
import time
import tomllib
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import torch
from nbconvert.preprocessors import ExecutePreprocessor

import minilora as ml

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out" / "notebooks"
KEY = "minilora_key"  # of a notebook's metadata
BRANCH = "notebooks"  # .github/workflows/pages.yml pushes the written notebooks to this branch
LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}  # nbconvert highlights by it
EXTRAS = "gguf,plot,structured"  # a notebook needs these packages in addition to minilora's own
INSTALL = """\
# This cell installs minilora on Google Colab. On another machine it changes nothing.
import sys

if "google.colab" in sys.modules:
    %pip install -q "minilora[{extras}] @ git+{address}"
"""


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for path in sources():
        name = os.path.relpath(written(path))
        if current(path):
            print(f"{name}: unchanged", flush=True)
            continue
        start = time.monotonic()
        notebook = execute(path)
        part = written(path).with_suffix(".part")
        nbformat.write(notebook, part)
        part.replace(written(path))
        print(f"{name}: executed in {time.monotonic() - start:.0f} s", flush=True)


def sources() -> list[Path]:
    """Return the paths of all notebooks in the order of their numbers."""
    return sorted(ROOT.glob("notebooks/*.py"), key=number)


def number(path: Path) -> int:
    """Return the number at the beginning of a notebook's name."""
    return int(path.name.partition("_")[0])


def written(path: Path) -> Path:
    """Return the path of the executed form of a notebook."""
    return OUT / path.with_suffix(".ipynb").name


def current(path: Path) -> Any | None:
    """Return the executed form of a notebook, or None if it is missing or out of date."""
    if not written(path).exists():
        return None
    notebook = nbformat.read(written(path), as_version=4)
    return notebook if notebook.metadata.get(KEY) == key(path) else None


def key(path: Path) -> str:
    """Return the hash of all that decides the outputs of a notebook."""
    parts = [
        path.read_text(encoding="utf-8"),
        repository() or "",
        os.environ.get("MINILORA_SHORT", ""),
        ml.__version__,
        torch.__version__,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def repository() -> str | None:
    """Return the address of the repository: https://github.com/OWNER/NAME."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project.get("urls", {}).get("Repository")
    if address is None and "GITHUB_REPOSITORY" in os.environ:
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        address = f"{server}/{os.environ['GITHUB_REPOSITORY']}"
    return address


def read(path: Path, address: str | None) -> Any:
    """Return a notebook without outputs, with the cells for Colab if there is an `address`."""
    notebook = jupytext.read(path)
    notebook.metadata["language_info"] = LANGUAGE
    if address is not None:
        first = notebook.cells[0]
        title, _, rest = first.source.partition("\n")
        first.source = f"{title}\n\n[Open in Google Colab]({colab(path, address)})\n{rest}"
        install = INSTALL.format(extras=EXTRAS, address=address)
        notebook.cells.insert(1, nbformat.v4.new_code_cell(install.rstrip()))
    return notebook


def colab(path: Path, address: str) -> str:
    """Return the address that opens the executed form of a notebook in Google Colab."""
    owner_and_name = address.removesuffix("/").removesuffix(".git").split("/", 3)[3]
    file = f"notebooks/{written(path).name}"
    return f"https://colab.research.google.com/github/{owner_and_name}/blob/{BRANCH}/{file}"


def execute(path: Path) -> Any:
    """Return a notebook with its outputs. A cell that fails ends the run with its error."""
    notebook = read(path, repository())
    folder = {"metadata": {"path": str(path.parent)}}
    ExecutePreprocessor(timeout=None, kernel_name="python3").preprocess(notebook, folder)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = shown(cell.outputs)
    notebook.metadata[KEY] = key(path)
    return notebook


def shown(outputs: list[Any]) -> list[Any]:
    """Return outputs without stderr, whose messages are about this machine: its paths and network.

    The printed lines between two messages become one output.
    """
    kept: list[Any] = []
    for output in outputs:
        kind = output.get("name")
        if kind == "stderr":
            continue
        if kind == "stdout" and kept and kept[-1].get("name") == "stdout":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


if __name__ == "__main__":
    main()
