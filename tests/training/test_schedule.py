"""Proves that learning rates equal transformers', and that an epoch has every sample once.

An invalid config names its error. Oracles: transformers' schedulers; for the batches, counting.
"""

import dataclasses
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from helpers.toy import Letters, lora
from minilora.common.suggestions import FOREIGN_NAMES
from minilora.training.batch_sampler import BatchPlan, seed_of
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from minilora.training.optim.lr_schedule import check_schedule, learning_rate, total_steps

# ---- learning rate


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (1, 1), (7, 100)])
def test_rates_are_those_of_transformers(name, warmup, total):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    config = TrainConfig(learning_rate=3e-4, lr_scheduler_type=name, warmup_steps=warmup)
    for step in range(total):
        assert learning_rate(config, step, total) == pytest.approx(
            theirs.get_last_lr()[0], rel=1e-12, abs=1e-18
        )
        optimizer.step()
        theirs.step()


def test_warmup_ratio_counts_as_transformers_does():
    from transformers import TrainingArguments

    for ratio, total in [(0.1, 100), (0.03, 50), (0.05, 7), (1.0, 4)]:
        steps = (
            TrainingArguments(warmup_steps=ratio, report_to=[]).get_warmup_steps(total)
            if ratio < 1
            else total
        )
        by_ratio = TrainConfig(warmup_ratio=ratio)
        by_steps = TrainConfig(warmup_steps=steps)
        assert [learning_rate(by_ratio, s, total) for s in range(total)] == [
            learning_rate(by_steps, s, total) for s in range(total)
        ]


def test_constant_does_not_drop_a_warmup():
    config = TrainConfig(learning_rate=1.0, lr_scheduler_type="constant", warmup_steps=2)
    assert [learning_rate(config, step, 4) for step in range(4)] == [0.0, 0.5, 1.0, 1.0]


def test_total_steps():
    assert total_steps(TrainConfig(num_train_epochs=2), 7) == 14
    # never fewer samples than requested
    assert total_steps(TrainConfig(num_train_epochs=0.5), 7) == 4
    assert total_steps(TrainConfig(num_train_epochs=2, max_steps=100), 7) == 100


@pytest.mark.parametrize(
    "fields", [{"warmup_steps": 1}, {"warmup_ratio": 0.1}, {"warmup_steps": 9}]
)
def test_a_run_of_warmup_alone_with_rate_zero_is_refused(fields):
    """Of a warm-up, the first step has rate 0, so a run of one step would learn nothing."""
    config = TrainConfig(max_steps=1, **fields)
    with pytest.raises(ValueError, match=f"{next(iter(fields))} .* would learn nothing"):
        check_schedule(config, 1)
    with pytest.raises(ValueError, match="would learn nothing"):
        train(lora(), Letters(), "no rows are read", config)


def test_a_warmup_as_long_as_the_run_warns_before_step_1():
    config = TrainConfig(learning_rate=1e-3, warmup_steps=5, max_steps=4)
    with pytest.warns(UserWarning, match="5 steps, and the run has 4.*ends at 0.0006 and never"):
        check_schedule(config, 4)
    with pytest.warns(UserWarning, match="warmup_ratio 1.0: the warm-up has 4 steps"):
        check_schedule(TrainConfig(warmup_ratio=1.0), 4)
    with pytest.raises(ValueError, match="the warm-up has 1 step, and the run has 1"):
        check_schedule(TrainConfig(warmup_ratio=1.0), 1)
    with pytest.warns(UserWarning, match="learning_rate is 0"):
        check_schedule(TrainConfig(learning_rate=0), 4)


def test_a_shorter_warmup_is_not_mentioned(recwarn):
    check_schedule(TrainConfig(warmup_ratio=0.1), 2)
    check_schedule(TrainConfig(warmup_steps=3), 4)
    check_schedule(TrainConfig(), 1)
    assert len(recwarn) == 0


# ---- batches

plans = st.builds(
    lambda lengths, batch, accumulation, group, seed: BatchPlan(
        lengths,
        TrainConfig(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            group_by_length=group,
            seed=seed,
        ),
    ),
    st.lists(st.integers(2, 50), min_size=1, max_size=200),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 5),
)


