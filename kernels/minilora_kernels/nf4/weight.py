"""NF4Weight: a quantised tensor at rest, and its file format, which is bitsandbytes'.

All stored tensors are uint8, the fp32 scales as the bytes of their values: `.half()`, `.to(dtype)`, autocast and
sharding with mixed precision cast every fp32 tensor they meet, and an fp32 scale would be destroyed without a word.
The scales are viewed as fp32 where they are used. With n values, K = ceil(n / blocksize), J = ceil(K / 256):

                   plain                      double-quantised             bits per value (blocksize 64)
    packed         ceil(n/2) bytes            ceil(n/2) bytes              4
    absmax_bytes   4 K: fp32 absmax           K: one 8-bit code a block    0.5    or  0.125
    nested_bytes   None                       4 J: fp32 second level       -      or  0.00195
    offset_bytes   None                       4: fp32 mean of absmax       -      or  32/n

In a state dict a weight named "w" is (bitsandbytes' keys and bytes, so either library reads the other's):

    w                                    uint8 (ceil(n/2), 1); files may view the bytes as bf16, fp16 or fp32
    w.absmax, w.quant_map                fp32 (K,) or uint8 (K,) codes; fp32 (16,)
    w.nested_absmax, w.nested_quant_map  fp32 (J,), fp32 (256,): double quantisation only
    w.quant_state.bitsandbytes__nf4      JSON text as uint8: blocksize, dtype, shape, nested_offset ...
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from minilora_kernels.nf4.codebook import dynamic_map, nf4_codebook
from minilora_kernels.nf4.reference import NESTED_BLOCKSIZE, double_dequantize

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_JSON_KEY = "quant_state.bitsandbytes__nf4"
_NESTED_FIELDS = {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """A tensor of logical `shape` and `dtype` in 4 bits. Made by `quantize_nf4`, read by `dequantize_nf4`.

    Raises ValueError if the parts do not fit together (dtype, size, blocksize).
    """

    packed: Tensor  # uint8 (ceil(n/2),), two codes a byte
    absmax_bytes: Tensor  # uint8 (4 K,): bytes of the fp32 absmax; or (K,): 8-bit codes
    shape: torch.Size  # of the tensor that was quantised, and of what dequantising returns
    dtype: torch.dtype
    blocksize: int = 64
    nested_bytes: Tensor | None = None  # uint8 (4 J,): bytes of the fp32 second-level absmax
    offset_bytes: Tensor | None = None  # uint8 (4,): bytes of the fp32 mean of absmax

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        check_format(self.dtype, self.blocksize)
        if self.double_quant != (self.offset_bytes is not None):
            raise ValueError("NF4Weight: expected nested_bytes and offset_bytes both or neither, got one; pass both")
        blocks = -(-self.numel // self.blocksize)
        expected = {"packed": -(-self.numel // 2), "absmax_bytes": blocks if self.double_quant else 4 * blocks}
        if self.double_quant:
            expected |= {"nested_bytes": 4 * -(-blocks // NESTED_BLOCKSIZE), "offset_bytes": 4}
        for name, size in expected.items():
            part = getattr(self, name)
            if part.dtype != torch.uint8 or part.shape != (size,) or not part.is_contiguous():
                raise ValueError(
                    f"NF4Weight of shape {tuple(self.shape)}, blocksize {self.blocksize}: expected {name} to be "
                    f"contiguous uint8 of shape ({size},), got {part.dtype} of shape {tuple(part.shape)}; "
                    "view fp32 scales with .view(torch.uint8)"
                )

    @classmethod
    def from_parts(
        cls,
        packed: Tensor,
        scales: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        shape: torch.Size | tuple[int, ...],
        blocksize: int,
        dtype: torch.dtype,
    ) -> "NF4Weight":
        """From tensors in their own dtypes, the arguments of torch.ops.minilora.dequantize_nf4 in its order."""
        nested, mean = (None if t is None else t.view(torch.uint8) for t in (nested_absmax, offset))
        return cls(packed, scales.view(torch.uint8), torch.Size(shape), dtype, blocksize, nested, mean)

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, torch.Size, int]:
        """(packed, scales, nested_absmax, offset, shape, blocksize): what the dequantise ops take before a dtype."""
        return self.packed, self.scales, self.nested_absmax, self.offset, self.shape, self.blocksize

    @property
    def double_quant(self) -> bool:
        return self.nested_bytes is not None

    @property
    def scales(self) -> Tensor:
        """The first-level scales as stored: fp32 absmax (K,), or uint8 codes (K,) if double-quantised."""
        return self.absmax_bytes if self.double_quant else self.absmax_bytes.view(torch.float32)

    @property
    def nested_absmax(self) -> Tensor | None:
        """fp32 (J,), a view; None if not double-quantised."""
        return None if self.nested_bytes is None else self.nested_bytes.view(torch.float32)

    @property
    def offset(self) -> Tensor | None:
        """fp32 (1,), a view; None if not double-quantised."""
        return None if self.offset_bytes is None else self.offset_bytes.view(torch.float32)

    @property
    def absmax(self) -> Tensor:
        """fp32 (K,): the scale of each block, decoded if double-quantised."""
        nested, offset = self.nested_absmax, self.offset
        if nested is None or offset is None:
            return self.scales
        return double_dequantize(self.scales, nested, offset)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and scales of both levels."""
        return sum(t.nbytes for t in self._stored().values())

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def to(self, device: torch.device | str | int) -> "NF4Weight":
        """The same weight on another device."""
        return replace(self, **{name: t.to(torch.device(device)) for name, t in self._stored().items()})

    def _stored(self) -> dict[str, Tensor]:
        parts = {name: getattr(self, name) for name in ("packed", "absmax_bytes", "nested_bytes", "offset_bytes")}
        return {name: t for name, t in parts.items() if t is not None}

    def __repr__(self) -> str:
        bits = f"{8 * self.nbytes / self.numel:.3f} bits/value" if self.numel else "empty"
        return (
            f"NF4Weight(shape={tuple(self.shape)}, dtype={self.dtype}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}, {bits}, device={self.device})"
        )

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """bitsandbytes' keys and bytes, `prefix` being the parameter's name. float64 is ours: it has no such dtype."""
        info: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {"": self.packed[:, None], ".absmax": self.scales, ".quant_map": nf4_codebook().to(self.device)}
        nested, offset = self.nested_absmax, self.offset
        if nested is not None and offset is not None:
            state |= {".nested_absmax": nested, ".nested_quant_map": dynamic_map().to(self.device)}
            info |= _NESTED_FIELDS | {"nested_offset": 0.0 if offset.is_meta else offset.item()}
        text = bytearray(json.dumps(info).encode())
        state[f".{_JSON_KEY}"] = torch.frombuffer(text, dtype=torch.uint8).to(self.device)
        return {prefix + key: value for key, value in state.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> "NF4Weight":
        """Reads what `state_dict` or bitsandbytes wrote under `prefix`; other keys of `state` are not looked at.

        Raises ValueError for a missing, unexpected, mis-shaped or non-finite entry, another 4-bit type or code table.
        """
        found = {k[len(prefix) :].lstrip("."): t for k, t in state.items() if (k + ".").startswith(prefix + ".")}
        info = _read_info(found, prefix)
        nested = "nested_offset" in info
        names = ["", "absmax", "quant_map", _JSON_KEY] + ["nested_absmax", "nested_quant_map"] * nested
        missing, extra = sorted(set(names) - set(found)), sorted(set(found) - set(names))
        if missing or extra:
            raise ValueError(
                f"NF4 state of {prefix!r}: missing {missing}, unexpected {extra}; expected exactly {sorted(names)} "
                "after the name ('' is the name itself); load the whole file it was saved in"
            )
        for name, table in (("quant_map", nf4_codebook()), ("nested_quant_map", dynamic_map()))[: 1 + nested]:
            if found[name].dtype != torch.float32 or not torch.equal(found[name].cpu(), table):
                raise ValueError(f"NF4 state: {prefix}.{name} is not the standard table; only that one is supported")
        scales = _floats(found, "nested_absmax" if nested else "absmax", prefix)
        offset = torch.tensor([info["nested_offset"]], dtype=torch.float32) if nested else None
        return cls.from_parts(
            found[""].detach().contiguous().view(-1).view(torch.uint8),
            found["absmax"].contiguous() if nested else scales,
            scales if nested else None,
            None if offset is None else offset.to(scales.device),
            tuple(info["shape"]),
            info["blocksize"],
            DTYPES[info["dtype"]],
        )


def check_format(dtype: torch.dtype, blocksize: int) -> None:
    """Raises ValueError unless NF4 is defined for this dtype and block size."""
    if dtype not in DTYPES.values():
        raise ValueError(f"NF4: expected a dtype of {sorted(DTYPES)}, got {dtype}; cast the tensor first")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"NF4: expected a blocksize of {BLOCKSIZES}, got {blocksize!r}; 64 is the usual one")


