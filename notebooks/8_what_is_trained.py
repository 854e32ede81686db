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
# # What is trained
#
# **Question:** a row of a dataset becomes tokens. Which of them does the model learn, what does it see meanwhile, and
# what changes when rows say "this answer rather than that one", or when another model does the teaching?
#
# Each claim below is followed by a cell that asserts it.

# %%
import os

import matplotlib.pyplot as plt
import torch

import minilora as ml
from minilora.data import IGNORE, encode_dataset
from minilora.data.packing import pack
from minilora.models.context import inference

SHORT = bool(os.environ.get("MINILORA_SHORT"))  # tests run this in a short form: fewer steps and rows, every assertion
source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
task = ml.samples.icd10(train_rows=64 if SHORT else 320, test_rows=16 if SHORT else 100)

# %% [markdown]
# ## 1. Only what the assistant says
#
# The chat template surrounds a conversation with marks. Loss is taken on the answer and on the token that ends it, so
# that the model learns to stop; everything before is read and not learned. `ml.preview` shows it before any training.

# %%
shown = ml.preview(task.train, tokenizer, rows=1)
shown

# %%
print(shown)
trained = [token for token in shown.documents[0].tokens if token.trained]
answer = task.train[0]["messages"][-1]["content"]
assert "".join(token.text for token in trained) == answer + "<|im_end|>"

# %% [markdown]
# ## 2. Packing: many documents in a row, none of which sees another
#
# Rows of different lengths leave padding when they are stacked. Packed best-fit-decreasing into rows of 256 tokens,
# they leave almost none. A document's positions begin at 0 again, and attention runs within it.

# %%
examples = encode_dataset(task.train, tokenizer)
lengths = [len(example) for example in examples]
packed = pack(examples.examples, lengths, 256)
longest = max(lengths)
print(packed, f"(stacked by {longest}: {1 - sum(lengths) / (len(lengths) * longest):.0%} padding)")
batch = ml.SFT().collate([packed[0]])
documents, labels = batch["document_ids"][0], batch["labels"][0]
T = len(documents)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
sees = (documents[:, None] == documents[None]) & (documents[:, None] >= 0) & torch.ones(T, T).tril().bool()
left.imshow(sees, cmap="Greys", interpolation="nearest")
left.set(title="who may look at whom: a triangle a document", xlabel="key", ylabel="query")
right.bar(range(T), batch["position_ids"][0], width=1, color="0.8", label="position")
learned = (labels != IGNORE).nonzero()[:, 0]
right.bar(learned, batch["position_ids"][0][learned], width=1, color="#0072b2", label="trained")
right.set(title="positions begin again with each document", xlabel="token of the packed row")
right.legend()
plt.show()

# %% [markdown]
# The logits of a packed document are those that it has alone, up to the order of fp32 sums.

# %%
model = ml.load_model(source, dtype="float32")
with inference(model):
    together = model(batch["input_ids"], batch["position_ids"], batch["document_ids"])[0]
    for number in range(int(documents.max()) + 1):
        place = documents == number
        alone = model(batch["input_ids"][:, place])[0]
        difference = (together[place] - alone).abs().max().item()
        assert difference < 1e-5 * alone.abs().max().item(), difference
print(f"{number + 1} documents, logits as alone: {difference:.1e} off, of {alone.abs().max():.0f}")

# %% [markdown]
# ## 3. Preferences
#
# DPO sees pairs: an answer that was chosen and one that was rejected. With $\Delta$ the difference of their log
# probabilities and the reference $\Delta_0$ that difference with the adapter off,
#
# $$ L = -\log \sigma\bigl(\beta\,(\Delta - \Delta_0)\bigr) \qquad \text{(arXiv:2305.18290, eq. 7).}$$
#
# At step 0 adapter and reference are the same, so the loss is $\log 2$, whatever the pairs are.

# %%
answers = sorted({row["messages"][-1]["content"] for row in task.train})


def pairs(rows):
    """The right chapter against the next one in the list."""
    found = []
    for row in rows:
        *prompt, right = row["messages"]
        wrong = answers[(answers.index(right["content"]) + 1) % len(answers)]
        found.append({"prompt": prompt, "chosen": [right], "rejected": [right | {"content": wrong}]})
    return found


model = ml.load_model(source, quantize="nf4")
ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules="all-linear"))
steps = 4 if SHORT else 40
config = ml.TrainConfig(max_steps=steps, per_device_train_batch_size=4 if SHORT else 8, learning_rate=5e-4, seed=1)
result = ml.train(model, tokenizer, pairs(task.train), config, objective=ml.DPO(beta=0.1))
assert abs(result.losses[0] - 0.6931) < 1e-3
print({name: [round(values[0], 3), round(values[-1], 3)] for name, values in result.metrics.items()})

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.plot(result.losses, color="#0072b2", label="loss")
axes.axhline(0.6931, color="0.5", linestyle=":", label="log 2: no preference")
axes.set(title="DPO: from no preference to one", xlabel="step")
axes.legend()
plt.show()
assert SHORT or sum(result.losses[-5:]) / 5 < 0.6

# %% [markdown]
# ## 4. Distillation
#
# A teacher says more than the right token: it gives a probability to every one. Here the model in bf16 teaches its own
# copy in 4 bits; what rounding took is what the adapter gives back:
#
# $$ L = \mathrm{KL}(p_\text{teacher} \,\|\, p_\text{student}) = \sum_v p_\text{teacher}(v)\,\log
# \frac{p_\text{teacher}(v)}{p_\text{student}(v)}. $$

# %%
prose = ml.samples.prose(rows=8 if SHORT else 40, characters=400)
teacher, student = ml.load_model(source), ml.load_model(source, quantize="nf4")
ml.inject(student, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
config = ml.TrainConfig(max_steps=3 if SHORT else 24, per_device_train_batch_size=4, learning_rate=5e-4, seed=1)
half = len(prose) // 2
result = ml.train(student, tokenizer, prose[:half], config, objective=ml.Distill(teacher), eval_dataset=prose[half:])
print(f"KL at the first step {result.losses[0]:.3f}, on other texts at the end {result.eval_loss:.3f}")
assert result.losses[0] > 0 and (SHORT or result.eval_loss < result.losses[0])

# %% [markdown]
# **Exercise.** Give the answer of row 2 `"weight": 0`, so that nothing in it is trained. What does training do?
#
# <details><summary>Solution</summary>
#
# It stops before the first step, with an error that names the row: a row from which nothing can be learned is a mistake
# in the data, and leaving it out silently would hide it.
#
# ```python
# *prompt, answer = task.train[2]["messages"]
# muted = [*task.train[:2], {"messages": [*prompt, answer | {"weight": 0}]}]
# try:
#     ml.train(student, tokenizer, muted, config)
#     raise AssertionError("nothing was trained in row 2, and nothing was said")
# except ValueError as error:
#     assert "row 2" in str(error)
#     print(error)
# ```
#
# </details>
