"""Tests of load_model: exact tensors, bounded memory, and clear errors.

Oracle: transformers' own checkpoints and logits; NF4 layers against each tensor quantised
separately. Property: peak memory, measured in a separate process. Errors: each kind of damaged,
contradictory or wrong checkpoint; the message names the file and the tensor.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minilora as ml
from helpers.bounds import assert_rounded, rounding
from helpers.tiny import LLAMA3, python, save, tokens
from minilora.models.loader import pick_dtype
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import dequantize_nf4, quantize_nf4

SHARDED = {"max_shard_size": "50KB"}  # about five files for a model of 260 kB


def edit(folder: Path, change) -> None:
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---- oracle: transformers


@pytest.mark.parametrize("shards", [None, SHARDED], ids=["one file", "shards"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA3},
    ]
    + [{"family": "mistral", "sliding_window": 5}],
    ids=["llama", "tied", "biases", "llama3", "mistral"],
)
def test_loaded_model_equals_transformers(tmp_path, shards, fields):
    reference = save(tmp_path, shards, **fields)
    assert (
        len(list(tmp_path.glob("*.safetensors"))) > 3
        if shards
        else (tmp_path / "model.safetensors").exists()
    )
    model = ml.load_model(str(tmp_path), dtype="float32", device="cpu")
    assert not model.training
    assert model.name_or_path == str(tmp_path)
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with torch.no_grad():
        bound = rounding(model, lambda model: model(tokens(2, 30)))
        assert_rounded(model(tokens(2, 30)), reference(tokens(2, 30)).logits, bound)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant,blocksize", [(True, 64), (False, 128)])
def test_nf4_layers_are_the_checkpoints_tensors_quantised(
    tmp_path, stored, double_quant, blocksize
):
    """Layers are quantised from the stored values, before any rounding to `dtype`.

    Biases, norms and the head stay dense.
    """
    reference = save(tmp_path, dtype=stored, attention_bias=True)
    model = ml.load_model(
        tmp_path,
        quantize="nf4",
        double_quant=double_quant,
        blocksize=blocksize,
        dtype=torch.bfloat16,
        device="cpu",
    )
    state = reference.state_dict()
    quantised = {
        name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)
    }
    assert len(quantised) == 3 * 7
    for name, module in quantised.items():
        expected = quantize_nf4(state[f"{name}.weight"], blocksize, double_quant)
        assert torch.equal(module.weight.packed, expected.packed), name
        assert torch.equal(module.weight.absmax, expected.absmax), name
        assert torch.equal(module.dequantize(), dequantize_nf4(expected, torch.bfloat16)), name
    dense = dict(model.named_parameters())
    for name in (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.bias",
    ):
        assert torch.equal(dense[name], state[name].bfloat16()), name
    assert torch.isfinite(model(tokens(1, 5))).all()


def test_tied_weights_are_one_tensor_and_never_quantised(tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    model = ml.load_model(tmp_path, quantize="nf4", dtype="float32", device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is nn.Linear


def test_a_loaded_model_does_not_depend_on_the_file(tmp_path):
    save(tmp_path)
    model = ml.load_model(tmp_path, dtype="float32", device="cpu")
    before = model(tokens(1, 9))
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # in place, as an interrupted download would
    assert torch.equal(model(tokens(1, 9)), before)


def test_old_checkpoints_with_stored_frequencies_load(tmp_path):
    save(tmp_path)
    edit(
        tmp_path,
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    )
    ml.load_model(tmp_path, dtype="float32", device="cpu")


def test_dtype_auto_prints_its_choice_and_the_reason(tmp_path, capsys):
    save(tmp_path)
    capsys.readouterr()  # transformers' progress bar
    model = ml.load_model(tmp_path, device="cpu")
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert model.lm_head.weight.dtype == (torch.bfloat16 if fast else torch.float32)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"dtype auto is {'bfloat16: this CPU' if fast else 'float32: no 16-bit'}" in said
    ml.load_model(tmp_path, dtype="float32", device="cpu")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "has_bf16,expected,why",
    [(True, torch.bfloat16, "has it"), (False, torch.float16, "no bfloat16")],
)
def test_dtype_auto_on_gpus(monkeypatch, capsys, has_bf16, expected, why):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert pick_dtype("auto", torch.device("cuda")) == expected
    assert why in capsys.readouterr().err


# ---- property: memory

MEASURE = """
import json, sys
import torch
import minilora as ml

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

