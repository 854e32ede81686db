"""Tests of the tokenizer and of chat templates, which must equal those of transformers.

Oracle: transformers with the same files, for token ids, decoding and rendering. Round trip: a saved
tokenizer loads in both libraries. Errors: wrong folders, files that contradict each other, hostile
templates.
"""

import json
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.chats import CHATML, FAMILIES, QWEN3, backend, chat, ours, theirs
from minilora.data import ALPACA_TEMPLATE, Tokenizer, load_tokenizer

CONVERSATIONS = [
    chat("hello", "world"),
    chat("hello", "<think>\nhm\n</think>\n\nworld", "a", "b"),
    chat(" spaces ", "<b>&amp;</b> 'é' 中"),
    chat("a", "b", "c"),
]
TOOLS = [{"name": "clock", "description": "says <what> it's & 'é'"}]
# Templates that use all features that the template environment must have.
ODD = {
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}\n{{ m.content }}{% endgeneration %}|\n"
    "{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ messages | tojson(ensure_ascii=true) }}",
    "whitespace": "  {% if true %}\n  a\n  {% endif %}\n\n b {#- c #}\n{{ messages | length }}",
    "date": "{{ strftime_now('%Y %B') }}",
    "namespace": "{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}{{ dict(a=1)['a'] }}",
    "specials": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ tools is none }}"
    "{{ documents }}",
    "undefined": "{% if enable_thinking is defined %}x{% endif %}{{ messages[0].thoughts or '-' }}",
}


def write(folder, config: dict, special=("<|im_start|>", "<|im_end|>"), **files: str):
    """Write a checkpoint folder with a tokenizer.json and return it.

    The keys of `files` are file names without suffix: chat_template has .jinja, others .json.
    """
    folder.mkdir(exist_ok=True)
    backend(list(special)).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    )
    for name, text in files.items():
        (folder / (f"{name}.jinja" if name == "chat_template" else f"{name}.json")).write_text(text)
    return folder


# ---- oracle: rendering


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_render_and_encode_as_transformers(family, messages, generation_prompt):
    options = {"add_generation_prompt": generation_prompt}
    text = ours(family).apply_chat_template(messages, tokenize=False, **options)
    assert text == theirs(family).apply_chat_template(messages, tokenize=False, **options)
    ids = ours(family).apply_chat_template(messages, **options)
    assert ids == theirs(family).apply_chat_template(messages, return_dict=False, **options)
    assert ids == theirs(family).encode(text, add_special_tokens=False)


@pytest.mark.parametrize("template", [*ODD.values(), ALPACA_TEMPLATE], ids=[*ODD, "alpaca"])
def test_odd_templates_render_as_transformers(template):
    messages = CONVERSATIONS[2]
    expected = theirs("mistral").apply_chat_template(
        messages, chat_template=template, tokenize=False
    )
    assert (
        ours("mistral").apply_chat_template(messages, chat_template=template, tokenize=False)
        == expected
    )
    assert expected


@pytest.mark.parametrize(
    "options", [{"tools": TOOLS}, {"enable_thinking": False}, {"enable_thinking": True}]
)
def test_tools_and_template_variables_reach_the_template(options):
    options = {"tokenize": False, "add_generation_prompt": True} | options
    text = ours("qwen3").apply_chat_template(chat("a"), **options)
    assert text == theirs("qwen3").apply_chat_template(chat("a"), **options)
    assert ("<what> it's & 'é'" in text) == ("tools" in options)


def test_strftime_now_gives_the_date_of_today():
    text = ours("chatml").apply_chat_template(chat("a"), chat_template=ODD["date"], tokenize=False)
    assert text == datetime.now().strftime("%Y %B")


# ---- oracle: files


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "<|im_end|>", "pad_token": None},
        {
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
            "bos_token": "<|im_start|>",
        },
        # tokenizer.json decides if BOS is added
        {
            "eos_token": "<|im_end|>",
            "add_bos_token": True,
            "bos_token": "<|im_start|>",
        },
        {
            "added_tokens_decoder": {
                "266": {"content": "<new>", "special": True},
                "267": {"content": "<tool>"},
            }
        },
        {"additional_special_tokens": ["hello", {"content": "as", "__type": "AddedToken"}]},
        {"eos_token": "hello"},  # a plain word of the vocabulary becomes special
        {"extra_special_tokens": {"greeting": "hello"}},
        {"model_max_length": 4, "padding_side": "left", "unk_token": "<|im_start|>"},
    ],
    ids=[
        "str",
        "AddedToken",
        "add_bos_token",
        "added_tokens_decoder",
        "additional",
        "plain word",
        "extra",
        "lengths",
    ],
)
def test_folders_load_as_in_transformers(tmp_path, config):
    from transformers import AutoTokenizer

    folder = write(tmp_path / "checkpoint", config | {"chat_template": CHATML})
    mine, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nhello world<new><tool> <|im_end|>\n é" * 3
    for special in (True, False):
        ids = mine.encode(text, add_special_tokens=special)
        assert ids == reference.encode(text, add_special_tokens=special)
        assert mine.decode(ids, skip_special_tokens=special) == reference.decode(
            ids, skip_special_tokens=special
        )
    for name in (
        "bos_token",
        "eos_token",
        "pad_token",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "vocab_size",
    ):
        assert getattr(mine, name) == getattr(reference, name), name
    assert len(mine) == len(reference) and mine.chat_template == reference.chat_template
    assert mine.convert_ids_to_tokens(ids) == reference.convert_ids_to_tokens(ids)
    assert mine.convert_tokens_to_ids(["hello", "a"]) == reference.convert_tokens_to_ids(
        ["hello", "a"]
    )
    assert mine.convert_ids_to_tokens(3) == reference.convert_ids_to_tokens(3)


