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
# # QLoRA, end to end
#
# **Question:** the 134.5 million weights of a model are frozen in 4 bits, and 4.9 million adapter
# parameters are trained for a few minutes. Does the model learn the task, does it forget other
# abilities, and which part of the weights changes?
#
# A score after training means little without a comparison. So each score appears together with the
# score before training, with baselines that need no model, and with its cost in memory. A cell with
# an assert follows each claim.

# %%
import os
import tempfile
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import minilora as ml  # to install it, in the repository: pip install -e '.[gguf,plot]'

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DARK_BLUE = "#0072b2"
LIGHT_BLUE = "#56b4e9"

TEST_ROWS = 150
TRAIN_ROWS = 600
PROSE_ROWS = 12
PROSE_CHARACTERS = 600
ANSWER_TOKENS = 24
BATCH_SIZE = 12
STEPS = 50
EVAL_STEPS = 10
LAYER_STRIDE = 10  # section 8 decomposes every tenth layer of a kind

# Tests run a short form: fewer rows and steps, and every assert that holds for them.
SHORT = bool(os.environ.get("MINILORA_SHORT"))
if SHORT:
    TEST_ROWS = 8
    TRAIN_ROWS = 64
    PROSE_ROWS = 2
    PROSE_CHARACTERS = 300
    ANSWER_TOKENS = 8
    BATCH_SIZE = 4
    STEPS = 4
    EVAL_STEPS = 2
    LAYER_STRIDE = 30

source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
model = ml.load_model(source, quantize="nf4")

# %% [markdown]
# ## 1. The task, and two baselines without a model
#
# The model reads a diagnosis and names its chapter of ICD-10-CM, one of 22. Whole disease
# categories are held out. So no test row has a close relative among the training rows, such as
# "…, left eye" and "…, right eye".
#
# Two baselines need no model. The first always answers the most frequent chapter. The second
# answers the chapter of the training row that shares the most words with the question.

# %%
task = ml.samples.icd10(test_rows=TEST_ROWS, train_rows=TRAIN_ROWS)
majority = ml.samples.majority_class(task.train, task.test)
neighbour = ml.samples.nearest_neighbour(task.train, task.test)
for turn in task.train[0]["messages"]:
    print(f"{turn['role']:>10}: {turn['content']}")
print(f"{len(task.train)} training rows, {len(task.test)} held-out rows. {task.source}")
assert len(task.labels) == 22
train_texts = {str(row) for row in task.train}
test_texts = {str(row) for row in task.test}
assert not train_texts & test_texts

# %% [markdown]
# ## 2. Before training
#
# *Exact match* requires the exact word for the chapter, and the model does not know these words
# yet. *Label accuracy* compares only the likelihoods of the 22 words. It measures knowledge of the
# task apart from the form of the answer. Perplexity on English prose and three unrelated questions
# will show which abilities training damages.

# %%
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
]
prose = ml.samples.prose(rows=PROSE_ROWS, characters=PROSE_CHARACTERS)


def measure() -> tuple[ml.Scores, float, list[str]]:
    """Return the scores on the task, the perplexity on prose and the answers to QUESTIONS."""
    scores = ml.evaluate(
        model, tokenizer, task.test, labels=task.labels, max_new_tokens=4, batch_size=64
    )
    perplexity = ml.evaluate(model, tokenizer, prose).perplexity
    answers = ml.generate(model, tokenizer, QUESTIONS, max_new_tokens=ANSWER_TOKENS)
    return scores, perplexity, answers


before, prose_before, answers_before = measure()
device = next(model.parameters()).device
tokens = torch.tensor([tokenizer.encode(QUESTIONS[0])], device=device)  # (1, T)
with torch.no_grad():
    logits_before = model(tokens)  # (1, T, V)

# %% [markdown]
# ## 3. An adapter on every layer, and the memory of training
#
# `inject` adds $A$ and $B$ to all 210 linear layers. `plan_memory` predicts the memory of training
# before training starts. Weights and optimiser state are exact to the byte, because the plan counts
# the same parameters as `count_parameters`. The rest comes from one step on shapes alone. For
# comparison, the cell also plans LoRA on 16-bit weights and the training of all weights.

# %%
names = ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
count = ml.count_parameters(model)
print(count)
assert len(names) == 7 * 30
assert count.trainable == 4_884_480
assert round(count.total - count.trainable, -5) == 134_500_000

