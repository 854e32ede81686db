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
# **Question:** supervised rows say "write this". What is learned where rows say only "this rather than that", and where
# they say nothing at all, because another model does the teaching?
#
# Both objectives compare two models: DPO the adapted model with itself, adapter off; distillation a student with its
# teacher. So for both we look at how far the two are apart. Each claim is followed by a cell that asserts it.

# %%
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import minilora as ml  # not there? In the repository's folder: pip install -e '.[gguf,plot]'
from minilora.losses.dpo import answer_logprobs
from minilora.losses.sft import means
from minilora.models.padded_batch import inference

SHORT = bool(
    os.environ.get("MINILORA_SHORT")
)  # tests run this in a short form: fewer steps and rows, every assertion
BLUE, ORANGE = "#0072b2", "#d55e00"
source = ml.samples.smollm2()
tokenizer = ml.load_tokenizer(source)
task = ml.samples.icd10(train_rows=32 if SHORT else 240, test_rows=8 if SHORT else 64)

# %% [markdown]
# ## 1. Pairs, and a loss that starts at log 2
#
# A pair is a prompt, a chosen answer $y_w$ and a rejected one $y_l$: here the right chapter of a diagnosis and another
# row's. DPO asks how much likelier than in the reference each has become, and wants the first to have gained more:
#
# $$ L = -\log \sigma(m), \qquad m = \underbrace{\beta \log \frac{p(y_w)}{p_0(y_w)}}_{\text{reward of the chosen}}
# - \underbrace{\beta \log \frac{p(y_l)}{p_0(y_l)}}_{\text{reward of the rejected}} \qquad \text{(arXiv:2305.18290,
# eq. 7).}$$
#
# The reference $p_0$ is the model with its adapter off. At step 0 the two are one: both rewards are 0, and so is the
# *margin* m. The loss is log 2, whatever the pairs are, and the slope is β/2.

# %%
answers = sorted({row["messages"][-1]["content"] for row in task.train})


def pairs(rows: list[dict]) -> list[dict]:
    """The right chapter, and against it that of the next row with another one: common ones are as often wrong."""
    found = []
    for i, row in enumerate(rows):
        *prompt, right = row["messages"]
        others = (other["messages"][-1] for other in rows[i + 1 :] + rows[:i])
        wrong = next(other for other in others if other["content"] != right["content"])
        found.append({"prompt": prompt, "chosen": [right], "rejected": [wrong]})
    return found


train, held_out = pairs(task.train), pairs(task.test)
print(*train[0]["prompt"], train[0]["chosen"], train[0]["rejected"], sep="\n")
model = ml.load_model(source, quantize="nf4")
ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=8, target_modules="all-linear"))
objective = ml.DPO(beta=0.1)


def rewards(rows: list[dict]) -> torch.Tensor:
    """β log p / p₀ of both answers of each row: (2, rows), the chosen first."""
    examples, found = objective.encode(rows, tokenizer, None), []
    with inference(model):
        for start in range(0, len(examples), 16):
            batch = objective.collate(examples[start : start + 16])
            with ml.disable_adapters(model):
                reference, _ = answer_logprobs(model, batch)
            found.append(
                objective.beta * (answer_logprobs(model, batch)[0] - reference).view(2, -1).cpu()
            )
    return torch.cat(found, dim=1)


assert rewards(held_out).abs().max() == 0
steps = 4 if SHORT else 40
config = ml.TrainConfig(
    max_steps=steps,
    per_device_train_batch_size=4 if SHORT else 6,
    learning_rate=5e-4,
    warmup_ratio=0.1,
    seed=1,
)
result = ml.train(model, tokenizer, train, config, objective=objective)
log2 = torch.tensor(2.0).log().item()
assert abs(result.losses[0] - log2) < 1e-3 and abs(result.metrics["margin"][0]) < 1e-3

# %% [markdown]
# ## 2. What moved
#
# Only the *difference* of the two is asked for. In the middle the log probabilities themselves: nothing keeps the
# chosen one from falling, as long as the rejected one falls faster. Here it rises, since among all that the model may
# say any chapter was unlikely. On held-out pairs, on the right, a pair is told rightly if it lies above the diagonal.
# Batches differ, so curves are drawn pale, and dark their means over a few steps.

