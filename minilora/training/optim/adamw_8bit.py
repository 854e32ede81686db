"""AdamW with both moments in 8 bits: 2 bytes a parameter instead of 8 (arXiv 2110.02861).

    m = β1 m + (1 − β1) g                       v = β2 v + (1 − β2) g²       in fp32
    p = p − η λ p − η · m/(1 − β1ᵗ) / (√(v/(1 − β2ᵗ)) + ε)                   arXiv 1711.05101
    scale = max |m| of a block of 256 values    code = nearest value of the map to m · (1/scale)

A step dequantises the moments, updates them and the parameter in fp32, and quantises the moments
for the next step. Codes and scales of v are computed as those of m.

m has a sign and uses the signed dynamic map; v is never negative and uses the unsigned one. Each
map spans seven decades, so small moments keep their relative precision. A tie takes the lower code,
as in double quantisation (`minilora_kernels/nf4/codebook.py`). Parameters of fewer than 4,096
values keep fp32 moments: 8 bits would save little there.

This file is the reference implementation. On a GPU one kernel launch computes a step, with the same
bits (`minilora_kernels/triton/adamw_8bit.py`).

Simplified: no percentile clipping, which bitsandbytes has. `paged` keeps the moments in pinned host
memory on a GPU; it does not page them on demand.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora_kernels import dynamic_map
from minilora_kernels.backend import has_kernels
from minilora_kernels.nf4.codebook import midpoints

BLOCK = 256  # values that share a scale
SMALLEST = 4096  # smallest number of values of a parameter whose moments are stored in 8 bits


class AdamW8bit(torch.optim.Optimizer):
    """AdamW for fp32 parameters of any shape, with moments in 8 bits.

    The state of a parameter of n values holds, for each moment, codes uint8 (K, 256) and scales
    fp32 (K,) with K = ceil(n/256). Below 4,096 values it holds fp32 moments (n,).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        paged: bool = False,
    ):
        """Prepare the optimiser.

        Args:
            params: Parameters or parameter groups, as for `torch.optim.AdamW`.
            lr: Learning rate η.
            betas: Decay rates β1 and β2 of the moments.
            eps: ε in the denominator.
            weight_decay: Decoupled weight decay λ.
            paged: Keep the moments of GPU parameters in pinned host memory.

        Raises:
            ValueError: If a parameter is not in fp32.
        """
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)
        self.paged = paged
        for parameter in self._parameters():
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"AdamW8bit: expected parameters in fp32, got {parameter.dtype}: cast them "
                    "with .float()."
                )

    def _parameters(self) -> list[Tensor]:
        """Return the parameters of every group, in order."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Must be None; the argument exists for `torch.optim.Optimizer`'s signature.
        """
        assert closure is None, "AdamW8bit takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter and its moments in place."""
        state = self.state[parameter]
        state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
        p = parameter.view(-1)  # (n,)
        g = gradient.reshape(-1).float()  # (n,)
        names = ("exp_avg", "exp_avg_sq")
        update = plain_update
        in_8_bits = len(p) >= SMALLEST
        if in_8_bits:
            names = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
            update = _gpu_step if has_kernels(p.device) else plain_step
        moments = [state[name].to(p.device, non_blocking=True) for name in names if name in state]
        if not moments:
            moments = zero_moments(p, in_8_bits)
        update(p, g, moments, _step_numbers(group, int(state["step"])))
        for name, moment in zip(names, moments, strict=True):
            state[name] = self._stored(moment)

    def _stored(self, moment: Tensor) -> Tensor:
        """Return a moment in the memory where it waits for the next step."""
        if self.paged and moment.is_cuda:
            return moment.cpu().pin_memory()
        return moment

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state without changing its dtypes.

        The base class would cast the uint8 codes to the parameters' fp32.

        Args:
            state_dict: A dict from `state_dict()`.
        """
        parameters = self._parameters()
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for index, values in state_dict["state"].items():
            parameter = parameters[index]
            state = {}
            for name, value in values.items():
                if name == "step":
                    state[name] = value
                else:
                    state[name] = self._stored(value.to(parameter.device))
            self.state[parameter] = state


def _step_numbers(group: dict[str, Any], t: int) -> tuple[float, ...]:
    """Return the eight numbers of step t (see `plain_update`)."""
    beta1, beta2 = group["betas"]
    correction = 1 / math.sqrt(1 - beta2**t)
    decay = 1 - group["lr"] * group["weight_decay"]
    rate = -group["lr"] / (1 - beta1**t)
    return (beta1, 1 - beta1, beta2, 1 - beta2, correction, group["eps"], decay, rate)


def zero_moments(p: Tensor, coded: bool) -> list[Tensor]:
    """Return both moments as they are before the first step.

    Args:
        p: A parameter, fp32 (n,).
        coded: True for moments in 8 bits.

    Returns:
        Two tensors fp32 (n,), or codes uint8 (K, 256) and scales fp32 (K,) of the first moment and
        then of the second.
    """
    if not coded:
        return [torch.zeros_like(p), torch.zeros_like(p)]
    zeros = torch.zeros_like(p)  # (n,)
    return [*quantize_moment(zeros, signed=True), *quantize_moment(zeros, signed=False)]


def plain_update(p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """Update a parameter and its fp32 moments in place by one step of AdamW.

    Every operation rounds once and none is fused, so a CPU and a GPU compute the same bits.

    Args:
        p: Parameter, fp32 (n,).
        g: Gradient, fp32 (n,).
        moments: m and v, fp32 (n,) each.
        numbers: β1, 1 − β1, β2, 1 − β2, 1/√(1 − β2ᵗ), ε, 1 − η λ, −η/(1 − β1ᵗ).

    Source:
        Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.
    """
    m, v = moments
    beta1, rest1, beta2, rest2, correction, eps, decay, rate = numbers
    # m = β1 m + (1 − β1) g
    m.mul_(beta1).add_(g * rest1)
    # v = β2 v + (1 − β2) g²
    v.mul_(beta2).add_((g * g).mul_(rest2))
    # On a CPU torch takes MKL's square root, which is not always correctly rounded. A root in fp64
    # that is rounded to fp32 is.
    root = v.double().sqrt_().float() if v.is_cpu else v.sqrt()  # (n,)
    # p = p (1 − η λ) − η/(1 − β1ᵗ) · m / (√v · 1/√(1 − β2ᵗ) + ε)
    denominator = root.mul_(correction).add_(eps)  # (n,)
    p.mul_(decay).add_((m / denominator).mul_(rate))


def plain_step(p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """Update a parameter and its 8-bit moments in place by one step of AdamW.

    Args:
        p: Parameter, fp32 (n,).
        g: Gradient, fp32 (n,).
        moments: Codes uint8 (K, 256) and scales fp32 (K,) of m, then of v.
        numbers: The eight numbers of `plain_update`.
    """
    m_codes, m_scales, v_codes, v_scales = moments
    m = dequantize_moment(m_codes, m_scales, signed=True)[: len(p)]  # (n,)
    v = dequantize_moment(v_codes, v_scales, signed=False)[: len(p)]  # (n,)
    plain_update(p, g, (m, v), numbers)
    updated = (*quantize_moment(m, signed=True), *quantize_moment(v, signed=False))
    for old, new in zip(moments, updated, strict=True):
        old.copy_(new)


def _gpu_step(p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """Compute `plain_step` in one kernel launch."""
    from minilora_kernels.triton.adamw_8bit import step

    step(p, g.contiguous(), moments, numbers)


def quantize_moment(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantise a moment to 8-bit codes with one scale for each block of 256 values.

    The upper 16 bits of an fp32 value name a bin that contains at most one of the 255 thresholds.
    Two look-ups and one comparison therefore give the code of a binary search, in less time.

    Args:
        moment: fp32 (n,).
        signed: True for the signed map (m), False for the unsigned map (v).

    Returns:
        Codes uint8 (K, 256) and scales fp32 (K,), K = ceil(n/256). A block of zeros has scale 0.
    """
    blocks = F.pad(moment, (0, -len(moment) % BLOCK)).view(-1, BLOCK)  # (K, 256)
    scales = blocks.abs().amax(dim=1)  # (K,)
    inverse = 1 / scales.clamp_min(torch.finfo(torch.float32).tiny)  # (K,)
    scaled = (blocks * inverse[:, None]).view(-1)  # (256 K,)
    threshold_of_bin, code_of_bin = _bins(signed)
    threshold_of_bin = threshold_of_bin.to(moment.device)  # (65536,)
    code_of_bin = code_of_bin.to(moment.device)  # (65536,)
    upper_bits = scaled.view(torch.int32).bitwise_right_shift(16)  # (256 K,)
    bins = upper_bits.add_(32768)  # (256 K,) in [0, 65536)
    codes = torch.index_select(code_of_bin, 0, bins)  # (256 K,)
    codes += scaled > torch.index_select(threshold_of_bin, 0, bins)
    return codes.view(-1, BLOCK), scales


