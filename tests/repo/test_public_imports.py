"""Proves that examples and notebooks import public names only.

Public are the names in `__all__` of the rooms in `DOORS`, and whole files of `minilora_kernels` that a
notebook studies: the specification of NF4, the operations and the Triton kernels.
"""

import ast
import importlib

import pytest

from helpers.source import ROOT

DOORS = ("minilora", "minilora_kernels", "minilora_ptx")
STUDIED = (
    "minilora_kernels.nf4",
    "minilora_kernels.nf4.reference",
    "minilora_kernels.ops",
    "minilora_kernels.triton",
)
FILES = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("notebooks/*.py")])


def private_imports(code: str) -> list[str]:
    """Return the imports of our packages that do not go through a door."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            ours = [name for name in names if name.split(".")[0] in DOORS]
            found += [name for name in ours if name not in DOORS]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in DOORS:
            found += _not_public(node)
    return found


def _not_public(node: ast.ImportFrom) -> list[str]:
    """Return the names of a `from` import that are not public."""
    if node.module.startswith(STUDIED):
        return []
    names = [alias.name for alias in node.names]
    public = importlib.import_module(node.module).__all__ if node.module in DOORS else ()
    return [f"{node.module}.{name}" for name in names if name not in public]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_lesson_imports_public_names(file):
    assert private_imports(file.read_text()) == []


def test_a_private_import_is_found():
    code = "import minilora.lora\nfrom minilora.lora.layer import LoRALayer\nfrom minilora import lora\n"
    private = ["minilora.lora", "minilora.lora.layer.LoRALayer", "minilora.lora"]
    assert private_imports(code) == private
    assert (
        private_imports("import minilora as ml\nfrom minilora_kernels.ops.rope import rotate") == []
    )