@given(plans, st.integers(0, 3))
def test_an_epoch_has_every_sample_once(plan, epoch):
    steps = [plan[epoch * len(plan) + index] for index in range(len(plan))]
    assert Counter(i for step in steps for micro in step for i in micro) == Counter(
        range(len(plan.lengths))
    )
    assert all(0 < len(micro) <= plan.micro_batch_size for step in steps for micro in step)
    sizes = sorted(sum(map(len, step)) for step in steps)
    assert sizes[1:] == [plan.step_size] * (len(steps) - 1)  # only one step may be smaller


@given(plans, st.randoms())
def test_a_step_depends_on_nothing_but_its_number(plan, random):
    numbers = [random.randrange(5 * len(plan)) for _ in range(6)]
    found = {number: plan[number] for number in numbers}
    torch.manual_seed(random.randrange(100))
    assert all(plan[number] == found[number] for number in reversed(numbers))


@given(st.lists(st.integers(2, 50), min_size=1, max_size=100), st.booleans())
def test_a_step_has_the_same_samples_however_it_is_split(lengths, group):
    splits = [(8, 1), (4, 2), (2, 4), (1, 8)]
    configs = [
        TrainConfig(
            per_device_train_batch_size=b, gradient_accumulation_steps=a, group_by_length=group
        )
        for b, a in splits
    ]
    plans = [BatchPlan(lengths, config) for config in configs]
    for number in range(2 * len(plans[0])):
        samples = [sorted(i for micro in plan[number] for i in micro) for plan in plans]
        assert samples[1:] == samples[:-1]


def test_epochs_and_seeds_differ():
    config = TrainConfig(per_device_train_batch_size=4)
    plan, other = (
        BatchPlan([5] * 64, config),
        BatchPlan([5] * 64, dataclasses.replace(config, seed=43)),
    )
    orders = [[plan[epoch * 16 + i] for i in range(16)] for epoch in range(3)] + [
        [other[i] for i in range(16)]
    ]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_grouping_by_length_saves_padding_and_stays_shuffled():
    generator = torch.Generator().manual_seed(0)
    lengths = (
        (torch.randn(2000, generator=generator).mul(0.8).exp() * 60).long().clamp_min(2).tolist()
    )
    share = {}
    for group in (False, True):
        plan = BatchPlan(lengths, TrainConfig(group_by_length=group))
        micros = [
            [lengths[i] for i in micro] for number in range(len(plan)) for micro in plan[number]
        ]
        share[group] = 1 - sum(lengths) / sum(len(micro) * max(micro) for micro in micros)
        longest = [max(micro) for micro in micros]
        rises = sum(a < b for a, b in zip(longest, longest[1:], strict=False)) / (len(longest) - 1)
        assert 0.4 < rises < 0.6  # sorted batches would give 0 or 1
    assert share[True] < 0.25 * share[False]  # measured: 0.10 and 0.60


def test_grouping_mixes_small_data_differently_each_epoch():
    """With few steps in an epoch, one window would contain all samples.

    Samples that are neighbours by length would then be together in every epoch.
    """
    plan = BatchPlan(list(range(2, 66)), TrainConfig(per_device_train_batch_size=4))
    first, second = (
        {frozenset(i for m in plan[e * 16 + s] for i in m) for s in range(16)} for e in range(2)
    )
    assert len(first & second) <= 2


@pytest.mark.slow
def test_order_does_not_depend_on_the_hash_seed():
    code = (
        "from minilora.training.config import TrainConfig\n"
        "from minilora.training.batch_sampler import BatchPlan\n"
        "plan = BatchPlan([i % 7 + 2 for i in range(40)], TrainConfig())\n"
        "print([plan[i] for i in range(9)])"
    )
    out = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(out) == 1 and len(out.pop()) > 100


def test_seeds_differ_in_the_32_bits_that_torch_uses():
    seeds = {
        seed_of(seed, kind, step)
        for seed in range(20)
        for kind in ("epoch", "dropout")
        for step in range(100)
    }
    assert len(seeds) == 4000 and all(0 <= seed < 2**32 for seed in seeds)


# ---- config


def test_every_field_has_a_help_text():
    for f in dataclasses.fields(TrainConfig):
        assert len(f.metadata["help"]) > 10, f.name
    assert pickle.loads(pickle.dumps(TrainConfig(max_steps=3))) == TrainConfig(max_steps=3)
    assert dataclasses.replace(TrainConfig(), seed=1).to_dict() == TrainConfig(seed=1).to_dict()


