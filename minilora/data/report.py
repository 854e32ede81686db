"""What became of a dataset on its way to tokens: what is printed before training starts."""

from collections.abc import Sequence
from dataclasses import dataclass, field


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
    empty: tuple[int, ...]
    unused_keys: tuple[str, ...]
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
            (self.empty, "have an empty answer: they teach to say nothing"),
        ]
        lines += [f"  {len(rows)} rows {what} ({numbers(rows)})" for rows, what in notes if rows]
        lines += [f"  {rows} rows, {tokens} tokens from {name}" for name, (rows, tokens) in self.sources.items()]
        if self.unused_keys:
            lines.append(f"  keys not used: {', '.join(self.unused_keys)}")
        return "\n".join(lines)


def numbers(rows: Sequence[int], most: int = 8) -> str:
    """Row numbers for a message, the first few of many."""
    return "rows " + ", ".join(map(str, rows[:most])) + (", …" if len(rows) > most else "")
