"""English reference prose that is on every machine: "text of another kind", to see what training made a model forget.

Source: `pydoc_data.topics`, the text of Python's own `help()` (Python Software Foundation, PSF licence), part of the
standard library. It differs a little from one Python version to the next, and so does a perplexity measured on it:
compare figures of one Python only. Paragraphs of running text are kept; code, tables and lists are left out.
"""

import re


def prose(rows: int = 20, characters: int = 1000) -> list[dict[str, str]]:
    """`rows` rows `{"text": ...}` of about `characters` characters from topics spread evenly over the alphabet.

    The default is about 4,200 tokens of SmolLM2. The same on every call.
    """
    from pydoc_data.topics import topics

    texts = list(dict.fromkeys(_running_text(topics[name]) for name in sorted(topics)))  # aliases share one text
    long = [text for text in texts if len(text) >= characters]
    if not 0 < rows <= len(long):
        raise ValueError(f"rows is {rows}, expected 1 to {len(long)}: so many topics have {characters} characters")
    chosen = [long[i * len(long) // rows] for i in range(rows)]
    return [{"text": text[:characters].rsplit(" ", 1)[0]} for text in chosen]


def _running_text(topic: str) -> str:
    """The paragraphs of at least 120 characters that begin like a sentence and end like one, on one line each."""
    paragraphs = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in re.split(r"\n\s*\n", topic))
    return "\n".join(text for text in paragraphs if re.fullmatch(r"[A-Z][a-z]*\s.{110,}[.:]", text))
