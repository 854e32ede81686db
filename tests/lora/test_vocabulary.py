"""Tests of adapters on models whose vocabulary has grown, against PEFT.

New rows of an embedding are in the adapter's file, as PEFT stores them, and come back with it. They
do not train and go away with the adapter. Trained copies of a layer follow its resize.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minilora as ml
from helpers.kinds import TOKENS, close, output, shake
from helpers.tiny import VOCAB, oracle, save, twin
from minilora.lora.files.save_load import WEIGHTS_FILE, base_state_dict
from minilora.lora.registry import lora_configs

GROWN = VOCAB + 3
Q = {"target_modules": ["q_proj"]}
EMBEDDED = {"target_modules": ["q_proj", "embed_tokens"]}


def grown(folder: Path | None = None, seed: int = 0, tied: bool = False) -> Any:
    """Return a transformers model with three new tokens, whose rows are random."""
    from transformers import AutoModelForCausalLM

    if folder is None:
        model = oracle(tie_word_embeddings=tied)
    else:
        if not folder.exists():
            save(folder, tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """Return the logits for old and new tokens."""
    ids = torch.cat([TOKENS, torch.arange(VOCAB, GROWN).expand(2, -1)], 1)
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def keys(folder: Path) -> set[str]:
    return {key for key in load_file(folder / WEIGHTS_FILE) if ".lora_" not in key}


def adapted(model: Any, **fields: Any) -> Any:
    ml.inject(model, ml.LoRAConfig(r=2, **fields))
    return shake(model)


# ---- oracle: PEFT


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fields", [Q, EMBEDDED], ids=["attention", "embedding"])
def test_files_with_new_rows_are_exchanged_with_peft(tmp_path, tied, fields):
    from peft import LoraConfig, PeftModel, get_peft_model

    options: dict[str, Any] = fields
    base = tmp_path / "base"
    own_options = options | ({"tie": "untie"} if tied and fields is EMBEDDED else {})
    ours = adapted(grown(base, tied=tied), **own_options)
    ml.save_adapter(ours, tmp_path / "ours")
    other = PeftModel.from_pretrained(grown(base, seed=1, tied=tied), str(tmp_path / "ours")).eval()
    close(logits(other), logits(ours))

    theirs = get_peft_model(grown(base, tied=tied), LoraConfig(r=2, **options))
    shake(theirs, seed=1).eval().save_pretrained(str(tmp_path / "theirs"))
    again = grown(base, seed=0 if fields is EMBEDDED and not tied else 1, tied=tied)
    ml.load_adapter(again, tmp_path / "theirs")  # PEFT left out an untied head beside an embedding
    close(logits(again), logits(theirs))
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert ml.count_parameters(again).trainable == trained
    if fields is Q:
        assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
        ml.save_adapter(again, tmp_path / "again")
        assert keys(tmp_path / "again") == keys(tmp_path / "theirs")


# ---- property


def test_new_rows_of_a_file_do_not_train_and_go_away_with_the_adapter(tmp_path):
    ml.save_adapter(adapted(grown(tmp_path / "base"), **Q), tmp_path / "ours")
    model = grown(tmp_path / "base", seed=1)
    before, state = logits(model), copy.deepcopy(model.state_dict())
    ml.load_adapter(model, tmp_path / "ours")
    assert not torch.equal(logits(model), before)
    assert not model.get_input_embeddings().weight.requires_grad
    expected = logits(model)
    with ml.disable_adapters(model):
        assert torch.equal(logits(model), before)
    found = base_state_dict(model)
    assert all(torch.equal(found[key], state[key]) for key in state)
    close(logits(ml.merge(model)), expected, 1e-5)
    ml.load_adapter(model, tmp_path / "ours")  # over itself
    assert torch.equal(logits(model), expected)
    ml.eject(model)
    assert torch.equal(logits(model), before)


def test_a_resize_after_inject_is_stored_without_a_folder(tmp_path):
    model = oracle()
    ml.inject(model, ml.LoRAConfig(r=2, **Q))
    model.resize_token_embeddings(GROWN)
    ml.save_adapter(shake(model), tmp_path)
    assert keys(tmp_path) == {
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.weight",
    }
    ml.load_adapter(again := grown(seed=1), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_an_unchanged_vocabulary_is_not_stored(tmp_path):
    save(tmp_path / "base")
    model = ml.load_model(tmp_path / "base", dtype="float32", device="cpu")
    ml.save_adapter(adapted(model, **EMBEDDED), tmp_path / "ours")
    assert not keys(tmp_path / "ours")


@pytest.mark.parametrize("saved", [["lm_head"], ["lm_head", "embed_tokens"]])
def test_trained_copies_follow_a_resize(tmp_path, saved):
    model = oracle()
    ml.inject(model, ml.LoRAConfig(r=2, **Q, modules_to_save=saved))
    shake(model)
    model.resize_token_embeddings(GROWN)
    shake(model, seed=1)
    head = model.lm_head.weight
    assert head.requires_grad and len(head) == GROWN
    expected = logits(model)
    ml.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert torch.equal(stored["base_model.model.lm_head.weight"], head)
    with ml.disable_adapters(model):
        without = logits(model)
        assert torch.equal(model.lm_head.weight[:VOCAB], oracle().lm_head.weight)
    assert without.shape[-1] == GROWN
    assert model.lm_head.weight is head and torch.equal(logits(model), expected)
    ml.load_adapter(again := grown(seed=1), tmp_path)
    assert torch.equal(logits(again), expected)


def test_a_head_that_replaces_a_trained_copy_is_stored(tmp_path):
    model = oracle()
    ml.inject(model, ml.LoRAConfig(r=2, **Q, modules_to_save=["lm_head"]))
    ml.inject(model, ml.LoRAConfig(r=2, **Q, modules_to_save=["lm_head"]), name="second")
    torch.manual_seed(1)
    model.set_output_embeddings(nn.Linear(64, VOCAB, bias=False))
    head = model.lm_head
    expected = output(shake(model))
    ml.save_adapter(model, tmp_path, name="second")
    ml.set_adapter(model, "default")
    assert torch.equal(model.lm_head.weight, oracle().lm_head.weight)
    ml.set_adapter(model, "second")
    assert model.lm_head is head
    ml.load_adapter(again := oracle(), tmp_path)
    assert torch.equal(output(again), expected)


def test_resize_grows_the_copies_of_other_adapters_and_trains_16_bit_heads_in_fp32():
    model = oracle().bfloat16()
    for name in ("first", "second"):
        ml.inject(model, ml.LoRAConfig(r=2, **Q, modules_to_save=["lm_head"]), name=name)
    model.resize_token_embeddings(GROWN)
    ml.set_adapter(model, "first")
    assert logits(model).shape[-1] == GROWN
    ml.set_adapter(model, "second")
    assert logits(model).dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32
    parts = lora_configs(model).parts
    original = parts.originals["lm_head"]
    assert isinstance(original, nn.Linear) and original.weight.dtype == torch.bfloat16
    assert len(original.weight) == original.out_features == GROWN


# ---- error


def test_file_with_another_number_of_tokens_names_the_resize(tmp_path):
    ml.save_adapter(adapted(grown(tmp_path / "base"), **Q), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"100 rows, and the model has 97 tokens.*resize_token_em"):
        ml.load_adapter(oracle(), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"Call ml.resize_embeddings\(model, 100\) before"):
        ml.load_adapter(twin(oracle()), tmp_path / "ours")


@pytest.mark.parametrize("row", [0, 50, VOCAB - 1])
def test_file_whose_old_rows_differ_is_refused(tmp_path, row):
    ml.save_adapter(adapted(grown(tmp_path / "base"), **Q), tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / WEIGHTS_FILE)
    tensors["base_model.model.lm_head.weight"][row] += 1
    save_file(tensors, tmp_path / "ours" / WEIGHTS_FILE)
    model = grown(tmp_path / "base", seed=1)
    with pytest.raises(ValueError, match=rf"lm_head.weight\[{row}, 0\] is .*, the model's"):
        ml.load_adapter(model, tmp_path / "ours")
    assert not ml.list_adapters(model)
