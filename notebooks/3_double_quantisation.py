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
# **Question:** each block of 64 weights has a scale of 32 bits, which is half a bit per weight. Can
# we store the scale in 8 bits, and how much does this change the weights?
#
# In `2_nf4_by_hand.py` each block has a scale, its `absmax`. Here we quantise the scales too (QLoRA
# §3), by hand, until every byte equals that of the library. After each claim, a cell asserts it.
#
# Without access to the Hub, SmolLM2 comes from a GGUF file whose weights were already rounded to 4
# bits. For this reason we also use normally distributed random numbers.

# %%
import os

import matplotlib.pyplot as plt
import torch

import minilora as ml  # if it is missing: pip install -e '.[gguf,plot]' in the repository
from minilora_kernels import dynamic_map

torch.manual_seed(0)
dense = ml.load_model(ml.samples.smollm2(), dtype="float32", device="cpu")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
matrices = {}
for path, module in dense.model.named_modules():
    if path.endswith(KINDS):
        matrices[path] = module.weight.detach()
if os.environ.get("MINILORA_SHORT"):  # set by the tests: a short run with every assertion
    first_paths = list(matrices)[:14]  # two layers
    matrices = {path: matrices[path] for path in first_paths}
n = 0  # number of weights
for W in matrices.values():
    n += W.numel()
weight = matrices["layers.0.mlp.up_proj"]  # (1536, 576)
normal = torch.randn(1536, 576)

# %% [markdown]
# ## 1. Half a bit
#
# We count the stored bytes of every matrix, without and with double quantisation. With it, a scale
# is one byte, 256 scales share one fp32 number, and each matrix has one more fp32 number, the mean
# of its scales:
#
# $$ \frac{8}{64} + \frac{32}{64 \cdot 256} + \frac{32}{n} \quad\text{bits per weight.} $$

# %%
single = {}  # fp32 scales
double = {}  # quantised scales
for path, W in matrices.items():
    single[path] = ml.quantize_nf4(W, blocksize=64, double_quant=False)
    double[path] = ml.quantize_nf4(W, blocksize=64, double_quant=True)
    assert torch.equal(single[path].packed, double[path].packed)  # the codes are the same


def bits_of_parts(weights: list[ml.NF4Weight]) -> tuple[float, float, float]:
    """Return the bits per weight of the codes, of the scales, and of the scales' own scales."""
    code_bytes = 0
    scale_bytes = 0
    all_bytes = 0
    for weight in weights:
        code_bytes += weight.packed.nbytes
        scale_bytes += weight.absmax_bytes.nbytes
        all_bytes += weight.nbytes
    nested_bytes = all_bytes - code_bytes - scale_bytes
    return 8 * code_bytes / n, 8 * scale_bytes / n, 8 * nested_bytes / n


bits = {
    "once": bits_of_parts(list(single.values())),
    "twice": bits_of_parts(list(double.values())),
}
for name, (code_bits, scale_bits, nested_bits) in bits.items():
    total = code_bits + scale_bits + nested_bits
    print(f"quantised {name}: {total:.4f} bits per weight")
    print(f"    codes {code_bits:.3f}, scales {scale_bits:.4f}, scales of scales {nested_bits:.4f}")
assert sum(bits["once"]) == 4 + 0.5
scale_bits = sum(bits["twice"]) - 4
assert abs(scale_bits - 0.127) < 0.0005

saved = sum(bits["once"]) - sum(bits["twice"])
saved_gb = saved * 65 / 8
print(f"{saved:.3f} bits per weight saved: {saved_gb:.1f} GB in a model with 65 billion weights")
assert round(saved, 3) == 0.373
assert round(saved_gb) == 3

# %% [markdown]
# ## 2. Subtract the mean
#
# Scales are positive and close to each other. After the subtraction of their mean, the *offset*,
# they are on both sides of zero, so that a signed 8-bit type uses both signs. The mean is computed
# in fp64 and then rounded, so that it does not depend on the order of the sum.

# %%
absmax = single["layers.0.mlp.up_proj"].absmax  # (K,)
offset = absmax.double().mean().float()
centred = absmax - offset  # (K,)
for name, values in {"absmax": absmax, "centred": centred}.items():
    low = values.min().item()
    high = values.max().item()
    mean = values.mean().item()
    print(f"{name:8}{low:7.3f} to {high:.3f}, mean {mean:.3f}")
assert absmax.min() > 0
assert centred.min() < 0 < centred.max()

below_zero = (centred < 0).float().mean().item()
print(f"{below_zero:.0%} of the centred scales are below zero")
assert 0.4 < below_zero < 0.7

# %% [markdown]
# ## 3. The dynamic map
#
# Eight bits give 256 values. The *dynamic* type distributes them over seven powers of ten. The
# decade from 0.1 to 1 has 64 values of each sign, and each lower decade has half as many as the
# decade above it. Within a decade the values are evenly spaced: they are the midpoints of equal
# steps. The values 0 and 1 complete the 256, and -1 is not among them.

