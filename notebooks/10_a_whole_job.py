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
# # A whole job, from a CSV file to a GGUF file
#
# **Question:** you have 800 rows in a CSV file, and a model should learn to answer as these rows
# do. Which steps lead from the file to a model that a program can use? How can you check each
# step?
#
# The other notebooks explain the method. This notebook applies it: read the file, look at the
# rows, train, stop and resume, measure, compare two runs, merge, export, and use the result. A cell
# with an assert follows each claim.

# %%
import csv
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import minilora as ml  # to install it: pip install -e '.[gguf,plot,structured]'

ROWS = 800
TEST_ROWS = 100
STEPS = 60
STOP_AT = 25
EVAL_STEPS = 20
BATCH_SIZE = 8

# Tests run a short form: fewer rows and steps, and every assert that holds for them.
SHORT = bool(os.environ.get("MINILORA_SHORT"))
if SHORT:
    ROWS = 40
    TEST_ROWS = 4
    STEPS = 3
    STOP_AT = 1
    EVAL_STEPS = 3
    BATCH_SIZE = 2

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## 1. The file
#
# The file has a number, a diagnosis and its chapter of ICD-10-CM. No column has a name that
# minilora knows. The next cell writes the file. In your own work it exists already.

# %%
file = folder / "diagnoses.csv"
task = ml.samples.icd10(test_rows=1, train_rows=ROWS)
with file.open("w", newline="", encoding="utf-8") as stream:
    writer = csv.writer(stream)
    writer.writerow(["number", "diagnosis", "chapter"])
    for number, row in enumerate(task.train):
        _, question, answer = row["messages"]
        writer.writerow([number, question["content"], answer["content"]])

for line in file.read_text(encoding="utf-8").splitlines()[:4]:
    print(line)

# %% [markdown]
# `load_dataset` reads the file and maps its columns: the diagnosis is the prompt, and the chapter
# is the completion. `chat=True` makes a conversation of the two, so that training and `generate`
# use the same chat template. `system` adds an instruction to each conversation. A column that does
# not exist is an error that names the columns of the file.

# %%
COLUMNS = {"prompt": "diagnosis", "completion": "chapter"}
SYSTEM = "Name the ICD-10 chapter in one word."
rows = ml.load_dataset(str(file), columns=COLUMNS, chat=True, system=SYSTEM)
print(json.dumps(rows[0], indent=1))
assert len(rows) == ROWS
assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user"]

try:
    ml.load_dataset(str(file), columns={"prompt": "Diagnosis", "completion": "chapter"})
    raise AssertionError("expected an error")
except ValueError as error:
    print(error)
    assert "number, diagnosis, chapter" in str(error)

# %% [markdown]
# ## 2. Rows to train on, and held-out rows
#
# Many diagnoses differ in one word only, such as "left eye" and "right eye". If one is in the
# training rows and the other in the held-out rows, the score measures what was memorised. So rows
# that begin with the same two words form a group, and a group is never on both sides.


# %%
def question_of(row: Mapping) -> str:
    """Return the diagnosis of a row."""
    return row["prompt"][-1]["content"]


def answer_of(row: Mapping) -> str:
    """Return the chapter of a row."""
    return row["completion"][0]["content"]


def first_words(row: Mapping) -> str:
    """Return the first two words of the diagnosis, the group of a row."""
    return " ".join(question_of(row).lower().split()[:2])


train_rows, test_rows = ml.train_test_split(rows, test=TEST_ROWS, by=first_words)
labels = sorted({answer_of(row) for row in rows})
train_groups = {first_words(row) for row in train_rows}
test_groups = {first_words(row) for row in test_rows}
print(f"{len(train_rows)} training rows, {len(test_rows)} held-out rows, {len(labels)} chapters")
assert not train_groups & test_groups

# %% [markdown]
# The preview shows rows as training will see them. Only the marked tokens are supervised: the
# answer and the token that ends it. The report above the rows counts the rows that are cut or have
# no supervised token. Both numbers must be zero.

# %%
source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
preview = ml.preview(train_rows, tokenizer, rows=2, max_length=128)
print(preview)
for row, document in zip(train_rows, preview.documents, strict=False):
    trained = "".join(text for is_trained, text in document.runs if is_trained)
    assert trained.startswith(answer_of(row))
assert not preview.report.truncated
assert not preview.report.untrained

# %% [markdown]
# ## 3. The scores before training
#
# A score after training means little without these scores. The same rows will be measured again.
# The share of the most frequent chapter is the score of an answer that never changes.


