"""Tests of `minilora chat`.

Oracle: `ml.generate` with the messages of the conversation. Property: the commands change the
system message, the adapter and the history; Ctrl-C stops an answer and not the program; lines from
stdin are answered in turn. Errors: a full context and a base without chat template.
"""

import io
import sys

import pytest

import minilora as ml
from helpers.chats import furnish
from helpers.kinds import shake
from helpers.served import NAMES, build, tokenizer
from minilora.cli.chat import COMMANDS, HELP, Conversation, print_pieces, talk
from minilora.cli.main import main

OPTIONS = {"max_new_tokens": 5, "temperature": 0.0}


def conversation(adapters: int = 0, **fields) -> Conversation:
    model = build(adapters=adapters, **fields)
    ml.set_adapter(model, [])
    return Conversation(model, tokenizer(), **OPTIONS)


def type_lines(made: Conversation, *lines: str, interactive: bool = True) -> None:
    """Talk with these lines as input, then /quit."""
    waiting = iter([*lines, "/quit", "not read"])

    def read() -> str:
        for line in waiting:
            if line == "^C":
                raise KeyboardInterrupt
            return line
        raise EOFError

    talk(made, read, interactive)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def expected(made: Conversation, *messages: dict[str, str]) -> str:
    return ml.generate(made.model, tokenizer(), list(messages), **OPTIONS)


# ---- oracle


def test_answers_are_those_of_generate_for_the_whole_conversation(capsys):
    made = conversation()
    type_lines(made, "hello", "", "  and you? ", "/reset", "//slash")
    first = expected(made, user("hello"))
    second = expected(made, user("hello"), assistant(first), user("and you?"))
    third = expected(made, user("/slash"))
    assert capsys.readouterr().out == f"{first}\n{second}\na new conversation\n{third}\n"
    assert made.messages == [user("/slash"), assistant(third)]


def test_commands_change_the_system_message_and_the_adapter(capsys):
    made = conversation(adapters=2)
    system = {"role": "system", "content": "be brief"}
    lines = ["/system be brief", "hello", "/reset", "/system none", f"/adapter {NAMES[1]}", "hello"]
    type_lines(made, *lines, "/reset", "/adapter none", "hello", "/adapter")
    shown = capsys.readouterr().out
    base = expected(made, user("hello"))
    with_system = expected(made, system, user("hello"))
    ml.set_adapter(made.model, NAMES[1])
    adapted = expected(made, user("hello"))
    assert len({base, with_system, adapted}) == 3
    assert shown.replace("a new conversation\n", "") == (
        f"system message: be brief\n{with_system}\nsystem message: none\n"
        f"adapter: {NAMES[1]}\n{adapted}\nadapter: none\n{base}\n"
        f"adapters: {NAMES[0]}, {NAMES[1]}\n"
    )


# ---- property


def test_ctrl_c_stops_an_answer_and_keeps_its_part(capsys):
    made = conversation()
    full = expected(made, user("hello"))
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = made.model.register_forward_pre_hook(interrupt)
    hidden = made.model.hidden  # the decoder is read through this method, which has no hooks
    made.model.hidden = lambda *given: (interrupt(), hidden(*given))[1]
    type_lines(made, "hello", "^C", "/help")
    hook.remove()
    del made.model.hidden
    shown = capsys.readouterr().out
    part = made.messages[1]["content"]
    assert full.startswith(part) and 0 < len(part) < len(full)
    assert shown == f"{part}\n[stopped]\n\nCtrl-D or /quit leaves.\n{HELP}"
    assert not any("forward" in vars(module) for module in made.model.modules())


def test_a_message_without_an_answer_is_not_kept():
    made = conversation()
    made.answer("hello").close()
    pieces = made.answer("hello")
    next(pieces)
    pieces.close()
    assert [message["role"] for message in made.messages] == ["user", "assistant"]
    assert made.messages[1]["content"]


