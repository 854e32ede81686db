"""How far apart rounding alone may leave two forms of one computation, on whatever processor they run.

Processors add in different orders, so a distance measured on one of them is no bound on another. A
bound here is computed in fp64 from the numbers that are multiplied, and comes out the same
everywhere.

**Models** (`rounding`). A product of n terms in fp32 is fl(Σ wᵢxᵢ) = Σ wᵢ(1 + δᵢ)xᵢ: what rounding
does to a product, a change of its weights does too. δᵢ is the sum of the roundings that term i goes
through. Each is uniform within ±u, u = 2^-24, so that k of them come to about u √(k/3).

`rounding` moves every weight by u in fp64, up or down by chance, and takes how far the outputs go.
Each layer passes on what the layers before it did, as it passes on their rounding. With 4 lanes
(the narrowest vectors), 96 terms (the widest layer of tiny.py) take 24 additions in a lane, 2 of
the lanes' sums and 1 multiplication: k = 27, and √(k/3) = 3. That is one form. Two forms are at
most twice as far apart: 6.

The distance is the 2-norm over all outputs. The largest of thousands of errors is a matter of luck,
their norm is not: fp32 logits of every kind in tiny.py lie 1.6 to 2.5 times the movement from
fp64's, with AVX2 and with SSE alone.

**Attention** (`attention_sizes`) is short enough to follow term by term.
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
DRAWS = 3  # of the weights' movement; their norms differ by a few hundredths


def exact(model: nn.Module) -> nn.Module:
    """A copy in fp64: adapters merged, 4-bit weights dense, the same values otherwise."""
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
    """The 2-norm by which two fp32 forms of `run(model)` may differ: see above."""
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
    """No further apart in 2-norm than `bound`, and nothing is NaN."""
    distance = (found.double() - expected.double()).norm().item()
    assert distance <= bound, f"{distance:.3g} apart, rounding explains {bound:.3g}"


def attention_sizes(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None = None
) -> list[Tensor]:
    """By what an eps must be multiplied to bound the error of attention's output and of its gradients of
    q, k and v.

    Every sum is written with the sizes of its terms: |fl(Σ xᵢyᵢ) - Σ xᵢyᵢ| ≤ n·u·Σ |xᵢyᵢ| for any
    order of n terms. Where terms cancel, as in dS for a query that sees one key, the sizes are
    those before they cancel. Two forms are at most twice that apart, and eps = 2u.

    A score sums d products and is scaled; its error e makes its weight 1 + e times as large: (d +
    2)·u·s·|q||k|. The sum that a weight is divided by has such errors too, hence twice; and S terms
    of its own. So n is the error of a weight in units of u, and what follows adds its own sums to
    it.
    """
    q, k, v, grad = (x.detach().double() for x in (q, k, v, grad))
    (heads, T, d), kv_heads, S = q.shape[1:], k.shape[1], k.shape[2]
    G, scale = heads // kv_heads, d**-0.5
    k, v = (x.repeat_interleave(G, dim=1) for x in (k, v))
    mask = causal_mask(T, S) if mask is None else mask
    P = (
        (q @ k.mT * scale).masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num()
    )  # (B, heads, T, S)
    score = (q.abs() @ k.abs().mT * scale * mask).max().item()
    n = 2 * S + 2 * (d + 2) * score  # of a weight: of its own score, and of those in its sum
    dP = grad.abs() @ v.abs().mT  # (B, heads, T, S), and so dS below: sizes
    dS = P * (dP + (P * dP).sum(-1, keepdim=True))

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (kv_heads, G)).sum(2)  # (B, kv_heads, S, d)

    return [
        (n + S) * (P @ v.abs()),
        (2 * n + 2 * d + S) * scale * (dS @ k.abs()),
        (2 * n + 2 * d + G * T) * scale * grouped(dS.mT @ q.abs()),
        (n + G * T) * grouped(P.mT @ grad.abs()),
    ]
