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
# **Question:** an adapter can be folded into its base, $W' = W + \Delta W$ with $\Delta W = s\,BA$, and then it costs
# nothing at inference. But $W'$ has to be *stored*, in 16 bits or in 4. How much of $\Delta W$ survives that?
#
# Each claim below is followed by a cell that asserts it.

# %%
import os

import matplotlib.pyplot as plt
import torch
from torch import nn

import minilora as ml  # not there? In the repository's folder: pip install -e '.[gguf,plot]'
from minilora.tools.merge_report import merge_report

SHORT = bool(
    os.environ.get("MINILORA_SHORT")
)  # tests run this in a short form: fewer steps and rows, every assertion
torch.manual_seed(0)

# %% [markdown]
# ## 1. One matrix, and updates of every size
#
# A 512 × 512 weight, as a checkpoint has it in bf16 and as QLoRA trains on it in NF4, and a random update of rank 8,
# scaled so that $\|\Delta W\| = 0.3\% \ldots 100\%$ of $\|W\|$. `merge_report` measures, for each way to store it,
#
# - the **error**: the distance from what was trained, $\|W' - (W + \Delta W)\| / \|\Delta W\|$; at 1 it is as large as
#   everything the adapter does;
# - the **cosine** of what is left of the update, $W'$ minus its base, with $\Delta W$.

# %%
original = nn.Sequential(nn.Linear(512, 512, bias=False)).bfloat16()
nn.init.normal_(original[0].weight, std=0.02)
model = nn.Sequential(ml.NF4Linear.from_linear(original[0]))
ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules=["0"]))
adapter = model[0].adapters["default"]
unit = torch.randn(512, 8)
unit *= original[0].weight.float().norm() / (unit @ adapter.lora_A).norm()


def report_at(size):
    """The report for an update of this relative size."""
    with torch.no_grad():
        adapter.lora_B.copy_(size * unit)
    return merge_report(model, original).total


sizes = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
reports = [report_at(size) for size in sizes]
print("size    " + "".join(f"{target:>10}" for target in reports[0].error))
for size, report in zip(sizes, reports, strict=True):
    print(f"{size:<8}" + "".join(f"{error:10.2g}" for error in report.error.values()))

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6))
for target in reports[0].error:
    axes[0].loglog(sizes, [report.error[target] for report in reports], "o-", ms=3, label=target)
axes[0].axhline(1, color="0.7", lw=0.8)
axes[0].set(title="distance from the trained model", xlabel="‖ΔW‖ / ‖W‖", ylabel="error / ‖ΔW‖")
for target, colour in (("bfloat16", "#d55e00"), ("nf4", "#0072b2")):
    axes[1].semilogx(
        sizes, [report.cosine[target] for report in reports], "o-", ms=3, color=colour, label=target
    )
axes[1].set(
    title="what is left of the update",
    xlabel="‖ΔW‖ / ‖W‖",
    ylabel="cosine with ΔW",
    ylim=(-0.05, 1.05),
)
axes[0].legend(frameon=False, fontsize=8, ncols=2, loc="center left", bbox_to_anchor=(0, 0.4))
axes[1].legend(frameon=False)
plt.tight_layout()
plt.show()

# %% [markdown]
# **Rounding is as large as the weight, not as the update.** The error of a dtype is that of $W$, so relative to
# $\Delta W$ it falls as 1/size: a line of slope −1. At 0.3 % bf16 is half an adapter away from what was trained; fp16,
# with three more bits, eight times less; fp32 loses nothing.

# %%
small, large = reports[0], reports[4]  # 0.3 % and 30 %
assert 0.4 < small.error["bfloat16"] < 0.65
assert 6 < small.error["bfloat16"] / small.error["float16"] < 10
assert small.error["float32"] < 1e-4
assert abs(small.error["bfloat16"] / large.error["bfloat16"] / 100 - 1) < 0.3

# %% [markdown]
# **Onto the original 16-bit base** the update survives (its cosine is that of bf16), but the model is another one: the
# quantisation error, 9 % of $W$, which the adapter had learned to live with, is gone.

# %%
assert abs(small.error["original"] * 0.003 - 0.092) < 0.005
assert reports[2].cosine["original"] > 0.99

# %% [markdown]
# **Into NF4 again, a small update is erased.** $W$ lies exactly on the 16 levels, and a change is kept only where it
# crosses half the way to the next one. Up to 1 % hardly any code changes at all. What does change is the scale of each
# block, which follows the block's largest element: noise as large as $\Delta W$, with nothing of its direction. Only
# from 10 % on do enough codes move for the update to be recognised.

