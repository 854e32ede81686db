"""Tests of reading and writing bitsandbytes' 4-bit checkpoints, bit for bit.

Oracle: transformers with bitsandbytes writes the folders from a tiny Llama, and loads ours.
Property: a loaded checkpoint is saved with equal bytes. Errors: other kinds (fp4, 8 bits),
contradictions, missing parts, adapters. Widths are multiples of 64: bitsandbytes 0.50.2's CPU code
gives wrong scales for others.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import minilora as ml
from helpers.bounds import assert_rounded, rounding
from helpers.tiny import save, tokens
from minilora.models.save import save_model

WIDE = {"intermediate_size": 128}
STORAGES = ["uint8", "bfloat16", "float16", "float32"]


def bnb_folder(
    folder: Path, nested=True, storage="uint8", dtype=torch.float32, shard="5GB", skip=None, **kind
) -> Path:
    """Save a random Llama, quantised by bitsandbytes, with transformers; return its folder."""
    save(folder / "base", dtype=dtype, **WIDE)
    config = BitsAndBytesConfig(
        **{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=getattr(torch, storage),
        llm_int8_skip_modules=skip,
    )
    theirs(folder / "base", dtype, quantization_config=config).save_pretrained(
        folder / "bnb", max_shard_size=shard
    )
    return folder / "bnb"


def theirs(folder: Path, dtype: torch.dtype, **options) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **options)


def mine(folder: Path, dtype=torch.float32, **options) -> nn.Module:
    return ml.load_model(folder, dtype=dtype, device="cpu", **options)


def logits(model: nn.Module) -> torch.Tensor:
    out = model(tokens(2, 30))
    return out if isinstance(out, torch.Tensor) else out.logits


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a folder; 4-bit ones as bytes, in any dtype of storage."""
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    return {
        k: v.view(-1).view(torch.uint8) if f"{k}.absmax" in tensors else v
        for k, v in tensors.items()
    }


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def as_stored(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {k: v.view(-1) if f"{k}.absmax" in state else v for k, v in state.items()}


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ml.NF4Linear)]


@pytest.fixture(scope="module")
def nested(tmp_path_factory) -> Path:
    return bnb_folder(tmp_path_factory.mktemp("nested"))


# ---- reading


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_loaded_bits_are_bitsandbytes(tmp_path, nested, storage):
    folder = bnb_folder(tmp_path, nested, storage)
    model = mine(folder)
    assert len(layers(model)) == 3 * 7
    assert equal(as_stored(model), stored(folder))
    # In eval mode, bitsandbytes' CPU kernel rounds the scales to bf16.
    reference = theirs(folder, torch.float32).train()
    assert_rounded(logits(model), logits(reference), rounding(model, logits))


