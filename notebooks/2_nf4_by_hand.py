# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # NF4 by hand
#
# **Question:** four bits tell 16 numbers apart, and a layer has a million weights. Which 16 numbers should they be, and
# what is lost?
#
# We build NF4 (4-bit NormalFloat, QLoRA §3) by hand until every byte is the library's, then hold it against the other
# 4-bit types. Each claim is followed by a cell that asserts it. Where the Hub cannot be reached, SmolLM2 comes as a
# GGUF file whose matrices were rounded to 4 bits before (mostly Q4_1: blocks of 32, each with 16 evenly spaced values
# of its own), and what we measure is a second rounding. So **normal random numbers stand beside them throughout**.

# %%
import os

import matplotlib.pyplot as plt
import torch

import minilora as ml  # not there? In the repository's folder: pip install -e '.[gguf,plot]'
from minilora_kernels import nf4_codebook

SHORT = bool(
    os.environ.get("MINILORA_SHORT")
)  # tests run this in a short form: less of all, every assertion
torch.manual_seed(0)
source = ml.samples.smollm2()
dense = ml.load_model(source, dtype="float32", device="cpu")
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
real = {
    path: m.weight.detach().clone()
    for path, m in dense.model.named_modules()
    if path.rpartition(".")[2] in KINDS
}
weight = real["layers.0.mlp.up_proj"]  # (1536, 576)
normal = torch.randn(2**17 if SHORT else 2**21)
print(
    f"{len(real)} matrices of SmolLM2-135M-Instruct, {sum(W.numel() for W in real.values()):,} weights"
)
distinct = max(len(block.unique()) for block in weight.flatten()[: 32 * 200].view(-1, 32))
print(f"at most {distinct} different values among 32 neighbours")
assert distinct <= 16 or not str(source).endswith(".gguf")

# %% [markdown]
# ## 1. Quantiles
#
# If weights are normal, levels at *quantiles* are each used equally often, and no code is wasted. $Q(p)$ is the number
# below which a share $p$ of a normal distribution lies. Eight p above 0.5 give the positive side, seven the negative
# one. 0 is a level of its own, so that what is zero stays zero. Divided by the largest, they end at ±1.

# %%
P_MAX = 0.9677083  # how far out the outermost level stands: Q(1) would be infinite


def side(count: int) -> torch.Tensor:
    """Quantiles of `count` equally spaced p from P_MAX down towards 0.5, which is left out."""
    return torch.special.ndtri(torch.linspace(P_MAX, 0.5, count + 1)[:-1].double()).float()


levels = torch.cat([-side(7), torch.zeros(1), side(8)]).sort().values  # (16,)
levels = levels / levels.max()
assert torch.equal(levels, nf4_codebook())
fig, axes = plt.subplots(figsize=(11, 3.8), layout="constrained")
z = torch.linspace(-2.2, 4, 400)
axes.plot(z, torch.special.ndtr(z), color="0.2", label="share of a normal distribution below")
places = levels * side(8).max()
for place in places:
    p = torch.special.ndtr(place)
    axes.plot([-2.2, place, place], [p, p, 0], color="#0072b2", lw=0.8)
axes.plot(
    places,
    torch.zeros(16),
    "v",
    color="#0072b2",
    clip_on=False,
    label="levels, before the division",
)
axes.set(
    title="equal steps of p, unequal steps of weight",
    xlabel="weight",
    ylabel="p",
    xlim=(-2.2, 4),
    ylim=(0, 1),
)
axes.legend(frameon=False, loc="center right")
plt.show()

# %% [markdown]
# ## 2. A block of 64
#
# The levels reach from -1 to 1, a weight from wherever to wherever. So 64 neighbours are divided by the largest
# magnitude among them, `absmax`, which is kept beside them. Each then takes the nearest level: its *code* is how many
# of the 15 midpoints between levels lie below it.

# %%
blocks = weight.reshape(-1, 64)  # (K, 64)
absmax = blocks.abs().amax(dim=1)  # (K,)
normalised = (
    blocks * (1 / absmax)[:, None]
)  # (K, 64), in [-1, 1]; bitsandbytes multiplies by the reciprocal, so do we
codes = torch.bucketize(normalised, (levels[:-1] + levels[1:]) / 2).to(
    torch.uint8
)  # (K, 64), 0 to 15
for name, row in {
    "weight": blocks,
    "normalised": normalised,
    "code": codes,
    "level": levels[codes.int()],
}.items():
    print(f"{name:<12}", *(f"{value:8.4g}" for value in row[0, :8].tolist()), " …")
