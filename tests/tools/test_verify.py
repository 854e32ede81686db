"""Proves that `verify` recognises a checkpoint that bitsandbytes would have written.

It is tested on folders of transformers and bitsandbytes, on our own, and on files with one code,
scale or table changed.
"""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers import tiny
from minilora.cli.main import main
from minilora.common import read_tensors, write_tensors
from minilora.models.loader import load_model
from minilora.models.save import save_model
from minilora.tools.verify import EQUAL, NESTED, compare, verify
from minilora_kernels import quantize_nf4

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Write base/, a tiny bf16 Llama, and the same in 4 bits in nested/ and plain/.

    transformers and bitsandbytes write the 4-bit folders.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("place")
    # a row of 208 ends inside a block, which bitsandbytes' AVX-512 code reads with wrong scales
    tiny.save(folder / "base", dtype=torch.bfloat16, hidden_size=128, intermediate_size=208)
    for name, nested in (("nested", True), ("plain", False)):
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            folder / "base", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(folder / name)
    return folder


def change(place, tmp_path, kind: str, **entries: Tensor) -> str:
    """Copy a checkpoint with entries of NAME replaced; an empty tensor removes its entry.

    The key of the weight is ''.
    """
    state = read_tensors(place / kind / "model.safetensors")
    state |= {NAME + key.replace("_", ".", 1) * bool(key): value for key, value in entries.items()}
    write_tensors(
        tmp_path / "model.safetensors", {key: value for key, value in state.items() if len(value)}
    )
    return str(tmp_path)


def entry(place, kind: str, key: str = "") -> Tensor:
    return read_tensors(place / kind / "model.safetensors")[NAME + key].clone()


# ---- oracle


@pytest.mark.parametrize("kind", ["nested", "plain"])
def test_folders_of_transformers_and_bitsandbytes_are_right(place, kind):
    base, folder = place / "base", place / kind
    assert (
        set(verify(folder).values())
        == set(verify(folder, against="bitsandbytes").values())
        == {EQUAL}
    )
    from_source = verify(folder, source=base)
    assert len(from_source) == 3 * 7 and set(from_source.values()) <= (
        {EQUAL, NESTED} if kind == "nested" else {EQUAL}
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_our_own_folder_is_right_compared_with_its_source(tmp_path, stored):
    """load_model quantises the stored values in any compute dtype; transformers casts first."""
    tiny.save(tmp_path / "base", dtype=stored)
    model = load_model(tmp_path / "base", quantize="nf4", dtype="bfloat16", device="cpu")
    save_model(model, tmp_path / "four", format="bnb-4bit")
    assert set(verify(tmp_path / "four", source=tmp_path / "base").values()) == {EQUAL}


def test_our_quantised_weights_are_those_of_bitsandbytes(place, capsys):
    verdicts = verify(place / "base", against="bitsandbytes")
    assert len(verdicts) == 3 * 7 and set(verdicts.values()) <= {EQUAL, NESTED}
    assert main(["verify", str(place / "base"), "--against", "bitsandbytes"]) == 0
    assert capsys.readouterr().out.count("\n") == 21


# ---- property


@pytest.mark.parametrize("kind", ["nested", "plain"])
def test_a_changed_code_needs_the_source_and_a_lost_maximum_does_not(place, tmp_path, kind):
    codes = entry(place, kind)
    codes[5] ^= 0x10
    folder = change(place, tmp_path, kind, **{"": codes})
    assert verify(folder, source=place / "base")[NAME].startswith("different")
    codes[:32] = 0x77  # a block of 64 without its largest element
    codes[0] = 0x78
    folder = change(place, tmp_path, kind, **{"": codes})
    assert verify(folder)[NAME].startswith("different")
    assert main(["verify", folder]) == 1
    assert list(verify(folder).values()).count(EQUAL) == 20


def test_a_block_of_zeros_is_right(place, tmp_path):
    codes = entry(place, "nested")
    codes[:32] = 0x77
    assert verify(change(place, tmp_path, "nested", **{"": codes}))[NAME] == EQUAL


def test_a_difference_of_one_nested_code_passes_and_of_two_fails():
    W = torch.randn(64, 256).bfloat16()
    ours = quantize_nf4(W)
    for step, verdict in ((0, EQUAL), (1, NESTED), (2, "different: scales")):
        state = ours.state_dict()
        state["weight.absmax"] = state["weight.absmax"].clone()
        # at code 200 the codes are wider than the steps of bitsandbytes' table
        far = int((state["weight.absmax"].int() - 200).abs().argmin())
        state["weight.absmax"][far] += step
        assert compare(ours, type(ours).from_state_dict(state)) == verdict
    assert compare(ours, quantize_nf4(W, double_quant=False)).startswith("different")
    assert compare(ours, quantize_nf4(W, blocksize=128)).startswith("different")
    assert "float32" in compare(ours, replace(ours, dtype=torch.float32))  # names the difference
    assert re.fullmatch(
        r"different: [\d,]+ of 8,192 bytes of codes", compare(ours, quantize_nf4(-W))
    )
    for part in ("nested_bytes", "offset_bytes"):
        moved = (getattr(ours, part).view(torch.float32) * 1.001).view(torch.uint8)
        assert compare(ours, replace(ours, **{part: moved})) == "different: scales"
    plain = quantize_nf4(W, double_quant=False)
    assert compare(plain, quantize_nf4(W * 2, double_quant=False)) == "different: scales"


# ---- error


def test_another_table_is_different_with_the_reason(place, tmp_path):
    folder = change(place, tmp_path, "plain", _quant_map=entry(place, "plain", ".quant_map") * 1.01)
    assert "not the standard table" in verify(folder)[NAME]


@pytest.mark.parametrize("lost", ["", "_quant_map", "_absmax", "_quant_state.bitsandbytes__nf4"])
def test_a_weight_that_lost_a_part_is_reported(place, tmp_path, lost):
    verdicts = verify(change(place, tmp_path, "plain", **{lost: torch.empty(0)}))
    assert len(verdicts) == 21 and verdicts[NAME].startswith("different: NF4 state of")


def test_nothing_to_compare_raises(place, capsys):
    with pytest.raises(ValueError, match="no weight in 4 bits"):
        verify(place / "base")
    with pytest.raises(ValueError, match="against"):
        verify(place / "plain", against="torchao")
    with pytest.raises(ValueError, match="two comparisons"):
        verify(place / "plain", source=place / "base", against="bitsandbytes")
    with pytest.raises(ValueError, match="is it the base"):
        verify(place / "plain", source=place / "nested")
    assert (
        main(["verify", "./nowhere"]) == 1
        and "Expected a folder with .safetensors" in capsys.readouterr().err
    )
