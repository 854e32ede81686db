"""Stage the site in out/pages: python docs/site/pages.py && zensical build -s -f out/zensical.toml (`make docs`).

README.md, docs/*.md, …     as they are, at the same paths, so that their links hold
notebooks/N_name.py         its prose and cells; with outputs and pictures where `make notebooks` has run
another file that is linked its text, so that a link into the code is a page that needs no network
docs/reference.md           and below it every public name, from its signature and docstring
"""

import inspect
import os
import re
import shutil
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jupytext
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter

import minilora as ml

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out" / "pages"  # beside it the settings, as a site may not leave their folder
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)")  # of a relative link: its path
MATHS = re.compile(r"\$\$(.+?)\$\$|(?<![\w$`])\$(?=\S)([^$`]+?)(?<=\S)\$(?![\w$`])", re.S)
MODULES = re.compile(
    r"\b(?:torch\.nn\.modules\.module|collections\.abc|typing|pathlib|minilora(?:\.\w+)+)\.(?=[A-Z])"
)
WRITTEN = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels" / "README.md"]


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("zensical.toml"), OUT.parent)
    for path in sorted(WRITTEN):
        page = path.read_text(encoding="utf-8")
        if path.name == "reference.md":
            page += "\n".join(
                [
                    "",
                    *(
                        described(f"ml.{name}", getattr(ml, name))
                        for name in ml.__all__
                        if not name.startswith("_")
                    ),
                ]
            )
        write(path, page)
    for path in sorted(ROOT.glob("notebooks/*.py")):
        write(path, notebook(path))
    print(f"{len(list(OUT.rglob('*.md')))} pages in {os.path.relpath(OUT)}")


def write(path: Path, page: str) -> None:
    """A page at the place of `path`, its links into the repository turned to pages, those made if need be."""

    def turned(found: re.Match[str]) -> str:
        target = (path.parent / found[2]).resolve()
        if not target.exists() and path.suffix == ".py":
            return found[0]  # a picture of a notebook
        shown = staged(target)
        if not shown.exists():
            shown.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix in (".svg", ".html", ".png"):
                shutil.copy(target, shown)
            elif target not in WRITTEN and target.parent.name != "notebooks":
                language = {".py": "python", ".c": "c", ".toml": "toml"}.get(target.suffix, "text")
                name = target.relative_to(ROOT).as_posix()
                shown.write_text(
                    f"# {name}\n\n````{language}\n{target.read_text(encoding='utf-8')}````\n"
                )
        return found[1] + os.path.relpath(shown, staged(path).parent)

    fences = re.split(
        r"(^ {0,3}```.*?^ {0,3}```)", page, flags=re.M | re.S
    )  # code keeps its brackets
    parts = [
        part if part.lstrip().startswith("```") else typeset(LINK.sub(turned, part))
        for part in fences
    ]
    staged(path).parent.mkdir(parents=True, exist_ok=True)
    staged(path).write_text("".join(parts), encoding="utf-8")


def typeset(prose: str) -> str:
    """Formulas, $…$ and $$…$$, as MathML, which browsers set by themselves: no script, no network."""

    def one(found: re.Match[str]) -> str:
        if found[1]:
            return convert(found[1], display="block")
        return (
            f"<span>{convert(found[2])}</span>"  # Markdown would cut a paragraph at a bare <math>
        )

    return MATHS.sub(one, prose)


def staged(path: Path) -> Path:
    """Where a file of the repository stands among the pages: code as a page beside its name."""
    there = OUT / path.relative_to(ROOT)
    if path.parent.name == "notebooks":
        return there.with_suffix(".md")
    return (
        there
        if there.suffix in (".md", ".svg", ".html", ".png")
        else there.with_name(there.name + ".md")
    )


def notebook(path: Path) -> str:
    """A notebook as Markdown: executed, if its .ipynb stands beside it and is as new."""
    built = path.with_suffix(".ipynb")
    fresh = built.exists() and built.stat().st_mtime >= path.stat().st_mtime
    page, resources = MarkdownExporter().from_notebook_node(jupytext.read(built if fresh else path))
    pictures = staged(path).with_suffix("")
    for name, picture in resources["outputs"].items():
        pictures.mkdir(parents=True, exist_ok=True)
        (pictures / name).write_bytes(picture)
    return re.sub(r"(!\[[^]]*\]\()(output_)", rf"\g<1>{pictures.name}/\2", page)


def described(name: str, value: Any, level: int = 2) -> str:
    """A public name: its signature as code, its docstring as it is laid out; of a module each name in it."""
    head = f"{'#' * level} {name}\n\n"
    said = f"```text\n{inspect.getdoc(value)}\n```\n"
    if isinstance(value, ModuleType):
        inner = [
            described(f"{name}.{item}", getattr(value, item), level + 1) for item in value.__all__
        ]
        return "\n".join([head + said, *inner])
    return f"{head}```python\n{signature(name, value)}\n```\n\n{said}{options(value)}"


def signature(name: str, value: Any) -> str:
    """As one would write the call, on one line where it fits; of a config the options stand below."""
    if options(value):
        return f"{name}(…)"
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):  # what is no function
        return name
    parts, starred = [], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts, starred = [*parts, "*"], True
        parts.append(str(parameter).replace(" = <factory>", " = {}"))
    returns = "" if inspect.isclass(value) or found.return_annotation is found.empty else " -> "
    returns += inspect.formatannotation(found.return_annotation) if returns else ""
    line = MODULES.sub("", f"{name}({', '.join(parts)}){returns}")
    return (
        line
        if len(line) <= 100
        else MODULES.sub("", f"{name}(\n    " + ",\n    ".join(parts) + f"\n){returns}")
    )


def options(value: Any) -> str:
    """What the fields of a config mean, as `--help` has it."""
    if not is_dataclass(value):
        return ""
    told = [field for field in fields(value) if "help" in field.metadata]
    rows = "".join(f"| `{f.name}` | {default(f)} | {f.metadata['help']} |\n" for f in told)
    return f"\n| option | default | |\n|---|---|---|\n{rows}" if rows else ""


def default(field: Field[Any]) -> str:
    """A field's default as code, nothing where it has none."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return "" if value is MISSING else f"`{value!r}`"


if __name__ == "__main__":
    main()
