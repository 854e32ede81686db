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
# **Question:** 134.5 million weights lie frozen in 4 bits, and 4.9 million numbers beside them are trained for minutes.
# What does the model know afterwards that it did not know before, what has it forgotten, and where did the change go?
#
# A figure after training means nothing by itself. So beside each stands the one before, what can be had without a
# model, and what it cost. Each claim is followed by a cell that asserts it.

# %%
import os
import tempfile
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import minilora as ml  # not there? In the repository's folder: pip install -e '.[gguf,plot]'
from minilora.lora.low_rank import product_svd

SHORT = bool(
    os.environ.get("MINILORA_SHORT")
)  # tests run this in a short form: fewer steps and rows, every assertion
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
model = ml.load_model(source, quantize="nf4")

# %% [markdown]
# ## 1. The task, and what can be had without a model
#
# A diagnosis, and which of the 22 chapters of ICD-10-CM it belongs to. Held out are whole disease categories, so that
# no test row has a sibling among the training rows ("…, left eye", "…, right eye"). Two answers need no model: always
# the commonest chapter, and the chapter of the training row with the most words in common.

# %%
task = ml.samples.icd10(test_rows=8 if SHORT else 150, train_rows=64 if SHORT else 600)
majority = ml.samples.majority_class(task.train, task.test)
neighbour = ml.samples.nearest_neighbour(task.train, task.test)
print(*(f"{turn['role']:>10}: {turn['content']}" for turn in task.train[0]["messages"]), sep="\n")
assert len(task.labels) == 22
print(f"{len(task.train)} rows to train on, {len(task.test)} held out. {task.source}")
assert not {str(row) for row in task.train} & {str(row) for row in task.test}

# %% [markdown]
# ## 2. Before
#
# *Exact match* asks for the very word, which nobody has told the model yet. *Constrained* asks only which of the 22
# words it finds likeliest: what it knows, apart from how it says it. Perplexity on English prose and three questions of
# another kind will tell what training took away.

# %%
SCORING = {"labels": task.labels, "max_new_tokens": 4, "batch_size": 64}
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
]
prose = ml.samples.prose(rows=2 if SHORT else 12, characters=300 if SHORT else 600)


def measure() -> tuple[ml.Scores, float, list[str]]:
    """(scores on the task, perplexity on prose, answers to QUESTIONS)."""
    perplexity = ml.evaluate(model, tokenizer, prose, batch_size=4).perplexity
    answers = ml.generate(model, tokenizer, QUESTIONS, max_new_tokens=8 if SHORT else 24)
    return ml.evaluate(model, tokenizer, task.test, **SCORING), perplexity, answers


before, prose_before, answers_before = measure()
tokens = torch.tensor([tokenizer.encode(QUESTIONS[0])], device=next(model.parameters()).device)
with torch.no_grad():
    logits_before = model(tokens)

# %% [markdown]
# ## 3. An adapter on every layer, and the memory of it all
#
# `inject` puts $A$ and $B$ beside all 210 linear layers. What training will take is known before it starts: standing
# weights to the byte, since `plan_memory` counts what `count_parameters` finds, and the rest from one step on shapes
# alone. Beside it LoRA on 16-bit weights, and all weights trained.

# %%
names = ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
count = ml.count_parameters(model)
assert (
    len(names) == 7 * 30
    and count.trainable == 4_884_480
    and round(count.total - count.trainable, -5) == 134_500_000
)
layers = {path: m for path, m in model.named_modules() if isinstance(m, ml.LoRALayer)}
starts = {path: layer.adapters["default"].lora_A.detach().clone() for path, layer in layers.items()}
folder = Path(tempfile.mkdtemp())
shape = {"per_device_train_batch_size": 4 if SHORT else 12, "max_length": 64}
config = ml.TrainConfig(
    output_dir=str(folder),
    max_steps=4 if SHORT else 50,
    learning_rate=1e-3,
    warmup_ratio=0.1,
    logging_steps=1,
    eval_steps=2 if SHORT else 10,
    save_steps=None,
    **shape,
)
plan = ml.plan_memory(model, config=config)
assert plan.packed + plan.scales + plan.dense + plan.adapters == count.stored_bytes
lora = ml.plan_memory(source, ml.LoRAConfig(r=16, target_modules="all-linear"), config)
full = ml.plan_memory(source, config=ml.TrainConfig(method="full", **shape))
print(count)
print(
    f"GB in all: QLoRA {plan.total / 1e9:.2f}, LoRA {lora.total / 1e9:.2f}, full {full.total / 1e9:.2f}"
)
assert plan.total < lora.total < full.total
ml.plot.memory([plan, lora, full])

# %% [markdown]
# ## 4. Training

