"""Tests of `resize_embeddings`: more tokens for a decoder, and the adapter's file after it."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import minilora as ml
from helpers.kinds import close, shake
from helpers.tiny import VOCAB, oracle, save, tokens, twin
from minilora.lora.files.save_load import WEIGHTS_FILE

TIES = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@TIES
def test_new_rows_equal_the_mean_resize_of_transformers(tied):
    model, theirs = twin(oracle(tie_word_embeddings=tied)), oracle(tie_word_embeddings=tied)
    rows = model.lm_head.weight.detach().clone()
    before = model(tokens(2, 9)).detach()
    ml.resize_embeddings(model, VOCAB + 3)
    theirs.resize_token_embeddings(VOCAB + 3)  # adds noise with 1e-9 of the rows' covariance
    logits = model(tokens(2, 9))
    assert torch.equal(model.lm_head.weight[:VOCAB], rows)
    # A matmul with more columns may add the D products in another order, each with an error of eps.
    magnitudes = model.hidden(tokens(2, 9)).abs() @ rows.abs().T  # (B, T, V)
    bound = 2 * rows.shape[1] * torch.finfo(torch.float32).eps * magnitudes
    assert ((logits[..., :VOCAB] - before).abs() <= bound).all()
    assert model.config.vocab_size == VOCAB + 3
    close(model.lm_head.weight, theirs.lm_head.weight, 1e-3)
    close(model.model.embed_tokens.weight, theirs.get_input_embeddings().weight, 1e-3)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@TIES
def test_adapter_and_model_of_a_resized_decoder_are_exchanged(tmp_path, tied):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save(tmp_path / "base", tie_word_embeddings=tied)
    model = ml.load_model(tmp_path / "base", dtype="float32", device="cpu")
    ml.resize_embeddings(model, VOCAB + 3)
    config = ml.LoRAConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[VOCAB])
    ml.inject(model, config)
    new = torch.arange(VOCAB, VOCAB + 3)[None]
    expected = shake(model)(new).detach()
    ml.save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert len([key for key in stored if "lora" not in key]) == 3

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs.resize_token_embeddings(VOCAB + 3)
    theirs = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    close(theirs(new).logits, expected)

    ml.save_model(model, tmp_path / "merged", merge=True)
    again = ml.load_model(tmp_path / "merged", dtype="float32", device="cpu")
    close(again(new), expected, 1e-5)

    other = ml.load_model(tmp_path / "base", dtype="float32", device="cpu")
    with pytest.raises(ValueError, match=r"Call ml.resize_embeddings\(model, 100\) before"):
        ml.load_adapter(other, tmp_path / "adapter")
    ml.resize_embeddings(other, VOCAB + 3)
    ml.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(new), expected)


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(ValueError, match="call model.resize_token_embeddings"):
        ml.resize_embeddings(nn.Linear(2, 2), 5)
    model = twin(oracle())
    for size in (VOCAB - 1, 1e3, True):
        with pytest.raises(ValueError, match="size: expected a whole number, at least the model's"):
            ml.resize_embeddings(model, size)
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="has an adapter of the old size"):
        ml.resize_embeddings(model, VOCAB + 1)
    ml.resize_embeddings(twin(oracle()), VOCAB)
