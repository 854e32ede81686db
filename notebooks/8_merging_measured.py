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
# # Merging, measured
#
# **Question:** an adapter can be merged into its base model, $W' = W + \Delta W$ with
# $\Delta W = s\,BA$, and then it costs nothing at inference. But $W'$ has to be *stored*, in 16
# bits or in 4. How much of $\Delta W$ survives this rounding?
#
# A cell with an assert follows each claim.

# %%
import os

import matplotlib.pyplot as plt
import torch
from torch import nn

import minilora as ml  # to install it, in the repository: pip install -e '.[gguf,plot]'

ORANGE = "#d55e00"
BLUE = "#0072b2"

TEST_ROWS = 200
TRAIN_ROWS = 960
STEPS = 60

# Tests run a short form: fewer rows and steps, and every assert.
SHORT = bool(os.environ.get("MINILORA_SHORT"))
if SHORT:
    TEST_ROWS = 32
    TRAIN_ROWS = 64
    STEPS = 6

torch.manual_seed(0)

# %% [markdown]
# ## 1. One matrix, and updates of every size
#
# The example is a 512 × 512 weight. The checkpoint stores it in bf16, and QLoRA trains on its NF4
# form. The update is a random matrix of rank 8, scaled so that
# $\|\Delta W\| = 0.3\% \ldots 100\%$ of $\|W\|$. `merge_report` measures figures for each way to
# store the merged weight. With the stored change $\Delta\hat W$, $W'$ minus its base:
#
# - The **error** is the distance from the trained weight,
#   $\|W' - (W + \Delta W)\| / \|\Delta W\|$. At 1 it is as long as the update itself.
# - The **projection** $\langle\Delta\hat W, \Delta W\rangle / \langle\Delta W, \Delta W\rangle$ is the
#   part of the update that is stored. At 1 nothing of it is lost.
#
# Two roundings to NF4 are compared: the nearest level, and `merge`'s own, which is explained below.

# %%
original = nn.Sequential(nn.Linear(512, 512, bias=False)).bfloat16()
nn.init.normal_(original[0].weight, std=0.02)
model = nn.Sequential(ml.NF4Linear.from_linear(original[0]))
ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules=["0"]))
adapter = model[0].adapters["default"]
unit_B = torch.randn(512, 8)  # (out, r), scaled below so that ‖unit_B A‖ = ‖W‖
weight_norm = original[0].weight.float().norm()
unit_B *= weight_norm / (unit_B @ adapter.lora_A).norm()


def set_update(size: float) -> None:
    """Give the adapter an update with ‖ΔW‖ = size · ‖W‖."""
    with torch.no_grad():
        adapter.lora_B.copy_(size * unit_B)


sizes = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
reports = []
nearest = []  # the same, where NF4 takes the nearest level
for size in sizes:
    set_update(size)
    reports.append(ml.merge_report(model, original).total)
    nearest.append(ml.merge_report(model, rounding="nearest").total)

targets = list(reports[0].error)
header = "error   "
for target in targets:
    header += f"{target:>14}"
print(header)
for size, report in zip(sizes, reports, strict=True):
    line = f"{size:<8}"
    for target in targets:
        line += f"{report.error[target]:14.2g}"
    print(line)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
for target in targets:
    errors = [report.error[target] for report in reports]
    left.loglog(sizes, errors, "o-", ms=3, label=target)
left.loglog(sizes, [report.error["nf4"] for report in nearest], "k:", label="nf4, nearest")
left.axhline(1, color="0.7", lw=0.8)
left.set(title="distance from the trained model", xlabel="‖ΔW‖ / ‖W‖", ylabel="error / ‖ΔW‖")
for target, colour in (("bfloat16", ORANGE), ("nf4", BLUE)):
    projections = [report.projection[target] for report in reports]
    right.semilogx(sizes, projections, "o-", ms=3, color=colour, label=target)
right.semilogx(sizes, [report.projection["nf4"] for report in nearest], "k:", label="nf4, nearest")
right.set(
    title="part of the update that is stored",
    xlabel="‖ΔW‖ / ‖W‖",
    ylabel="projection on ΔW",
    ylim=(-0.1, 1.3),
)
left.legend(frameon=False, fontsize=8, ncols=2, loc="center left", bbox_to_anchor=(0, 0.4))
right.legend(frameon=False)
plt.tight_layout()
plt.show()

# %% [markdown]
# **The rounding error depends on the size of the weight, not of the update.** A dtype rounds $W'$
# with an error in proportion to $W$. So relative to $\Delta W$ the error falls as 1/size, a line
# with slope −1. At 0.3 % the error of bf16 is half as large as the effect of the adapter. fp16 has
# three more bits and an error eight times smaller. The error of fp32 is negligible.

