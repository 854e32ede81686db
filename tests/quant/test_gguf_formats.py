"""Tests of the quantised types of GGUF against the gguf package, which llama.cpp publishes."""

import re

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.gguf_blocks import random_blocks, random_weight
from helpers.source import ROOT
from minilora.models.gguf.read import unpermute
from minilora_kernels.gguf import FORMATS, GGUFWeight

OPS = torch.ops.minilora
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected_values(blocks: Tensor, type_name: str) -> Tensor:
    """Return the values of the gguf package, fp32 (…, in)."""
    kind = gguf.GGMLQuantizationType[type_name]
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), kind))


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Compare bits, so that 0 and -0 differ."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


# ---- oracle


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_equal_the_gguf_packages(name):
    kind = gguf.GGMLQuantizationType[name]
    assert (FORMATS[name].values, FORMATS[name].nbytes) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("name", FORMATS)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 9))
def test_values_equal_the_gguf_packages_bit_for_bit(name, seed, count):
    blocks = random_blocks(name, count, seed)
    assert_same_bits(FORMATS[name].decode(blocks), expected_values(blocks, name))


@pytest.mark.parametrize("name", FORMATS)
def test_every_finite_scale_equals_the_gguf_packages(name):
    """All 63,488 finite fp16 numbers, as the first scale of a block."""
    numbers = np.arange(2**16, dtype=np.uint16)
    finite = numbers[np.isfinite(numbers.view(np.float16))]
    blocks = random_blocks(name, len(finite), 0)
    offset = FORMATS[name].scale_offsets[0]
    blocks[:, offset : offset + 2] = torch.from_numpy(finite.view(np.uint8).reshape(-1, 2))
    assert_same_bits(FORMATS[name].decode(blocks), expected_values(blocks, name))


# ---- property


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_round_the_values_once(name, dtype):
    weight = random_weight(name, 6, 2)
    expected = expected_values(weight.blocks, name).to(dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    OPS.dequantize_gguf_out(weight.blocks, name, 0, out)
    for found in (
        out,
        OPS.dequantize_gguf(*weight.parts(), dtype),
        OPS.dequantize_gguf_backward(*weight.parts(), dtype),
    ):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K"])
@pytest.mark.parametrize(("rows", "heads"), [(24, 1), (24, 3), (24, 12)])
def test_permuted_rows_come_out_in_the_models_order(name, rows, heads):
    weight = random_weight(name, rows, heads=heads)
    before = weight.blocks.clone()
    expected = unpermute(expected_values(weight.blocks, name), heads)
    assert_same_bits(weight.dequantize(torch.float32), expected)
    some = torch.tensor([[0, 5], [23, 5]])
    assert_same_bits(weight.rows(some), expected[some])
    assert torch.equal(weight.blocks, before)


def test_a_large_matrix_is_decoded_in_several_chunks():
    weight = random_weight("Q8_0", 40, 512)  # 655,360 values; a chunk has 262,144
    assert_same_bits(weight.dequantize(torch.float32), expected_values(weight.blocks, "Q8_0"))


@pytest.mark.parametrize("name", ["dequantize_gguf", "dequantize_gguf_backward"])
def test_operators_pass_the_checks_of_torch(name):
    torch.library.opcheck(getattr(OPS, name), (*random_weight("Q4_K").parts(), torch.bfloat16))


def test_out_operator_passes_the_checks_of_torch():
    weight = random_weight("Q4_0", heads=3)
    arguments = (weight.blocks, "Q4_0", 3, torch.empty(weight.shape))
    torch.library.opcheck(OPS.dequantize_gguf_out, arguments)


# ---- round trip


@pytest.mark.parametrize("heads", [0, 3])
def test_state_dict_returns_the_same_weight(heads):
    weight = random_weight("Q5_1", heads=heads)
    again = GGUFWeight.from_state_dict(weight.state_dict("w"), "w")
    assert torch.equal(again.blocks, weight.blocks)
    assert again.parts()[1:] == weight.parts()[1:] and again.dtype == weight.dtype
    assert "Q5_1" in repr(again) and again.nbytes == 12 * 24 and again.numel == 12 * 32


# ---- error


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_not_finite_are_refused(name, scale):
    weight = random_weight(name, 6)
    weight.check_scales()
    for offset in FORMATS[name].scale_offsets:
        broken = random_weight(name, 6)
        number = np.array([scale], np.float16).view(np.uint8)
        broken.blocks[4, offset : offset + 2] = torch.from_numpy(number)
        with pytest.raises(ValueError, match=f"block 4 of {name} has a scale that is NaN or inf"):
            broken.check_scales()
        with pytest.raises(ValueError, match="damaged"):
            GGUFWeight.from_state_dict(broken.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type_name": "Q2_K"}, "expected a type of Q4_0.*got 'Q2_K'"),
        ({"shape": (12, 33)}, "in a multiple of 32"),
        ({"shape": (12, 64)}, r"uint8 of shape \(12, 36\)"),
        ({"shape": (32,)}, r"expected a shape \(out, in\)"),
        ({"blocks": torch.zeros(12, 18)}, "got torch.float32"),
        ({"blocks": torch.zeros(18, 12, dtype=torch.uint8).T}, "contiguous"),
        ({"heads": 5}, "2 · heads divides 12 rows"),
        ({"heads": -1}, "heads"),
        ({"dtype": torch.int8}, "expected a dtype"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    weight = random_weight("Q4_0")
    fields = {"blocks": weight.blocks, "shape": weight.shape, "dtype": weight.dtype}
    fields |= {"type_name": "Q4_0", "heads": 0} | change
    with pytest.raises(ValueError, match=message):
        GGUFWeight(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("w"), "expected the keys w and w.gguf"),
        (lambda s: s.pop("w.gguf"), "expected the keys w and w.gguf"),
        (lambda s: s.update({"w.gguf": torch.zeros(3, dtype=torch.uint8)}), "not the JSON text"),
        (lambda s: s.update(w=s["w"][:6].clone()), "expected contiguous uint8"),
        (lambda s: s.update({"w.gguf": json_bytes('{"type": "Q4_0"}')}), "not the JSON text"),
        (
            lambda s: s.update(
                {"w.gguf": json_bytes('{"type":"Q4_0","shape":[12,32],"dtype":"int8","heads":0}')}
            ),
            "expected a type, shape, dtype and heads",
        ),
    ],
)
def test_damaged_state_dicts_are_refused(change, message):
    state = random_weight("Q4_0").state_dict("w")
    change(state)
    with pytest.raises(ValueError, match=message):
        GGUFWeight.from_state_dict(state, "w")


def json_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def test_out_operator_refuses_a_tensor_with_gaps():
    weight = random_weight("Q4_0")
    with pytest.raises(ValueError, match="contiguous out"):
        OPS.dequantize_gguf_out(weight.blocks, "Q4_0", 0, torch.empty(32, 12).T)


def test_the_page_of_formats_states_the_bits_of_every_type():
    """docs/formats.md has a row such as "| Q4_0, Q5_0 | 4.5, 5.5 | …"."""
    stated = {}
    for types, bits in re.findall(r"^\| (Q\w+(?:, Q\w+)*) \| ([\d., ]+) \|", page(), re.M):
        stated |= dict(zip(types.split(", "), bits.split(", "), strict=True))
    assert stated == {name: f"{fmt.bits:.3g}" for name, fmt in FORMATS.items()}


def page() -> str:
    return (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
