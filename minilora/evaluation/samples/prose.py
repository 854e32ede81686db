"""General English prose that every machine has, to measure forgetting.

Source: `pydoc_data.topics`, the text of Python's `help()` (Python Software Foundation, PSF
licence), part of the standard library. The text differs slightly between Python versions, and so
does a perplexity on it: compare figures of one Python version only. Paragraphs of running text are
kept; code, tables and lists are left out.
"""

import re


def prose(rows: int = 20, characters: int = 1000) -> list[dict[str, str]]:
    """Return rows `{"text": ...}` from topics spread evenly over the alphabet.

    The result is the same on every call. The default is about 4,200 tokens of SmolLM2.

    Args:
        rows: number of rows.
        characters: length of each text, cut at a word.

    Raises:
        ValueError: there are fewer than `rows` texts of that length.
    """
    from pydoc_data.topics import topics

    texts = [_running_text(topics[name]) for name in sorted(topics)]
    distinct = list(dict.fromkeys(texts))  # several names can share one text
    long = [text for text in distinct if len(text) >= characters]
    if not 0 < rows <= len(long):
        raise ValueError(
            f"rows is {rows}, expected 1 to {len(long)}, the number of topics with "
            f"{characters} characters"
        )
    excerpts = []
    for row in range(rows):
        text = long[row * len(long) // rows]
        excerpts.append({"text": text[:characters].rsplit(" ", 1)[0]})
    return excerpts


def _running_text(topic: str) -> str:
    """Return the paragraphs of at least 120 characters that are sentences, one a line."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", topic):
        text = re.sub(r"\s+", " ", paragraph).strip()
        if re.fullmatch(r"[A-Z][a-z]*\s.{110,}[.:]", text):
            kept.append(text)
    return "\n".join(kept)
