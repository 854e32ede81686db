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
# # Preferences and distillation on small data
#
# **Question:** a row of supervised fine-tuning contains the answer to learn. A preference row only
# states that one answer is better than another. In distillation the rows are plain text, and
# another model is the teacher. How much can a model learn from such rows?
#
# Both objectives compare two models. DPO compares the adapted model with itself, its adapter
# disabled. Distillation compares a student with its teacher. So this notebook measures for both how
# far the two models are apart. A cell with an assert follows each claim.

# %%
import math
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import minilora as ml  # to install it, in the repository: pip install -e '.[gguf,plot]'

BLUE = "#0072b2"
ORANGE = "#d55e00"

TRAIN_ROWS = 240
TEST_ROWS = 64
PROSE_ROWS = 32
DPO_STEPS = 40
DPO_BATCH_SIZE = 6
DISTILL_STEPS = 28

# Tests run a short form: fewer rows and steps, and every assert that holds for them.
SHORT = bool(os.environ.get("MINILORA_SHORT"))
if SHORT:
    TRAIN_ROWS = 32
    TEST_ROWS = 8
    PROSE_ROWS = 8
    DPO_STEPS = 4
    DPO_BATCH_SIZE = 4
    DISTILL_STEPS = 2

source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
task = ml.samples.icd10(train_rows=TRAIN_ROWS, test_rows=TEST_ROWS)

# %% [markdown]
# ## 1. Pairs, and a loss that starts at log 2
#
# A preference pair is a prompt with a chosen answer $y_w$ and a rejected answer $y_l$. Here the
# chosen answer is the right chapter of a diagnosis, and the rejected one is the chapter of another
# row. DPO measures how much more likely each answer has become than in the reference model. This
# gain is the *reward* of the answer. The loss is small if the chosen answer has the larger reward:
#
# $$ L = -\log \sigma(m), \qquad
# m = \underbrace{\beta \log \frac{p(y_w)}{p_0(y_w)}}_{\text{reward of the chosen}} -
# \underbrace{\beta \log \frac{p(y_l)}{p_0(y_l)}}_{\text{reward of the rejected}}
# \qquad \text{(arXiv:2305.18290, eq. 7).} $$
#
# The reference $p_0$ is the model with its adapter disabled. At step 0 both models are equal, so
# both rewards are 0, and the *margin* m is 0 too. The loss is log 2 for all pairs, and the size of
# its slope in $\Delta = m / \beta$ is β/2.


# %%
def preference_pairs(rows: list[dict]) -> list[dict]:
    """Return a preference row for each row.

    The rejected answer is the next different answer in the list. So frequent answers are also
    rejected frequently.
    """
    pairs = []
    for i, row in enumerate(rows):
        right = row["messages"][-1]
        following = rows[i + 1 :] + rows[:i]
        others = [other["messages"][-1] for other in following]
        wrong = next(answer for answer in others if answer != right)
        pairs.append({"prompt": row["messages"][:-1], "chosen": [right], "rejected": [wrong]})
    return pairs


train_pairs = preference_pairs(task.train)
test_pairs = preference_pairs(task.test)
for name, messages in train_pairs[0].items():
    print(f"{name}: {messages}")

model = ml.load_model(source, quantize="nf4")
ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules="all-linear"))
dpo = ml.DPO(beta=0.1)


def rewards(pairs: list[dict]) -> torch.Tensor:
    """Return β log p / p₀ of the chosen and of the rejected answers, (2, pairs)."""
    examples = dpo.encode(pairs, tokenizer, None)
    parts = []
    with ml.inference(model):
        for start in range(0, len(examples), 16):
            batch = dpo.collate(examples[start : start + 16])
            logprobs, _ = ml.losses.answer_logprobs(model, batch)  # (2B,)
            with ml.disable_adapters(model):
                reference, _ = ml.losses.answer_logprobs(model, batch)  # (2B,)
            gains = dpo.beta * (logprobs - reference)  # (2B,)
            parts.append(gains.view(2, -1).cpu())  # (2, B)
    return torch.cat(parts, dim=1)


assert rewards(test_pairs).abs().max() == 0
config = ml.TrainConfig(
    max_steps=DPO_STEPS,
    per_device_train_batch_size=DPO_BATCH_SIZE,
    learning_rate=5e-4,
    warmup_ratio=0.1,
    seed=1,
)
result = ml.train(model, tokenizer, train_pairs, config, objective=dpo)
log2 = math.log(2)
assert abs(result.losses[0] - log2) < 1e-3
assert abs(result.metrics["margin"][0]) < 1e-3

