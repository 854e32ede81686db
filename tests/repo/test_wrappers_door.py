"""Proves that every public function with a model sees through the wrappers around it.

torch.compile, DDP and others put a module around a model. A function that reads an attribute or a
path of what it is given would work on the wrapper.
"""

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import pytest

import minilora as ml
from helpers.source import LIBRARY_FILES, text

PARAMETERS = ("model", "original")
EXCEPTIONS = {  # with the function that a body must call instead
    "compare_exports": "load_model",  # its model is a path
    "Objective.loss": None,  # a protocol without a body
    # They run the wrapper itself, so that a compiled forward or DDP does its work, and find the
    # model inside it in labelled_positions.
    "DPO.loss": "answer_logprobs",
    "Distill.loss": "labelled_positions",
    "KLToBase.loss": "labelled_positions",
    "SFT.loss": "token_loss",
    "GRPO.loss": "labelled_positions",
    "OnPolicyDistill.loss": "labelled_positions",
    "losses.answer_logprobs": "labelled_positions",
    "losses.token_loss": "labelled_positions",
    "losses.mean_loss": "_means",
    "losses.means": "_means",
    # They pass the model on to a function of this file.
    "AdapterWeights.of": "contents",
    "AdapterWeights.put": "put_contents",
    "Classify.loss": "self.logits",
    "Classify.logits": "last_token_scores",
    "Classify.predict": "self.logits",
    "RewardModel.add_head": "add_score_head",
    "RewardModel.loss": "_rewards",
    "RewardModel.score": "_rewards",
    "RewardModel.reward_function": "self.score",
}
# Files that may walk modules as torch does, with the reason.
WALKERS = {
    "minilora/common/wrappers.py": "the walk itself",
    "minilora/models/loader.py": "a new model has no wrappers",
    "minilora/generation/cuda_graph.py": "it reads the kinds of modules, and no path",
    "minilora/tools/trace/run.py": "it refuses compiled models",
}


def public_functions() -> Iterator[tuple[str, Any]]:
    """Yield every public function and method with a model, by name."""
    for name in ml.__all__:
        member = getattr(ml, name)
        if isinstance(member, types.ModuleType):
            for inner in member.__all__:
                yield from with_model(f"{name}.{inner}", getattr(member, inner))
        else:
            yield from with_model(name, member)


def with_model(name: str, member: Any) -> Iterator[tuple[str, Any]]:
    """Yield a function, or the methods of a class, that have a model as a parameter."""
    if inspect.isclass(member):
        class_name = name.rpartition(".")[2]
        for method in vars(member):
            if not method.startswith("_"):
                yield from with_model(f"{class_name}.{method}", getattr(member, method))
        return
    function = inspect.unwrap(member)
    if inspect.isfunction(function) or inspect.ismethod(function):
        if set(PARAMETERS) & set(inspect.signature(function).parameters):
            yield name, function


FUNCTIONS = dict(public_functions())


def test_the_list_has_the_functions_that_everyone_uses():
    expected = {
        "inject",
        "save_adapter",
        "disable_adapters",
        "train",
        "generate",
        "Classify.logits",
    }
    assert expected <= FUNCTIONS.keys() and len(FUNCTIONS) > 30
    assert EXCEPTIONS.keys() <= FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_function_unwraps_its_model(name):
    tree = ast.parse(textwrap.dedent(inspect.getsource(FUNCTIONS[name])))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if name in EXCEPTIONS:
        assert EXCEPTIONS[name] in {*called, None}
    else:
        assert "unwrap_model" in called, f"{name}: model = unwrap_model(model)"


WALK = re.compile(r"\w\.(named_modules|get_submodule|set_submodule)\(")


@pytest.mark.parametrize("path", [p for p in LIBRARY_FILES if p.startswith("minilora/")])
def test_paths_of_modules_come_from_the_walk_without_wrappers(path):
    if path not in WALKERS:
        assert not WALK.search(text(path)), f"{path}: use the function of minilora.common"
