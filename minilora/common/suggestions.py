"""Errors for a name that matches nothing, with the nearest names."""

import difflib
from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Return the candidates that are most similar to a name, best first.

    Args:
        name: The name that was not found.
        candidates: Possible names. Module paths are also compared by their last part.
        n: Largest number of results.
    """
    candidates = list(dict.fromkeys(candidates))
    similar = difflib.get_close_matches(name, candidates, n)
    if similar:
        return similar
    last_parts = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
    return difflib.get_close_matches(name, last_parts, n) or sorted(last_parts)[:n]


def unknown_name(kind: str, name: str, candidates: Iterable[str]) -> ValueError:
    """Return a ValueError for a name that matches nothing, with the nearest names.

    Args:
        kind: The option or kind of thing that was named.
        name: The name that matches nothing.
        candidates: The names that exist.
    """
    candidates = list(candidates)
    if not candidates:
        return ValueError(f"{kind}: {name!r} matches nothing. There are none.")
    names = ", ".join(map(repr, nearest(name, candidates)))
    return ValueError(f"{kind}: {name!r} matches nothing. Nearest: {names}.")
