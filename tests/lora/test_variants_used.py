"""Tests of all operations on adapters with DoRA, PiSSA and LoftQ.

Each works or is refused: merge, switch, eject, trace, checkpoints, 4 bits, 16 bits, a memory plan.
Property: a new adapter changes nothing, and W never changes, except where LoftQ replaces it with a
warning.
"""

import copy
import json

import pytest
import torch
from torch import nn

import minilora as ml
from helpers.kinds import build, output, shake
from helpers.tiny import twin
from helpers.toy import Letters, rows
from minilora.lora.files.save_load import CONFIG_FILE
from minilora.lora.registry import lora_layers
from minilora.lora.variants.dora import DoRAAdapter
from minilora.lora.variants.loftq import REPLACED
from minilora.lora.variants.pissa import PiSSAAdapter
from minilora.models.config import DecoderConfig
from minilora.models.padded_batch import inference
from tests.lora.test_variants import (
    DORA,
    KEEPS_W,
    LOFTQ,
    PISSA,
    RESIDUAL,
    SOME,
    VARIANTS,
    adapters,
    close,
    injected,
    small,
)

pytestmark = RESIDUAL
variants = pytest.mark.parametrize("given", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Skip fsync, which these tests do not need."""
    monkeypatch.setattr("os.fsync", lambda _: None)


# ---- property: a new adapter changes nothing, and W never changes


@KEEPS_W
@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4 bits"])
def test_new_variant_keeps_w_and_the_output_bit_for_bit(given, quantised):
    model = twin(small(attention_bias=True))
    if quantised:
        ml.quantize_model(model)
    expected, state = output(model), copy.deepcopy(model.state_dict())
    injected(given, model)
    assert torch.equal(output(model), expected)
    moved = output(shake(model))
    assert (moved - expected).abs().max() > 0.1
    with ml.disable_adapters(model):
        assert torch.equal(output(model), expected)
    assert torch.equal(output(model), moved)
    base = ml.base_state_dict(model)
    assert base.keys() == state.keys() and all(torch.equal(base[key], state[key]) for key in state)
    close(ml.merge(model), model)
    ml.eject(model)
    assert torch.equal(output(model), expected) and all(
        p.requires_grad for p in model.parameters() if p.dim() == 1 and p.is_floating_point()
    )


def test_loftq_warns_that_it_replaces_the_base_and_both_files_load(tmp_path):
    model = twin(small())
    ml.save_model(model, tmp_path / "plain")
    targets = {"target_modules": "all-linear"}
    with pytest.warns(UserWarning) as caught:
        injected(LOFTQ | targets, model)
    assert {str(one.message) for one in caught} == {REPLACED}
    expected = output(shake(model))
    ml.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["init_lora_weights"] is True
    ml.eject(model)
    ml.save_model(model, tmp_path / "base", format="bnb-4bit")
    again = ml.load_model(tmp_path / "base", dtype="float32", device="cpu")
    ml.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(output(again), expected)
    for kind in (None, "nf4"):  # the adapter does not fit W or NF4(W)
        other = ml.load_model(tmp_path / "plain", dtype="float32", device="cpu", quantize=kind)
        with pytest.raises(ValueError, match="other weights|another base|differ"):
            ml.load_adapter(other, tmp_path / "adapter")


@variants
def test_resumed_and_checkpointed_runs_equal_the_whole_run(given, tmp_path):
    """A resumed run, and a run with gradient checkpointing, equal the whole run."""

    def run(folder, **options):
        model = injected(given, twin(small(vocab_size=len(Letters()))))
        fast = {
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "output_dir": str(folder),
            "save_steps": 2,
        }
        result = ml.train(model, Letters(), rows(20), ml.TrainConfig(max_steps=4, **fast | options))
        return result.losses, ml.adapter_state_dict(model)

    losses, whole = run(tmp_path / "a")
    again, resumed = run(
        tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2")
    )
    assert again == losses and all(torch.equal(resumed[key], whole[key]) for key in whole)
    recomputed, checkpointed = run(tmp_path / "c", gradient_checkpointing=True)
    assert recomputed == losses and all(torch.equal(checkpointed[key], whole[key]) for key in whole)


@KEEPS_W
def test_reference_ops_trace_copy_and_state_dict_give_the_same_output(given):
    model = shake(injected(given))
    expected = output(model)
    with ml.reference_ops():
        plain = output(model)
    with ml.trace(model, "layers.0.mlp.down_proj") as found, inference(model):
        traced = output(model)
    torch.testing.assert_close(plain, expected, rtol=0, atol=3e-5)
    assert torch.equal(traced, plain)
    kind = DoRAAdapter if given is DORA else PiSSAAdapter
    assert kind.__name__ in str(found)
    assert torch.equal(output(copy.deepcopy(model)), expected)
    other = injected(given)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), expected)
    assert {
        p.dtype for adapter in adapters(model.bfloat16()).values() for p in adapter.parameters()
    } == {torch.float32}
    assert torch.isfinite(output(model)).all() and output(model).dtype == torch.bfloat16


@KEEPS_W
def test_in_16_bits_the_error_is_that_of_the_base(given):
    """Compared with fp64, the error is at most 4 bf16 roundings (2⁻⁹ each) above the base's."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(128, 64, bias=False))
    model = shake(injected(given | {"target_modules": ["0"]}, layer))
    x = torch.randn(32, 128).bfloat16()
    W = ml.merge(model)[0].weight.double()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    expected = x.double() @ W.T
    assert (y.double() - expected).norm() <= 4 * 2**-9 * (
        expected.norm() + (x.double() @ layer[0].weight.double().T).norm()
    )


@pytest.mark.parametrize("given", [DORA, PISSA])
def test_memory_plan_counts_the_variants_parameters(given):
    config = DecoderConfig(
        97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = twin(small(intermediate_size=128, num_key_value_heads=4))
    plan = ml.plan_memory(config, ml.LoRAConfig(**given), quantize="nf4")
    assert plan.trainable == ml.count_parameters(injected(given, model)).trainable


# ---- error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (DORA | {"init_lora_weights": "pissa"}, "each changes the starting point of the other"),
        (DORA | {"lora_bias": True}, "lora_bias: PEFT has it without use_dora"),
        (PISSA | {"lora_bias": True}, "init_lora_weights=True"),
        (SOME | {"init_lora_weights": "pissa_niter_"}, "init_lora_weights: not one of"),
        (SOME | {"init_lora_weights": "true"}, "init_lora_weights: not one of"),
        (SOME | {"loftq_config": {"loftq_iter": 2}}, "loftq_config: expected .* for True"),
        (LOFTQ | {"loftq_config": {"loftq_bits": 2}}, "loftq_config: expected"),
        (LOFTQ | {"loftq_config": {"loftq_iters": 2}}, "loftq_config: expected"),
        (LOFTQ | {"loftq_config": {"loftq_iter": 0}}, "loftq_config: expected >= 1"),
    ],
)
def test_incompatible_config_fields_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        ml.LoRAConfig(**fields)


