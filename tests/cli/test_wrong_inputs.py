"""Tests of the commonest wrong inputs on the command line.

Each ends with status 1 or 2 and at most five lines on stderr that say the remedy, without a
traceback. Where the mistake can be known from the command and its files, the model is not loaded.
"""

import json
import re
import sys
from pathlib import Path

import pytest

import minilora as ml
from helpers.chats import furnish, ours
from helpers.tiny import save
from minilora.cli.main import main
from minilora.data import Tokenizer
from minilora.training.folder_lock import folder_lock

MOST_LINES = 5
SHORT = ["--max_steps", "5", "--dtype", "float32"]
PAIR = {"prompt": "2 plus 2", "completion": "4"}
TRAIN = ["train", "model", "rows.jsonl", *SHORT]

FILES = {
    "tickets.csv": "ticket,answer\nno light,power\n",
    "words.txt": "hello",
    "empty.jsonl": "",
    "broken.jsonl": json.dumps(PAIR) + '\n{"prompt": "a", \n',
    "object.json": '{"data": []}',
    "unanswered.jsonl": json.dumps(PAIR) + '\n{"prompt": "3 plus 3", "completion": null}\n',
    "unknown_key.toml": "learning_rat = 1\n",
    "taken.gguf": "",
    "a_file": "",
}

