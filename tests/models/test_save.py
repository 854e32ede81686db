"""Tests of save_model: transformers and minilora load the folder with equal logits.

Oracle: AutoModelForCausalLM on the saved folder. Property: saving and loading returns every tensor,
in one file or many; merging while saving equals ml.merge. Errors: models that a plain checkpoint
cannot hold, and crashes in the middle.
"""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import minilora as ml
from helpers.bounds import assert_rounded, rounding
from helpers.tiny import LLAMA3, oracle, tokens, twin
from minilora.models import save as save_module
from minilora.models.save import save_model


def adapted(model: nn.Module, targets="all-linear", seed: int = 0) -> nn.Module:
    """Return `model` with a LoRA adapter whose B is not zero."""
    ml.inject(model, ml.LoRAConfig(r=4, lora_alpha=8, target_modules=targets), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def reloaded(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens(2, 30))
    return out if isinstance(out, torch.Tensor) else out.logits


# ---- oracle: transformers; every family is in test_matrix.py


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000], ids=["one file", "shards"])
@pytest.mark.parametrize(
    "fields",
    [{"tie_word_embeddings": True}, {"rope_parameters": LLAMA3, "head_dim": 24}],
    ids=["tied", "llama3, wide heads"],
)
def test_transformers_loads_it_with_equal_logits(tmp_path, fields, shard_bytes):
    model = twin(oracle(**fields))
    save_model(model, tmp_path, shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes == 40_000)
    assert_rounded(logits(reloaded(tmp_path)), logits(model), rounding(model, logits))
    again = ml.load_model(tmp_path, dtype="float32", device="cpu")
    assert replace(again.config, dtype=model.config.dtype) == model.config
    assert list(again.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("quantised", [False, True], ids=["dense base", "4-bit base"])
def test_merged_model_equals_the_adapted_one(tmp_path, quantised):
    """fp32: merging only reorders sums. The given model keeps its adapters and its bits."""
    model = twin(oracle(attention_bias=True))
    if quantised:
        ml.quantize_model(model)
    adapted(model)
    before = logits(model)
    save_model(model, tmp_path / "saved", merge=True)
    assert torch.equal(logits(model), before)
    assert_rounded(logits(reloaded(tmp_path / "saved")), before, rounding(model, logits))
    save_model(ml.merge(model), tmp_path / "merged")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


@pytest.mark.parametrize("quantised", [False, True], ids=["dense base", "4-bit base"])
def test_parts_trained_in_fp32_are_saved_in_the_models_dtype(tmp_path, quantised):
    """A head, an embedding and, with 4 bits, biases of a bf16 model are saved in bf16.

    ml.merge does the same.
    """
    model = twin(oracle(attention_bias=True)).bfloat16()
    if quantised:
        ml.quantize_model(model)
    config = {
        "modules_to_save": ["lm_head", "embed_tokens"],
        "bias": "lora_only" if quantised else "none",
    }
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj"], **config))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data.normal_(std=0.1)
    save_model(model, tmp_path / "saved", merge=True)
    save_model(ml.merge(model), tmp_path / "merged")
    assert {value.dtype for value in load_file(tmp_path / "saved/model.safetensors").values()} == {
        torch.bfloat16
    }
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_an_adapter_on_a_tied_head_unties_it(tmp_path):
    """The merged head differs from the embedding; PEFT's merge changes both."""
    from peft import LoraConfig, get_peft_model

    tied = oracle(tie_word_embeddings=True)
    before = tied.get_input_embeddings().weight.clone()
    peft = get_peft_model(
        tied, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    )
    assert not torch.equal(peft.merge_and_unload().get_input_embeddings().weight, before)
    model = twin(oracle(tie_word_embeddings=True))
    model.lm_head = ml.LoRALayer(model.lm_head, r=4)
    model.lm_head.adapters["default"].lora_B.data.fill_(0.1)
    save_model(model, tmp_path, merge=True)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    save_model(ml.merge(model), tmp_path / "merged")  # its head is a separate plain layer
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()
    assert_rounded(logits(reloaded(tmp_path)), logits(model), rounding(model, logits))
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"], before
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "bfloat16"])
def test_dtype_of_the_file(tmp_path, dtype):
    model = twin(oracle())
    save_model(model, tmp_path, dtype=dtype)
    theirs, dtype = reloaded(tmp_path), getattr(torch, str(dtype).removeprefix("torch."))
    assert theirs.dtype == dtype
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].to(dtype)), name