def test_names_and_defaults_are_those_of_training_arguments():
    from transformers import TrainingArguments

    theirs = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    # fields of SFTConfig, two of them also of transformers 4, and one of GRPOConfig
    own = {"max_length", "packing", "group_by_length", "warmup_ratio", "chat_template_kwargs"}
    # fields of PEFT and EarlyStoppingCallback
    own |= {"loraplus_lr_ratio", "early_stopping_patience"}
    # transformers takes functions; datasets has its own cache
    own |= {"eval_metrics", "eval_answers", "dataset_cache"}
    own |= {"method"}  # only in minilora
    assert {f.name for f in dataclasses.fields(TrainConfig)} - theirs.keys() <= own
    values = TrainConfig().to_dict()
    same = (
        "max_steps num_train_epochs per_device_train_batch_size per_device_eval_batch_size "
        "weight_decay seed"
    )
    same += (
        " gradient_accumulation_steps adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
        "save_steps save_total_limit"
    )
    for name in same.split():
        assert values[name] == theirs[name], name
    assert values["lr_scheduler_type"] == theirs["lr_scheduler_type"] == "linear"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_steps": 0}, "max_steps: expected at least 1, or -1"),
        ({"max_steps": -2}, "max_steps: expected >= -1, got -2"),
        ({"max_steps": 1.5}, "max_steps: expected a whole number, got 1.5"),
        ({"max_steps": True}, "max_steps: expected a whole number, got True"),
        ({"learning_rate": "1e-4"}, "learning_rate: expected a finite number, got '1e-4'"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number, got nan"),
        ({"learning_rate": -1.0}, "learning_rate: expected >= 0, got -1.0"),
        ({"adam_beta2": 1.0}, "adam_beta2: expected >= 0 and < 1, got 1.0"),
        ({"adam_epsilon": 0}, "adam_epsilon: expected > 0, got 0.0"),
        ({"warmup_ratio": 1.1}, "warmup_ratio: expected >= 0 and <= 1, got 1.1"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: expected one of linear, cosine"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected >= 1, got 0"),
        ({"group_by_length": 1}, "group_by_length: expected True or False, got 1"),
        ({"eval_steps": 0}, "eval_steps: expected >= 1, got 0"),
        ({"bf16": "yes"}, "bf16: expected True or False, got 'yes'"),
        ({"output_dir": 3}, "output_dir: expected a string, got 3"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "warmup_ratio and warmup_steps are both set"),
        ({"bf16": True, "fp16": True}, "choose one"),
        ({"resume_from_checkpoint": "last"}, "set output_dir"),
    ],
)
def test_an_invalid_value_names_the_expected_values(given, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TrainConfig(**given)


@pytest.mark.parametrize(
    "config, foreign, ours",
    [
        (TrainConfig, "lr", "learning_rate"),
        (TrainConfig, "epochs", "num_train_epochs"),
        (TrainConfig, "batch_size", "per_device_train_batch_size"),
        (TrainConfig, "max_seq_length", "max_length"),
        (ml.LoRAConfig, "lora_r", "r"),
        (ml.LoRAConfig, "rank", "r"),
        (ml.LoRAConfig, "alpha", "lora_alpha"),
        (ml.LoRAConfig, "target_module", "target_modules"),
    ],
)
def test_names_of_other_libraries_are_answered_with_ours(config, foreign, ours):
    with pytest.raises(TypeError, match=f"{config.__name__} has no field '{foreign}'.*: {ours}"):
        config(**{foreign: 1})


def test_every_foreign_name_leads_to_an_option_and_is_none_itself():
    options = {field.name for config in (TrainConfig, ml.LoRAConfig) for field in fields(config)}
    others = {"quantize", "eval_dataset", "columns", "separator", "system", "test_size"}
    others |= {"q_proj", "k_proj", "v_proj"}  # names of modules
    assert set(FOREIGN_NAMES.values()) <= options | others
    assert not options & FOREIGN_NAMES.keys()


def test_an_unknown_name_raises_with_the_nearest_name():
    with pytest.raises(TypeError, match="no field 'learning_rat'. Nearest: learning_rate"):
        TrainConfig(learning_rat=1e-4)
    with pytest.raises(TypeError, match="per_device_train_batch_size"):
        TrainConfig(per_device_batch_size=4)


def test_harmless_spellings_are_accepted(tmp_path):
    config = TrainConfig(learning_rate=1, num_train_epochs=2, output_dir=tmp_path)
    assert (config.learning_rate, config.num_train_epochs, config.output_dir) == (
        1.0,
        2.0,
        str(tmp_path),
    )
