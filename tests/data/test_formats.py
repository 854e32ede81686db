"""Tests of the dataset formats: shapes of rows, kinds of files, and errors.

Each shape of row is compared with the conversation that it describes, each kind of file with the
same rows in a list. An error must name the row, the value it got and the value it expected.
"""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import SHAPES, Chat, RawText, Text, as_messages, read_dataset, split_prompt
from minilora.data.formats import extra_keys, shape_of

USER, ANSWER, SYSTEM = (
    {"role": role, "content": role[0]} for role in ("user", "assistant", "system")
)
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
TOOL = {"type": "function", "function": {"name": "f"}}

# ---- shapes


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, Chat([SYSTEM, USER, ANSWER])),
        ({"messages": [USER, CALL], "tools": [TOOL]}, Chat([USER, CALL], tools=[TOOL])),
        # Arrow fills missing keys with None.
        ({"messages": [USER | {"name": None}, ANSWER]}, Chat([USER, ANSWER])),
        (
            {
                "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
                "system": "s",
            },
            Chat([SYSTEM, USER, ANSWER]),
        ),
        ({"conversations": [USER, ANSWER]}, Chat([USER, ANSWER])),
        ({"instruction": "u", "output": "a"}, Chat([USER, ANSWER])),
        ({"instruction": "u", "input": "", "output": "a", "system": ""}, Chat([USER, ANSWER])),
        (
            {"instruction": "u", "input": "more", "output": "a", "system": "s"},
            Chat([SYSTEM, USER | {"content": "u\n\nmore"}, ANSWER]),
        ),
        ({"prompt": "u", "completion": "a"}, Text("a", prompt="u")),
        ({"prompt": [USER], "completion": [ANSWER]}, Chat([USER, ANSWER], first_trained=1)),
        ({"text": "t"}, Text("t")),
        # A row with keys of several shapes has the first of SHAPES. The report names other keys.
        ({"messages": [USER, ANSWER], "prompt": "u", "text": "x"}, Chat([USER, ANSWER])),
        ({"instruction": "u", "output": "a", "text": "x"}, Chat([USER, ANSWER])),
        ({"messages": None, "text": "t"}, Text("t")),
    ],
)
def test_a_row_of_each_shape_becomes_its_conversation(row, expected):
    before = json.dumps(row)
    assert as_messages(row) == expected
    assert json.dumps(row) == before  # the row itself is not changed


def test_preference_rows_are_recognised_but_not_trained():
    row = {"prompt": "u", "chosen": "a", "rejected": "b"}
    assert shape_of(row) == shape_of({"chosen": "a", "rejected": "b"}) == "preference"
    with pytest.raises(ValueError, match="row 4: chosen/rejected is preference data.*rename"):
        as_messages(row, 4)


def test_trained_turns():
    other = ANSWER | {"weight": 0}
    assert Chat([USER, ANSWER, USER, ANSWER]).trained_turns() == [1, 3]
    assert Chat([USER, other, USER, ANSWER]).trained_turns() == [3]
    assert Chat([USER, ANSWER, USER, ANSWER], first_trained=2).trained_turns() == [3]


def test_extra_keys_are_found_in_rows_and_messages():
    row = {
        "messages": [USER | {"mood": 1}, ANSWER],
        "prompt": "x",
        "id": 3,
        "gone": None,
        "tools": [],
    }
    assert extra_keys(row) == {"prompt", "id", "messages[].mood"}
    assert extra_keys({"conversations": [{"from": "human", "value": "u"}], "system": "s"}) == set()


def test_split_prompt():
    assert split_prompt({"messages": [SYSTEM, USER, ANSWER, USER]}) == ([SYSTEM, USER], "a")
    assert split_prompt({"instruction": "u", "output": "a"}) == ([USER], "a")
    prompt, answer = split_prompt({"prompt": "u", "completion": " a"})
    assert (prompt, answer) == ("u", " a") and isinstance(prompt, RawText)


KEYS = sorted({"id"}.union(*(required | optional for required, optional in SHAPES.values())))
VALUES = (
    st.none()
    | st.text()
    | st.integers()
    | st.lists(st.integers() | st.dictionaries(st.text(), st.text()))
)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_any_row_is_read_or_refused_with_its_number(row):
    try:
        assert isinstance(as_messages(row, 17), Chat | Text)
    except ValueError as error:
        assert "row 17" in str(error)


# ---- files

ROWS = [{"prompt": 'é, "q"\nu', "completion": "a"}, {"prompt": "中", "completion": ""}]


def to_jsonl(path):
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")


def to_json(path):
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig")


def to_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)