# %%
parts = [torch.tensor([0.0, 1.0])]
for decade in range(7):  # from 10^(decade - 7) to 10^(decade - 6)
    edges = torch.linspace(0.1, 1, 2**decade + 1)
    centres = (edges[:-1] + edges[1:]) / 2  # (2^decade,)
    centres = centres * 10 ** (decade - 6)
    parts += [centres, -centres]
table = torch.cat(parts).sort().values  # (256,)
assert torch.equal(table, dynamic_map())

positive = table[table > 0]
smallest = positive[0].item()
print(f"from {table[0]:.5f} to {table[-1]:.5f}")
print(f"the smallest positive value is {smallest:.2g}")
assert (table.abs() > 0.1).sum() == 129
assert table[0] > -1

# %%
linear = torch.linspace(-1, 1, 255)  # int8, for comparison
linear_step = 2 / 254
fig, (value_axis, step_axis) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
value_axis.plot(range(256), table, ".", color="#0072b2", ms=3, label="dynamic map")
value_axis.plot(range(255), linear, "-", color="0.6", lw=1, label="evenly spaced")
value_axis.set_yscale("symlog", linthresh=1e-6)
value_axis.set(title="value of each code", xlabel="code", ylabel="value")
value_axis.set(yticks=[-1, -1e-2, -1e-4, 0, 1e-4, 1e-2, 1])
value_axis.legend(frameon=False)

relative_steps = positive.diff() / positive[1:]
linear_positive = linear[128:]
step_axis.loglog(positive[1:], relative_steps, "o", color="#0072b2", ms=3, label="dynamic map")
step_axis.loglog(
    linear_positive, linear_step / linear_positive, "-", color="0.6", lw=1, label="evenly spaced"
)
step_axis.set(
    title="step between neighbours, over the value", xlabel="value", ylabel="step / value"
)
step_axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. Scales of scales
#
# The scales are now quantised as the weights were: we cut them into blocks (here of 256), divide
# each block by its largest magnitude, and take the nearest value of the map. **Every byte equals
# that of the library.**

