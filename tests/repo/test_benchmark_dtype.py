"""Proves that all sides of a benchmark compute in one dtype, the fast one of the machine.

It also proves that the dtype is printed. Oracle: the library's own rule,
`load_model(dtype="auto")`. Error: an unknown dtype name.
"""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks._lib import side_by_side, steps
from benchmarks.docs import pictures
from benchmarks.training import peers
from helpers.source import ROOT
from minilora.models.loader import pick_dtype

UNITS = {
    "AMX": (True, True),
    "AVX512-BF16": (True, False),
    "AVX2": (False, False),
}  # class -> AVX512-BF16, AMX


def pretend(monkeypatch, cpu: str) -> None:
    """Make torch report a CPU of this class and no GPU."""
    avx512_bf16, amx = UNITS[cpu]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("cpu", UNITS)
def test_auto_is_the_dtype_of_load_model_and_a_given_name_is_used(monkeypatch, capsys, cpu: str):
    pretend(monkeypatch, cpu)
    chosen = side_by_side.compute_dtype("auto")
    assert chosen == pick_dtype("auto", torch.device("cpu"))
    assert chosen == (torch.float32 if cpu == "AVX2" else torch.bfloat16)
    assert "dtype auto is" in capsys.readouterr().err
    for name, dtype in {"bfloat16": torch.bfloat16, "float32": torch.float32}.items():
        assert side_by_side.compute_dtype(name) == dtype
        assert side_by_side.dtype_name(dtype) == name


@pytest.mark.parametrize("cpu", UNITS)
def test_the_dtype_and_the_class_of_cpu_are_printed_first(monkeypatch, capsys, cpu: str):
    pretend(monkeypatch, cpu)
    for name in ("bfloat16", "float32"):
        found = side_by_side.machine(side_by_side.compute_dtype(name))
        assert (found["dtype"], found["cpu"]) == (name, cpu)
        assert capsys.readouterr().out.startswith(f"dtype {name}, cpu {cpu}, cores ")


def test_the_dtype_option_defaults_to_auto_and_refuses_other_names(capsys):
    parser = argparse.ArgumentParser()
    side_by_side.add_dtype(parser)
    assert parser.parse_args([]).dtype == "auto"
    for name in side_by_side.DTYPES:
        assert parser.parse_args(["--dtype", name]).dtype == name
    with pytest.raises(SystemExit):
        parser.parse_args(["--dtype", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_both_sides_have_one_dtype(tmp_path):
    """The saved base, the peers' dequantised weights and their trained weights have one dtype."""
    model = torch.nn.Linear(4, 4)
    for dtype in (torch.bfloat16, torch.float32):
        side_by_side.checkpoint(tmp_path / str(dtype), True, 1, 8, dtype)
        config = json.loads((tmp_path / str(dtype) / "config.json").read_text())
        assert (config.get("dtype") or config["torch_dtype"]) == side_by_side.dtype_name(dtype)
        stored = load_file(tmp_path / str(dtype) / "model.safetensors")
        assert {value.dtype for value in stored.values()} == {dtype}
        assert steps.trained_in(model, dtype).weight.dtype == dtype
        assert peers.autocast(dtype, dtype) is None
        if not side_by_side.missing_peers():
            assert steps.four_bit(dtype).bnb_4bit_compute_dtype == dtype
    mixed = peers.autocast(torch.float32, torch.bfloat16)
    assert isinstance(mixed, torch.autocast) and mixed.fast_dtype == torch.bfloat16


def test_no_side_is_called_bf16_in_an_fp32_benchmark(monkeypatch):
    monkeypatch.setattr(peers, "missing_peers", lambda: "")
    assert peers.sides_of("full", torch.bfloat16) == ["minilora", "peers", "peers, bf16"]
    assert peers.sides_of("full", torch.float32) == ["minilora", "peers"]
    monkeypatch.setattr(peers, "missing_peers", lambda: "not installed")
    assert peers.sides_of("qlora", torch.float32) == ["minilora", "limit"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_picture_names_the_dtype_of_its_document(tmp_path, dtype: str):
    found = pictures.document(str(ROOT / "docs" / "speed.svg"))
    pictures.save(found | {"dtype": dtype}, tmp_path / "speed.svg")
    drawn = (tmp_path / "speed.svg").read_text()
    assert (">LoRA, bf16<" in drawn) == (dtype == "bfloat16")
    assert (">LoRA, fp32<" in drawn) == (dtype == "float32")
    assert ("fp32 + autocast" in drawn) == (dtype == "bfloat16")
