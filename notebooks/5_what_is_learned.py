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
# # What of a row is learned
#
# **Question:** a row of a dataset becomes tokens. Which of them does the model learn, what does it see meanwhile, and
# does it matter?
#
# Most runs that come out worse than they should are wrong here, and nothing says so. So we look. Each claim is followed
# by a cell that asserts it.

# %%
import os

import matplotlib.pyplot as plt
import torch

import minilora as ml  # not there? In the repository's folder: pip install -e '.[gguf,plot]'
from minilora.data import IGNORE, encode_dataset, encode_row
from minilora.data.packing import pack
from minilora.models.padded_batch import inference

SHORT = bool(
    os.environ.get("MINILORA_SHORT")
)  # tests run this in a short form: fewer steps and rows, every assertion
BLUE, ORANGE = "#0072b2", "#d55e00"
source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
task = ml.samples.icd10(train_rows=64 if SHORT else 320, test_rows=8 if SHORT else 48)

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
# Of a longer conversation every answer is learned, unless it says `"weight": 0`: a bad answer may stand in the history
# without being taught. What the model is to predict stands one place further left, which the loss sees to.

# %%
talk = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "5", "weight": 0},
    {"role": "user", "content": "Are you sure?"},
    {"role": "assistant", "content": "No: 4."},
]
example = encode_row({"messages": talk}, tokenizer)
learned = [
    token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORE
]
print(repr(tokenizer.decode(example.input_ids)), "\nlearned:", repr(tokenizer.decode(learned)))
assert tokenizer.decode(learned) == "No: 4.<|im_end|>"

# %% [markdown]
# ## 2. Does it matter?
#
# The same rows twice, for the same number of steps: once the answers alone are learned, once every token, as if the
# conversation were plain text. What is to be learned is a word of 22; of all tokens it is a small share, and the
# gradient of the others, diagnoses and marks, drowns it. Here it is asked how well *answers* of held-out rows are
# predicted, in nats a token.

# %%
steps = 6 if SHORT else 24
plain = [
    {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)} for row in task.train
]
shares, curves, loss = {}, {}, {}
for name, rows in {"answers": task.train, "every token": plain}.items():
    model = ml.load_model(source, quantize="nf4")
    if not loss:
        loss["untrained"] = ml.evaluate(model, tokenizer, task.test, max_new_tokens=0).loss
    ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=steps,
        per_device_train_batch_size=4 if SHORT else 8,
        learning_rate=1e-3,
        warmup_ratio=0.1,
        seed=1,
    )
    curves[name] = ml.train(model, tokenizer, rows, config).losses
    loss[name] = ml.evaluate(model, tokenizer, task.test, max_new_tokens=0).loss
    shares[name] = (
        encode_dataset(rows, tokenizer).report.trained_tokens
        / encode_dataset(rows, tokenizer).report.tokens
    )
print({name: f"{share:.0%} of tokens learned" for name, share in shares.items()})
print({name: round(value, 3) for name, value in loss.items()})
assert loss["answers"] < loss["every token"] and shares["answers"] < 0.1 and len(task.labels) == 22
fig, (left, right) = plt.subplots(
    1, 2, figsize=(11, 3.4), layout="constrained", width_ratios=(3, 2)
)
for (name, curve), colour, dash in zip(curves.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
    left.plot(range(1, steps + 1), curve, dash, color=colour, label=f"learning {name}")
left.set(
    title="training loss: means over other tokens, so not to be compared",
    xlabel="step",
    ylabel="nats a token",
)
left.legend(frameon=False)
right.bar(list(loss), list(loss.values()), 0.6, color=["0.8", BLUE, ORANGE])
right.set(title="the answers of held-out rows", ylabel="nats a token")
plt.show()

# %% [markdown]
# ## 3. Packing: many documents in a row, none of which sees another
#
# Rows of different lengths leave padding when they are stacked. Packed best-fit-decreasing into rows of 256 tokens,
# they leave almost none. A document's positions begin at 0 again, and attention runs within it.

# %%
examples = encode_dataset(task.train, tokenizer)
lengths = [len(example) for example in examples]
longest = max(lengths)
packed = pack(examples.examples, lengths, 256)
stacked = 1 - sum(lengths) / (len(lengths) * longest)
print(packed, f"(stacked by {longest}: {stacked:.0%} padding)")
batch = ml.SFT().collate([packed[i] for i in range(4)])
documents, positions = (
    batch["document_ids"],
    batch["position_ids"],
)  # (4, T), (4, T); padding is document -1
padding = (documents < 0).float().mean().item()
print(f"the first four rows: {padding:.0%} padding")
assert padding < stacked
for row in range(4):
    starts = documents[row].diff(prepend=torch.tensor([-2])) != 0
    assert (positions[row][starts & (documents[row] >= 0)] == 0).all()
ml.plot.packed(batch)

# %% [markdown]
# That a document does not see its neighbours can be tried: its logits are those that it has alone, up to the order of
# fp32 sums. And were the boundaries forgotten, one mask for the whole row, they would be others.

# %%
model = ml.load_model(source, dtype="float32")
device = next(model.parameters()).device
ids, places, owners = (
    batch[name][:1].to(device) for name in ("input_ids", "position_ids", "document_ids")
)
with inference(model):
    together, careless = model(ids, places, owners)[0], model(ids)[0]
    apart, mixed = [], []
    for number in range(int(owners.max()) + 1):
        place = owners[0] == number
        alone = model(ids[:, place])[0]
        scale = alone.abs().max()
        apart.append(((together[place] - alone).abs().max() / scale).item())
        mixed.append(((careless[place] - alone).abs().max() / scale).item())
print(
    f"{len(apart)} documents; off by at most {max(apart):.1e} of the largest logit, without boundaries {max(mixed):.1e}"
)
assert max(apart) < 1e-5 and min(mixed[1:]) > 1e-2

# %% [markdown]
# ## 4. What does not fit is said
#
# A row that is cut before its answer has nothing left to learn, and a run over such rows learns nothing. The report
# that stands before every training counts them, and where nothing at all is left, training stops before its first step.

# %%
short = encode_dataset(task.train, tokenizer, max_length=32)
print(short.report)
assert short.report.truncated and len(short.report.untrained) > 0
try:
    ml.train(model, tokenizer, task.train, ml.TrainConfig(max_steps=1, max_length=16))
    raise AssertionError("nothing was left to learn, and nothing was said")
except ValueError as error:
    print(error)

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
# ml.inject(model, ml.LoRAConfig(target_modules="all-linear"))
# try:
#     ml.train(model, tokenizer, muted, ml.TrainConfig(max_steps=1))
#     raise AssertionError("nothing was trained in row 2, and nothing was said")
# except ValueError as error:
#     assert "row 2" in str(error)
#     print(error)
# ```
#
# </details>