# %%
chosen, rejected = rewards(held_out)
accuracy = (chosen > rejected).float().mean().item()
window = max(1, steps // 8)
series = {"loss": result.losses, **result.metrics}
means_of = {
    name: torch.tensor(values).unfold(0, window, 1).mean(-1).tolist()
    for name, values in series.items()
}
for name, values in means_of.items():
    print(f"{name:18}{values[0]:9.3f} -> {values[-1]:.3f}")
print(
    f"held-out pairs told apart: {accuracy:.0%}; rewards {chosen.mean():.2f} and {rejected.mean():.2f} on average"
)
assert chosen.mean() > 0 and (
    SHORT or (accuracy > 0.6 and means_of["loss"][-1] < log2 < 0.1 + means_of["loss"][0])
)
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for axis, name, label, colour, dash in (
    (left, "loss", "loss", BLUE, "-"),
    (left, "margin", "margin", ORANGE, "--"),
    (middle, "chosen_logprob", "chosen", BLUE, "-"),
    (middle, "rejected_logprob", "rejected", ORANGE, "--"),
):
    axis.plot(range(1, steps + 1), series[name], dash, color=colour, lw=1, alpha=0.3)
    axis.plot(range(window, steps + 1), means_of[name], dash, color=colour, label=label)
left.axhline(log2, color="0.6", ls=":", label="log 2: no preference")
left.set(title="training", xlabel="step")
middle.set(title="log p of the answers", xlabel="step", ylabel="nats")
ends = [min(chosen.min(), rejected.min()).item(), max(chosen.max(), rejected.max()).item()]
right.plot(ends, ends, ":", color="0.6", label="no preference")
right.plot(rejected, chosen, "o", color=BLUE, ms=4, alpha=0.7, label="a held-out pair")
right.set(
    title="rewards on held-out pairs", xlabel="of the rejected answer", ylabel="of the chosen one"
)
for axis in (left, middle, right):
    axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## 3. How far to go
#
# Where does it stop? With the plain loss, nowhere: its slope is $-\beta\,\sigma(-m)$, small for pairs that are told
# apart but never zero, and a model may go to infinity over pairs that are easy. Where labels are wrong with probability
# e (`label_smoothing`), or the distance itself is asked for (`loss_type="ipo"`), the loss has a lowest point, and there
# it stops.

# %%
h = torch.linspace(-30, 80, 441, requires_grad=True)  # Δ, what the margin is β times of
e = 0.1
curves = {
    "sigmoid": -F.logsigmoid(0.1 * h),
    "sigmoid, e = 0.1": -(1 - e) * F.logsigmoid(0.1 * h) - e * F.logsigmoid(-0.1 * h),
    "ipo": (h - 1 / (2 * 0.1)).square() / 400,  # to one scale with the others
}
lowest = {name: h[curve.argmin()].item() for name, curve in curves.items()}
print({name: round(value, 2) for name, value in lowest.items()})
assert lowest["sigmoid"] == 80  # the end of the picture
assert (
    abs(lowest["sigmoid, e = 0.1"] - 10 * torch.tensor((1 - e) / e).log()) < 0.25
    and abs(lowest["ipo"] - 5) < 0.25
)
slope = torch.autograd.grad(curves["sigmoid"].sum(), h, retain_graph=True)[0]
torch.testing.assert_close(slope, -0.1 * torch.sigmoid(-0.1 * h.detach()))

# %% [markdown]
# How far a model *has* gone from its base is a divergence, in nats a token: $\mathrm{KL}(p \,\|\, p_0)$, measured where
# pairs were learned, on the answers, and where nothing was asked for, on prose. `ml.KLToBase` makes it a price to pay
# while training.

# %%
away = ml.KLToBase(kl_weight=1.0)
prose = ml.samples.prose(rows=8 if SHORT else 32, characters=300)
learn, unseen = prose[::2], prose[1::2]
texts = {"answers": task.test, "prose": unseen}
strayed = {
    name: means(model, away.encode(rows, tokenizer, 256), 8, away)[0]["kl"]
    for name, rows in texts.items()
}
print("KL to the base, nats a token:", {name: round(kl, 4) for name, kl in strayed.items()})
with ml.disable_adapters(model):
    assert rewards(held_out[:4]).abs().max() == 0
assert strayed["answers"] > 0 and (SHORT or strayed["answers"] > strayed["prose"])
fig, (left, right) = plt.subplots(
    1, 2, figsize=(11, 3.4), layout="constrained", width_ratios=(3, 2)
)
for (name, curve), style in zip(curves.items(), ("-", "--", "-."), strict=True):
    left.plot(
        h.detach(),
        curve.detach(),
        style,
        label=name,
        color={"-": BLUE, "--": "black", "-.": ORANGE}[style],
    )
    if lowest[name] < 80:
        left.plot(lowest[name], curve.min().item(), "o", color="black", ms=5)
left.set(
    title="three losses, β = 0.1, and their lowest points",
    xlabel="Δ = m / β",
    ylabel="loss (ipo: / 400)",
    ylim=(0, 3),
)
left.legend(frameon=False)
right.bar(list(strayed), list(strayed.values()), 0.5, color=[BLUE, "0.7"])
right.set(title="how far DPO went from the base", ylabel="KL(p ‖ p₀), nats a token")
plt.show()

# %% [markdown]
# ## 4. Distillation: a teacher says more than a token
#
# A row has one right next token; a teacher gives a probability to each of 49,152. Here the model in 16 bits teaches its
# own copy in 4, and what rounding took is what the adapter gives back:
#
# $$ L = \mathrm{KL}(p_\text{teacher} \,\|\, p_\text{student}) = \sum_v p_\text{teacher}(v)\,\log
# \frac{p_\text{teacher}(v)}{p_\text{student}(v)}. $$
#
# 16 short texts have to do; the others are held out.

# %%
teacher, student = ml.load_model(source), ml.load_model(source, quantize="nf4")
ml.inject(student, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
objective = ml.Distill(teacher)
examples = objective.encode(unseen, tokenizer, 256)
text = unseen[0]["text"][:140].rsplit(" ", 1)[0]
ids = torch.tensor([tokenizer.encode(text)], device=next(student.parameters()).device)


def by_token() -> torch.Tensor:
    """KL(teacher ‖ student) of what comes after each token of `text`, (T,)."""
    with inference(student), inference(teacher):
        p, q = (m(ids)[0].float().log_softmax(-1) for m in (teacher, student))  # (T, V)
    return (p.exp() * (p - q)).sum(-1).cpu()


gap, tokens_before = means(student, examples, 4, objective)[0]["kl"], by_token()
assert teacher.config.vocab_size == 49_152 and (SHORT or len(learn) == 16)
config = ml.TrainConfig(
    max_steps=2 if SHORT else 28,
    per_device_train_batch_size=4,
    learning_rate=4e-4,
    warmup_ratio=0.1,
    seed=1,
)
result = ml.train(student, tokenizer, learn, config, objective=objective)
left_over, tokens_after = means(student, examples, 4, objective)[0]["kl"], by_token()
print(
    f"KL on held-out texts, nats a token: {gap:.4f} -> {left_over:.4f}, {1 - left_over / gap:.0%} of it closed"
)
assert tokens_before.min() > -1e-5 and gap > 0  # a divergence is never negative
assert len({row["text"] for row in learn} & {row["text"] for row in unseen}) == 0 and (
    SHORT or left_over < 0.9 * gap
)

# %% [markdown]
# The gap is no haze over all tokens: half of it lies in a few. With its adapter the student is closer to its teacher at
# most tokens, and further off at some. And 16 texts are few: on them the gap closes further than on the others.

# %%
fig, (left, right) = plt.subplots(
    1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(2, 5)
)
left.plot(range(1, 1 + len(result.losses)), result.losses, color=BLUE, label="training")
left.plot([0, len(result.losses)], [gap, left_over], "D", color="black", label="held out")
left.set(
    title="KL(teacher ‖ student)",
    xlabel="step",
    ylabel="nats a token",
    ylim=(0, 1.1 * max(gap, *result.losses)),
)
left.legend(frameon=False)
places = torch.arange(len(tokens_before))
right.vlines(places, tokens_before, tokens_after, color="0.8", zorder=0)
right.semilogy(places, tokens_before, "s", color="0.5", ms=5, label="4 bits, before")
right.semilogy(places, tokens_after, "o", color=BLUE, ms=5, label="with its adapter")
right.set_xticks(
    places, [repr(tokenizer.decode([i]))[1:-1] for i in ids[0].tolist()], rotation=90, fontsize=8
)
right.set(title="what comes next, after each token of a held-out text", ylabel="KL, nats")
right.margins(x=0.01)
right.legend(frameon=False)
plt.show()
sizes, order = tokens_before.sort(descending=True)
few = order[
    : int((sizes.cumsum(0) < sizes.sum() / 2).sum()) + 1
]  # the largest, until half of all is reached
closer = (tokens_after < tokens_before).float().mean().item()
print(
    f"half of the gap is in {len(few)} of {len(order)} tokens; the student is closer at {closer:.0%} of all"
)
assert len(few) < 0.35 * len(order)
assert SHORT or (closer > 0.5 and sum(result.losses[-4:]) / 4 < left_over)

# %% [markdown]
# **Exercise.** Turn the divergence round, `ml.Distill(teacher, kind="reverse")`: KL(student ‖ teacher). Where do the
# two differ, and which of them would you take for a student that is too small to say all that its teacher says?
#
# <details><summary>Solution</summary>
#
# ```python
# p = torch.tensor([0.49, 0.49, 0.02]).log()  # a teacher that is of two minds
# both, one = torch.tensor([0.34, 0.33, 0.33]).log(), torch.tensor([0.94, 0.03, 0.03]).log()  # students that fall short
# forward = [(p.exp() * (p - q)).sum().item() for q in (both, one)]
# reverse = [(q.exp() * (q - p)).sum().item() for q in (both, one)]
# print(forward, reverse)
# assert forward[0] < forward[1] and reverse[0] > reverse[1]  # each prefers another student
# turned = means(student, examples, 4, ml.Distill(teacher, kind="reverse"))[0]["kl"]
# print(f"on held-out texts: forward {left_over:.4f}, reverse {turned:.4f}")
# assert turned > 0
# ```
#
# Forward is dear where the teacher says something and the student does not: the student covers all, and says nonsense
# in between. Reverse is dear where the student says what the teacher never would: it keeps to one thing and says it
# well. A student that is to write, and too small, takes reverse.
#
# </details>
