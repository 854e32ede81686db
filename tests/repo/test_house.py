"""Proves that the source follows the architecture in CONTRIBUTING.md, by reading it only.

Floors: imports go down or sideways and form no circle. Budgets: parameters, and files in a folder.
Style: docstrings, no broad except, no bare ignore, no path of one machine.
"""

import ast
import re
from inspect import ismodule

import pytest

import minilora as ml
from helpers.source import (
    ALL_FILES,
    LIBRARY_FILES,
    MODULES,
    ROOT,
    STORIES,
    UPWARD,
    floor,
    functions,
    imports,
    is_ours,
    module_of,
    sources,
    text,
    text_files,
    tree,
)

FUNCTION_LINES_P90 = 40
FUNCTION_LINES = 70
READING_PATH = (
    "minilora/lora/layer.py",
    "minilora/lora/inject.py",
    "kernels/minilora_kernels/nf4/codebook.py",
    "kernels/minilora_kernels/nf4/reference.py",
    "kernels/minilora_kernels/triton/nf4_quantize.py",
    "kernels/minilora_kernels/triton/nf4_dequantize.py",
    "minilora/quant/nf4_linear.py",
)
READING_PATH_FILES = 52
PARAMETERS = 8
# The public functions with the most parameters; all after the model or folder are keyword-only.
PARAMETERS_OF = {
    "minilora/models/loader.py:load_model": 9,
    "minilora/models/save.py:save_model": 9,
}
FOLDER_FILES = 14  # __init__.py and __main__.py not counted


# ---- floors


@pytest.mark.parametrize("path", LIBRARY_FILES)
def test_imports_go_down_or_sideways(path: str):
    here = floor(module_of(path))
    assert here is not None, f"{path} has no floor: give it one in FLOORS"
    up = {name: floor(name) for name in imports(path) if is_ours(name)}
    up = {name: there for name, there in up.items() if there is None or there > here}
    up = {name: there for name, there in up.items() if (module_of(path), name) not in UPWARD}
    assert not up, f"{path} (floor {here}) imports upwards: {up}"


