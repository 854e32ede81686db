"""Comparison of 4-bit checkpoints with bitsandbytes' format.

The check reads tensor by tensor, without loading a model. It makes one of four comparisons:

    4-bit folder                            strict read; dequantised in fp32 and quantised again,
                                            the codes and scales are the same
    4-bit folder, `source`                  the 16-bit base, quantised here, equals the file
    4-bit folder, against="bitsandbytes"    bitsandbytes dequantises the file to the same bits
    dense folder, against="bitsandbytes"    both quantise every matrix except embeddings and the
                                            output layer, with equal results

"±1 nested code" is equality up to the rounding of the 8-bit scales, in which the backends of
bitsandbytes differ from each other. The difference is one code. Near zero, where codes are finer
than the 65,536 entries of the table in its CPU code, it is two steps of that table.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minilora.common.extras import require
from minilora.tools.inspect import safetensors_headers
from minilora_kernels import NF4Weight, dequantize_nf4, dynamic_map, quantize_nf4

EQUAL = "equal"
NESTED = "±1 nested code"
_DIFFERENT_VALUES = "different: values"
_DIFFERENT_SCALES = "different: scales"
_CPU_TABLE_STEP = 2 / 65535  # between two entries of the table in bitsandbytes' CPU code
_PART = re.compile(r"(.*)\.((nested_)?(absmax|quant_map)|quant_state\.\w+)")  # of a 4-bit weight
_NOT_QUANTIZED = re.compile(r"embed|lm_head|lora_")

_Headers = dict[str, tuple[Path, str, tuple[int, ...]]]  # tensor name -> (file, dtype, shape)


def verify(
    checkpoint: str | Path, source: str | Path | None = None, against: str | None = None
) -> dict[str, str]:
    """Check every 4-bit weight of a checkpoint.

    Args:
        checkpoint: Folder of safetensors files.
        source: Folder of the 16-bit base that the checkpoint was quantised from; None compares
            the checkpoint with itself. Not together with `against`.
        against: "bitsandbytes" compares with that package; None does not need it.

    Returns:
        Maps a weight's name to "equal", "±1 nested code" or "different: reason".

    Raises:
        ImportError: bitsandbytes is not installed, and `against` names it.
        ValueError: The options contradict each other, the base does not fit the checkpoint, or
            the checkpoint contains nothing to compare.
    """
    if against not in (None, "bitsandbytes"):
        raise ValueError(f"against: expected None or 'bitsandbytes', got {against!r}.")
    if against and source is not None:
        raise ValueError(
            "source and against (--source and --against) are two comparisons: give one of them at "
            "a time."
        )
    if against is not None:
        require("verify against bitsandbytes", "bitsandbytes")
    headers = safetensors_headers(Path(checkpoint))
    source_headers = None
    if source is not None:
        source_headers = safetensors_headers(Path(source))

    verdicts = {}
    for name in _four_bit_weights(headers):
        try:
            weight = _read_weight(headers, name)
        except ValueError as error:
            verdicts[name] = f"different: {error}"
            continue
        if source_headers is not None:
            verdicts[name] = _compare_with_source(name, weight, source_headers, source)
        elif against:
            verdicts[name] = _compare_with_bitsandbytes(weight)
        else:
            verdicts[name] = _compare_with_itself(weight)
    if not verdicts and against:
        verdicts = _compare_quantizers(headers)
    if not verdicts:
        raise ValueError(
            f"{checkpoint} holds no weight in 4 bits. "
            "To check a dense checkpoint, compare it with bitsandbytes: --against bitsandbytes "
            "(against='bitsandbytes' in Python)."
        )
    return verdicts


def compare(ours: NF4Weight, theirs: NF4Weight) -> str:
    """Compare two quantisations of one tensor.

    Args:
        ours: The expected quantisation.
        theirs: The quantisation to check.

    Returns:
        "equal", "±1 nested code" or "different: reason".
    """
    if _have_equal_entries(ours, theirs):
        return EQUAL
    if repr(ours) != repr(theirs):
        return f"different: {theirs}, expected {ours}"
    wrong = int((ours.packed != theirs.packed).sum())
    if wrong:
        return f"different: {wrong:,} of {len(ours.packed):,} bytes of codes"
    return NESTED if _have_close_scales(ours, theirs) else _DIFFERENT_SCALES


def _four_bit_weights(headers: _Headers) -> list[str]:
    """Return the names of all weights for which a scale or another 4-bit entry is stored."""
    names = {}  # a dict keeps the order
    for entry in headers:
        if match := _PART.fullmatch(entry):
            names[match[1]] = None
    return list(names)


def _read_weight(headers: _Headers, name: str) -> NF4Weight:
    """Read a 4-bit weight; ValueError if a part is missing or wrong."""
    state = {}
    for entry in headers:
        if entry == name or entry.startswith(f"{name}."):
            state[entry] = _read(headers, entry)
    return NF4Weight.from_state_dict(state, name)


def _compare_with_source(
    name: str, weight: NF4Weight, source_headers: _Headers, source: str | Path | None
) -> str:
    """Quantise the base's weight and compare it with the file's."""
    if name not in source_headers or source_headers[name][2] != tuple(weight.shape):
        raise ValueError(
            f"{source}: expected {name} of shape {tuple(weight.shape)}: is it the base?"
        )
    W = _read(source_headers, name)
    # transformers casts to the compute dtype before it quantises; minilora does not.
    candidates = [W]
    if weight.dtype != W.dtype:
        candidates.append(W.to(weight.dtype))
    verdicts = []
    for candidate in candidates:
        quantized = quantize_nf4(candidate, weight.blocksize, weight.double_quant)
        verdicts.append(compare(replace(quantized, dtype=weight.dtype), weight))
    for verdict in (EQUAL, NESTED):
        if verdict in verdicts:
            return verdict
    return verdicts[0]


def _compare_with_bitsandbytes(weight: NF4Weight) -> str:
    """Dequantise with both packages."""
    if torch.equal(dequantize_nf4(weight), _dequantized_by_bitsandbytes(weight)):
        return EQUAL
    return _DIFFERENT_VALUES


def _compare_with_itself(weight: NF4Weight) -> str:
    """Dequantise in fp32 and quantise again."""
    values = dequantize_nf4(weight, torch.float32)
    again = quantize_nf4(values, weight.blocksize, double_quant=False)
    # A block of zeros does not keep its scale.
    same_scales = (again.absmax == weight.absmax) | (again.absmax == 0)
    if torch.equal(again.packed, weight.packed) and same_scales.all():
        return EQUAL
    return _DIFFERENT_VALUES


def _compare_quantizers(headers: _Headers) -> dict[str, str]:
    """Quantise every matrix of a dense checkpoint with both packages."""
    verdicts = {}
    for name, (_, dtype, shape) in headers.items():
        if len(shape) != 2 or dtype not in ("BF16", "F16", "F32"):
            continue
        if _NOT_QUANTIZED.search(name):
            continue
        W = _read(headers, name)
        verdicts[name] = compare(quantize_nf4(W), _quantized_by_bitsandbytes(W))
    return verdicts


def _have_equal_entries(ours: NF4Weight, theirs: NF4Weight) -> bool:
    """Return True if both state dicts have the same keys and bits."""
    our_state = ours.state_dict()
    their_state = theirs.state_dict()
    if our_state.keys() != their_state.keys():
        return False
    for key, value in our_state.items():
        if not torch.equal(value, their_state[key]):
            return False
    return True


def _have_close_scales(ours: NF4Weight, theirs: NF4Weight) -> bool:
    """Return True if both use nested scales that differ by their rounding only."""
    if ours.offset is None or ours.nested_absmax is None:
        return False
    if theirs.offset is None or theirs.nested_absmax is None:
        return False
    ulp = torch.finfo(torch.float32).eps * ours.offset.abs()
    close_offset = (ours.offset - theirs.offset).abs() <= 2 * ulp
    close_nested = ((ours.nested_absmax - theirs.nested_absmax).abs() <= 4 * ulp).all()
    our_codes = ours.scales.int()
    their_codes = theirs.scales.int()
    table = dynamic_map()
    adjacent = (our_codes - their_codes).abs() <= 1
    near_zero = (table[our_codes] - table[their_codes]).abs() < 2 * _CPU_TABLE_STEP
    close_codes = (adjacent | near_zero).all()
    return bool(close_offset and close_nested and close_codes)


def _read(headers: _Headers, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(headers[name][0], framework="pt") as file:
        return file.get_tensor(name)


def _quantized_by_bitsandbytes(W: Tensor) -> NF4Weight:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
    entries = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return NF4Weight.from_state_dict({"weight": packed} | entries)


def _dequantized_by_bitsandbytes(weight: NF4Weight) -> Tensor:
    """Dequantise the weight as one long row.

    The AVX-512 code of bitsandbytes 0.50.2 uses wrong scales where the length of a row is not a
    multiple of the block size.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = weight.state_dict()
    packed = state.pop("weight")
    quant_state = QuantState.from_dict(state, device=torch.device("cpu"))
    quant_state.shape = torch.Size((1, weight.numel))
    return dequantize_4bit(packed, quant_state).view(weight.shape)
