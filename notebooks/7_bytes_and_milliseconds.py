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
# # Where every byte and every millisecond goes
#
# **Question:** a training step of a 135-million-parameter model takes more than a gigabyte and more than a second. Of
# what are they made, which of them does the mathematics need, and what did the rest cost?
#
# Bytes are counted and asserted. Milliseconds are this machine's, now: they are printed and drawn, and what is asserted
# about them is only what holds on any machine, that the fast form computes what the plain one does. All runs on the
# CPU, whose clock waits for the work; what a GPU takes says `benchmarks/gpu_kernels/kernel_bench.py`.

# %%
import os
import statistics
import time

import matplotlib.pyplot as plt
import torch

import minilora as ml  # not there? In the repository's folder: pip install -e '.[gguf,plot]'
from minilora.lora.fused_linear import lora_linear, plain_lora_linear
from minilora.models.rope_config import frequencies, rotation
from minilora_kernels.ops.attention import attention, plain_attention
from minilora_kernels.ops.cross_entropy import linear_cross_entropy, plain_cross_entropy
from minilora_kernels.ops.rms_norm import plain_rms_norm, rms_norm
from minilora_kernels.ops.rope import plain_rotate, rotate
from minilora_kernels.ops.swiglu import gated, plain_gated

SHORT = bool(
    os.environ.get("MINILORA_SHORT")
)  # tests run this in a short form: fewer tokens, every assertion
ROWS, LENGTH, TURNS = (1, 64, 2) if SHORT else (4, 512, 5)
source = ml.samples.smollm2()
model = ml.load_model(source, quantize="nf4", device="cpu")
names = ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear"))
config, dtype = model.config, model.model.norm.weight.dtype
N, D, inner = ROWS * LENGTH, config.hidden_size, config.intermediate_size
print(ml.count_parameters(model))

# %% [markdown]
# ## 1. Bytes that stand still
#
# A QLoRA model is four kinds of bytes: half a byte a weight in the linear layers, their scales, the embedding in 16
# bits, and the adapters in fp32. Training adds a gradient and two moments to each trained number, and to no other:
# three times 4 bytes, where full fine-tuning pays them for every weight.

# %%
count = ml.count_parameters(model)
linears = [module.base_layer for module in model.modules() if isinstance(module, ml.LoRALayer)]
codes = sum(linear.packed.nbytes for linear in linears)
weights = sum(linear.in_features * linear.out_features for linear in linears)
assert codes == weights / 2 and len(linears) == 7 * config.num_hidden_layers
run = ml.TrainConfig(per_device_train_batch_size=ROWS, max_length=LENGTH)
plan = ml.plan_memory(model, config=run)
assert (
    plan.packed == codes
    and plan.adapters == 4 * count.trainable
    and plan.optimizer >= 8 * count.trainable
)
full = ml.plan_memory(
    source,
    config=ml.TrainConfig(method="full", per_device_train_batch_size=ROWS, max_length=LENGTH),
)
print(plan)
print(
    f"\nwith every parameter trained: {full.total / 1e9:.2f} GB, of which {full.optimizer / 1e9:.2f} GB moments"
)
assert full.optimizer > 20 * plan.optimizer

# %% [markdown]
# ## 2. Bytes that a step keeps
#
# What forward keeps for backward is most of the rest. autograd keeps the inputs of every operation that has a
# derivative; a hook sees each of them. The plain forms are written to be read, and keep what each of their statements
# needs. The fast forms keep what the *formula* needs: of a norm its input and a number a row; of a gate its two inputs;
# of a LoRA layer r numbers a token; of attention q, k and v and never the T × T weights.


# %%
def kept(forward) -> int:
    """Bytes that forward keeps for backward, weights aside, each storage once."""
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()  # held, so that no storage is freed and its place counted twice
    del held
    return sum(sizes.values())


layer = model.model.layers[0]
x = torch.randn(ROWS, LENGTH, D).to(dtype).requires_grad_()
rope = rotation(
    frequencies(config.rope_of("full_attention"), config.head_dim),
    torch.arange(LENGTH)[None],
    dtype,
)
fast_bytes = kept(lambda: layer(x, rope, None, None))
with ml.reference_ops():
    plain_bytes = kept(lambda: layer(x, rope, None, None))
