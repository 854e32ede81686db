"""Tests that llama.cpp loads our GGUF files and computes our token ids and logits.

Oracle: llama.cpp, from the package xllamacpp (benchmarks/_lib/llama_cpp.py). Its cache is fp32 here (its
default is fp16). Before a matrix of 16 or 8 bits, most of its kernels also round the activations to
the matrix's type; `ours` does the same on demand.
"""

import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import minilora as ml
from benchmarks._lib.llama_cpp import Llama
from helpers.kinds import shake
from helpers.tiny import LLAMA3, SMOLLM3, oracle, tokens, twin
from minilora.data import load_tokenizer
from minilora.models.gguf.tokenizer import WORDS
from minilora.models.save import save_model
from tests.models.test_gguf_sentencepiece import FORMS, file_of, texts

pytestmark = pytest.mark.slow
MODELS = {
    "llama": {},
    "tied, wide heads": {"tie_word_embeddings": True, "head_dim": 32, "num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3": {
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192, "factor": 32.0}
    },
    "mistral": {"family": "mistral", "sliding_window": None},
    "smollm3": SMOLLM3 | {"num_hidden_layers": 5},
    "qwen2": {"family": "qwen2"},
    "qwen2 tied": {"family": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
}
# Half a unit of the activations' type; with weights in Q4_0 they are rounded to Q8_0.
UNITS = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "q8_0": 0.5 / 127}
UNITS |= {"q4_0": 0.5 / 127}
ENGLISH = (
    "The committee met on Tuesday to discuss the new library. Most members agreed that the old building, put up in "
    "1974, was too small, and that its roof would not last another winter. They asked for 3 offers by the 15th of May."
)


def theirs(path: Path, ids: list[int]) -> Tensor:
    """Return logits (tokens, vocabulary) of llama.cpp."""
    with Llama(path) as llama:
        return llama.logits(ids)


def ours(path: Path, ids: list[int], dtype: str = "float32") -> Tensor:
    """Return logits (tokens, vocabulary) in fp32; linear layers get inputs rounded to `dtype`."""
    model = ml.load_model(path, dtype="float32", device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], dtype),))
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


def rounded(x: Tensor, dtype: str) -> Tensor:
    import gguf

    if dtype not in ("q8_0", "q4_0"):
        return x.to(getattr(torch, dtype)).float()
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.dequantize(gguf.quantize(x.numpy(), kind), kind).copy())


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def check(path: Path, ids: list[int], what: str, dtype: str) -> tuple[Tensor, Tensor]:
    """Compare the logits of llama.cpp and minilora, and return both.

    fp32: llama.cpp computes the angle of channel i by i products. The error is up to
    200 · 8 · 2^-24 = 1e-4 rad at the last of 200 tokens, and the logits are up to 7: 5e-4.
    Below fp32: an activation may be rounded to the other side, half a unit off, and this changes
    all later values: 16 half units of the logits' spread. Rows in a wrong order differ by more
    than 1.
    """
    found, plain, alike = theirs(path, ids), ours(path, ids), ours(path, ids, dtype)
    print(
        f"{what}, {dtype}: rms of the logits {rms(plain):.1f}, off by {(found - plain).abs().max():.1e}",
        end="",
    )
    print(
        f" (rms {rms(found - plain):.1e}), rounded alike {(found - alike).abs().max():.1e} ({rms(found - alike):.1e})"
    )
    if dtype == "float32":
        assert (found - plain).abs().max() <= 5e-4
        assert torch.equal(found.argmax(-1), plain.argmax(-1))
    else:
        assert min(rms(found - plain), rms(found - alike)) <= 16 * UNITS[dtype] * rms(plain)
    return found, plain


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("kind", MODELS)
def test_logits_equal_those_of_llama_cpp(tmp_path, kind, dtype):
    model, ids = twin(oracle(**MODELS[kind])), tokens(1, 200)[0].tolist()
    save_model(model, tmp_path / "m.gguf", format="gguf", dtype=dtype)
    _, plain = check(tmp_path / "m.gguf", ids, kind, dtype)
    if dtype == "float32":
        with torch.no_grad():  # our reader returns the written model
            assert torch.equal(plain, model(torch.tensor([ids]))[0])


ADAPTERS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("kind", ["llama", "tied, wide heads", "qwen2"])
def test_adapters_give_llama_cpp_the_logits_of_the_model_with_its_adapter(tmp_path, kind, fields):
    """The bound is that of `check`; without the adapter the logits differ by far more."""
    model, ids = twin(oracle(**MODELS[kind])), tokens(1, 200)[0].tolist()
    save_model(model, tmp_path / "m.gguf", format="gguf", dtype="float32")
    ml.inject(model, ml.LoRAConfig(r=4, lora_alpha=16, target_modules="all-linear", **fields))
    shake(model)
    ml.save_gguf_adapter(model, tmp_path / "a.gguf")
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    with Llama(tmp_path / "m.gguf") as llama:
        found = llama.logits(ids, tmp_path / "a.gguf")
        alone = llama.logits(ids)
    assert (found - expected).abs().max() <= 5e-4
    assert (alone - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", [*FORMS, *WORDS])
def test_token_ids_equal_those_of_llama_cpp(tmp_path, kind):
    path = file_of(kind, tmp_path)
    llama, mine = Llama(path, vocab_only=True), load_tokenizer(path)
    assert llama.ends == (1, 2)
    assert llama.chat_template == mine.chat_template

    @settings(max_examples=300)
    @given(texts)
    def holds(text: str) -> None:
        if kind == "qwen2":  # llama.cpp omits Qwen's normaliser
            text = unicodedata.normalize("NFC", text)
        for special in (True, False):
            ids = llama.tokenize(text, add_special=special)
            assert ids == mine.encode(text, add_special_tokens=special)

    holds()
    for text in ("a</s>b <tool>  c<unk>", "<s>", " </s> ", "<0x41>"):
        ids = mine.encode(text, add_special_tokens=False)
        assert llama.tokenize(text, add_special=False) == ids


def test_smollm2_ids_and_logits_equal_those_of_llama_cpp(smollm2, tmp_path):
    path, tokenizer = tmp_path / "m.gguf", load_tokenizer(smollm2)
    model = ml.load_model(smollm2, dtype="float32", device="cpu")
    save_model(model, path, format="gguf", dtype="float16", tokenizer=tokenizer)
    ids = tokenizer.encode(ENGLISH)
    with Llama(path, vocab_only=True) as llama:
        assert llama.tokenize(ENGLISH, add_special=True) == ids
    found, plain = check(path, ids, "SmolLM2", "float16")
    assert torch.equal(found.argmax(-1), plain.argmax(-1))
