"""Tests that SmolLM2, trained by minilora, gives the same results in other libraries.

test_matrix.py tests the same on tiny models. Oracles: transformers on merged weights in fp32 and
bf16, PEFT on the adapter, bitsandbytes on the 4-bit folder.
"""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import minilora as ml

pytestmark = pytest.mark.slow

ROUNDING = 2e-5  # × the largest logit: 30 layers of fp32 sums in another order


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Train LoRA for a few steps; return the folder of the models, the tokens and the logits.

    The folder has the base, the adapter and the merged models.
    """
    source, folder = ml.samples.smollm2(), tmp_path_factory.mktemp("smollm2")
    model, tokenizer = ml.load_model(source, dtype="float32"), ml.load_tokenizer(source)
    ml.save_model(model, folder / "base")
    text = ml.samples.prose()[0]["text"]
    ids = torch.tensor([tokenizer.encode(text)[:200]])
    before = logits(model, ids)
    ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    steps = ml.TrainConfig(
        max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, save_steps=None
    )
    ml.train(model, tokenizer, ml.samples.icd10(test_rows=4, train_rows=24).train, steps)
    model.eval()
    ml.save_adapter(model, folder / "adapter")
    for dtype in (torch.float32, torch.bfloat16):
        ml.save_model(model, folder / str(dtype), merge=True, dtype=dtype)
    expected = logits(model, ids)
    assert (expected - before).abs().max() > 0.1  # the adapter has an effect
    return folder, ids, expected


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def theirs(folder, dtype: torch.dtype, **options) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="cpu", **options
    ).eval()


def same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_merged_in_fp32_gives_the_logits_of_transformers(folders):
    folder, ids, expected = folders
    same(logits(theirs(folder / "torch.float32", torch.float32), ids), expected)


def test_merged_in_bf16_gives_the_logits_of_transformers(folders, monkeypatch):
    """Logits are equal bit for bit with torch's own steps, which transformers uses.

    Compiled steps sum in another order. The test uses 16 tokens: on a CPU without bf16, products in
    bf16 take many times as long as those in fp32.
    """
    monkeypatch.setenv("MINILORA_STEPS", "torch")
    folder, ids, _ = folders
    ids = ids[:, :16]
    ours = ml.load_model(folder / "torch.bfloat16", dtype="bfloat16", device="cpu")
    other = theirs(folder / "torch.bfloat16", torch.bfloat16)
    assert torch.equal(logits(other, ids), logits(ours, ids))


def test_the_adapter_gives_the_same_logits_in_peft(folders):
    from peft import PeftModel

    folder, ids, expected = folders
    same(
        logits(
            PeftModel.from_pretrained(theirs(folder / "base", torch.float32), folder / "adapter"),
            ids,
        ),
        expected,
    )


def test_4_bit_weights_equal_those_of_bitsandbytes(folders):
    from bitsandbytes.functional import dequantize_4bit

    folder, _, _ = folders
    model = ml.load_model(folder / "base", quantize="nf4", dtype="bfloat16", device="cpu")
    ml.save_model(model, folder / "nf4", format="bnb-4bit")
    other = theirs(folder / "nf4", torch.bfloat16)
    names = [name for name, module in model.named_modules() if isinstance(module, ml.NF4Linear)]
    assert len(names) == 30 * 7
    for name in names:
        weight = other.get_submodule(name).weight
        assert torch.equal(
            model.get_submodule(name).dequantize(), dequantize_4bit(weight.data, weight.quant_state)
        ), name