# %%
block_count = -(-len(centred) // 256)  # rounded up, because the last block may be short
padding = block_count * 256 - len(centred)
padded = torch.nn.functional.pad(centred, (0, padding))
blocks = padded.view(block_count, 256)  # (J, 256)
nested = blocks.abs().amax(dim=1)  # (J,)
normalised = blocks * (1 / nested)[:, None]  # (J, 256), in [-1, 1]
midpoints = (table[:-1] + table[1:]) / 2  # (255,)
codes = torch.bucketize(normalised, midpoints).to(torch.uint8)  # (J, 256)
scale_codes = codes.flatten()[: len(absmax)]  # (K,), without the padding

library = double["layers.0.mlp.up_proj"]
assert torch.equal(scale_codes, library.absmax_bytes)
assert torch.equal(nested.view(torch.uint8), library.nested_bytes)
assert torch.equal(offset.view(1).view(torch.uint8), library.offset_bytes)
print(f"{len(absmax):,} scales in fp32 become {len(scale_codes):,} bytes,")
print(f"{len(nested)} nested scales and 1 offset")

# %% [markdown]
# The dequantised scale is map[code] · nested + offset. In a block of 256 scales, the scale that is
# furthest from the mean determines the step. If it is far from the mean, the other scales have
# larger errors.

# %%
decoded_blocks = table[codes.int()] * nested[:, None]  # (J, 256)
decoded = decoded_blocks.flatten()[: len(absmax)] + offset  # (K,)
assert torch.equal(decoded, library.absmax)

error = (decoded - absmax).abs() / absmax  # (K,)
median = error.median().item()
largest = error.max().item()
print(f"half of the scales have an error below {median:.2%}, the largest error is {largest:.2%}")
assert median < 0.01
assert largest < 0.1

# %% [markdown]
# ## 5. The cost in accuracy
#
# A relative error of a scale changes all 64 weights of its block by the same share. This error is
# small in comparison with the error of NF4. The two errors are independent, so their squares add
# up, and the small error adds almost nothing.


# %%
def norm_ratio(difference: torch.Tensor, W: torch.Tensor) -> float:
    """Return the norm of a difference over the norm of the weights."""
    return (difference.norm() / W.norm()).item()


def three_errors(
    W: torch.Tensor, single: ml.NF4Weight, double: ml.NF4Weight
) -> tuple[float, float, float]:
    """Return the relative errors of NF4, of the double quantisation, and of both together.

    Args:
        W: Original weights.
        single: W in NF4 with fp32 scales.
        double: W in NF4 with quantised scales.
    """
    from_single = ml.dequantize_nf4(single)
    from_double = ml.dequantize_nf4(double)
    nf4 = norm_ratio(from_single - W, W)
    change = norm_ratio(from_double - from_single, W)
    both = norm_ratio(from_double - W, W)
    return nf4, change, both


rows = {}
for path, W in matrices.items():
    rows[path] = three_errors(W, single[path], double[path])
single_normal = ml.quantize_nf4(normal, double_quant=False)
double_normal = ml.quantize_nf4(normal, double_quant=True)
rows["normal"] = three_errors(normal, single_normal, double_normal)

print(f"{'':28}  NF4 alone    change   together")
for path in [*list(matrices)[:7], "normal"]:
    nf4, change, both = rows[path]
    print(f"{path:28}{nf4:11.5f}{change:10.5f}{both:11.5f}")

largest_growth = 0.0
for nf4, change, both in rows.values():
    sum_of_squares = nf4**2 + change**2
    assert abs(sum_of_squares**0.5 / both - 1) < 0.005
    largest_growth = max(largest_growth, both / nf4 - 1)
print(f"the error grows by at most {largest_growth:.2%}, in {len(rows)} matrices")
assert largest_growth < 0.02

# %% [markdown]
# ## 6. The same bits, spent otherwise
#
# There is a simpler way from 4.5 to 4.125 bits: blocks of 256 weights without a second
# quantisation. At the same number of bits, double-quantised scales give the smaller error.

# %%
SIZES = [32, 64, 128, 256]


def bits_and_errors(double_quant: bool) -> tuple[list[float], list[float]]:
    """Return the bits per weight and the relative error of normal weights, for each block size."""
    bits = []
    errors = []
    for size in SIZES:
        quantised = ml.quantize_nf4(normal, blocksize=size, double_quant=double_quant)
        difference = ml.dequantize_nf4(quantised) - normal
        bits.append(8 * quantised.nbytes / normal.numel())
        errors.append(norm_ratio(difference, normal))
    return bits, errors


single_bits, single_errors = bits_and_errors(double_quant=False)
double_bits, double_errors = bits_and_errors(double_quant=True)

at_256 = SIZES.index(256)
plain_bits = single_bits[at_256]
plain_error = single_errors[at_256]
print(f"blocks of 256, fp32 scales:        {plain_bits:.3f} bits, error {plain_error:.4f}")

at_64 = SIZES.index(64)
nested_bits = double_bits[at_64]
nested_error = double_errors[at_64]
print(f"blocks of 64, double quantisation: {nested_bits:.3f} bits, error {nested_error:.4f}")
assert abs(nested_bits - plain_bits) < 0.01
assert nested_error < 0.96 * plain_error

# %%
fig, (bar_axis, curve_axis) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
_, single_scales, _ = bits["once"]
_, double_scales, double_nested = bits["twice"]
bar_axis.bar(["once", "twice"], [single_scales, double_scales], 0.5, color="0.7", label="scales")
bar_axis.bar(
    ["twice"], [double_nested], 0.5, bottom=[double_scales], color="k", label="scales of scales"
)
bar_axis.set(title="bits in addition to the 4 bits of a code, blocks of 64")
bar_axis.set(xlabel="number of quantisations", ylabel="bits per weight", xlim=(-0.6, 1.9))
bar_axis.legend(frameon=False)

curve_axis.plot(single_bits, single_errors, "s--", color="0.5", ms=4, label="fp32 scales")
curve_axis.plot(
    double_bits, double_errors, "o-", color="#0072b2", ms=4, label="double quantisation"
)
for curve in ((single_bits, single_errors), (double_bits, double_errors)):
    for size, x, y in zip(SIZES, *curve, strict=True):
        curve_axis.annotate(
            str(size), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8
        )
curve_axis.set(title="normal weights, by block size")
curve_axis.set(xlabel="bits per weight", ylabel="‖W' - W‖ / ‖W‖")
curve_axis.margins(0.1)
curve_axis.legend(frameon=False)
plt.show()

# %% [markdown]
# **Exercise.** Would 255 evenly spaced values be as good as the dynamic map? Use `linear` in place
# of the map in section 4, on the scales of normal weights, and compare the errors of the scales.
#
# <details><summary>Solution</summary>
#
# ```python
# absmax = single_normal.absmax
# centred = absmax - absmax.mean()
# full_blocks = len(centred) // 256
# blocks = centred[: full_blocks * 256].view(full_blocks, 256)
# nested = blocks.abs().amax(dim=1, keepdim=True)
# normalised = blocks / nested
# errors = {}
# for name, values in {"dynamic": table, "linear": linear}.items():
#     codes = torch.bucketize(normalised, (values[:-1] + values[1:]) / 2)
#     decoded = values[codes] * nested
#     errors[name] = norm_ratio(decoded - blocks, absmax)
# print(errors)
# assert errors["linear"] < errors["dynamic"] < 0.003
# above_a_tenth = (normalised.abs() > 0.1).float().mean()
# assert above_a_tenth > 0.6
# ```
#
# The evenly spaced values are even better. Most of the centred scales are larger than a tenth of
# the largest one. In that range `linear` has more values than the dynamic map, which spends many
# values on small numbers that are rare here. The dynamic map is designed for numbers that span many
# powers of ten, such as the moments of Adam. Both errors are negligible in comparison with the
# error of NF4, and the file format is that of bitsandbytes, so the library uses the dynamic map.
#
# </details>
