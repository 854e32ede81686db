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
# # The loss mask: which tokens are supervised
#
# **Question:** a row of a dataset becomes tokens. Which of these tokens does the model learn to
# predict, which tokens does it see, and does the choice matter?
#
# A wrong loss mask is a frequent cause of poor fine-tuning results, and it raises no error. So we
# look at the tokens. After each claim, a cell asserts it.

# %%
import os

import matplotlib.pyplot as plt
import torch

import minilora as ml  # if it is missing: pip install -e '.[gguf,plot]' in the repository

TRAIN_ROWS = 320
TEST_ROWS = 48
STEPS = 24
BATCH_SIZE = 8
if os.environ.get("MINILORA_SHORT"):  # set by the tests: a short run with every assertion
    TRAIN_ROWS = 64
    TEST_ROWS = 8
    STEPS = 6
    BATCH_SIZE = 4

BLUE = "#0072b2"
ORANGE = "#d55e00"
source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
task = ml.samples.icd10(train_rows=TRAIN_ROWS, test_rows=TEST_ROWS)

# %% [markdown]
# ## 1. Only the answers of the assistant
#
# The chat template adds markers around the turns of a conversation. The loss counts the tokens of
# the answer and the token that ends it, so that the model learns to stop. The model reads all
# tokens before the answer, but it does not learn to predict them. `ml.preview` shows this before
# any training.

# %%
shown = ml.preview(task.train, tokenizer, rows=1)
shown

# %%
print(shown)
supervised = ""
for token in shown.documents[0].tokens:
    if token.trained:
        supervised += token.text
answer = task.train[0]["messages"][-1]["content"]
assert supervised == answer + "<|im_end|>"

# %% [markdown]
# In a longer conversation every answer is supervised, unless it has `"weight": 0`. A bad answer may
# therefore be in the history without being learned. Labels are aligned with the tokens. The loss
# compares the logits at position t with the label at position t + 1.

# %%
conversation = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "5", "weight": 0},
    {"role": "user", "content": "Are you sure?"},
    {"role": "assistant", "content": "No: 4."},
]
example = ml.data.encode_row({"messages": conversation}, tokenizer)
supervised_ids = [label for label in example.labels if label != ml.data.IGNORE]
supervised = tokenizer.decode(supervised_ids)
print("all tokens:", repr(tokenizer.decode(example.input_ids)))
print("supervised:", repr(supervised))
assert supervised == "No: 4.<|im_end|>"

# %% [markdown]
# ## 2. Does the loss mask matter?
#
# We train twice on the same rows, with the same number of steps. In the first run only the answers
# are supervised. In the second run every token is supervised, as if the conversation were plain
# text. An answer is one of 22 words, which is a small share of the tokens. In the second run the
# gradient of the other tokens, diagnoses and markers, is much larger than the gradient of the
# answers. After each run we measure the loss on the *answers* of held-out rows, in nats per token.

# %%
plain_rows = []
for row in task.train:
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    plain_rows.append({"text": text})
DATASETS = {"answers": task.train, "every token": plain_rows}

shares = {}
for name, rows in DATASETS.items():
    report = ml.data.encode_dataset(rows, tokenizer).report
    shares[name] = report.trained_tokens / report.tokens
    print(f"{name}: {shares[name]:.0%} of the tokens are supervised")
assert shares["answers"] < 0.1
assert len(task.labels) == 22

# %%
model = ml.load_model(source, quantize="nf4")
config = ml.TrainConfig(
    max_steps=STEPS,
    per_device_train_batch_size=BATCH_SIZE,
    learning_rate=1e-3,
    warmup_ratio=0.1,
    seed=1,
)


def held_out_loss() -> float:
    """Return the loss on the answers of held-out rows, in nats per token."""
    scores = ml.evaluate(model, tokenizer, task.test, max_new_tokens=0)
    return scores.loss


losses = {"untrained": held_out_loss()}
curves = {}
for name, rows in DATASETS.items():
    ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    curves[name] = ml.train(model, tokenizer, rows, config).losses
    losses[name] = held_out_loss()
    ml.eject(model)  # the base model is unchanged, so the second run starts from the same model
for name, loss in losses.items():
    print(f"{name}: {loss:.3f} nats per token of the answers")
assert losses["answers"] < losses["every token"]

# %%
fig, (curve_axis, loss_axis) = plt.subplots(
    1, 2, figsize=(11, 3.4), layout="constrained", width_ratios=(3, 2)
)
steps = range(1, STEPS + 1)
curve_axis.plot(steps, curves["answers"], "-", color=BLUE, label="answers supervised")
curve_axis.plot(steps, curves["every token"], "--", color=ORANGE, label="every token supervised")
curve_axis.set(title="training losses: not comparable, because they count different tokens")
curve_axis.set(xlabel="step", ylabel="nats per token")
curve_axis.legend(frameon=False)
loss_axis.bar(list(losses), list(losses.values()), 0.6, color=["0.8", BLUE, ORANGE])
loss_axis.set(title="loss on the answers of held-out rows", ylabel="nats per token")
plt.show()