def test_a_template_file_has_priority_and_named_templates_can_be_chosen(tmp_path):
    from transformers import AutoTokenizer

    named = [{"name": "default", "template": "default"}, {"name": "tool_use", "template": "tools"}]
    folder = write(tmp_path / "named", {"chat_template": named})
    for tokenizer in (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
        for options, text in [
            ({}, "default"),
            ({"tools": TOOLS}, "tools"),
            ({"chat_template": "tool_use"}, "tools"),
        ]:
            assert tokenizer.apply_chat_template(chat("a"), tokenize=False, **options) == text
    folder = write(tmp_path / "file", {"chat_template": named}, chat_template="file")
    for tokenizer in (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
        assert tokenizer.chat_template == "file"
    only = load_tokenizer(write(tmp_path / "no_default", {"chat_template": named[1:]}))
    with pytest.raises(ValueError, match=r"no default among the chat templates \['tool_use'\]"):
        only.apply_chat_template(chat("a"))


def test_special_tokens_map_of_older_checkpoints_is_read(tmp_path):
    tokens = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}
    tokenizer = load_tokenizer(write(tmp_path / "old", {}, special_tokens_map=json.dumps(tokens)))
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    folder = write(tmp_path / "short", {})
    cut = backend([])
    cut.enable_truncation(2)
    cut.enable_padding(length=50)
    cut.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("abcdef")) == 6


# ---- round trip


@given(st.text(max_size=40))
def test_decode_inverts_encode(text):
    tokenizer = ours("chatml")
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize(
    "template", [CHATML, None, {"default": CHATML, "other": "x"}], ids=["one", "none", "named"]
)
def test_a_saved_tokenizer_loads_in_minilora_and_transformers(tmp_path, template):
    from transformers import AutoTokenizer

    source = Tokenizer(
        backend(["<s>", "</s>"], "<s>"), {"bos_token": "<s>", "eos_token": "</s>"}, template
    )
    source.save_pretrained(tmp_path / "saved")
    text = "hello <s> world</s>"
    for again in (
        load_tokenizer(tmp_path / "saved"),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    ):
        assert (
            again.encode(text) == source.encode(text)
            and again.eos_token == "</s>"
            and again.bos_token == "<s>"
        )
        assert again.chat_template == template
    assert not list((tmp_path / "saved").glob(".*"))  # no temporary file is left


def test_saving_keeps_the_fields_of_the_config(tmp_path):
    source = load_tokenizer(
        write(tmp_path / "a", {"model_max_length": 77, "eos_token": "<|im_end|>"})
    )
    source.chat_template = "new"
    source.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 77 and config["eos_token"] == "<|im_end|>"
    assert load_tokenizer(tmp_path / "b").chat_template == "new"


# ---- errors


def test_a_missing_template_raises_with_the_remedy():
    base = Tokenizer(backend([]))
    with pytest.raises(
        ValueError, match=r"no chat template.*`tokenizer.chat_template = .*ALPACA_TEMPLATE"
    ):
        base.apply_chat_template(chat("a"))
    base.chat_template = CHATML
    assert base.apply_chat_template(chat("a"), tokenize=False) == "<|im_start|>user\na<|im_end|>\n"


@pytest.mark.parametrize(
    "template, problem",
    [
        (
            "{{ raise_exception('no system turn, please') }}",
            r"roles \['user'\]: no system turn, please",
        ),
        ("{% for %}", "cannot render"),
        ("{{ messages[0].content + none }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{{ strftime_now.__globals__['json'] }}", "unsafe"),
    ],
)
def test_a_template_that_fails_or_is_unsafe_raises(template, problem):
    with pytest.raises(ValueError, match=problem):
        ours("chatml").apply_chat_template(chat("a"), chat_template=template)


def test_rendering_does_not_change_the_messages():
    messages = chat("a", "b")
    ours("qwen3").apply_chat_template(messages, chat_template=QWEN3)
    assert messages == chat("a", "b")


def test_wrong_folders_raise(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json. Expected a checkpoint folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("")
    with pytest.raises(ValueError, match="sentencepiece.*AutoTokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(Exception) as broken:  # the tokenizers package raises a plain Exception
        load_tokenizer(tmp_path)
    assert "tokenizer.json is not a tokenizer" in broken.value.__notes__[0]
    folder = write(tmp_path / "a", {})
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json holds a list, expected a JSON obj"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "config, problem",
    [
        ({"eos_token": "</nothing>"}, "'</nothing>'.* not in the vocabulary of 266 tokens"),
        ({"additional_special_tokens": ["</nothing>"]}, "'</nothing>'.* not in the vocabulary"),
        (
            {"added_tokens_decoder": {"5": {"content": "<new>"}}},
            "'<new>' the id 5, the vocabulary 266",
        ),
    ],
)
def test_files_that_contradict_each_other_raise(tmp_path, config, problem):
    with pytest.raises(ValueError, match=problem):
        load_tokenizer(write(tmp_path / "a", config))


def test_unknown_special_token_names_raise():
    with pytest.raises(ValueError, match=r"unknown \['eos'\]"):
        Tokenizer(backend([]), {"eos": "a"})
