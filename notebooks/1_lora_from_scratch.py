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
# # LoRA from scratch
#
# **Question:** a layer has a million weights. How few trainable parameters are enough to teach it
# something new, and how can we check that they are enough?
#
# We write a LoRA layer by hand and test it on a toy problem with a known answer. Then we test
# whether a layer of a real model behaves like the toy. After each claim, a cell asserts it.

# %%
import importlib.util
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import minilora as ml  # if it is missing: pip install -e '.[gguf,plot]' in the repository

TEST_ROWS = 32
TRAIN_STEPS = 24
BATCH_SIZE = 8
REAL_RANKS = [1, 2, 4, 8, 16, 64, 576]
if os.environ.get("MINILORA_SHORT"):  # set by the tests: a short run with every assertion
    TEST_ROWS = 8
    TRAIN_STEPS = 4
    BATCH_SIZE = 4
    REAL_RANKS = [1, 8, 576]

BLUE = "#0072b2"
ORANGE = "#d55e00"
torch.manual_seed(0)

# %% [markdown]
# ## 1. The LoRA layer
#
# $$ h = W x + s \cdot B A x, \qquad s = \alpha / r. $$
#
# $W$ (out × in) is frozen. $A$ (r × in) maps a token to r numbers, and $B$ (out × r) maps these r
# numbers to the output. The product $BA$, which is added to $W$, has rank r at most. $A$ starts
# with random values, and $B$ starts at zero.


# %%
class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, r: int, s: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.s = s
        self.A = nn.Parameter(torch.empty(r, base.in_features))  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))  # (out, r)
        bound = 1 / base.in_features**0.5
        nn.init.uniform_(self.A, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, in) → (…, out)
        z = F.linear(x, self.A)  # A x, (…, r)
        update = F.linear(self.s * z, self.B)  # B (s A x), (…, out)
        return self.base(x) + update


base = nn.Linear(576, 1536, bias=False)
x = torch.randn(4, 576)
layer = LoRA(base, r=16, s=32 / 16)
assert torch.equal(layer(x), base(x))  # at step 0 the output is the base layer's, bit for bit

# %% [markdown]
# In the first step only $B$ receives a gradient. Let $g$ be the gradient of the loss with respect
# to $h$. The gradient of $B$ is $s \, g \, (A x)^\top$. The gradient of $A$ is
# $s \, B^\top g \, x^\top$, which is zero as long as $B$ is zero. After the first update of $B$,
# $A$ receives a gradient too. If both matrices started at zero, both gradients would stay zero.

# %%
loss = layer(x).square().mean()
loss.backward()
assert layer.B.grad.any()
assert not layer.A.grad.any()
assert base.weight.grad is None

optimizer = torch.optim.SGD([layer.A, layer.B], lr=1.0)
optimizer.step()
loss = layer(x).square().mean()
loss.backward()
assert layer.A.grad.any()

# %% [markdown]
# The LoRA layer of the library computes the same function: with the same $A$ and $B$, its output
# and its gradients are bit-equal to ours.

# %%
library_layer = ml.LoRALayer(base, r=16, lora_alpha=32)
adapter = library_layer.adapters["default"]
assert adapter.scaling == layer.s
with torch.no_grad():
    adapter.lora_A.copy_(layer.A)
    adapter.lora_B.copy_(layer.B)
assert torch.equal(layer(x), library_layer(x))

layer.zero_grad()
for each in (layer, library_layer):
    loss = each(x).square().mean()
    loss.backward()
assert torch.equal(layer.A.grad, adapter.lora_A.grad)
assert torch.equal(layer.B.grad, adapter.lora_B.grad)

# %% [markdown]
# $W$ has out · in weights. $A$ and $B$ together have r · (out + in) parameters, which is the share
# r / in + r / out of the weights.