size = dtype.itemsize
# x, q, k, v, attention's output, x again, gate and up
needed = N * size * (4 * D + 2 * config.num_key_value_heads * config.head_dim + 2 * inner)
print(
    f"a layer keeps {plain_bytes / 1e6:.1f} MB in plain forms, {fast_bytes / 1e6:.1f} MB in fast ones"
)
print(f"q, k, v, gate, up and the three inputs of its sums alone are {needed / 1e6:.1f} MB")
assert needed <= fast_bytes <= 1.1 * needed < plain_bytes / 1.5

# %% [markdown]
# Gradient checkpointing keeps a layer's input and nothing else, and runs the layer again in backward. It buys the
# factor below for the time of one more forward pass.

# %%
checkpointed = N * D * size
print(
    f"with gradient checkpointing {checkpointed / 1e6:.1f} MB: {fast_bytes / checkpointed:.1f} times less"
)
assert fast_bytes > 8 * checkpointed

# %% [markdown]
# ## 3. The bytes nobody sees: logits
#
# The loss looks at tokens × vocabulary numbers. In fp32 they would be more than everything the layers keep together;
# `linear_cross_entropy` makes them a chunk at a time, takes the gradient of the chunk at once, and writes the next one
# over it.

# %%
logits = N * config.vocab_size * 4
layers = config.num_hidden_layers * fast_bytes
print(f"all logits in fp32: {logits / 1e6:.0f} MB; what all layers keep: {layers / 1e6:.0f} MB")
W = model.get_output_embeddings().weight
hidden = torch.randn(min(N, 256), D).to(dtype).requires_grad_()
labels = torch.randint(0, config.vocab_size, (len(hidden),))
loss = linear_cross_entropy(hidden, W, labels)
(gradient,) = torch.autograd.grad(loss, hidden)
exact = hidden.detach().double().requires_grad_()
expected = plain_cross_entropy(exact, W.double(), labels)
(wanted,) = torch.autograd.grad(expected, exact)
assert abs(loss - expected) < 1e-3 * expected and (gradient - wanted).norm() < 2e-2 * wanted.norm()
# the gradient, and a byte a token: whether it is learned
assert kept(lambda: linear_cross_entropy(hidden, W, labels)) == hidden.nbytes + len(labels)

# %% [markdown]
# ## 4. Milliseconds, one op at a time
#
# Forward and backward of each op at the sizes of one layer, in its plain form and in its fast one, taken in turns.

# %%
heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
generator = torch.Generator().manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def turned(count: int) -> torch.Tensor:
    """(B, heads, T, d), as it lies after a projection."""
    return noise(ROWS, LENGTH, count, d).transpose(1, 2)


w = noise(D).detach()
up_proj = layer.mlp.up_proj
ops = {
    "norm": (
        lambda x: plain_rms_norm(x, w, 1e-5),
        lambda x: rms_norm(x, w, 1e-5),
        [noise(ROWS, LENGTH, D)],
    ),
    "rotate": (lambda x: plain_rotate(x, *rope), lambda x: rotate(x, *rope), [turned(heads)]),
    "attention": (plain_attention, attention, [turned(heads), turned(kv_heads), turned(kv_heads)]),
    "gate": (plain_gated, gated, [noise(ROWS, LENGTH, inner), noise(ROWS, LENGTH, inner)]),
    "LoRA layer": (
        lambda x: plain_lora_linear(up_proj, x),
        lambda x: lora_linear(up_proj, x),
        [noise(ROWS, LENGTH, D)],
    ),
}
milliseconds: dict[str, list[float]] = {}
for name, (plain, fast, inputs) in ops.items():
    times, outputs = {plain: [], fast: []}, []
    for turn in range(TURNS + 1):
        for form in (plain, fast):
            started = time.perf_counter()
            y = form(*inputs)
            gradients = torch.autograd.grad(y, inputs, torch.ones_like(y))
            times[form].append(1e3 * (time.perf_counter() - started))
            if turn == 0:
                outputs.append([y, *gradients])
    for found, wanted in zip(*outputs, strict=True):  # a few roundings of 16 bits apart
        assert (found - wanted).float().norm() <= 3e-2 * wanted.float().norm()
    milliseconds[name] = [statistics.median(times[form][1:]) for form in (plain, fast)]
    print(f"{name:12} plain {milliseconds[name][0]:7.2f} ms   fast {milliseconds[name][1]:7.2f} ms")

