"""Proves reward models: the loss of Bradley and Terry, its file, and a reward that GRPO can use.

Oracle: the head on the last hidden state of each answer, read alone.
"""

import pytest
import torch
import torch.nn.functional as F

import minilora as ml
from helpers.objective_laws import check_eval_batches, check_resume, check_splits, stirred
from helpers.toy import Letters, llama
from minilora.losses.classification import last_token_scores
from minilora.training.config import TrainConfig
from minilora.training.loop import train

WORDS = ["abc", "defabc", "fe", "bbbbbb", "caf", "deed", "a", "feedback"]
ROWS = [{"prompt": f"{word}=", "chosen": word, "rejected": word[::-1] + "ee"} for word in WORDS]
GOAL = ml.RewardModel()


def rater(seed: int = 0):
    """Return a model with a head of one output and an adapter."""
    model = llama(seed)
    GOAL.add_head(model)
    config = ml.LoRAConfig(
        r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
    )
    ml.inject(model, config)
    return model


# ---- oracle


def test_the_loss_is_that_of_bradley_and_terry():
    model = stirred(rater())
    batch = GOAL.collate(GOAL.encode(ROWS, Letters(), 64))
    loss, sums = GOAL.loss(model, batch)
    expected, correct, lead = 0.0, 0, 0.0
    for row in ROWS:
        scores = []
        for side in ("chosen", "rejected"):
            ids = Letters().encode(row["prompt"] + row[side]) + [Letters.eos_token_id]
            hidden = model.hidden(torch.tensor([ids]))[0, -1]
            scores.append(model.score(hidden).item())
        margin = scores[0] - scores[1]
        expected -= F.logsigmoid(torch.tensor(margin)).item()
        correct += margin > 0
        lead += margin
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert sums["accuracy"].item() == correct and 0 < correct < len(ROWS)
    assert sums["margin"].item() == pytest.approx(lead, rel=1e-4, abs=1e-6)


# ---- properties


def test_splits_and_eval_batches_change_nothing():
    check_splits(stirred(rater()), GOAL, ROWS)
    check_eval_batches(stirred(rater()), GOAL, ROWS)


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    check_resume(rater, GOAL, ROWS, tmp_path)


def test_it_learns_and_its_score_is_a_reward_for_grpo(tmp_path):
    model = rater()
    config = TrainConfig(max_steps=20, learning_rate=1e-2, save_steps=None)
    result = train(model, Letters(), ROWS, config, objective=GOAL, eval_dataset=ROWS)
    assert result.evals[-1]["eval_accuracy"] == 1.0
    prompts = [row["prompt"] for row in ROWS]
    better = GOAL.score(model, Letters(), prompts, [row["chosen"] for row in ROWS])
    worse = GOAL.score(model, Letters(), prompts, [row["rejected"] for row in ROWS], batch_size=3)
    assert all(a > b for a, b in zip(better, worse, strict=True))
    reward = GOAL.reward_function(model, Letters())
    assert reward(prompts[0], ROWS[0]["chosen"], ROWS[0]) == pytest.approx(better[0], abs=1e-5)
    assert ml.GRPO(reward=reward).reward is reward

    ml.save_adapter(model, tmp_path / "reward")
    again = llama()
    GOAL.add_head(again)
    ml.load_adapter(again, tmp_path / "reward")
    assert GOAL.score(again, Letters(), prompts, [row["chosen"] for row in ROWS]) == better


# ---- errors


def test_a_head_of_two_outputs_is_refused():
    model = llama()
    ml.Classify(["a", "b"]).add_head(model)
    batch = GOAL.collate(GOAL.encode(ROWS, Letters(), 64))
    assert last_token_scores(model, batch).shape == (2 * len(ROWS), 2)
    with pytest.raises(ValueError, match="has 2 outputs, and a reward is one number"):
        GOAL.loss(model, batch)
    with pytest.raises(ValueError, match="no layer `score`"):
        GOAL.loss(llama(), batch)