# name: the arguments, and a part of the message that says the remedy
BEFORE_LOADING = {
    # the dataset
    "dataset missing": (["train", "model", "row.jsonl"], "row.jsonl does not exist"),
    "dataset of unknown kind": (["train", "model", "words.txt"], "rows such as {"),
    "unknown columns": (
        ["train", "model", "tickets.csv"],
        "--columns 'prompt=ticket,completion=answer'",
    ),
    "empty dataset": (["train", "model", "empty.jsonl"], "Expected at least one row"),
    "broken JSON": (["train", "model", "broken.jsonl"], "broken.jsonl, line 2: not JSON"),
    "JSON object": (["train", "model", "object.json"], "one row a line in a .jsonl file"),
    "row without its answer": (
        ["train", "model", "unanswered.jsonl"],
        "row 1: completion missing or empty, next to the keys ['prompt']. Complete this row",
    ),
    "held-out rows missing": ([*TRAIN, "--eval_dataset", "x.jsonl"], "x.jsonl does not exist"),
    "two kinds of held-out rows": (
        [*TRAIN, "--test_size", "0.2", "--eval_dataset", "rows.jsonl"],
        "leave one of them out",
    ),
    "unknown column": (
        ["train", "model", "tickets.csv", "--columns", "prompt=tickt,completion=answer"],
        "The columns are ticket, answer",
    ),
    "rows to evaluate without answers": (
        ["evaluate", "model", "unanswered.jsonl"],
        "Complete this row",
    ),
    # options, as other libraries write them
    "--lr": ([*TRAIN, "--lr", "1e-3"], "Nearest: --learning_rate."),
    "--epochs": ([*TRAIN, "--epochs", "1"], "Nearest: --num_train_epochs."),
    "--lora_r": ([*TRAIN, "--lora_r", "8"], "Nearest: --r."),
    "--load_in_4bit": ([*TRAIN, "--load_in_4bit"], "Nearest: --quantize."),
    "--max_seq_length": ([*TRAIN, "--max_seq_length", "8"], "Nearest: --max_length."),
    "--batch_size": ([*TRAIN, "--batch_size", "8"], "Nearest: --per_device_train_batch_size."),
    "no number": ([*TRAIN, "--learning_rate", "fast"], "expected a number such as 1e-4"),
    "rank 0": ([*TRAIN, "--r", "0"], "expected >= 1, got 0"),
    "--quantize int8": ([*TRAIN, "--quantize", "int8"], "choose from"),
    "unknown key of a file": (["train", "--config", "unknown_key.toml"], "'learning_rate'"),
    "file of options missing": (["train", "--config", "no.toml"], "no.toml does not exist"),
    "unknown command": (["trian", "model", "rows.jsonl"], "Nearest: train."),
    "no arguments": (["train"], "required: model, dataset"),
    "value for --card": (
        ["plan", "model", "--card", "lots"],
        "--card: expected a size such as 24GB",
    ),
    "--card without a unit": (["plan", "model", "--card", "24"], "--card: expected a size such as"),
    "port": (["serve", "model", "--port", "99999999"], "<= 65535"),
    "search without values": (["sweep", "model", "rows.jsonl", "--search", "r=4"], "low:high"),
    # numbers of a text
    "no new token": (["generate", "model", "Hi", "--max_new_tokens", "0"], "be at least 1, got 0"),
    "negative temperature": (
        ["generate", "model", "Hi", "--temperature", "-1"],
        "must be 0 (greedy) or more, got -1.0",
    ),
    "top_p in a chat": (["chat", "model", "--top_p", "2"], "above 0 and at most 1, got 2.0"),
    "rows at a time": (
        ["evaluate", "model", "rows.jsonl", "--batch_size", "0"],
        "expected batch_size >= 1",
    ),
    # folders and files
    "misspelt model to plan": (["plan", "modle"], "Similar names here: model"),
    "output_dir is a file": ([*TRAIN, "--output_dir", "a_file"], "Choose another folder"),
    "output_dir is a file, before the rows are read": (
        ["train", "model", "empty.jsonl", "--output_dir", "a_file"],
        "Choose another folder",
    ),
    "output_dir in /proc": ([*TRAIN, "--output_dir", "/proc/x"], "Choose another folder"),
    "adapter of an earlier run": ([*TRAIN, "--adapter", "trained"], "Choose another folder"),
    "checkpoints of an earlier run": ([*TRAIN, "--output_dir", "stopped"], "Continue it with"),
    "nothing to resume": (
        [*TRAIN, "--output_dir", "new", "--resume_from_checkpoint", "last"],
        "Leave it out to start a new run",
    ),
    "checkpoint missing": (
        [*TRAIN, "--output_dir", "stopped", "--resume_from_checkpoint", "checkpoint-7"],
        "such as stopped/checkpoint-100",
    ),
    "merge to a GGUF file": (
        ["merge", "model", "trained", "out.gguf"],
        "minilora export model out.gguf --adapter trained",
    ),
    "export to an existing file": (["export", "model", "taken.gguf"], "Choose another name"),
    "verify a dense model": (["verify", "model"], "--against bitsandbytes"),
    "verify against two": (
        ["verify", "model", "--source", "model", "--against", "bitsandbytes"],
        "--source and --against",
    ),
    "log missing": (["plot", "nowhere"], "output_dir of a run"),
    # a base model, whose tokenizer has no chat template
    "chat without a template": (["chat", "plain"], "Use an instruct model"),
    "chat --system without a template": (["chat", "plain", "--system", "Hi"], "an instruct model"),
    "--system without a template": (
        ["generate", "plain", "Hi", "--system", "Be kind."],
        "--system needs a chat template",
    ),
}
# every command that reads a path which does not exist; the misspelt name is like "model"
for command in (
    ["inspect", "modle"],
    ["verify", "modle"],
    ["generate", "modle", "Hi"],
    ["inspect", "./modle"],
    ["verify", "./modle"],
    ["generate", "./modle", "Hi"],
):
    BEFORE_LOADING[" ".join(command)] = (command, "Similar names here: model")
for command in (
    ["generate", "model", "Hi"],
    ["evaluate", "model", "rows.jsonl"],
    ["serve", "model"],
):
    BEFORE_LOADING[f"{command[0]} with a missing adapter"] = (
        [*command, "--adapter", "nowhere"],
        "nowhere: no such folder. Expected one with adapter_config.json",
    )
BEFORE_LOADING["merge with a missing adapter"] = (
    ["merge", "model", "nowhere", "merged"],
    "nowhere: no such folder. Expected one with adapter_config.json",
)