def test_a_4_bit_layer_is_saved_in_the_dtype_it_computes_in(tmp_path):
    reference = oracle()
    reference.save_pretrained(tmp_path / "base")
    model = ml.load_model(tmp_path / "base", quantize="nf4", dtype="bfloat16", device="cpu")
    save_model(model, tmp_path / "saved", merge=True)
    state = load_file(tmp_path / "saved" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    for name, module in model.named_modules():
        if isinstance(module, ml.NF4Linear):
            assert torch.equal(state[f"{name}.weight"], module.dequantize(torch.bfloat16)), name


@pytest.mark.slow
def test_smollm2_saved_and_loaded_by_transformers(smollm2, tmp_path):
    model = ml.load_model(smollm2, dtype="float32")
    save_model(model, tmp_path, tokenizer=ml.load_tokenizer(smollm2))
    theirs = reloaded(tmp_path)
    ids = torch.arange(1000, 1100)[None]
    with torch.no_grad():
        expected = model(ids)
        assert (theirs(ids).logits - expected).abs().max() <= 2e-5 * expected.abs().max()


# ---- the files


def test_files_are_readable_and_aligned_and_name_their_format(tmp_path):
    """In a shard of two dtypes, fp32 comes first: each offset is a multiple of the item size."""
    model = twin(oracle())
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.bfloat16()
    # An odd number of 2-byte items.
    model.model.layers[0].input_layernorm.weight.data = torch.ones(63).bfloat16()
    save_model(model, tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0, name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, value in model.state_dict().items():
            assert torch.equal(file.get_tensor(name), value), name


def test_shards_respect_their_size_and_the_index(tmp_path):
    model = twin(oracle())
    save_model(model, tmp_path, shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert set(index["weight_map"]) == set(model.state_dict())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert all(path.stat().st_size < 70_000 for path in files)


def test_saving_again_removes_the_old_files(tmp_path):
    """Otherwise a folder would hold two models: an old file with a new index, or the reverse."""
    first, second = twin(oracle(seed=1)), twin(oracle(seed=2))
    (tmp_path / "README.md").write_text("mine")
    for model, shard_bytes in ((first, 10**9), (second, 60_000), (first, 90_000), (second, 10**9)):
        save_model(model, tmp_path, shard_bytes=shard_bytes)
        assert torch.equal(
            logits(ml.load_model(tmp_path, dtype="float32", device="cpu")), logits(model)
        )
        assert_rounded(logits(reloaded(tmp_path)), logits(model), rounding(model, logits))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_the_tokenizer_is_saved_with_the_model(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    save_model(twin(oracle()), tmp_path, tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").exists()


def test_a_crash_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    old, new = twin(oracle(seed=1)), adapted(twin(oracle(seed=2)))
    save_model(old, tmp_path)
    calls = []

    def crash(layer):
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return merged(layer)

    merged = save_module.merged_weight
    monkeypatch.setattr(save_module, "merged_weight", crash)
    with pytest.raises(KeyboardInterrupt):
        save_model(new, tmp_path, merge=True)
    assert torch.equal(logits(ml.load_model(tmp_path, dtype="float32", device="cpu")), logits(old))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    """A layer is made dense when it is written, and is freed before the next one."""
    alive, made = [], []

    def watch(layer):
        assert not [ref for ref in alive if ref() is not None]
        tensor = merged(layer)
        alive.append(weakref.ref(tensor))
        made.append(layer)
        return tensor

    merged = save_module.merged_weight
    monkeypatch.setattr(save_module, "merged_weight", watch)
    save_model(adapted(twin(oracle())), tmp_path, merge=True)
    assert len(made) == 3 * 7


# ---- errors


def fails(model: nn.Module, folder: Path, message: str, **arguments) -> None:
    with pytest.raises(ValueError, match=message):
        save_model(model, folder, **arguments)
    assert not [path for path in folder.glob("*") if path.is_file()]


def test_models_that_a_plain_checkpoint_cannot_hold_raise(tmp_path):
    model = adapted(twin(oracle()))
    fails(
        model, tmp_path, r"21 layers with adapters \(first model.layers.0.*merge=True.*save_adapter"
    )
    ml.set_adapter(model, [])
    fails(model, tmp_path, "no adapter is active", merge=True)
    quantised = twin(oracle())
    ml.quantize_model(quantised)
    fails(quantised, tmp_path, "21 quantised layers")
    fails(oracle(), tmp_path, r"got LlamaForCausalLM.*save_pretrained")
    fails(
        twin(oracle()),
        tmp_path,
        "dtype must be one of float64, .*, got torch.int8",
        dtype=torch.int8,
    )
    ml.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter, which transformers would load too"):
        save_model(twin(oracle()), tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()


def test_values_that_are_not_finite_or_out_of_range_raise(tmp_path):
    model = twin(oracle())
    model.model.norm.weight.data[0] = 70000.0
    fails(
        model,
        tmp_path,
        "model.norm.weight holds NaN or infinity in torch.float16",
        dtype=torch.float16,
    )
    model.model.norm.weight.data[0] = float("nan")
    fails(model, tmp_path, "model.norm.weight holds NaN")
