"""The report on a dataset that training prints before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataReport:
    """Figures of an encoded dataset; the tuples of ints hold row numbers.

    Attributes:
        rows: number of rows.
        tokens: tokens of the rows that are trained on.
        trained_tokens: supervised tokens.
        longest: tokens of the longest row.
        max_length: limit at which rows are cut.
        truncated: rows whose supervised tokens were cut.
        untrained: rows without a supervised token; they are left out.
        eos_missing: rows that do not supervise EOS.
        double_bos: rows with a second BOS, which was removed.
        dropped_turns: rows with turns after the last supervised answer.
        empty: rows with an empty answer.
        unused_keys: keys that are not read.
        special_text: rows whose content holds the text of a special token.
        special_tokens: those tokens.
        untemplated: rows of prompt and completion as plain texts, though the tokenizer has a chat
            template.
        sources: of a mixture: (rows, tokens) of each dataset.
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    max_length: int | None
    truncated: tuple[int, ...]
    untrained: tuple[int, ...]
    eos_missing: tuple[int, ...]
    double_bos: tuple[int, ...]
    dropped_turns: tuple[int, ...]
    empty: tuple[int, ...]
    unused_keys: tuple[str, ...]
    special_text: tuple[int, ...] = ()
    special_tokens: tuple[str, ...] = ()
    untemplated: tuple[int, ...] = ()
    sources: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        share = self.trained_tokens / max(self.tokens, 1)
        lines = [
            f"{self.rows - len(self.untrained)} rows, {self.tokens} tokens, "
            f"{self.trained_tokens} of them trained ({share:.0%}), longest {self.longest}"
        ]
        for rows, remark in self._remarks():
            if rows:
                lines.append(f"  {len(rows)} rows {remark} ({numbers(rows)})")
        for name, (rows, tokens) in self.sources.items():
            lines.append(f"  {rows} rows, {tokens} tokens from {name}")
        if self.unused_keys:
            lines.append(f"  keys not used: {', '.join(self.unused_keys)}")
        return "\n".join(lines)

    def _remarks(self) -> list[tuple[tuple[int, ...], str]]:
        return [
            (self.truncated, f"cut at max_length {self.max_length}: their end is not learned"),
            (self.untrained, "left out: no trained token in them"),
            (
                self.eos_missing,
                "do not train the EOS token: the model may not learn to stop "
                "(see tokenizer.eos_token)",
            ),
            (self.double_bos, "began with two BOS tokens: one removed"),
            (
                self.dropped_turns,
                "end in turns after the last trained answer: those turns dropped",
            ),
            (
                self.special_text,
                f"hold the text of special tokens in their content: {', '.join(self.special_tokens)}; "
                "it is read and trained as the tokens themselves",
            ),
            (
                self.untemplated,
                "train prompt and completion without the chat template, which generate applies to "
                "a prompt: --chat true (ml.load_dataset with chat=True) trains with it",
            ),
            (self.empty, "have an empty answer: the model learns to answer nothing"),
        ]


def numbers(rows: Sequence[int], most: int = 8) -> str:
    """Return row numbers as text, at most the first few.

    Args:
        rows: the row numbers.
        most: how many to show.
    """
    shown = ", ".join(map(str, rows[:most]))
    more = ", …" if len(rows) > most else ""
    return f"rows {shown}{more}"
