"""Proves the training loop: one division a step, one gradient for any split, every sample seen.

Oracles: a loop of ten lines with plain AdamW over whole unpadded samples, and counting.
test_train_vs_peft.py compares training with PEFT and transformers, and test_checkpoint.py with
interrupted runs.
"""

import io
import json
import math
import sys

import pytest
import torch
from torch import nn

from helpers.tiny import python
from helpers.toy import FAST, Letters, Wrapped, adapters, alone, llama, lora, relative, rows
from minilora.common import progress
from minilora.data import encode_dataset
from minilora.lora.layer import LoRALayer
from minilora.losses.sft import SFT, mean_loss, padded, token_loss, trained_tokens
from minilora.training.batch_sampler import BatchPlan
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from minilora.training.optim.gradients import backward
from minilora.training.optim.lr_schedule import learning_rate

# ---- oracle


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_equals_a_plain_loop_over_whole_samples(schedule):
    """The plain loop has no batches, no padding and no chunks.

    It sums the token losses of each single sample and divides them by the step's count.
    """
    config = TrainConfig(
        learning_rate=1e-2,
        max_steps=8,
        lr_scheduler_type=schedule,
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    model, plain = lora(), lora()
    result = train(model, Letters(), rows(), config)

    examples = encode_dataset(rows(), Letters(), 1024)
    plan = BatchPlan([len(e.input_ids) for e in examples], config)
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    for step in range(8):
        losses, count = [], 0
        for index in [i for micro in plan[step] for i in micro]:
            ids, labels = examples[index].input_ids, examples[index].labels
            log_p = plain(torch.tensor([ids]))[0].log_softmax(-1)
            picked = [-log_p[t - 1, labels[t]] for t in range(1, len(ids)) if labels[t] != -100]
            losses += picked
            count += len(picked)
        loss = torch.stack(losses).sum() / count
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, 8)
        optimizer.step()
        # fp32, other order of sums, 8 steps of Adam
        assert result.losses[step] == pytest.approx(loss.item(), rel=1e-5)
    # Adam divides tiny gradients by their own size
    assert relative(adapters(model), adapters(plain)) < 1e-3
    assert result.losses[-1] < result.losses[0]


# ---- properties


@pytest.mark.parametrize("kind", ["ours", "logits"])
def test_loss_and_gradient_do_not_depend_on_the_split(kind):
    examples = encode_dataset(rows(12), Letters(), 1024)
    model = lora()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model = model if kind == "ours" else Wrapped(model)
    found = []
    for size in (12, 6, 5, 1):
        samples = [examples[i : i + size] for i in range(0, 12, size)]
        model.zero_grad()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses, _ = backward(
            alone(model), SFT(), samples, torch.autocast("cpu", enabled=False), scaler
        )
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((losses.sum().item(), gradients))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        total = math.sqrt(sum(g.norm().item() ** 2 for g in found[0][1].values()))
        off = math.sqrt(sum((gradients[k] - g).norm().item() ** 2 for k, g in found[0][1].items()))
        assert off / total < 1e-6


@pytest.mark.slow
def test_training_does_not_depend_on_the_split():
    results = [
        train(
            lora(),
            Letters(),
            rows(),
            TrainConfig(per_device_train_batch_size=b, gradient_accumulation_steps=a, **FAST),
        )
        for b, a in [(8, 1), (4, 2), (1, 8)]
    ]
    for result in results[1:]:
        assert result.losses[0] == pytest.approx(results[0].losses[0], rel=1e-6)
        # after five steps of Adam
        assert result.losses == pytest.approx(results[0].losses, rel=1e-4)


def test_eval_loss_does_not_depend_on_its_batch_size():
    model, examples = llama(), encode_dataset(rows(23), Letters(), 1024)
    found = [mean_loss(model, examples, size) for size in (1, 2, 7, 23, 100)]
    assert len({count for _, count in found}) == 1
    assert [loss for loss, _ in found] == pytest.approx([found[0][0]] * 5, rel=1e-6)


def test_only_labelled_positions_reach_the_head():
    model = llama()
    batch = padded(encode_dataset(rows(4), Letters(), 1024).examples)
    seen = []
    model.lm_head.weight.requires_grad_(True)  # the path that calls the head
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape))
    model.lm_head.bias = nn.Parameter(torch.zeros(131))
    _, count = token_loss(model, batch)
    assert (
        sum(shape[0] for shape in seen)
        == count
        == trained_tokens(batch)
        < (batch["labels"] != -100).sum() + 1
    )


def test_both_kinds_of_model_give_the_same_loss_and_labels_are_never_passed():
    model = lora()
    batch = padded(encode_dataset(rows(6), Letters(), 1024).examples)
    wrapped = Wrapped(model)
    ours, count = token_loss(model, batch)
    theirs, same = token_loss(wrapped, batch)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-6) and count == same
    assert wrapped.seen == {"input_ids", "attention_mask"}
    for chunk in (1, 4, 1000):
        assert token_loss(model, batch, chunk)[0].item() == pytest.approx(ours.item(), rel=1e-6)


def test_the_first_token_is_never_trained():
    labels = torch.tensor([[5, 6, 7]])
    assert trained_tokens({"labels": labels}) == 2
    loss, count = token_loss(llama(), {"input_ids": labels, "labels": labels})
    assert count == 2 and loss.item() > 0


