"""Tests of preview: it shows the token ids, labels, documents and positions of the batch.

Then: the shown texts together are the row; the content of a dataset reaches the terminal and the
page as text only; trained tokens are marked also without colour; the command line.
"""

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from helpers.chats import chat, ours
from helpers.tiny import save
from minilora.cli.main import main
from minilora.data import IGNORE, collate, encode_dataset
from minilora.data.packing import pack

ROWS = [{"messages": chat("hello was", "as hello", "é中", "d" * n)} for n in range(1, 6)]
UNLIKE = [
    {"messages": chat("h" * (7 * n % 10), "as" * n, "é中", "d" * (5 - n))} for n in range(1, 6)
]


# ---- oracle: the batch


@pytest.mark.parametrize("packing", [False, True])
def test_preview_shows_the_tokens_of_the_batch(packing):
    tokenizer = ours("llama3")
    examples = list(encode_dataset(UNLIKE, tokenizer, 200))
    if packing:
        examples = list(pack(examples, [len(example) for example in examples], 200))
    batch = collate(examples, pad_id=0)
    shown = ml.preview(UNLIKE, tokenizer, rows=99, max_length=200, packing=packing)
    assert len({d.packed and d.packed[0] for d in shown.documents}) == (
        len(examples) if packing else 1
    )
    for number, example in enumerate(examples):
        mine = [d for d in shown.documents if (d.packed[0] if d.packed else d.row) == number]
        tokens = [token for document in mine for token in document.tokens]
        length = len(example)
        assert [token.id for token in tokens] == batch["input_ids"][number, :length].tolist()
        assert [token.trained for token in tokens] == (
            batch["labels"][number, :length] != IGNORE
        ).tolist()
        if packing:
            assert [token.position for token in tokens] == batch["position_ids"][
                number, :length
            ].tolist()
            places = [d.packed[1] for d in mine if d.packed for _ in d.tokens]
            ids = batch["document_ids"][number, :length].tolist()
            assert [a == b for a, b in zip(places, places[1:], strict=False)] == [
                a == b for a, b in zip(ids, ids[1:], strict=False)
            ]
            assert [(d.row, len(d.tokens)) for d in mine] == list(example.documents)
    assert shown.report == encode_dataset(UNLIKE, tokenizer, 200).report


# ---- property: the shown texts are the row


@given(st.text("helo was<>&\"'\n\x1b\x00é", max_size=30).map(str.strip))
def test_shown_texts_are_the_row_and_are_escaped(content):
    tokenizer = ours("chatml")
    document = ml.preview([{"messages": chat(content, "b")}], tokenizer).documents[0]
    whole = tokenizer.apply_chat_template(chat(content, "b"), tokenize=False)
    assert "".join(text for _, text in document.runs) == whole
    if content.isascii():  # a token may hold a part of a non-ASCII character
        assert "".join(token.text for token in document.tokens) == whole
    shown = ml.preview([{"messages": chat(content, "b")}], tokenizer)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", shown.text() + shown._repr_html_())
    page = Page()
    page.feed(shown._repr_html_())
    assert "&lt;|im_start|&gt;" in shown._repr_html_() and "<|im_start|>" not in shown._repr_html_()
    assert page.tags <= {"div", "style", "pre", "p", "span", "small", "br"}
    assert page.attributes <= {("class", "minilora-preview"), ("class", "trained")}


