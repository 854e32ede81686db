"""Proves that NF4Weight reads and writes bitsandbytes' 4-bit state dict and refuses any other.

Oracle: the state dict of bitsandbytes' own Linear4bit: keys, order, dtypes, shapes, bytes. After
reading and writing it is identical, including the JSON text and the 8-bit codes.
"""

import copy
import io
import json
import pickle
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from minilora_kernels import NF4Weight, dequantize_nf4, quantize_nf4

KEY = "weight.quant_state.bitsandbytes__nf4"


def dense(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def bnb_layer(
    W: torch.Tensor, nested: bool, storage: torch.dtype = torch.uint8, blocksize: int = 64
):
    """Return a bitsandbytes layer with W in NF4.

    No input ran through it, since a forward in eval would repack W.
    """
    layer = bnb.nn.Linear4bit(W.shape[1], W.shape[0], bias=False, quant_storage=storage)
    options = dict(
        compress_statistics=nested, quant_type="nf4", quant_storage=storage, blocksize=blocksize
    )
    layer.weight = bnb.nn.Params4bit(W, requires_grad=False, **options)
    return layer.to("cpu")  # quantises


# ---- oracle


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape,blocksize", [((64, 64), 64), ((192, 320), 64), ((128, 512), 128), ((320, 1024), 32)]
)
def test_a_bitsandbytes_file_read_and_written_again_is_identical(shape, blocksize, dtype, nested):
    layer = bnb_layer(dense(*shape, dtype=dtype), nested, blocksize=blocksize)
    theirs = layer.state_dict()
    weight = NF4Weight.from_state_dict(theirs)
    ours = weight.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
    assert weight.dtype == dtype and weight.shape == shape and weight.double_quant is nested
    assert torch.equal(
        dequantize_nf4(weight),
        bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state),
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_our_file_read_by_bitsandbytes_has_our_values(dtype, nested):
    weight = quantize_nf4(dense(192, 320, dtype=dtype), double_quant=nested)
    state = weight.state_dict()
    param = bnb.nn.Params4bit.from_prequantized(state.pop("weight"), state, device="cpu")
    theirs = bnb.functional.dequantize_4bit(param.data, param.quant_state)
    assert theirs.dtype == dtype and torch.equal(theirs, dequantize_nf4(weight))


@pytest.mark.parametrize("nested", [False, True])
def test_a_written_state_dict_equals_that_of_bitsandbytes(nested):
    """Expect identical entries, except for the 8-bit codes and their mean.

    For those, bitsandbytes' CPU table and fp32 mean round coarsely.
    """
    W = dense(192, 320)
    ours, theirs = (
        quantize_nf4(W, double_quant=nested).state_dict(),
        bnb_layer(W, nested).state_dict(),
    )
    assert list(ours) == list(theirs)
    exact = [
        k for k in ours if not nested or k not in ("weight.absmax", "weight.nested_absmax", KEY)
    ]
    assert all(torch.equal(ours[key], theirs[key]) for key in exact)
    mine, other = (json.loads(bytes(state[KEY].tolist())) for state in (ours, theirs))
    assert list(mine) == list(other)
    assert mine.pop("nested_offset", 0) == pytest.approx(
        other.pop("nested_offset", 0), rel=3e-7
    )  # 2 ulp
    assert mine == other
    if nested:
        assert ((ours["weight.absmax"].int() - theirs["weight.absmax"].int()).abs() <= 1).all()
        # a difference of numbers 5 times as large, so the 2 ulp of the mean count 5 times
        torch.testing.assert_close(
            ours["weight.nested_absmax"], theirs["weight.nested_absmax"], rtol=1e-5, atol=0
        )


