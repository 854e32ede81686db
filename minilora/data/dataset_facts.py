"""Further facts about a dataset, which `preview` shows in addition to the report of training.

tokens a row     how many rows have up to 16, 32, 64, … tokens
answers end in   the last supervised token of the rows that were not cut, if it is special
rows             that equal an earlier row, or have answers that are not supervised
the tokenizer    padding that is EOS; its chat template: a hash, dates, a missing generation
                 prompt
"""

import json
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

from minilora.data import IGNORE, AnyTokenizer, Chat, Example, as_messages
from minilora.data.chat_template import template_errors
from minilora.data.dataset import Encoder
from minilora.data.prompt import is_special
from minilora.data.read_rows import Row
from minilora.data.report import numbers
from minilora.lora.files.base_check import hash_tokenizer


class Facts(Encoder):
    """An `Encoder` that counts more; after the iteration, `str` shows the facts.

    Args:
        dataset: anything that `train` takes.
        tokenizer: the model's tokenizer.
        max_length: longest example in tokens; None does not cut.
    """

    def __init__(self, dataset: object, tokenizer: AnyTokenizer, max_length: int | None):
        super().__init__(dataset, tokenizer, max_length)
        self.seen: set[int] = set()  # hashes of rows
        self.repeated: list[int] = []
        self.skipped: list[int] = []
        self.lengths = Counter[int]()  # by log2 of the tokens, rounded up
        self.endings = Counter[int]()  # by the last supervised token
        self.chats = False

    def note(self, row: Row, example: Example) -> None:
        """Count a row.

        Args:
            row: the row.
            example: the row as tokens.
        """
        super().note(row, example)
        content = hash((*example.input_ids, *example.labels))
        if content in self.seen:
            self.repeated.append(example.row)
        self.seen.add(content)
        sample = as_messages(row, example.row)
        if isinstance(sample, Chat):
            self.chats = True
            answers = [message for message in sample.messages if message["role"] == "assistant"]
            if len(sample.trained_turns()) < len(answers):
                self.skipped.append(example.row)
        if example.trained_tokens:
            self.lengths[(len(example) - 1).bit_length()] += 1
            if not example.truncated:
                supervised = [label for label in example.labels if label != IGNORE]
                self.endings[supervised[-1]] += 1

    def __str__(self) -> str:
        lines = []
        if self.repeated:
            lines.append(_counted(self.repeated, "equal an earlier row"))
        if self.skipped:
            remark = "have answers that are not trained: of weight 0, or in the prompt"
            lines.append(_counted(self.skipped, remark))
        if self.lengths:
            counts = [f"{count} up to {2**k}" for k, count in sorted(self.lengths.items())]
            lines.append(f"tokens a row: {', '.join(counts)}")
        if self.endings:
            endings = Counter[str]()
            for token, count in self.endings.items():
                endings[self._ending(token)] += count
            ends = [f"{ending} {count}" for ending, count in endings.most_common()]
            lines.append(f"answers end in: {', '.join(ends)}")
        lines += remarks(self.tokenizer, self.chats)
        return "\n".join(f"  {line}" for line in lines)

    def _ending(self, token: int) -> str:
        text = repr(self.tokenizer.decode([token]))
        if token == self.tokenizer.eos_token_id:
            return f"{text} (EOS)"
        return text if is_special(self.tokenizer, token) else "no end token"


def _counted(rows: list[int], remark: str) -> str:
    return f"{len(rows)} rows {remark} ({numbers(rows)})"


def remarks(tokenizer: AnyTokenizer, chats: bool) -> Iterator[str]:
    """Yield remarks about a tokenizer and its template.

    Args:
        tokenizer: the model's tokenizer.
        chats: True if the dataset has conversations, which the template renders.

    Yields:
        One remark at a time.
    """
    eos = tokenizer.eos_token_id
    if eos is not None and eos == tokenizer.pad_token_id:
        yield (
            "the padding token is EOS: this is harmless, because padding is known by its place and "
            "EOS is still learned"
        )
    if not chats or not tokenizer.chat_template:
        return
    template = SimpleNamespace(chat_template=tokenizer.chat_template)
    yield f"chat template {hash_tokenizer(template)['chat_template']}"
    if "strftime_now" in json.dumps(tokenizer.chat_template):
        yield (
            "the chat template writes today's date (strftime_now): prompts change with the day; "
            "write a fixed date into it"
        )
    header = _unprompted_header(tokenizer)
    if header:
        yield (
            f"the chat template has no generation prompt: each answer is learned with its header, "
            f"{header!r}; let the template write that where add_generation_prompt is set"
        )


def _unprompted_header(tokenizer: AnyTokenizer) -> str | None:
    """Return the header of an answer if the generation prompt does not write it, else None."""
    user = {"role": "user", "content": "17"}
    answer = {"role": "assistant", "content": "17"}
    try:
        plain = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=False)
        prompted = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(
            [user, answer], tokenize=False, add_generation_prompt=False
        )
    except template_errors():  # for example, a template that needs a system message
        return None
    header = full[len(plain) :].partition("17")[0]
    first = tokenizer.encode(header, add_special_tokens=False)[:1]
    if plain == prompted and first and is_special(tokenizer, first[0]):
        return header
    return None