class Page(HTMLParser):
    """HTML parser that collects the tags and attributes of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= set(attrs)


def test_a_sentencepiece_token_keeps_its_space():
    class Words:
        bos_token_id = pad_token_id = chat_template = None
        eos_token_id = 2

        def encode(self, text, add_special_tokens=True):
            return [3 + ["a", "b"].index(word) for word in text.split()]

        def decode(self, ids, skip_special_tokens=False):
            return " ".join(
                {2: "" if skip_special_tokens else "</s>", 3: "a", 4: "b"}[i] for i in ids
            )

        def __len__(self):
            return 5

    shown = ml.preview([{"text": "a b b"}], Words())  # pyright: ignore[reportArgumentType] a stub
    tokens = shown.documents[0].tokens
    assert [token.text for token in tokens] == ["a", " b", " b", " </s>"]


# ---- layout


def test_trained_tokens_are_marked_without_colour(monkeypatch):
    shown = ml.preview(ROWS, ours("chatml"), rows=1)
    lines = str(shown).splitlines()
    assert "\x1b" not in str(shown) and repr(shown) == str(shown)  # stdout is no terminal
    assert "row 0: 51 tokens, 5 trained" in lines
    assert r"  trained      'as hello<|im_end|>'" in lines
    assert (
        "        21     263  yes      'as'" in lines
        and "         0     264           '<|im_start|>'" in lines
    )
    assert "         …  9 more, not trained" in lines
    coloured = shown.text(colour=True)
    assert coloured.count("\x1b[1;32m") == 2 + 5 and re.sub(r"\x1b\[[\d;]*m", "", coloured) == str(
        shown
    )
    assert "…" not in shown.text(edge=None) and shown.text(edge=None).count("\n        ") == 51
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert str(shown) == coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in str(shown)
    page = shown._repr_html_()
    assert (
        page.count('<span class="trained">') == 1 + 5
        and "border-bottom-color" in page
        and "<script" not in page
    )


def test_rows_that_training_leaves_out_are_shown_by_number():
    rows = [*ROWS, {"messages": chat("a" * 90, "b")}]
    shown = ml.preview(iter(rows), ours("chatml"), rows=[5, 1], max_length=60)
    assert [document.row for document in shown.documents] == [1, 5]
    assert "row 5: 60 tokens, 0 trained, cut at max_length: left out of training" in str(shown)
    stopped = ml.preview(rows[5:], ours("chatml"), max_length=60)
    assert (
        "training would stop here: dataset: none of 1 rows" in str(stopped)
        and stopped.documents[0].row == 0
    )
    packed = ml.preview(rows, ours("chatml"), rows=[3], max_length=130, packing=True)
    assert [document.row for document in packed.documents] == [
        4,
        3,
    ] and "packing: 6 examples in 4 rows" in str(packed)


# ---- the command line and errors


def test_preview_command_shows_the_same_text_and_train_prints_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    save(tmp_path / "model", vocab_size=len(ours("chatml")), tie_word_embeddings=True)
    ours("chatml").save_pretrained(tmp_path / "model")
    assert (
        main(
            [
                "train",
                "model",
                "my rows.jsonl",
                "--max_steps",
                "1",
                "--packing",
                "true",
                "--max_length",
                "150",
            ]
        )
        == 0
    )
    command = "minilora preview 'my rows.jsonl' --model model --max_length 150 --packing true"
    said = capsys.readouterr().out
    assert (
        f"token by token: {command}\n" in said
        and "tokenizer: chat template 01f75116261e6b72\n" in said
    )
    arguments = ["preview", "my rows.jsonl", "--model", "model"]
    assert (
        main([*arguments, "--max_length", "150", "--packing", "true", "--rows", "2,", "--whole"])
        == 0
    )
    expected = ml.preview(ROWS, ours("chatml"), rows=[2], max_length=150, packing=True)
    assert capsys.readouterr().out == expected.text(edge=None) + "\n"
    assert main(arguments) == 0
    assert capsys.readouterr().out == str(ml.preview(ROWS, ours("chatml"), max_length=1024)) + "\n"
    assert main([*arguments, "--rows", "7,"]) == 1
    assert "rows: expected numbers from 0 to 4, got 7" in capsys.readouterr().err


def test_packing_needs_a_length():
    with pytest.raises(ValueError, match="packing: .*max_length"):
        ml.preview(ROWS, ours("chatml"), packing=True)