def test_ctrl_c_ends_a_chat_that_has_no_terminal():
    with pytest.raises(KeyboardInterrupt):
        type_lines(conversation(), "^C", interactive=False)


def test_help_lists_every_command():
    for command in COMMANDS:
        assert command in HELP


def test_control_characters_do_not_reach_a_terminal(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    print_pieces(["a\x1b[2Jb", "\tc\n", "\x9b\x7f"])
    assert terminal.getvalue() == "a␛[2Jb\tc\n\ufffd␡\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a model and two adapters."""
    folder = furnish(tmp_path_factory.mktemp("place"))
    model = ml.load_model(folder / "model", dtype="float32")
    for number, name in enumerate(("one", "two")):
        ml.inject(model, ml.LoRAConfig(r=2), name=name, seed=number)
        shake(model, number)
        ml.save_adapter(model, folder / name / "adapter", name)
        ml.delete_adapter(model, name)
    return folder


def run(monkeypatch, typed: str, *arguments: object) -> int:
    """Run `minilora chat` with a text as its stdin."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    options = ["--dtype", "float32", "--max-new-tokens", "4", "--temperature", "0"]
    return main(["chat", *map(str, arguments), *options])


def test_lines_of_stdin_are_answered_in_turn(place, monkeypatch, capsys):
    given = ["--adapter", place / "one", "--adapter", f"b={place / 'two' / 'adapter'}"]
    assert run(monkeypatch, "hello\n/reset\n/adapter b\nhello", place / "model", *given) == 0
    answers = []
    for name in ("one", "two"):
        model = ml.load_model(place / "model", dtype="float32")
        ml.load_adapter(model, place / name)
        answers.append(ml.generate(model, tokenizer(), [user("hello")], max_new_tokens=4))
    first, second = answers
    assert first != second
    assert capsys.readouterr().out == f"{first}\na new conversation\nadapter: b\n{second}\n"


# ---- error


def test_a_full_context_is_reported_and_reset_helps(capsys):
    made = conversation(max_position_embeddings=80)
    type_lines(made, "hello", "a long message " * 10, "/reset", "hello")
    shown = capsys.readouterr()
    assert shown.err.startswith("minilora: the conversation has ") and shown.err.count("\n") == 1
    assert "the model's context is 80" in shown.err and "/reset" in shown.err
    answer = expected(made, user("hello"))
    assert shown.out == f"{answer}\na new conversation\n{answer}\n"


def test_the_answer_is_shortened_to_the_context_that_is_left(capsys):
    made = conversation()
    size = 512 - made.room("hello")
    type_lines(conversation(max_position_embeddings=size + 3), "hello")
    expected = ml.generate(made.model, tokenizer(), [user("hello")], max_new_tokens=3)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "unknown command /rest. Nearest: /reset"),
        ("/adapter nobody", f"unknown adapter 'nobody': expected one of ['{NAMES[0]}'], or none."),
    ],
)
def test_a_wrong_command_is_reported(line, message, capsys):
    type_lines(conversation(adapters=1), line)
    assert message in capsys.readouterr().err


def test_a_base_without_chat_template_is_refused(place, tmp_path, monkeypatch, capsys):
    ml.load_tokenizer(place / "model").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "config.json").write_text("{}")  # it is not read: the model is not loaded
    assert run(monkeypatch, "hello", tmp_path) == 1
    assert f"chat needs a chat template, and the tokenizer of {tmp_path} has none" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["a={0}/one", "a={0}/two"], "expected NAME=PATH, each name once"),
        (["a={0}/nowhere"], "nowhere: no such folder"),
    ],
)
def test_wrong_adapters_are_refused(adapters, message, place, monkeypatch, capsys):
    given = [word for item in adapters for word in ("--adapter", item.format(place))]
    assert run(monkeypatch, "hello", place / "model", *given) == 1
    assert message in capsys.readouterr().err