# %%
result = ml.train(model, tokenizer, task.train, config, eval_dataset=task.test[:32])
print(
    f"{result.tokens_per_second:,.0f} tokens a second; the process held {result.peak_memory_bytes / 1e9:.2f} GB at most"
)
assert SHORT or result.losses[-1] < result.losses[0] / 2
ml.plot.runs(folder)

# %% [markdown]
# ## 5. After
#
# Read the table from below: what a table lookup reaches is what there is to beat.

# %%
after, prose_after, answers_after = measure()
print(f"{'':20}{'before':>8}{'after':>8}")
for name in ("exact_match", "label_accuracy", "loss"):
    print(f"{name:20}{getattr(before, name):8.3f}{getattr(after, name):8.3f}")
print(f"{'perplexity, prose':20}{prose_before:8.2f}{prose_after:8.2f}")
print(f"{'majority class':20}{'':8}{majority:8.3f}\n{'nearest neighbour':20}{'':8}{neighbour:8.3f}")
interval = after.interval(after.label_accuracy)
print(f"{after.answers} rows, 95 % interval ± {interval:.3f}")
assert after.loss < before.loss
assert SHORT or after.label_accuracy - interval > max(before.label_accuracy, majority)

# %% [markdown]
# How much of exact match is form? Before, the model hardly ever said the right word of the 22; after, the two figures
# are one: it has learned which words there are. Which word is right, it has learned as far as `label_accuracy` rose.

# %%
assert before.exact_match < 0.1 and (
    SHORT or abs(after.exact_match - after.label_accuracy) < interval
)
fig, (left, right) = plt.subplots(
    1, 2, figsize=(11, 3.4), layout="constrained", width_ratios=(3, 2)
)
bars = {"exact match\nbefore": before.exact_match, "exact match\nafter": after.exact_match}
bars |= {"constrained\nbefore": before.label_accuracy, "constrained\nafter": after.label_accuracy}
bars |= {"majority\nclass": majority, "nearest\nneighbour": neighbour}
shades = ["#56b4e9", "#0072b2", "#56b4e9", "#0072b2", "0.8", "0.6"]
left.bar(list(bars), list(bars.values()), color=shades)
left.errorbar(
    [1, 3],
    [after.exact_match, after.label_accuracy],
    interval,
    fmt="none",
    color="black",
    capsize=3,
)
left.set(title="held-out rows answered rightly", ylabel="share", ylim=(0, 1))
left.tick_params("x", labelsize=9)
right.bar(["before", "after"], [prose_before, prose_after], 0.6, color=["#56b4e9", "#0072b2"])
right.set(title="English prose", ylabel="perplexity")
plt.show()

# %% [markdown]
# ## 6. What was forgotten
#
# Nothing held the model to what it could do before, and 600 rows of one word each pull at all of it: it answers other
# questions in the new way too. The base itself has lost nothing. **With the adapter off every logit is the old one, to
# the bit.**

# %%
for question, old, new in zip(QUESTIONS, answers_before, answers_after, strict=True):
    print(f"{question}\n  before: {old!r}\n  after:  {new!r}")
with torch.no_grad(), ml.disable_adapters(model):
    assert torch.equal(model(tokens), logits_before)
assert SHORT or prose_after > prose_before

# %% [markdown]
# ## 7. Where the update went
#
# Each layer's update is a matrix $\Delta W = s B A$ of rank 16 at most. On the left its singular values, on the right
# its size beside $W$, a cell a layer.

# %%
ml.plot.spectra(model)

# %%
sizes, moved = defaultdict(list), []
for path, layer in layers.items():
    W, delta = (
        layer.base_layer.dequantize(torch.float32),
        layer.adapters["default"].delta(torch.float32),
    )
    sizes[path.rpartition(".")[2]].append((delta.norm() / W.norm()).item())
    moved.append(
        ((layer.adapters["default"].lora_A - starts[path]).norm() / starts[path].norm()).item()
    )
for kind, found in sizes.items():
    print(
        f"{kind:10} ‖ΔW‖ / ‖W‖ from {min(found):.3f} to {max(found):.3f}, mean {sum(found) / len(found):.3f}"
    )
print(
    f"A has moved from its random start by {max(moved):.2f} of its length at most, {sum(moved) / 210:.2f} on average"
)
assert (
    max(max(found) for found in sizes.values()) < 0.1 and sum(moved) / 210 < 0.5
)  # small beside W, and A mostly A

# %% [markdown]
# ## 8. Which directions of W it touches
#
# $W = \sum_i \sigma_i u_i v_i^\top$: the layer reads along $v_i$ and writes along $u_i$, strongly where $\sigma_i$ is
# large. Of $\|\Delta W\|^2$ the share $\|\Delta W v_i\|^2 / \|\Delta W\|^2$ reads along $v_i$, and $\|u_i^\top \Delta
# W\|^2 / \|\Delta W\|^2$ writes along $u_i$. Added up from the largest $\sigma_i$ on, an update that knows nothing of W
# gives the diagonal. A matrix that is not square leaves some directions of its longer side alone; they come last.


