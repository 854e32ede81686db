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
# **Question:** a training step of a 135-million-parameter model takes more than a gigabyte and more
# than a second. Which parts make up this memory and this time, which of them does the mathematics
# need, and how large is the rest?
#
# Bytes are counted and asserted. Milliseconds depend on the machine and its load, so they are
# printed and drawn. The asserts about operations hold on every machine: the fast implementation
# equals the reference implementation up to rounding. Everything runs on the CPU, where a clock
# needs no synchronisation. `benchmarks/gpu_kernels/kernel_bench.py` measures GPUs.

# %%
import os
import statistics
import time
from functools import partial

import matplotlib.pyplot as plt
import torch

import minilora as ml  # to install it, in the repository: pip install -e '.[gguf,plot]'
from minilora_kernels.ops.attention import attention
from minilora_kernels.ops.cross_entropy import linear_cross_entropy, plain_cross_entropy
from minilora_kernels.ops.rms_norm import rms_norm
from minilora_kernels.ops.rope import rotate
from minilora_kernels.ops.swiglu import gated

ROWS = 4  # B
LENGTH = 512  # T
REPEATS = 5  # timed runs of an operation
STEPS = 4  # training steps, the first is not timed

# Tests run a short form: fewer tokens, and every assert.
SHORT = bool(os.environ.get("MINILORA_SHORT"))
if SHORT:
    ROWS = 1
    LENGTH = 64
    REPEATS = 2
    STEPS = 2

source = ml.samples.smollm2()
model = ml.load_model(source, quantize="nf4", device="cpu")
ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear"))
print(ml.count_parameters(model))

config = model.config
dtype = model.model.norm.weight.dtype
N = ROWS * LENGTH  # tokens of a batch
D = config.hidden_size
inner = config.intermediate_size
heads = config.num_attention_heads
kv_heads = config.num_key_value_heads
head_dim = config.head_dim

# %% [markdown]
# ## 1. Bytes of the whole run
#
# A QLoRA model stores four kinds of data: half a byte for each weight of the linear layers, the
# scales of these weights, the embedding in 16 bits, and the adapters in fp32. Training adds a
# gradient and two moments to each trainable parameter, three times 4 bytes, and to no other
# parameter. Full fine-tuning needs them for every weight.

# %%
count = ml.count_parameters(model)
layer_count = 0
weights = 0
code_bytes = 0
for module in model.modules():
    if isinstance(module, ml.LoRALayer):
        layer_count += 1
        weights += module.in_features * module.out_features
        code_bytes += module.base_layer.packed.nbytes
assert layer_count == 7 * config.num_hidden_layers
assert code_bytes == weights / 2

run = ml.TrainConfig(per_device_train_batch_size=ROWS, max_length=LENGTH)
plan = ml.plan_memory(model, config=run)
print(plan)
assert plan.packed == code_bytes
assert plan.adapters == 4 * count.trainable
assert plan.optimizer >= 8 * count.trainable

full_run = ml.TrainConfig(method="full", per_device_train_batch_size=ROWS, max_length=LENGTH)
full_plan = ml.plan_memory(source, config=full_run)
print(f"\nfull fine-tuning: {full_plan.total / 1e9:.2f} GB")
print(f"of which moments: {full_plan.optimizer / 1e9:.2f} GB")
assert full_plan.optimizer > 20 * plan.optimizer

# %% [markdown]
# ## 2. Bytes that forward saves for backward
#
# Most of the rest are tensors that forward saves for backward. autograd saves the inputs of every
# operation that has a derivative, and a hook sees each of them. The reference implementations are
# written for reading, and they save the tensors that each of their statements needs. The fast
# implementations save only the tensors that the *formula* needs:
#
# - a norm saves its input and one number a row,
# - a gate saves its two inputs,
# - a LoRA layer saves r numbers a token,
# - attention saves q, k and v, but never the T × T weights.


