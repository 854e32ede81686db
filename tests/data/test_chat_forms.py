"""Tests of the forms in which datasets store conversations: each gives the same tokens.

Oracle: transformers renders the same conversation, written as objects, with published templates.
Then files, DataFrames, and errors, which name the row.
"""

import csv
import json
from copy import copy
from typing import Any

import pytest

from helpers.chats import chat, ours, real, real_template, theirs
from minilora.data import Chat, as_messages, encode_row, read_dataset
from minilora.data.chat.messages import read_messages
from minilora.data.chat.rendering import Rendering
from minilora.data.formats import extra_keys

CITY = {"city": "Paris", "days": 3}
USER = {"role": "user", "content": "Weather?"}
ANSWER = {"role": "assistant", "content": "It is sunny."}
RESULT = {"role": "tool", "name": "weather", "content": "sunny"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def call(arguments, name: str = "weather") -> dict:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def row(arguments=CITY, tools=(TOOL,)) -> dict:
    tools = list(tools) if isinstance(tools, tuple) else tools
    return {"messages": [USER, call(arguments), RESULT, ANSWER], "tools": tools}


def text_of(entry: dict, tokenizer, index: int = 0) -> str:
    ids = encode_row(entry, tokenizer, index=index).input_ids
    return tokenizer.decode(ids, skip_special_tokens=False)


def expected(template: str, entry: dict) -> Any:
    """Return the text of transformers for a row of objects."""
    return theirs("chatml").apply_chat_template(
        entry["messages"],
        tools=entry.get("tools"),
        chat_template=real_template(template),
        tokenize=False,
    )


# ---- oracle: JSON text gives the text of objects

FUNCTION = TOOL["function"]
FORMS = {
    "arguments are text": row(json.dumps(CITY)),
    "tools are text": row(tools=json.dumps([TOOL])),
    "each tool is text": row(tools=[json.dumps(TOOL)]),
    "a function is text": row(tools=[TOOL | {"function": json.dumps(FUNCTION)}]),
    "parameters are text": row(
        tools=[TOOL | {"function": FUNCTION | {"parameters": json.dumps(FUNCTION["parameters"])}}]
    ),
    "tool_calls are text": {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": json.dumps(call(CITY)["tool_calls"])},
            RESULT,
            ANSWER,
        ],
        "tools": [TOOL],
    },
    "messages are text": row() | {"messages": json.dumps(row()["messages"])},
    "nulls of Arrow": row({**CITY, "query": None}, [TOOL | {"strict": None}]),
    "NaN of pandas": row({**CITY, "query": float("nan")}, [TOOL | {"strict": float("nan")}]),
    "OpenAI's function_call": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": json.dumps(CITY)},
            },
            RESULT,
            ANSWER,
        ],
        "tools": [TOOL],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": CITY})},
            {"from": "observation", "value": "sunny", "name": "weather"},
            {"from": "gpt", "value": "It is sunny."},
        ],
        "tools": json.dumps([TOOL]),
    },
    "parts of text": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": part} for part in ("Wea", "ther?")],
            },
            *row()["messages"][1:],
        ],
        "tools": [TOOL],
    },
}


TEMPLATES = ["qwen2_5", "qwen3", "llama3_1", "gptoss", "glm4moe", "gemma4_v5"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("entry", FORMS.values(), ids=FORMS)
def test_every_form_of_a_row_gives_the_text_of_its_objects(template, entry):
    before = json.dumps(entry)
    sample = as_messages(entry)
    assert isinstance(sample, Chat)
    rendering = Rendering(real(template), sample.messages, sample.tools, place="row 0")
    assert rendering.text == expected(template, row())
    assert rendering.left_out([1, 3]) == []
    assert json.dumps(entry) == before  # the row itself is not changed
    assert extra_keys(entry) == set()


@pytest.mark.parametrize("entry", FORMS.values(), ids=FORMS)
def test_every_form_of_a_row_has_the_tokens_and_labels_of_its_objects(entry):
    assert encode_row(entry, real("qwen2_5")) == encode_row(row(), real("qwen2_5"))


@pytest.mark.parametrize("tools", ["null", "[]", "", "  ", [], None, float("nan")])
def test_no_tools_in_any_form_are_no_tools(tools):
    entry = {"messages": [USER, ANSWER]}
    assert text_of(entry | {"tools": tools}, real("qwen2_5")) == expected("qwen2_5", entry)
    llama = real("llama3_2", "llama3")  # it writes a line for an empty list of tools
    assert text_of(entry | {"tools": tools}, llama) == text_of(entry, llama)


@pytest.mark.parametrize("arguments", ["", "{}", "null", None, {}, {"query": None}])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    entry = {"messages": [USER, call(arguments)]}
    assert text_of(entry, real("qwen2_5")) == expected("qwen2_5", {"messages": [USER, call({})]})


def test_a_null_in_a_text_stays_because_its_author_wrote_it():
    sample = as_messages({"messages": [USER, call('{"unit": null, "day": NaN}')]})
    assert isinstance(sample, Chat)
    arguments = sample.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"unit": None}
    assert as_messages({"messages": sample.messages}) == sample  # it stays when read again