torch.set_num_threads(1)
for quantize, dtype in json.loads(sys.argv[3]):
    def load(folder):
        return ml.load_model(folder, quantize=quantize, dtype=dtype, device="cpu")
    load(sys.argv[1])  # warm: code, tables, the quantiser's chunk
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    before = peak()
    model = load(sys.argv[2])
    print(peak() - before, sum(p.nbytes for p in model.parameters()))
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_is_the_model_and_one_tensor(tmp_path):
    """The model has 123 MB of fp32 in three shards, in tensors of at most 17 MB.

    The peak counts all pages, mapped files included.
    """
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 512,
        "vocab_size": 100,
        "num_hidden_layers": 1,
    }
    save(tmp_path / "small", **sizes)
    large = {"intermediate_size": 8192, "vocab_size": 4000, "num_hidden_layers": 2}
    save(tmp_path / "large", {"max_shard_size": "50MB"}, **sizes | large)
    cases = [(None, "float32"), (None, "bfloat16"), ("nf4", "bfloat16")]
    done = python(
        MEASURE, tmp_path / "small", tmp_path / "large", json.dumps(cases), OMP_NUM_THREADS="1"
    )
    tensor = 8192 * 512 * 4  # the largest, as stored
    # Less than a tensor: headers, the quantiser's pieces of 1 MiB, the allocator's reserve.
    slack = 12e6
    for line, case in zip(done.splitlines(), cases, strict=True):
        peak, model = map(int, line.split())
        assert peak <= model + tensor + slack, (case, peak, model)


# ---- errors: the checkpoint


def fails(folder: Path, message: str, error: type[Exception] = ValueError, **arguments) -> None:
    with pytest.raises(error, match=message):
        ml.load_model(folder, device="cpu", **{"dtype": "float32"} | arguments)


def test_wrong_folders_raise(tmp_path):
    fails(tmp_path, "holds no config.json.*nothing")
    (tmp_path / "adapter_config.json").write_text("{}")
    fails(tmp_path, "base_model_name_or_path is None, .*ml.load_adapter.ml.load_model.BASE")
    save(tmp_path / "model")
    fails(tmp_path / "model" / "config.json", "is a file: give the folder")
    (tmp_path / "model" / "model.safetensors").unlink()
    fails(tmp_path / "model", "holds no weights")
    (tmp_path / "model" / "pytorch_model.bin").touch()
    fails(tmp_path / "model", "no pickle")
    shutil.copy(tmp_path / "model" / "pytorch_model.bin", tmp_path / "model" / "pytorch_model.gguf")
    (tmp_path / "model" / "pytorch_model.bin").unlink()
    fails(tmp_path / "model", "Give the GGUF file itself")
    (tmp_path / "model" / "config.json").write_text("{")
    fails(tmp_path / "model", "config.json is not JSON")
    (tmp_path / "model" / "config.json").write_text("[]")
    fails(tmp_path / "model", "holds a list, expected a JSON object")


@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -1])
def test_a_truncated_file_raises(tmp_path, keep):
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    fails(tmp_path, "model.safetensors is damaged or cut off.*Download it again")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_non_finite_tensor_raises(tmp_path, bad, name, quantize):
    save(tmp_path)
    edit(tmp_path, lambda t: t[name].view(-1)[5].fill_(bad))
    fails(tmp_path, f"model.safetensors: {name} holds NaN or infinity", quantize=quantize)


