"""What became of a dataset on its way to tokens: what is printed before training starts."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minilora.data.prompt import is_special
from minilora.data.template import hash_template, template_errors


@dataclass(frozen=True)
class DataReport:
    """What became of a dataset; the tuples hold row numbers. `print` it before training."""

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    max_length: int | None
    truncated: tuple[int, ...]
    untrained: tuple[int, ...]  # left out: no trained token, or none within max_length
    eos_missing: tuple[int, ...]
    double_bos: tuple[int, ...]
    dropped_turns: tuple[int, ...]
    skipped_turns: tuple[int, ...]
    empty: tuple[int, ...]
    repeated: tuple[int, ...]  # equal, token for token, to an earlier row
    unused_keys: tuple[str, ...]
    histogram: tuple[int, ...] = ()  # [k]: rows of more than 2^(k-1) tokens and at most 2^k
    endings: dict[str, int] = field(default_factory=dict)  # last trained token of the rows not cut, special ones only
    remarks: tuple[str, ...] = ()  # about the tokenizer and its template
    sources: dict[str, tuple[int, int]] = field(default_factory=dict)  # of a mixture: (rows, tokens) of each set

    def __str__(self) -> str:
        share = self.trained_tokens / max(self.tokens, 1)
        lines = [
            f"{self.rows - len(self.untrained)} rows, {self.tokens} tokens, {self.trained_tokens} of them trained "
            f"({share:.0%}), longest {self.longest}"
        ]
        notes = [
            (self.truncated, f"cut at max_length {self.max_length}: their end is not learned"),
            (self.untrained, "left out: no trained token in them"),
            (self.eos_missing, "do not train the EOS token: the model may not learn to stop (see tokenizer.eos_token)"),
            (self.double_bos, "began with two BOS tokens: one removed"),
            (self.dropped_turns, "end in turns after the last trained answer: those turns dropped"),
            (self.skipped_turns, "have answers that are not trained: of weight 0, or in the prompt"),
            (self.empty, "have an empty answer: they teach to say nothing"),
            (self.repeated, "equal an earlier row"),
        ]
        lines += [f"  {len(rows)} rows {what} ({numbers(rows)})" for rows, what in notes if rows]
        lines += [f"  tokens a row: {', '.join(f'{n} up to {2**k}' for k, n in enumerate(self.histogram) if n)}"]
        lines += [f"  answers end in: {', '.join(f'{token} {n}' for token, n in self.endings.items())}"]
        lines += [f"  {remark}" for remark in self.remarks]
        lines += [f"  {rows} rows, {tokens} tokens from {name}" for name, (rows, tokens) in self.sources.items()]
        if self.unused_keys:
            lines.append(f"  keys not used: {', '.join(self.unused_keys)}")
        return "\n".join(lines)


def remarks(tokenizer: Any, chats: bool) -> Iterator[str]:
    """What to know about a tokenizer and, where conversations are rendered, about its template."""
    if (eos := tokenizer.eos_token_id) is not None and eos == tokenizer.pad_token_id:
        yield "the padding token is EOS: no harm here, padding is told by its place and EOS is learned all the same"
    if not chats:
        return
    yield f"chat template {hash_template(tokenizer.chat_template)}"
    if "strftime_now" in json.dumps(tokenizer.chat_template):
        yield "the chat template writes today's date (strftime_now): prompts change with the day; write one into it"
    user, answer = ({"role": role, "content": "17"} for role in ("user", "assistant"))
    try:
        plain, asked, whole = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            for messages, prompt in (([user], False), ([user], True), ([user, answer], False))
        )
    except template_errors():  # a template that needs a system message, say
        return
    header = whole[len(plain) :].partition("17")[0]
    first = tokenizer.encode(header, add_special_tokens=False)[:1]
    if plain == asked and first and is_special(tokenizer, first[0]):
        yield (
            f"the chat template has no generation prompt: each answer is learned with its header, {header!r}; "
            "let the template write that where add_generation_prompt is set"
        )


def numbers(rows: Sequence[int], most: int = 8) -> str:
    """Row numbers for a message, the first few of many."""
    return "rows " + ", ".join(map(str, rows[:most])) + (", …" if len(rows) > most else "")
