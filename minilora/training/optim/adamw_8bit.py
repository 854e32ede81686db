"""AdamW with its two moments in 8 bits: 2 bytes a parameter instead of 8 (Dettmers et al. 2022, arXiv:2110.02861).

    m = β1 m + (1 − β1) g          v = β2 v + (1 − β2) g²                      in fp32, from the dequantised moments
    p = p − η λ p − η · m/(1 − β1ᵗ) / (√(v/(1 − β2ᵗ)) + ε)                     AdamW (arXiv:1711.05101, alg. 2)
    store   scale = max |m| in a block of 256,  code = nearest value of the dynamic map to m · (1/scale)  the same for v

The update uses the fp32 moments, before they are rounded; only what is kept for the next step is in 8 bits. m takes the
signed dynamic map, v, never negative, the unsigned one: seven decades each, so that small moments keep their relative
precision. Ties take the lower code, as in double quantisation (minilora_kernels/nf4/codebook.py). Parameters with less
than 4,096 values keep fp32 moments: their blocks would be few and save nothing. On a GPU a kernel does it all in one
launch, with the same bits (minilora_kernels/triton/adamw_8bit.py); here is the plain form.
Simplified against bitsandbytes: no percentile clipping. `paged` keeps the moments in pinned host memory on a GPU.
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

BLOCK, SMALLEST = 256, 4096  # values that share a scale; values of a parameter from which moments go to 8 bits


class AdamW8bit(torch.optim.Optimizer):
    """Parameters in fp32, of any shape and n values; ValueError for others.

    State of each: codes uint8 (K, 256) and scales fp32 (K,) of both moments, K = ceil(n/256); below 4,096 values fp32.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, *, paged: bool = False):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.paged = paged
        for p in (p for group in self.param_groups for p in group["params"] if p.dtype != torch.float32):
            raise ValueError(f"AdamW8bit: expected parameters in fp32, got {p.dtype}: cast them with .float().")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        assert closure is None, "AdamW8bit takes no closure"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        state["step"] = state.get("step", torch.zeros(())) + 1
        t, p, g = int(state["step"]), p.view(-1), g.reshape(-1).float()  # (n,)
        correction, decay = 1 / math.sqrt(1 - beta2**t), 1 - group["lr"] * group["weight_decay"]
        numbers = beta1, 1 - beta1, beta2, 1 - beta2, correction, group["eps"], decay, -group["lr"] / (1 - beta1**t)
        names, step = ("exp_avg", "exp_avg_sq"), plain_update
        if len(p) >= SMALLEST:
            names = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
            step = gpu_step if has_kernels(p.device) else plain_step
        kept = [state[name].to(p.device, non_blocking=True) for name in names if name in state]
        moments = kept or zero_moments(p, len(names) == 4)
        step(p, g, moments, numbers)
        state.update({name: self._kept(moment) for name, moment in zip(names, moments, strict=True)})

    def _kept(self, x: Tensor) -> Tensor:
        return x.cpu().pin_memory() if self.paged and x.is_cuda else x

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class does, which would cast the uint8 codes to the parameters' fp32."""
        params = [p for group in self.param_groups for p in group["params"]]
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for i, values in state_dict["state"].items():
            moved = {key: value if key == "step" else value.to(params[i].device) for key, value in values.items()}
            self.state[params[i]] = {key: value if key == "step" else self._kept(value) for key, value in moved.items()}


def zero_moments(p: Tensor, coded: bool) -> list[Tensor]:
    """Both moments before the first step of p (n,): fp32 (n,) each, or codes (K, 256) and scales (K,) of each."""
    if not coded:
        return [torch.zeros_like(p), torch.zeros_like(p)]
    return [part for signed in (True, False) for part in quantize_moment(torch.zeros_like(p), signed)]


def plain_update(p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """AdamW in place, all fp32 (n,). Each operation rounds once, none is fused: the same bits on a CPU and a GPU.

    numbers: β1, 1 − β1, β2, 1 − β2, 1/√(1 − β2ᵗ), ε, 1 − η λ, −η/(1 − β1ᵗ).
    """
    (m, v), (beta1, rest1, beta2, rest2, correction, eps, decay, rate) = moments, numbers
    m.mul_(beta1).add_(g * rest1)
    v.mul_(beta2).add_((g * g).mul_(rest2))
    # MKL's root, which torch takes on a CPU, is not always the nearest number; its root in fp64, rounded, is
    root = v.double().sqrt_().float() if v.is_cpu else v.sqrt()  # (n,)
    p.mul_(decay).add_((m / root.mul_(correction).add_(eps)).mul_(rate))


def plain_step(p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """The same with moments in 8 bits: codes (K, 256) and scales (K,) of m, then of v, all in place."""
    m, m_scale, v, v_scale = moments
    m, v = (dequantize_moment(*kept)[: len(p)] for kept in ((m, m_scale, True), (v, v_scale, False)))
    plain_update(p, g, (m, v), numbers)
    for old, new in zip(moments, (*quantize_moment(m, True), *quantize_moment(v, False)), strict=True):
        old.copy_(new)


def gpu_step(p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """`plain_step` in one launch."""
    from minilora_kernels.triton.adamw_8bit import step

    step(p, g.contiguous(), moments, numbers)


def quantize_moment(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 (n,) -> codes uint8 (K, 256), scales fp32 (K,), K = ceil(n/256). A block of zeros has scale 0.

    The upper 16 bits of an fp32 value name a bin that holds one threshold at most, so that two look-ups and one
    comparison give what a binary search over the 255 thresholds gives, in less time.
    """
    blocks = F.pad(moment, (0, -len(moment) % BLOCK)).view(-1, BLOCK)  # (K, 256)
    scales = blocks.abs().amax(dim=1)  # (K,)
    scaled = (blocks * (1 / scales.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).view(-1)
    threshold_of_bin, code_of_bin = (table.to(moment.device) for table in _bins(signed))
    bins = scaled.view(torch.int32).bitwise_right_shift(16).add_(32768)  # (256 K,) in [0, 65536)
    codes = torch.index_select(code_of_bin, 0, bins)
    codes += scaled > torch.index_select(threshold_of_bin, 0, bins)
    return codes.view(-1, BLOCK), scales


def dequantize_moment(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Codes uint8 (K, 256), scales fp32 (K,) -> fp32 (256 K,)."""
    values = torch.index_select(dynamic_map(signed).to(codes.device), 0, codes.view(-1).int())
    return values.view(-1, BLOCK).mul_(scales[:, None]).view(-1)


@lru_cache(maxsize=2)
def _bins(signed: bool) -> tuple[Tensor, Tensor]:
    """By the upper 16 bits of a value (as a signed number, from -32768 on): the threshold in its bin or infinity,
    fp32 (65536,), and the code of what is below it, uint8 (65536,)."""
    upper = torch.arange(-32768, 32768, dtype=torch.int32, device="cpu") << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32).clamp(-1, 1)  # (2, 65536)
    ends[:, ends.isnan().any(0)] = 0.0  # bins that no scaled value falls into
    thresholds = midpoints(dynamic_map(signed))  # (255,)
    below = torch.bucketize(ends.amin(0), thresholds, out_int32=True)  # thresholds below the bin
    assert int((torch.bucketize(ends.amax(0), thresholds, out_int32=True) - below).max()) == 1
    threshold_of_bin = torch.cat([thresholds, torch.tensor([torch.inf])])[below]
    return threshold_of_bin, below.to(torch.uint8)
