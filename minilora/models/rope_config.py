r"""RoPE: positions as rotations, with the context extensions of the Llama family.

Each pair of channels (i, i + d/2) of a query or key at position p turns by the angle p · ω_i,

    ω_i = θ^(-2i/d),    i = 0 … d/2 - 1

so that a score q·k depends on the distance of the two positions only. Scaling changes the frequencies ω, once:

    linear   ω / factor                                              (position interpolation, arXiv 2306.15595)
    llama3   ω where the wavelength 2π/ω < L / high_freq_factor      (short waves: as trained)
             ω / factor where it is > L / low_freq_factor            (long waves: interpolated)
             a blend of the two in between; L = original_max_position_embeddings

Layout: pairs are half a head apart, as in Hugging Face checkpoints. GGUF files interleave them
(models/gguf/read.py).

Source: Su et al. 2021 (RoFormer), arXiv:2104.09864.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Rope:
    """The rotation that a model was trained with.

    Attributes:
        theta: θ.
        kind: "default", "linear" or "llama3".
        factor: of linear and llama3.
        low_freq_factor: of llama3.
        high_freq_factor: of llama3.
        original_max_position_embeddings: of llama3, L.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in _FIELDS:
            raise ValueError(
                f"RoPE scaling {self.kind!r} is not supported: minilora knows {', '.join(_FIELDS)}."
            )
        for name in ("theta", *_FIELDS[self.kind]):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(
                    f"RoPE scaling {self.kind!r} needs {name} > 0, got {value!r}: fix config.json."
                )
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(f"RoPE llama3 needs high_freq_factor > low_freq_factor, got {self}.")

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], theta: float, max_positions: int) -> "Rope":
        """Read `rope_parameters` (transformers 5) or `rope_scaling` (4).

        Args:
            fields: the dict of config.json.
            theta: θ if the dict omits it.
            max_positions: longest context, for llama3 without original_max_position_embeddings.

        Raises:
            ValueError: the dict has a field that may change the result.
        """
        kind = fields.get("rope_type", fields.get("type", "default"))
        values: dict[str, Any] = {name: fields.get(name) for name in _FIELDS.get(kind, ())}
        if kind == "llama3" and values["original_max_position_embeddings"] is None:
            values["original_max_position_embeddings"] = max_positions
        # As in transformers, other kinds ignore the fields of llama3.
        read = {"rope_type", "type", "rope_theta", *_FIELDS["llama3"]}
        given = {name: value for name, value in fields.items() if value is not None}
        unknown = {name: value for name, value in given.items() if name not in read}
        partial = unknown.pop("partial_rotary_factor", 1.0) != 1.0
        if partial or (unknown and kind in _FIELDS):
            raise ValueError(
                f"RoPE scaling {dict(fields)}: minilora does not know all of it; it may change the "
                "result."
            )
        return cls(theta=fields.get("rope_theta") or theta, kind=kind, **values)

    def to_hf(self) -> dict[str, Any] | None:
        """Return the `rope_scaling` dict of config.json, or None for the default rotation."""
        if self.kind == "default":
            return None
        return {"rope_type": self.kind} | {name: getattr(self, name) for name in _FIELDS[self.kind]}


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Return ω, fp32 (head_dim/2,), on the CPU, so that all devices rotate by the same angles.

    Args:
        rope: the rotation.
        head_dim: channels of a head.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    omega = 1.0 / rope.theta**exponents  # (d/2,)
    if rope.kind == "default":
        return omega
    if rope.kind == "linear":
        return omega / rope.factor
    # llama3: s = 0 at wavelength L/low_freq_factor, 1 at L/high_freq_factor;  ω' = (1-s) ω/factor + s ω
    turns = rope.original_max_position_embeddings * omega / (2 * math.pi)  # in the original context
    span = rope.high_freq_factor - rope.low_freq_factor
    s = ((turns - rope.low_freq_factor) / span).clamp(0, 1)  # (d/2,)
    return (1 - s) * omega / rope.factor + s * omega


def rotation(omega: Tensor, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of all angles, each (B, 1, T, head_dim); the angles are in fp32.

    Args:
        omega: ω of `frequencies`, (head_dim/2,), on the device of position_ids.
        position_ids: positions, (B, T) or (1, T).
        dtype: dtype of the result.
    """
    angles = position_ids[:, None, :, None].float() * omega  # (B, 1, T, d/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, d)
    return angles.cos().to(dtype), angles.sin().to(dtype)