# %%
def measure(model: torch.nn.Module) -> ml.Scores:
    """Return the scores of a model on the held-out rows."""
    return ml.evaluate(model, tokenizer, test_rows, labels=labels, max_new_tokens=4)


model = ml.load_model(source)
before = measure(model)
most_frequent = Counter(answer_of(row) for row in train_rows).most_common(1)[0][0]
majority = sum(answer_of(row) == most_frequent for row in test_rows) / len(test_rows)
print(before)
print(f"always {most_frequent!r}: {majority:.3f}")
assert before.answers == len(test_rows)

# %% [markdown]
# ## 4. Training, with your own code after each step
#
# A callback runs your own code after a step, an evaluation and a save. This one prints a line, and
# ends the run when a step is reached. `KeyboardInterrupt` in a callback has the effect of Ctrl-C:
# the last complete step is saved, and the result is marked as interrupted.


# %%
class Watch(ml.Callback):
    """Print the figures of a run, and end it at a step."""

    def __init__(self, stop_at: int | None = None):
        self.stop_at = stop_at
        self.seen: list[int] = []

    def on_step(self, step: ml.StepInfo) -> None:
        self.seen.append(step.step)
        if step.step % 10 == 0:
            print(f"step {step.step} of {step.total_steps}: loss {step.loss:.3f}")
        if step.step == self.stop_at:
            raise KeyboardInterrupt

    def on_evaluate(self, scores: dict[str, float]) -> None:
        print(f"step {scores['step']}: eval_loss {scores['eval_loss']:.3f}")


def add_adapter(model: torch.nn.Module) -> None:
    """Add an adapter of rank 8, with the same random numbers at each call."""
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "o_proj"]
    ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules=targets))


config = ml.TrainConfig(
    output_dir=str(folder / "fast"),
    max_steps=STEPS,
    per_device_train_batch_size=BATCH_SIZE,
    max_length=128,
    learning_rate=2e-3,
    warmup_ratio=0.1,
    eval_steps=EVAL_STEPS,
    logging_steps=1,
    save_steps=None,
    disable_tqdm=True,
)
add_adapter(model)
watch = Watch(stop_at=STOP_AT)
stopped = ml.train(
    model, tokenizer, train_rows, config, eval_dataset=test_rows[:32], callbacks=[watch]
)
print(stopped)
assert stopped.interrupted
assert stopped.steps == STOP_AT
assert watch.seen == list(range(1, STOP_AT + 1))
assert stopped.checkpoint == folder / "fast" / f"checkpoint-{STOP_AT}"

# %% [markdown]
# To continue the next day, load the base model, add the same adapter, and resume from the last
# checkpoint. It contains the adapter, the moments of the optimiser and the position in the data.
# So the run continues as if it had never stopped. (The exercise proves this.) Here `ml.eject` gives
# the base model back, which is faster than loading it again.

# %%
ml.eject(model)
add_adapter(model)
watch = Watch()
result = ml.train(
    model,
    tokenizer,
    train_rows,
    replace(config, resume_from_checkpoint="last"),
    eval_dataset=test_rows[:32],
    callbacks=[watch],
)
assert not result.interrupted
assert result.steps == STEPS
assert watch.seen == list(range(STOP_AT + 1, STEPS + 1))
assert result.losses[:STOP_AT] == stopped.losses

# %% [markdown]
# ## 5. Before and after, row by row
#
# The comparison counts the rows that became better and those that became worse. The mean alone
# does not show this. Then read the worst rows: they show better than the mean what is missing in
# the training rows.

# %%
after = measure(model)
comparison = after.compare(before)
print(comparison)
for row in after.worst(3):
    print(row)
assert after.loss < before.loss
assert len(after.rows) == len(test_rows)
if not SHORT:
    better, worse = comparison.changed("exact_match")
    assert better > worse
    assert after.label_accuracy > majority

# %% [markdown]
# ## 6. A second run
#
# Is the learning rate right? Change one option, train again, and compare the two folders. The table
# shows the options that differ and the last figures. `ml.sweep` tries many values, each in
# a new process.

# %%
rival = ml.load_model(source)
add_adapter(rival)
slow = replace(config, output_dir=str(folder / "slow"), learning_rate=1e-4)
ml.train(rival, tokenizer, train_rows, slow, eval_dataset=test_rows[:32])
runs = ml.compare_runs([folder / "fast", folder / "slow"])
print(runs)
assert runs.differing == ["learning_rate"]
fast_figures, slow_figures = (run.figures for run in runs.runs)
assert fast_figures["eval_loss"] < slow_figures["eval_loss"]
ml.plot.runs([folder / "fast", folder / "slow"])

