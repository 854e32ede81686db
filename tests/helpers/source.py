"""Source files of the repository for the tests of its structure.

Files, syntax trees, imports, and the floors between which imports are allowed.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("minilora", "kernels/minilora_kernels", "kernels/minilora_ptx")
STORIES = ("examples", "notebooks", "benchmarks")

# A package imports only from lower floors. A new package needs a line here.
FLOORS: dict[str, int] = {
    "minilora_kernels": 0,
    "minilora.common": 1,
    "minilora.hub": 1,
    "minilora.quant": 2,
    "minilora.lora": 3,
    "minilora.models": 4,
    "minilora.data": 5,
    "minilora.losses": 6,
    "minilora.generation": 6,
    "minilora.evaluation": 7,
    "minilora.training": 8,
    "minilora.tools": 9,
    "minilora.serving": 9,
    "minilora": 10,
    "minilora.cli": 11,
    "minilora.__main__": 12,
    "minilora_ptx": 13,  # a tool: no other package imports it
}
# The two allowed imports from a higher floor. Both are inside functions: one draws the log of a
# training run, the other explains an out-of-memory error.
UPWARD = {
    ("minilora.training.logs.result", "minilora.tools.plot.logs"),  # TrainResult.plot
    # the note on an out-of-memory error
    ("minilora.training.runtime", "minilora.tools.memory_plan.shortage"),
}


def sources(*folders: str) -> list[str]:
    """Return the paths of the Python files under these folders, relative to the root."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(
        path.relative_to(ROOT).as_posix()
        for path in found
        if ".ipynb_checkpoints" not in path.parts
    )


LIBRARY_FILES = sources(*LIBRARY)
ALL_FILES = sources(*LIBRARY, *STORIES, "tests")


@cache
def text(path: str) -> str:
    """Return the content of a file, by its path from the root."""
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def tree(path: str) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(text(path), path)


def lines(path: str) -> int:
    """Return the number of lines of a file."""
    return len(text(path).splitlines())


def module_of(path: str) -> str:
    """Return the module of a path: minilora/models/__init__.py -> minilora.models.

    kernels/ is a source root and not a part of module names.
    """
    parts = Path(path).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in LIBRARY_FILES}


def is_type_checking(node: ast.AST) -> bool:
    """Return True if a node is `if TYPE_CHECKING: …`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def import_nodes(node: ast.AST, typed: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield every import below `node`, also in functions.

    Imports under `if TYPE_CHECKING:` are included only if `typed`.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif typed or not is_type_checking(child):
            yield from import_nodes(child, typed)


def imports(path: str, typed: bool = True) -> set[str]:
    """Return the dotted names that a file imports.

    `from a import b` gives a.b if that is a module of the library, else a.
    """
    package = (
        module_of(path) if path.endswith("__init__.py") else module_of(path).rpartition(".")[0]
    )
    found: set[str] = set()
    for node in import_nodes(tree(path), typed):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*up, *([node.module] if node.module else [])])
        inner = {f"{base}.{alias.name}" for alias in node.names}
        found |= {name if name in MODULES else base for name in inner}
    return found


def is_ours(name: str) -> bool:
    """Return True if a dotted name belongs to the library."""
    return name.partition(".")[0] in ("minilora", "minilora_kernels", "minilora_ptx")


def floor(module: str) -> int | None:
    """Return the floor of a module by the longest matching name in FLOORS, or None."""
    if module == "minilora":
        return FLOORS[module]
    fitting = [
        room
        for room in FLOORS
        if room != "minilora" and (module == room or module.startswith(room + "."))
    ]
    return FLOORS[max(fitting, key=len)] if fitting else None


def functions(path: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield every function of a file, with methods and inner functions, as (path:name, node)."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path}:{node.name}", node


def text_files() -> Iterator[Path]:
    """Yield every text file of the repository, without caches, environments and outputs."""
    outside = {"out", "build", "dist", "__pycache__"}
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(
            part.startswith(".") or part in outside or part.endswith(".egg-info")
            for part in parts[:-1]
        )
        if (
            path.is_file()
            and not hidden
            and path.suffix in (".py", ".md", ".toml", ".txt", ".ipynb", ".yaml", "")
        ):
            yield path


def constraints() -> dict[str, str]:
    """Return package -> version, as pinned in constraints.txt."""
    lines = (
        line.partition("#")[0].strip()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    )
    return dict(line.split("==") for line in lines if line)