def test_the_json_is_byte_for_byte_the_documented_one():
    weight = quantize_nf4(dense(64, 64))
    offset = weight.offset.item()
    text = (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64], '
        '"nested_blocksize": 256, '
        f'"nested_dtype": "float32", "nested_offset": {offset}}}'
    )
    assert bytes(weight.state_dict()[KEY].tolist()) == text.encode()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_codes_stored_as_another_dtype_are_read(storage, nested):
    W = dense(64, 128)
    state = bnb_layer(W, nested, storage).state_dict()
    assert state["weight"].dtype == storage
    assert torch.equal(NF4Weight.from_state_dict(state).packed, quantize_nf4(W).packed)


# ---- round trips


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 13), (3, 5, 64), (300, 64)])
def test_any_weight_survives_state_dict_copy_pickle_and_save(shape, dtype, double_quant):
    weight = quantize_nf4(dense(*shape, dtype=dtype), 32, double_quant)
    torch.save(weight.state_dict("w"), file := io.BytesIO())
    file.seek(0)
    copies = [
        NF4Weight.from_state_dict(
            weight.state_dict("model.w") | {"model.w_other": torch.ones(1)}, "model.w"
        ),
        NF4Weight.from_state_dict(torch.load(file, weights_only=True), "w"),
        NF4Weight.from_parts(*weight.parts(), weight.dtype),
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
        weight.to("cpu"),
    ]
    for other in copies:
        assert (other.shape, other.dtype, other.blocksize) == (
            weight.shape,
            weight.dtype,
            weight.blocksize,
        )
        assert torch.equal(dequantize_nf4(other), dequantize_nf4(weight))


# ---- stored bytes


