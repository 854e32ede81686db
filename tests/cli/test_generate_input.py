"""Tests of the prompts that `minilora generate` reads, and of its streamed output.

Oracle: `ml.generate` with the same prompt. Errors: no prompt, two prompts, files without a question,
and a system message for a base without chat template.
"""

import io
import json
import re
import sys

import pytest

import minilora as ml
from helpers.chats import chat, furnish
from minilora.cli.main import main

TURNS = chat("hello", "hello there", "and then?")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def answer(place):
    """Return a function: prompt -> the answer of `ml.generate`."""
    model = ml.load_model(place / "model", dtype="float32")
    tokenizer = ml.load_tokenizer(place / "model")
    return lambda prompt: ml.generate(model, tokenizer, prompt, max_new_tokens=5)


def run(place, *arguments: object) -> int:
    options = ["--dtype", "float32", "--max_new_tokens", "5"]
    return main(["generate", str(place / "model"), *options, *map(str, arguments)])


def write(folder, name: str, *values: object) -> str:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    return str(path)


# ---- oracle


SCHEMA = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}


@pytest.mark.parametrize("stream", ["true", "false"])
def test_an_answer_follows_the_schema_of_a_file(stream, place, tmp_path, capsys):
    path = write(tmp_path, "schema.json", SCHEMA)
    assert run(place, "hello", "--schema", path, "--max_new_tokens", 20, "--stream", stream) == 0
    found = capsys.readouterr().out
    model = ml.load_model(place / "model", dtype="float32")
    tokenizer = ml.load_tokenizer(place / "model")
    expected = ml.generate(model, tokenizer, "hello", max_new_tokens=20, schema=SCHEMA)
    assert found == expected + "\n"
    assert json.loads(found)["x"] in (1, 2)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "--schema: .*schema.json|schema.json does not exist"),
        ("{", "--schema: .* is not JSON"),
        ("[1]", "schema: expected 'json', a JSON schema"),
    ],
)
def test_a_bad_schema_is_found_before_loading(
    content, message, place, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr("minilora.load_model", None)
    assert run(place, "hello", "--schema", path) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_schema_is_a_json_file(place, tmp_path, capsys):
    path = write(tmp_path, "rows.jsonl", SCHEMA)
    assert run(place, "hello", "--schema", path) == 1
    assert "--schema: expected a .json file or the word json" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["-"]])
def test_a_prompt_from_stdin(words, place, answer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert run(place, *words) == 0
    assert capsys.readouterr().out == answer("two\nlines") + "\n"


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_prompt_after_the_options_with_a_system_message(stream, place, answer, capsys):
    assert run(place, "--stream", stream, "--system", "be brief", "hello") == 0
    expected = answer(chat("hello", system="be brief"))
    assert expected != answer("hello")
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("list.json", [TURNS]),
        ("row.json", [{"messages": TURNS}]),
        ("rows.json", [[{"messages": TURNS}]]),
        ("row.jsonl", [{"messages": TURNS}]),
        ("list.jsonl", TURNS),
    ],
)
def test_one_conversation_of_a_file(name, values, place, answer, tmp_path, capsys):
    assert run(place, "--messages", write(tmp_path, name, *values)) == 0
    assert capsys.readouterr().out == answer(TURNS) + "\n"


def test_each_row_of_a_file_gets_one_line(place, answer, tmp_path, capsys):
    several = [TURNS, chat("what\nis this"), chat("hello")]
    path = write(tmp_path, "rows.jsonl", *({"messages": each} for each in several))
    assert run(place, "--messages", path, "--system", "s") == 0
    lines = capsys.readouterr().out.splitlines()
    system = {"role": "system", "content": "s"}
    expected = [{"answer": answer([system, *each])} for each in several]
    assert [json.loads(line) for line in lines] == expected


# ---- error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello", "--messages", "{rows}"], "there is a prompt, and --messages too"),
        (["--messages", "{rows}", "--stream", "true"], "has 2 conversations, expected 1"),
        (["--messages", "{system}", "--system", "s"], "has a system message already"),
        (["--messages", "{answered}"], "row 0: the last message is the assistant's"),
        (["--messages", "{tools}"], "without tools"),
        (["--messages", "{text}"], "expected a row with `messages`"),
        (["--messages", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["-"], "stdin is empty"),
    ],
)
def test_unusable_prompts_are_refused(arguments, message, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    hello = {"messages": chat("hello")}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    files = {
        "rows": write(tmp_path, "rows.jsonl", hello, hello),
        "system": write(tmp_path, "system.jsonl", {"messages": chat("hello", system="x")}),
        "answered": write(tmp_path, "answered.jsonl", {"messages": chat("hello", "hi")}),
        "tools": write(tmp_path, "tools.jsonl", hello | {"tools": [tool]}),
        "text": write(tmp_path, "text.jsonl", {"text": "hello"}),
    }
    assert run(place, *(word.format(**files) for word in arguments)) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_no_prompt_on_a_terminal_is_an_error(place, monkeypatch, capsys):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert run(place) == 1
    assert "there is no prompt: give it as an argument, through stdin" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--system", "--messages"])
def test_a_base_without_chat_template_is_refused(option, place, tmp_path, capsys):
    ml.load_tokenizer(place / "model").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "config.json").write_text("{}")  # it is not read: the model is not loaded
    given = ["--system", "s", "hello"]
    if option == "--messages":
        given = ["--messages", write(tmp_path, "rows.jsonl", {"messages": TURNS})]
    assert main(["generate", str(tmp_path), *given]) == 1
    assert f"{option} needs a chat template, and the tokenizer of" in capsys.readouterr().err
