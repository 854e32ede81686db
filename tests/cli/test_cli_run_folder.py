"""Tests that the commands accept a run folder wherever a model or an adapter is.

Oracle: the same command with the base and the adapter's folder. Errors: a base that cannot
be found or is not stated, and two adapters.
"""

import pytest

import minilora as ml
from helpers.runs import broken_run, make_runs, same_state
from minilora.cli.main import main

ROWS = [{"prompt": f"{n} plus 1", "completion": str(n + 1)} for n in range(4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("place"), rows=ROWS)


def run(command: str, *arguments: object) -> int:
    return main([command, *map(str, arguments), "--dtype", "float32"])


# ---- oracle


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_commands_take_the_base_and_storage_from_a_run(command, place, capsys):
    words = [place / "rows.jsonl"] if command == "evaluate" else ["1 plus 1"]
    outputs = []
    for given in (
        [place / "out", *words],
        [place / "out" / "adapter", *words],
        [place / "model", "--adapter", place / "out", *words],
        [place / "model", "--adapter", place / "out" / "adapter", *words],
    ):
        assert run(command, *given, "--max_new_tokens", "6") == 0
        printed = capsys.readouterr()
        outputs.append(printed.out)
        assert "the base is loaded in NF4" in printed.err
    assert len(set(outputs)) == 1
    assert run(command, place / "full", *words, "--max_new_tokens", "6") == 0
    full = capsys.readouterr().out
    assert run(command, place / "model", *words, "--max_new_tokens", "6") == 0
    assert capsys.readouterr().out == full != outputs[0]


def test_merge_and_inspect_take_a_run(place, tmp_path, capsys):
    assert run("merge", place / "out", tmp_path / "one") == 0
    options = ["--quantize", "nf4", place / "out", tmp_path / "two"]
    assert run("merge", place / "model", *options) == 0
    first, second = (ml.load_model(tmp_path / name, dtype="float32") for name in ("one", "two"))
    assert same_state(first, second)
    capsys.readouterr()
    for path in ("out", "out/adapter"):
        assert main(["inspect", str(place / path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :] and lines[0] == "adapter"
    assert main(["inspect", str(place / "out"), str(place / "out" / "adapter")]) == 0
    assert capsys.readouterr().out.startswith("two adapters")


def test_serve_names_the_adapter_after_the_run(place, monkeypatch):
    served = {}

    def serve(model, tokenizer, adapters, config, check_base):
        served.update(adapters)

    monkeypatch.setattr(ml, "serve", serve)
    assert run("serve", place / "out", "--adapter", f"b={place / 'out'}") == 0
    assert served == dict.fromkeys(["out", "b"], place / "out" / "adapter")


def test_check_training_checks_the_base_of_a_run_as_it_was_stored(place, capsys):
    reports = []
    for given in ([place / "out"], [place / "model", "--quantize", "nf4"]):
        assert run("check-training", *given) == 0
        printed = capsys.readouterr()
        reports.append([line.split()[0] for line in printed.out.splitlines()[1:]])
        if given == [place / "out"]:
            assert f"its base {place / 'model'} is used, without the adapter" in printed.err
            assert "the base is loaded in NF4" in printed.err
    assert reports[0] == reports[1]


# ---- error


@pytest.mark.parametrize("base", ["models/no-such-base", None])
def test_a_base_that_is_not_there_is_reported_with_the_remedy(base, place, tmp_path, capsys):
    source = str(broken_run(place, tmp_path, base))
    for command in (["generate", source, "hello"], ["evaluate", source, str(place / "rows.jsonl")]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert repr(base) in said and f"minilora generate BASE --adapter {source}" in said
    assert run("generate", place / "model", "hello", "--adapter", source) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{0}/out", "a", "--adapter", "{0}/out"], "holds an adapter itself"),
        (["merge", "{0}/out", "{0}/out", "x"], "holds an adapter itself"),
        (["merge", "{0}/model", "x"], "expected BASE ADAPTER FOLDER"),
        (["merge", "{0}/out", "{0}/model"], "is the base itself"),
        (["merge", "{0}/out", "{0}/out"], "is the base itself"),
        (["train", "{0}/out", "{0}/rows.jsonl"], "train begins from a base: give {0}/model"),
        (["compare-exports", "{0}/model", "{0}/rows.jsonl"], "needs an adapter"),
    ],
)
def test_wrong_combinations_are_refused(arguments, message, place, capsys):
    assert main([word.format(place) for word in arguments]) == 1
    assert message.format(place) in capsys.readouterr().err