WHILE_LOADING = {
    "model not in the cache": (["train", "nobody/nothing", "rows.jsonl"], "Load it once with a"),
    "misspelt model": (["train", "modle", "rows.jsonl"], "Similar names here: model"),
    "misspelt model to serve": (["serve", "modle"], "Similar names here: model"),
    "query for q_proj": ([*TRAIN, "--target_modules", "query"], "Nearest: 'q_proj'."),
    "value for v_proj": ([*TRAIN, "--target_modules", "q_proj,value"], "Nearest: 'v_proj'."),
    "another name": ([*TRAIN, "--target_modules", "upwards"], "Nearest: 'up_proj', "),
    "misspelt target_modules": ([*TRAIN, "--target_modules", "q_prj,v_proj"], "'q_proj'"),
    "much too high learning rate": ([*TRAIN, "--learning_rate", "1e30"], "lower learning_rate"),
    "adapter of another base": (
        ["generate", "wider", "Hi", "--adapter", "trained"],
        "Load the adapter into the model it was trained on",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a model, rows, an adapter, two further models and the wrong files."""
    folder = furnish(tmp_path_factory.mktemp("place"), rows=[PAIR] * 4)
    for name, content in FILES.items():
        (folder / name).write_text(content)
    model = ml.load_model(folder / "model", dtype="float32")
    ml.inject(model, ml.LoRAConfig(r=4))
    ml.save_adapter(model, folder / "trained")
    (folder / "stopped" / "checkpoint-3").mkdir(parents=True)
    chat = ours("chatml")
    save(folder / "wider", vocab_size=len(chat), hidden_size=32)
    chat.save_pretrained(folder / "wider")
    save(folder / "plain", vocab_size=len(chat))
    Tokenizer(chat.backend, chat.special_tokens, None).save_pretrained(folder / "plain")
    return folder


def check(arguments: list[str], remedy: str, capfd) -> None:
    """Check the status, the length and the remedy of a command's error."""
    capfd.readouterr()
    try:
        status = main(arguments)
    except SystemExit as error:  # raised by argparse
        status = error.code
    printed = capfd.readouterr().err
    assert status in (1, 2)
    assert remedy in printed
    assert "Traceback" not in printed
    assert len(printed.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("name", BEFORE_LOADING)
def test_a_wrong_input_is_refused_before_the_model_is_loaded(name, place, capfd, monkeypatch):
    def load_model(*given, **options):
        raise AssertionError(f"the model was loaded: {given}")

    monkeypatch.chdir(place)
    monkeypatch.setattr(ml, "load_model", load_model)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
    arguments, remedy = BEFORE_LOADING[name]
    check(arguments, remedy, capfd)
    after = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
    assert after == before


def test_a_folder_in_use_is_refused_before_the_model_is_loaded(place, capfd, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(ml, "load_model", None)
    with folder_lock(Path("busy")):
        check([*TRAIN, "--output_dir", "busy"], "another run is writing to busy. Wait", capfd)
    assert not Path("busy").exists()


@pytest.mark.parametrize("path", ["nosuch", "./nosuch", "me/nosuch"])
@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["generate", "Hi"]])
def test_a_missing_path_is_named_with_what_it_is_not(command, path, place, capfd, monkeypatch):
    monkeypatch.chdir(place)
    name, *others = command
    assert main([name, path, *others]) == 1
    said = capfd.readouterr().err
    assert "nosuch" in said and len(said.splitlines()) <= MOST_LINES
    assert re.search("neither a folder nor a file here|there is no folder or .gguf file", said)
    assert "Hub" in said
    assert re.search("hf download|Check the", said)


@pytest.mark.parametrize("name", WHILE_LOADING)
def test_a_wrong_input_that_the_model_shows_says_the_remedy(name, place, capfd, monkeypatch):
    monkeypatch.chdir(place)
    check(*WHILE_LOADING[name], capfd)


@pytest.mark.parametrize(
    "package, extra, arguments",
    [
        ("fastapi", "serve", ["serve", "model"]),
        ("optuna", "sweep", ["sweep", "model", "rows.jsonl", "--search", "r=4,8"]),
        ("gguf", "gguf", ["export", "model", "new.gguf"]),
    ],
)
def test_a_missing_package_names_its_install_line(
    package, extra, arguments, place, capfd, monkeypatch
):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(ml, "load_model", None)
    check(arguments, f"pip install -e '.[{extra}]'", capfd)


def test_a_csv_with_semicolons_needs_no_option(place, capfd, monkeypatch):
    monkeypatch.chdir(place)
    Path("semicolons.csv").write_text("prompt;completion\nno light;power\n")
    assert main(["preview", "semicolons.csv"]) == 0
    assert "power" in capfd.readouterr().out
