"""Prompts for generation and evaluation, encoded as training encoded what came before an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from minilora.data.formats import Chat, Message, RawText, Row, as_messages
from minilora.data.tokenizer import AnyTokenizer

Prompt = str | Sequence[Mapping[str, Any]]


def encode_prompt(prompt: Prompt, tokenizer: AnyTokenizer) -> list[int]:
    """Token ids of a prompt, up to where the answer begins.

    Messages go through the chat template, with the generation prompt. A str is one user message if the tokenizer has
    a chat template, else plain text. RawText is plain text always: with what the tokenizer puts in front, no EOS.
    """
    if isinstance(prompt, str) and (isinstance(prompt, RawText) or not tokenizer.chat_template):
        ids = opening_ids(tokenizer) + tokenizer.encode(str(prompt), add_special_tokens=False)
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    ids = ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
    if not ids:
        raise ValueError("prompt: it has no tokens, and the model needs at least one to continue from.")
    return ids


def split_prompt(row: Row, index: int = 0) -> tuple[list[Message] | RawText, str]:
    """(what comes before a row's last answer, that answer), to be generated and compared.

    The prompt is a list of messages, or RawText for prompt/completion texts: `encode_prompt` takes both.
    ValueError: a row without an answer (`text`), an answer that is a tool call, `tools` (part of training only).
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
    """The token with which the chat template ends an answer; None without a template, or without such a token."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)
    last = ids[turn_end(tokenizer, ids, 0, len(ids)) - 1]
    return last if is_special(tokenizer, last) else None


def turn_end(tokenizer: AnyTokenizer, ids: list[int], start: int, end: int) -> int:
    """Where the turn in ids[start:end] ends, without the whitespace that a template puts behind its end token."""
    last = end
    while last > start and tokenizer.decode(ids[last - 1 : last], skip_special_tokens=False).isspace():
        last -= 1
    return last if last > start and is_special(tokenizer, ids[last - 1]) else end


def is_special(tokenizer: AnyTokenizer, token: int) -> bool:
    """Whether a token is one that decoding skips."""
    skipped, shown = (tokenizer.decode([token], skip_special_tokens=skip) for skip in (True, False))
    return shown != "" and skipped == ""


def opening_ids(tokenizer: AnyTokenizer) -> list[int]:
    """The ids that the tokenizer puts in front of a plain text: [BOS] or nothing."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[:start]
