"""Tests of ml.load_dataset: columns of other names, conversations, separators, the Hub.

Oracle: the same rows, written by hand under the names of a known shape. An option that changes
nothing, or does not fit the rows, is an error.
"""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from helpers.chats import ours
from helpers.hub import serve
from helpers.tiny import python
from minilora.data import Chat, as_messages, encode_dataset
from minilora.data.formats import SHAPES, shape_of
from minilora.data.sources.columns import known_keys
from minilora.data.sources.hub_files import is_hub_dataset
from minilora.data.sources.proposal import propose_columns

USER, ANSWER, SYSTEM = (
    {"role": role, "content": role[0]} for role in ("user", "assistant", "system")
)
TICKETS = [
    {"id": "7", "ticket": "The printer has been silent since Monday.", "answer": "Restart it."},
    {"id": "8", "ticket": "Where can I change my password?", "answer": "In the settings."},
]
PAIRS = [{"id": t["id"], "prompt": t["ticket"], "completion": t["answer"]} for t in TICKETS]
MAPPING = {"prompt": "ticket", "completion": "answer"}


# ---- columns


def test_mapped_columns_are_the_rows_under_their_known_names():
    assert ml.load_dataset(TICKETS, columns=MAPPING) == PAIRS
    assert ml.load_dataset(PAIRS, columns={}) == ml.load_dataset(PAIRS) == PAIRS


@pytest.mark.parametrize("shape", SHAPES)
def test_the_keys_of_every_shape_can_be_mapped(shape):
    required, optional = SHAPES[shape]
    keys = sorted(required | optional)
    row = {f"column_{key}": "text" for key in keys}
    columns = {key: f"column_{key}" for key in keys}
    assert ml.load_dataset([row], columns=columns) == [dict.fromkeys(keys, "text")]


def test_a_mapped_column_is_used_whatever_other_columns_there_are():
    """A row with the keys of two shapes has the first of SHAPES, which would ignore the mapping."""
    row = {"messages": [USER, ANSWER], "text": "old", "body": "b", "note": 1}
    assert ml.load_dataset([row], columns={"text": "body"}) == [{"text": "b", "note": 1}]
    row = {"prompt": "u", "completion": "old", "better": "a"}
    assert ml.load_dataset([row], columns={"completion": "better"}) == [
        {"prompt": "u", "completion": "a"}
    ]
    assert ml.load_dataset(
        [{"body": "b", "class": "x"}], columns={"text": "body", "label": "class"}
    )


@given(st.permutations(known_keys()), st.integers(1, 4))
def test_a_mapping_is_applied_or_refused(keys, count):
    row = {f"c{number}": "x" for number in range(count)}
    columns = dict(zip(keys, row, strict=False))
    try:
        (mapped,) = ml.load_dataset([row], columns=columns)
    except ValueError as error:
        assert "match no known shape" in str(error)
    else:
        assert mapped == dict.fromkeys(columns, "x")


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"prompt": "tickt"}, "no column 'tickt' for 'prompt'. The columns are id, ticket, answer"),
        ({"promt": "ticket"}, "the key: 'promt' matches nothing. Nearest: 'prompt'"),
        ({"prompt": "ticket", "completion": "ticket"}, "maps one column to two keys"),
        ({"prompt": "ticket", "output": "answer"}, "match no known shape"),
    ],
)
def test_a_wrong_mapping_names_the_columns(columns, problem):
    with pytest.raises(ValueError, match=problem):
        ml.load_dataset(TICKETS, columns=columns)


# ---- conversations


def turns(row) -> list[tuple[str, str]]:
    """Return role and content of the messages of a row."""
    chat = as_messages(row)
    assert isinstance(chat, Chat)
    return [(message["role"], message["content"]) for message in chat.messages]


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        (PAIRS[0], [("user", PAIRS[0]["prompt"]), ("assistant", PAIRS[0]["completion"])]),
        ({"prompt": [USER], "completion": [ANSWER]}, [("user", "u"), ("assistant", "a")]),
        ({"instruction": "u", "output": "a"}, [("user", "u"), ("assistant", "a")]),
        ({"messages": [USER, ANSWER]}, [("user", "u"), ("assistant", "a")]),
        ({"messages": json.dumps([USER, ANSWER])}, [("user", "u"), ("assistant", "a")]),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            [("user", "u"), ("assistant", "a")],
        ),
    ],
)
def test_chat_and_system_make_a_conversation_of_every_shape(row, conversation):
    before = json.dumps(row)
    (plain,) = ml.load_dataset([row], chat=True)
    assert turns(plain) == conversation
    (led,) = ml.load_dataset([row], chat=True, system="s")
    expected = [("system", "s"), *conversation]
    assert turns(led) == expected
    (again,) = ml.load_dataset([led], system="another")  # it has its own system message
    assert turns(again) == expected
    assert json.dumps(row) == before


