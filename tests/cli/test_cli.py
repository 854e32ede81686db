"""Tests of the command line: train, evaluate, generate and merge.

A command gives the same results as the function calls, every config field is an option with its
help text, and a mistake gives a one-line message and an exit status, not a traceback.
"""

import copy
import json
import re
import shlex
import shutil
from dataclasses import fields

import pytest
import torch

import minilora as ml
from helpers.chats import furnish
from helpers.tiny import python
from minilora.cli.main import _parser, main
from minilora.cli.options import EXAMPLES
from minilora.cli.values import parse_value
from minilora.tools.merge_report import merge_report

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{a} plus {b}"},
            {"role": "assistant", "content": str(a + b)},
        ]
    }
    for a in range(3)
    for b in range(3)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a model, its tokenizer and a dataset."""
    return furnish(tmp_path_factory.mktemp("place"), rows=ROWS)


# ---- oracle


def test_the_commands_do_what_the_functions_do(place, capsys):
    source, rows, adapter = str(place / "model"), str(place / "rows.jsonl"), str(place / "adapter")
    run = [
        "train",
        source,
        rows,
        "--adapter",
        adapter,
        "--dtype",
        "float32",
        "--quantize",
        "nf4",
        "--r",
        "4",
    ]
    run += ["--eval_dataset", rows]
    assert (
        main([*run, "--target_modules", "q_proj,up_proj", "--max_steps", "3", "--seed", "7"]) == 0
    )
    assert re.search(
        r"\ndone after 3 steps, loss \d\.\d{1,3}, eval_loss \d\.\d{1,3}; in ",
        capsys.readouterr().out,
    )

    card = (place / "adapter" / "README.md").read_text()
    assert (
        f"| rows | {len(ROWS)} |" in card
        and "| training steps | 3 |" in card
        and str(place) not in card
    )

    model = ml.load_model(source, quantize="nf4", dtype="float32")
    chat = ml.load_tokenizer(source)
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj", "up_proj"]), seed=7)
    ml.train(model, chat, ROWS, ml.TrainConfig(max_steps=3, seed=7))
    trained = ml.adapter_state_dict(model)
    again = ml.load_model(source, quantize="nf4", dtype="float32")
    ml.load_adapter(again, adapter)
    saved = ml.adapter_state_dict(again)
    assert trained.keys() == saved.keys() and all(
        torch.equal(trained[key], saved[key]) for key in saved
    )

    capsys.readouterr()
    assert (
        main(
            [
                "evaluate",
                source,
                rows,
                "--adapter",
                adapter,
                "--quantize",
                "nf4",
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    scores = ml.evaluate(model, chat, ROWS)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == pytest.approx(scores.as_dict())

    assert (
        main(["generate", source, "1 plus 1", "--max_new_tokens", "5", "--dtype", "float32"]) == 0
    )
    expected = ml.generate(
        ml.load_model(source, dtype="float32"), chat, "1 plus 1", max_new_tokens=5
    )
    assert capsys.readouterr().out == expected + "\n"

    merge = ["merge", source, adapter, str(place / "merged"), "--quantize", "none"]
    assert main([*merge, "--dtype", "float32"]) == 0
    dense = ml.load_model(source, dtype="float32")
    ml.load_adapter(dense, adapter)
    tokens = torch.tensor([chat.encode("1 plus 1")])
    merged = ml.load_model(place / "merged", dtype="float32")
    # The sums in fp32 have another order.
    torch.testing.assert_close(merged(tokens), dense(tokens), rtol=1e-4, atol=1e-4)
    assert ml.load_tokenizer(place / "merged").encode("1 plus 1") == chat.encode("1 plus 1")


@pytest.fixture(scope="module")
def adapter(place):
    """Folder of a small adapter for the model in 4 bits: ‖ΔW‖ is about 1 % of ‖W‖."""
    model = ml.load_model(place / "model", quantize="nf4", dtype="float32")
    ml.inject(model, ml.LoRAConfig(r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    for layer in model.modules():
        if isinstance(layer, ml.LoRALayer):
            torch.nn.init.normal_(layer.adapters["default"].lora_B, std=0.01)
    ml.save_adapter(model, place / "small")
    return str(place / "small")


@pytest.mark.parametrize("target", ["float32", "bfloat16", "original"])
def test_merge_writes_the_target_and_reports_its_error(place, adapter, capsys, target):
    source, rows, folder = str(place / "model"), str(place / "rows.jsonl"), place / target
    run = [
        "merge",
        source,
        adapter,
        str(folder),
        "--quantize",
        "nf4",
        "--dtype",
        "float32",
        "--target",
        target,
    ]
    assert main([*run, "--data", rows]) == 0
    model, chat = ml.load_model(source, quantize="nf4", dtype="float32"), ml.load_tokenizer(source)
    ml.load_adapter(model, adapter)
    dense = ml.load_model(source, dtype="float32")
    if target == "original":
        ml.load_adapter(dense, adapter)
    expected = ml.merge(dense if target == "original" else model)
    if target == "bfloat16":
        expected = expected.bfloat16()
    written = ml.load_model(folder, dtype="bfloat16" if target == "bfloat16" else "float32")
    assert all(
        torch.equal(value, written.state_dict()[key])
        for key, value in expected.state_dict().items()
    )
    said = capsys.readouterr().out
    report = merge_report(model, dense if target == "original" else None)
    assert f"{report.total.error[target]:.2g} / {report.total.projection[target]:.3f}" in said
    for name, scored in (("trained", model), (target, expected)):
        loss = ml.evaluate(scored, chat, ROWS, max_new_tokens=0).loss
        assert re.search(rf"loss {name} +{loss:.4f}", said)
    assert "every stage gives the same bits" in said


def test_merge_refuses_4_bits_that_lose_the_adapter(place, adapter, capsys):
    source, rows = str(place / "model"), str(place / "rows.jsonl")
    folder = place / "small4"
    run = ["merge", source, adapter, str(folder), "--dtype", "float32", "--target", "nf4"]
    assert main([*run, "--quantize", "nf4", "--rounding", "nearest"]) == 1
    out, said = capsys.readouterr()
    assert "all layers" in out and "--force" in said
    assert re.search(r"projection -?0\.\d\d on the update, expected 0\.9", said)
    assert not folder.exists()
    for more in ([], ["--data", rows]):
        assert (
            main([*run, *more, "--quantize", "none"]) == 1
            and "no layer with an active adapter is in 4 bits" in capsys.readouterr().err
        )
    assert main(["merge", source, adapter, str(place / "x" / ".." / "model")]) == 1
    assert "is the base itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounding", "nearest"], "--rounding is for --target nf4"),
        (["--target", "nf4", "--rounding", "nearest", "--seed", "1"], "--seed is for"),
        (["--seed", "1"], "--seed is for"),
        (["--rows", "3"], "--rows counts the rows of --data"),
    ],
)
def test_merge_refuses_options_that_would_change_nothing(place, adapter, capsys, options, message):
    run = ["merge", str(place / "model"), adapter, str(place / "none"), "--dtype", "float32"]
    assert main([*run, *options]) == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize("target", ["drawn", "nearest", "original-nf4"])
def test_merge_writes_4_bits(place, adapter, capsys, target):
    """Draws keep the update and are written; the nearest levels are written when forced."""
    source, folder = str(place / "model"), str(place / f"4-bits-{target}")
    run = ["merge", source, adapter, folder, "--dtype", "float32", "--quantize", "nf4"]
    options: dict = {"seed": 3}
    given = ["--target", "nf4", "--seed", "3"]
    if target == "nearest":
        options = {"rounding": "nearest"}
        given = ["--target", "nf4", "--rounding", "nearest", "--force"]
    if target == "original-nf4":
        options = {"original": ml.load_model(source, dtype="float32")}
        given = ["--target", "original-nf4"]
    assert main([*run, *given]) == 0
    assert "every stage gives the same bits" in capsys.readouterr().out
    model = ml.load_model(source, quantize="nf4", dtype="float32")
    ml.load_adapter(model, adapter)
    expected = ml.merge(model, "nf4", **options).state_dict()
    written = ml.load_model(folder, dtype="float32").state_dict()
    assert all(torch.equal(value, written[key]) for key, value in expected.items())


def test_merge_reports_a_damaged_folder_and_a_higher_loss(place, adapter, capsys, monkeypatch):
    """Merge compares the written folder with the model, and warns if the merge raises the loss."""
    save = ml.save_model

    def damaged(model, folder, **options):
        model = copy.deepcopy(model)
        model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] += 1
        save(model, folder, **options)

    monkeypatch.setattr(ml, "save_model", damaged)
    run = ["merge", str(place / "model"), adapter, str(place / "damaged"), "--dtype", "float32"]
    assert main(run) == 1
    assert (
        "differs from the merged model, first in model.layers.1.mlp.up_proj."
        in capsys.readouterr().err
    )
    merge = ml.merge
    monkeypatch.setattr(
        "minilora.tools.merge_report.merge",
        lambda *given, **options: torch.nn.Module.apply(merge(*given, **options), zero_norms),
    )
    main([*run, "--data", str(place / "rows.jsonl")])
    assert "raises the loss" in capsys.readouterr().err


def zero_norms(module):
    if "Norm" in type(module).__name__:
        module.weight.data.mul_(-30)


def test_another_chat_template_is_refused_unless_forced(place, tmp_path, capsys):
    """generate, evaluate and merge compare the chat template with the one that `train` recorded."""
    source, rows, adapter = tmp_path / "model", str(place / "rows.jsonl"), str(tmp_path / "adapter")
    shutil.copytree(place / "model", source)
    run = [
        "train",
        str(source),
        rows,
        "--adapter",
        adapter,
        "--dtype",
        "float32",
        "--max_steps",
        "1",
        "--r",
        "2",
    ]
    assert main(run) == 0
    with (source / "chat_template.jinja").open("a") as file:
        file.write("{# another #}")
    uses = [["generate", str(source), "1 plus 1", "--adapter", adapter, "--max_new_tokens", "1"]]
    uses += [["evaluate", str(source), rows, "--adapter", adapter, "--max_new_tokens", "1"]]
    uses += [["merge", str(source), adapter, str(tmp_path / "merged"), "--target", "original"]]
    for use in uses:
        assert main([*use, "--dtype", "float32"]) == 1
        said = capsys.readouterr().err
        assert (
            "trained with another chat_template." in said
            and "--no_check_base" in said
            and said.count("\n") == 1
        )
        assert main([*use, "--dtype", "float32", "--no_check_base"]) == 0


WARN = """
import sys, warnings
from minilora.cli import plan
from minilora.cli.main import main