# %% [markdown]
# ## 5. A step beside its limit
#
# A step cannot be faster than its matrix products. They are counted: forward multiplies by every weight once, backward
# once more (for dX: the frozen weights have no dW), and the head does the same. What is above that is attention,
# movement of memory, and Python.

# %%
products = 2 * 2 * N * (weights + config.vocab_size * D)
A, B = noise(N, D), noise(D, inner).detach()
times = []
for _ in range(TURNS + 1):
    started = time.perf_counter()
    A.detach() @ B
    times.append(time.perf_counter() - started)
rate = 2 * N * D * inner / statistics.median(times)
model.train()
batch = torch.randint(0, config.vocab_size, (ROWS, LENGTH), generator=generator)
objective, seconds = ml.SFT(), []
for _ in range(2 if SHORT else 4):
    started = time.perf_counter()
    total, _ = objective.loss(model, {"input_ids": batch, "labels": batch})
    (total / N).backward()
    seconds.append(time.perf_counter() - started)
step = statistics.median(seconds[1:])
print(
    f"{products / 1e12:.2f} TFLOP of products; one alone runs at {rate / 1e9:.0f} GFLOP/s: {products / rate:.2f} s"
)
print(
    f"a step takes {step:.2f} s, {step * rate / products:.1f} times that: {N / step:,.0f} tokens a second"
)

figure, left = plt.subplots(figsize=(8, 3.4), layout="constrained")
places = range(len(milliseconds))
for offset, (form, colour) in enumerate({"plain": "0.75", "fast": "#0072b2"}.items()):
    left.barh(
        [p + 0.4 * offset for p in places],
        [m[offset] for m in milliseconds.values()],
        0.4,
        label=form,
        color=colour,
    )
left.set(
    title="one layer's ops, forward and backward", xlabel="ms", yticks=[p + 0.2 for p in places]
)
left.set_yticklabels(milliseconds)
left.invert_yaxis()
left.legend()
plt.show()

# %% [markdown]
# And the memory of section 1 as a picture: what a QLoRA step holds at its fullest, beside a step that trains all.

# %%
ml.plot.memory([plan, full])

# %% [markdown]
# ## 6. How it grows
#
# Everything kept grows with the tokens in a straight line, attention included, because its T × T weights are made again
# block by block; its *time* grows with the square of the length. The rank adds r numbers a token and layer, which is
# little, and multiplies what trains: adapters, gradients, moments.

# %%
lengths = [256, 512, 1024, 2048]
grown = [
    ml.plan_memory(model, config=ml.TrainConfig(per_device_train_batch_size=1, max_length=n))
    for n in lengths
]
per_token = [p.activations / n for p, n in zip(grown, lengths, strict=True)]
print("kept a token, KB:", [f"{b / 1e3:.1f}" for b in per_token])
assert max(per_token) < 1.05 * min(per_token)
ranks = {
    r: ml.plan_memory(source, ml.LoRAConfig(r=r, target_modules="all-linear"), run, quantize="nf4")
    for r in (8, 64)
}
print({r: f"{p.total / 1e9:.3f} GB" for r, p in ranks.items()})
assert (
    ranks[64].activations < 1.1 * ranks[8].activations
    and ranks[64].adapters == 8 * ranks[8].adapters
)

# %% [markdown]
# **Exercise.** From which length on does a row keep more for backward than everything that stands still, weights,
# adapters, gradients and moments? And with `gradient_checkpointing=True`?
#
# <details><summary>Solution</summary>
#
# ```python
# needed = {}
# for checkpointing in (False, True):
#     for T in [2**k for k in range(6, 17)]:
#         run = ml.TrainConfig(per_device_train_batch_size=1, max_length=T, gradient_checkpointing=checkpointing)
#         p = ml.plan_memory(model, config=run)
#         still = p.packed + p.scales + p.dense + p.adapters + p.gradients + p.optimizer
#         if p.activations > still:
#             needed[checkpointing] = T
#             break
# print(needed)
# assert needed[True] >= 8 * needed[False]
# ```
#
# What `p.workspace` and `p.logits` hold comes on top, and only while it is in use.
#
# </details>