# transformers 4 and 5 share this name
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_gradient_checkpointing_changes_nothing_but_memory(kind):
    def model():
        if kind == "ours":
            return llama()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        return LlamaForCausalLM(LlamaConfig(vocab_size=131, **sizes))

    losses = []
    for on in (False, True):
        m = lora(model(), dropout=0.1)
        recomputed = []
        m.model.layers[0].input_layernorm.register_forward_hook(
            lambda *_, seen=recomputed: seen.append(1)
        )
        losses.append(
            train(m, Letters(), rows(), TrainConfig(gradient_checkpointing=on, **FAST)).losses
        )
        assert len(recomputed) == (10 if on else 5)
        assert not getattr(m, "gradient_checkpointing", False) and not getattr(
            m, "is_gradient_checkpointing", False
        )
    assert losses[0] == losses[1]


def test_every_sample_is_seen_once_an_epoch_and_max_steps_cycles(monkeypatch):
    seen = []
    monkeypatch.setattr(
        SFT, "collate", lambda _, batch: seen.extend(e.row for e in batch) or padded(batch)
    )
    result = train(
        lora(), Letters(), rows(10), TrainConfig(num_train_epochs=2, per_device_train_batch_size=4)
    )
    assert result.steps == 6 and sorted(seen) == sorted([*range(10)] * 2)
    seen.clear()
    result = train(
        lora(), Letters(), rows(10), TrainConfig(max_steps=7, per_device_train_batch_size=4)
    )
    assert result.steps == 7 and sorted(seen[:20]) == sorted([*range(10)] * 2) and len(seen) > 20
    assert result.tokens == sum(len(encode_dataset(rows(10), Letters())[i].input_ids) for i in seen)


def test_seeds_fix_everything_and_the_global_state_does_not():
    def run(seed, noise):
        torch.manual_seed(noise)
        return train(lora(dropout=0.2), Letters(), rows(), TrainConfig(seed=seed, **FAST)).losses

    assert run(1, 10) == run(1, 11) != run(2, 10)


def test_modes_and_frozen_weights_are_left_as_they_were():
    model = lora(dropout=0.1)
    model.model.layers[1].train()
    modes = [m.training for m in model.modules()]
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    train(model, Letters(), rows(), TrainConfig(**FAST), eval_dataset=rows(4))
    assert [m.training for m in model.modules()] == modes
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model, modes = lora(dropout=0.5), []
    layer = next(m for m in model.modules() if isinstance(m, LoRALayer))
    layer.register_forward_pre_hook(
        lambda m, _: modes.append((m.training, torch.is_grad_enabled()))
    )
    train(model, Letters(), rows(), TrainConfig(max_steps=2), eval_dataset=rows(4))
    assert modes == [(True, True), (True, True), (False, False)]


# ---- evaluation, log, printed output


def test_evaluation_every_n_steps_and_at_the_end():
    model = lora()
    result = train(
        model, Letters(), rows(), TrainConfig(eval_steps=2, **FAST), eval_dataset=rows(8, seed=1)
    )
    assert [step for step, _ in result.eval_losses] == [2, 4, 5]
    expected, _ = mean_loss(model, encode_dataset(rows(8, seed=1), Letters(), 1024), 3)
    assert result.eval_loss == result.eval_losses[-1][1] == pytest.approx(expected, rel=1e-6)
    silent = train(lora(), Letters(), rows(), TrainConfig(**FAST))
    assert silent.eval_loss is None and silent.eval_losses == []
    assert silent.losses == result.losses  # evaluation changes nothing


def test_the_log_is_json_lines_that_agree_with_the_result(tmp_path):
    config = TrainConfig(output_dir=tmp_path / "run", logging_steps=2, eval_steps=3, **FAST)
    result = train(lora(), Letters(), rows(), config, eval_dataset=rows(4))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert result.log == tmp_path / "run" / "log.jsonl"
    assert lines[0]["config"] == config.to_dict() and lines[0]["total_steps"] == 5
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4]
    assert steps[1]["loss"] == pytest.approx(sum(result.losses[2:4]) / 2)
    assert steps[1]["learning_rate"] == pytest.approx(1e-2 * (1 - 3 / 5))
    assert [
        (line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line
    ] == result.eval_losses
    assert (
        lines[-1]["steps"] == 5
        and lines[-1]["tokens"] == result.tokens
        and lines[-1]["interrupted"] is False
    )


def test_nothing_is_written_without_an_output_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(
        lora(), Letters(), rows(), TrainConfig(learning_rate=1e-2, max_steps=3, save_steps=1)
    )
    assert list(tmp_path.iterdir()) == [] and result.checkpoint is None and result.log is None


def test_the_result_counts():
    result = train(lora(), Letters(), rows(), TrainConfig(**FAST))
    assert result.steps == len(result.losses) == 5 and result.loss == result.losses[-1]
    assert (
        result.peak_memory_bytes > 50e6
        and 0 < result.tokens / result.tokens_per_second < result.seconds
    )
    assert "losses" not in repr(result)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives a child its parent's peak")
def test_peak_memory_is_not_the_parents():
    """Start a small process from one that has held 2 GiB; each reports its own peak."""
    child = "import torch; from minilora.training.runtime import peak_memory; "
    child += "print(peak_memory(torch.device('cpu')))"
    code = f"""
import subprocess, sys
import numpy as np
held = np.ones(2**28)  # 2 GiB in fp64
del held
print(subprocess.check_output([sys.executable, "-c", {child!r}], text=True))
"""
    assert 50e6 < int(python(code)) < 2**30


def test_short_run_is_quiet_and_a_long_one_has_a_bar(capsys, monkeypatch):
    train(lora(), Letters(), rows(), TrainConfig(**FAST), eval_dataset=rows(4))
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("train: 24 rows") and "\neval: 4 rows" in out

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("minilora.common.progress.DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    train(lora(), Letters(), rows(), TrainConfig(**FAST))
    shown = terminal.getvalue()
    assert all(word in shown for word in ("loss=", "lr=", "tok/s=", "5/5"))
