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
# **Question:** a layer has a million weights. With how few numbers can it be taught something, and how does one know
# that they are enough?
#
# We write the layer by hand, try it on a toy whose answer is known, and then look whether a real layer of a real model
# behaves like the toy. Each claim is followed by a cell that asserts it.

# %%
import importlib.util
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import minilora as ml  # not there? In the repository's folder: pip install -e '.[gguf,plot]'

SHORT = bool(
    os.environ.get("MINILORA_SHORT")
)  # tests run this in a short form: fewer steps and rows, every assertion
torch.manual_seed(0)
BLUE, ORANGE = "#0072b2", "#d55e00"

# %% [markdown]
# ## 1. The layer in ten lines
#
# $$ h = W x + s \cdot B A x, \qquad s = \alpha / r. $$
#
# $W$ (out × in) is frozen. $A$ (r × in) takes a token down to r numbers, $B$ (out × r) takes these up again, and what
# they add to $W$ is a matrix of rank r at most. $A$ starts random, $B$ at zero.


# %%
class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, r: int, s: float):
        super().__init__()
        self.base, self.s = base.requires_grad_(False), s
        self.A = nn.Parameter(
            (2 * torch.rand(r, base.in_features) - 1) / base.in_features**0.5
        )  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))  # (out, r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, in) → (…, out)
        z = F.linear(x, self.A)  # A x, (…, r)
        return self.base(x) + F.linear(self.s * z, self.B)  # W x + B (s A x)


base = nn.Linear(576, 1536, bias=False)
x = torch.randn(4, 576)
layer = LoRA(base, r=16, s=32 / 16)
assert torch.equal(layer(x), base(x))  # at step 0 nothing has changed, to the bit

# %% [markdown]
# And at step 0 only $B$ can move. With $g$ for what comes back to $h$, its gradient is $s \, g \, (A x)^\top$ and that
# of $A$ is $s \, B^\top g \, x^\top$, which is zero as long as $B$ is. After one step of $B$, $A$ moves too. Were both
# zero at the start, neither ever would.

# %%
layer(x).square().mean().backward()
assert layer.B.grad.abs().max() > 0 and layer.A.grad.abs().max() == 0 and base.weight.grad is None
torch.optim.SGD([layer.A, layer.B], lr=1.0).step()
layer(x).square().mean().backward()
assert layer.A.grad.abs().max() > 0

# %% [markdown]
# The library's layer is this one: with the same numbers in $A$ and $B$ it gives the same bits, forward and backward.

# %%
theirs = ml.LoRALayer(base, r=16, lora_alpha=32)
adapter = theirs.adapters["default"]
with torch.no_grad():
    adapter.lora_A.copy_(layer.A)
    adapter.lora_B.copy_(layer.B)
layer.zero_grad()
layer(x).square().mean().backward()
theirs(x).square().mean().backward()
assert torch.equal(layer(x), theirs(x)) and layer.s == adapter.scaling
assert torch.equal(layer.A.grad, adapter.lora_A.grad) and torch.equal(
    layer.B.grad, adapter.lora_B.grad
)

# %% [markdown]
# $W$ has out · in numbers, $A$ and $B$ together r · (out + in). The share that trains is r / in + r / out.

# %%
for r in (1, 8, 64):
    count = sum(p.numel() for p in LoRA(base, r, 1.0).parameters() if p.requires_grad)
    assert count == r * (576 + 1536)
    print(f"r = {r:2}: {count:8,} of {base.weight.numel():,} ({count / base.weight.numel():.1%})")

# %% [markdown]
# ## 2. A toy: how large must r be?
#
# A layer is to become $W + \Delta$ with a $\Delta$ of rank 4, and we see inputs and noisy outputs only. For inputs of
# unit covariance the loss that a rank r cannot go below is known (Eckart and Young): the squares of the singular values
# of $\Delta$ that it has to leave out, here of 4, 3, 2 and 1.5. **The loss has its elbow at the rank of the update.**
# Beyond it more rank buys nothing.

# %%
sigma = torch.tensor([4.0, 3.0, 2.0, 1.5])
base = nn.Linear(96, 64, bias=False)
left, right = (
    torch.linalg.qr(torch.randn(n, 4)).Q for n in (64, 96)
)  # (out, 4), (in, 4), orthonormal
x = 64 * torch.linalg.qr(torch.randn(4096, 96)).Q  # xᵀ x / 4096 is the identity, exactly
y = base(x).detach() + x @ (left * sigma @ right.T).T + 0.01 * torch.randn(4096, 64)