@pytest.mark.parametrize("given", [PISSA, LOFTQ], ids=["pissa", "loftq"])
def test_other_kinds_of_layers_are_refused_and_the_model_untouched(given):
    for kind, target in (("llama", "embed_tokens"), ("images", "flat")):
        model = build(kind)
        with pytest.raises(
            ValueError, match=rf"{target}: \w+ is for linear layers, and this is (Embedding|Conv2d)"
        ):
            injected(given | {"target_modules": [target]}, model)
        assert not lora_layers(model)


def test_rank_too_large_or_base_not_dense_raises():
    with pytest.raises(ValueError, match="a LoRA of rank 2r: expected 1 to 16, got 17"):
        injected(PISSA | {"r": 17}, twin(small(hidden_size=32)))
    model = twin(small())
    ml.quantize_model(model)
    with pytest.raises(ValueError, match="quantises a dense layer, and this is NF4Linear"):
        injected(LOFTQ, model)
    model = injected(SOME)
    with pytest.raises(ValueError, match="this is LoRALayer"):
        ml.inject(model, ml.LoRAConfig(**LOFTQ), name="second")
    assert ml.list_adapters(model) == ["default"]


def test_dora_cannot_be_active_with_another_adapter():
    model = injected(SOME)
    ml.inject(model, ml.LoRAConfig(**DORA), name="second")
    ml.inject(model, ml.LoRAConfig(**PISSA), name="third")
    with pytest.raises(
        ValueError, match="'second' .DoRA. rescales W and does not add up: use one at a time"
    ):
        ml.set_adapter(model, ["default", "second"])
    ml.set_adapter(model, ["default", "third"])


@pytest.mark.parametrize("how", ["pissa_niter_4", "loftq"])
def test_a_file_of_an_adapter_for_a_replaced_base_is_refused(how, tmp_path):
    model = shake(injected(SOME))
    ml.save_adapter(model, tmp_path)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values | {"init_lora_weights": how}))
    with pytest.raises(
        ValueError,
        match=f"with init_lora_weights '{how}' PEFT trained the adapter for another base",
    ):
        ml.load_adapter(twin(small()), tmp_path)