def _floats(found: Mapping[str, Tensor], name: str, prefix: str) -> Tensor:
    t = found[name]
    if t.dtype != torch.float32 or not (t.is_meta or torch.isfinite(t).all()):
        raise ValueError(f"NF4 state: expected {prefix}.{name} to be finite fp32, got {t.dtype}; the file is damaged")
    return t.contiguous()


def _read_info(found: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The JSON entry, every field checked."""
    if _JSON_KEY not in found:
        raise ValueError(
            f"NF4 state of {prefix!r}: expected the key {prefix}.{_JSON_KEY}, got {sorted(found) or 'no key of it'}; "
            "other 4-bit types (fp4) are not supported: dequantise with bitsandbytes and quantise again"
        )
    try:
        info = json.loads(bytes(found[_JSON_KEY].tolist()))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"NF4 state: {prefix}.{_JSON_KEY} is not JSON text ({error}); the file is damaged") from error
    nested = isinstance(info, dict) and "nested_offset" in info
    fields = {"quant_type", "blocksize", "dtype", "shape"} | ({*_NESTED_FIELDS, "nested_offset"} if nested else set())
    if not isinstance(info, dict) or set(info) != fields:
        raise ValueError(f"NF4 state: expected the JSON fields {sorted(fields)} in {prefix}.{_JSON_KEY}, got {info}")
    fixed = {"quant_type": "nf4"} | (_NESTED_FIELDS if nested else {})
    wrong = {name: info[name] for name, value in fixed.items() if info[name] != value}
    shape_ok = isinstance(info["shape"], list) and all(type(d) is int and d >= 0 for d in info["shape"])
    offset_ok = not nested or type(info["nested_offset"]) in (int, float) and abs(info["nested_offset"]) < float("inf")
    if wrong or info["dtype"] not in list(DTYPES) or not shape_ok or not offset_ok:
        raise ValueError(
            f"NF4 state: {prefix}.{_JSON_KEY} is {info}; expected {fixed}, a dtype of {sorted(DTYPES)}, "
            "a list of sizes as shape and a finite offset"
        )
    return info