def fit(
    layer: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int = 120, lr: float = 5e-2
) -> float:
    """Train what trains in `layer` by Adam on batches of 256; the squared error a row afterwards."""
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for rows in torch.randint(0, len(x), (steps, 256), generator=torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        (layer(x[rows]) - y[rows]).square().sum(1).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (layer(x) - y).square().sum(1).mean().item()


toy_ranks = [1, 2, 3, 4, 5, 6, 8]
losses = [fit(LoRA(base, r, s=2.0), x, y) for r in toy_ranks]
least = [sigma[r:].square().sum().item() for r in toy_ranks]
for r, loss, bound in zip(toy_ranks, losses, least, strict=True):
    print(f"r = {r}: {loss:8.4f}, at least {bound:.4f}")
    assert bound <= loss < 1.02 * bound + 0.01  # the noise is 64 outputs · 0.01²

# %% [markdown]
# ## 3. What α is for
#
# $s$ is to keep steps alike when r changes. Does it? On a layer that is to become quite another one (full rank), we
# look at the gradient of $B$ at step 0, and at what 20 steps of Adam take off the loss, at one learning rate for all r.
# $A x$ has r entries, so its length grows with √r, and the gradient with s √r. **With s = α/r it shrinks as 1/√r; with
# s = α/√r (rsLoRA, `use_rslora=True`) it stays.** And so, with α/r, rank beyond some point learns no more in the same
# steps, though it could; with α/√r it does.

# %%
wide = nn.Linear(256, 256, bias=False)
inputs = torch.randn(256, 256)
goal = wide(inputs).detach() + inputs @ torch.randn(256, 256) / 16
ranks = [4, 8, 16, 32, 64, 128, 256]
SCALES = {"α/r": lambda r: 16 / r, "α/√r": lambda r: 8 / r**0.5}  # equal at r = 4
gradients, learned = ({name: [] for name in SCALES} for _ in range(2))
for name, s in SCALES.items():
    for r in ranks:
        layer = LoRA(wide, r, s(r))
        (before := (layer(inputs) - goal).square().mean()).backward()
        gradients[name].append(layer.B.grad.norm().item())
        learned[name].append(1 - fit(layer, inputs, goal, 20, 3e-3) / (256 * before.item()))
    print(
        f"{name:5}",
        *(f"{g:.4f}" for g in gradients[name]),
        " learned",
        *(f"{v:.2f}" for v in learned[name]),
    )
fall = gradients["α/r"][-1] / gradients["α/r"][0]  # r grew 64 times, √64 = 8
assert 0.8 < 8 * fall < 1.25 and 0.8 < gradients["α/√r"][-1] / gradients["α/√r"][0] < 1.25
assert learned["α/r"][-1] < 1.2 * learned["α/r"][3] and learned["α/√r"][-1] > 2 * learned["α/√r"][3]

# %%
fig, (elbow, gradient, after) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
elbow.plot(toy_ranks, losses, "o", color=BLUE, label="trained")
elbow.plot(
    [0, *toy_ranks],
    [sigma.square().sum(), *least],
    "-",
    color="0.6",
    zorder=0,
    label="the least there is",
)
elbow.set(title="an update of rank 4", xlabel="r", ylabel="squared error a row")
elbow.legend(frameon=False)
for (name, found), colour, style in zip(
    gradients.items(), (ORANGE, BLUE), ("s--", "o-"), strict=True
):
    gradient.semilogx(ranks, found, style, color=colour, ms=4, label=name)
    after.semilogx(ranks, learned[name], style, color=colour, ms=4, label=name)
gradient.set(title="gradient of B at step 0", xlabel="r", ylabel="‖dB‖", ylim=(0, None))
after.set(
    title="after 20 steps of Adam", xlabel="r", ylabel="share of the loss taken off", ylim=(0, None)
)
for axis in (gradient, after):
    axis.set_xticks(ranks, ranks)
    axis.minorticks_off()
    axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. A real layer: is its update of low rank?
#
# Nobody tells us the rank of what a real layer has to learn, but we can look. One matrix of SmolLM2 is trained *whole*,
# every weight of it, to name the chapter of ICD-10-CM that a diagnosis belongs to. The update that comes out is free to
# have rank 576. Then we cut it down to its r largest singular values and ask held-out rows what is left of the gain.

# %%
source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
task = ml.samples.icd10(test_rows=8 if SHORT else 32, train_rows=320)
model = ml.load_model(source, dtype="float32").requires_grad_(False)
path = "layers.20.mlp.down_proj"
weight = model.model.get_submodule(path).weight  # (576, 1536)
start = weight.detach().clone()


def held_out() -> float:
    """Loss on held-out rows, in nats a token of the answer."""
    return ml.evaluate(model, tokenizer, task.test, max_new_tokens=0, batch_size=32).loss


def train(learning_rate: float) -> None:
    batch = {
        "max_steps": 4 if SHORT else 24,
        "per_device_train_batch_size": 4 if SHORT else 8,
        "warmup_ratio": 0.1,
    }
    ml.train(model, tokenizer, task.train, ml.TrainConfig(learning_rate=learning_rate, **batch))


untrained = held_out()
weight.requires_grad_(True)
train(1e-3)
weight.requires_grad_(False)
delta = weight.detach() - start
U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)  # (576, 576), (576,), (576, 1536)