def test_a_template_that_joins_texts_gets_the_arguments_as_text():
    """DeepSeek-V3's template expects text, and a content next to a call."""
    messages = row()["messages"]
    as_text = [USER, {**call(json.dumps(CITY)), "content": ""}, RESULT, ANSWER]
    text = expected("deepseekv3", {"messages": as_text})
    tokenizer = copy(theirs("chatml"))
    tokenizer.chat_template = real_template("deepseekv3")
    for given, reader in ((messages, real("deepseekv3")), (as_text, tokenizer)):
        rendering = Rendering(reader, read_messages(given, "row 0"), place="row 0")
        assert rendering.text == text
        assert rendering.left_out([1, 3]) == []
    # A template without a filter would write Python's {'city': 'Paris'}.
    tokenizer = real("qwen2_5")
    bare = real_template("qwen2_5").replace("tool_call.arguments | tojson", "tool_call.arguments")
    tokenizer.chat_template = bare
    assert text_of({"messages": messages}, tokenizer) == expected("qwen2_5", {"messages": messages})


def test_a_conversation_that_begins_with_an_answer_is_trained():
    """Qwen's template reads the first message, so it cannot render the text before an answer."""
    turns = [
        {"from": "gpt", "value": "Welcome!"},
        {"from": "human", "value": "Weather?"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    tokenizer = real("qwen2_5")
    example = encode_row({"conversations": turns}, tokenizer)
    supervised = [label for label in example.labels if label >= 0]
    assert tokenizer.decode(supervised) == "Welcome!<|im_end|>It is sunny.<|im_end|>"
    welcome = {"role": "assistant", "content": "Welcome!"}
    text = expected("qwen2_5", {"messages": [welcome, USER, ANSWER]})
    assert tokenizer.decode(example.input_ids) == text
    with pytest.raises(ValueError, match="row 3, .*roles must alternate"):
        encode_row({"conversations": turns}, real("gemma3"), index=3)


# ---- files and DataFrames


def test_conversations_in_a_csv_equal_those_in_a_list(tmp_path):
    rows = [row(), row() | {"tools": None, "messages": chat("a", "b")}]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["messages", "tools"])
        for entry in rows:
            tools = "" if entry["tools"] is None else json.dumps(entry["tools"])
            writer.writerow([json.dumps(entry["messages"]), tools])
    for stored, entry in zip(read_dataset(tmp_path / "rows.csv"), rows, strict=True):
        assert as_messages(stored) == as_messages(entry)
    two = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}
    assert as_messages(two) == Chat([USER, ANSWER], first_trained=1)


def filled() -> list[dict]:
    """Return rows to whose calls Arrow adds the keys of all others, as null."""
    other = {"messages": [USER, call({"query": "x"}), *chat("a", "b")], "tools": [TOOL]}
    return [row(), other, {"messages": chat("a", "b"), "tools": None}]


def test_nulls_of_a_parquet_file_are_absent(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(filled()), tmp_path / "rows.parquet")
    stored = read_dataset(tmp_path / "rows.parquet")
    assert stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["query"] is None
    assert list(map(as_messages, stored)) == list(map(as_messages, filled()))