# %% [markdown]
# The higher rate is better here, and its adapter is kept. The adapter alone is a small file, and it
# is the form to archive: it can be added to the base again without any loss.
#
# ## 7. Merge, and measure it first
#
# Some programs need one model without an adapter. A merge rounds the sum of weight and update.
# `merge_report` measures the loss of each storage format on held-out rows before a file is written.
# It ends in one sentence for each format. [Notebook 8](8_merging_measured.py) explains the figures.

# %%
ml.save_adapter(model, folder / "adapter")
report = ml.merge_report(model, tokenizer=tokenizer, data=test_rows[:32])
print(report)
assert report.losses["trained"] < report.losses["base"]
assert report.recovery["float16"] > 0.95

# %% [markdown]
# fp16 keeps the adapter, and needs half the bytes of fp32. So the folder is written in fp16.
# Programs that read the format of transformers load it. The GGUF file is for llama.cpp and Ollama.
# Its matrices have 8 bits. Then both are loaded again and measured, because the score of the file
# counts, not the score of the model in memory. `dtype="float32"` computes with the values as they
# are stored.

# %%
ml.save_model(model, folder / "dense", merge=True, dtype="float16", tokenizer=tokenizer)
gguf = folder / "diagnoses.gguf"
ml.save_model(model, gguf, format="gguf", merge=True, dtype="q8_0", tokenizer=tokenizer)

losses = {"base": before.loss, "adapter": after.loss}
sizes = {}
for name, path in (("fp16 folder", folder / "dense"), ("GGUF, 8 bits", gguf)):
    files = [path] if path.is_file() else list(path.iterdir())
    sizes[name] = sum(part.stat().st_size for part in files)
    loaded = ml.load_model(path, dtype="float32")
    reader = ml.load_tokenizer(path)
    losses[name] = ml.evaluate(loaded, reader, test_rows, max_new_tokens=0).loss
    print(f"{name:<14}{sizes[name] / 1e6:6.0f} MB, loss {losses[name]:.3f}")
gain = before.loss - after.loss
assert losses["fp16 folder"] - after.loss < 0.1 * gain
assert losses["GGUF, 8 bits"] - after.loss < 0.1 * gain
assert sizes["GGUF, 8 bits"] < 0.6 * sizes["fp16 folder"]

# %%
fig, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
axis.bar(list(losses), list(losses.values()), color=["0.8", "0.4", "#d55e00", "#0072b2"])
axis.set(title="held-out loss of each form", ylabel="nats per token")
plt.show()

# %% [markdown]
# ## 8. Use it
#
# The last loaded model came from the GGUF file. `stream_generate` gives the answer piece by piece,
# for a program that shows text as it is written. The pieces together are the text of `generate`.
# The prompt is a conversation with the system message of training.

# %%
prompt = test_rows[0]["prompt"]
print(question_of(test_rows[0]), "→ ", end="")
pieces = []
for piece in ml.stream_generate(loaded, reader, prompt, max_new_tokens=8):
    print(piece, end="", flush=True)
    pieces.append(piece)
print()
assert "".join(pieces) == ml.generate(loaded, reader, prompt, max_new_tokens=8)

# %% [markdown]
# A program that reads the answer needs JSON. With `schema`, tokens that break the schema are
# forbidden at each step. So every answer parses, and the chapter is one of the known chapters. The
# schema guarantees the form only: the chapter may still be wrong.

# %%
schema = {
    "type": "object",
    "properties": {"chapter": {"enum": labels}},
    "required": ["chapter"],
}
prompts = [row["prompt"] for row in test_rows[:4]]
texts = ml.generate(loaded, reader, prompts, max_new_tokens=32, schema=schema)
for row, text in zip(test_rows, texts, strict=False):
    answer = json.loads(text)
    print(f"{question_of(row)[:60]:<62}{text}")
    assert list(answer) == ["chapter"]
    assert answer["chapter"] in labels

# %% [markdown]
# **Exercise.** Section 4 says that the resumed run equals a run that never stopped. Prove it: train
# once more without the callback, and compare the losses.
#
# <details><summary>Solution</summary>
#
# ```python
# ml.eject(rival)
# add_adapter(rival)
# straight = ml.train(rival, tokenizer, train_rows, replace(config, output_dir=None))
# print(f"last loss {straight.losses[-1]!r}, of the resumed run {result.losses[-1]!r}")
# assert straight.losses == result.losses
# ```
#
# The losses are equal to the last bit. The order of the rows follows from the seed and the number
# of the step, and the checkpoint stores the adapter in fp32 with both moments of each parameter.
#
# </details>