# %%
small = reports[0]  # 0.3 %
large = reports[4]  # 30 %
assert 0.4 < small.error["bfloat16"] < 0.65
assert 6 < small.error["bfloat16"] / small.error["float16"] < 10
assert small.error["float32"] < 1e-4
falls_by = small.error["bfloat16"] / large.error["bfloat16"]
assert abs(falls_by / 100 - 1) < 0.3

# %% [markdown]
# **A merge into the original 16-bit base keeps the update.** Its projection is near 1. But the
# model is another one: the adapter was trained together with the quantisation error, 9 % of $W$,
# and this error is absent from the merged model. Only the smallest update loses 7 % of its length:
# the original is exactly on the values of bf16, and the nearest one is often the old one. NF4 has
# the same effect, much stronger.

# %%
assert abs(small.error["original"] * 0.003 - 0.092) < 0.005
assert reports[2].projection["original"] > 0.99
assert 0.85 < reports[0].projection["original"] < 0.98

# %% [markdown]
# **The nearest level of NF4 erases a small update.** The elements of $W$ are exactly on the 16
# levels. A change is kept only if it passes the midpoint between two levels, and half of the
# narrowest gap is 0.040 of the scale. So the base is a fixed point: up to 1 % almost no code
# changes. But the scale of each block changes, because it follows the largest element of the block.
# This adds noise as large as $\Delta W$, without its direction. From 10 % on, enough codes change
# to store the update.

# %%
levels = ml.dequantize_nf4(ml.quantize_nf4(torch.linspace(-1, 1, 64), double_quant=False)).unique()
gaps = levels.diff()
assert len(levels) == 16
assert 0.039 < gaps.min() / 2 < 0.041
for report in nearest[:3]:
    assert report.projection["nf4"] < 0.2
assert nearest[3].projection["nf4"] > 0.6
assert nearest[4].projection["nf4"] > 0.9

W = model[0].base_layer.dequantize(torch.float32)  # (out, in)
codes = model[0].base_layer.weight.packed  # two codes a byte
shares = []  # share of codes that change, for each size
for size in sizes:
    set_update(size)
    delta = adapter.delta(torch.float32).detach()  # (out, in)
    changed_bits = ml.quantize_nf4(W + delta).packed ^ codes
    low_codes = (changed_bits & 15) != 0
    high_codes = (changed_bits >> 4) != 0
    share = torch.cat([low_codes, high_codes]).float().mean().item()
    shares.append(share)
    print(f"size {size:.1%}: {share:.2%} of the codes change")
assert shares[1] < 0.001
assert shares[3] > 0.1
assert nearest[1].error["nf4"] > 1

# %% [markdown]
# **A draw between the two neighbouring levels keeps it on average.** In units of the scale, the
# merged value $x$ is between the levels $lo$ and $hi$. `ml.merge(model, "nf4")` takes $hi$ with
# probability $p = (x - lo) / (hi - lo)$ and $lo$ otherwise, with the scales of the base:
#
# $$E[\hat x] = lo + p\,(hi - lo) = x, \qquad
# \mathrm{Var}[\hat x] = (x - lo)(hi - x) \le |\Delta W| / \mathrm{absmax} \cdot (hi - lo)$$
#
# A row of 512 elements adds 512 independent errors, which mostly cancel, and 512 parts of the
# update, which do not. The projection is a little below 1, because elements at the levels $\pm 1$
# cannot grow. At 0.3 % the noise is 9 times as long as the update, so the cosine of stored change and
# update is about 0.1. Neither error nor cosine shows what a merge costs.

# %%
for report in reports[:4]:
    assert 0.9 < report.projection["nf4"] < 1.1
assert reports[0].error["nf4"] > 4
assert reports[0].cosine["nf4"] < 0.25

# %% [markdown]
# **The price is noise, which grows with the square root of the update.** Relative to $W$, the noise
# has the size $\mathrm{error} \cdot \|\Delta W\| / \|W\|$. Its variance is proportional to
# $|\Delta W|$ times the gap, so an update 10 times as large has $\sqrt{10} \approx 3.2$ times the
# noise. At 0.3 % the noise is 3 % of $W$, and the rounding of $W$ to NF4 is 9 %. When the update is
# as large as a gap, at 30 %, the noise is that of rounding at random, about 1.5 times that of the
# nearest level. There the nearest level with new scales is the better choice.

# %%
noise = [report.error["nf4"] * report.size for report in reports]
for size, value in zip(sizes, noise, strict=True):
    print(f"update {size:6.1%} of W: noise {value:.1%} of W")