# %%
def saved_bytes(forward) -> int:
    """Return the bytes that `forward` saves for backward, without the model's parameters."""
    parameter_addresses = set()
    for parameter in model.parameters():
        parameter_addresses.add(parameter.untyped_storage().data_ptr())
    sizes: dict[int, int] = {}  # address of a storage -> its bytes, so that each counts once

    def save(tensor):
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in parameter_addresses:
            sizes[address] = storage.nbytes()
        return tensor

    def load(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, load):
        output = forward()  # keeps every storage alive, so no address is used twice
    del output
    return sum(sizes.values())


# %% [markdown]
# The decoder layer needs cos and sin of the rotary position embedding: position $t$ has the angles
# $t \, \omega_i$ with $\omega_i = \theta^{-2i/d}$, once for each half of a head.

# %%
omega = config.rope.theta ** -(torch.arange(0, head_dim, 2) / head_dim)  # (d/2,)
angles = torch.arange(LENGTH)[:, None] * omega  # (T, d/2)
angles = torch.cat([angles, angles], dim=-1)[None, None]  # (1, 1, T, d)
cos = angles.cos().to(dtype)  # (1, 1, T, d)
sin = angles.sin().to(dtype)  # (1, 1, T, d)

layer = model.model.layers[0]
x = torch.randn(ROWS, LENGTH, D).to(dtype).requires_grad_()  # (B, T, D)


def forward_layer():
    return layer(x, (cos, sin), None, None)  # (B, T, D)


fast_bytes = saved_bytes(forward_layer)
with ml.reference_ops():
    reference_bytes = saved_bytes(forward_layer)

# The inputs of the two norms, q, the output of attention; k and v; gate and up.
numbers_per_token = 4 * D + 2 * kv_heads * head_dim + 2 * inner
needed_bytes = N * dtype.itemsize * numbers_per_token
print(f"a layer saves {reference_bytes / 1e6:.1f} MB with the reference implementations")
print(f"and {fast_bytes / 1e6:.1f} MB with the fast ones")
print(f"the largest tensors that the formulas need have {needed_bytes / 1e6:.1f} MB")
assert needed_bytes <= fast_bytes
assert fast_bytes <= 1.1 * needed_bytes
assert reference_bytes / 1.5 > 1.1 * needed_bytes

# %% [markdown]
# Gradient checkpointing saves only the input of a layer, and runs the layer again in backward. The
# saved bytes shrink by the factor below, at the cost of one more forward pass.

# %%
checkpointed_bytes = N * D * dtype.itemsize
factor = fast_bytes / checkpointed_bytes
print(f"a layer saves {checkpointed_bytes / 1e6:.1f} MB with gradient checkpointing")
print(f"this is {factor:.1f} times less")
assert factor > 8

# %% [markdown]
# ## 3. Bytes of the logits
#
# The loss needs one logit for each token and each word of the vocabulary. In fp32, all logits would
# take more memory than seven layers save. `linear_cross_entropy` computes them a chunk at a time,
# turns the chunk into its gradient at once, and uses the same memory for the next chunk.

# %%
logits_bytes = N * config.vocab_size * 4
layers_bytes = config.num_hidden_layers * fast_bytes
print(f"all logits in fp32: {logits_bytes / 1e6:.0f} MB")
print(f"saved by all layers: {layers_bytes / 1e6:.0f} MB")
assert logits_bytes > 7 * fast_bytes

rows = min(N, 256)
W = model.get_output_embeddings().weight  # (V, D)
hidden = torch.randn(rows, D).to(dtype).requires_grad_()  # (rows, D)
labels = torch.randint(0, config.vocab_size, (rows,))  # (rows,)
loss = linear_cross_entropy(hidden, W, labels)
(gradient,) = torch.autograd.grad(loss, hidden)  # (rows, D)

exact_hidden = hidden.detach().double().requires_grad_()  # (rows, D)
exact_loss = plain_cross_entropy(exact_hidden, W.double(), labels)
(exact_gradient,) = torch.autograd.grad(exact_loss, exact_hidden)  # (rows, D)
assert abs(loss - exact_loss) < 1e-3 * exact_loss
gradient_error = (gradient - exact_gradient).norm()
assert gradient_error < 2e-2 * exact_gradient.norm()