def dequantize_moment(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Return the moment that codes and scales stand for.

    Args:
        codes: uint8 (K, 256).
        scales: fp32 (K,).
        signed: True for the signed map (m), False for the unsigned map (v).

    Returns:
        fp32 (256 K,), of which the last values are padding.
    """
    values_of_code = dynamic_map(signed).to(codes.device)  # (256,)
    values = torch.index_select(values_of_code, 0, codes.view(-1).int())  # (256 K,)
    return values.view(-1, BLOCK).mul_(scales[:, None]).view(-1)  # (256 K,)


@lru_cache(maxsize=2)
def _bins(signed: bool) -> tuple[Tensor, Tensor]:
    """Return the threshold in each bin, fp32 (65536,), and the code below it, uint8 (65536,).

    Bin i holds the fp32 values whose upper 16 bits, read as a signed number, are i − 32768. A bin
    without a threshold has the threshold infinity.
    """
    upper = torch.arange(-32768, 32768, dtype=torch.int32, device="cpu") << 16  # (65536,)
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32).clamp(-1, 1)  # (2, 65536)
    ends[:, ends.isnan().any(0)] = 0.0  # no scaled value falls into these bins
    thresholds = midpoints(dynamic_map(signed))  # (255,)
    codes = torch.bucketize(ends.amin(0), thresholds, out_int32=True)  # (65536,) at the lower end
    upper_codes = torch.bucketize(ends.amax(0), thresholds, out_int32=True)  # (65536,)
    assert int((upper_codes - codes).max()) == 1
    open_end = torch.tensor([torch.inf], dtype=torch.float32, device="cpu")
    threshold_of_bin = torch.cat([thresholds, open_end])[codes]  # (65536,)
    return threshold_of_bin, codes.to(torch.uint8)
