"""Proves training in 16 bit, interrupted training, and the errors for training that cannot work.

Oracles: the fp32 run, and figures that the loss scaler must not change.
"""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.toy import FAST, Letters, Wrapped, adapters, llama, lora, relative, rows
from minilora.lora.config import LoRAConfig
from minilora.lora.inject import inject
from minilora.lora.layer import LoRALayer
from minilora.losses.classification import Classify
from minilora.training import checks, session
from minilora.training.batch_sampler import BatchPlan
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from minilora.training.precision import precision_of
from minilora.training.runtime import uninterrupted

# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_follows_the_model_with_fp32_masters(dtype):
    exact = train(lora(), Letters(), rows(), TrainConfig(**FAST))
    model = lora(llama().to(dtype))
    result = train(model, Letters(), rows(), TrainConfig(**FAST))
    assert all(
        p.dtype == torch.float32 and p.grad.dtype == torch.float32
        for p in model.parameters()
        if p.requires_grad
    )
    assert result.losses == pytest.approx(exact.losses, rel=2e-2)  # measured: 2e-3 (bf16)
    assert result.losses[-1] < result.losses[0]


def test_the_loss_scale_is_taken_off_before_clipping(tmp_path):
    norms = []
    for name, model in [("fp32", lora()), ("fp16", lora(llama().half()))]:
        result = train(
            model,
            Letters(),
            rows(),
            TrainConfig(output_dir=tmp_path / name, logging_steps=1, **FAST),
        )
        assert result.log is not None
        lines = [json.loads(line) for line in result.log.read_text().splitlines()]
        norms.append([line["grad_norm"] for line in lines if "grad_norm" in line])
    assert norms[1] == pytest.approx(norms[0], rel=0.1)  # fp16's rounding; the scale is 65536