# %%
assert all(report.cosine["nf4"] < 0.15 for report in reports[:3])
assert reports[3].cosine["nf4"] > 0.6 and reports[4].cosine["nf4"] > 0.9
W = model[0].base_layer.dequantize(torch.float32)
codes = model[0].base_layer.weight.packed
shares = []
for size in sizes:
    report_at(size)
    again = ml.quantize_nf4(W + (adapter.lora_B @ adapter.lora_A).detach())
    changed = again.packed ^ codes
    shares.append(
        (((changed & 15) != 0).float().mean() + ((changed >> 4) != 0).float().mean()).item() / 2
    )
print(
    "codes that change:",
    ", ".join(f"{size:.1%}: {share:.2%}" for size, share in zip(sizes, shares, strict=True)),
)
assert shares[1] < 0.001 and reports[1].error["nf4"] > 1 and shares[3] > 0.1

# %% [markdown]
# ## 2. There is no way back
#
# In bf16, adding an update and taking it away again does not give the base: what the sum rounded off is lost. This is
# why `ml.merge` makes a new model and leaves the given one alone, byte for byte, and there is no `unmerge`.

# %%
report_at(0.1)
base = original[0].weight.detach()
delta = (adapter.lora_B @ adapter.lora_A).detach()
merged = (base.float() + delta).bfloat16()
unmerged = (merged.float() - delta).bfloat16()
lost = (unmerged != base).float().mean().item()
print(f"{lost:.0%} of the base's weights differ after merging and unmerging")
assert lost > 0.05

before = model[0].base_layer.packed.clone(), adapter.lora_B.clone()
ml.merge(model)
assert torch.equal(before[0], model[0].base_layer.packed) and torch.equal(before[1], adapter.lora_B)

# %% [markdown]
# ## 3. A model that learned something
#
# SmolLM2-135M in 4 bits learns to name the chapter of a diagnosis; then the report says, layer by layer, what merging
# would cost, and held-out rows say what that does to the loss. On the command line this is
# `minilora merge MODEL ADAPTER FOLDER --quantize nf4 --data rows.jsonl`.

# %%
source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
task = ml.samples.icd10(test_rows=32 if SHORT else 200, train_rows=64 if SHORT else 960)
model = ml.load_model(source, quantize="nf4")
ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"]))
untrained = ml.evaluate(model, tokenizer, task.test, max_new_tokens=0).loss
steps = 6 if SHORT else 60
config = ml.TrainConfig(
    max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-3, warmup_ratio=0.1
)
ml.train(model, tokenizer, task.train, config)
report = merge_report(model)
print(report)
ml.plot.merge_error(report)

# %% [markdown]
# The losses: of the adapted model, of two merges, and of the base without the adapter. A distance is not yet a damage:
# the rounding of bf16 points nowhere in particular, and the loss hardly notices it. In NF4 the update itself is gone,
# and the merged model is the base again. So the cosine is what `minilora merge` goes by: below 0.5 it refuses NF4.
# All compute in the dtype that this hardware is fast in; what merging rounded is in the weights.

# %%
dtype = model.lm_head.weight.dtype
losses = {
    "base": untrained,
    "trained": ml.evaluate(model, tokenizer, task.test, max_new_tokens=0).loss,
}
for target in ("bfloat16", "nf4"):
    losses[target] = ml.evaluate(
        ml.merge(model, target).to(dtype), tokenizer, task.test, max_new_tokens=0
    ).loss
for name, loss in losses.items():
    print(f"{name:<10}{loss:.4f}")
gain = losses["base"] - losses["trained"]
assert gain > 0
assert losses["bfloat16"] - losses["trained"] < 0.1 * gain
assert losses["nf4"] - losses["trained"] > 0.3 * gain

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6))
for target, colour in (("bfloat16", "#d55e00"), ("nf4", "#0072b2")):
    axes[0].plot([layer.size for layer in report.layers], [layer.cosine[target] for layer in report.layers], ".",
                 color=colour, label=target)  # fmt: skip
axes[0].set(
    title="each layer of the trained model",
    xlabel="‖ΔW‖ / ‖W‖",
    ylabel="cosine with ΔW",
    ylim=(-0.05, 1.05),
)
axes[0].legend(frameon=False)
axes[1].bar(list(losses), list(losses.values()), color=["0.8", "0.4", "#d55e00", "#0072b2"])
axes[1].set(title="held-out loss", ylabel="nats per token")
plt.tight_layout()
plt.show()

# %% [markdown]
# **Exercise.** Train with `learning_rate=2e-4` and read the report again. Which target would you still serve?
#
# <details><summary>Solution</summary>
#
# $\|\Delta W\|$ is several times smaller, so every error is as many times larger, and the cosine of bf16 falls too:
# look at the loss before trusting it. fp16 and fp32 still hold the adapter, NF4 nothing of it. Or keep the adapter
# beside the 4-bit base: that loses nothing.
#
# </details>