@pytest.mark.parametrize("double_quant,bits", [(False, 4.5), (True, 4.127)])
def test_bits_per_parameter(double_quant, bits):
    """Expect 4 + 32/64 or 4 + 8/64 + 32/(64 * 256) bits; tensors on meta need no memory."""
    weight = quantize_nf4(torch.empty(4096, 14336, device="meta"), 64, double_quant)
    assert weight.device.type == "meta" and weight.absmax.shape == (4096 * 14336 // 64,)
    assert 8 * weight.nbytes / weight.numel == pytest.approx(bits, abs=5e-4)
    assert f"{bits:.3f} bits/value" in repr(weight)
    real = quantize_nf4(torch.ones(256, 896), 64, double_quant)
    assert (
        real.nbytes
        == 256 * 896 // 2 + 3584 * (1 if double_quant else 4) + (14 * 4 + 4) * double_quant
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_of_pytorch_compute_with_the_dense_weight(dtype):
    """The dense weight has the dtype of the tensor next to it."""
    weight = quantize_nf4(dense(64, 32))
    W = dequantize_nf4(weight, dtype)
    assert torch.equal(weight.dequantize(dtype), W)
    assert weight.dequantize().dtype == weight.dtype
    x = torch.linspace(-1, 1, 3 * 32).view(3, 32).to(dtype)
    found: Any = weight
    assert torch.equal(torch.nn.functional.linear(x, found), torch.nn.functional.linear(x, W))
    assert torch.equal(torch.nn.functional.linear(input=x, weight=found), x @ W.T)
    assert torch.equal(found @ x.T, W @ x.T)
    assert torch.equal(torch.t(found), dequantize_nf4(weight).T)
    assert not isinstance(weight, torch.Tensor)


def test_everything_stored_is_bytes_and_scales_are_views():
    for double_quant in (False, True):
        weight = quantize_nf4(dense(64, 100), double_quant=double_quant)
        parts = [weight.packed, weight.absmax_bytes, weight.nested_bytes, weight.offset_bytes]
        assert {part.dtype for part in parts if part is not None} == {torch.uint8}
        assert weight.absmax.dtype == torch.float32 and weight.absmax.shape == (100,)
        assert weight.scales.data_ptr() == weight.absmax_bytes.data_ptr()
    assert weight.offset.shape == (1,) and weight.nested_absmax.shape == (1,)


# ---- errors


def damaged(change) -> dict[str, torch.Tensor]:
    state = quantize_nf4(dense(64, 64)).state_dict()
    change(state)
    return state


def rewrite(**fields):
    """Return a change of fields in the JSON entry; None removes a field."""

    def change(state):
        info = json.loads(bytes(state[KEY].tolist())) | fields
        text = json.dumps({name: value for name, value in info.items() if value is not None})
        state[KEY] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def put(key: str, value):
    return lambda state: state.__setitem__(key, value(state[key]) if key in state else value(None))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: s.clear(), "got no key of it"),
        (lambda s: s.pop(KEY), "expected the key weight.quant_state"),
        (lambda s: s.pop("weight"), r"missing \[''\]"),
        (lambda s: s.pop("weight.absmax"), r"missing \['absmax'\]"),
        (lambda s: s.pop("weight.nested_quant_map"), r"missing \['nested_quant_map'\]"),
        (put("weight.zero_point", lambda _: torch.ones(1)), r"unexpected \['zero_point'\]"),
        (lambda s: s.__setitem__("weight.quant_state.bitsandbytes__fp4", s.pop(KEY)), "fp4"),
        (put(KEY, lambda t: t[:-1]), "not JSON text"),
        (put(KEY, lambda t: t.float()), "not JSON text"),
        (put(KEY, lambda t: torch.tensor([0xFF], dtype=torch.uint8)), "not JSON text"),
        (put(KEY, lambda t: torch.tensor([0x37], dtype=torch.uint8)), "expected the JSON fields"),
        (rewrite(quant_type="fp4"), "fp4"),
        (rewrite(dtype="int8"), "int8"),
        (rewrite(dtype=["float32"]), "float32"),
        (rewrite(shape="64, 64"), "list of sizes"),
        (rewrite(shape=[64, -64]), "list of sizes"),
        (rewrite(shape=[64, 65]), "expected packed to be"),
        (rewrite(shape=None), "expected the JSON fields"),
        (rewrite(blocksize=48), "expected a blocksize"),
        (rewrite(blocksize=128), "expected absmax_bytes to be"),
        (rewrite(nested_blocksize=128), "nested_blocksize"),
        (rewrite(nested_offset=float("nan")), "finite offset"),
        (rewrite(nested_offset="0"), "finite offset"),
        (rewrite(nested_offset=None), "expected the JSON fields"),
        (rewrite(colour="red"), "expected the JSON fields"),
        (put("weight", lambda t: t[:-1]), "expected packed to be"),
        (put("weight.absmax", lambda t: t[:-1]), "expected absmax_bytes to be"),
        (put("weight.absmax", lambda t: t.float()), "absmax"),
        (put("weight.nested_absmax", lambda t: t.double()), "finite fp32"),
        (put("weight.nested_absmax", lambda t: t * torch.nan), "finite fp32"),
        (put("weight.nested_absmax", lambda t: t.repeat(2)), "expected nested_bytes to be"),
        (put("weight.quant_map", lambda t: t.flip(0)), "quant_map is not the standard table"),
        (
            put("weight.nested_quant_map", lambda t: t.double()),
            "nested_quant_map is not the standard table",
        ),
    ],
)
def test_a_damaged_state_dict_raises(change, message):
    with pytest.raises(ValueError, match=message):
        NF4Weight.from_state_dict(damaged(change))


def test_parts_that_do_not_fit_raise():
    packed, scales, nested, offset, shape, blocksize = quantize_nf4(dense(64, 64)).parts()
    for parts in [
        (packed[:-1], scales, nested, offset, shape, blocksize),
        (packed[::2], scales, nested, offset, (64, 32), blocksize),
        (packed.float(), scales, nested, offset, shape, blocksize),
        (packed, scales, None, offset, shape, blocksize),
        (packed, scales, None, None, shape, blocksize),
        (packed, scales, nested, offset, shape, 100),
    ]:
        with pytest.raises(ValueError, match="expected"):
            NF4Weight.from_parts(*parts, torch.bfloat16)
    with pytest.raises(ValueError, match="expected a dtype"):
        NF4Weight.from_parts(packed, scales, nested, offset, shape, blocksize, torch.int32)