# The loss saves its gradient, and one byte a token: whether the token has a label.
loss_bytes = saved_bytes(partial(linear_cross_entropy, hidden, W, labels))
assert loss_bytes == hidden.nbytes + len(labels)

# %% [markdown]
# ## 4. Milliseconds of each operation
#
# Each operation runs forward and backward at the sizes of one layer. Inside `ml.reference_ops()` it
# takes its reference implementation, outside its fast one. The two run in turns, and the first run
# of each checks that the results agree.


# %%
def run_once(operation, inputs) -> tuple[float, list[torch.Tensor]]:
    """Run forward and backward; return the milliseconds, and the output with all gradients."""
    start = time.perf_counter()
    output = operation(*inputs)
    gradients = torch.autograd.grad(output, inputs, torch.ones_like(output))
    elapsed = 1e3 * (time.perf_counter() - start)
    return elapsed, [output, *gradients]


def compare(name, operation, inputs) -> tuple[float, float]:
    """Compare the reference implementation of an operation with the fast one.

    Args:
        name: Name to print.
        operation: Function of the inputs that follows `ml.reference_ops`.
        inputs: Tensors that require gradients.

    Returns:
        The median milliseconds of the reference and of the fast implementation.
    """
    with ml.reference_ops():
        _, expected = run_once(operation, inputs)
    _, results = run_once(operation, inputs)
    for result, reference in zip(results, expected, strict=True):
        error = (result - reference).float().norm()
        assert error <= 3e-2 * reference.float().norm()  # a few roundings in 16 bits

    reference_times = []
    fast_times = []
    for _ in range(REPEATS):
        with ml.reference_ops():
            elapsed, _ = run_once(operation, inputs)
        reference_times.append(elapsed)
        elapsed, _ = run_once(operation, inputs)
        fast_times.append(elapsed)
    reference_ms = statistics.median(reference_times)
    fast_ms = statistics.median(fast_times)
    print(f"{name:12} reference {reference_ms:7.2f} ms   fast {fast_ms:7.2f} ms")
    return reference_ms, fast_ms


generator = torch.Generator().manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    """Return random numbers that require a gradient."""
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def head_noise(head_count: int) -> torch.Tensor:
    """Return random heads (B, heads, T, d) with the memory layout after a projection."""
    return noise(ROWS, LENGTH, head_count, head_dim).transpose(1, 2)


norm = partial(rms_norm, weight=noise(D).detach(), eps=1e-5)
rotation = partial(rotate, cos=cos, sin=sin)
q = head_noise(heads)
k = head_noise(kv_heads)
v = head_noise(kv_heads)
gate = noise(ROWS, LENGTH, inner)
up = noise(ROWS, LENGTH, inner)

milliseconds = {
    "norm": compare("norm", norm, [x]),
    "rotation": compare("rotation", rotation, [q]),
    "attention": compare("attention", attention, [q, k, v]),
    "gate": compare("gate", gated, [gate, up]),
    "LoRA layer": compare("LoRA layer", layer.mlp.up_proj, [x]),
}

# %% [markdown]
# ## 5. A step compared with its lower bound
#
# A step cannot be faster than its matrix products. They can be counted. Forward multiplies by every
# weight once. Backward multiplies once more, for dX; the frozen weights have no dW. The same holds
# for the head. The time above this bound goes to attention, to memory traffic and to Python.

# %%
forward_flop = 2 * N * (weights + config.vocab_size * D)
step_flop = 2 * forward_flop

A = noise(N, D).detach()  # (N, D)
B = noise(D, inner).detach()  # (D, inner)
product_seconds = []
for _ in range(REPEATS + 1):
    start = time.perf_counter()
    A @ B
    product_seconds.append(time.perf_counter() - start)
