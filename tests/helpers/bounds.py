"""Bounds for the rounding difference of two implementations of the same computation.

Processors add in different orders, so a difference measured on one processor is not a bound for
another. These bounds are computed in fp64 from the numbers that are multiplied, so they are the
same on every processor.

**Models** (`rounding`). A product of n terms in fp32 is fl(Σ wᵢxᵢ) = Σ wᵢ(1 + δᵢ)xᵢ: rounding has
the effect of a change of the weights. δᵢ is the sum of the roundings of term i. Each rounding is
uniform within ±u, u = 2^-24, so k of them sum to about u √(k/3).

`rounding` changes every weight by ±u in fp64, with random signs, and measures the change of the
outputs. A layer passes on the changes of the layers before it in the same way as their rounding.
With 4 lanes (the narrowest vectors), 96 terms (the widest layer of tiny.py) take 24 additions in a
lane, 2 additions of the lanes' sums and 1 multiplication: k = 27, and √(k/3) = 3. This is the
factor for one implementation. Two implementations differ by at most twice as much: 6.

The difference is the 2-norm over all outputs. The largest of thousands of errors is random, but
their norm is not: for every model in tiny.py, with AVX2 and with SSE alone, the distance of fp32
logits from fp64 is 1.6 to 2.5 times the measured change.

**Attention** (`attention_sizes`) is bounded term by term.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import minilora as ml
from minilora.lora.layer import LoRALayer
from minilora.lora.merging.merge import dense
from minilora_kernels.ops.attention import causal_mask

UNIT = 2.0**-24  # fp32's unit roundoff
DRAWS = 3  # number of random changes of the weights; their norms differ by a few hundredths


def exact(model: nn.Module) -> nn.Module:
    """Return a copy in fp64 with merged adapters and dense weights in place of 4-bit weights."""
    plain = copy.deepcopy(model)
    for path, layer in list(plain.named_modules()):
        inside = ".base_layer" in path
        if isinstance(layer, LoRALayer | ml.NF4Linear) and not inside:
            plain.set_submodule(path, dense(layer, torch.float64))
    return plain.double().eval()


def _outputs(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Tensor:
    with torch.no_grad(), ml.reference_ops():
        return run(model).double()


def rounding(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> float:
    """Return the bound for the 2-norm of the difference of two fp32 results of `run(model)`."""
    plain = exact(model)
    before, moved = _outputs(plain, run), []
    generator = torch.Generator().manual_seed(0)
    kept = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for _ in range(DRAWS):
        for name, parameter in plain.named_parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1
            parameter.data = kept[name] * (1 + UNIT * signs.double())
        moved.append((_outputs(plain, run) - before).norm().item())
    return 6 * max(moved)


def assert_rounded(found: Tensor, expected: Tensor, bound: float) -> None:
    """Assert that the 2-norm of the difference is at most `bound`, and not NaN."""
    distance = (found.double() - expected.double()).norm().item()
    assert distance <= bound, f"the difference is {distance:.3g}, the bound is {bound:.3g}"


def attention_sizes(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None = None
) -> list[Tensor]:
    """Return error bounds, in units of eps, of attention's output and of the gradients of q, k, v.

    Every sum is computed with the absolute values of its terms, because for any order of n terms
    |fl(Σ xᵢyᵢ) - Σ xᵢyᵢ| ≤ n·u·Σ |xᵢyᵢ|. If terms cancel, as in dS for a query that attends to one
    key, these are the values before they cancel. Two implementations differ by at most twice the
    bound of one, and eps = 2u.

    A score is a scaled sum of d products. Its error e multiplies its weight by 1 + e, where e is at
    most (d + 2)·u·s·|q||k|. The divisor of a weight has such errors too, hence the factor 2, and it
    is a sum of S terms. So n is the error of a weight in units of u. The products that use the
    weights add the errors of their own sums.
    """
    q, k, v, grad = (x.detach().double() for x in (q, k, v, grad))
    (heads, T, d), kv_heads, S = q.shape[1:], k.shape[1], k.shape[2]
    G, scale = heads // kv_heads, d**-0.5
    k, v = (x.repeat_interleave(G, dim=1) for x in (k, v))
    mask = causal_mask(T, S) if mask is None else mask
    # (B, heads, T, S)
    P = (q @ k.mT * scale).masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num()
    score = (q.abs() @ k.abs().mT * scale * mask).max().item()
    n = 2 * S + 2 * (d + 2) * score  # error of a weight: of its score, and of those in its divisor
    dP = grad.abs() @ v.abs().mT  # (B, heads, T, S), absolute values
    dS = P * (dP + (P * dP).sum(-1, keepdim=True))  # (B, heads, T, S), absolute values

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (kv_heads, G)).sum(2)  # (B, kv_heads, S, d)

    return [
        (n + S) * (P @ v.abs()),
        (2 * n + 2 * d + S) * scale * (dS @ k.abs()),
        (2 * n + 2 * d + G * T) * scale * grouped(dS.mT @ q.abs()),
        (n + G * T) * grouped(P.mT @ grad.abs()),
    ]
