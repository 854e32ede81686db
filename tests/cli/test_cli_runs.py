"""Tests of runs from a TOML file and of the commands plot, sweep and check-training.

They give the same results as the options and the function calls.
"""

import re

import pytest

from helpers.chats import furnish
from minilora.cli.main import main
from minilora.tools.plot.logs import read_log
from minilora.tools.sweep import sweep
from tests.cli.test_cli import ROWS

TOML = """
model = "{place}/model"
dataset = "{place}/rows.jsonl"
eval_dataset = "{place}/rows.jsonl"
dtype = "float32"
disable_tqdm = true
[adapter]
r = 2
target_modules = ["q_proj", "up_proj"]
rank_pattern = {{ up_proj = 4 }}
[training]
max_steps = 3
logging_steps = 1
learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a model, its tokenizer, a dataset and the TOML file of a run."""
    folder = furnish(tmp_path_factory.mktemp("place"), rows=ROWS)
    (folder / "run.toml").write_text(TOML.format(place=folder))
    return folder


# ---- oracle


def test_a_run_from_a_file_equals_the_run_of_its_options(place):
    given = [
        "train",
        f"{place}/model",
        f"{place}/rows.jsonl",
        "--eval_dataset",
        f"{place}/rows.jsonl",
        "--r",
        "2",
    ]
    given += [
        "--dtype",
        "float32",
        "--target_modules",
        "q_proj,up_proj",
        "--rank_pattern",
        '{"up_proj": 4}',
    ]
    given += ["--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-4"]
    assert main([*given, "--adapter", f"{place}/a", "--output_dir", f"{place}/out-a"]) == 0
    file = ["train", f"{place}/run.toml", "--learning_rate", "1e-4"]  # overrides the file
    assert main([*file, "--adapter", f"{place}/b", "--output_dir", f"{place}/out-b"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (place / "a" / name).read_bytes() == (place / "b" / name).read_bytes()
    assert read_log(place / "out-a")[0]["config"]["learning_rate"] == 1e-4
    prose = place / "prose.jsonl"
    prose.write_text('{"text": "what was forgotten"}\n')
    assert (
        main(
            [
                *file,
                "--adapter",
                f"{place}/c",
                "--output_dir",
                f"{place}/out-c",
                "--general_dataset",
                f"{prose}",
            ]
        )
        == 0
    )
    assert [
        line["eval_general_perplexity"] > 1
        for line in read_log(place / "out-c")
        if "eval_loss" in line
    ] == [True]
    assert main([*given[:3], "--general_dataset", f"{prose}"]) == 1
    assert main(["plot", f"{place}/out-a", f"{place}/out-b", "--file", f"{place}/runs.svg"]) == 0
    assert (place / "runs.svg").read_text().startswith("<?xml")


def test_check_training_reports_every_check_as_ok(place, capsys):
    assert (
        main(
            [
                "check-training",
                f"{place}/model",
                "--dtype",
                "float32",
                "--data",
                f"{place}/rows.jsonl",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert {"split", "eval", "packed", "off", "frozen", "moved", "merged"} <= set(
        re.findall(r"^(\w+) +\S+ +\S+  ok", out, re.M)
    )


@pytest.mark.slow  # three processes that import torch
def test_a_sweep_is_resumed_and_its_best_trial_is_that_of_the_logs(place, capsys):
    given = [
        "sweep",
        f"{place}/run.toml",
        "--search",
        "r=2,4",
        "--search",
        "learning_rate=1e-3:1e-2:log",
    ]
    given += ["--folder", f"{place}/sweep", "--max_steps", "2"]
    assert main([*given, "--trials", "1"]) == 0
    assert main([*given, "--trials", "2"]) == 0  # one more
    output = capsys.readouterr()
    assert output.out.count("trial 0: ") == 1 and "Trial 0 finished" not in output.err
    printed = re.findall(r"^ +(\d) +(\S+)  (.*)$", output.out.splitlines()[-2] + "\n", re.M)
    logs = {n: read_log(place / "sweep" / f"trial-{n}") for n in (0, 1)}
    losses = {
        n: [line["eval_loss"] for line in log if "eval_loss" in line][-1] for n, log in logs.items()
    }
    best = min(losses, key=losses.__getitem__)
    assert printed[0][:2] == (str(best), f"{losses[best]:.4f}")
    assert (
        1e-3 <= logs[best][0]["config"]["learning_rate"] <= 1e-2
        and logs[best][0]["config"]["max_steps"] == 2
    )
    assert (
        not (place / "sweep" / "trial-2").exists()
        and (place / "sweep" / "trial-1" / "adapter").is_dir()
    )
    assert main([*given[:-2], "--trials", "3", "--search", "r=2,8"]) == 1  # r is given twice
    with pytest.raises(ValueError, match="holds a search over"):
        sweep([f"{place}/run.toml"], {"r": "2,8"}, place / "sweep")


# ---- error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "not TOML"),
        ('model = "m"', "dataset missing"),
        (TOML + "lerning_rate = 1\n", "'lerning_rate' matches nothing. Nearest: 'learning_rate'"),
    ],
)
def test_a_bad_toml_file_gives_a_message(place, tmp_path, capsys, text, message):
    (tmp_path / "run.toml").write_text(text.format(place=place))
    assert main(["train", f"{tmp_path}/run.toml"]) == 1
    assert message in capsys.readouterr().err
    assert main(["train", f"{tmp_path}/none.toml"]) == 1


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("r=4", "expected several values"),
        ("r", "expected OPTION=VALUES"),
        ("r=8:4", "low < high"),
        ("r=0:4:log", "above 0 for log"),
        ("r=a:b", "are not both numbers"),
    ],
)
def test_a_bad_search_gives_a_message(place, tmp_path, capsys, search, message):
    assert main(["sweep", f"{place}/run.toml", "--search", search, "--folder", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_a_sweep_without_a_result_reports_the_errors_of_its_trials(place, tmp_path, capsys):
    given = [
        "sweep",
        f"{place}/run.toml",
        "--search",
        "r=2,4",
        "--folder",
        str(tmp_path),
        "--trials",
        "1",
    ]
    assert main([*given, "--target_modules", "q_prj"]) == 1
    captured = capsys.readouterr()
    assert "q_prj" in captured.out and "none of 1 trials gave 'eval_loss'" in captured.err


def test_an_unknown_option_after_a_file_is_refused(place):
    with pytest.raises(SystemExit):
        main(["train", f"{place}/run.toml", "--lerning_rate", "1"])
