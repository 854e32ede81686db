r"""Conversations → token ids and labels: only what the assistant says is learned.

    rendered   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    trained                                                           Hello<|im_end|>

Where an assistant turn begins and ends is found for any template by rendering prefixes of the conversation: it begins
after render(messages before it, with generation prompt), and ends with render(messages up to it). That is right only
if both are prefixes of the whole, as text and as tokens; so both are checked, and a template that rewrites earlier
turns, or a border that two tokens merge over, is an error that names the turn.

Labels stand at their own token, not shifted. The turn's end token is trained, whitespace behind it is not. The first
token has no label, as nothing predicts it. BOS is the template's affair; plain texts get what tokenizer.json puts
in front, and EOS behind.
"""

import os
from dataclasses import dataclass
from typing import Any

from minilora.data.chat_template import template_errors
from minilora.data.formats import Chat, Message, Row, Text, as_messages
from minilora.data.prompt import opening_ids, turn_end
from minilora.data.tokenizer import AnyTokenizer
from minilora_kernels.ops.cross_entropy import IGNORE


@dataclass(frozen=True)
class Example:
    """A row as token ids and labels (-100 where nothing is learned), both (T,), and what happened to it."""

    input_ids: list[int]
    labels: list[int]
    row: int = 0
    truncated: bool = False
    double_bos: bool = False  # a second BOS was removed
    dropped_turns: int = 0  # messages after the last assistant turn, which nothing would train
    documents: tuple[tuple[int, int], ...] = ()  # of a packed row: row and tokens of each (packing.py)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """How many tokens have a label."""
        return sum(label != IGNORE for label in self.labels)


def encode_row(row: Row, tokenizer: AnyTokenizer, max_length: int | None = None, *, index: int = 0) -> Example:
    """Token ids and labels of one row; `index` is its number, for errors."""
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: expected a positive number of tokens, got {max_length}.")
    sample, dropped = as_messages(row, index), 0
    if isinstance(sample, Chat):
        ids, spans, dropped = _encode_chat(sample, tokenizer, index)
    else:
        ids, spans = _encode_text(sample, tokenizer, index)
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    bos = tokenizer.bos_token_id
    double_bos = bos is not None and ids[:2] == [bos, bos]
    ids, labels = ids[double_bos:], labels[double_bos:]
    labels[:1] = [IGNORE] * len(labels[:1])
    return Example(
        input_ids=ids[:max_length],
        labels=labels[:max_length],
        row=index,
        truncated=any(label != IGNORE for label in labels[len(ids[:max_length]) :]),
        double_bos=double_bos,
        dropped_turns=dropped,
    )


def _encode_chat(chat: Chat, tokenizer: AnyTokenizer, index: int) -> tuple[list[int], list[tuple[int, int]], int]:
    """Token ids, the [start, end) that are trained, and how many messages after the last trained turn were dropped."""
    turns = chat.trained_turns()
    if not turns:
        found = [(message["role"], message.get("weight", 1)) for message in chat.messages]
        raise ValueError(f"row {index}: no assistant turn to train on outside the prompt: (role, weight) {found}.")
    messages = chat.messages[: turns[-1] + 1]
    text = _render(tokenizer, chat, messages, index)
    ids = tokenizer.encode(text, add_special_tokens=False)
    spans = []
    for turn in turns:
        where = f"row {index}, turn {turn}"
        before = _render(tokenizer, chat, messages[:turn], index, add_generation_prompt=True)
        start = _prefix(tokenizer, before, text, ids, f"{where}: the prompt before this answer")
        end = len(ids)
        if turn < turns[-1]:
            upto = _render(tokenizer, chat, messages[: turn + 1], index)
            end = _prefix(tokenizer, upto, text, ids, f"{where}: the conversation up to this answer")
        spans.append((start, turn_end(tokenizer, ids, start, end)))
        _check_kept(messages[turn], text[len(before) :], where)
    _check_kept({"tools": chat.tools}, text, f"row {index}")
    return ids, spans, len(chat.messages) - len(messages)


def _check_kept(source: Message, rendered: str, where: str) -> None:
    """ValueError if the rendered text lacks the reasoning, a tool call or a tool of what it was rendered from."""
    content = source.get("content") or ""
    parts = [source.get("reasoning_content") or "", content.rpartition("</think>")[0].strip().removeprefix("<think>")]
    entries = [entry for key in ("tool_calls", "tools") for entry in source.get(key) or () if isinstance(entry, dict)]
    parts += [str(entry.get("function", entry).get("name", "")) for entry in entries]
    if lost := [part.strip() for part in parts if part.strip() not in rendered]:
        raise ValueError(
            f"{where}: the chat template leaves out {lost[0][:40]!r}, of its reasoning, tool calls or tools. Set a "
            "tokenizer.chat_template that writes it, write it into the messages, or take it out of the rows."
        )


def _render(tokenizer: AnyTokenizer, chat: Chat, messages: list[Message], index: int, **options: Any) -> str:
    if chat.tools is not None:
        options["tools"] = chat.tools
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except template_errors() as error:
        raise ValueError(f"row {index}, first {len(messages)} messages: {error}") from error


def _prefix(tokenizer: AnyTokenizer, part: str, text: str, ids: list[int], what: str) -> int:
    """How many of `ids`, the tokens of `text`, are the tokens of `part`; ValueError unless they begin with them."""
    if not text.startswith(part):
        at = len(os.path.commonprefix([part, text]))
        near = slice(max(at - 20, 0), at + 40)
        raise ValueError(
            f"{what} is no prefix of the whole conversation: {part[near]!r} against {text[near]!r} (character {at}). "
            "The chat template rewrites earlier turns, or begins an answer otherwise than its generation prompt. Give "
            'each answer a row of its own, or mark earlier answers with "weight": 0 so that only the last is trained.'
        )
    tokens = tokenizer.encode(part, add_special_tokens=False)
    if ids[: len(tokens)] != tokens:
        at = next((i for i, (a, b) in enumerate(zip(tokens, ids, strict=False)) if a != b), len(ids))
        raise ValueError(
            f"{what} ends inside a token of the whole: {tokenizer.decode(tokens[at:])!r} becomes "
            f"{tokenizer.decode(ids[at : at + 1])!r} (token {at}). "
            "Strip the whitespace around prompt and answer; a space between two plain texts belongs to the completion."
        )
    return len(tokens)


def _encode_text(sample: Text, tokenizer: AnyTokenizer, index: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Plain text, with what the tokenizer puts in front of a text, and EOS behind it unless it is there already."""
    text = sample.prompt + sample.completion
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = _prefix(tokenizer, sample.prompt, text, ids, f"row {index}: the prompt") if sample.prompt else 0
    eos = tokenizer.eos_token_id
    if eos is not None and ids[turn_end(tokenizer, ids, start, len(ids)) - 1 :][:1] != [eos]:
        ids = [*ids, eos]
    opening = opening_ids(tokenizer)
    return opening + ids, [(len(opening) + start, len(opening) + len(ids))]