def test_a_value_too_large_for_fp16_raises(tmp_path):
    save(tmp_path)
    edit(tmp_path, lambda t: t["model.norm.weight"].fill_(70000.0))
    fails(
        tmp_path,
        r"model.norm.weight in torch.float16 holds NaN or infinity.*dtype='float32'",
        dtype="float16",
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda t: t.pop("model.layers.2.mlp.up_proj.weight"),
            "lacks model.layers.2.mlp.up_proj.weight",
        ),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (
            lambda t: t.update({"model.extra": torch.ones(1)}),
            "has model.extra, which a llama model of this config",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(63)}),
            r"norm.weight has shape \(63,\), .* says \(64,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            "is torch.int8, expected a 16-",
        ),
    ],
    ids=["missing", "missing head", "unexpected", "shape", "dtype"],
)
def test_tensors_that_do_not_fit_the_config_raise(tmp_path, change, message):
    save(tmp_path)
    edit(tmp_path, change)
    fails(tmp_path, message)


def test_a_tied_config_with_another_head_raises(tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    ml.load_model(tmp_path, dtype="float32", device="cpu")  # the same values: nothing is lost
    edit(tmp_path, lambda t: t["lm_head.weight"][3, 4].add_(1))
    fails(tmp_path, "lm_head.weight is not the embedding, but config.json ties")


def test_shards_and_index_must_agree(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    original = tmp_path / "original"
    save(original, SHARDED)

    def case(message: str, change=None, remove: str = "") -> None:
        shutil.rmtree(tmp_path / "case", ignore_errors=True)
        shutil.copytree(original, tmp_path / "case")
        if change:
            edit_json(tmp_path / "case" / index.name, change)
        if remove:
            (tmp_path / "case" / remove).unlink()
        fails(tmp_path / "case", message)

    places = json.loads((original / index.name).read_text())["weight_map"]
    first, second = sorted(set(places.values()))[:2]
    name = next(name for name, file in places.items() if file == first)
    case(f"{second} is missing: the index names it", remove=second)
    case(
        f"{name} is in {first}, but .* names {second}",
        lambda i: i["weight_map"].update({name: second}),
    )
    case("tensor ghost is in None", lambda i: i["weight_map"].update({"ghost": first}))
    case(f"tensor {name} is in {first}, but .* names None", lambda i: i["weight_map"].pop(name))
    case("weight_map must map", lambda i: i.update({"weight_map": None}))
    case("weight_map must map", lambda i: i["weight_map"].update({name: 3}))
    for outside in (
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "..\\secret",
        "sub/x",
        "..",
        "",
    ):
        case(
            "outside its folder", lambda i, outside=outside: i["weight_map"].update({name: outside})
        )


def test_a_tensor_in_two_shards_raises(tmp_path):
    save(tmp_path, SHARDED)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    twice = load_file(files[1]) | dict([next(iter(load_file(files[0]).items()))])
    save_file(twice, files[1], {"format": "pt"})
    fails(tmp_path, "is in both")


def test_wrong_arguments_raise():
    fails(Path(), "quantize must be None, 'nf4' or 'keep', got 'int8'", quantize="int8")
    for unused in ({"blocksize": 128}, {"double_quant": False}):
        fails(Path(), "have no effect without quantize='nf4': add that", **unused)
    for wrong in ("int4", torch.int8, "bf16"):
        with pytest.raises(ValueError, match="float32"):
            pick_dtype(wrong, torch.device("cpu"))


def test_a_checkpoint_quantised_by_another_method_is_refused(tmp_path):
    save(tmp_path)
    edit_json(
        tmp_path / "config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})
    )
    fails(tmp_path, "already quantised .*'awq'.*Give the 16-bit checkpoint")


def test_loading_imports_no_compiler(tmp_path):
    save(tmp_path)
    run = "import sys, torch, minilora as ml; ml.load_model(sys.argv[1], quantize='nf4')(torch.ones(1, 4).long()); "
    assert (
        python(run + "print({'sympy', 'torch._dynamo'} & {*sys.modules})", tmp_path).strip()
        == "set()"
    )
