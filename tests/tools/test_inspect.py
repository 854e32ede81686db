"""Proves that `inspect` reports the contents of a folder or file.

Spectra and angles are those of the dense update, which `inspect` never forms. It reads PEFT's own
adapters, including embeddings and patterns.
"""

import json
import math

import pytest
import torch

from helpers import tiny
from minilora.cli.main import main
from minilora.common import write_tensors
from minilora.tools.inspect import GGUF_KINDS, Inspection, inspect


def write_adapter(folder, *updates, **config):
    """Write an adapter with a layer for each pair (A (r, in), B (out, r)).

    The layers are named "0", "1" and so on.
    """
    folder.mkdir(exist_ok=True)
    tensors = {}
    for i, (A, B) in enumerate(updates):
        tensors |= {
            f"base_model.model.{i}.lora_A.weight": A.clone(),
            f"base_model.model.{i}.lora_B.weight": B,
        }
    write_tensors(folder / "adapter_model.safetensors", tensors, {"note": "made by hand"})
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "lora_alpha": 8, "r": 4} | config)
    )
    return folder


# ---- oracle


PATTERNS = {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"up_proj": 2}}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, PATTERNS])
def test_spectra_are_those_of_pefts_dense_update(tmp_path, options):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj", "embed_tokens"], **options
    )
    config.init_lora_weights = False
    model = get_peft_model(tiny.oracle(), config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    found = inspect(tmp_path)
    assert (
        found.kind == "adapter"
        and found.facts["lora_alpha"] == 6
        and len(found.layers) == 2 * 3 + 1
    )
    for name, figures in found.layers.items():
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").double()
        sigma = torch.linalg.svdvals(delta)
        p = sigma / sigma.sum()
        assert figures["norm"] == pytest.approx(
            delta.norm().item(), rel=1e-5
        )  # PEFT multiplies in fp32
        assert figures["stable rank"] == pytest.approx(
            (delta.norm() ** 2 / sigma[0] ** 2).item(), rel=1e-5
        )
        assert figures["effective rank"] == pytest.approx(
            math.exp(torch.special.entr(p).sum().item()), rel=1e-3
        )
        assert figures["rank"] == (2 if "up_proj" in name and "rank_pattern" in options else 4)


def test_gguf_kinds_are_those_of_the_gguf_package():
    import gguf

    assert all(
        gguf.GGMLQuantizationType(number).name == name for number, name in GGUF_KINDS.items()
    )


def test_a_gguf_file(tmp_path, capsys):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    for i in range(2):
        weight = torch.randn(8, 32).numpy()
        writer.add_tensor(
            f"blk.{i}.ffn_up.weight",
            gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0),
            raw_dtype=gguf.GGMLQuantizationType.Q8_0,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect(tmp_path / "m.gguf")
    assert found.tensors["blk.1.ffn_up.weight"] == ("Q8_0", (8, 32))
    assert found.facts["general.architecture"] == "llama" and found.facts["llama.block_count"] == 2
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 0
    assert "2 × blk.*.ffn_up.weight" in capsys.readouterr().out


def test_a_model_folder_in_16_and_in_4_bits(tmp_path):
    reference = tiny.save(tmp_path / "dense", dtype=torch.bfloat16)
    found = inspect(tmp_path / "dense")
    assert found.kind == "model" and found.facts["architectures"] == ["LlamaForCausalLM"]
    assert found.tensors == {
        name: ("BF16", tuple(t.shape)) for name, t in reference.state_dict().items()
    }
    assert found.facts["quantisation"] == "none" and found.facts["hidden_size"] == 64
    assert found.facts["bytes"] == f"{(tmp_path / 'dense/model.safetensors').stat().st_size:,}"
    assert found.facts["values"] == f"BF16 {sum(p.numel() for p in reference.parameters()):,}"
    assert "3 × model.layers.*.mlp.up_proj.weight" in str(found) and "(96, 64)" in str(found)

    from minilora_kernels import quantize_nf4

    weight = quantize_nf4(torch.randn(64, 64)).state_dict("model.layers.0.mlp.up_proj.weight")
    write_tensors(tmp_path / "four" / "model.safetensors", weight)
    config = {"architectures": ["X"], "quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "four" / "config.json").write_text(json.dumps(config))
    found = inspect(tmp_path / "four")
    assert found.facts["quantisation"] == "bitsandbytes, 1 weights in nf4"
    assert "1 × model.layers.*.mlp.up_proj.weight.quant_state.bitsandbytes__nf4" in str(found)
    (tmp_path / "four" / "config.json").write_text(
        json.dumps({"quantization_config": "bitsandbytes"})
    )
    assert inspect(tmp_path / "four").facts["quantisation"] == "none, 1 weights in nf4"


def test_only_the_files_that_are_the_model_count(tmp_path):
    """Ignore a second copy of all tensors (Mistral) and refuse shards of an earlier save."""
    tiny.save(tmp_path, {"max_shard_size": "50KB"})
    expected = inspect(tmp_path)
    write_tensors(tmp_path / "consolidated.safetensors", {"layers.0.wq": torch.zeros(2)})
    assert inspect(tmp_path) == expected
    name, (_, shape) = next(iter(expected.tensors.items()))
    write_tensors(tmp_path / "model-00001-of-00099.safetensors", {name: torch.zeros(shape)})
    with pytest.raises(
        ValueError, match=f"{name} is in both .*00099.safetensors.*remove the stale file"
    ):
        inspect(tmp_path)
    write_tensors(tmp_path / "model.safetensors", {"one": torch.zeros(2)})
    assert [*inspect(tmp_path).tensors] == ["one"]  # the same as load_model


# ---- property


def test_angles_are_the_ones_built_in(tmp_path):
    """The column spaces are 30° apart in one direction and equal in the other.

    The row spaces are orthogonal.
    """
    e = torch.eye(16)
    turned = math.cos(math.pi / 6) * e[:, 0] + math.sin(math.pi / 6) * e[:, 5]
    mixing = torch.randn(2, 2)  # another basis of the same space
    first = write_adapter(tmp_path / "a", (e[:2], e[:, :2]))
    second = write_adapter(
        tmp_path / "b", (e[2:4], torch.stack([turned, e[:, 1]], 1) @ mixing), (e[:2], e[:, :2])
    )
    found = inspect(first, second)
    angles = found.layers["0"]
    assert angles == pytest.approx(
        {"columns min°": 0, "columns max°": 30, "rows min°": 90, "rows max°": 90}, abs=1e-4
    )
    assert found.facts == {"layers of both": 1, "layers of one": 1}
    assert "columns max°" in str(found) and isinstance(found, Inspection)


def test_low_rank_and_zero_updates_are_measured(tmp_path):
    # B has rank 2, except for rounding in fp32
    A, B = (
        torch.randn(4, 16),
        torch.randn(12, 2) @ torch.randn(2, 4),
    )
    folder = write_adapter(tmp_path / "a", (A, B), (A, torch.zeros(12, 4)), lora_alpha=4)
    layers = inspect(folder).layers
    assert layers["0"]["rank"] == 2 and layers["0"]["norm"] == pytest.approx(
        (B @ A).norm().item(), rel=1e-5
    )
    assert layers["1"] == {"norm": 0.0, "rank": 0, "stable rank": 0.0, "effective rank": 0.0}
    angles = inspect(folder, folder).layers
    assert angles["0"]["rows max°"] == pytest.approx(0, abs=1e-4) and math.isnan(
        angles["1"]["rows max°"]
    )
    many = write_adapter(
        tmp_path / "m", *((torch.randn(4, 16), torch.randn(12, 4)) for _ in range(50))
    )
    in_order = [str(number) for number in range(50)]  # the file has "10" before "2"
    assert list(inspect(many).layers) == list(inspect(many, many).layers) == in_order
    for found in inspect(many, many).layers.values():  # a cosine of 1 plus an ulp is 0° too
        assert [*found.values()] == pytest.approx([0] * 4, abs=1e-4)
    equal = write_adapter(tmp_path / "e", (torch.eye(16)[:4], torch.eye(12)[:, :4]))
    assert inspect(equal).layers["0"] == pytest.approx(
        {"norm": 4, "rank": 4, "stable rank": 4, "effective rank": 4}
    )
    assert inspect(equal).facts["metadata note"] == "made by hand"


# ---- error


def test_invalid_folders_raise_with_the_expected_contents(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "expected a folder with .safetensors files" in capsys.readouterr().err
    write_tensors(tmp_path / "model.safetensors", {"w": torch.zeros(1)})
    with pytest.raises(OSError, match="config.json: no such file"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        inspect(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="damaged or cut off"):
        inspect(tmp_path)
    A, B = torch.randn(4, 16), torch.randn(12, 4)
    folder, narrow = (
        write_adapter(tmp_path / "a", (A, B)),
        write_adapter(tmp_path / "n", (A[:, :8], B)),
    )
    with pytest.raises(ValueError, match="different bases: 16 rows in the first, 8 in the second"):
        inspect(folder, narrow)
    with pytest.raises(ValueError, match="no A that fits"):
        inspect(write_adapter(tmp_path / "b", (A[:3], B)))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "adapter_config.json").write_text("{}")
    write_tensors(tmp_path / "c" / "adapter_model.safetensors", {"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds no lora_B"):
        inspect(tmp_path / "c")
    write_tensors(
        tmp_path / "c" / "adapter_model.safetensors", {"x.lora_A.weight": A, "x.lora_B.weight": B}
    )
    with pytest.raises(ValueError, match="no layer in common"):
        inspect(folder, tmp_path / "c")
