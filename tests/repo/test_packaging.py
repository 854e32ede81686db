"""Proves that the wheel holds the library's files and works with few other packages.

The clean environment is a new venv with links to the run-time packages and their requirements: no
triton, no gguf, no matplotlib, no test oracle. Nothing is downloaded.
"""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest

from helpers.source import ROOT, constraints, sources

pytestmark = pytest.mark.slow

ABSENT = (
    "triton",
    "gguf",
    "matplotlib",
    "fastapi",
    "transformers",
    "peft",
    "bitsandbytes",
    "pytest",
)
C_SOURCES = (
    "attention",
    "attention_backward",
    "cross_entropy",
    "linear_token",
    "nf4_dequantize",
    "nf4_gemv",
    "rms_norm",
    "rope",
    "swiglu",
)
C_FILES = {f"{name}.c" for name in C_SOURCES} | {"nf4.h", "numbers.h", "tile.h"}
C_FILES |= {"gguf/blocks.h", "gguf/dequantize.c", "gguf/multiply.c"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Return the output of a command that must succeed, run without this process's PYTHONPATH."""
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), **env}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def requirement_name(line: str) -> str:
    """Return the name in a requirement: numpy for `numpy>=1; python_version > "3"`."""
    return re.split(r"[^\w.-]", line, maxsplit=1)[0]


def needed(*roots: str) -> dict[str, Distribution]:
    """Return these packages and all that they require here, without extras and without triton."""
    found: dict[str, Distribution] = {}
    queue = list(roots)
    while queue:
        name = requirement_name(queue.pop())
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found or key == "triton":
            continue
        try:
            found[key] = distribution(name)
        except PackageNotFoundError:
            continue  # required only on another system or Python
        queue += [line for line in found[key].requires or [] if "extra ==" not in line]
    return found


def clean_environment(folder: Path) -> Path:
    """Make a venv with links to the run-time packages and return its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    for dist in needed(*PROJECT["dependencies"]).values():
        tops = {
            file.parts[0] for file in dist.files or [] if file.parts[0] not in ("..", "__pycache__")
        }
        for top in tops:
            target = Path(str(dist.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    return python


def pip(python: Path, *arguments: str | Path, cwd: Path) -> str:
    """Run this environment's pip on another one; setuptools is linked there and not downloaded."""
    return run(
        sys.executable, "-m", "pip", "--python", python, *arguments, cwd=cwd, PIP_NO_INDEX="1"
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that a build reads, so that it leaves no traces in the repository."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("minilora", "kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", ".", *options, cwd=checkout, PIP_NO_INDEX="1")
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    shipped = sources("minilora", "kernels/minilora_kernels")  # minilora_ptx is a tool to read
    written = {path.removeprefix("kernels/") for path in shipped} | {
        f"minilora_kernels/c/{name}" for name in C_FILES
    }
    written |= {"minilora/serving/page.html", "minilora/py.typed"}
    assert packed == written
    assert any(name.endswith("licenses/LICENSE") for name in names)


USE = """
import importlib.util, sys, torch
from torch import nn
absent = {absent!r}
assert not [name for name in absent if importlib.util.find_spec(name)], "not a clean environment"
import minilora as ml

w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
q = ml.quantize_nf4(w, blocksize=64, double_quant=True)
error = (ml.dequantize_nf4(q) - w).norm() / w.norm()
assert 0.05 < error < 0.12, error      # 0.0873 for normal weights at block size 64

toy = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
x = torch.randn(4, 16)
before = toy(x)
names = ml.inject(toy, ml.LoRAConfig(r=4, target_modules=["0", "2"]))
assert len(names) == 2 and torch.equal(toy(x), before)
toy(x).sum().backward()
assert all(p.grad is not None for p in toy.parameters() if p.requires_grad)
print(ml.__file__)
"""


def test_the_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path):
    python = clean_environment(tmp_path / "env")
    pip(python, "install", "--no-deps", wheel, cwd=tmp_path)
    where = run(python, "-c", USE.format(absent=ABSENT), cwd=tmp_path)
    assert "site-packages" in where and str(ROOT) not in where
    assert "train" in run(python.parent / "minilora", "--help", cwd=tmp_path)


def test_an_editable_install_does_not_shadow_hugging_faces_kernels(checkout: Path, tmp_path: Path):
    """In the repository root `import kernels` must find the installed package, not our folder."""
    python = clean_environment(tmp_path / "env")
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(
        "CUDAProperties = 'from the Hugging Face package'\n"
    )
    pip(python, "install", "--no-deps", "--no-build-isolation", "-e", checkout, cwd=tmp_path)

    code = (
        "import kernels, minilora, minilora_kernels as k\n"
        "print(kernels.CUDAProperties, minilora.__file__, k.__file__)"
    )
    for cwd in (checkout, tmp_path):
        said = run(python, "-c", code, cwd=cwd)
        assert "from the Hugging Face package" in said and said.count(str(checkout)) == 2


def test_constraints_pin_every_package_that_pyproject_names():
    """Users install constraints.txt, so it needs a version of each of them."""
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    asked = {requirement_name(line) for line in [*PROJECT["dependencies"], *extras]} - {"minilora"}
    assert asked <= set(constraints()), f"without a pin: {asked - set(constraints())}"