def to_parquet(path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("write", [to_jsonl, to_json, to_csv, to_parquet])
def test_read_dataset_gives_the_same_rows_for_every_kind_of_file(tmp_path, write):
    path = tmp_path / f"rows.{write.__name__[3:]}"
    write(path)
    assert read_dataset(path) == read_dataset(str(path)) == read_dataset(ROWS) == ROWS
    assert read_dataset(row for row in ROWS) == ROWS


def test_parquet_without_pyarrow_names_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(ImportError, match=r"needs pyarrow, .* pip install -e '\.\[data\]'"):
        read_dataset(tmp_path / "rows.parquet")


# ---- errors


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "a.jsonl, line 2: not JSON"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "not JSON: Extra data.*rename the file"),
        ("a.jsonl", '{"text": "a"}{"text": "b"}', "line 1: not JSON: .* each object on its own"),
        ("a.json", '{"text": "a"}', "expected a JSON list of rows, got dict"),
        ("a.csv", "text,label\na\n", "number of cells of row 0 differs.*',' between.*--separator"),
        ("a.csv", "a;b,c\n1;2,3\n", "as many columns with ',' as with ';'.*--separator"),
        ("a.csv", "text\na,b\n", "number of cells of row 0 differs"),
        ("a.jsonl", "", "is empty"),
        ("a.csv", "text\n", "is empty"),
        (
            "a.csv",
            "text\n" + "a" * 200_000,
            r"a.csv: Python cannot read this CSV: field larger .*\.jsonl has no such",
        ),
        (
            "a.jsonl",
            "\N{LATIN SMALL LETTER E WITH ACUTE}",
            "a.jsonl: not UTF-8 text: .* Save it as UTF-8",
        ),
        ("a.jsonl", "3\n", "row 0: expected a dict, got int"),
        ("a.txt", "a", "expected a path to .jsonl, .json, .csv or .parquet, got .*a.txt"),
    ],
)
def test_bad_files_raise(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=problem):
        read_dataset(tmp_path / name)


@pytest.mark.parametrize(
    "dataset, problem",
    [
        ([], "list is empty"),
        (iter(()), "is empty"),
        ({"train": [{"text": "a"}]}, r"got a dict with keys \['train'\]. Pass one split"),
        (
            "tatsu-lab/alpaca",
            "For a data set of the Hub, pass the rows of `ml.load_dataset",
        ),
        (7, "expected a list, an iterable or a path, got int"),
        ([{"text": "a"}, "b"], "row 1: expected a dict, got str: 'b'"),
    ],
)
def test_bad_datasets_raise(dataset, problem):
    with pytest.raises(ValueError, match=problem):
        read_dataset(dataset)


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="nowhere.jsonl does not exist. Expected a file of rows; paths begin",
    ):
        read_dataset(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    "row, problem",
    [
        (
            {"question": "u", "answer": "a"},
            r"keys \['answer', 'question'\] match no known shape. Expected one of: messages",
        ),
        ({}, r"keys \[\] match no known shape.*instruction, output.*text"),
        ({"messages": "u"}, "'messages' must be a list of messages, got str"),
        ({"messages": []}, "'messages' must be a list of messages, got an empty one"),
        ({"messages": ["u"]}, r"messages\[0\]: expected a dict with role and content, got str"),
        (
            {"messages": [USER, ANSWER | {"content": 3}]},
            r"messages\[1\]: content must be a text, got int",
        ),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "got list. Join its text parts"),
        ({"messages": [{"role": "user"}]}, "content must be a text, got NoneType"),
        (
            {"messages": [{"role": "asistant", "content": "a"}]},
            "unknown role 'asistant'. Expected one of system",
        ),
        ({"messages": [{"content": "a"}]}, "unknown role None"),
        (
            {"messages": [USER, ANSWER | {"weight": 0.5}]},
            "weight must be 0 .not trained. or 1, got 0.5",
        ),
        (
            {"conversations": [{"from": "robot", "value": "a"}]},
            r"conversations\[0\]: unknown role 'robot'.*human, gpt",
        ),
        ({"conversations": [{"from": "human", "text": "a"}]}, "content must be a text"),
        (
            {"prompt": "u", "completion": [ANSWER]},
            "both be texts or both be messages, got str and list",
        ),
        ({"prompt": "u", "completion": "a", "tools": [TOOL]}, "tools need a chat"),
        ({"instruction": 3, "output": "a"}, "'instruction' must be a text, got int"),
        ({"instruction": "u", "output": ["a"]}, "'output' must be a text, got list"),
        ({"text": 3}, "'text' must be a text, got int"),
        ({"text": "ab\ud83d"}, "'text': half a surrogate pair at character 2"),
        (
            {"prompt": "a", "completion": "\ud83d"},
            "'completion': half a surrogate pair at character 0",
        ),
        (
            {"messages": [USER, ANSWER | {"content": "\udcff"}]},
            r"messages\[1\]: half a surrogate pair",
        ),
        ({"conversations": [USER], "system": 3}, "'system' must be a text, got int"),
    ],
)
def test_a_bad_row_raises_with_its_number_and_the_fault(row, problem):
    with pytest.raises(ValueError, match=f"row 12.*{problem}"):
        as_messages(row, 12)