layers = {}
initial_A = {}
for path, module in model.named_modules():
    if isinstance(module, ml.LoRALayer):
        layers[path] = module
        initial_A[path] = module.adapters["default"].lora_A.detach().clone()  # (r, in)

folder = Path(tempfile.mkdtemp())
config = ml.TrainConfig(
    output_dir=str(folder),
    max_steps=STEPS,
    per_device_train_batch_size=BATCH_SIZE,
    max_length=64,
    learning_rate=1e-3,
    warmup_ratio=0.1,
    logging_steps=1,
    eval_steps=EVAL_STEPS,
    save_steps=None,
)
plan = ml.plan_memory(model, config=config)
assert plan.packed + plan.scales + plan.dense + plan.adapters == count.stored_bytes

lora_config = ml.LoRAConfig(r=16, target_modules="all-linear")
lora_plan = ml.plan_memory(source, lora_config, config)
full_config = ml.TrainConfig(method="full", per_device_train_batch_size=BATCH_SIZE, max_length=64)
full_plan = ml.plan_memory(source, config=full_config)
print(f"QLoRA            {plan.total / 1e9:.2f} GB")
print(f"LoRA             {lora_plan.total / 1e9:.2f} GB")
print(f"full fine-tuning {full_plan.total / 1e9:.2f} GB")
assert plan.total < lora_plan.total < full_plan.total
ml.plot.memory([plan, lora_plan, full_plan])

# %% [markdown]
# ## 4. Training

# %%
result = ml.train(model, tokenizer, task.train, config, eval_dataset=task.test[:32])
print(f"{result.tokens_per_second:,.0f} tokens a second")
print(f"peak memory of the process: {result.peak_memory_bytes / 1e9:.2f} GB")
if not SHORT:
    assert result.losses[-1] < result.losses[0] / 2
ml.plot.runs(folder)

# %% [markdown]
# ## 5. After training
#
# The last two rows of the table are the baselines without a model. They are the scores to beat.

# %%
after, prose_after, answers_after = measure()
print(f"{'':20}{'before':>8}{'after':>8}")
print(f"{'exact match':20}{before.exact_match:8.3f}{after.exact_match:8.3f}")
print(f"{'label accuracy':20}{before.label_accuracy:8.3f}{after.label_accuracy:8.3f}")
print(f"{'loss':20}{before.loss:8.3f}{after.loss:8.3f}")
print(f"{'perplexity, prose':20}{prose_before:8.2f}{prose_after:8.2f}")
print(f"{'majority class':20}{'':8}{majority:8.3f}")
print(f"{'nearest neighbour':20}{'':8}{neighbour:8.3f}")
interval = after.interval(after.label_accuracy)
print(f"{after.answers} rows, 95 % interval ± {interval:.3f}")
assert after.loss < before.loss
if not SHORT:
    assert after.label_accuracy - interval > before.label_accuracy
    assert after.label_accuracy - interval > majority

# %% [markdown]
# Exact match needs two abilities: the model must use one of the 22 words, and it must choose the
# right one. Before training, the model almost never gives the right word. After training, exact
# match and label accuracy are equal within the interval: the model has learned the 22 words. The
# rise of `label_accuracy` shows how far it has also learned to choose among them.

# %%
assert before.exact_match < 0.1
if not SHORT:
    assert abs(after.exact_match - after.label_accuracy) < interval

bars = {
    "exact match\nbefore": before.exact_match,
    "exact match\nafter": after.exact_match,
    "label accuracy\nbefore": before.label_accuracy,
    "label accuracy\nafter": after.label_accuracy,
    "majority\nclass": majority,
    "nearest\nneighbour": neighbour,
}
colours = [LIGHT_BLUE, DARK_BLUE, LIGHT_BLUE, DARK_BLUE, "0.8", "0.6"]
fig, (left, right) = plt.subplots(
    1, 2, figsize=(11, 3.4), layout="constrained", width_ratios=(3, 2)
)
left.bar(list(bars), list(bars.values()), color=colours)
left.errorbar(
    [1, 3],
    [after.exact_match, after.label_accuracy],
    interval,
    fmt="none",
    color="black",
    capsize=3,
)
left.set(title="share of right answers on held-out rows", ylabel="share", ylim=(0, 1))
left.tick_params("x", labelsize=9)
right.bar(["before", "after"], [prose_before, prose_after], 0.6, color=[LIGHT_BLUE, DARK_BLUE])
right.set(title="English prose", ylabel="perplexity")
plt.show()

