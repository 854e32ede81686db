"""Proves that the GGUF file of an adapter holds its ΔW, as llama.cpp computes it.

Oracle: the gguf package reads the file, and (α / r) · B A is the adapter's ΔW in llama.cpp's order
of rows. tests/models/test_llama_cpp.py compares the logits of llama.cpp itself.
"""

import gguf
import pytest
import torch

import minilora as ml
from helpers.chats import furnish
from helpers.kinds import shake
from helpers.tiny import oracle, twin
from minilora.cli.main import main
from minilora.lora.registry import lora_layers
from minilora.models.gguf.read import unpermute

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def adapted(**fields):
    model = twin(oracle())
    ml.inject(model, ml.LoRAConfig(**{"r": 4, "target_modules": "all-linear"} | fields))
    shake(model)
    return model


def stored(path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return α and the tensors of the file."""
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    return reader.fields["adapter.lora.alpha"].contents(), tensors


# ---- oracle


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True, "lora_alpha": 32}, {"rank_pattern": {"q_proj": 2}}],
    ids=["plain", "rank-stabilised", "ranks"],
)
def test_the_file_holds_the_adapters_change_of_every_layer(tmp_path, fields):
    model = adapted(**fields)
    ml.save_gguf_adapter(model, tmp_path / "a.gguf")
    alpha, tensors = stored(tmp_path / "a.gguf")
    layers = lora_layers(model)
    for path, layer in layers.items():
        _, _, number, module = path.split(".", 3)
        name = f"blk.{number}.{NAMES[module]}.weight"
        A, B = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        heads = {"q_proj": 4, "k_proj": 2}.get(module.rpartition(".")[2])
        if heads is not None:
            B = unpermute(B, heads)
        expected = layer.adapters["default"].delta(torch.float64)
        found = alpha / len(A) * B.double() @ A.double()
        # α and B are rounded to fp32 once each.
        assert (found - expected).abs().max() <= 2**-22 * expected.abs().max()
    assert not tensors


# ---- the command


def test_the_command_writes_the_file_of_the_function(tmp_path, capsys):
    folder = furnish(tmp_path)
    model = ml.load_model(folder / "model", dtype="float32")
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj", "up_proj"]))
    shake(model)
    ml.save_adapter(model, folder / "adapter")
    ml.save_gguf_adapter(model, folder / "function.gguf")
    out = folder / "command.gguf"
    assert main(["export", str(folder / "adapter"), str(out), "--format", "gguf-adapter"]) == 0
    assert out.read_bytes() == (folder / "function.gguf").read_bytes()
    assert f"--lora {out}" in capsys.readouterr().out


# ---- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "is DoRAAdapter"),
        ({"lora_bias": True}, "is LoRA with a bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is EmbeddingAdapter"),
        ({"modules_to_save": ["lm_head"]}, "also trains .'lm_head'."),
    ],
)
def test_what_llama_cpp_cannot_add_is_refused(tmp_path, fields, message):
    attention_bias = "lora_bias" in fields
    model = twin(oracle(attention_bias=attention_bias, mlp_bias=attention_bias))
    ml.inject(model, ml.LoRAConfig(**{"r": 4, "target_modules": ["q_proj"]} | fields))
    with pytest.raises(ValueError, match=message):
        ml.save_gguf_adapter(model, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_a_model_without_the_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="other"):
        ml.save_gguf_adapter(adapted(), tmp_path / "a.gguf", name="other")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["{place}/model", "{place}/a.gguf"], "has none"),
        (["{place}/model", "{place}/folder"], "a file name that ends in .gguf"),
        (["{place}/model", "{place}/a.gguf", "--dtype", "f16"], "Leave --dtype out"),
    ],
)
def test_the_command_checks_its_options_first(tmp_path, capsys, rest, message):
    place = furnish(tmp_path)
    arguments = [one.format(place=place) for one in rest]
    assert main(["export", *arguments, "--format", "gguf-adapter"]) == 1
    assert message in capsys.readouterr().err
