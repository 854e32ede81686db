"""Tests that the template shows what it must: a part that it leaves out is an error with its place.

Published templates drop messages without an error. A name or content that also occurs elsewhere
must not hide that. A conversation that a template shows whole is never refused.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.chats import CHATML, chat, ours, real
from minilora.data import Tokenizer, encode_prompt, encode_row
from minilora.data.chat.rendering import Rendering

ASK = {"role": "user", "content": "Call weather for the city Paris, please."}
ANSWER = {"role": "assistant", "content": "It is sunny."}
CALL = {
    "role": "assistant",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    ],
}
RESULT = {"role": "tool", "name": "weather", "content": 'sunny,\n"warm"'}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Paris",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
THOUGHT = {"role": "assistant", "content": "<think>\nIt is June.\n</think>\n\nIt is sunny."}
BRIEF = "Call weather"  # occurs in the question too

LEFT_OUT = {
    "developer": ([{"role": "developer", "content": BRIEF}, ASK, ANSWER], 0, BRIEF, "content"),
    "function": ([ASK, CALL, RESULT | {"role": "function"}, ANSWER], 2, "sunny", "content"),
    "ipython": ([ASK, CALL, RESULT | {"role": "ipython"}, ANSWER], 2, "sunny", "content"),
    "content next to a call": ([ASK, CALL | {"content": "weather"}], 1, "weather", "content"),
    "call": ([ASK, CALL | {"content": "weather"}], 1, "weather", "tool calls"),
    "reasoning": ([ASK, ANSWER | {"reasoning_content": "sunny"}], 1, "sunny", "reasoning"),
}


@pytest.mark.parametrize(
    "template, case",
    [
        ("qwen2_5", "developer"),
        ("qwen3", "developer"),
        ("phi3", "developer"),
        ("glm4moe", "developer"),
        ("qwen2_5", "function"),
        ("qwen2_5", "ipython"),
        ("qwen3", "ipython"),
        ("gptoss", "function"),
        ("llama3_1", "content next to a call"),
        ("llama3_2", "content next to a call"),
        ("llama3", "call"),
        ("gemma3", "call"),
        ("phi3", "call"),
        ("llama3_1", "reasoning"),
    ],
)
def test_a_part_that_a_published_template_drops_raises(template, case):
    messages, turn, part, kind = LEFT_OUT[case]
    family = "llama3" if template.startswith("llama") else "chatml"
    with pytest.raises(
        ValueError, match=f"row 4, turn {turn}: the chat template leaves out '{part}.*of its {kind}"
    ):
        encode_row({"messages": messages}, real(template, family), index=4)


@pytest.mark.parametrize("template", ["llama3", "gemma3", "phi3", "cohere2"])
def test_tools_that_a_template_drops_raise_though_the_text_has_their_words(template):
    with pytest.raises(
        ValueError, match="row 0: the chat template leaves out 'weather', of its tools"
    ):
        encode_row({"messages": [ASK, ANSWER], "tools": [TOOL]}, real(template, "llama3"))


def changed(old: str, new: str) -> Tokenizer:
    assert old in CHATML
    return Tokenizer(ours("chatml").backend, {"eos_token": "<|im_end|>"}, CHATML.replace(old, new))


@pytest.mark.parametrize(
    "tokenizer, part",
    [
        (changed("message['content']", "message['content'][:20]"), "please"),
        (changed("message['content']", "message['content'][5:]"), "Call"),
        (changed("message['content']", "message['content'][:-1]"), "please"),
        (changed("message['content']", "message['content'].split(',')[0]"), "please"),
        (changed("message['content'] +", "(message['content'] if loop.last else '') +"), "weather"),
        (changed("message['content'] +", "messages[-1]['content'] +"), "weather"),
    ],
)
def test_a_template_that_cuts_or_swaps_a_content_raises(tokenizer, part):
    assert part in ASK["content"]
    with pytest.raises(ValueError, match="row 0, turn 0: .*leaves out 'Call weather.*content"):
        encode_row({"messages": [ASK, ANSWER]}, tokenizer)


def test_a_template_that_changes_an_answer_raises():
    """A user's content may be changed: some templates take the flag /no_think out of it."""
    tokenizer = changed("message['content']", "message['content'] | replace(' no ', '')")
    flagged = {"role": "user", "content": "Be brief no please"}
    assert encode_row({"messages": [flagged, ANSWER]}, tokenizer)
    with pytest.raises(ValueError, match="row 0, turn 1: .*leaves out 'Be brief no please'"):
        encode_row({"messages": [ASK, flagged | {"role": "assistant"}]}, tokenizer)


def test_a_template_with_names_but_without_parameters_raises():
    names = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + CHATML
    tokenizer = Tokenizer(ours("chatml").backend, {"eos_token": "<|im_end|>"}, names)
    with pytest.raises(
        ValueError, match="row 0: the chat template leaves out 'Paris', of its tools"
    ):
        encode_row({"messages": [ASK, ANSWER], "tools": [TOOL]}, tokenizer)


# ---- what is shown is accepted


@pytest.mark.parametrize(
    "template",
    [
        "qwen2_5",
        "qwen3",
        "qwen3_6",
        "llama3_1",
        "llama3_2",
        "gemma4_v5",
        "glm4moe",
        "gptoss",
        "lfm2_2_5",
        "nemotron_3_nano",
    ],
)
def test_a_conversation_that_is_shown_whole_is_accepted(template):
    system = {"role": "system", "content": "Be brief. /no_think"}
    messages = [system, ASK, CALL, RESULT, ANSWER]
    rendering = Rendering(real(template), messages, [TOOL], place="row 0")
    assert rendering.left_out([2, 4]) == []


@pytest.mark.parametrize(
    "content", ["x", "<tool_response>a</tool_response>", "<b>", "a < b", " \n "]
)
def test_contents_that_look_like_tags_are_accepted(content):
    """Qwen3 looks for <tool_response> at the beginning and end of a user's message."""
    messages = [ASK, {"role": "user", "content": content}, THOUGHT]
    assert encode_row({"messages": messages}, real("qwen3"))


words = st.text("helo <>/|{}\"'\\.,é中\n", max_size=12)


@given(words, words, st.dictionaries(words, words | st.integers() | st.none(), max_size=2))
def test_no_conversation_is_refused_that_a_template_shows_whole(question, answer, arguments):
    messages = [*chat(question, answer), ASK, CALL]
    messages[3] = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}],
    }
    rendering = Rendering(real("qwen2_5"), messages, place="row 0")
    assert rendering.left_out([1, 3]) == []


def test_earlier_thoughts_may_be_dropped_as_in_generation():
    earlier = THOUGHT | {"weight": 0}
    assert encode_row({"messages": [ASK, earlier, ASK, ANSWER]}, real("qwen3"))
    assert encode_prompt([ASK, THOUGHT, ASK], real("qwen3"))