@pytest.mark.parametrize(("field", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_when_asked_for(field, dtype):
    model, seen = lora(), []
    model.model.layers[0].mlp.down_proj.base_layer.register_forward_hook(
        lambda m, i, out: seen.append(out.dtype)
    )
    train(model, Letters(), rows(), TrainConfig(**{field: True}, **FAST), eval_dataset=rows(4))
    assert set(seen) == {dtype}


def test_the_loss_scaler_skips_an_overflow_and_goes_on(monkeypatch):
    scalers = []

    def huge(model, config, device):
        autocast, _ = precision_of(model, config, device)
        scalers.append(torch.amp.GradScaler("cpu", init_scale=2.0**120))
        return autocast, scalers[0]

    model = lora(llama().half())
    before = adapters(model)
    monkeypatch.setattr(session, "precision_of", huge)
    train(model, Letters(), rows(), TrainConfig(**FAST))
    assert scalers[0].get_scale() == 2.0**115
    # every step overflowed, so no weight changed
    assert relative(adapters(model), before) == 0


def test_precision_errors():
    device = torch.device("cpu")
    for model, fields, message in [
        (lora(llama().bfloat16()), {"bf16": False}, 'load it with dtype="float32"'),
        (lora(llama().bfloat16()), {"fp16": True}, "leave fp16 None"),
        (lora(llama().half()), {"bf16": True}, "leave bf16 None"),
    ]:
        with pytest.raises(ValueError, match=message):
            precision_of(model, TrainConfig(**fields), device)
    assert not precision_of(lora(llama().bfloat16()), TrainConfig(bf16=True), device)[
        1
    ].is_enabled()
    assert precision_of(lora(llama().half()), TrainConfig(), device)[1].is_enabled()


# ---- Ctrl-C


class Stopped(nn.Module):
    """Model that raises KeyboardInterrupt after a number of forward passes."""

    def __init__(self, model, after):
        super().__init__()
        self.inner, self.left = model, after

    def forward(self, **inputs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return SimpleNamespace(logits=self.inner(inputs["input_ids"]))


def test_interrupted_in_a_step_keeps_the_steps_before_it():
    whole = train(Wrapped(lora()), Letters(), rows(), TrainConfig(**FAST))
    model = Stopped(lora(), 3)
    result = train(model, Letters(), rows(), TrainConfig(**FAST))
    assert result.interrupted and result.steps == 3 and result.losses == whole.losses[:3]
    first = train(Stopped(lora(), 0), Letters(), rows(), TrainConfig(**FAST))
    assert first.interrupted and first.steps == 0 and first.loss is None


def test_ctrl_c_waits_for_the_end_of_an_update():
    # a background job ignores SIGINT by default
    before, done = (
        signal.signal(signal.SIGINT, signal.default_int_handler),
        [],
    )
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)
        done.append(2)
    assert done == [1]
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_training_works_off_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(train, lora(), Letters(), rows(), TrainConfig(**FAST)).result()
    assert result.losses == train(lora(), Letters(), rows(), TrainConfig(**FAST)).losses


# ---- errors


def test_nothing_to_train():
    model = llama().requires_grad_(False)
    with pytest.raises(ValueError, match=r"inject an adapter first, minilora.inject\(model"):
        train(model, Letters(), rows())


def test_masters_below_fp32():
    model = lora()
    next(m for m in model.modules() if isinstance(m, LoRALayer)).adapters[
        "default"
    ].lora_A.data = torch.zeros(4, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="lora_A trains in torch.bfloat16.*1 of 28 are not"):
        train(model, Letters(), rows())


class Cut(LoRALayer):
    """LoRA layer whose correction is cut off from the gradient or from the output."""

    how = "detach"

    def forward(self, x):
        h = super().forward(x)
        return h.detach() if self.how == "detach" else self.base_layer(x) + 0 * h


def cut(model, how):
    """Cut the adapter of one layer off; return the pattern of its name."""
    layer = model.model.layers[1].self_attn.q_proj
    layer.__class__ = type("Cut", (Cut,), {"how": how})
    return r"model\.layers\.1\.self_attn\.q_proj\.adapters\.default"


def test_an_adapter_that_is_cut_off_is_named_at_step_1():
    model = lora()
    name = cut(model, "detach")
    before = adapters(model)
    with pytest.raises(ValueError, match=f"step 1: 1 of the trained parts got no gradient: {name}"):
        train(model, Letters(), rows(), TrainConfig(**FAST))
    assert relative(adapters(model), before) == 0


def test_an_adapter_without_any_gradient_is_named_after_one_pass(capsys):
    model = lora()
    name = cut(model, "zero")
    config = TrainConfig(**FAST | {"max_steps": 7})  # 24 rows are 3 steps
    with pytest.warns(UserWarning, match=f"1 of the trained parts .* first 3 steps.*: {name}"):
        train(model, Letters(), rows(), config)
    assert (
        "step 1: 1 of the trained parts got no gradient from these rows" in capsys.readouterr().out
    )


class NoBos(Letters):
    """Letters without BOS: the text "a" is one token and EOS."""

    def encode(self, text, add_special_tokens=True):
        return super().encode(text, add_special_tokens=False)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_texts_of_one_token_first_train_as_any_others(method, recwarn):
    """The softmax over one key is 1, so the gradients of q and k are exactly zero."""
    data = [{"text": "a"}] * 8 + [{"text": "abcabc"}] * 8
    config = TrainConfig(method=method, group_by_length=False, **FAST)
    config = replace(config, seed=next(s for s in range(10**4) if short_first(data, s, config)))
    model = lora() if method == "lora" else llama()
    result = train(model, NoBos(), data, config)
    assert result.steps == 5 and result.loss < result.losses[0]
    assert not [warning for warning in recwarn if "gradient" in str(warning.message)]
    if method == "lora":
        layer = model.model.layers[0].self_attn.q_proj.adapters["default"]
        assert layer.lora_B.any()


def short_first(data, seed, config):
    """Return True if the first step of a seed has short rows only."""
    plan = BatchPlan([len(row["text"]) for row in data], replace(config, seed=seed))
    return all(index < 8 for micro_batch in plan[0] for index in micro_batch)


def test_texts_of_one_token_only_name_the_parts_that_cannot_learn():
    model = lora()
    with pytest.warns(UserWarning, match="4 of the trained parts had no gradient"):
        result = train(model, NoBos(), [{"text": "a"}, {"text": "b"}], TrainConfig(**FAST))
    assert result.loss < result.losses[0]


class Experts(nn.Module):
    """Two experts; each row goes to one of them alone, by its first letter."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.first, self.second = nn.Linear(131, 131), nn.Linear(131, 131)

    def forward(self, input_ids, **more):
        logits = self.inner(input_ids)
        expert = self.first if input_ids[0, 1] == ord("a") + 3 else self.second
        return SimpleNamespace(logits=expert(logits))


def test_an_expert_without_a_token_in_step_1_trains_later(recwarn):
    model = Experts(llama())
    inject(model, LoRAConfig(r=4, target_modules=["first", "second"]))
    data = [{"text": "abc"}, {"text": "bcd"}]
    fields = {"per_device_train_batch_size": 1, "group_by_length": False}
    train(model, Letters(), data, TrainConfig(**FAST | fields))
    assert model.first.adapters["default"].lora_B.any()
    assert model.second.adapters["default"].lora_B.any()
    assert not [warning for warning in recwarn if "gradient" in str(warning.message)]


def test_a_head_that_starts_at_zero_trains():
    """Behind a head of zeros every adapter has a zero gradient in step 1."""
    model = llama()
    objective = Classify(["a", "b"])
    objective.add_head(model)
    model.score.weight.data.zero_()
    inject(model, LoRAConfig(r=4, target_modules="all-linear", modules_to_save=["score"]))
    data = [{"text": "abc", "label": "a"}, {"text": "bcd", "label": "b"}] * 8
    result = train(model, Letters(), data, TrainConfig(**FAST), objective=objective)
    assert result.steps == 5 and result.loss < result.losses[0]


def test_a_zero_gradient_of_A_at_the_start_is_right():
    model = lora()
    train(model, Letters(), rows(), TrainConfig(learning_rate=1e-2, max_steps=1, max_grad_norm=0))
    layer = model.model.layers[0].mlp.up_proj.adapters["default"]
    assert not layer.lora_A.grad.any() and layer.lora_B.grad.any()


def test_a_loss_that_is_not_finite_names_its_step_and_changes_nothing():
    model = lora()
    calls = []

    def poison(module, inputs, out):
        calls.append(1)
        return out * float("nan") if len(calls) == 3 else out

    model.model.norm.register_forward_hook(poison)
    with pytest.raises(ValueError, match=r"step 3: the loss of rows \d+, \d+, .* is nan"):
        train(model, Letters(), rows(), TrainConfig(**FAST))
    assert all(torch.isfinite(p).all() for p in adapters(model).values())


def test_a_gradient_that_is_not_finite_names_its_step():
    model = lora()
    model.model.layers[0].mlp.up_proj.adapters["default"].lora_B.register_hook(
        lambda g: g * float("inf")
    )
    with pytest.raises(ValueError, match="step 1: the gradient is"):
        train(model, Letters(), rows(), TrainConfig(**FAST))


def test_a_run_that_ends_above_its_start_warns(recwarn):
    model = lora()
    train(model, Letters(), rows(), TrainConfig(**FAST | {"max_steps": 30}))
    assert not [warning for warning in recwarn if "loss began" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"began at [\d.]+ and ended at .*Lower learning_rate"):
        result = train(model, Letters(), rows(), TrainConfig(**FAST | {"learning_rate": 5.0}))
    assert result.loss > result.losses[0]


@pytest.mark.parametrize(
    ("losses", "warned"),
    [
        ([], False),
        ([2.0], False),
        ([2.0, 76.0], True),
        ([2.0, 90.0, 1.5, 1.4, 1.6, 1.5], False),
        ([2.0, 1.5, 1.4, 1.5, 1.2, 2.2], False),  # one noisy batch at the end
        ([2.0, 1.5, 1.4, 1.5, 3.0, 9.0], True),
        ([2.0] + [1.0] * 20 + [2.1] * 12, True),
    ],
)
def test_a_rising_loss_is_told_from_a_noisy_batch(losses, warned, recwarn):
    checks.warn_of_rising_loss(losses)
    assert len(recwarn) == int(warned)


def test_other_errors():
    with pytest.raises(ValueError, match="no trained token|none of"):
        train(lora(), Letters(), rows(), TrainConfig(max_length=2))
    with pytest.raises(ValueError, match="does not offer it"):
        train(Wrapped(lora()), Letters(), rows(), TrainConfig(gradient_checkpointing=True))
    with pytest.raises(ValueError, match="Wrapped lets packed documents see each other"):
        train(Wrapped(lora()), Letters(), rows(), TrainConfig(packing=True))