def cut(r: int) -> torch.Tensor:  # of all matrices of rank r the one nearest to the update
    return (U[:, :r] * sigma[:r]) @ Vh[:r]


real_ranks = [1, 8, 576] if SHORT else [1, 2, 4, 8, 16, 64, 576]
missing, gains = [], []
for r in real_ranks:
    weight.copy_(start + cut(r))
    missing.append(((delta - cut(r)).norm() / delta.norm()).item())
    gains.append(untrained - held_out())
    print(f"r = {r:3}: {missing[-1]:.3f} of ΔW missing, loss {untrained - gains[-1]:.2f}")
weight.copy_(start)
eight = (kept := [gain / gains[-1] for gain in gains])[real_ranks.index(8)]
print(
    f"loss {untrained:.2f} -> {untrained - gains[-1]:.2f}; 8 of 576 directions have {eight:.0%} of that gain"
)
assert gains[-1] > 0 and eight > 0.8 and missing == sorted(missing, reverse=True)

# %% [markdown]
# The gain is kept by far fewer directions than the matrix: the rest of ΔW is there, but held-out rows do not need it.
# This is what LoRA counts on. It does not get to see ΔW, though, and has to find the directions while it trains. So the
# same layer again, with `ml.inject` and r = 8:

# %%
ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules=[path]))
count = ml.count_parameters(model).trainable
train(5e-3)
lora_gain = untrained - held_out()
print(
    f"{count:,} numbers instead of {weight.numel():,}, and {lora_gain / gains[-1]:.0%} of the gain"
)
assert count == 8 * sum(weight.shape) and lora_gain > 0
ml.eject(model)
assert torch.equal(weight, start)  # never touched

# %% [markdown]
# ## 5. Turning r
# What of ΔW is there at each rank: its upper left corner. Where ipywidgets is installed there is a slider, too.


# %%
def draw(axis, r: int) -> None:
    axis.imshow(
        cut(r)[:64, :64].cpu(),
        cmap="PuOr",
        vmin=-3 * delta.std().item(),
        vmax=3 * delta.std().item(),
    )
    axis.set(
        title=f"r = {r}\n{(delta - cut(r)).norm() / delta.norm():.0%} missing", xticks=[], yticks=[]
    )


if importlib.util.find_spec("ipywidgets"):
    import ipywidgets

    @ipywidgets.interact(
        r=ipywidgets.SelectionSlider(options=[2**i for i in range(10)] + [576], value=8)
    )
    def turn(r: int) -> None:
        draw(plt.subplots(figsize=(4, 4))[1], r)
        plt.show()


fig, axes = plt.subplots(1, 6, figsize=(12, 2.6), layout="constrained")
for axis, r in zip(axes, (1, 2, 8, 32, 128, 576), strict=True):
    draw(axis, r)
fig, (spectrum, kept_axis) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
spectrum.plot(range(1, 65), sigma[:64].cpu(), ".", color=BLUE)
spectrum.set(
    title=f"the update of {path}", xlabel="which, largest first", ylabel="singular value", ylim=0
)
kept_axis.semilogx(real_ranks, kept, "o-", color=BLUE, label="trained whole, cut to r")
kept_axis.semilogx(
    [8], [lora_gain / gains[-1]], "X", color=ORANGE, ms=9, label="trained as LoRA, r = 8"
)
kept_axis.set(
    title="what is left of the gain on held-out rows", xlabel="r", ylabel="share", ylim=(0, 1.08)
)
kept_axis.set_xticks(real_ranks, real_ranks)
kept_axis.minorticks_off()
kept_axis.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# **Exercise.** Freeze $A$ where it starts and train $B$ alone: half the numbers, and no gradient has to go through $A$.
# Does the toy of section 2 still have its elbow at 4?
#
# <details><summary>Solution</summary>
#
# ```python
# base = nn.Linear(96, 64, bias=False)
# y = base(x).detach() + x @ (left * torch.tensor([4.0, 3.0, 2.0, 1.5]) @ right.T).T
# for r in (1, 4, 16, 48, 96):
#     layer = LoRA(base, r, s=2.0)
#     layer.A.requires_grad_(False)
#     share = fit(layer, x, y) / (16 + 9 + 4 + 2.25)
#     print(f"r = {r:2}: {share:.2f} of the loss is left, 1 - r / 96 is {1 - r / 96:.2f}")
#     assert abs(share - (1 - r / 96)) < 0.15
# ```
#
# No. A fixed $A$ sees r random directions of 96, and of the four that matter only the share r / 96 lies in them: the
# loss falls in a straight line. Of the two matrices it is $A$ that finds *where* to look.
#
# </details>