# %% [markdown]
# ## 2. The effect of DPO
#
# The loss depends only on the *difference* of the two rewards. The middle panel shows the log
# probabilities themselves. The loss does not stop the chosen answer from becoming less likely, as
# long as the rejected answer loses more. Here the chosen answer becomes more likely, because every
# chapter was an unlikely answer for the base model.
#
# The right panel shows the held-out pairs. The model ranks a pair correctly if its point is above
# the diagonal. Batches differ, so pale curves show each step, and dark curves show the mean over a
# few steps.

# %%
chosen, rejected = rewards(test_pairs)  # (pairs,) each
accuracy = (chosen > rejected).float().mean().item()
print(f"held-out pairs ranked correctly: {accuracy:.0%}")
print(f"mean reward: chosen {chosen.mean():.2f}, rejected {rejected.mean():.2f}")
assert chosen.mean() > 0

window = max(1, DPO_STEPS // 8)
series = {"loss": result.losses, **result.metrics}
smooth = {}
for name, values in series.items():
    smooth[name] = torch.tensor(values).unfold(0, window, 1).mean(-1).tolist()
    first = smooth[name][0]
    last = smooth[name][-1]
    print(f"{name:18}{first:9.3f} -> {last:.3f}")
if not SHORT:
    assert accuracy > 0.6
    assert smooth["loss"][-1] < log2
    assert log2 < 0.1 + smooth["loss"][0]

# %%
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")


def draw(axis, name: str, label: str, **style) -> None:
    """Draw a series of training: each step pale, the mean over the window dark.

    Args:
        axis: Axes to draw on.
        name: Name of the series.
        label: Name in the legend.
        **style: Colour and dash of the line.
    """
    axis.plot(range(1, DPO_STEPS + 1), series[name], lw=1, alpha=0.3, **style)
    axis.plot(range(window, DPO_STEPS + 1), smooth[name], label=label, **style)


draw(left, "loss", "loss", color=BLUE)
draw(left, "margin", "margin", color=ORANGE, ls="--")
draw(middle, "chosen_logprob", "chosen", color=BLUE)
draw(middle, "rejected_logprob", "rejected", color=ORANGE, ls="--")
left.axhline(log2, color="0.6", ls=":", label="log 2: no preference")
left.set(title="training", xlabel="step")
middle.set(title="log p of the answers", xlabel="step", ylabel="nats")

both = torch.cat([chosen, rejected])
ends = [both.min().item(), both.max().item()]
right.plot(ends, ends, ":", color="0.6", label="no preference")
right.plot(rejected, chosen, "o", color=BLUE, ms=4, alpha=0.7, label="a held-out pair")
right.set_title("rewards on held-out pairs")
right.set_xlabel("reward of the rejected answer")
right.set_ylabel("reward of the chosen answer")
for axis in (left, middle, right):
    axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## 3. The distance from the base
#
# The plain loss has no minimum. Its slope in $\Delta$ is $-\beta\,\sigma(-m)$. For pairs that are
# ranked correctly the slope is small, but never zero, so the margin of easy pairs can grow without
# limit. Two variants of the loss have a minimum. `label_smoothing` assumes that a preference is
# wrong with probability e. `loss_type="ipo"` asks for a certain distance.

# %%
beta = 0.1
e = 0.1
delta = torch.linspace(-30, 80, 441, requires_grad=True)  # Δ = m / β
plain = -F.logsigmoid(beta * delta)
flipped = -F.logsigmoid(-beta * delta)  # the loss if the preference is wrong
squared = (delta - 1 / (2 * beta)).square()  # the loss of IPO
curves = {
    "sigmoid": plain,
    "sigmoid, e = 0.1": (1 - e) * plain + e * flipped,
    "ipo": squared / 400,  # scaled to fit into the same picture
}
minima = {}
for name, curve in curves.items():
    minima[name] = delta[curve.argmin()].item()
    print(f"{name}: lowest at Δ = {minima[name]:.2f}")
assert minima["sigmoid"] == 80  # the right end of the picture
smoothed_minimum = math.log((1 - e) / e) / beta
ipo_minimum = 1 / (2 * beta)
assert abs(minima["sigmoid, e = 0.1"] - smoothed_minimum) < 0.25
assert abs(minima["ipo"] - ipo_minimum) < 0.25

(slope,) = torch.autograd.grad(plain.sum(), delta, retain_graph=True)
torch.testing.assert_close(slope, -beta * torch.sigmoid(-beta * delta.detach()))

# %% [markdown]
# The distance of a model from its base is a divergence in nats a token,
# $\mathrm{KL}(p \,\|\, p_0)$. The cell measures it on the answers, where DPO trained the model, and
# on prose, where it did not. `ml.KLToBase` adds this divergence to the training loss as a penalty.

# %%
prose = ml.samples.prose(rows=PROSE_ROWS, characters=300)
train_texts = prose[::2]
test_texts = prose[1::2]

kl_to_base = ml.KLToBase(kl_weight=1.0)
divergences = {}
for name, rows in (("answers", task.test), ("prose", test_texts)):
    examples = kl_to_base.encode(rows, tokenizer, 256)
    figures, _ = ml.losses.means(model, examples, 8, kl_to_base)
    divergences[name] = figures["kl"]
    print(f"KL to the base on {name}: {figures['kl']:.4f} nats a token")
assert divergences["answers"] > 0
if not SHORT:
    assert divergences["answers"] > divergences["prose"]
with ml.disable_adapters(model):
    assert rewards(test_pairs[:4]).abs().max() == 0

# %%
fig, (left, right) = plt.subplots(
    1, 2, figsize=(11, 3.4), layout="constrained", width_ratios=(3, 2)
)
colours = (BLUE, "black", ORANGE)
dashes = ("-", "--", "-.")
for name, colour, dash in zip(curves, colours, dashes, strict=True):
    curve = curves[name].detach()
    left.plot(delta.detach(), curve, dash, color=colour, label=name)
    if minima[name] < 80:
        left.plot(minima[name], curve.min().item(), "o", color="black", ms=5)
left.set(
    title="three losses, β = 0.1, and their minima",
    xlabel="Δ = m / β",
    ylabel="loss (ipo: / 400)",
    ylim=(0, 3),
)
left.legend(frameon=False)
right.bar(list(divergences), list(divergences.values()), 0.5, color=[BLUE, "0.7"])
right.set(title="distance from the base after DPO", ylabel="KL(p ‖ p₀), nats a token")
plt.show()

# %% [markdown]
# ## 4. Distillation: a distribution in place of a token
#
# In a training row there is one right next token. A teacher gives a probability to each of 49,152
# tokens. Here the model in 16 bits teaches a copy of itself in 4 bits. Rounding has moved the copy
# away from the teacher, and an adapter learns to bring it back:
#
# $$ L = \mathrm{KL}(p_\text{teacher} \,\|\, p_\text{student})
# = \sum_v p_\text{teacher}(v)\,\log \frac{p_\text{teacher}(v)}{p_\text{student}(v)}. $$
#
# The training data is 16 short texts. The other texts are held out.

# %%
teacher = ml.load_model(source)
student = ml.load_model(source, quantize="nf4")
ml.inject(student, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
assert teacher.config.vocab_size == 49_152

distill = ml.Distill(teacher)
test_examples = distill.encode(test_texts, tokenizer, 256)
text = test_texts[0]["text"][:140]
text = text.rsplit(" ", 1)[0]  # whole words
device = next(student.parameters()).device
token_ids = torch.tensor([tokenizer.encode(text)], device=device)  # (1, T)


def held_out_divergence() -> float:
    """Return KL(teacher ‖ student) on the held-out texts, in nats a token."""
    figures, _ = ml.losses.means(student, test_examples, 4, distill)
    return figures["kl"]


def divergence_by_token() -> torch.Tensor:
    """Return KL(teacher ‖ student) of the prediction after each token of `text`, (T,)."""
    with ml.inference(student), ml.inference(teacher):
        log_p = teacher(token_ids)[0].float().log_softmax(-1)  # (T, V)
        log_q = student(token_ids)[0].float().log_softmax(-1)  # (T, V)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)  # (T,)
    return divergence.cpu()


gap_before = held_out_divergence()
tokens_before = divergence_by_token()  # (T,)
assert gap_before > 0
assert tokens_before.min() > -1e-5  # a divergence is never negative, apart from rounding

config = ml.TrainConfig(
    max_steps=DISTILL_STEPS,
    per_device_train_batch_size=4,
    learning_rate=4e-4,
    warmup_ratio=0.1,
    seed=1,
)
result = ml.train(student, tokenizer, train_texts, config, objective=distill)
gap_after = held_out_divergence()
tokens_after = divergence_by_token()  # (T,)
print(f"KL on held-out texts, nats a token: {gap_before:.4f} -> {gap_after:.4f}")
print(f"{1 - gap_after / gap_before:.0%} of the gap is closed")

learned = {row["text"] for row in train_texts}
held_out = {row["text"] for row in test_texts}
assert not learned & held_out
if not SHORT:
    assert len(train_texts) == 16
    assert gap_after < 0.9 * gap_before

# %% [markdown]
# The gap is not the same for all tokens: a few tokens make up half of it. With its adapter, the
# student is closer to its teacher at most tokens and farther away at some. And 16 texts are few:
# the gap closes further on them than on the held-out texts.

# %%
sizes, _ = tokens_before.sort(descending=True)
below_half = sizes.cumsum(0) < sizes.sum() / 2
few = int(below_half.sum()) + 1  # the largest tokens that make up half of the gap
closer = (tokens_after < tokens_before).float().mean().item()
print(f"half of the gap is in {few} of {len(sizes)} tokens")
print(f"the student is closer at {closer:.0%} of all tokens")
assert few < 0.35 * len(sizes)
if not SHORT:
    assert closer > 0.5
    assert sum(result.losses[-4:]) / 4 < gap_after

# %%
fig, (left, right) = plt.subplots(
    1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(2, 5)
)
steps = len(result.losses)
highest = max(gap_before, *result.losses)
left.plot(range(1, steps + 1), result.losses, color=BLUE, label="training")
left.plot([0, steps], [gap_before, gap_after], "D", color="black", label="held out")
left.set(title="KL(teacher ‖ student)", xlabel="step", ylabel="nats a token")
left.set_ylim(0, 1.1 * highest)
left.legend(frameon=False)

positions = torch.arange(len(tokens_before))
labels = []
for token_id in token_ids[0].tolist():
    token = tokenizer.decode([token_id])
    labels.append(repr(token)[1:-1])  # a line break is shown as \n
right.vlines(positions, tokens_before, tokens_after, color="0.8", zorder=0)
right.semilogy(positions, tokens_before, "s", color="0.5", ms=5, label="4 bits, before")
right.semilogy(positions, tokens_after, "o", color=BLUE, ms=5, label="with its adapter")
right.set_xticks(positions, labels, rotation=90, fontsize=8)
right.set(title="prediction after each token of a held-out text", ylabel="KL, nats")
right.margins(x=0.01)
right.legend(frameon=False)
plt.show()

# %% [markdown]
# **Exercise.** Exchange the two models in the divergence, `ml.Distill(teacher, kind="reverse")`:
# KL(student ‖ teacher). How do the two divergences differ? Which of them would you choose for a
# student that is too small for the whole distribution of its teacher?
#
# <details><summary>Solution</summary>
#
# ```python
# def divergence(p, q):
#     """Return KL(p ‖ q)."""
#     return (p * (p / q).log()).sum().item()
#
#
# p = torch.tensor([0.49, 0.49, 0.02])  # the teacher considers two answers equally good
# covers_both = torch.tensor([0.34, 0.33, 0.33])  # one small student
# keeps_to_one = torch.tensor([0.94, 0.03, 0.03])  # another small student
# assert divergence(p, covers_both) < divergence(p, keeps_to_one)  # forward
# assert divergence(covers_both, p) > divergence(keeps_to_one, p)  # reverse
#
# reverse = ml.Distill(teacher, kind="reverse")
# figures, _ = ml.losses.means(student, test_examples, 4, reverse)
# print(f"on held-out texts: forward {gap_after:.4f}, reverse {figures['kl']:.4f}")
# assert figures["kl"] > 0
# ```
#
# The forward divergence is large where the teacher gives a high probability and the student does
# not. So the student covers all answers of its teacher, and the wrong ones between them too. The
# reverse divergence is large where the student gives a high probability and the teacher does not.
# So the student keeps to one good answer. Use reverse for a small student that generates text.
#
# </details>
