"""Tests on a real model that a GGUF file loses only the rounding of its type.

Oracles: the model whose matrices the gguf package rounded (equal logits, bit for bit), and
transformers, which reads the same file (equal weights, bit for bit; logits equal except for the
order of summation).
"""

from copy import deepcopy

import gguf
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import minilora as ml
from minilora.data import load_tokenizer
from minilora.models.save import save_model

ENGLISH = (
    "The committee met on Tuesday to discuss the new library. Most members agreed that the old building, put up in "
    "1974, was too small, and that its roof would not last another winter. They asked for three offers by May."
)


def logits(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        out = model(torch.tensor([ids]))
    return (out if isinstance(out, torch.Tensor) else out.logits)[0]


@pytest.fixture(scope="module")
def original(smollm2) -> nn.Module:
    return ml.load_model(smollm2, dtype="float32", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_smollm2_loses_only_the_rounding_of_its_type(smollm2, original, tmp_path, kind):
    dtype = {"F16": "float16", "BF16": "bfloat16", "Q8_0": "q8_0"}[kind]
    model, tokenizer = deepcopy(original), load_tokenizer(smollm2)
    save_model(model, tmp_path / "m.gguf", format="gguf", dtype=dtype, tokenizer=tokenizer)
    ids = tokenizer.encode(ENGLISH)
    before = logits(model, ids)
    stored = gguf.GGMLQuantizationType[kind]
    for parameter in model.parameters():
        if parameter.dim() == 2:
            rounded = gguf.dequantize(gguf.quantize(parameter.detach().numpy(), stored), stored)
            parameter.data = torch.from_numpy(rounded.copy())
    mine = ml.load_model(tmp_path / "m.gguf", dtype="float32", device="cpu")
    found = logits(mine, ids)
    assert torch.equal(found, logits(model, ids))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    reference = theirs.state_dict()
    for name, value in mine.state_dict().items():
        assert torch.equal(value, reference[name]), name
    # Measured here: 0. Logits are up to 40, and sums may be in another order.
    assert (found - logits(theirs, ids)).abs().max() <= 1e-3
    if kind == "F16":
        assert torch.equal(found.argmax(-1), before.argmax(-1))
    assert load_tokenizer(tmp_path / "m.gguf").encode(ENGLISH) == ids
    # transformers does not split SmolLM2's digits: test_gguf_tokenizer.py.
    letters = ENGLISH.replace("1974", "year")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert again.encode(letters) == tokenizer.encode(letters)