assert (
    codes == (normalised[..., None] - levels).abs().argmin(dim=-1)
).float().mean() > 0.9999  # ties aside

# %% [markdown]
# ## 3. Two codes in a byte
#
# The smallest thing memory knows is a byte of 8 bits; a code has 4, a *nibble*. The first of each pair goes to the high
# nibble (four places to the left), the second to the low one. **These are the library's bytes, every one.** And back:
# apart with shift and mask, look the level up, multiply by the block's scale.

# %%
flat = codes.flatten()
packed = flat[0::2] << 4 | flat[1::2]  # (n / 2,)
library = ml.quantize_nf4(weight, blocksize=64, double_quant=False)
assert torch.equal(packed, library.packed) and torch.equal(absmax, library.absmax)
a, b = codes[0, :2].tolist()
print(
    f"codes {a} and {b} -> {a:04b} and {b:04b} -> byte {packed[0]:08b} = 16 · {a} + {b} = {packed[0]}"
)
print(
    f"{weight.nbytes:,} bytes in fp32, {library.nbytes:,} in NF4: {8 * library.nbytes / weight.numel()} bits each"
)
assert library.nbytes == packed.nbytes + absmax.nbytes == weight.numel() * (4 + 32 / 64) / 8
codes_again = torch.stack([packed >> 4, packed & 0b1111], dim=1).view(-1, 64)
restored = (levels[codes_again.int()] * absmax[:, None]).view(weight.shape)
assert torch.equal(restored, ml.dequantize_nf4(library))
print(f"‖W' - W‖ / ‖W‖ = {(restored - weight).norm() / weight.norm():.4f}")

# %% [markdown]
# ## 4. Sixteen other numbers
#
# Any ascending levels in [-1, 1] make a 4-bit type. **Int4** spaces them evenly. **FP4** has a sign, an exponent and
# perhaps a mantissa: E2M1 (two bits of exponent, one of mantissa) or E3M0 (powers of two only). Both come from QLoRA's
# table 2. Each of the three has 15 different levels: FP4 holds 0 twice, and Int4 leaves a code out to be symmetric.


# %%
def mirrored(*positive: float) -> torch.Tensor:
    """0, these, and these with a minus; the largest becomes 1."""
    half = torch.tensor(positive) / positive[-1]
    return torch.cat([-half.flip(0), torch.zeros(1), half])


TYPES = {
    "NF4": levels,
    "FP4 E2M1": mirrored(0.5, 1, 1.5, 2, 3, 4, 6),
    "Int4": mirrored(1, 2, 3, 4, 5, 6, 7),
    "FP4 E3M0": mirrored(0.25, 0.5, 1, 2, 4, 8, 16),
}
STYLES = dict(
    zip(
        TYPES,
        [("#0072b2", "o-"), ("#d55e00", "s--"), ("0.3", "^:"), ("#cc79a7", "d-.")],
        strict=True,
    )
)


