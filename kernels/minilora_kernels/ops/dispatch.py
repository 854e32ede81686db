"""What stands between the matrix products of training, in one pass over memory each: Triton's kernels here, for a GPU.

Below, who does a step of a layer: a kernel where Triton's run, C on a CPU (c/bindings.py), or nobody. Each
function gives its results, or None: then the caller, an op of minilora_kernels/ops, does it in plain torch. The head's
loss (cross_entropy.py) and 8-bit AdamW (adamw_8bit.py) are asked for by name.
MINILORA_STEPS=torch does without the kernels too.
"""

import torch
from torch import Tensor, nn

from minilora_kernels.backend import has_kernels
from minilora_kernels.c import bindings as compiled

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor] | None:
    """x (…, D), weight (D,) -> y like x, r fp32 (…, 1)."""
    if not _kernels(x, weight):
        return compiled.rms_norm(x, weight, eps, gemma)
    from minilora_kernels.triton.rms_norm import rms_norm

    return rms_norm(x, weight, eps, gemma)


def rms_norm_backward(
    x: Tensor, weight: Tensor, r: Tensor, dy: Tensor, with_weight: bool, gemma: bool
) -> tuple[Tensor, Tensor | None] | None:
    """x, dy (…, D), r fp32 (…, 1) -> dx like x, and dw fp32 (D,) if asked for."""
    if not _kernels(x, weight, dy):
        return compiled.rms_norm_backward(x, weight, r, dy, with_weight, gemma)
    from minilora_kernels.triton.rms_norm import rms_norm_backward, rms_norm_weight

    return rms_norm_backward(x, weight, r, dy, gemma), rms_norm_weight(x, r, dy) if with_weight else None


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor | None:
    """Tensors of one shape -> y."""
    if not _kernels(gate, up):
        return compiled.gated(gate, up, gelu)
    from minilora_kernels.triton.swiglu import gated

    return gated(gate, up, gelu)


def gated_backward(gate: Tensor, up: Tensor, dy: Tensor, gelu: bool) -> tuple[Tensor, Tensor] | None:
    """Tensors of one shape -> dgate, dup."""
    if not _kernels(gate, up, dy):
        return compiled.gated_backward(gate, up, dy, gelu)
    from minilora_kernels.triton.swiglu import gated_backward

    return gated_backward(gate, up, dy, gelu)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor | None:
    """x (B, heads, T, d), cos and sin (B or 1, 1, T, d) -> y (B, heads, T, d), contiguous as (B, T, heads, d)."""
    if not _kernels(x, cos, sin) or x.stride(-1) != 1:
        return compiled.rotate(x, cos, sin, sign)
    from minilora_kernels.triton.rope import rotate

    return rotate(x, cos, sin, sign)


def _kernels(*tensors: Tensor) -> bool:
    """Whether a kernel takes them: plain tensors of one dtype, on one device where Triton's run."""
    kinds = {(type(t) in (Tensor, nn.Parameter), t.dtype, t.device) for t in tensors}
    plain, dtype, device = kinds.pop()
    return not kinds and plain and dtype in DTYPES and compiled.wanted() and has_kernels(device)