# %% [markdown]
# ## 6. Forgetting
#
# The training data contains no other task, and all 600 answers are one word. So the model now
# answers unrelated questions in this form too, and its perplexity on prose is higher. The base
# model itself has lost nothing. **With the adapter disabled, every logit is bit-equal to the logit
# before training.**

# %%
for question, old, new in zip(QUESTIONS, answers_before, answers_after, strict=True):
    print(question)
    print(f"  before: {old!r}")
    print(f"  after:  {new!r}")
with torch.no_grad(), ml.disable_adapters(model):
    assert torch.equal(model(tokens), logits_before)
if not SHORT:
    assert prose_after > prose_before

# %% [markdown]
# ## 7. The size of the update in each layer
#
# The update of a layer is a matrix $\Delta W = s B A$ of rank at most 16. The left panel shows its
# singular values. The right panel shows its norm relative to $W$, one cell a layer. The next cell
# asserts that the update is small compared with $W$, and that $A$ stays close to its random start.

# %%
ml.plot.spectra(model)

# %%
relative_sizes = defaultdict(list)  # kind of layer -> ‖ΔW‖ / ‖W‖ of each layer
movements = []  # ‖A - A at the start‖ / ‖A at the start‖ of each layer
for path, layer in layers.items():
    W = layer.base_layer.dequantize(torch.float32)  # (out, in)
    adapter = layer.adapters["default"]
    delta = adapter.delta(torch.float32).detach()  # (out, in)
    kind = path.rpartition(".")[2]
    relative_size = delta.norm() / W.norm()
    relative_sizes[kind].append(relative_size.item())
    start = initial_A[path]  # (r, in)
    movement = (adapter.lora_A - start).norm() / start.norm()
    movements.append(movement.item())

for kind, sizes in relative_sizes.items():
    mean = sum(sizes) / len(sizes)
    print(f"{kind:10} ‖ΔW‖ / ‖W‖: {min(sizes):.3f} to {max(sizes):.3f}, mean {mean:.3f}")
    assert max(sizes) < 0.1
mean_movement = sum(movements) / 210
print(f"A moved by {mean_movement:.2f} of its length on average, at most {max(movements):.2f}")
assert mean_movement < 0.5

# %% [markdown]
# ## 8. The directions of W that the update uses
#
# With $W = \sum_i \sigma_i u_i v_i^\top$, the layer maps the input direction $v_i$ to the output
# direction $u_i$, with strength $\sigma_i$. The share of $\|\Delta W\|^2$ along $v_i$ is
# $\|\Delta W v_i\|^2 / \|\Delta W\|^2$. The share along $u_i$ is
# $\|u_i^\top \Delta W\|^2 / \|\Delta W\|^2$.
#
# The curves below add up these shares, from the largest $\sigma_i$ to the smallest. An update that
# is independent of W gives the diagonal. If a matrix is not square, W does not use some directions
# of its longer side. They come last.


