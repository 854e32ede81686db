"""What else a whole dataset shows before it is trained on, beside what the report of training says.

tokens a row     how many rows have up to 16, 32, 64, … tokens
answers end in   the last trained token of the rows that were not cut, where it is a special one
rows             that equal an earlier one, that have answers which are not trained
the tokenizer    padding that is EOS, and its chat template: a hash, dates, a missing generation prompt
"""

import json
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

from minilora.data import IGNORE, AnyTokenizer, Chat, Example, as_messages
from minilora.data.chat_template import template_errors
from minilora.data.dataset import Encoder
from minilora.data.formats import Row
from minilora.data.prompt import is_special
from minilora.data.report import numbers
from minilora.lora.files.base_check import hash_tokenizer


class Facts(Encoder):
    """An `Encoder` that sees more; `str` says what, once it was iterated over."""

    def __init__(self, dataset: object, tokenizer: AnyTokenizer, max_length: int | None):
        super().__init__(dataset, tokenizer, max_length)
        self.seen: set[int] = set()  # hashes of rows
        self.repeated: list[int] = []
        self.skipped: list[int] = []
        self.lengths, self.endings = Counter[int](), Counter[int]()  # by log2, rounded up; by the last trained token
        self.chats = False

    def note(self, row: Row, example: Example) -> None:
        """Count a row."""
        super().note(row, example)
        content = hash((*example.input_ids, *example.labels))
        if content in self.seen:
            self.repeated.append(example.row)
        self.seen.add(content)
        if isinstance(sample := as_messages(row, example.row), Chat):
            self.chats = True
            if len(sample.trained_turns()) < sum(message["role"] == "assistant" for message in sample.messages):
                self.skipped.append(example.row)
        if example.trained_tokens:
            self.lengths[(len(example) - 1).bit_length()] += 1
            if not example.truncated:
                self.endings[next(label for label in reversed(example.labels) if label != IGNORE)] += 1

    def __str__(self) -> str:
        notes = [(self.repeated, "equal an earlier row")]
        notes += [(self.skipped, "have answers that are not trained: of weight 0, or in the prompt")]
        lines = [f"{len(rows)} rows {what} ({numbers(rows)})" for rows, what in notes if rows]
        endings = Counter[str]()
        for token, count in self.endings.items():
            endings[self._ending(token)] += count
        counts = [f"{count} up to {2**k}" for k, count in sorted(self.lengths.items())]
        ends = [f"{ending} {count}" for ending, count in endings.most_common()]
        lines += [f"tokens a row: {', '.join(counts)}"] * bool(counts) + [f"answers end in: {', '.join(ends)}"] * bool(
            ends
        )
        return "\n".join(f"  {line}" for line in [*lines, *remarks(self.tokenizer, self.chats)])

    def _ending(self, token: int) -> str:
        if token == self.tokenizer.eos_token_id:
            return f"{self.tokenizer.decode([token])!r} (EOS)"
        return repr(self.tokenizer.decode([token])) if is_special(self.tokenizer, token) else "no end token"


def remarks(tokenizer: AnyTokenizer, chats: bool) -> Iterator[str]:
    """What to know about a tokenizer and, where conversations are rendered, about its template."""
    if (eos := tokenizer.eos_token_id) is not None and eos == tokenizer.pad_token_id:
        yield "the padding token is EOS: no harm here, padding is told by its place and EOS is learned all the same"
    if not chats or not tokenizer.chat_template:
        return
    yield f"chat template {hash_tokenizer(SimpleNamespace(chat_template=tokenizer.chat_template))['chat_template']}"
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