# %%
def shares(layer: ml.LoRALayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ‖ΔW‖², what the first i of W's directions have, i = 1 … in and i = 1 … out: (reads, writes)."""
    U, _, Vh = torch.linalg.svd(
        layer.base_layer.dequantize(torch.float32).cpu(), full_matrices=False
    )
    adapter = layer.adapters["default"]
    left, sigma, right = product_svd(
        adapter.lora_B.detach().cpu(), adapter.lora_A.detach().cpu()
    )  # of B A, fp64
    found = []
    for V, side in ((Vh, right), (U.T, left)):  # (n, in) with (in, r), and (n, out) with (out, r)
        share = (V @ (side * sigma).float()).square().sum(1).cumsum(
            0
        ) / sigma.square().sum()  # (n,)
        rest = torch.linspace(share[-1].item(), 1, V.shape[1] - len(share) + 1)[
            1:
        ]  # what W leaves alone, evenly
        found.append(torch.cat([share, rest]))
    return found[0], found[1]


fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
colours = plt.colormaps["viridis"](torch.linspace(0, 0.9, 7))
leans = {kind: [] for kind in KINDS}  # how far a curve lies above the diagonal, on average
for kind, colour, dash in zip(KINDS, colours, ["-", "--", "-.", ":"] * 2, strict=False):
    found = [shares(layers[path]) for path in list(layers) if path.endswith(kind)][
        :: 30 if SHORT else 10
    ]
    for axis, side in zip(axes, zip(*found, strict=True), strict=True):
        mean = torch.stack(side).mean(0)  # (n,)
        place = torch.arange(1, len(mean) + 1) / len(mean)
        axis.plot(place, mean, dash, color=colour, label=kind)
        leans[kind].append((mean - place).mean().item())
    print("{:10} above the diagonal: reads {:+.3f}, writes {:+.3f}".format(kind, *leans[kind]))
for axis, title in zip(axes, ("reads", "writes"), strict=True):
    axis.plot([0, 1], [0, 1], color="0.7", zorder=0)
    axis.set(
        title=f"what ΔW {title}, by W's own directions",
        xlabel="share of the directions, largest σ first",
    )
axes[0].set_ylabel("share of ‖ΔW‖²")
fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside right center")
plt.show()
assert max(abs(reads) for reads, _ in leans.values()) < 0.06
assert all(leans[kind][1] > max(0.03, leans[kind][0]) for kind in ("q_proj", "k_proj"))

# %% [markdown]
# What ΔW *reads* lies near the diagonal: $A$ began at random, and most of it is that still. $B$ began at nothing, so
# what ΔW *writes* was learned, and there q and k lean towards what W itself writes strongly.
#
# ## 9. The adapter is a file of its own
#
# Saved, it is a PEFT adapter of 20 MB that makes a fresh base the model that was trained.

# %%
ml.save_adapter(model, folder / "adapter")
size = sum(file.stat().st_size for file in (folder / "adapter").iterdir())
report = ml.inspect(folder / "adapter")
effective = [layer["effective rank"] for layer in report.layers.values()]
print(f"{size / 1e6:.1f} MB; effective rank {min(effective):.1f} to {max(effective):.1f} of 16")
fresh = ml.load_model(source, quantize="nf4")
ml.load_adapter(fresh, folder / "adapter")
with torch.no_grad():
    assert torch.equal(model(tokens), fresh(tokens))
assert round(size / 1e6) == 20 and max(effective) <= 16

# %% [markdown]
# **Exercise.** An adapter can be turned down: ΔW times a half is still an adapter. How much of what was learned is left
# at half its strength, and how much of what was forgotten?
#
# <details><summary>Solution</summary>
#
# ```python
# found = {0.0: (before.loss, prose_before), 1.0: (after.loss, prose_after)}
# for layer in layers.values():
#     layer.adapters["default"].scaling *= 0.5
# loss = ml.evaluate(model, tokenizer, task.test, max_new_tokens=0, batch_size=64).loss
# found[0.5] = loss, ml.evaluate(model, tokenizer, prose, batch_size=4).perplexity
# for strength, (loss, perplexity) in sorted(found.items()):
#     print(f"{strength:.1f} ΔW: loss {loss:.3f}, perplexity on prose {perplexity:.2f}")
# learned = (before.loss - found[0.5][0]) / (before.loss - after.loss)
# forgotten = (found[0.5][1] - prose_before) / (prose_after - prose_before)
# print(f"learned: {learned:.0%} of it, forgotten: {forgotten:.0%}")
# assert SHORT or learned > 0.8 > 0.4 > forgotten
# ```
#
# Most of what was learned is left, and most of what was forgotten is back. So the last stretch is dear, and
# `ml.KLToBase` makes it so while training: it pays for every step away from the base.
#
# </details>