def test_imports_make_no_circle():
    edges = {
        module: {n for n in imports(path, typed=False) if n in MODULES}
        - {n for m, n in UPWARD if m == module}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "imports in a circle: " + " -> ".join([*trail, module])
        if module not in done:
            for name in edges[module] - {module}:
                walk(name, (*trail, module))
            done.add(module)

    for module in edges:
        walk(module, ())


def test_the_lora_layer_imports_no_other_module():
    assert not {name for name in imports("minilora/lora/layer.py") if is_ours(name) or not name}


def test_kernels_never_import_minilora():
    for path in sources("kernels"):
        assert not {name for name in imports(path) if name.partition(".")[0] == "minilora"}, path


@pytest.mark.parametrize("path", ALL_FILES)
def test_only_tests_import_the_top_floor(path: str):
    top = {name.partition(".")[0] for name in imports(path)} & {*STORIES, "tests"}
    allowed = {*STORIES, "tests"} if path.startswith("tests/") else {path.partition("/")[0]}
    assert top <= allowed, f"{path} imports from {top - allowed}"


def test_kernels_is_a_source_root():
    """A package named `kernels` would shadow Hugging Face's, and `import peft` would fail."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    guilty = [
        path
        for path in ALL_FILES
        if "kernels" in {name.partition(".")[0] for name in imports(path)}
    ]
    assert not guilty, f"import minilora_kernels instead: {guilty}"


def test_no_entry_of_the_library_is_named_as_a_public_function():
    """No module hides a name that `minilora/__init__.py` binds, so its imports need no order."""
    entries = {
        path.split("/")[1].removesuffix(".py")
        for path in LIBRARY_FILES
        if path.startswith("minilora/")
    }
    hidden = {name for name in entries & set(ml.__all__) if not ismodule(getattr(ml, name))}
    assert not hidden
    assert len(entries - {"__init__", "__main__"}) <= 14


def test_no_import_by_string():
    """importlib, __import__ and sys.modules hide an import from the tests above."""
    hidden = re.compile(r"importlib\.import_module|__import__|sys\.modules")
    guilty = [path for path in LIBRARY_FILES if hidden.search(text(path))]
    assert not guilty, f"import it where it is needed: {guilty}"


# ---- budgets


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function without its docstring."""
    total = (node.end_lineno or 0) - node.lineno + 1
    first = node.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        total -= (first.end_lineno or 0) - first.lineno + 1
    return total


def test_functions_are_short():
    """Ninety per cent have at most 40 lines of code without the docstring, and all at most 70."""
    sizes = {name: code_lines(node) for path in LIBRARY_FILES for name, node in functions(path)}
    assert sorted(sizes.values())[int(0.9 * (len(sizes) - 1))] <= FUNCTION_LINES_P90
    too_long = {name: size for name, size in sizes.items() if size > FUNCTION_LINES}
    assert not too_long, too_long


def reached(path: str) -> set[str]:
    """Return the modules that a file imports, directly or indirectly, also inside functions.

    The search does not follow the public door, which imports everything, or the upward imports in
    UPWARD.
    """
    found: set[str] = set()
    waiting = [module_of(path)]
    while waiting:
        module = waiting.pop()
        if module in found or module not in MODULES or module == "minilora":
            continue
        found.add(module)
        names = {
            name for name in imports(MODULES[module], typed=False) if (module, name) not in UPWARD
        }
        waiting += names
    return found


def test_the_reading_path_reaches_few_files():
    """The path excludes the training loop, so a reader can follow all of its imports."""
    modules = {module for path in READING_PATH for module in reached(path)}
    files = {module for module in modules if not MODULES[module].endswith("__init__.py")}
    assert len(files) <= READING_PATH_FILES, sorted(files)


@pytest.mark.parametrize("path", LIBRARY_FILES)
def test_signatures_are_narrow(path: str):
    for name, node in functions(path):
        if any("triton" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue  # a kernel takes pointers, sizes and strides
        a = node.args
        names = [
            arg.arg
            for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))
        ]
        count = len([n for n in names if n not in ("self", "cls", "ctx")])
        assert count <= PARAMETERS_OF.get(name, PARAMETERS), f"{name} takes {count} parameters"


def test_folders_are_small():
    for folder in {(ROOT / path).parent for path in LIBRARY_FILES}:
        files = [
            file.name
            for file in folder.glob("*.py")
            if file.name not in ("__init__.py", "__main__.py")
        ]
        assert len(files) <= FOLDER_FILES, f"{folder.name}/ holds {len(files)} files"


# ---- style


@pytest.mark.parametrize("path", LIBRARY_FILES)
def test_modules_and_public_names_have_docstrings(path: str):
    body = tree(path).body
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]
    mute = [node.name for node in public if not ast.get_docstring(node)]
    mute += ["the module"] if body and not ast.get_docstring(tree(path)) else []
    assert not mute, f"{path}: no docstring: {mute}"


@pytest.mark.parametrize("path", ALL_FILES)
def test_no_broad_except(path: str):
    """Errors are caught by name; a broad handler must end in a bare `raise`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "Exception"
            last = node.body[-1]
            raises = isinstance(last, ast.Raise) and last.exc is None
            broad = re.search(r"\b(Base)?Exception\b", caught)
            assert raises or not broad, f"{path}:{node.lineno} catches {caught}"


IGNORE = re.compile(r"#\s*(?:type|pyright):\s*ignore(?P<rule>\[[\w, -]+\])?(?P<rest>.*)")


@pytest.mark.parametrize("path", ALL_FILES)
def test_an_ignored_type_error_has_a_rule_and_a_reason(path: str):
    for number, line in enumerate(text(path).splitlines(), 1):
        if (found := IGNORE.search(line)) and "IGNORE" not in line:
            assert found["rule"] and len(found["rest"].strip(" #:")) >= 5, (
                f"{path}:{number} ignores without a reason"
            )


def test_no_path_of_one_machine():
    machine = re.compile(r"(^|[^A-Za-z0-9_.])/(tmp|work|farm|root|home)/[A-Za-z0-9._-]+")
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not machine.search(line), (
                f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            )
