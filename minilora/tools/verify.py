"""Is a 4-bit checkpoint what bitsandbytes means by it? Tensor by tensor, without loading a model.

    a 4-bit folder                    read strictly, dequantised in fp32 and quantised again: the same codes and scales
    … and `source`, its 16-bit base   the source quantised here equals the file
    … and against="bitsandbytes"      the package dequantises the file to our bits
    a dense folder, bitsandbytes      both quantise every matrix outside embeddings and head: equal

"±1 nested code" is equality up to the rounding of the 8-bit scales, in which bitsandbytes' own backends differ: one
code, or near zero, where codes are finer than its CPU's table of 65,536 entries, two steps of that table.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minilora.tools.inspect import safetensors_headers
from minilora_kernels import NF4Weight, dequantize_nf4, dynamic_map, quantize_nf4

EQUAL, NESTED = "equal", "±1 nested code"
_PART = re.compile(r"(.*)\.((nested_)?(absmax|quant_map)|quant_state\.\w+)")  # of a weight in 4 bits


def verify(checkpoint: str | Path, source: str | Path | None = None, against: str | None = None) -> dict[str, str]:
    """Weight name -> "equal", "±1 nested code" or "different: why".

    checkpoint, source: folders of safetensors files; give `source` or `against`, not both. ValueError if there is
    nothing to compare or compare with.
    """
    if against not in (None, "bitsandbytes"):
        raise ValueError(f"against: expected None or 'bitsandbytes', got {against!r}.")
    if against and source is not None:
        raise ValueError("source and against are two comparisons: give one of them at a time.")
    here, verdicts = safetensors_headers(Path(checkpoint)), {}
    base = {} if source is None else safetensors_headers(Path(source))
    for prefix in dict.fromkeys(match[1] for name in here if (match := _PART.fullmatch(name))):
        state = {name: _read(here, name) for name in here if name == prefix or name.startswith(f"{prefix}.")}
        try:
            weight = NF4Weight.from_state_dict(state, prefix)
        except ValueError as error:
            verdicts[prefix] = f"different: {error}"
            continue
        if source is not None:
            if prefix not in base or base[prefix][2] != tuple(weight.shape):
                raise ValueError(f"{source}: expected {prefix} of shape {tuple(weight.shape)}: is it the base?")
            W, kind = _read(base, prefix), (weight.blocksize, weight.double_quant)
            sources = {W.dtype: W, weight.dtype: W.to(weight.dtype)}.values()  # transformers casts first, we do not
            found = [compare(replace(quantize_nf4(one, *kind), dtype=weight.dtype), weight) for one in sources]
            verdicts[prefix] = next((verdict for verdict in (EQUAL, NESTED) if verdict in found), found[0])
            continue
        if against:
            same = torch.equal(dequantize_nf4(weight), _dequantized_by_bitsandbytes(weight))
        else:
            again = quantize_nf4(dequantize_nf4(weight, torch.float32), weight.blocksize, double_quant=False)
            scales = (again.absmax == weight.absmax) | (again.absmax == 0)  # a block of zeros keeps no scale
            same = torch.equal(again.packed, weight.packed) and scales.all()
        verdicts[prefix] = EQUAL if same else "different: values"
    if not verdicts and against:
        matrices = [n for n, (_, kind, shape) in here.items() if len(shape) == 2 and kind in ("BF16", "F16", "F32")]
        for name in (name for name in matrices if not re.search(r"embed|lm_head|lora_", name)):
            W = _read(here, name)
            verdicts[name] = compare(quantize_nf4(W), _quantized_by_bitsandbytes(W))
    if not verdicts:
        raise ValueError(f"{checkpoint} holds no weight in 4 bits; of a dense one, verify against='bitsandbytes'.")
    return verdicts


def compare(ours: NF4Weight, theirs: NF4Weight) -> str:
    """The verdict on two quantisations of one tensor."""
    mine, other = ours.state_dict(), theirs.state_dict()
    if mine.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in mine.items()):
        return EQUAL
    if repr(ours) != repr(theirs):
        return f"different: {theirs}, expected {ours}"
    if wrong := int((ours.packed != theirs.packed).sum()):
        return f"different: {wrong:,} of {len(ours.packed):,} bytes of codes"
    offset, nested, nested_too = ours.offset, ours.nested_absmax, theirs.nested_absmax
    if offset is None or nested is None or nested_too is None or theirs.offset is None:
        return "different: scales"
    ulp, table = torch.finfo(torch.float32).eps * offset.abs(), dynamic_map()
    close = (offset - theirs.offset).abs() <= 2 * ulp and ((nested - nested_too).abs() <= 4 * ulp).all()
    codes, others = ours.scales.int(), theirs.scales.int()
    near_zero = (table[codes] - table[others]).abs() < 2 * 2 / 65535
    return NESTED if close and (((codes - others).abs() <= 1) | near_zero).all() else "different: scales"


def _read(where: dict[str, tuple], name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(where[name][0], framework="pt") as file:
        return file.get_tensor(name)


def _quantized_by_bitsandbytes(W: Tensor) -> NF4Weight:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
    entries = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return NF4Weight.from_state_dict({"weight": packed} | entries)


def _dequantized_by_bitsandbytes(weight: NF4Weight) -> Tensor:
    """As one long row: AVX-512 code of 0.50.2 takes wrong scales where a row is no multiple of the block size."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = weight.state_dict()
    packed, theirs = state.pop("weight"), QuantState.from_dict(state, device=torch.device("cpu"))
    theirs.shape = torch.Size((1, weight.numel))
    return dequantize_4bit(packed, theirs).view(weight.shape)