# %% [markdown]
# ## 3. Packing: many documents in one row, with separate attention
#
# Rows of different lengths need padding when they are stacked to a batch. Best-fit decreasing
# packing into rows of 256 tokens leaves almost no padding. The positions of each document start at
# 0, and attention does not cross the boundary of a document.

# %%
encoded = ml.data.encode_dataset(task.train, tokenizer)
lengths = [len(example) for example in encoded]
longest = max(lengths)
stacked_tokens = len(lengths) * longest
stacked_padding = 1 - sum(lengths) / stacked_tokens
print(f"stacked in rows of {longest} tokens: {stacked_padding:.0%} padding")

packed = ml.data.pack(encoded.examples, lengths, 256)
print(packed)
first_rows = [packed[0], packed[1], packed[2], packed[3]]
batch = ml.SFT().collate(first_rows)
documents = batch["document_ids"]  # (4, T), -1 for padding
positions = batch["position_ids"]  # (4, T)
is_token = documents >= 0  # (4, T)
packed_padding = 1 - is_token.float().mean().item()
print(f"the first four packed rows: {packed_padding:.0%} padding")
assert packed_padding < stacked_padding

before_first = torch.tensor([-2])  # differs from every document number
for row in range(4):
    is_start = documents[row].diff(prepend=before_first) != 0  # (T,)
    starts = is_start & is_token[row]
    assert (positions[row][starts] == 0).all()
ml.plot.packed(batch)

# %% [markdown]
# We can test that a document does not attend to its neighbours: its logits are those of the
# document alone, up to the order of fp32 sums. Without the boundaries, with one mask for the whole
# row, the logits are different.

# %%
model = ml.load_model(source, dtype="float32")
device = next(model.parameters()).device
ids = batch["input_ids"][:1].to(device)  # (1, T)
position_ids = batch["position_ids"][:1].to(device)  # (1, T)
document_ids = batch["document_ids"][:1].to(device)  # (1, T)


def largest_difference(logits: torch.Tensor, alone: torch.Tensor) -> float:
    """Return the largest difference of the logits over the largest logit."""
    difference = (logits - alone).abs().max()
    return (difference / alone.abs().max()).item()


with_boundaries = []
without_boundaries = []
with ml.inference(model):
    separate_logits = model(ids, position_ids, document_ids)[0]  # (T, V)
    mixed_logits = model(ids)[0]  # (T, V)
    for number in range(int(document_ids.max()) + 1):
        tokens = document_ids[0] == number  # (T,)
        alone = model(ids[:, tokens])[0]  # (tokens of the document, V)
        with_boundaries.append(largest_difference(separate_logits[tokens], alone))
        without_boundaries.append(largest_difference(mixed_logits[tokens], alone))
print(f"{len(with_boundaries)} documents; differences relative to the largest logit:")
print(f"with boundaries at most {max(with_boundaries):.1e}")
print(f"without boundaries up to {max(without_boundaries):.1e}")
assert max(with_boundaries) < 1e-5
later_documents = without_boundaries[1:]  # the first document has no document before it
assert min(later_documents) > 1e-2

# %% [markdown]
# ## 4. Rows that do not fit are reported
#
# A row that is cut before its answer has no supervised token, and training on such rows has no
# effect. The report before each training counts these rows. If no supervised token remains at all,
# training stops before its first step.

# %%
report = ml.data.encode_dataset(task.train, tokenizer, max_length=32).report
print(report)
assert report.truncated
assert report.untrained

config = ml.TrainConfig(max_steps=1, max_length=16)
try:
    ml.train(model, tokenizer, task.train, config)
except ValueError as error:
    print(error)
else:
    raise AssertionError("training must stop if no supervised token remains")

# %% [markdown]
# **Exercise.** Set `"weight": 0` in the answer of row 2, so that the row has no supervised token.
# How does training react?
#
# <details><summary>Solution</summary>
#
# Training stops before the first step, with an error that names the row. A row without supervised
# tokens is a mistake in the data, and to leave it out silently would hide the mistake.
#
# ```python
# *prompt, answer = task.train[2]["messages"]
# ignored_answer = {**answer, "weight": 0}
# row_2 = {"messages": [*prompt, ignored_answer]}
# rows = [*task.train[:2], row_2]
# ml.inject(model, ml.LoRAConfig(target_modules="all-linear"))
# try:
#     ml.train(model, tokenizer, rows, ml.TrainConfig(max_steps=1))
# except ValueError as error:
#     assert "row 2" in str(error)
#     print(error)
# else:
#     raise AssertionError("training must stop at row 2")
# ```
#
# </details>