def environment():
    warnings.warn("this is a sentence.", stacklevel=2)
    return "printed"

sys.stderr = sys.stdout
plan.environment = environment
before = warnings.formatwarning
assert main(["env"]) == 0 and warnings.formatwarning is before
"""


def test_a_warning_of_a_command_is_a_plain_sentence():
    assert python(WARN) == "minilora: warning: this is a sentence.\nprinted\n"


# ---- property


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("8", int, 8),
        ("1e-4", float, 1e-4),
        ("-1", int, -1),
        ("true", bool, True),
        ("False", bool | None, False),
        ("none", int | None, None),
        ("gaussian", bool | str, "gaussian"),
        ("out/run", str | None, "out/run"),
        ("q_proj", list[str] | str | None, ["q_proj"]),
        ("q_proj,layers.0.v_proj", list[str] | str | None, ["q_proj", "layers.0.v_proj"]),
        ("all-linear", list[str] | str | None, "all-linear"),
        (r".*\.[01]\..*", list[str] | str | None, r".*\.[01]\..*"),
        ("0,2", list[int] | int | None, [0, 2]),
        ("2", list[int] | int | None, 2),
        ('{"q_proj": 4}', dict[str, int], {"q_proj": 4}),
    ],
)
def test_option_values_are_parsed_by_the_type_of_their_field(text, hint, value):
    read = parse_value(text, hint)
    assert read == value and type(read) is type(value)


def test_every_field_is_an_option_with_its_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = re.sub(r"\s+", "", capsys.readouterr().out)
    for config in (ml.LoRAConfig, ml.TrainConfig):
        for field in fields(config):
            assert f"--{field.name}" in shown
            assert re.sub(r"\s+", "", field.metadata["help"]) in shown


# ---- error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere", "rows.jsonl", "--r", "0"], "r: expected >= 1, got 0"),
        (["train", "nowhere", "rows.jsonl", "--learning_rate", "-1"], "learning_rate"),
        (["generate", "./nowhere", "hello"], "nowhere"),
        (
            ["generate", "./nowhere", "hello", "--adapter", "no-adapter"],
            "no-adapter: no such folder. Expected one with",
        ),
        (["evaluate", "./nowhere", "rows.jsonl"], "dataset: rows.jsonl does not exist"),
        (
            ["merge", "./nowhere", "no-adapter", "out", "--data", "rows.jsonl"],
            "dataset: rows.jsonl does not exist",
        ),
        (["merge", "./nowhere", "no-adapter", "out"], "no-adapter: no such folder"),
        (
            ["train", "./nowhere", "rows.jsonl"],
            "dataset: rows.jsonl does not exist. Expected a file of rows; paths begin at /",
        ),
        (
            ["train", "./nowhere", "no.jsonl", "--max_steps", "1", "--warmup_steps", "1"],
            "the warm-up has 1 step, and the run has 1. The first step",
        ),
        (
            ["train", "./nowhere", "no.jsonl", "--load_best_model_at_end", "true"],
            "it needs eval_dataset",
        ),
        (
            ["train", "./nowhere", "no.jsonl", "--eval_metrics", "exact"],
            "Nearest: 'exact_match'",
        ),
        (["train", "./nowhere", __file__], "expected a path to .jsonl, .json, .csv or .parquet"),
    ],
)
def test_a_mistake_gives_a_one_line_message(arguments, message, capsys):
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("minilora: ") and message in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "m", "d", "--r", "x"], "--r: expected a whole number, got 'x'"),
        (
            ["train", "m", "d", "--rank_pattern", "q_proj"],
            "--rank_pattern: expected a JSON object, got 'q_proj'",
        ),
        (["train", "m", "d", "--bf16", "yes"], "--bf16: expected true or false or none, got 'yes'"),
        (["train", "m", "d", "--lora_r", "8"], "no option --lora_r. Nearest: --r."),
        (["train", "m", "d", "--lr=1"], "no option --lr. Nearest: --learning_rate."),
        (["train", "m", "d", "--max-seq-length", "8"], "Nearest: --max_length."),
        (["train", "m", "d", "--load_in_4bit", "true"], "Nearest: --quantize."),
        (["generate", "m", "p", "--adaptr", "a"], "no option --adaptr. Nearest: --adapter"),
        (["generate", "m", "two", "words"], "unexpected argument 'words'"),
        (["train", "m"], "required: dataset"),
        (["pln"], "there is no command 'pln'. Nearest: plan"),
    ],
)
def test_a_bad_option_exits_with_status_2_and_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said
    assert len(said.splitlines()) == 2 and "--help` " in said


def test_option_names_may_have_hyphens_and_are_never_abbreviated(capsys):
    parser = _parser()
    hyphens = ["train", "m", "d", "--learning-rate", "1", "--no-check-base", "--max-steps=-1"]
    known, unknown = parser.parse_known_args(hyphens)
    assert known.learning_rate == 1 and known.max_steps == -1
    assert unknown == ["--no-check-base"]  # an option of other commands
    known, _ = parser.parse_known_args(["generate", "m", "p", "--no-check-base"])
    assert known.check_base is False
    _, unknown = parser.parse_known_args(["train", "m", "d", "--learning", "1"])
    assert unknown[0] == "--learning"


def test_help_shows_each_command_with_types_choices_and_an_example(capsys):
    assert main([]) == 0
    assert "{train," in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"minilora {ml.__version__}\n"
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    for part in (
        "usage: minilora train MODEL DATASET [OPTIONS]",
        "--r N ",
        "--learning_rate X ",
        "--optim {adamw_torch,adamw_8bit,paged_adamw_8bit} ",
        "--use_dora true|false ",
        "--init_lora_weights true|gaussian|pissa|pissa_niter_N|loftq ",
        "example: minilora train MODEL",
    ):
        assert part in shown
    assert shown.count("usage:") == 1


def test_merge_help_shows_both_forms_with_an_example_each(capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    shown = capsys.readouterr().out
    for line in (
        "usage: minilora merge MODEL ADAPTER FOLDER [OPTIONS]",
        "       minilora merge RUN FOLDER [OPTIONS]",
        "examples:",
        "minilora merge MODEL out/adapter out/merged",
        "minilora merge out out/merged",
    ):
        assert line in shown.splitlines()


def test_each_example_of_the_help_is_a_command():
    examples = [line for text in EXAMPLES.values() for line in text.splitlines()]
    assert len(examples) > len(EXAMPLES)
    for example in examples:
        words = shlex.split(example)[1:]
        _, unknown = _parser().parse_known_args(words)
        assert not unknown, example