# %%
total = base.weight.numel()
for r in (1, 8, 64):
    layer = LoRA(base, r, s=1.0)
    trainable = [p for p in layer.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    assert count == r * (576 + 1536)
    print(f"r = {r:2}: {count:8,} of {total:,} ({count / total:.1%})")

# %% [markdown]
# ## 2. A toy: how large must r be?
#
# A layer must learn the weight $W + \Delta$, where $\Delta$ has rank 4. Training sees only inputs
# and noisy outputs. For inputs with unit covariance, the theorem of Eckart and Young gives the
# smallest loss that is possible at rank r: the sum of the squares of the singular values of
# $\Delta$ that a matrix of rank r must leave out. Here the singular values are 4, 3, 2 and 1.5.
# **The loss curve has its elbow at the rank of the update.** A higher rank does not reduce the loss
# further.

# %%
ROWS = 4096


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    """Return a random matrix (rows, columns) with orthonormal columns."""
    random = torch.randn(rows, columns)
    return torch.linalg.qr(random).Q


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the squared error of a row, averaged over the rows."""
    difference = output - target  # (rows, out)
    return difference.square().sum(dim=1).mean()


def fit(
    layer: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    steps: int = 120,
    learning_rate: float = 5e-2,
) -> float:
    """Train the layer by Adam on batches of 256 rows, and return its squared error afterwards.

    Args:
        layer: Layer to train; parameters without requires_grad stay frozen.
        x: Inputs (rows, in).
        y: Target outputs (rows, out).
        steps: Number of optimiser steps.
        learning_rate: Learning rate of the first step; it decays to zero along a cosine.

    Returns:
        Squared error of a row, averaged over all rows.
    """
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(
        0, len(x), (steps, 256), generator=generator
    )  # (steps, 256) row numbers
    for batch in batches:
        optimizer.zero_grad()
        loss = squared_error(layer(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return squared_error(layer(x), y).item()


true_sigma = torch.tensor([4.0, 3.0, 2.0, 1.5])
toy_base = nn.Linear(96, 64, bias=False)
left = orthonormal(64, 4)  # (out, 4)
right = orthonormal(96, 4)  # (in, 4)
true_update = left * true_sigma @ right.T  # Δ, (out, in)

toy_x = ROWS**0.5 * orthonormal(ROWS, 96)  # xᵀ x / ROWS is the identity: unit covariance
noise = 0.01 * torch.randn(ROWS, 64)
toy_y = toy_base(toy_x).detach() + toy_x @ true_update.T + noise

# %%
toy_ranks = [1, 2, 3, 4, 5, 6, 8]
toy_losses = []
toy_bounds = []
for r in toy_ranks:
    loss = fit(LoRA(toy_base, r, s=2.0), toy_x, toy_y)
    left_out = true_sigma[r:]
    bound = left_out.square().sum().item()
    toy_losses.append(loss)
    toy_bounds.append(bound)
    print(f"r = {r}: loss {loss:8.4f}, lower bound {bound:.4f}")
    assert bound <= loss < 1.02 * bound + 0.01  # the noise adds 64 outputs · 0.01²

# %% [markdown]
# ## 3. The role of α
#
# The scale $s$ should keep the size of a training step the same when r changes. We test this on a
# layer that must learn an update of full rank. We measure the gradient of $B$ at step 0, and the
# share of the loss that 20 steps of Adam remove, with the same learning rate for all r.
#
# $A x$ has r entries, so its length grows with √r, and the gradient of $B$ grows with s √r. **With
# s = α/r the gradient shrinks as 1/√r. With s = α/√r (rsLoRA, `use_rslora=True`) it stays the
# same.** For this reason, with α/r a rank beyond some point does not learn more in the same number
# of steps, although it could represent more. With α/√r it does learn more.


# %%
def scale_lora(r: int) -> float:
    """Return s = α / r with α = 16."""
    return 16 / r


def scale_rslora(r: int) -> float:
    """Return s = α / √r with α = 8, which is equal to `scale_lora` at r = 4."""
    return 8 / r**0.5


SCALES = {"α/r": scale_lora, "α/√r": scale_rslora}
ranks = [4, 8, 16, 32, 64, 128, 256]
wide = nn.Linear(256, 256, bias=False)
inputs = torch.randn(256, 256)
full_rank_update = torch.randn(256, 256) / 16
goal = wide(inputs).detach() + inputs @ full_rank_update

gradients = {"α/r": [], "α/√r": []}
learned = {"α/r": [], "α/√r": []}
for name, scale in SCALES.items():
    for r in ranks:
        layer = LoRA(wide, r, scale(r))
        before = squared_error(layer(inputs), goal)
        before.backward()
        gradient = layer.B.grad.norm().item()
        after = fit(layer, inputs, goal, steps=20, learning_rate=3e-3)
        removed = 1 - after / before.item()
        gradients[name].append(gradient)
        learned[name].append(removed)
        print(f"{name:5} r = {r:3}: gradient {gradient:8.3f}, {removed:.0%} of the loss removed")

# %%
lora_change = gradients["α/r"][-1] / gradients["α/r"][0]
rslora_change = gradients["α/√r"][-1] / gradients["α/√r"][0]
assert 0.8 < 8 * lora_change < 1.25  # from r = 4 to 256, √r grows by a factor of 8
assert 0.8 < rslora_change < 1.25

at_32 = ranks.index(32)
assert learned["α/r"][-1] < 1.2 * learned["α/r"][at_32]
assert learned["α/√r"][-1] > 2 * learned["α/√r"][at_32]

# %%
fig, (elbow, gradient_axis, learned_axis) = plt.subplots(
    1, 3, figsize=(12, 3.6), layout="constrained"
)
bound_ranks = [0, *toy_ranks]
bounds = [true_update.square().sum().item(), *toy_bounds]
elbow.plot(toy_ranks, toy_losses, "o", color=BLUE, label="trained")
elbow.plot(bound_ranks, bounds, "-", color="0.6", zorder=0, label="lower bound")
elbow.set(title="an update of rank 4", xlabel="r", ylabel="squared error of a row")
elbow.legend(frameon=False)

colours = {"α/r": ORANGE, "α/√r": BLUE}
markers = {"α/r": "s--", "α/√r": "o-"}
for name, colour in colours.items():
    style = markers[name]
    gradient_axis.semilogx(ranks, gradients[name], style, color=colour, ms=4, label=name)
    learned_axis.semilogx(ranks, learned[name], style, color=colour, ms=4, label=name)
gradient_axis.set(title="gradient of B at step 0", xlabel="r", ylabel="‖dB‖", ylim=(0, None))
learned_axis.set(title="after 20 steps of Adam", xlabel="r", ylim=(0, None))
learned_axis.set_ylabel("share of the loss that is removed")
for axis in (gradient_axis, learned_axis):
    axis.set_xticks(ranks, ranks)
    axis.minorticks_off()
    axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. A real layer: is its update of low rank?
#
# The rank of the update that a real layer needs is not known, but we can measure it. We train all
# weights of one matrix of SmolLM2 to name the chapter of ICD-10-CM to which a diagnosis belongs.
# The resulting update ΔW may have any rank up to 576. Then we keep only its r largest singular
# values, and measure on held-out rows which share of the gain remains.

# %%
source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
task = ml.samples.icd10(test_rows=TEST_ROWS, train_rows=320)
model = ml.load_model(source, dtype="float32").requires_grad_(False)
path = "layers.20.mlp.down_proj"
weight = model.model.get_submodule(path).weight  # (576, 1536)
start = weight.detach().clone()


def held_out_loss() -> float:
    """Return the loss on held-out rows, in nats per token of the answer."""
    scores = ml.evaluate(model, tokenizer, task.test, max_new_tokens=0)
    return scores.loss


def train(learning_rate: float) -> None:
    """Train the parameters of the model that require a gradient."""
    config = ml.TrainConfig(
        learning_rate=learning_rate,
        max_steps=TRAIN_STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        warmup_ratio=0.1,
    )
    ml.train(model, tokenizer, task.train, config)


untrained_loss = held_out_loss()
weight.requires_grad_(True)
train(learning_rate=1e-3)
weight.requires_grad_(False)
delta = weight.detach() - start  # ΔW, (576, 1536)

# %%
U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)  # (576, 576), (576,), (576, 1536)


def truncated(r: int) -> torch.Tensor:
    """Return the matrix of rank r that is nearest to ΔW."""
    return (U[:, :r] * sigma[:r]) @ Vh[:r]


def missing_share(r: int) -> float:
    """Return the norm of the part of ΔW that rank r leaves out, over the norm of ΔW."""
    rest = delta - truncated(r)
    return (rest.norm() / delta.norm()).item()


missing = []
gains = []
for r in REAL_RANKS:
    weight.copy_(start + truncated(r))
    loss = held_out_loss()
    missing.append(missing_share(r))
    gains.append(untrained_loss - loss)
    print(f"r = {r:3}: {missing[-1]:.3f} of ΔW missing, loss {loss:.2f}")
weight.copy_(start)

full_gain = gains[-1]
kept = [gain / full_gain for gain in gains]
kept_at_8 = kept[REAL_RANKS.index(8)]
print(f"loss {untrained_loss:.2f} -> {untrained_loss - full_gain:.2f}")
print(f"8 of 576 directions have {kept_at_8:.0%} of that gain")
assert full_gain > 0
assert kept_at_8 > 0.8
assert missing == sorted(missing, reverse=True)

# %% [markdown]
# A few directions keep most of the gain. The rest of ΔW exists, but the loss on held-out rows does
# not need it. LoRA relies on this. However, LoRA does not know ΔW and must find the directions
# during training. So we train the same layer again, now with `ml.inject` and r = 8:

# %%
ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules=[path]))
count = ml.count_parameters(model).trainable
assert count == 8 * sum(weight.shape)

train(learning_rate=5e-3)
lora_gain = untrained_loss - held_out_loss()
lora_kept = lora_gain / full_gain
print(f"{count:,} parameters instead of {weight.numel():,}, and {lora_kept:.0%} of the gain")
assert lora_gain > 0

ml.eject(model)
assert torch.equal(weight, start)  # LoRA has not changed the frozen weight

# %% [markdown]
# ## 5. The update at each rank
#
# Each picture shows the upper left corner of ΔW, truncated to rank r. If ipywidgets is installed, a
# slider selects r.


# %%
def draw(axis, r: int) -> None:
    """Draw the upper left corner of ΔW, truncated to rank r."""
    limit = 3 * delta.std().item()
    corner = truncated(r)[:64, :64].cpu()
    axis.imshow(corner, cmap="PuOr", vmin=-limit, vmax=limit)
    axis.set(title=f"r = {r}\n{missing_share(r):.0%} missing", xticks=[], yticks=[])


if importlib.util.find_spec("ipywidgets"):
    import ipywidgets

    slider = ipywidgets.SelectionSlider(
        options=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 576], value=8
    )

    @ipywidgets.interact(r=slider)
    def show_rank(r: int) -> None:
        _, axis = plt.subplots(figsize=(4, 4))
        draw(axis, r)
        plt.show()


fig, axes = plt.subplots(1, 6, figsize=(12, 2.6), layout="constrained")
for axis, r in zip(axes, (1, 2, 8, 32, 128, 576), strict=True):
    draw(axis, r)

fig, (spectrum, kept_axis) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
spectrum.plot(range(1, 65), sigma[:64].cpu(), ".", color=BLUE)
spectrum.set(title=f"the update of {path}", ylim=0)
spectrum.set(xlabel="number of the singular value, largest first", ylabel="singular value")
kept_axis.semilogx(REAL_RANKS, kept, "o-", color=BLUE, label="all weights trained, truncated to r")
kept_axis.semilogx([8], [lora_kept], "X", color=ORANGE, ms=9, label="trained as LoRA, r = 8")
kept_axis.set(title="share of the gain on held-out rows", xlabel="r", ylabel="share")
kept_axis.set(ylim=(0, 1.08))
kept_axis.set_xticks(REAL_RANKS, REAL_RANKS)
kept_axis.minorticks_off()
kept_axis.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# **Exercise.** Freeze $A$ at its initial values and train $B$ alone. This saves the parameters and
# the gradient of $A$. Does the toy problem of section 2 still have its elbow at 4?
#
# <details><summary>Solution</summary>
#
# ```python
# for r in (1, 4, 16, 48, 96):
#     layer = LoRA(toy_base, r, s=2.0)
#     layer.A.requires_grad_(False)
#     loss = fit(layer, toy_x, toy_y)
#     remaining = loss / true_update.square().sum().item()
#     expected = 1 - r / 96
#     print(f"r = {r:2}: {remaining:.2f} of the loss remains, 1 - r / 96 is {expected:.2f}")
#     assert abs(remaining - expected) < 0.15
# ```
#
# No. A frozen $A$ selects r random directions out of 96. On average they contain the share r / 96
# of the four directions that matter, so the loss falls along a straight line. $A$ is the matrix
# that must learn *which* directions of the input matter.
#
# </details>