# %%
def cumulative_share(directions: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return the share of ‖ΔW‖² along the first i directions, for i = 1 … d.

    Args:
        directions: The n directions that W uses, orthonormal, (n, d).
        delta: ΔW or its transpose, (d, m).

    Returns:
        The shares, (d,). The last d - n directions, which W does not use, share the rest evenly.
    """
    projections = directions @ delta  # (n, m)
    squares = projections.square().sum(1)  # (n,)
    used = squares.cumsum(0) / delta.square().sum()  # (n,)
    unused = directions.shape[1] - len(used)
    rest = torch.linspace(used[-1].item(), 1, unused + 1)  # (d - n + 1,)
    return torch.cat([used, rest[1:]])  # (d,)


def input_and_output_shares(layer: ml.LoRALayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cumulative shares of ‖ΔW‖² along W's input directions and output directions."""
    W = layer.base_layer.dequantize(torch.float32).cpu()  # (out, in)
    delta = layer.adapters["default"].delta(torch.float32).detach().cpu()  # (out, in)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)  # (out, n), (n,), (n, in)
    inputs = cumulative_share(Vh, delta.T)  # (in,)
    outputs = cumulative_share(U.T, delta)  # (out,)
    return inputs, outputs


fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
colours = plt.colormaps["viridis"](torch.linspace(0, 0.9, len(KINDS)))
dashes = ["-", "--", "-.", ":", "-", "--", "-."]
input_excess = {}  # kind of layer -> mean height of its curve above the diagonal
output_excess = {}
for kind, colour, dash in zip(KINDS, colours, dashes, strict=True):
    same_kind = [layer for path, layer in layers.items() if path.endswith(kind)]
    shares = [input_and_output_shares(layer) for layer in same_kind[::LAYER_STRIDE]]
    for side, excess in enumerate((input_excess, output_excess)):
        curve = torch.stack([pair[side] for pair in shares]).mean(0)  # (d,)
        diagonal = torch.arange(1, len(curve) + 1) / len(curve)  # (d,)
        axes[side].plot(diagonal, curve, dash, color=colour, label=kind)
        excess[kind] = (curve - diagonal).mean().item()
    print(f"{kind:10} above the diagonal:", end=" ")
    print(f"input {input_excess[kind]:+.3f}, output {output_excess[kind]:+.3f}")

for axis, side in zip(axes, ("input", "output"), strict=True):
    axis.plot([0, 1], [0, 1], color="0.7", zorder=0)
    axis.set_title(f"ΔW along the {side} directions of W")
    axis.set_xlabel("share of the directions, largest σ first")
axes[0].set_ylabel("share of ‖ΔW‖²")
handles, labels = axes[0].get_legend_handles_labels()
fig.legend(handles, labels, frameon=False, loc="outside right center")
plt.show()

assert max(input_excess.values()) < 0.06
assert min(input_excess.values()) > -0.06
for kind in ("q_proj", "k_proj"):
    assert output_excess[kind] > 0.03
    assert output_excess[kind] > input_excess[kind]

# %% [markdown]
# The curves of the input directions are near the diagonal: $A$ starts at random and changes little.
# $B$ starts at zero, so the output directions of ΔW are learned. In q and k they favour the
# directions in which W itself has a large $\sigma_i$.
#
# ## 9. The adapter is a file of its own
#
# The saved adapter is a PEFT adapter of 20 MB. With it, a newly loaded base model gives the same
# logits as the trained model, bit for bit.

# %%
ml.save_adapter(model, folder / "adapter")
size = 0
for file in (folder / "adapter").iterdir():
    size += file.stat().st_size
report = ml.inspect(folder / "adapter")
ranks = [layer["effective rank"] for layer in report.layers.values()]
print(f"{size / 1e6:.1f} MB")
print(f"effective rank {min(ranks):.1f} to {max(ranks):.1f} of 16")
assert round(size / 1e6) == 20
assert max(ranks) <= 16

new_model = ml.load_model(source, quantize="nf4")
ml.load_adapter(new_model, folder / "adapter")
with torch.no_grad():
    assert torch.equal(model(tokens), new_model(tokens))

# %% [markdown]
# **Exercise.** An adapter can be scaled down: half of ΔW is still an adapter. At half strength, how
# much of the learned part is left, and how much of the forgetting?
#
# <details><summary>Solution</summary>
#
# ```python
# for layer in layers.values():
#     layer.adapters["default"].scaling *= 0.5
# half_loss = ml.evaluate(model, tokenizer, task.test, max_new_tokens=0).loss
# half_prose = ml.evaluate(model, tokenizer, prose).perplexity
# print(f"0.0 ΔW: loss {before.loss:.3f}, perplexity on prose {prose_before:.2f}")
# print(f"0.5 ΔW: loss {half_loss:.3f}, perplexity on prose {half_prose:.2f}")
# print(f"1.0 ΔW: loss {after.loss:.3f}, perplexity on prose {prose_after:.2f}")
#
# learned = (before.loss - half_loss) / (before.loss - after.loss)
# forgotten = (half_prose - prose_before) / (prose_after - prose_before)
# print(f"at half strength {learned:.0%} of the learned part is left")
# print(f"and {forgotten:.0%} of the forgetting")
# if not SHORT:
#     assert learned > 0.8
#     assert forgotten < 0.4
# ```
#
# Most of the learned part is left, and most of the forgetting is undone. So the second half of the
# update gains little and costs much. `ml.KLToBase` adds this cost to the training loss: it
# penalises the divergence from the base model.
#
# </details>