def test_chat_trains_what_generate_reads():
    """The tokens before the answer are those of `generate` for the same prompt."""
    tokenizer = ours("chatml")
    (example,) = encode_dataset(ml.load_dataset(PAIRS[:1], chat=True), tokenizer)
    first = example.labels.index(next(label for label in example.labels if label >= 0))
    assert example.input_ids[:first] == ml.data.encode_prompt(PAIRS[0]["prompt"], tokenizer)


HI, YES, NO = (
    {"role": role, "content": text}
    for role, text in (("user", "hi"), ("assistant", "yes"), ("assistant", "no"))
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": [HI], "chosen": [YES], "rejected": [NO]},
        {"prompt": "hi", "chosen": [YES], "rejected": [NO]},
        {"prompt": "hi", "chosen": [HI, YES], "rejected": [HI, NO]},
        {"chosen": [HI, YES], "rejected": [HI, NO]},
        {"chosen": json.dumps([HI, YES]), "rejected": json.dumps([HI, NO])},
        {"messages": [HI], "chosen": YES, "rejected": NO},
        {"conversations": [HI], "chosen": YES, "rejected": NO},
        {"instruction": "hi", "chosen": "yes", "rejected": "no"},
    ],
)
def test_chat_and_system_make_conversations_of_every_preference(row):
    led = ml.load_dataset([row], chat=True, system="s")
    system = {"role": "system", "content": "s"}
    plain = [{"prompt": [system, HI], "chosen": [YES], "rejected": [NO]}]
    found, expected = (ml.DPO().encode(rows, ours("chatml"), None) for rows in (led, plain))
    assert list(found) == list(expected)


@pytest.mark.parametrize(
    ("row", "options", "problem"),
    [
        ({"text": "t"}, {"chat": True}, "this row is plain text"),
        ({"text": "t"}, {"system": "s"}, "Add --chat true"),
        (PAIRS[0], {"system": "s"}, "Add --chat true"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"system": "s"}, "Add --chat true"),
        ({"prompt": "p", "completion": "c"}, {"separator": ";"}, "it is for .csv files"),
        ({"prompt": "p", "completion": "c"}, {"revision": "main"}, "are for the Hub"),
        (TICKETS[0], {"chat": True}, "match no known shape"),
    ],
)
def test_an_option_without_effect_is_an_error(row, options, problem):
    with pytest.raises(ValueError, match=problem):
        ml.load_dataset([row], **options)


def test_the_report_names_rows_outside_the_chat_template():
    tokenizer = ours("chatml")
    plain = str(encode_dataset(PAIRS, tokenizer).report)
    assert "2 rows train prompt and completion without the chat template" in plain
    assert "--chat true" in plain and "(rows 0, 1)" in plain
    for rows in (ml.load_dataset(PAIRS, chat=True), [{"text": "Some prose."}]):
        assert "chat template" not in str(encode_dataset(rows, tokenizer).report)
    base = copy.copy(tokenizer)
    base.chat_template = None  # a base model has no template to miss
    assert "chat template" not in str(encode_dataset(PAIRS, base).report)


# ---- separators


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("given", [True, False])
def test_a_csv_with_any_separator_gives_the_same_rows(tmp_path, separator, given):
    path = tmp_path / "rows.csv"
    cells = [("prompt", "completion"), ('"a; b,\tc"', "d"), ("e", '"f\n;"')]
    lines = [separator.join(row) for row in cells]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    rows = ml.load_dataset(path, separator=separator if given else None)
    expected = [("a; b,\tc", "d"), ("e", "f\n;")]
    assert [(row["prompt"], row["completion"]) for row in rows] == expected


