"""Say which names were meant: every error about an unknown name lists the nearest known ones."""

import difflib
from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` of the candidates that look most like `name`, best first; module paths also match by last part."""
    candidates = list(dict.fromkeys(candidates))
    by_tail = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
    found = difflib.get_close_matches(name, candidates, n) or difflib.get_close_matches(name, by_tail, n)
    return found or sorted(by_tail)[:n]


def unknown(kind: str, name: str, candidates: Iterable[str]) -> ValueError:
    """A ValueError that says what was unknown and what was probably meant."""
    candidates = list(candidates)
    hint = f"Nearest: {', '.join(map(repr, nearest(name, candidates)))}." if candidates else "There are none."
    return ValueError(f"{kind}: {name!r} matches nothing. {hint}")
