"""Tests of the data options of the commands, and of the proposal for unknown columns.

Oracle: the same command on a file that has the resulting rows already.
"""

import csv
import json
import re
import shlex

import pytest
import torch

import minilora as ml
from helpers.chats import furnish
from minilora.cli.main import main
from minilora.data import Tokenizer

TICKETS = [
    {"id": f"n{n}", "ticket": f"What is {n} plus 1?", "answer": f"{n + 1}"} for n in range(12)
]
MESSAGES = [
    {
        "messages": [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": row["ticket"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    }
    for row in TICKETS
]
OPTIONS = ["--columns", "prompt=ticket,completion=answer", "--chat", "true", "--system", "Add."]
RUN = ["--dtype", "float32", "--r", "2", "--max_steps", "2", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a model, tickets in two kinds of files, and the same rows as messages."""
    folder = furnish(tmp_path_factory.mktemp("place"), tickets=TICKETS, messages=MESSAGES)
    with (folder / "tickets.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(TICKETS[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(TICKETS)
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("file", ["tickets.jsonl", "tickets.csv"])
def test_train_and_evaluate_with_options_equal_those_on_written_rows(place, file, capsys):
    source = str(place / "model")
    results = {}
    for name, options in {file: OPTIONS, "messages.jsonl": []}.items():
        adapter = place / f"{file}-{name}-adapter"
        rows = str(place / name)
        run = ["train", source, rows, "--adapter", str(adapter), *RUN, *options]
        assert main([*run, "--test_size", "3"]) == 0
        out = capsys.readouterr().out
        assert "train: 9 rows" in out and "eval: 3 rows" in out
        assert ("chat true" in out) == bool(options)  # in the command that shows the tokens
        use = ["evaluate", source, rows, "--adapter", str(adapter), "--max_new_tokens", "2"]
        assert main([*use, "--dtype", "float32", *options]) == 0
        results[name] = capsys.readouterr().out.splitlines()[-1]
    assert results[file] != results["messages.jsonl"]  # other rows are held out: the hash differs
    mapped = ml.load_dataset(
        place / file, columns={"prompt": "ticket", "completion": "answer"}, chat=True, system="Add."
    )
    tokenizer = ml.load_tokenizer(source)
    found, expected = (
        [example.labels for example in ml.data.encode_dataset(rows, tokenizer)]
        for rows in (mapped, MESSAGES)
    )
    assert found == expected


def test_test_size_is_the_split_of_the_function(place, tmp_path, capsys):
    rows = [{"prompt": row["ticket"], "completion": row["answer"]} for row in TICKETS]
    train, test = ml.train_test_split(rows, test=3, seed=7)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, part in {"train": train, "test": test}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for folder, options in {
        "one": [str(tmp_path / "rows.jsonl"), "--test_size", "3"],
        "two": [str(tmp_path / "train.jsonl"), "--eval_dataset", str(tmp_path / "test.jsonl")],
    }.items():
        run = ["train", str(place / "model"), *options, "--adapter", str(tmp_path / folder)]
        assert main([*run, *RUN, "--seed", "7"]) == 0
        out = capsys.readouterr().out
        assert "9 rows train prompt and completion without the chat template" in out
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_commands_take_the_data_options(place, capsys):
    source, rows = str(place / "model"), str(place / "tickets.csv")
    assert main(["check-training", source, "--data", rows, "--dtype", "float32", *OPTIONS]) == 0
    assert main(["preview", rows, "--model", source, *OPTIONS]) == 0
    assert "<|im_start|>system\\nAdd." in capsys.readouterr().out


# ---- proposals


def test_preview_proposes_a_command_that_train_accepts(place, tmp_path, capsys):
    source, rows = str(place / "model"), str(place / "tickets.jsonl")
    assert main(["preview", rows]) == 0
    out = capsys.readouterr().out
    assert "ticket: 17 characters on average, 12 different of 12, first 'What is 0 plus 1?'" in out
    words = shlex.split(out.splitlines()[-1])
    assert words[:5] == ["minilora", "preview", rows, "--model", "MODEL"]
    words[4] = source
    assert main(words[1:]) == 0
    assert "12 rows train prompt and completion without" in capsys.readouterr().out
    run = ["train", source, rows, "--adapter", str(tmp_path / "a"), *RUN, *words[5:]]
    assert main(run) == 0
    assert main(["train", "./nowhere", rows]) == 1
    said = capsys.readouterr().err
    assert words[-1] == "prompt=ticket,completion=answer"
    assert re.search(f"row 0: keys .* match no known shape.*--columns '{words[-1]}'", said)


@pytest.mark.parametrize("has_template", [True, False])
def test_preview_proposes_chat_if_the_tokenizer_has_a_template(
    place, tmp_path, capsys, has_template
):
    tokenizer = ml.load_tokenizer(place / "model")
    if not has_template:
        tokenizer = Tokenizer(tokenizer.backend, tokenizer.special_tokens, None)
    tokenizer.save_pretrained(tmp_path)
    command = ["preview", str(place / "tickets.jsonl"), "--model", str(tmp_path)]
    assert main(command) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    expected = ["--columns", "prompt=ticket,completion=answer"]
    if has_template:
        expected += ["--chat", "true"]
    assert words[5:] == expected
    assert main(words[1:]) == 0
    assert "without the chat template" not in capsys.readouterr().out


def test_preview_without_a_model_mentions_chat_for_prompts_only(place, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "completion": "b"}\n')
    for path in (pairs, place / "tickets.jsonl"):
        assert main(["preview", str(path)]) == 0
        assert "If MODEL has a chat template, add --chat true" in capsys.readouterr().out
    assert main(["preview", str(place / "messages.jsonl")]) == 0
    assert "--chat" not in capsys.readouterr().out


def test_preview_without_a_model_names_the_shape(place, capsys):
    assert main(["preview", str(place / "messages.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "shape: messages. Token by token: minilora preview" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--columns", "prompt=tickt"],
            "no column 'tickt' for 'prompt'. The columns are id, ticket",
        ),
        (["--separator", ";"], "separator: it is for .csv files"),
        ([*OPTIONS[:2], "--system", "s"], "Add --chat true"),
        ([*OPTIONS[:2], "--test_size", "3", "--eval_dataset", "x.jsonl"], "leave one of them out"),
        ([*OPTIONS[:2], "--test_size", "1.5"], "a share between 0 and 1, or a number of rows"),
        ([*OPTIONS[:2], "--dataset_cache", "c"], "--dataset_cache keeps the tokens of a dataset"),
    ],
)
def test_data_options_are_checked_before_the_model_is_loaded(place, capsys, arguments, message):
    assert main(["train", "./nowhere", str(place / "tickets.jsonl"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert main(["check-training", "./nowhere", "--chat", "true"]) == 1
    assert "--chat changes the rows of --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "ticket"], "expected KEY=COLUMN"),
        (["--columns", "{x"], "not JSON"),
        (["--chat", "yes"], "expected true or false, got 'yes'"),
        (["--sep", ";"], "Nearest: --separator"),
        (["--system-prompt", "s"], "Nearest: --system"),
        (["--val_size", "0.1"], "Nearest: --test_size"),
    ],
)
def test_a_misspelt_data_option_exits_with_a_message(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["train", "m", "d", *arguments])
    assert message in capsys.readouterr().err
