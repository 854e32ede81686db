r"""Loss mask: conversations → token ids and labels that supervise the assistant's answers only.

    rendered     <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    supervised                                                         Hello<|im_end|>

The borders of an assistant turn are found for any template by rendering prefixes of the
conversation: the turn begins after render(messages before it, with generation prompt), and ends
with render(messages up to it). That is right only if both are prefixes of the whole conversation,
as text and as tokens. So both are checked, and a template that rewrites earlier turns, or two
tokens that merge over a border, are an error that names the turn. So is a part of a message that the
template leaves out (chat/marks.py).

Labels are not shifted: each stands at its own token. The turn's end token is supervised, whitespace
after it is not. The first token has no label, because nothing predicts it. The template writes BOS;
plain texts get the tokens that tokenizer.json puts in front, and EOS at the end.
"""

import os
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from minilora.data.chat.rendering import Rendering, check_shown
from minilora.data.chat_template import with_template_kwargs
from minilora.data.formats import Chat, Text, as_messages
from minilora.data.prompt import is_special, opening_ids, turn_end
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
        kwargs = sample.chat_template_kwargs
        templated = with_template_kwargs(tokenizer, kwargs, f"row {index}: ")
        ids, spans, dropped_turns = _encode_chat(sample, templated, index)
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
    place = f"row {index}"
    messages = chat.messages[: turns[-1] + 1]
    rendering = Rendering(tokenizer, messages, chat.tools, place=place)
    left_out = rendering.left_out(turns)
    check_shown([part for part in left_out if part.kind != "reasoning"])
    whole = _Whole(tokenizer, rendering.text)
    ids = whole.ids
    spans = []
    for turn in turns:
        where = f"{place}, turn {turn}"
        name = f"{where}: the prompt before this answer"
        start = whole.tokens_of(rendering.before(turn), name, only=len(turns) == 1)
        end = len(ids)
        if turn < turns[-1]:
            name = f"{where}: the conversation up to this answer"
            end = whole.tokens_of(rendering.up_to(turn + 1), name)
        spans.append((start, turn_end(tokenizer, ids, start, end)))
    check_shown(left_out)  # reasoning: a template that rewrites earlier answers raised above
    return ids, spans, len(chat.messages) - len(messages)


class _Anchor(NamedTuple):
    """A special token of a text: its first and last character, and its place among the tokens."""

    start: int
    end: int
    token: int


class _Whole:
    """A whole text with its tokens, in which the borders of its parts are found.

    Attributes:
        text: the text.
        ids: its token ids.
    """

    def __init__(self, tokenizer: AnyTokenizer, text: str) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.ids: list[int] = tokenizer.encode(text, add_special_tokens=False)

    def tokens_of(self, part: str, name: str, only: bool = False) -> int:
        """Return how many of the tokens are the tokens of a part at the beginning.

        Args:
            part: the part.
            name: its name in errors.
            only: no other part follows, so the special tokens are not worth a search.

        Raises:
            ValueError: the text does not begin with the part, or its tokens with the part's.
        """
        text = self.text
        if not text.startswith(part):
            at = len(os.path.commonprefix([part, text]))
            near = slice(max(at - 20, 0), at + 40)
            raise ValueError(
                f"{name} is not a prefix of the whole conversation: {part[near]!r} against "
                f"{text[near]!r} (character {at}). The chat template rewrites earlier turns, or its "
                "generation prompt differs from the beginning of an answer. Give each answer a row "
                'of its own, or mark earlier answers with "weight": 0 so that only the last is '
                "trained."
            )
        if not only:
            count = self._count_from_anchor(part)
            if count is not None:
                return count
        tokens = self.tokenizer.encode(part, add_special_tokens=False)
        if self.ids[: len(tokens)] != tokens:
            at = _first_difference(tokens, self.ids)
            becomes = self.tokenizer.decode(self.ids[at : at + 1])
            raise ValueError(
                f"{name} ends inside a token of the whole: {self.tokenizer.decode(tokens[at:])!r} "
                f"becomes {becomes!r} (token {at}). Strip the whitespace around prompt and answer; a "
                "space between two plain texts belongs to the completion."
            )
        return len(tokens)

    @cached_property
    def anchors(self) -> list[_Anchor]:
        """The special tokens of the text, in order; each is searched after the one before it."""

        @cache
        def content(token: int) -> str:
            """Return the text of a special token, or "" for another token."""
            if not is_special(self.tokenizer, token):
                return ""
            return self.tokenizer.decode([token], skip_special_tokens=False)

        anchors = []
        end = 0
        for place, token in enumerate(self.ids):
            if not content(token):
                continue
            start = self.text.find(content(token), end)
            if start < 0:  # an unknown character, for example, is a special token without a text
                break
            end = start + len(content(token))
            anchors.append(_Anchor(start, end, place))
        return anchors

    def _count_from_anchor(self, part: str) -> int | None:
        """Return the number of tokens of a part, or None if it is not certain.

        A tokenizer splits a text at its special tokens first. So the tokens up to the last special
        token of the part are known, and only the text from there is encoded again. This makes the
        cost of a conversation linear in its length: each part would be encoded whole otherwise.
        """
        number = bisect_right(self.anchors, len(part), key=_end_of) - 1
        if number < 0:
            return None
        anchor = self.anchors[number]
        tokens = self.tokenizer.encode(part[anchor.start :], add_special_tokens=False)
        end = anchor.token + len(tokens)
        if self.ids[anchor.token : end] != tokens:
            return None
        return end


def _end_of(anchor: _Anchor) -> int:
    return anchor.end


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
    whole = _Whole(tokenizer, sample.prompt + sample.completion)
    ids = whole.ids
    start = 0
    if sample.prompt:
        start = whole.tokens_of(sample.prompt, f"row {index}: the prompt", only=True)
    eos = tokenizer.eos_token_id
    last = turn_end(tokenizer, ids, start, len(ids)) - 1
    if eos is not None and ids[last:][:1] != [eos]:
        ids = [*ids, eos]
    opening = opening_ids(tokenizer)
    return opening + ids, [(len(opening) + start, len(opening) + len(ids))]
