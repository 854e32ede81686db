"""Proves the verbs of a session: they train as `ml.train` does, bit for bit, and resume as it does.

Oracles: `ml.train` on the same steps, and torch's own AdamW. `ml.train` itself is compared with a
plain loop in tests/training/test_train.py.
"""

from typing import Any

import pytest
import torch

import minilora as ml
from helpers.toy import Letters, adapters, llama, lora, rows
from minilora.data import encode_dataset
from minilora.training.batch_sampler import BatchPlan

FIELDS: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 5, "per_device_train_batch_size": 4}
CONFIG = ml.TrainConfig(gradient_accumulation_steps=2, save_steps=None, **FIELDS)


def steps_of(config: ml.TrainConfig) -> list[list]:
    """Return the examples of each step of `ml.train`."""
    examples = encode_dataset(rows(), Letters(), 1024)
    plan = BatchPlan(examples.lengths, config)
    steps = []
    for step in range(config.max_steps):
        steps.append([examples[index] for batch in plan[step] for index in batch])
    return steps


def same_bits(model, other) -> bool:
    ours, theirs = adapters(model), adapters(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# ---- oracle


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_loop_over_the_verbs_equals_train_bit_for_bit(dropout):
    trained = lora(dropout=dropout)
    result = ml.train(trained, Letters(), rows(), CONFIG)
    model = lora(dropout=dropout)
    session = ml.TrainingSession(model, Letters(), CONFIG)
    losses = []
    for examples in steps_of(CONFIG):
        figures = session.forward_backward(examples, ml.SFT())
        update = session.optim_step()
        assert figures["loss"] == update.loss
        losses.append(update.loss)
    assert losses == result.losses and same_bits(model, trained)
    assert session.progress.tokens == result.tokens


def test_an_update_is_torchs_adamw_on_the_mean_gradient():
    model = lora()
    config = ml.TrainConfig(lr_scheduler_type="constant", learning_rate=0.01, max_grad_norm=0.0)
    session = ml.TrainingSession(model, Letters(), config)
    session.forward_backward(rows(8))
    parameters = [
        p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad
    ]
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    assert any(gradient.any() for gradient in gradients)
    plain = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    plain.step()
    session.optim_step()
    for expected, found in zip(parameters, adapters(model).values(), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-8)


# ---- properties


def test_two_calls_add_up_to_the_sum_of_their_losses():
    examples = list(encode_dataset(rows(8), Letters(), 1024).examples)
    session = ml.TrainingSession(lora(), Letters(), CONFIG)
    first = session.forward_backward(examples[:4])
    second = session.forward_backward(examples[4:])
    both = {n: p.grad.clone() for n, p in session.model.named_parameters() if p.requires_grad}
    update = session.optim_step()
    assert update.loss == pytest.approx(first["loss"] + second["loss"], rel=1e-6)
    separate = []
    for part in (examples[:4], examples[4:]):
        again = ml.TrainingSession(lora(), Letters(), CONFIG)
        again.forward_backward(part)
        separate.append({n: p.grad for n, p in again.model.named_parameters() if p.requires_grad})
    for name, gradient in both.items():
        # fp32: one addition
        torch.testing.assert_close(gradient, separate[0][name] + separate[1][name])


def test_the_model_is_left_in_its_mode_and_without_gradients():
    model = lora(llama())
    session = ml.TrainingSession(model, Letters(), CONFIG)
    modes = [module.training for module in model.modules()]
    session.forward_backward(rows(4))
    assert [module.training for module in model.modules()] == modes
    session.optim_step()
    with pytest.raises(ValueError, match="call forward_backward first"):
        session.optim_step()


def test_samples_follow_the_seed_and_the_step():
    session = ml.TrainingSession(lora(), Letters(), CONFIG)
    prompts = ["ab=", "c="]
    answers = session.sample(prompts, max_new_tokens=8)
    assert answers == session.sample(prompts, max_new_tokens=8)
    assert len(answers) == 2
    session.forward_backward(rows(4))
    session.optim_step()
    assert answers != session.sample(prompts, max_new_tokens=8)


# ---- round trip


def test_a_loaded_session_continues_bit_for_bit(tmp_path):
    whole = ml.TrainingSession(lora(dropout=0.2), Letters(), CONFIG)
    for number, examples in enumerate(steps_of(CONFIG)):
        whole.forward_backward(examples)
        whole.optim_step()
        if number == 1:
            folder = whole.save(tmp_path / "checkpoint")
    again = ml.TrainingSession(lora(dropout=0.2), Letters(), CONFIG)
    again.load(folder)
    for examples in steps_of(CONFIG)[2:]:
        again.forward_backward(examples)
        again.optim_step()
    assert again.progress == whole.progress and same_bits(again.model, whole.model)
    ml.load_adapter(llama(), folder)  # a checkpoint is an adapter folder too


def test_save_without_a_folder_writes_in_output_dir(tmp_path):
    config = ml.TrainConfig(output_dir=tmp_path / "out", **FIELDS)
    session = ml.TrainingSession(lora(), Letters(), config)
    with pytest.raises(ValueError, match="make a step first"):
        session.save()
    session.forward_backward(rows(4))
    with pytest.raises(ValueError, match="call optim_step first"):
        session.save()
    session.optim_step()
    assert session.save() == tmp_path / "out" / "checkpoint-1"


# ---- errors


def test_a_session_without_a_length_needs_a_constant_rate():
    session = ml.TrainingSession(lora(), Letters(), ml.TrainConfig())
    with pytest.raises(ValueError, match='set max_steps, or lr_scheduler_type to "constant"'):
        session.forward_backward(rows(4))


def test_a_checkpoint_of_another_rate_is_refused(tmp_path):
    session = ml.TrainingSession(lora(), Letters(), CONFIG)
    session.forward_backward(rows(4))
    session.optim_step()
    session.save(tmp_path / "checkpoint")
    other = ml.TrainingSession(
        lora(), Letters(), ml.TrainConfig(**FIELDS | {"learning_rate": 1e-3})
    )
    with pytest.raises(ValueError, match="learning_rate was 0.01, is 0.001"):
        other.load(tmp_path / "checkpoint")


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="empty batch"):
        ml.TrainingSession(lora(), Letters(), CONFIG).forward_backward([])