def encode(
    W: torch.Tensor, levels: torch.Tensor, blocksize: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (K, B) and absmax (K, 1) of section 2, for any levels."""
    blocks = W.reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    return torch.bucketize(blocks / absmax, (levels[:-1] + levels[1:]) / 2, out_int32=True), absmax


def rounded(W: torch.Tensor, levels: torch.Tensor, blocksize: int = 64) -> torch.Tensor:
    """W as it comes back."""
    codes, absmax = encode(W, levels, blocksize)
    return (levels[codes] * absmax).view(W.shape)


def errors(W: torch.Tensor, levels: torch.Tensor, blocksize: int = 64) -> tuple[float, float]:
    """(‖W' - W‖ / ‖W‖, and the same of absolute values: Σ|W' - W| / Σ|W|)."""
    off = rounded(W, levels, blocksize) - W
    return (off.norm() / W.norm()).item(), (off.abs().sum() / W.abs().sum()).item()


print(
    f"{'':16}normal weights    up_proj of layer 0\n{'':10}" + f"{'squares':>12}{'absolute':>10}" * 2
)
table = {name: (errors(normal, of), errors(weight, of)) for name, of in TYPES.items()}
for name, row in table.items():
    print(f"{name:10}" + "".join(f"{square:12.4f}{absolute:10.4f}" for square, absolute in row))
for where, measure in (
    (0, 0),
    (0, 1),
    (1, 0),
    (1, 1),
):  # on normal weights and on real ones, in either measure
    nf4, e2m1, int4, _ = (row[where][measure] for row in table.values())
    assert nf4 < e2m1 < int4
assert table["FP4 E3M0"][0][0] > 1.5 * table["Int4"][0][0]

# %% [markdown]
# **NF4 < FP4 < Int4**, as in the paper, for E2M1. E3M0 is the worst here by far: between 0.5 and 1 of a block's absmax
# it has nothing. In the picture: NF4's steps are short where weights are many, and nowhere very long.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
scaled = normal.view(-1, 64) / normal.view(-1, 64).abs().amax(dim=1, keepdim=True)
left.hist(scaled.flatten(), bins=120, color="0.85", density=True)
for row, (name, of) in enumerate(TYPES.items()):
    left.plot(of, [-0.25 - 0.25 * row] * len(of), "|", color=STYLES[name][0], ms=11, mew=2)
    left.text(1.06, -0.25 - 0.25 * row, name, va="center", fontsize=9)
left.set(title="normal weights over their block's absmax, and the levels", xlim=(-1.05, 1.45))
left.set(xlabel="normalised value", xticks=[-1, -0.5, 0, 0.5, 1], yticks=[])
y = torch.linspace(-1, 1, 41)[:-1] + 1 / 40  # middles of 40 bins
for name, of in TYPES.items():
    square = (of[encode(normal, of)[0]] - scaled).square().flatten()
    share = (
        torch.histogram(scaled.flatten(), 40, range=(-1, 1), weight=square).hist / normal.numel()
    )
    right.plot(y, 1e4 * share, STYLES[name][1], ms=3, lw=1, color=STYLES[name][0], label=name)
right.set(
    title="where the error comes from",
    xlabel="normalised value",
    ylabel="squared error a weight, ×10⁻⁴",
)
right.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# That no code is wasted can be measured: the *entropy* of the codes, 4 bits if all are used equally often. A block's
# largest weight always sits at ±1, so even NF4 does not reach it.

# %%
bits = {}
for name, of in TYPES.items():
    p = torch.bincount(encode(normal, of)[0].flatten(), minlength=16) / normal.numel()
    bits[name] = -(p * p.clamp_min(1e-12).log2()).sum().item()
print({name: round(value, 2) for name, value in bits.items()})
assert max(bits, key=lambda name: bits[name]) == "NF4" and 3.8 < bits["NF4"] < 4

# %% [markdown]
# ## 5. A smaller error, a better model?
#
# The paper's table compares what models say, not how weights are off. So every linear layer is rounded to each type and
# the model reads English prose. **The order is that of the errors**, and the paper's but for E3M0, which there comes
# before E2M1. It is one small model and little text: read the distances, not the last digits.

# %%
tokenizer = ml.load_tokenizer(source)
prose = ml.samples.prose(rows=2 if SHORT else 10, characters=300 if SHORT else 500)
losses = {"as it came": ml.evaluate(dense, tokenizer, prose, max_new_tokens=0).loss}
with torch.no_grad():
    for name, of in TYPES.items():
        for path, W in list(real.items())[:: 2 if SHORT else 1]:
            dense.model.get_submodule(path).weight.copy_(rounded(W, of))
        losses[name] = ml.evaluate(dense, tokenizer, prose, max_new_tokens=0).loss
print({name: round(loss, 3) for name, loss in losses.items()})
assert sorted(losses, key=lambda name: losses[name]) == ["as it came", *TYPES]

# %% [markdown]
# ## 6. The size of a block
#
# A small block follows its weights closely, but every block costs 32 bits for its absmax. The error rises slowly, as
# the largest of more weights lies further out; the price falls fast. 64 is the paper's choice; at 32, Int4 beats E2M1.

# %%
sizes = [32, 64, 128, 256, 512, 1024]
curves = {
    name: [[errors(W, TYPES[name], B)[0] for B in sizes] for W in (normal, weight)]
    for name in list(TYPES)[:3]
}
for name, (curve, _) in curves.items():
    print(
        f"{name:10}"
        + "".join(f"{B:>7}: {error:.4f}" for B, error in zip(sizes, curve, strict=True))
    )
    assert curve == sorted(curve)
assert (
    curves["NF4"][0][-1] < 1.35 * curves["NF4"][0][0]
    and curves["Int4"][0][0] < curves["FP4 E2M1"][0][0]
)

# %% [markdown]
# ## 7. Outliers
#
# One large weight is enough: it is the absmax of its block, and the 63 others share the few levels near 0. Below, the
# first weight of each block becomes 1 to 64 standard deviations, and only the error of the *others* is counted.

# %%
heights, rest = [1, 2, 4, 8, 16, 64], normal.view(-1, 64)[:, 1:]
others: dict[str, list[float]] = {}
for name in ("NF4", "FP4 E3M0", "Int4"):
    others[name] = []
    for height in heights:
        blocks = torch.cat([torch.full((len(rest), 1), float(height)), rest], dim=1)  # (K, 64)
        others[name].append(
            ((rounded(blocks, TYPES[name])[:, 1:] - rest).norm() / rest.norm()).item()
        )
    print(
        f"{name:10}"
        + "".join(f"{h:>6} σ: {error:.2f}" for h, error in zip(heights, others[name], strict=True))
    )
assert (
    others["NF4"][4] > 3 * others["NF4"][1] and others["NF4"][5] > 0.9
)  # at 64 σ nearly all the others become 0
assert (
    others["FP4 E3M0"][5] < 0.6 * others["Int4"][5]
)  # powers of two reach far down: what E3M0 is good for

# %% [markdown]
# ## 8. Layer by layer
#
# So a matrix is as hard as its blocks' largest weights are large against the rest: drawn over that ratio, the errors of
# all 210 lie near a line. Normal weights (the cross) are easier than most.

# %%
chosen = dict(list(real.items())[:: 29 if SHORT else 1]) | {"normal": normal}
rms = {path: W.square().mean().sqrt() for path, W in chosen.items()}
reach = [
    (W.reshape(-1, 64).abs().amax(dim=1).square().mean().sqrt() / rms[path]).item()
    for path, W in chosen.items()
]
found = [errors(W, levels)[0] for W in chosen.values()]
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, (curve, curve_real) in curves.items():
    (colour, line), price = STYLES[name], [4 + 32 / B for B in sizes]
    left.plot(price, curve, line, color=colour, ms=4, label=f"{name}, normal weights")
    left.plot(price, curve_real, "x", color=colour, ms=6)
left.set(
    title="blocks of 1024 … 32 (×: up_proj of layer 0)",
    xlabel="bits a weight",
    ylabel="‖W' - W‖ / ‖W‖",
)
for kind, marker, colour in zip(
    KINDS, "osv^D<>", plt.colormaps["viridis"](torch.linspace(0, 0.9, 7)), strict=True
):
    at = [i for i, path in enumerate(chosen) if path.endswith(kind)]
    right.plot(
        [reach[i] for i in at], [found[i] for i in at], marker, color=colour, ms=4, label=kind
    )
right.plot(reach[-1], found[-1], "x", color="#d55e00", ms=11, mew=3, label="normal")
right.set(
    title="every matrix of the model, blocks of 64", xlabel="absmax of a block / rms of the matrix"
)
left.legend(frameon=False)
right.legend(frameon=False, fontsize=8, ncols=2)
plt.show()
hardest = max(zip(found, chosen, strict=True))
print(
    f"normal {found[-1]:.4f}, median {sorted(found)[len(found) // 2]:.4f}, hardest {hardest[0]:.4f}: {hardest[1]}"
)
assert (
    torch.corrcoef(torch.tensor([reach, found]))[0, 1] > 0.8
    and found[-1] < sorted(found)[len(found) // 2]
)

# %% [markdown]
# **Exercise.** NF4 wastes no codes, but is its error the smallest? Move each level to the mean of the normalised values
# nearest to it, again and again (Lloyd's algorithm). By how much do you beat NF4 on normal weights?
#
# <details><summary>Solution</summary>
#
# ```python
# y = scaled.flatten()
# better = levels.clone()
# for _ in range(10 if SHORT else 40):
#     code = torch.bucketize(y, (better[:-1] + better[1:]) / 2)
#     better = torch.bincount(code, y, minlength=16) / torch.bincount(code, minlength=16)
# ours, theirs = errors(normal, better)[0], errors(normal, levels)[0]
# print(f"NF4 {theirs:.4f}, after Lloyd {ours:.4f}, {1 - ours / theirs:.1%} less")
# assert 0.93 * theirs < ours < theirs
# ```
#
# By a few per cent only. The aims differ: NF4 uses every level equally often, Lloyd makes the squared error small. And
# the new levels have no exact 0 and no exact ±1: a block's largest weight would not come back as it was.
#
# </details>
