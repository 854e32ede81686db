r"""Loss mask: conversations → token ids and labels that supervise the assistant's answers only.

    rendered     <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    supervised                                                         Hello<|im_end|>

The borders of an assistant turn are found for any template by rendering prefixes of the
conversation: the turn begins after render(messages before it, with generation prompt), and ends
with render(messages up to it). That is right only if both are prefixes of the whole conversation,
as text and as tokens. So both are checked, and a template that rewrites earlier turns, or two
tokens that merge over a border, are an error that names the turn.

Labels are not shifted: each stands at its own token. The turn's end token is supervised, whitespace
after it is not. The first token has no label, because nothing predicts it. The template writes BOS;
plain texts get the tokens that tokenizer.json puts in front, and EOS at the end.
"""

import os
from dataclasses import dataclass
from typing import Any

from minilora.data.chat_template import template_errors
from minilora.data.formats import Chat, Message, Text, as_messages
from minilora.data.prompt import opening_ids, turn_end
from minilora.data.read_rows import Row
from minilora.data.tokenizer import AnyTokenizer
from minilora_kernels.ops.cross_entropy import IGNORE

Span = tuple[int, int]  # [start, end) of supervised tokens


@dataclass(frozen=True)
class Example:
    """A row as tokens.

    Attributes:
        input_ids: token ids, (T,).
        labels: token ids, or -100 where the token is not supervised, (T,).
        row: number of the row.
        truncated: True if supervised tokens were cut off.
        double_bos: True if a second BOS was removed.
        dropped_turns: messages after the last supervised turn; they are left out.
        documents: of a packed row: row number and tokens of each document (packing.py).
    """

    input_ids: list[int]
    labels: list[int]
    row: int = 0
    truncated: bool = False
    double_bos: bool = False
    dropped_turns: int = 0
    documents: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens with a label."""
        return len(self.labels) - self.labels.count(IGNORE)


def encode_row(
    row: Row, tokenizer: AnyTokenizer, max_length: int | None = None, *, index: int = 0
) -> Example:
    """Return the token ids and labels of a row.

    Args:
        row: the row.
        tokenizer: the model's tokenizer.
        max_length: longest example in tokens; None does not cut.
        index: number of the row, for errors.

    Raises:
        ValueError: the row has no known shape or no answer, or the template does not fit it.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: expected a positive number of tokens, got {max_length}.")
    sample = as_messages(row, index)
    dropped_turns = 0
    if isinstance(sample, Chat):
        ids, spans, dropped_turns = _encode_chat(sample, tokenizer, index)
    else:
        ids, spans = _encode_text(sample, tokenizer, index)
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    bos = tokenizer.bos_token_id
    double_bos = bos is not None and ids[:2] == [bos, bos]
    if double_bos:
        ids = ids[1:]
        labels = labels[1:]
    if labels:
        labels[0] = IGNORE
    kept = len(ids[:max_length])
    cut_off = labels[kept:]
    return Example(
        input_ids=ids[:kept],
        labels=labels[:kept],
        row=index,
        truncated=any(label != IGNORE for label in cut_off),
        double_bos=double_bos,
        dropped_turns=dropped_turns,
    )


def _encode_chat(
    chat: Chat, tokenizer: AnyTokenizer, index: int
) -> tuple[list[int], list[Span], int]:
    """Return token ids, supervised spans, and the number of messages after the last of them."""
    turns = chat.trained_turns()
    if not turns:
        roles = [(message["role"], message.get("weight", 1)) for message in chat.messages]
        raise ValueError(
            f"row {index}: no assistant turn to train on outside the prompt: "
            f"(role, weight) {roles}."
        )
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
            up_to = _render(tokenizer, chat, messages[: turn + 1], index)
            end = _prefix(
                tokenizer, up_to, text, ids, f"{where}: the conversation up to this answer"
            )
        spans.append((start, turn_end(tokenizer, ids, start, end)))
        _check_rendered(messages[turn], text[len(before) :], where)
    _check_rendered({"tools": chat.tools}, text, f"row {index}")
    return ids, spans, len(chat.messages) - len(messages)


def _check_rendered(source: Message, rendered: str, where: str) -> None:
    """Raise ValueError if the text lacks the reasoning, a tool call or a tool of its source."""
    for part in _required_parts(source):
        if part.strip() not in rendered:
            raise ValueError(
                f"{where}: the chat template leaves out {part.strip()[:40]!r}, of its reasoning, "
                "tool calls or tools. Set a tokenizer.chat_template that writes it, write it into "
                "the messages, or take it out of the rows."
            )


def _required_parts(source: Message) -> list[str]:
    """Return the reasoning and the names of tools and tool calls in a message."""
    content = source.get("content") or ""
    thought, _, _ = content.rpartition("</think>")
    parts = [source.get("reasoning_content") or "", thought.strip().removeprefix("<think>")]
    for key in ("tool_calls", "tools"):
        for entry in source.get(key) or ():
            if isinstance(entry, dict):
                parts.append(str(entry.get("function", entry).get("name", "")))
    return parts


def _render(
    tokenizer: AnyTokenizer, chat: Chat, messages: list[Message], index: int, **options: Any
) -> str:
    if chat.tools is not None:
        options["tools"] = chat.tools
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except template_errors() as error:
        raise ValueError(f"row {index}, first {len(messages)} messages: {error}") from error


def _prefix(tokenizer: AnyTokenizer, part: str, text: str, ids: list[int], name: str) -> int:
    """Return how many of `ids`, the tokens of `text`, are the tokens of `part`.

    Raises ValueError unless the text begins with the part, and its tokens with the part's.
    """
    if not text.startswith(part):
        at = len(os.path.commonprefix([part, text]))
        near = slice(max(at - 20, 0), at + 40)
        raise ValueError(
            f"{name} is not a prefix of the whole conversation: {part[near]!r} against {text[near]!r} "
            f"(character {at}). The chat template rewrites earlier turns, or its generation prompt "
            "differs from the beginning of an answer. Give each answer a row of its own, or mark "
            'earlier answers with "weight": 0 so that only the last is trained.'
        )
    tokens = tokenizer.encode(part, add_special_tokens=False)
    if ids[: len(tokens)] != tokens:
        at = _first_difference(tokens, ids)
        raise ValueError(
            f"{name} ends inside a token of the whole: {tokenizer.decode(tokens[at:])!r} becomes "
            f"{tokenizer.decode(ids[at : at + 1])!r} (token {at}). Strip the whitespace around "
            "prompt and answer; a space between two plain texts belongs to the completion."
        )
    return len(tokens)


def _first_difference(tokens: list[int], ids: list[int]) -> int:
    for place, (token, other) in enumerate(zip(tokens, ids, strict=False)):
        if token != other:
            return place
    return len(ids)


def _encode_text(sample: Text, tokenizer: AnyTokenizer, index: int) -> tuple[list[int], list[Span]]:
    """Return token ids and the supervised span of plain text.

    The tokens that the tokenizer puts in front of a text come first; EOS comes last, unless the
    text ends with it.
    """
    text = sample.prompt + sample.completion
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = 0
    if sample.prompt:
        start = _prefix(tokenizer, sample.prompt, text, ids, f"row {index}: the prompt")
    eos = tokenizer.eos_token_id
    last = turn_end(tokenizer, ids, start, len(ids)) - 1
    if eos is not None and ids[last:][:1] != [eos]:
        ids = [*ids, eos]
    opening = opening_ids(tokenizer)
    return opening + ids, [(len(opening) + start, len(opening) + len(ids))]