assert 2.5 < noise[2] / noise[0] < 3.8
assert noise[0] < 0.03
assert nearest[4].error["nf4"] < reports[4].error["nf4"]

# %% [markdown]
# ## 2. Merging cannot be undone
#
# In bf16, adding an update and subtracting it again does not give the base: the sum was rounded.
# For this reason `ml.merge` makes a new model and does not change a byte of the given one.
# minilora has no `unmerge`.

# %%
set_update(0.1)
base = original[0].weight.detach()  # (out, in)
delta = adapter.delta(torch.float32).detach()  # (out, in)
merged = (base.float() + delta).bfloat16()
unmerged = (merged.float() - delta).bfloat16()
lost = (unmerged != base).float().mean().item()
print(f"{lost:.0%} of the base's weights differ after merging and unmerging")
assert lost > 0.05

packed_before = model[0].base_layer.packed.clone()
B_before = adapter.lora_B.clone()
ml.merge(model)
assert torch.equal(packed_before, model[0].base_layer.packed)
assert torch.equal(B_before, adapter.lora_B)

# %% [markdown]
# ## 3. A model that learned something
#
# SmolLM2-135M in 4 bits learns to name the chapter of a diagnosis. Then the report shows the error
# of merging in each layer, and held-out rows show the effect on the loss. On the command line, the
# same check is `minilora merge MODEL ADAPTER FOLDER --quantize nf4 --data rows.jsonl`.

# %%
source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
task = ml.samples.icd10(test_rows=TEST_ROWS, train_rows=TRAIN_ROWS)
model = ml.load_model(source, quantize="nf4")
ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"]))


def held_out_loss(model: nn.Module) -> float:
    """Return the loss on the held-out rows."""
    return ml.evaluate(model, tokenizer, task.test, max_new_tokens=0).loss


losses = {"base": held_out_loss(model)}
config = ml.TrainConfig(
    max_steps=STEPS, per_device_train_batch_size=8, learning_rate=2e-3, warmup_ratio=0.1
)
ml.train(model, tokenizer, task.train, config)
report = ml.merge_report(model)
print(report)
ml.plot.merge_error(report)

# %% [markdown]
# The next cell compares the losses of the base model, of the adapted model and of three merges. An
# error of the weights does not always raise the loss: the rounding of bf16 and the draws of NF4 have
# no preferred direction, and the loss hardly changes. With the nearest level of NF4 the update itself
# is lost, and the merged model is the base model again. So `minilora merge` decides by the loss on
# held-out rows: the share of what the adapter learned that is left, and the nats above the unmerged
# adapter. Without rows the projection decides. All models compute in the dtype that is fast on this
# hardware; the merged weights were rounded before.

# %%
losses["trained"] = held_out_loss(model)
dtype = model.lm_head.weight.dtype
losses["bfloat16"] = held_out_loss(ml.merge(model, "bfloat16").to(dtype))
losses["nf4"] = held_out_loss(ml.merge(model, "nf4"))
losses["nearest"] = held_out_loss(ml.merge(model, "nf4", rounding="nearest"))
for name, loss in losses.items():
    print(f"{name:<10}{loss:.4f}")
gain = losses["base"] - losses["trained"]
assert gain > 0
assert losses["bfloat16"] - losses["trained"] < 0.1 * gain
assert losses["nf4"] - losses["trained"] < 0.2 * gain
assert losses["nearest"] - losses["trained"] > 0.3 * gain

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
layer_sizes = [layer.size for layer in report.layers]
for target, colour in (("bfloat16", ORANGE), ("nf4", BLUE)):
    projections = [layer.projection[target] for layer in report.layers]
    left.plot(layer_sizes, projections, ".", color=colour, label=target)
left.set(
    title="each layer of the trained model",
    xlabel="‖ΔW‖ / ‖W‖",
    ylabel="projection on ΔW",
    ylim=(-0.1, 1.3),
)
left.legend(frameon=False)
right.bar(list(losses), list(losses.values()), color=["0.8", "0.4", ORANGE, BLUE, "0.6"])
right.set(title="held-out loss", ylabel="nats per token")
plt.tight_layout()
plt.show()

# %% [markdown]
# **Exercise.** Train with `learning_rate=2e-4` and read the report again. Which target would you
# still serve?
#
# <details><summary>Solution</summary>
#
# $\|\Delta W\|$ is several times smaller, so every error is larger relative to it. fp16 and fp32
# still contain the adapter. The nearest level of NF4 has lost it completely. The draws of NF4 keep
# it on average, with less noise than before, but the noise falls only with the square root of the
# update: check the loss before you use it. Another choice is to keep the adapter as a separate file
# next to the 4-bit base, which loses nothing.
#
# </details>
