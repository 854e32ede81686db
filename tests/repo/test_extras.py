"""Proves that a missing optional package is an error that names its extra of pyproject.toml.

Every package that the library imports belongs to the run-time packages or to an extra in
`common/extras.py`. Each one is hidden in turn, and the function that needs it is called.
"""

import sys
import tomllib
from pathlib import Path

import pytest

import minilora as ml
from helpers.source import ROOT, import_nodes, is_ours, sources, tree
from minilora.common.extras import EXTRAS, require
from minilora.data.read_rows import read_dataset
from minilora.generation.structured import compile_schema
from minilora.models.gguf.read import GGUFCheckpoint
from minilora.serving.serve import check as check_server
from minilora.training.logs.trackers import check_trackers

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# torch brings jinja2, huggingface_hub brings tqdm. A transformers model brings transformers. IPython
# is imported in a notebook only.
RUN_TIME = {"torch", "numpy", "safetensors", "huggingface_hub", "tokenizers", "triton"}
RUN_TIME |= {"jinja2", "tqdm", "transformers", "IPython"}
PACKAGES = sorted(package for packages in EXTRAS.values() for package in packages)


def use(package: str, folder: Path) -> None:
    """Call the function that needs a package."""
    rows = folder / "rows.parquet"
    rows.touch()
    calls = {
        "gguf": lambda: GGUFCheckpoint(folder / "model.gguf"),
        "pyarrow": lambda: read_dataset(rows),
        "matplotlib": ml.plot.codebook,
        "optuna": lambda: ml.sweep([], {"r": "4,8"}, folder),
        "fastapi": lambda: check_server(ml.ServeConfig()),
        "uvicorn": lambda: check_server(ml.ServeConfig()),
        "llguidance": lambda: compile_schema("json", None, {0}),
        "bitsandbytes": lambda: ml.verify(folder, against="bitsandbytes"),
    }
    for tracker in EXTRAS["track"]:
        calls[tracker] = lambda: check_trackers(ml.TrainConfig(report_to=package))
    calls[package]()


@pytest.mark.parametrize("package", PACKAGES)
def test_missing_package_names_its_extra(package: str, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    extra = next(extra for extra, packages in EXTRAS.items() if package in packages)
    with pytest.raises(ImportError, match=rf"needs {package}, .*pip install -e '\.\[{extra}\]'"):
        use(package, tmp_path)


def test_extras_are_those_of_the_project():
    declared = PROJECT["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert set(packages) <= set(declared[extra]), extra


def test_every_imported_package_is_declared():
    imported = set()
    for path in sources("minilora"):
        for node in import_nodes(tree(path), typed=False):
            modules = [alias.name for alias in node.names]
            if not hasattr(node, "level"):
                imported |= {name.partition(".")[0] for name in modules}
            elif not node.level:
                imported.add(node.module.partition(".")[0])
    others = {name for name in imported if not is_ours(name)} - sys.stdlib_module_names
    others -= {"pydantic", "starlette"}  # fastapi brings both
    # tensorboard is imported by torch.utils.tensorboard.
    assert others - RUN_TIME == set(PACKAGES) - {"tensorboard"}


def test_installed_packages_raise_nothing():
    require("this test", "gguf")
