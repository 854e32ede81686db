"""Proves on-policy distillation: the exact divergence, a teacher that reads something else.

Oracle: log_softmax of both models' logits over whole texts, one answer at a time.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import minilora as ml
from helpers.objective_laws import check_resume, stirred
from helpers.toy import Letters, llama, lora
from minilora.losses.on_policy import with_answer
from minilora.training.config import TrainConfig
from minilora.training.loop import train

ROWS = [{"prompt": f"{word}="} for word in ("ab", "defabc", "f", "bbbb", "caf", "d")]
FIELDS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "save_steps": None,
    "per_device_train_batch_size": 3,
}


def distill(**fields) -> ml.OnPolicyDistill:
    return ml.OnPolicyDistill(
        **{"max_completion_length": 6, "log_completions_steps": None, **fields}
    )


def answers_of(goal: ml.OnPolicyDistill) -> list:
    prompts = goal.encode(ROWS[:3], Letters(), 64)
    return [with_answer(p, ids) for p, ids in zip(prompts, ([9, 40, 2], [77], [8, 8]), strict=True)]


# ---- oracle


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.7}, {"top_k": 5}, {"teacher": None}], ids=str
)
def test_the_loss_is_the_divergence_at_each_sampled_token(fields):
    student = stirred(lora())
    goal = distill(**{"teacher": llama(seed=3), "teacher_system": "x", **fields})
    answers = answers_of(goal)
    t, k = fields.get("temperature", 1.0), fields.get("top_k")
    expected = torch.zeros((), dtype=torch.float64)
    for answer in answers:
        size = len(answer) - len(answer.prompt)
        tokens = answer.input_ids[-size:]
        taught = Letters().encode("x\n\n" + ROWS[answer.row]["prompt"]) + tokens
        q = student(torch.tensor([answer.input_ids]))[0, -size - 1 : -1].double() / t
        teacher = goal.teacher or student
        with torch.no_grad(), nullcontext() if goal.teacher else ml.disable_adapters(student):
            p = teacher(torch.tensor([taught]))[0, -size - 1 : -1].double() / t
        if k is not None:
            p, best = p.topk(k)
            q = q.gather(1, best)
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        expected = expected + (log_q.exp() * (log_q - log_p)).sum()
    batch = goal.collate(answers)
    loss, sums = goal.loss(student, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert goal.weight(batch) == 6 and sums["surprise"] > 0
    trained = [p for p in student.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained)
    wanted = torch.autograd.grad(expected, trained)
    for gradient, exact in zip(found, wanted, strict=True):
        assert (gradient - exact).norm() <= 1e-4 * exact.norm()  # fp32, other order of sums


# ---- properties


def test_the_student_learns_rules_that_only_the_teacher_reads():
    model = lora(llama(seed=1))
    base = [p.clone() for p in model.parameters() if not p.requires_grad]
    goal = distill(teacher_system="cccccccc", num_generations=3)
    config = TrainConfig(max_steps=30, **FIELDS)
    result = train(model, Letters(), ROWS, config, objective=goal, eval_dataset=ROWS)
    assert sum(result.losses[-5:]) < 0.5 * sum(result.losses[:5])
    assert result.evals[-1]["eval_loss"] < 0.7 * result.losses[0]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(now, before) for now, before in zip(frozen, base, strict=True))
    assert {"entropy", "length", "truncated", "sampler_max"} <= result.metrics.keys()


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    check_resume(lora, distill(teacher_system="b"), ROWS, tmp_path)


def test_a_system_message_stands_before_the_teachers_messages():
    from minilora.losses.on_policy_distillation import with_system

    user = {"role": "user", "content": "hi"}
    assert with_system([user], "rules") == [{"role": "system", "content": "rules"}, user]
    earlier = [{"role": "system", "content": "old"}, user]
    assert with_system(earlier, "rules")[0]["content"] == "rules\n\nold"
    assert with_system("text", "rules") == "rules\n\ntext"


def test_a_row_has_its_own_teacher_prompt():
    rows = [{"prompt": "a=", "teacher_prompt": "the answer is a: a="}]
    (prompt,) = distill().encode(rows, Letters(), None)
    assert list(prompt.teacher_ids) == Letters().encode("the answer is a: a=")
    assert prompt.input_ids == Letters().encode("a=")


# ---- errors


def test_a_base_that_reads_the_same_is_no_teacher():
    with pytest.raises(ValueError, match="would only undo its adapter"):
        distill().encode(ROWS, Letters(), None)
    full = TrainConfig(method="full", **FIELDS)
    with pytest.raises(ValueError, match="this model has no adapter"):
        train(llama(), Letters(), ROWS, full, objective=distill(teacher_system="x"))
