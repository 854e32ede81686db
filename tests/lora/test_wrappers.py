"""Tests that a wrapper around a model, or inside it, changes neither its adapters nor their files.

torch.compile (around the model, around its blocks, in place), activation checkpointing, DDP,
DataParallel, AveragedModel and PEFT's wrapper. Oracle: the same calls without the wrapper, and
PEFT, which loads the file with the same logits. Property: switching, ejecting and training reach
the model inside, and training runs the compiled forward. Errors: wrappers that `train` replaces.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import minilora as ml
from helpers.kinds import shake
from helpers.tiny import VOCAB, oracle, tokens, twin
from helpers.toy import FAST, Letters, llama, rows
from minilora.common import named_modules, unwrap_model
from minilora.lora.files.find import WEIGHTS_FILE
from minilora.losses.sft import token_loss
from minilora.models.padded_batch import Context

TOKENS = tokens(2, 9)
CONFIG = ml.LoRAConfig(
    r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def each_block(wrap: Callable[[nn.Module], Any]) -> Callable[[Any], Any]:
    """Return a function that wraps every block of a model and returns the model."""

    def wrap_blocks(model: Any) -> Any:
        for index, block in enumerate(model.model.layers):
            model.model.layers[index] = wrap(block)
        return model

    return wrap_blocks


def each_layer(model: Any) -> Any:
    """Compile one adapted layer of every block."""
    for block in model.model.layers:
        block.mlp.up_proj = compiled(block.mlp.up_proj)
    return model


WRAPPERS = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "two wrappers": lambda model: compiled(nn.DataParallel(model)),
    "compiled blocks": each_block(compiled),
    "compiled layers": each_layer,
    "checkpointed blocks": each_block(checkpoint_wrapper),
}


def close(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare logits of a size of about 3, up to fp32 roundings: compiled blocks add in another order.

    The adapter of these tests moves them by more than 0.1.
    """
    return bool((logits - expected).abs().max() < 1e-4)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folder of an adapter that was made without a wrapper."""
    model = twin(oracle())
    ml.inject(model, CONFIG)
    shake(model)
    folder = tmp_path_factory.mktemp("adapter")
    ml.save_adapter(model, folder)
    return folder


# ---- oracle: the file without a wrapper, and PEFT


@pytest.mark.parametrize("inject_first", [False, True], ids=["wrapped, injected", "injected"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_adapter_file_of_a_wrapped_model_is_that_of_the_model(wrap, inject_first, saved, tmp_path):
    model = twin(oracle())
    if inject_first:
        names = ml.inject(model, CONFIG)
        wrapped = wrap(model)
    else:
        wrapped = wrap(model)
        names = ml.inject(wrapped, CONFIG)
    assert "model.layers.0.mlp.up_proj" in names and len(names) == 6
    plain = twin(oracle())
    ml.inject(plain, CONFIG)
    state = ml.adapter_state_dict(plain)
    for key, tensor in ml.adapter_state_dict(wrapped).items():
        assert torch.equal(tensor, state[key]), key  # the initial values depend on the name
    ml.load_adapter(wrapped, saved)
    ml.save_adapter(wrapped, tmp_path)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (saved / WEIGHTS_FILE).read_bytes()


def test_peft_loads_the_file_of_a_compiled_model_with_equal_logits(tmp_path):
    base = oracle()
    wrapped = compiled(twin(base))
    ml.inject(wrapped, CONFIG)
    shake(wrapped)
    ml.save_adapter(wrapped, tmp_path)
    assert not [key for key in load_file(tmp_path / WEIGHTS_FILE) if "_orig_mod" in key]
    theirs = PeftModel.from_pretrained(base, str(tmp_path))
    with torch.no_grad():
        ours = unwrap_model(wrapped)(TOKENS)
        # fp32 roundings of two decoders; the adapter moves the logits by more than 1
        assert (theirs(TOKENS).logits - ours).abs().max() < 1e-4
        with ml.disable_adapters(wrapped):
            assert (unwrap_model(wrapped)(TOKENS) - ours).abs().max() > 1e-1


# ---- property: every door leads to the model inside


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_adapters_of_a_wrapped_model_are_switched_merged_and_ejected(wrap):
    base = twin(oracle())
    expected = base(TOKENS)
    wrapped = wrap(copy.deepcopy(base))
    model = unwrap_model(wrapped)
    ml.inject(wrapped, CONFIG, name="a")
    shake(wrapped)
    trained = model(TOKENS)
    assert not close(trained, expected)
    assert ml.list_adapters(wrapped) == ["a"]
    with ml.disable_adapters(wrapped):
        assert close(model(TOKENS), expected)
    assert close(model(TOKENS), trained)
    merged = ml.merge(wrapped)
    assert [path for path, _ in merged.named_modules()] == [path for path, _ in named_modules(base)]
    assert close(merged(TOKENS), trained)
    ml.inject(wrapped, ml.LoRAConfig(r=2, target_modules=["q_proj"]), name="b")
    assert not model.get_submodule("lm_head").weight.requires_grad
    ml.set_adapter(wrapped, "a")
    assert close(model(TOKENS), trained)
    ml.delete_adapter(wrapped, "b")
    assert ml.base_state_dict(wrapped).keys() == base.state_dict().keys()
    ml.eject(wrapped)
    assert close(model(TOKENS), expected)
    assert [path for path, _ in named_modules(wrapped)] == [path for path, _ in named_modules(base)]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_quantize_model_through_a_wrapper_keeps_the_head_dense(wrap):
    plain = twin(oracle())
    wrapped = wrap(twin(oracle()))
    assert ml.quantize_model(wrapped) == ml.quantize_model(plain)
    model = unwrap_model(wrapped)
    assert type(model.get_submodule("lm_head")) is nn.Linear
    with torch.no_grad():
        assert close(model(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, AveragedModel])
def test_text_and_scores_of_a_wrapped_model_are_those_of_the_model(wrap):
    model = llama()
    wrapped = wrap(llama())
    question = rows(2)
    assert ml.generate(wrapped, Letters(), "ab", max_new_tokens=4, seed=0) == ml.generate(
        model, Letters(), "ab", max_new_tokens=4, seed=0
    )
    scores = ml.evaluate(wrapped, Letters(), question, max_new_tokens=2)
    assert scores == ml.evaluate(model, Letters(), question, max_new_tokens=2)
    assert str(ml.count_parameters(wrapped)) == str(ml.count_parameters(model))


# ---- property: training


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("wrap", [compiled, in_place, each_block(compiled)])
def test_train_runs_the_compiled_forward_and_saves_plain_names(wrap, tmp_path):
    config = ml.TrainConfig(**FAST | {"max_steps": 2, "output_dir": str(tmp_path / "plain")})
    plain = llama()
    ml.inject(plain, ml.LoRAConfig(r=4, target_modules="all-linear"))
    expected = ml.train(plain, Letters(), rows(), config)

    model = llama()
    ml.inject(model, ml.LoRAConfig(r=4, target_modules="all-linear"))
    config = ml.TrainConfig(**FAST | {"max_steps": 2, "output_dir": str(tmp_path / "wrapped")})
    result = ml.train(wrap(model), Letters(), rows(), config)
    # 2 layers · 7 LoRALayers are called in every compiled pass
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 14
    # the same sums in the same order, up to fp32 roundings of a loss near 5
    assert result.losses == pytest.approx(expected.losses, rel=1e-6)
    for name in (WEIGHTS_FILE, "trainer_state.safetensors"):
        ours = load_file(result.checkpoint / name)
        theirs = load_file(expected.checkpoint / name)
        assert ours.keys() == theirs.keys()


def test_a_run_continues_with_and_without_the_compiler(tmp_path):
    config = FAST | {"output_dir": str(tmp_path), "resume_from_checkpoint": None}
    model = llama()
    ml.inject(model, ml.LoRAConfig(r=4, target_modules="all-linear"))
    ml.train(compiled(model), Letters(), rows(), ml.TrainConfig(**config | {"max_steps": 1}))
    again = llama()
    ml.inject(again, ml.LoRAConfig(r=4, target_modules="all-linear"))
    config |= {"max_steps": 2, "resume_from_checkpoint": "last"}
    assert ml.train(again, Letters(), rows(), ml.TrainConfig(**config)).steps == 2


# ---- PEFT's models


def peft_model() -> Any:
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    return get_peft_model(oracle(), config)


@pytest.mark.parametrize("change", ["inject", "load_adapter"])
def test_a_model_with_pefts_adapters_is_refused_unchanged(change, saved):
    theirs = peft_model()
    flags = {name: p.requires_grad for name, p in theirs.named_parameters()}
    modules = dict(theirs.named_modules())
    for model in (theirs, theirs.get_base_model()):
        with pytest.raises(ValueError, match=r"adapters of PEFT already.*unload\(\)"):
            if change == "inject":
                ml.inject(model, ml.LoRAConfig(target_modules="all-linear"))
            else:
                ml.load_adapter(model, saved)
    assert flags == {name: p.requires_grad for name, p in theirs.named_parameters()}
    assert modules == dict(theirs.named_modules())
    base = theirs.unload()
    assert ml.inject(base, ml.LoRAConfig(target_modules=["q_proj"]))


def test_quantize_model_leaves_pefts_factors_and_heads_dense():
    theirs = peft_model()
    trainable = {name: p.dtype for name, p in theirs.named_parameters() if p.requires_grad}
    names = ml.quantize_model(theirs)
    assert "model.layers.0.self_attn.q_proj.base_layer" in names and len(names) == 3 * 7
    assert trainable == {name: p.dtype for name, p in theirs.named_parameters() if p.requires_grad}
    assert theirs(TOKENS).logits.shape == (2, 9, VOCAB)


def test_a_model_with_tokens_of_its_own_has_no_labels():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = get_peft_model(oracle(), config)
    assert unwrap_model(theirs) is theirs
    with pytest.raises(ValueError, match="logits at 12 positions for 9 tokens"):
        token_loss(theirs, {"input_ids": TOKENS, "labels": TOKENS})
    with pytest.raises(ValueError, match="logits at 12 positions for 9 tokens"):
        Context(theirs).extend(TOKENS.tolist())


# ---- errors


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: compiled(nn.DataParallel(model))], ids=["plain", "both"]
)
def test_train_refuses_a_model_that_a_wrapper_spreads_over_devices(wrap):
    model = llama()
    ml.inject(model)
    with pytest.raises(ValueError, match="with a DataParallel.*without this wrapper"):
        ml.train(wrap(model), Letters(), rows(), ml.TrainConfig(**FAST))


def test_train_refuses_to_shard_a_compiled_model():
    model = llama()
    ml.inject(model)
    with pytest.raises(ValueError, match="a compiled model cannot be sharded"):
        ml.train(compiled(model), Letters(), rows(), ml.TrainConfig(**FAST, fsdp=True))
