"""Tests of --config: the options of a TOML file are those of the command line.

Oracle: the same options as words. The files in examples/configs are parsed here, and run in a slow
test.
"""

import tomllib

import pytest

from helpers.source import ROOT
from minilora.cli.main import _keywords, _parser, main

EXAMPLES = sorted((ROOT / "examples" / "configs").glob("*.toml"))


def options(*words: str) -> dict:
    """Return the options of a command without the name of the file."""
    found, unparsed = _keywords(_parser(), list(words))
    assert not unparsed
    found.pop("config", None)
    return found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            'model = "m"\ndataset = "d"\ncolumns = {prompt = "a"}\nmix = [["x", 2], ["y", 1]]\n'
            '[run]\nlearning-rate = 1e-3\nchat = true\ntarget_modules = ["q_proj", "v_proj"]\n'
            'test_size = 5\n[rank_pattern]\nq_proj = 4\n',
            "train m d --columns prompt=a --mix x 2 --mix y 1 --learning_rate 1e-3 --chat true "
            '--target_modules q_proj,v_proj --test_size 5 --rank_pattern {"q_proj":4}',
        ),
        (
            'model = "m"\nprompt = "hi"\nstop = ["a", "b"]\nno_check_base = true\ntemperature = 1',
            "generate m hi --stop a --stop b --no_check_base --temperature 1",
        ),
        ('dataset = "d"\nwhole = false\npacking = true', "preview d --packing true"),
        ('model = "m"\ndataset = "d"\nadapter = "a"', "compare-exports m d --adapter a"),
        ('path = "a"\nother = "b"', "inspect a b"),
        ('path = "a"', "inspect a"),
        ('model = "m"\nadapter = ["x=1", "y=2"]\nport = 9', "serve m --adapter x=1 --adapter y=2 "
         "--port 9"),
        ('folder = "out"\nrepo_id = "me/x"\nprivate = true', "push out me/x --private"),
    ],
)  # fmt: skip
def test_a_file_gives_the_options_of_the_command_line(tmp_path, text, words):
    file = tmp_path / "options.toml"
    file.write_text(text)
    command, *_ = words.split()
    assert options(command, "--config", str(file)) == options(*words.split())
    assert options(command, f"--config={file}") == options(*words.split())


@pytest.mark.parametrize(
    "given",
    [
        "--config FILE --stop z --temperature 2",
        "--temperature=2 --stop z --config FILE",
        "m --stop z --config FILE hi --temperature 2",
    ],
)
def test_the_command_line_replaces_options_of_the_file(tmp_path, given):
    file = tmp_path / "options.toml"
    file.write_text('model = "m"\nprompt = "hi"\nstop = ["a", "b"]\ntemperature = 1\nseed = 3')
    expected = options(*"generate m hi --stop z --temperature 2 --seed 3".split())
    assert options("generate", *given.replace("FILE", str(file)).split()) == expected


def test_an_option_of_the_line_may_be_required_or_the_first_positional(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('model = "m"\ndataset = "d"\n')
    given = options("compare-exports", "other", "--config", str(file), "--adapter", "a")
    assert given == options(*"compare-exports other d --adapter a".split())


def test_sweep_passes_options_of_train_on(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('model = "m"\ndataset = "d"\nr = 4\ntrials = 3\nchat = true\n')
    words = ["sweep", "--config", str(file), "--search", "r=2,4", "--seed", "7"]
    found, passed_on = _keywords(_parser(), words)
    assert (found["model"], found["trials"], found["search"]) == ("m", 3, ["r=2,4"])
    assert passed_on == ["d", "--r=4", "--chat=true", "--seed=7"]


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        (
            "train",
            'model = "m"\ndataset = "d"\nlr = 1',
            "'lr' matches nothing. Nearest: 'learning_r",
        ),
        ("generate", 'model = "m"\nprompt = "p"\nadaptr = "a"', "Nearest: 'adapter'"),
        ("evaluate", 'model = "m"', "dataset missing: add them to the file, or give them on the"),
        ("merge", "model = ", "not TOML"),
        ("inspect", 'path = "a"\nconfig = "b"', "'config' matches nothing"),
        ("sweep", 'model = "m"\nconfig = "b"', "'config' matches nothing"),
        (
            "push",
            'folder = "f"\nrepo_id = "r"\nprivate = "yes"',
            "expected true or false, got 'yes'",
        ),
    ],
)
def test_a_wrong_file_gives_a_one_line_message(tmp_path, capsys, command, text, message):
    file = tmp_path / "options.toml"
    file.write_text(text)
    assert main([command, "--config", str(file)]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_value_of_a_wrong_type_names_the_option(tmp_path, capsys):
    file = tmp_path / "options.toml"
    file.write_text('model = "m"\ndataset = "d"\nr = "many"')
    with pytest.raises(SystemExit):
        main(["train", "--config", str(file)])
    assert "--r: expected a whole number, got 'many'" in capsys.readouterr().err


# ---- examples/configs


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_is_a_run_with_known_keys_and_values(path):
    found = options("train", "--config", str(path))
    assert found["model"] == "sample:smollm2" and (ROOT / found["dataset"]).is_file()
    assert found["output_dir"] == f"out/{path.stem}"
    groups = [
        table for table in tomllib.loads(path.read_text()).values() if isinstance(table, dict)
    ]
    assert len(groups) >= 2
    assert f"minilora train --config examples/configs/{path.name}" in path.read_text()


def test_there_are_three_examples():
    assert [path.stem for path in EXAMPLES] == ["dpo", "lora_chat", "qlora_small"]


@pytest.mark.slow  # each loads SmolLM2
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_runs(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    short = ["--max_steps", "2", "--warmup_steps", "0", "--output_dir", str(tmp_path)]
    assert main(["train", "--config", str(path), *short, "--disable_tqdm", "true"]) == 0
    out = capsys.readouterr().out
    assert "done after 2 steps" in out and "left out" not in out
    assert "without the chat template" not in out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
