"""Tests of `minilora train --objective` and `--method full`.

They save the same weights as the function calls, every field of an objective is an option with its
help text, and an option without an effect is refused.
"""

import json
import re
from dataclasses import fields

import pytest
import torch

import minilora as ml
from helpers.chats import furnish
from minilora.cli.main import main
from minilora.cli.values import parse_value
from minilora.losses import OBJECTIVES

PAIRS = [
    {"prompt": f"{a} plus {b} is ", "chosen": str(a + b), "rejected": "none"}
    for a in range(3)
    for b in range(3)
]
TEXTS = [
    {"text": f"{a} plus {b}", "label": "even" if (a + b) % 2 == 0 else "odd one"}
    for a in range(3)
    for b in (1, 2)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a model, its tokenizer and two datasets."""
    return furnish(tmp_path_factory.mktemp("place"), pairs=PAIRS, texts=TEXTS)


# ---- oracle


def test_dpo_saves_the_adapter_of_the_function_calls(place, capsys):
    run = [
        "train",
        str(place / "model"),
        str(place / "pairs.jsonl"),
        "--adapter",
        str(place / "dpo"),
        "--r",
        "4",
    ]
    run += ["--dtype", "float32", "--max_steps", "3", "--eval_dataset", str(place / "pairs.jsonl")]
    assert main([*run, "--objective", "dpo", "--beta", "0.3", "--loss_type", "ipo"]) == 0
    model, chat = (
        ml.load_model(place / "model", dtype="float32"),
        ml.load_tokenizer(place / "model"),
    )
    ml.inject(model, ml.LoRAConfig(r=4), seed=42)
    objective = ml.DPO(beta=0.3, loss_type="ipo")
    result = ml.train(
        model, chat, PAIRS, ml.TrainConfig(max_steps=3), objective=objective, eval_dataset=PAIRS
    )
    assert f"eval_margin {result.evals[-1]['eval_margin']:.4g}" in capsys.readouterr().out
    trained = ml.adapter_state_dict(model)
    again = ml.load_model(place / "model", dtype="float32")
    ml.load_adapter(again, place / "dpo")
    saved = ml.adapter_state_dict(again)
    assert trained.keys() == saved.keys() and all(
        torch.equal(trained[key], saved[key]) for key in saved
    )


def test_classify_adds_its_head_and_saves_it(place):
    run = [
        "train",
        str(place / "model"),
        str(place / "texts.jsonl"),
        "--adapter",
        str(place / "classes"),
    ]
    run += [
        "--dtype",
        "float32",
        "--max_steps",
        "2",
        "--objective",
        "classify",
        "--labels",
        "even,odd one",
    ]
    assert main(run) == 0
    model, objective = (
        ml.load_model(place / "model", dtype="float32"),
        ml.Classify(["even", "odd one"]),
    )
    objective.add_head(model)
    ml.load_adapter(model, place / "classes")
    assert "base_model.model.score.weight" in ml.adapter_state_dict(model)
    assert len(objective.predict(model, ml.load_tokenizer(place / "model"), ["1 plus 1"])) == 1


def test_distill_loads_the_teacher_and_full_saves_the_model(place):
    run = [
        "train",
        str(place / "model"),
        str(place / "texts.jsonl"),
        "--folder",
        str(place / "full"),
        "--max_steps",
        "2",
    ]
    run += [
        "--learning_rate",
        "1e-6",
        "--method",
        "full",
        "--objective",
        "distill",
        "--teacher",
        str(place / "model"),
    ]
    assert main(run) == 0
    model = ml.load_model(place / "full", dtype="float32")
    assert ml.load_tokenizer(place / "full").encode("1 plus 1")
    base = ml.load_model(place / "model", dtype="float32")
    tokens = torch.arange(9)[None]
    # At this learning rate the weights change little.
    torch.testing.assert_close(model(tokens), base(tokens), rtol=1e-2, atol=1e-2)
    assert not torch.equal(model(tokens), base(tokens))


def test_grpo_takes_its_reward_from_a_file_and_continues(place, capsys):
    rewards = place / "rewards.py"
    rewards.write_text("def length(prompt, answer, row):\n    return len(answer) % 7\n")
    prompts = place / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in PAIRS))
    run = ["train", str(place / "model"), str(prompts), "--dtype", "float32"]
    run += ["--objective", "grpo", "--reward", f"{rewards}:length", "--num_generations", "4"]
    run += ["--max_completion_length", "5", "--loss_type", "dr_grpo", "--max_steps", "2"]
    run += ["--output_dir", str(place / "grpo"), "--save_steps", "1"]
    assert main(run) == 0
    assert "step 2: reward" in capsys.readouterr().out
    trained = ml.load_model(place / "model", dtype="float32")
    ml.load_adapter(trained, place / "grpo" / "adapter")
    resumed = [*run, "--resume_from_checkpoint", str(place / "grpo" / "checkpoint-1")]
    assert main([*resumed, "--adapter", str(place / "again")]) == 0
    again = ml.load_model(place / "model", dtype="float32")
    ml.load_adapter(again, place / "again")
    ours, theirs = ml.adapter_state_dict(trained), ml.adapter_state_dict(again)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_reward_model_saves_its_head(place):
    run = ["train", str(place / "model"), str(place / "pairs.jsonl"), "--dtype", "float32"]
    run += ["--objective", "reward_model", "--max_steps", "1", "--adapter", str(place / "rater")]
    assert main(run) == 0
    model = ml.load_model(place / "model", dtype="float32")
    ml.RewardModel().add_head(model)
    ml.load_adapter(model, place / "rater")
    assert "base_model.model.score.weight" in ml.adapter_state_dict(model)


# ---- property


def test_every_field_of_an_objective_is_an_option_with_its_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = re.sub(r"\s+", "", capsys.readouterr().out)
    for objective in OBJECTIVES.values():
        for field in fields(objective):
            assert f"--{field.name}" in shown
            assert re.sub(r"\s+", "", field.metadata["help"]) in shown
    assert parse_value("even,odd one", list[str]) == ["even", "odd one"]


# ---- error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "0.1"], "--beta has no effect with --objective sft"),
        (
            ["--objective", "dpo", "--kl_weight", "1"],
            "--kl_weight has no effect with --objective dpo",
        ),
        (["--objective", "distill"], "--objective distill needs --teacher"),
        (["--objective", "grpo"], "--objective grpo needs --reward"),
        (
            ["--objective", "grpo", "--reward", "nowhere.py:reward"],
            "there is no file nowhere.py",
        ),
        (
            ["--objective", "grpo", "--reward", f"{__file__}:no_such_function"],
            "no_such_function",
        ),
        (["--objective", "dpo", "--beta", "0"], "beta: expected > 0"),
        (["--method", "full", "--r", "4"], "--r has no effect with --objective sft --method full"),
    ],
)
def test_a_mistake_gives_a_one_line_message_before_anything_is_loaded(options, message, capsys):
    assert main(["train", "nowhere", "rows.jsonl", *options]) == 1
    said = capsys.readouterr().err
    assert said.startswith("minilora: ") and message in said and "Traceback" not in said
