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
# # Double quantisation
#
# **Question:** every block of 64 weights has a scale of 32 bits, which is half a bit a weight. Can it be stored in 8
# bits too, and what does that do to the weights?
#
# `2_nf4_by_hand.py` stops where each block has its `absmax`. Here these are quantised once more (QLoRA §3), by hand,
# until every byte is the library's. Each claim is followed by a cell that asserts it.
#
# Where the Hub cannot be reached, SmolLM2 comes as a GGUF file, whose weights were rounded to 4 bits once before. So
# normal random numbers stand beside it.

# %%
import os

import matplotlib.pyplot as plt
import torch

import minilora as ml  # not there? In the repository's folder: pip install -e '.[gguf,plot]'
from minilora_kernels import dynamic_map

SHORT = bool(
    os.environ.get("MINILORA_SHORT")
)  # tests run this in a short form: fewer matrices, every assertion
torch.manual_seed(0)
dense = ml.load_model(ml.samples.smollm2(), dtype="float32", device="cpu")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
matrices = {
    path: m.weight.detach() for path, m in dense.model.named_modules() if path.endswith(KINDS)
}
if SHORT:
    matrices = dict(list(matrices.items())[:14])  # two layers
n = sum(W.numel() for W in matrices.values())
weight = matrices["layers.0.mlp.up_proj"]  # (1536, 576)
normal = torch.randn(1536, 576)

# %% [markdown]
# ## 1. Half a bit
#
# Count the bytes as they are stored, of every matrix, without double quantisation and with it. With it a scale is one
# byte, 256 scales share one fp32 number, and a matrix has one more, the mean of its scales:
#
# $$ \frac{8}{64} + \frac{32}{64 \cdot 256} + \frac{32}{n} \quad\text{bits a weight.} $$

# %%
once = {path: ml.quantize_nf4(W, blocksize=64, double_quant=False) for path, W in matrices.items()}
twice = {path: ml.quantize_nf4(W, blocksize=64, double_quant=True) for path, W in matrices.items()}
assert all(
    torch.equal(once[path].packed, twice[path].packed) for path in matrices
)  # the codes are the same
bits = {}
for name, weights in {"once": once.values(), "twice": twice.values()}.items():
    codes, scales = (
        8 * sum(getattr(w, part).nbytes for w in weights) / n for part in ("packed", "absmax_bytes")
    )
    bits[name] = (
        codes,
        scales,
        8 * sum(w.nbytes for w in weights) / n - codes - scales,
    )  # the rest: scales of scales
    print(
        f"{name:8}{sum(bits[name]):.4f} bits: codes {codes:.3f}, scales {scales:.4f}, their scales {bits[name][2]:.4f}"
    )
saved = sum(bits["once"]) - sum(bits["twice"])
assert sum(bits["once"]) == 4 + 0.5 and abs(sum(bits["twice"]) - 4 - 0.127) < 0.0005
print(f"{saved:.3f} bits a weight: of a model with 65 billion weights {saved * 65 / 8:.1f} GB")
assert round(saved, 3) == 0.373 and round(saved * 65 / 8) == 3

# %% [markdown]
# ## 2. Take the mean away
#
# Scales are positive and close to each other. Less their mean, the *offset*, they lie on both sides of zero, and a sign
# becomes worth its bit. The mean is rounded from fp64, so that it does not depend on the order of the sum.

# %%
absmax = once["layers.0.mlp.up_proj"].absmax  # (K,)
offset = absmax.double().mean().float()
centred = absmax - offset  # (K,)
for name, values in {"absmax": absmax, "centred": centred}.items():
    print(f"{name:8}{values.min():7.3f} to {values.max():.3f}, mean {values.mean():.3f}")
assert absmax.min() > 0 and centred.min() < 0 < centred.max()
below = (centred < 0).float().mean().item()
print(f"{below:.0%} of them below zero")
assert 0.4 < below < 0.7