@pytest.mark.slow
def test_nulls_of_a_dataset_are_absent():
    from datasets import Dataset

    stored = read_dataset(Dataset.from_list(filled()))
    assert list(map(as_messages, stored)) == list(map(as_messages, filled()))


def test_a_data_frame_is_read_and_its_nan_is_absent(tmp_path):
    import pandas  # part of the extra "all"

    rows = [row(), {"text": "a"}, {"prompt": "u", "completion": "a", "tools": ""}]
    frame = pandas.DataFrame(rows)
    assert frame.isna().any().any()
    read = read_dataset(frame)
    assert [as_messages(entry) for entry in read] == [as_messages(entry) for entry in rows]
    assert read[1] == {"text": "a"} | dict.fromkeys(["messages", "tools", "prompt", "completion"])
    # pandas reads a list of a parquet file as an array of numpy.
    pandas.DataFrame([row()]).to_parquet(tmp_path / "rows.parquet")
    stored = read_dataset(pandas.read_parquet(tmp_path / "rows.parquet"))
    assert as_messages(stored[0]) == as_messages(row())
    # A list of dicts that pandas made holds the same NaN.
    assert as_messages(frame.to_dict("records")[1]) == as_messages({"text": "a"})
    with pytest.raises(ValueError, match=r"DataFrame has several columns \['text'\]"):
        read_dataset(pandas.DataFrame([["a", "b"]], columns=["text", "text"]))


# ---- errors


@pytest.mark.parametrize(
    "entry, problem",
    [
        (
            row(tools="[{'type': 'function'}]"),
            r"row 7: tools is a text, and it is not JSON: .*dumps",
        ),
        (row(tools=TOOL), "row 7: tools must be a list of JSON schemas, got dict"),
        (row(tools=json.dumps(TOOL)), "row 7: tools must be a list of JSON schemas, got dict"),
        (row(tools=["weather"]), r"row 7: tools\[0\] is a text, and it is not JSON"),
        (row(tools=[{"type": "function"}]), r"row 7: tools\[0\] has no name: expected"),
        (
            row("Paris"),
            r"row 7, messages\[1\]: tool_calls\[0\]: arguments of weather is a text, .*JSON",
        ),
        (row("[1]"), r"row 7, messages\[1\]: .*: arguments of weather must be an object, got list"),
        ({"messages": [USER, call({}, "")]}, r"row 7, messages\[1\]: tool_calls\[0\] has no name"),
        (
            {"messages": "[{'role': 'user'}]"},
            "row 7: 'messages' must be a list .*, got str: .*JSON",
        ),
        (
            {"messages": '{"role": "user"}'},
            "row 7: 'messages' must be a list of messages, got dict",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "weather(Paris)"}]},
            r"row 7, conversations\[0\]: the value of a function_call is a text, .* not JSON",
        ),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "image_url": "x"}]}]},
            r"row 7, messages\[0\]: content must be a text, got list.*part 0 has the type 'image_url'",
        ),
        (
            {"messages": [USER, call({}) | {"function_call": {"name": "f"}}]},
            "row 7, .*tool_calls and function_call: leave one",
        ),
        (row({"city": "ab\ud83d"}), r"row 7, messages\[1\]: half a surrogate pair"),
        (row(tools=[{"name": "\udcff"}]), "row 7: tools: half a surrogate pair"),
        ({"messages": [USER | {"content": []}]}, "row 7, .*got an empty list of parts"),
        (
            {"messages": [ANSWER | {"reasoning_content": [1]}]},
            "row 7, .*reasoning_content must be a",
        ),
    ],
)
def test_a_form_that_cannot_be_read_names_its_row(entry, problem):
    with pytest.raises(ValueError, match=problem):
        as_messages(entry, 7)


def test_keys_of_parts_that_are_not_read_are_named():
    part = {"type": "text", "text": "a", "cache_control": 1, "image_url": None}
    keys = extra_keys({"messages": [USER | {"content": [part], "mood": 1}, ANSWER]})
    assert keys == {"messages[].content[].cache_control", "messages[].mood"}
    assert text_of({"messages": [USER | {"content": [part]}, ANSWER]}, ours("chatml")).count("a")