# ---- proposals


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (TICKETS, MAPPING),
        ([{"prompt": "p x", "reply": "a"}], {"completion": "reply"}),
        ([{"Question": "x", "Reasoning": "longer", "Final answer": "z"}],
         {"prompt": "Question", "completion": "Final answer"}),
        ([{"sentence": f"long text {n}", "y": "ab"[n % 2]} for n in range(8)],
         {"prompt": "sentence", "completion": "y"}),
        ([{"a": f"first {n}", "b": f"a much longer second {n}"} for n in range(8)],
         {"prompt": "a", "completion": "b"}),
        ([{"log": [USER, ANSWER], "id": "x"}], {"messages": "log"}),
        ([{"log": json.dumps([{"from": "human", "value": "u"}])}], {"conversations": "log"}),
        ([{"body": "some prose", "n": 3}], {"text": "body"}),
        ([{"question": "q", "chosen_answer": "a", "rejected_answer": "b"}],
         {"prompt": "question", "chosen": "chosen_answer", "rejected": "rejected_answer"}),
        ([{"winner": [USER, ANSWER], "loser": [USER, ANSWER]}],
         {"chosen": "winner", "rejected": "loser"}),
        ([{"ticket": "1 + 1?", "answer": "2", "day": "3"}], MAPPING),
        ([{"x": 1, "id": "abc"}], {}),
    ],
)  # fmt: skip
def test_a_proposal_maps_names_and_contents_on_a_shape(rows, columns):
    assert propose_columns(rows) == columns
    if columns:
        (first, *_) = ml.load_dataset(rows, columns=columns)
        assert shape_of(first) in SHAPES


@given(st.lists(st.dictionaries(st.text(), st.none() | st.text() | st.integers()), min_size=1))
def test_a_proposal_names_columns_that_exist(rows):
    columns = propose_columns(rows)
    assert set(columns.values()) <= {name for row in rows for name in row}
    assert len(set(columns.values())) == len(columns)


def test_an_unknown_shape_is_an_error_with_the_proposal():
    with pytest.raises(ValueError, match="--columns 'prompt=ticket,completion=answer'"):
        as_messages(TICKETS[0])


# ---- the Hub

ASK = """
import json, sys
import minilora as ml
answers = []
for name in json.loads(sys.argv[1]):
    try:
        answers.append([row["text"] for row in ml.load_dataset(name)])
    except (OSError, ValueError) as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""
REPOS = {
    "me/split": ["train.jsonl", "test.csv", "README.md"],
    "me/shards": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
    "me/single": ["corpus.json", "dataset_infos.json"],
    "me/configs": ["main/train-0.jsonl", "main/test-0.jsonl", "socratic/train-0.jsonl"],
}
ASKED = {
    "me/split": ["train.jsonl"],
    "me/split:test": ["test.csv"],
    "me/split:test.csv": ["test.csv"],
    "me/split:validation": "no file fits. The data set has these files: test.csv, train.jsonl",
    "me/shards": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
    "me/single": ["corpus.json"],
    "me/configs": "no file fits alone",
    "me/configs:main/train": ["main/train-0.jsonl"],
    "me/nothing": "OSError: 'me/nothing' is neither",
}


def content(name: str) -> bytes:
    """Return a file with one row, whose text is the name of the file."""
    text = {"json": '[{{"text": "{0}"}}]', "csv": "text\n{0}\n"}.get(
        name.rpartition(".")[2], '{{"text": "{0}"}}'
    )
    return text.format(name).encode()


def test_data_sets_of_the_hub_are_found_by_split_or_file_and_cached(tmp_path):
    repos = {repo: {name: content(name) for name in names} for repo, names in REPOS.items()}
    with serve(repos) as (server, env):
        env |= {"HF_HOME": str(tmp_path)}
        online = json.loads(python(ASK, json.dumps([*ASKED]), **env))
        fetched = [line for line in server.requests if "README" in line]
        count = len(server.requests)
        offline = json.loads(python(ASK, '["me/split"]', **(env | {"HF_HUB_OFFLINE": "1"})))
        assert offline == [["train.jsonl"]] and len(server.requests) == count and not fetched
    for (name, expected), found in zip(ASKED.items(), online, strict=True):
        assert found == expected or (isinstance(expected, str) and expected in found), name


def test_a_hub_data_set_is_not_taken_for_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_dataset("me/rows") and is_hub_dataset("me/rows.jsonl:test")
    for name in ("rows", "data/rows.jsonl", "/data/rows", "./me/rows", "a/b/c", "C:\\rows.csv"):
        assert not is_hub_dataset(name), name
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "rows").touch()
    assert not is_hub_dataset("me/rows")