def test_bf16_source_keeps_its_dtype_and_dequantises_to_equal_bits(tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    folder = bnb_folder(tmp_path, dtype=torch.bfloat16)
    model, reference = mine(folder, "bfloat16"), theirs(folder, torch.bfloat16)
    for name in layers(model):
        weight = reference.get_submodule(name).weight
        expected = dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(model.get_submodule(name).dequantize(), expected), name
    assert {
        module.dtype for module in map(mine(folder, "float32").get_submodule, layers(model))
    } == {torch.bfloat16}


def test_parts_of_a_weight_may_be_in_several_shards(nested, tmp_path):
    """Tensors are stored alternately in two files."""
    tensors = load_file(nested / "model.safetensors")
    names = sorted(tensors)
    for i in (0, 1):
        save_file(
            {k: tensors[k] for k in names[i::2]},
            tmp_path / f"model-0000{i + 1}-of-00002.safetensors",
        )
    places = {k: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, k in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_bytes((nested / "config.json").read_bytes())
    assert equal(as_stored(mine(tmp_path)), stored(nested))


def test_skipped_modules_stay_dense_also_with_quantize_nf4(tmp_path):
    skip = ["lm_head", "model.layers.1.mlp", "o_proj"]
    folder = bnb_folder(tmp_path, skip=skip)
    for quantize in (None, "nf4"):
        found = layers(mine(folder, quantize=quantize))
        assert len(found) == 3 * 7 - 3 - 3
        assert not [name for name in found if "layers.1.mlp" in name or "o_proj" in name]
    edit(folder, lambda c: c.update(llm_int8_skip_modules=["lm_head"]))
    fails(folder, r"layers.0.self_attn.o_proj, .* and 3 more is not in 4 bits, against config.json")
    edit(folder, lambda c: c.update(llm_int8_skip_modules=[*skip, "v_proj"]))
    fails(folder, r"layers.0.self_attn.v_proj, .* is in 4 bits, against")


def test_quantize_must_match_the_stored_kind(nested):
    assert len(layers(mine(nested, quantize="nf4"))) == 3 * 7
    for asked in ({"blocksize": 128}, {"double_quant": False}):
        fails(nested, "already in 4 bits, with blocksize=64 and double_quant=True.*Leave quantize out", quantize="nf4",
              **asked)  # fmt: skip


# ---- errors


def fails(folder: Path, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message):
        mine(folder, **options)


def edit(folder: Path, change=None, tensors=None) -> None:
    """Change config.json's quantization_config, and the tensors."""
    config = json.loads((folder / "config.json").read_text())
    if change:
        change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        state = load_file(folder / "model.safetensors")
        tensors(state)
        save_file(state, folder / "model.safetensors")


@pytest.fixture
def copy(nested, tmp_path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((nested / name).read_bytes())
    return tmp_path


def test_other_kinds_are_refused(tmp_path, copy):
    fails(
        bnb_folder(tmp_path / "fp4", bnb_4bit_quant_type="fp4"),
        r"already quantised .*4 bits, fp4\).*16-bit",
    )
    edit(tmp_path / "fp4" / "bnb", lambda c: c.pop("bnb_4bit_quant_type"))
    fails(tmp_path / "fp4" / "bnb", r"4-bit of kind \['fp4'\]")
    edit(copy, lambda c: c.update(load_in_4bit=False, load_in_8bit=True))
    fails(copy, "quant_method 'bitsandbytes', 8 bits")
    edit(copy, lambda c: c.update(quant_method="gptq"))
    fails(copy, "quant_method 'gptq'")


UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


def text(content: str) -> torch.Tensor:
    return torch.tensor(list(content.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{UP}.absmax"), r"missing \['absmax'\]"),
        (lambda t: t.pop(STATE), f"{UP} is 4-bit of kind no quant_state"),
        (lambda t: t.pop(UP), r"missing \[''\]"),
        (lambda t: t.update({f"{UP}.more": torch.ones(1)}), r"unexpected \['more'\]"),
        (lambda t: t.update({STATE: text("{")}), "quant_state.bitsandbytes__nf4 is damaged"),
        (lambda t: t.update({STATE: text('{"shape": 3}')}), "quant_state.bitsandbytes__nf4 is damaged"),
        (lambda t: t.update({STATE: torch.ones(20)}), "quant_state.bitsandbytes__nf4 is damaged"),
        (lambda t: t.update({STATE: text('{"shape": [128, 64]}')}), "expected the JSON fields"),
        (lambda t: t.update({STATE: text('{"shape": [64, 128]}')}), r"shape \(64, 128\), its config says \(128, 64\)"),
        (lambda t: t.update({UP: t[UP][:-1].clone()}), r"expected packed to be contiguous uint8 of shape \(4096,\)"),
        (lambda t: t[f"{UP}.nested_absmax"].fill_(float("nan")), "to be finite"),
        (lambda t: t[f"{UP}.quant_map"].mul_(2), "not the standard table"),
    ],
)  # fmt: skip
def test_damaged_parts_are_refused(copy, change, message):
    edit(copy, tensors=change)
    fails(copy, message)


def test_config_and_weights_must_agree(copy, tmp_path):
    edit(copy, lambda c: c.update(llm_int8_skip_modules="lm_head"))
    fails(copy, "llm_int8_skip_modules must be a list")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    fails(copy, r"has model.layers.0.mlp.down_proj.weight.absmax, .* no place for")
    save(tmp_path / "dense", **WIDE)
    dense = json.loads((tmp_path / "dense" / "config.json").read_text())
    dense["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(dense))
    fails(tmp_path / "dense", "has load_in_4bit, but no weight is in 4 bits")


# ---- writing


def saved(model: nn.Module, folder: Path, **options) -> Path:
    save_model(model, folder, format="bnb-4bit", **options)
    return folder


@pytest.mark.parametrize("double_quant, blocksize", [(True, 64), (False, 64), (True, 128)])
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000], ids=["one file", "shards"])
def test_transformers_loads_our_folder_with_equal_bits(
    tmp_path, double_quant, blocksize, shard_bytes
):
    from bitsandbytes.functional import dequantize_4bit

    save(tmp_path / "base", attention_bias=True, **WIDE)
    model = mine(tmp_path / "base", quantize="nf4", double_quant=double_quant, blocksize=blocksize)
    folder = saved(model, tmp_path / "bnb", shard_bytes=shard_bytes)
    reference = theirs(folder, torch.float32).train()
    for name in layers(model):
        weight = reference.get_submodule(name).weight
        expected = model.get_submodule(name).weight
        assert torch.equal(weight.data.view(-1), expected.packed), name
        assert weight.quant_state.nested == double_quant
        if blocksize == 64:  # its CPU code misreads scales of shorter rows
            assert torch.equal(
                dequantize_4bit(weight.data, weight.quant_state), ml.dequantize_nf4(expected)
            ), name
    if blocksize == 64:
        assert_rounded(logits(model), logits(reference), rounding(model, logits))
    assert equal(model.state_dict(), mine(folder).state_dict())


@pytest.mark.parametrize("storage", STORAGES)
def test_a_loaded_checkpoint_is_saved_with_equal_bytes(tmp_path, storage):
    folder = bnb_folder(
        tmp_path, storage=storage, dtype=torch.bfloat16, skip=["lm_head", "up_proj"]
    )
    again = saved(mine(folder, "bfloat16"), tmp_path / "again")
    assert equal(stored(again), stored(folder))
    config = json.loads((again / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head"] + [
        f"model.layers.{i}.mlp.up_proj" for i in range(3)
    ]
    assert theirs(again, torch.bfloat16).model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    same = config.keys() - {"llm_int8_skip_modules", "bnb_4bit_quant_storage"}
    assert {k: config[k] for k in same} == {k: written[k] for k in same}


def adapted(folder: Path, targets="all-linear", **options) -> nn.Module:
    model = mine(folder, **options)
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    return model


def test_adapters_are_merged_and_rounded_again_only_when_asked_for(nested, tmp_path):
    model = adapted(nested, ["q_proj", "up_proj"])
    for message, options in {
        r"6 layers with adapters .*merge=True": {},
        r"merging into 6 4-bit layers \(first model.*requantize=True .*save_adapter": {
            "merge": True
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            saved(model, tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()
    for name in ("stochastic", "nearest"):
        folder = saved(model, tmp_path / name, merge=True, requantize=name)
        merged = ml.merge(model, "nf4", rounding=name)
        assert equal(merged.state_dict(), mine(folder).state_dict()), name
    default = saved(model, tmp_path / "default", merge=True, requantize=True)
    assert equal(stored(default), stored(tmp_path / "stochastic"))
    other = saved(model, tmp_path / "seed", merge=True, requantize=True, seed=1)
    assert not equal(stored(default), stored(other))


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_reads_merged_codes_to_the_same_values(tmp_path, double_quant):
    """Only the codes differ from the base's file: scales and settings have equal bytes."""
    from bitsandbytes.functional import dequantize_4bit

    save(tmp_path / "base", **WIDE)
    model = mine(tmp_path / "base", quantize="nf4", double_quant=double_quant)
    base = stored(saved(model, tmp_path / "four"))
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    folder = saved(model, tmp_path / "merged", merge=True, requantize=True)
    changed = {key for key, value in stored(folder).items() if not torch.equal(value, base[key])}
    assert len(changed) == 6
    assert all(key.endswith(("q_proj.weight", "up_proj.weight")) for key in changed)
    reference = theirs(folder, torch.float32).train()
    merged = ml.merge(model, "nf4")
    for name in layers(merged):
        weight = reference.get_submodule(name).weight
        expected = ml.dequantize_nf4(merged.get_submodule(name).weight)
        assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), expected), name


def test_an_adapter_on_a_dense_layer_needs_no_rounding(tmp_path):
    folder = bnb_folder(tmp_path, skip=["lm_head", "q_proj"])
    model = adapted(folder, ["q_proj"])
    again = mine(saved(model, tmp_path / "out", merge=True))
    assert_rounded(logits(again), logits(model), rounding(model, logits))
    assert len(layers(again)) == 3 * 6


def test_models_and_options_that_the_format_does_not_support_raise(nested, tmp_path):
    save(tmp_path / "dense", **WIDE)
    for folder, message, options in [
        (tmp_path / "dense", "no layer is in 4 bits.*ml.quantize_model", {"format": "bnb-4bit"}),
        (nested, "requantize=True is for merging", {"format": "bnb-4bit", "requantize": True}),
        (tmp_path / "dense", "requantize=True is for merging", {"requantize": True}),
        (
            nested,
            "format must be one of safetensors, bnb-4bit, gguf, got 'gptq'",
            {"format": "gptq"},
        ),
        (nested, "21 quantised layers.*merge=True", {}),
    ]:
        with pytest.raises(ValueError, match=message):
            save_model(mine(folder), tmp_path / "out", **options)