# %% [markdown]
# ## 3. The dynamic map
#
# Eight bits give 256 values. The *dynamic* type spends them on seven powers of ten: from 0.1 to 1 it has 64 values of
# each sign, in each decade below half as many. Within a decade they are evenly spaced: the middles of equal steps. 0
# and 1 make the 256 full; there is no -1.

# %%
values = [torch.tensor([0.0, 1.0])]
for decade in range(7):  # 10^(decade - 7) to 10^(decade - 6)
    edges = torch.linspace(0.1, 1, 2**decade + 1)
    middles = (edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6)  # (2^decade,)
    values += [middles, -middles]
table = torch.cat(values).sort().values  # (256,)
assert torch.equal(table, dynamic_map())
print(
    f"from {table[0]:.5f} to {table[-1]:.5f}; the smallest above zero is {table[table > 0][0]:.2g}"
)
assert (table.abs() > 0.1).sum() == 129 and table[0] > -1

# %%
linear = torch.linspace(-1, 1, 255)  # int8, for comparison
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
left.plot(range(256), table, ".", color="#0072b2", ms=3, label="dynamic map")
left.plot(range(255), linear, "-", color="0.6", lw=1, label="evenly spaced")
left.set_yscale("symlog", linthresh=1e-6)
left.set(title="code → value", xlabel="code", yticks=[-1, -1e-2, -1e-4, 0, 1e-4, 1e-2, 1])
left.legend(frameon=False)
positive = table[table > 0]
right.loglog(
    positive[1:], positive.diff() / positive[1:], "o", color="#0072b2", ms=3, label="dynamic map"
)
right.loglog(linear[128:], (2 / 254) / linear[128:], "-", color="0.6", lw=1, label="evenly spaced")
right.set(title="step between neighbours, over the value", xlabel="value")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. Scales of scales
#
# Now as with the weights: blocks, here of 256; divide by the largest magnitude; the nearest of the map's values.
# **Every byte is the library's.**

