"""Tests of `parse_tool_calls`.

Oracle: published chat templates write a call, and the text of the answer gives the same call.
Property: content before a call stays, and a stream shows no part of a call. Errors: a text that is
almost a call stays content.
"""

import pytest

import minilora as ml
from helpers.chats import real
from minilora.data.chat.messages import read_messages
from minilora.data.chat.rendering import Rendering
from minilora.data.chat.tool_calls import tool_form
from minilora.data.tokenizer import Tokenizer

TEMPLATES = (
    "qwen2_5",
    "qwen3",
    "qwen3_5_nothink",
    "qwen3_8",
    "glm4moe",
    "llama3_1",
    "llama3_2",
    "deepseekv3",
    "nemotron_3_nano",
)
MISTRAL = (
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]["
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% if not loop.last %}, {% endif %}"
    "{% endfor %}]{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
)
NEWER_MISTRAL = (
    "{% for m in messages %}{% for c in m.tool_calls or () %}[TOOL_CALLS]{{ c.function.name }}"
    "[ARGS]{{ c.function.arguments | tojson }}{% else %}[INST]{{ m.content }}[/INST]"
    "{% endfor %}{% endfor %}"
)
ARGUMENTS = {"city": 'Zürich "West"', "days": 3, "exact": True, "code": "12"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": "boolean"},
                "code": {"type": "string"},
            },
        },
    },
}


def _tokenizer(name):
    if name in TEMPLATES:
        return real(name)
    base = real("qwen3")
    template = MISTRAL if name == "mistral" else NEWER_MISTRAL
    return Tokenizer(base.backend, base.special_tokens, template)


def _call(arguments=ARGUMENTS):
    return {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def _answer(tokenizer, calls):
    """Return the text that the template writes for an assistant that calls tools."""
    question = {"role": "user", "content": "Weather?"}
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    messages = read_messages([question, turn], "row 0")
    rendering = Rendering(tokenizer, messages, [TOOL], place="row 0")
    text = rendering.text[len(rendering.before(1)) :]
    for end in ("<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<|user|>"):
        text = text.partition(end)[0]
    return text


@pytest.mark.parametrize("name", [*TEMPLATES, "mistral", "newer mistral"])
def test_the_call_that_a_template_writes_is_read_back(name):
    tokenizer = _tokenizer(name)
    text = _answer(tokenizer, [_call()])
    message = ml.parse_tool_calls(text, tokenizer, [TOOL])
    assert message["tool_calls"] == [_call()], text
    assert "get_weather" not in message["content"]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_5_nothink", "glm4moe", "mistral"])
def test_several_calls_and_the_content_before_them_are_read(name):
    tokenizer = _tokenizer(name)
    calls = [_call(), _call({"city": "Bern", "days": 1})]
    text = "Let me look.\n" + _answer(tokenizer, calls)
    message = ml.parse_tool_calls(text, tokenizer, [TOOL])
    assert message["tool_calls"] == calls
    assert message["content"].startswith("Let me look.") and "city" not in message["content"]


@pytest.mark.parametrize("name", [*TEMPLATES, "mistral"])
def test_a_stream_shows_no_part_of_a_call(name):
    tokenizer = _tokenizer(name)
    form = tool_form(tokenizer)
    text = _answer(tokenizer, [_call()])
    shown = max(form.visible(text[:size]) for size in range(len(text) + 1))
    start = text.find(form.begin or "{")
    assert shown == start
    assert form.visible("Hello < world") == len("Hello < world")


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n{'name': 1}\n</tool_call>",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '{"name": "f", "arguments": {}}',
        "no call",
        "",
    ],
)
def test_a_text_that_is_almost_a_call_stays_content(text):
    message = ml.parse_tool_calls(text, real("qwen2_5"))
    assert message == {"role": "assistant", "content": text}


def test_a_template_without_tools_has_no_form():
    assert tool_form(real("gemma")) is None
    text = '<tool_call>{"name": "f"}</tool_call>'
    assert ml.parse_tool_calls(text, real("gemma"))["content"] == text


def test_a_prompt_with_tools_is_rendered_with_them():
    from minilora.data import encode_prompt

    messages = [{"role": "user", "content": "Weather?"}]
    tokenizer = real("qwen2_5")
    ids = encode_prompt({"messages": messages, "tools": [TOOL]}, tokenizer)
    expected = tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True)
    assert ids == expected
    with pytest.raises(ValueError, match="leaves out 'get_weather'"):
        encode_prompt({"messages": messages, "tools": [TOOL]}, real("gemma"))
    with pytest.raises(ValueError, match="expected a dict of messages and tools"):
        encode_prompt({"messages": messages, "tool": [TOOL]}, tokenizer)
