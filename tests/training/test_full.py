"""Proves that training every parameter equals transformers' own training.

Checkpoints, resuming and saving support it too. Oracle: the twenty steps of test_train_vs_peft.py
on a whole transformers model, with its own loss and torch's AdamW.
"""

import json

import pytest
import torch

import minilora as ml
from helpers.objective_laws import check_resume, check_splits
from helpers.tiny import oracle, twin
from helpers.toy import FAST, Letters, llama, lora, rows
from minilora.data import encode_dataset
from minilora.losses.sft import SFT
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from tests.training.test_train_vs_peft import CONFIG, train_theirs

FULL = {"method": "full"} | FAST | {"learning_rate": 1e-3}

# ---- oracle


@pytest.mark.parametrize("tied", [False, True])
def test_twenty_steps_of_every_parameter(tied):
    theirs = oracle(vocab_size=len(Letters()), max_position_embeddings=64, tie_word_embeddings=tied)
    ours = twin(theirs)
    config = TrainConfig(
        **CONFIG.to_dict() | {"method": "full", "learning_rate": 1e-3, "weight_decay": 0.0}
    )
    expected = train_theirs(theirs, encode_dataset(rows(40), Letters(), config.max_length), config)
    assert train(ours, Letters(), rows(40), config).losses == pytest.approx(expected, rel=1e-4)
    assert max(expected) - min(expected) > 0.05 * expected[0]
    for name, parameter in theirs.named_parameters():
        found = ours.get_parameter(name)
        # in 20 steps Adam enlarges the noise of tiny gradients
        assert (found - parameter).norm() < 2e-3 * parameter.norm(), name


# ---- properties


def test_gradient_does_not_depend_on_the_split():
    check_splits(llama().requires_grad_(True), SFT(), rows(7))


def test_a_resumed_run_is_one_that_never_stopped(tmp_path):
    """Weight decay is on; it applies to matrices and not to vectors."""
    check_resume(lambda: llama().requires_grad_(True), SFT(), rows(8), tmp_path, weight_decay=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_a_model_that_load_model_and_transformers_read(tied, tmp_path):
    from transformers import AutoModelForCausalLM

    # the config decides which parameters train, not this flag
    model = llama(tie_word_embeddings=tied).requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = train(model, Letters(), rows(), TrainConfig(output_dir=tmp_path / "run", **FULL))
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert (
        result.checkpoint is not None and not (result.checkpoint / "adapter_config.json").exists()
    )
    ml.save_model(model, tmp_path / "saved")
    tokens = torch.arange(12)[None]
    for folder in (result.checkpoint, tmp_path / "saved"):
        again = ml.load_model(folder, dtype="float32")
        assert torch.equal(again(tokens), model(tokens))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


def test_bf16_computes_in_16_bits_on_weights_in_fp32():
    model, exact = llama(), llama()
    result = train(model, Letters(), rows(), TrainConfig(bf16=True, **FULL))
    expected = train(exact, Letters(), rows(), TrainConfig(**FULL))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (
        result.losses == pytest.approx(expected.losses, rel=0.02)
        and result.losses != expected.losses
    )


# ---- errors


def test_a_model_that_cannot_train_is_refused_and_unchanged(tmp_path):
    four_bit = llama(hidden_size=64, intermediate_size=64)
    ml.quantize_model(four_bit)
    for model, message in (
        (llama().bfloat16(), "is torch.bfloat16: load"),
        (four_bit, "is torch.uint8: load"),
        (lora(), "it has adapters: ml.merge or ml.eject"),
    ):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        with pytest.raises(ValueError, match=message):
            train(model, Letters(), rows(), TrainConfig(**FULL))
        assert trained == [name for name, p in model.named_parameters() if p.requires_grad]


def test_resuming_with_another_objective_raises(tmp_path):
    config = {"output_dir": tmp_path, "resume_from_checkpoint": "last"} | FAST
    train(lora(), Letters(), rows(), TrainConfig(output_dir=tmp_path, **FAST))
    with pytest.raises(ValueError, match=r"objective was SFT\(\), is KLToBase\(kl_weight=0.1\)"):
        train(lora(), Letters(), rows(), TrainConfig(**config), objective=ml.KLToBase())
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["data"]["objective"] == "SFT()" and state["metrics"] == {}
