"""Proves that every public function of the library documents each of its parameters.

ruff checks the form of docstrings (rule D, google convention); it accepts a missing `Args:`
section.
"""

import ast
import re
from collections.abc import Iterator

import pytest

from helpers.source import ALL_FILES, LIBRARY_FILES, ROOT, text, text_files, tree

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(scope: ast.AST) -> Iterator[Function]:
    """Yield the functions and methods that others may call."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)


def parameters(node: Function) -> list[str]:
    """Return the names of a function's parameters, without self and cls."""
    a = node.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    arguments += [argument for argument in (a.vararg, a.kwarg) if argument]
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


def undocumented(node: Function) -> list[str]:
    """Return the parameters that the docstring's `Args:` section does not name."""
    section = (ast.get_docstring(node) or "").partition("Args:")[2]
    return [
        name
        for name in parameters(node)
        if not re.search(rf"^\s*\*?\*?{name}:", section, flags=re.M)
    ]


def test_undocumented_finds_a_missing_parameter():
    source = (
        'def f(a, b=1, *c, **d):\n    """Return.\n\n    Args:\n'
        '        a: one.\n        c: three.\n    """\n'
    )
    assert undocumented(ast.parse(source).body[0]) == ["b", "d"]
    assert undocumented(ast.parse('def f(a):\n    """Return."""\n').body[0]) == ["a"]


@pytest.mark.parametrize("path", LIBRARY_FILES)
def test_public_functions_document_every_parameter(path: str):
    missing = {}
    for node in public_functions(tree(path)):
        if undocumented(node):
            missing[node.name] = undocumented(node)
    assert not missing, f"{path}: no entry under Args: {missing}"


OPENINGS = re.compile(r"^(What|Whether|How|Who|Where|Of|All of|Those|That|One's)\b")


@pytest.mark.parametrize("path", LIBRARY_FILES)
def test_docstrings_begin_with_a_verb_or_a_noun(path: str):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            assert not OPENINGS.match(docstring), f"{path}: {docstring.splitlines()[0]}"


NAMED = re.compile(
    r"(?<![\w/.-])((?:minilora|kernels|tests|examples|notebooks|benchmarks|docs)/[\w/-]+\.\w+)"
)


def test_every_file_that_a_text_names_exists():
    """Check paths from the root in pages, docstrings and comments, except in docs/LOG.md."""
    wrong = []
    pages = [path.relative_to(ROOT).as_posix() for path in text_files() if path.suffix == ".md"]
    for path in sorted({*ALL_FILES, *pages}):
        if path == "docs/LOG.md":
            continue
        for name in NAMED.findall(text(path)):
            if not (ROOT / name).exists() and not name.endswith(".ipynb"):
                wrong.append(f"{path}: {name}")
    assert not wrong, "\n".join(wrong)