rate = 2 * N * D * inner / statistics.median(product_seconds)  # FLOP a second
bound = step_flop / rate
print(f"matrix products of a step: {step_flop / 1e12:.2f} TFLOP")
print(f"one product alone runs at {rate / 1e9:.0f} GFLOP/s")
print(f"lower bound of a step: {bound:.2f} s")

model.train()
batch = torch.randint(0, config.vocab_size, (ROWS, LENGTH), generator=generator)  # (B, T)
objective = ml.SFT()
step_seconds = []
for _ in range(STEPS):
    start = time.perf_counter()
    loss_sum, _ = objective.loss(model, {"input_ids": batch, "labels": batch})
    (loss_sum / N).backward()
    step_seconds.append(time.perf_counter() - start)
step = statistics.median(step_seconds[1:])
print(f"a step takes {step:.2f} s, {step / bound:.1f} times its lower bound")
print(f"{N / step:,.0f} tokens a second")

# %%
bar_positions = torch.arange(len(milliseconds))
reference_ms = [pair[0] for pair in milliseconds.values()]
fast_ms = [pair[1] for pair in milliseconds.values()]
fig, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
axis.barh(bar_positions, reference_ms, 0.4, label="reference", color="0.75")
axis.barh(bar_positions + 0.4, fast_ms, 0.4, label="fast", color="#0072b2")
axis.set(title="operations of one layer, forward and backward", xlabel="ms")
axis.set_yticks(bar_positions + 0.2, list(milliseconds))
axis.invert_yaxis()
axis.legend()
plt.show()

# %% [markdown]
# The next picture shows the memory of section 1: a QLoRA step at its peak, and a step of full
# fine-tuning.

# %%
ml.plot.memory([plan, full_plan])

# %% [markdown]
# ## 6. Growth with length and rank
#
# The saved bytes grow linearly with the number of tokens. This holds for attention too, because
# backward computes its T × T weights again, block by block. The *time* of attention grows with the
# square of the length.
#
# A higher rank adds few saved bytes: r numbers a token in each layer. Adapters, gradients and
# moments grow in proportion to the rank.

# %%
per_token = []
for length in (256, 512, 1024, 2048):
    row = ml.TrainConfig(per_device_train_batch_size=1, max_length=length)
    activations = ml.plan_memory(model, config=row).activations
    per_token.append(activations / length)
    print(f"length {length}: {per_token[-1] / 1e3:.1f} kB saved for each token")
assert max(per_token) < 1.05 * min(per_token)


def plan_of_rank(r: int) -> ml.MemoryPlan:
    """Return the plan of this run with another rank."""
    lora = ml.LoRAConfig(r=r, target_modules="all-linear")
    return ml.plan_memory(source, lora, run, quantize="nf4")


low = plan_of_rank(8)
high = plan_of_rank(64)
print(f"rank 8: {low.total / 1e9:.3f} GB, rank 64: {high.total / 1e9:.3f} GB")
assert high.activations < 1.1 * low.activations
assert high.adapters == 8 * low.adapters

# %% [markdown]
# **Exercise.** Weights, adapters, gradients and moments do not depend on the length of a row. From
# which length on does one row save more bytes for backward than all of these? And with
# `gradient_checkpointing=True`?
#
# <details><summary>Solution</summary>
#
# ```python
# def first_length(checkpointing):
#     """Return the first power of two at which a row saves more than the constant parts."""
#     for exponent in range(6, 17):
#         length = 2**exponent
#         row = ml.TrainConfig(
#             per_device_train_batch_size=1,
#             max_length=length,
#             gradient_checkpointing=checkpointing,
#         )
#         p = ml.plan_memory(model, config=row)
#         base = p.packed + p.scales + p.dense
#         if p.activations > base + p.adapters + p.gradients + p.optimizer:
#             return length
#     raise ValueError("no length up to 65,536 is long enough")
#
#
# plain = first_length(False)
# checkpointed = first_length(True)
# print(f"from {plain} tokens on, with checkpointing from {checkpointed} tokens on")
# assert checkpointed >= 8 * plain
# ```
#
# The step also needs `p.workspace` and `p.logits`, each for a part of its time.
#
# </details>