# %%
count = -(-len(centred) // 256)
blocks = torch.nn.functional.pad(centred, (0, count * 256 - len(centred))).view(
    count, 256
)  # the last one may be short
nested = blocks.abs().amax(dim=1)  # (J,)
codes = torch.bucketize(blocks * (1 / nested)[:, None], (table[:-1] + table[1:]) / 2).to(
    torch.uint8
)
library = twice["layers.0.mlp.up_proj"]
assert torch.equal(codes.flatten()[: len(absmax)], library.absmax_bytes)
assert torch.equal(nested.view(torch.uint8), library.nested_bytes)
assert torch.equal(offset.view(1).view(torch.uint8), library.offset_bytes)
print(
    f"{len(absmax):,} scales -> {len(library.absmax_bytes):,} bytes, {len(nested)} nested scales, 1 offset"
)

# %% [markdown]
# And back, from three kinds of numbers: map[code] · nested + offset. Among 256 scales the one furthest from the mean
# sets the step, and where it is far away the others are off by more.

# %%
decoded = (table[codes.int()] * nested[:, None]).flatten()[: len(absmax)] + offset
assert torch.equal(decoded, library.absmax)
off = (decoded - absmax).abs() / absmax
print(f"half of the scales are off by less than {off.median():.2%}, the worst by {off.max():.2%}")
assert off.median() < 0.01 and off.max() < 0.1

# %% [markdown]
# ## 5. What it costs
#
# A scale that is off by a share of itself moves all 64 weights of its block by that share. That is small beside NF4's
# own error. And the two have nothing to do with each other, so they add up as squares do, and the small one all but
# vanishes.


# %%
def parts(W: torch.Tensor, once: ml.NF4Weight, twice: ml.NF4Weight) -> list[float]:
    """Over ‖W‖: NF4's own error, what double quantisation moves, and the error of both."""
    first, second = ml.dequantize_nf4(once), ml.dequantize_nf4(twice)
    return [(part.norm() / W.norm()).item() for part in (first - W, second - first, second - W)]


rows = {path: parts(W, once[path], twice[path]) for path, W in matrices.items()}
rows["normal"] = parts(
    normal, *(ml.quantize_nf4(normal, double_quant=nest) for nest in (False, True))
)
print(f"{'':28}{'NF4 alone':>11}{'moved':>10}{'together':>11}")
for path in [*list(rows)[:7], "normal"]:
    own, moved, both = rows[path]
    print(f"{path:28}{own:11.5f}{moved:10.5f}{both:11.5f}")
most = max(both / own - 1 for own, _, both in rows.values())
print(f"the error grows by {most:.2%} at most, in {len(rows)} matrices")
assert most < 0.02
assert all(abs((own**2 + moved**2) ** 0.5 / both - 1) < 0.005 for own, moved, both in rows.values())

# %% [markdown]
# ## 6. The same bits, spent otherwise
#
# There is a simpler way from 4.5 to 4.125 bits: blocks of 256 and no second quantisation. At every size of block the
# double-quantised scales give the smaller error for the bits.

# %%
sizes = [32, 64, 128, 256]
curves: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
for nest, curve in curves.items():
    for size in sizes:
        q = ml.quantize_nf4(normal, blocksize=size, double_quant=nest)
        curve.append(
            (
                8 * q.nbytes / normal.numel(),
                ((ml.dequantize_nf4(q) - normal).norm() / normal.norm()).item(),
            )
        )
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
(_, plain, _), (_, scales, rest) = bits.values()
left.bar(["once", "twice"], [plain, scales], 0.5, color="0.7", label="scales")
left.bar(["once", "twice"], [0, rest], 0.5, bottom=[0, scales], color="k", label="their scales")
left.set(
    title="beside the 4 bits of a code, blocks of 64", ylabel="bits a weight", xlim=(-0.6, 1.9)
)
left.legend(frameon=False)
for (nest, curve), style in zip(curves.items(), ("s--", "o-"), strict=True):
    label = "double quantisation" if nest else "fp32 scales"
    right.plot(
        *zip(*curve, strict=True), style, color="#0072b2" if nest else "0.5", ms=4, label=label
    )
    for size, (x, y) in zip(sizes, curve, strict=True):
        right.annotate(str(size), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
right.set(title="normal weights, by size of block", xlabel="bits a weight", ylabel="‖W' - W‖ / ‖W‖")
right.margins(0.1)
right.legend(frameon=False)
plt.show()
(double_bits, double_error), (plain_bits, plain_error) = curves[True][1], curves[False][3]
print(f"64 and double: {double_bits:.3f} bits, error {double_error:.4f}")
print(f"256 and fp32:  {plain_bits:.3f} bits, error {plain_error:.4f}")
assert abs(double_bits - plain_bits) < 0.01 and double_error < 0.96 * plain_error

# %% [markdown]
# **Exercise.** Would 255 evenly spaced values do as well as the dynamic map? Put `linear` in its place in section 4, on
# the scales of normal weights, and compare how far the scales are off.
#
# <details><summary>Solution</summary>
#
# ```python
# q = ml.quantize_nf4(normal, double_quant=False)
# d = q.absmax - q.absmax.mean()
# d = d[: len(d) // 256 * 256].view(-1, 256)
# largest = d.abs().amax(dim=1, keepdim=True)
# off = {}
# for name, levels in {"dynamic": table, "linear": linear}.items():
#     near = levels[torch.bucketize(d / largest, (levels[:-1] + levels[1:]) / 2)]
#     off[name] = ((near * largest - d).norm() / q.absmax.norm()).item()
# print(off)
# above = ((d / largest).abs() > 0.1).float().mean()
# assert off["linear"] < off["dynamic"] < 0.003 and above > 0.6
# ```
#
# Better, even. Most of the centred scales lie above a tenth of the largest, where `linear` has more values than the
# dynamic map, whose small ones wait for numbers that hardly come. It was made for what spans many powers of ten, as
# Adam's moments do. Beside NF4's own error neither is seen, and the file format is bitsandbytes', so the map stays.
#
# </details>
