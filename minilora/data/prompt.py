"""Prompts for generation and evaluation, encoded as training encodes the text before an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from minilora.data.chat.messages import Message, read_messages, read_tools
from minilora.data.chat.rendering import Rendering, check_shown
from minilora.data.formats import Chat, RawText, as_messages
from minilora.data.read_rows import Row
from minilora.data.tokenizer import AnyTokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]


def encode_prompt(prompt: Prompt, tokenizer: AnyTokenizer, *, place: str = "prompt") -> list[int]:
    """Return the token ids of a prompt, up to the beginning of the answer.

    A prompt may be a row with `messages` and `tools` (JSON schemas), as a row of training.
    Messages are read as those of a row (chat/messages.py) and go through the chat template, with
    the generation prompt. A str is one user message if
    the tokenizer has a chat template, else plain text. RawText is always plain text: with the
    tokens that the tokenizer puts in front, without EOS.

    Args:
        prompt: messages, a text, or {"messages": …, "tools": …}.
        tokenizer: the model's tokenizer.
        place: name of the prompt, for errors.

    Raises:
        ValueError: a message is wrong, the template refuses the messages or leaves a part of them
            out, or the prompt has no tokens.
    """
    is_raw = isinstance(prompt, RawText) or not tokenizer.chat_template
    if isinstance(prompt, str) and is_raw:
        ids = opening_ids(tokenizer) + tokenizer.encode(str(prompt), add_special_tokens=False)
    else:
        messages, tools = _messages_and_tools(prompt, place)
        messages = read_messages(messages, place)
        rendering = Rendering(tokenizer, messages, tools, place=place, add_generation_prompt=True)
        check_shown(rendering.left_out())
        ids = tokenizer.encode(rendering.text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if not ids:
        raise ValueError(
            f"{place}: it has no tokens, and the model needs at least one to continue from."
        )
    return ids


def _messages_and_tools(prompt: Any, place: str) -> tuple[Any, list[dict[str, Any]] | None]:
    """Return the messages of a prompt, and the schemas of its tools."""
    if isinstance(prompt, str):
        return [_user_message(prompt)], None
    if not isinstance(prompt, Mapping):
        return prompt, None
    unknown = sorted(set(prompt) - {"messages", "tools"})
    if unknown or "messages" not in prompt:
        raise ValueError(
            f"{place}: expected a dict of messages and tools, got the keys {sorted(prompt)}."
        )
    return prompt["messages"], read_tools(prompt.get("tools"), place)


def _user_message(text: str) -> Message:
    return {"role": "user", "content": text}


def split_prompt(row: Row, index: int = 0) -> tuple[list[Message] | RawText, str]:
    """Split a row into the part before its last answer, and that answer.

    Args:
        row: the row.
        index: its number, for errors.

    Returns:
        The prompt, as messages or (for prompt/completion texts) RawText, and the answer.

    Raises:
        ValueError: the row has no answer, the answer is a tool call, or the row has tools.
    """
    sample = as_messages(row, index)
    if not isinstance(sample, Chat):
        if not sample.prompt:
            raise ValueError(f"row {index}: a plain text has no prompt and answer to compare.")
        return RawText(sample.prompt), sample.completion
    turns = sample.trained_turns()
    if not turns:
        raise ValueError(f"row {index}: no assistant turn to compare with.")
    answer = sample.messages[turns[-1]].get("content")
    if not isinstance(answer, str) or sample.tools is not None:
        raise ValueError(f"row {index}: tools and tool calls cannot be evaluated as text.")
    return sample.messages[: turns[-1]], answer


def end_of_turn(tokenizer: AnyTokenizer) -> int | None:
    """Return the token with which the chat template ends an answer.

    Args:
        tokenizer: the model's tokenizer.

    Returns:
        The token, or None without a template or without such a token.
    """
    if not tokenizer.chat_template:
        return None
    turns = [_user_message("a"), {"role": "assistant", "content": "a"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    last = ids[turn_end(tokenizer, ids, 0, len(ids)) - 1]
    return last if is_special(tokenizer, last) else None


def turn_end(tokenizer: AnyTokenizer, ids: list[int], start: int, end: int) -> int:
    """Return the end of a turn, without the whitespace that a template puts after its end token.

    Args:
        tokenizer: the model's tokenizer.
        ids: token ids of a conversation.
        start: first token of the turn.
        end: first token after the turn and its whitespace.
    """
    last = end
    while last > start and _is_whitespace(tokenizer, ids[last - 1]):
        last -= 1
    if last > start and is_special(tokenizer, ids[last - 1]):
        return last
    return end


def _is_whitespace(tokenizer: AnyTokenizer, token: int) -> bool:
    return tokenizer.decode([token], skip_special_tokens=False).isspace()


def is_special(tokenizer: AnyTokenizer, token: int) -> bool:
    """Return True for a token that decoding skips.

    Args:
        tokenizer: the model's tokenizer.
        token: the token.
    """
    skipped = tokenizer.decode([token], skip_special_tokens=True)
    shown = tokenizer.decode([token], skip_special_tokens=False)
    return shown != "" and skipped == ""


def opening_ids(tokenizer: AnyTokenizer) -> list[int]:
    """Return the tokens that the tokenizer puts in front of a plain text: [BOS] or nothing.

    Args:
        tokenizer: the model's tokenizer.
    """
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    start = 0
    while full[start : start + len(plain)] != plain:
        start += 1
    return full[:start]
