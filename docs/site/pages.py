"""Write the pages of the site to out/pages. `make docs` then runs zensical on them.

    python docs/site/executed_notebooks.py  # minutes, the first time
    python docs/site/pages.py && zensical build -s -f out/zensical.toml

README.md, docs/*.md, …     copied to the same paths, so that their links stay valid
notebooks/N_name.py         text and cells; with outputs and pictures after executed_notebooks.py
other linked files          their text as a page, so that links into the code need no network
docs/reference.md           followed by every public name, from its signature and docstring
"""

import inspect
import os
import re
import shutil
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# This folder is on the path: python puts the folder of the script there.
import executed_notebooks
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter

import minilora as ml

ROOT = Path(__file__).resolve().parents[2]
# The settings are in the folder above: a site cannot leave the folder of its settings.
OUT = ROOT / "out" / "pages"
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)")  # the path of a relative link
FENCE = re.compile(r"(^ {0,3}```.*?^ {0,3}```)", re.M | re.S)  # a block of code
MATHS = re.compile(r"\$\$(.+?)\$\$|(?<![\w$`])\$(?=\S)([^$`]+?)(?<=\S)\$(?![\w$`])", re.S)
MODULES = re.compile(
    r"\b(?:torch\.nn\.modules\.module|collections\.abc|typing|pathlib|minilora(?:\.\w+)+)\.(?=[A-Z])"
)
WRITTEN = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels" / "README.md"]
ASSETS = (".svg", ".html", ".png")  # files that are copied
LANGUAGES = {".py": "python", ".c": "c", ".toml": "toml"}


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("zensical.toml"), OUT.parent)
    shutil.copy(Path(__file__).with_name("site.css"), OUT)
    for path in sorted(WRITTEN):
        page = path.read_text(encoding="utf-8")
        if path.name == "reference.md":
            page += "\n" + described_names()
        write(path, page)
    for path in executed_notebooks.sources():
        write(path, notebook(path))
    count = len(list(OUT.rglob("*.md")))
    print(f"{count} pages in {os.path.relpath(OUT)}")


def described_names() -> str:
    """Return the description of every public name."""
    names = [name for name in ml.__all__ if not name.startswith("_")]
    return "\n".join(described(f"ml.{name}", getattr(ml, name)) for name in names)


def write(path: Path, page: str) -> None:
    """Write a page for `path`.

    Links to files of the repository become links to pages. A missing page is created.
    """

    def linked(match: re.Match[str]) -> str:
        target = (path.parent / match[2]).resolve()
        if not target.exists() and path.suffix == ".py":
            return match[0]  # a picture of a notebook
        page_of_target = staged(target)
        if not page_of_target.exists():
            stage(target, page_of_target)
        return match[1] + os.path.relpath(page_of_target, staged(path).parent)

    parts = []
    for part in FENCE.split(page):
        is_code = part.lstrip().startswith("```")  # brackets in code are not links
        parts.append(part if is_code else typeset(LINK.sub(linked, part)))
    staged(path).parent.mkdir(parents=True, exist_ok=True)
    staged(path).write_text("".join(parts), encoding="utf-8")


def stage(source: Path, page: Path) -> None:
    """Copy a picture, or write the text of a file of code as a page."""
    page.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in ASSETS:
        shutil.copy(source, page)
    elif source not in WRITTEN and source.parent.name != "notebooks":
        language = LANGUAGES.get(source.suffix, "text")
        name = source.relative_to(ROOT).as_posix()
        code = source.read_text(encoding="utf-8")
        page.write_text(f"# {name}\n\n````{language}\n{code}````\n", encoding="utf-8")


def typeset(prose: str) -> str:
    """Return text with formulas, $…$ and $$…$$, as MathML, which browsers display without a script."""

    def formula(match: re.Match[str]) -> str:
        if match[1]:
            return convert(match[1], display="block")
        # Markdown would end a paragraph at <math> without <span>
        return f"<span>{convert(match[2])}</span>"

    return MATHS.sub(formula, prose)


def staged(path: Path) -> Path:
    """Return the path of the page for a file of the repository: FILE.md for a file of code."""
    copied = OUT / path.relative_to(ROOT)
    if path.parent.name == "notebooks":
        return copied.with_suffix(".md")
    if copied.suffix in (".md", *ASSETS):
        return copied
    return copied.with_name(copied.name + ".md")


def notebook(path: Path) -> str:
    """Return a notebook as Markdown, with outputs if its executed form is up to date."""
    content = executed_notebooks.current(path) or executed_notebooks.read(
        path, executed_notebooks.repository()
    )
    page, resources = MarkdownExporter().from_notebook_node(content)
    pictures = staged(path).with_suffix("")
    for name, picture in resources["outputs"].items():
        pictures.mkdir(parents=True, exist_ok=True)
        (pictures / name).write_bytes(picture)
    return re.sub(r"(!\[[^]]*\]\()(output_)", rf"\g<1>{pictures.name}/\2", page)


def described(name: str, value: Any, level: int = 2) -> str:
    """Return the description of a public name.

    It has the signature, the docstring and the options. A module is followed by each of its names.
    """
    heading = f"{'#' * level} {name}\n\n"
    docstring = f"```text\n{inspect.getdoc(value)}\n```\n"
    if isinstance(value, ModuleType):
        parts = [heading + docstring]
        for item in value.__all__:
            parts.append(described(f"{name}.{item}", getattr(value, item), level + 1))
        return "\n".join(parts)
    return f"{heading}```python\n{signature(name, value)}\n```\n\n{docstring}{options(value)}"


def signature(name: str, value: Any) -> str:
    """Return the call of a function, on one line if it fits. A config has its options in a table."""
    if options(value):
        return f"{name}(…)"
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):  # not a function
        return name
    parts = []
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        parts.append(str(parameter).replace(" = <factory>", " = {}"))
    returns = ""
    if not inspect.isclass(value) and found.return_annotation is not found.empty:
        returns = " -> " + inspect.formatannotation(found.return_annotation)
    line = MODULES.sub("", f"{name}({', '.join(parts)}){returns}")
    if len(line) <= 100:
        return line
    arguments = ",\n    ".join(parts)
    return MODULES.sub("", f"{name}(\n    {arguments}\n){returns}")


def options(value: Any) -> str:
    """Return a table of the fields of a config with the texts of `--help`, or nothing."""
    if not is_dataclass(value):
        return ""
    rows = ""
    for field in fields(value):
        if "help" in field.metadata:
            rows += f"| `{field.name}` | {default(field)} | {field.metadata['help']} |\n"
    return f"\n| option | default | |\n|---|---|---|\n{rows}" if rows else ""


def default(field: Field[Any]) -> str:
    """Return the default of a field as code, or nothing if it has none."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return "" if value is MISSING else f"`{value!r}`"


if __name__ == "__main__":
    main()
