"""Proves that variables of a chat template reach every place that renders a conversation.

They reach training, evaluation, generation, preview and the command line, and the adapter's file
keeps them. Oracle: transformers' `apply_chat_template` with the same variables.
"""

import copy
import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import minilora as ml
from helpers.chats import QWEN3, backend, chat, ours
from minilora.cli.main import main
from minilora.data import Tokenizer, encode_dataset, encode_prompt, encode_row
from minilora.data.chat_template import template_variables, with_template_kwargs
from minilora.lora.files.base_check import read_binding
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM

OFF = {"enable_thinking": False}
# <|eot_id|> makes the tokenizer group newlines, as Qwen's does: "\n\n" is one token before a word.
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>"]
QWEN = Tokenizer(backend(SPECIAL), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, QWEN3)
THEIRS = PreTrainedTokenizerFast(
    tokenizer_object=backend(SPECIAL), eos_token="<|im_end|>", pad_token="<|endoftext|>"
)
THEIRS.chat_template = QWEN3
ROW = {"messages": chat("hello?", "yes")}
ROWS = [ROW, {"messages": chat("as?", "no")}]
THOUGHT = "<think>\n\n</think>\n\n"


def model_of(tokenizer) -> CausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = CausalLM(
        DecoderConfig(len(tokenizer), num_attention_heads=2, num_key_value_heads=1, **sizes)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def trained(tokenizer, **fields) -> CausalLM:
    """Return a model that has learned ROWS by heart, through an adapter."""
    model = model_of(tokenizer)
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    config = ml.TrainConfig(learning_rate=2e-2, max_steps=100, save_steps=None, **fields)
    ml.train(model, tokenizer, ROWS, config)
    return model


@pytest.fixture(scope="module")
def by_heart():
    return trained(QWEN, chat_template_kwargs=OFF)


# ---- oracle


@pytest.mark.parametrize("tokenizer", [QWEN, THEIRS], ids=["ours", "theirs"])
@pytest.mark.parametrize("thinking", [True, False])
def test_rows_and_prompts_are_rendered_as_in_transformers(tokenizer, thinking):
    kwargs = {"enable_thinking": thinking}
    expected = THEIRS.apply_chat_template(
        ROW["messages"][:1], add_generation_prompt=True, return_dict=False, **kwargs
    )
    templated = with_template_kwargs(tokenizer, kwargs)
    assert encode_prompt(ROW["messages"][:1], templated) == expected
    whole = encode_row(ROW, templated)
    by_row = encode_row(ROW | {"chat_template_kwargs": kwargs}, tokenizer)
    assert whole == by_row and whole.input_ids[: len(expected)] == expected
    supervised = [label for label in whole.labels if label != -100]
    assert tokenizer.decode(supervised) == ("" if not thinking else THOUGHT) + "yes<|im_end|>"
    assert len(templated) == len(tokenizer) and copy.deepcopy(templated).eos_token_id is not None


def test_the_variables_of_a_template_are_those_that_it_reads():
    read = template_variables(str(QWEN.chat_template))
    assert read == {"messages", "tools", "add_generation_prompt", "enable_thinking"}


# ---- property


def test_train_generate_and_evaluate_share_the_variables(by_heart):
    tokenizer = QWEN
    questions = [row["messages"][:1] for row in ROWS]
    assert ml.generate(by_heart, tokenizer, questions, max_new_tokens=8) == ["yes", "no"]
    with_them = ml.evaluate(by_heart, tokenizer, ROWS)
    assert with_them.exact_match == 1 and with_them.references == ["yes", "no"]
    without = ml.evaluate(by_heart, tokenizer, ROWS, chat_template_kwargs={"enable_thinking": True})
    assert without.exact_match == 0 and without.loss > with_them.loss  # another prompt
    assert without.tokens > with_them.tokens  # the block of thoughts would be supervised


def test_an_adapter_file_keeps_the_variables(by_heart, tmp_path):
    tokenizer = QWEN
    ml.save_adapter(by_heart, tmp_path)
    assert (
        read_binding(tmp_path / "adapter_model.safetensors")["tokenizer"]["chat_template_kwargs"]
        == OFF
    )
    fresh = model_of(tokenizer)
    ml.load_adapter(fresh, tmp_path, tokenizer=tokenizer)
    assert ml.generate(fresh, tokenizer, ROW["messages"][:1], max_new_tokens=8) == "yes"
    answers = ml.generate(fresh, tokenizer, ["hello?"] * 2, adapters=["default", None])
    assert answers[0] == "yes"
    on = with_template_kwargs(tokenizer, {"enable_thinking": True})
    with pytest.raises(ValueError, match="trained with another chat_template_kwargs"):
        ml.load_adapter(model_of(tokenizer), tmp_path, tokenizer=on)


def test_preview_shows_the_row_as_it_is_trained(capsys, tmp_path):
    tokenizer = QWEN
    shown = ml.preview([ROW], tokenizer, chat_template_kwargs=OFF)
    assert (True, "yes<|im_end|>") in shown.documents[0].runs
    assert (True, THOUGHT + "yes<|im_end|>") in ml.preview([ROW], tokenizer).documents[0].runs
    tokenizer.save_pretrained(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROW))
    command = ["preview", str(rows), "--model", str(tmp_path), "--chat_template_kwargs"]
    assert main([*command, json.dumps(OFF)]) == 0
    assert "trained      'yes<|im_end|>'" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "enable_thinking=false"])
    assert "expected a JSON object, got 'enable_thinking=false'" in capsys.readouterr().err


def test_a_toml_file_sets_the_variables(tmp_path):
    from minilora.cli.main import _keywords, _parser

    file = tmp_path / "run.toml"
    text = 'model = "m"\ndataset = "d"\n[chat_template_kwargs]\nenable_thinking = false\n'
    file.write_text(text)
    options, _ = _keywords(_parser(), ["train", "--config", str(file)])
    assert (options["model"], options["dataset"]) == ("m", "d")
    assert options["chat_template_kwargs"] == {"enable_thinking": False}


def test_null_of_arrow_is_absent():
    row = ROW | {"chat_template_kwargs": {"enable_thinking": None}}
    assert encode_row(row, QWEN) == encode_row(ROW, QWEN)
    assert encode_row(row, ours("chatml")) == encode_row(ROW, ours("chatml"))


# ---- error


@pytest.mark.parametrize(
    ("family", "kwargs", "message"),
    [
        ("qwen3", {"enable_thinkin": False}, "'enable_thinkin' is not .* reads enable_thinking"),
        ("qwen3", {"messages": []}, "'messages' is not a variable that can be set"),
        ("chatml", OFF, "reads no further variable"),
        ("qwen3", ["enable_thinking"], "expected a dict"),
    ],
)
def test_a_variable_that_the_template_does_not_read_raises(family, kwargs, message):
    tokenizer = ours(family)
    with pytest.raises(ValueError, match=message):
        with_template_kwargs(tokenizer, kwargs)
    with pytest.raises(ValueError, match=f"row 0: chat_template_kwargs.*{message}"):
        encode_dataset([ROW | {"chat_template_kwargs": kwargs}], tokenizer)


def test_variables_without_a_template_raise():
    base = copy.copy(ours("chatml"))
    base.chat_template = None
    with pytest.raises(ValueError, match="has no chat template that could read them"):
        with_template_kwargs(base, OFF)
    with pytest.raises(ValueError, match="chat_template_kwargs need a chat"):
        encode_row({"prompt": "a", "completion": "b", "chat_template_kwargs": OFF}, QWEN)
