"""Propose which columns of unknown names hold the prompt, the answer, messages or text.

A proposal is shown and never applied: a wrong guess would train a model without an error. Names
count first (`question`, `answer`), then contents: a list of messages, a column of few different
values (a label is an answer), the longer text (the prompt), and the order of the columns.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minilora.data.chat.messages import is_message_list
from minilora.data.chat.values import present

NAMES = {  # key of a known shape -> words in the names of columns that mean it
    "rejected": ("rejected", "dispreferred", "loser", "worse", "negative"),
    "chosen": ("chosen", "preferred", "accepted", "winner", "better", "positive"),
    "completion": (
        *("completion", "answer", "response", "output", "reply", "target", "solution"),
        *("assistant", "summary", "label", "category", "class", "topic", "translation"),
    ),
    "prompt": (
        *("prompt", "question", "query", "input", "instruction", "request", "ticket", "problem"),
        *("user", "source", "text", "document", "article", "sentence", "body", "title"),
    ),
}
NO_CONTENT = {"id", "uuid", "url", "date", "time", "index", "split", "idx", "timestamp", "lang"}
LABEL_SHARE = 0.5  # of different values, up to which a column is taken for labels


def propose_columns(rows: Sequence[Mapping[Any, Any]]) -> dict[str, str]:
    """Return a likely mapping from keys of a known shape to the columns of some rows.

    Args:
        rows: rows of the data set; a hundred are enough.

    Returns:
        Key → column, for columns that do not have the key's name already; empty if no column holds
        text or messages.
    """
    columns = _columns(rows)
    lists = [name for name, values in columns.items() if all(map(_is_messages, values))]
    texts = [name for name, values in columns.items() if _is_text(name, values)]
    texts = [name for name in texts if name not in lists]
    meanings = _by_name(lists if len(lists) > 1 else texts)
    if {"chosen", "rejected"} <= meanings.keys():
        wanted = ["chosen", "rejected"]
        if lists:
            meanings["prompt"] = ""  # conversations hold their prompt
        elif "prompt" not in meanings:
            meanings["prompt"] = _longest(columns, _others(texts, meanings.values()))
        if meanings["prompt"]:
            wanted.insert(0, "prompt")
    elif lists:
        key = _messages_key(columns[lists[0]][0])
        meanings = {key: lists[0]}
        wanted = [key]
    elif len(texts) == 1:
        meanings = {"text": texts[0]}
        wanted = ["text"]
    elif texts:
        meanings = _prompt_and_answer(columns, texts, meanings)
        wanted = ["prompt", "completion"]
    else:
        return {}
    return {key: meanings[key] for key in wanted if meanings[key] != key}


def as_option(columns: Mapping[str, str]) -> str:
    """Return a mapping as the value of --columns.

    Args:
        columns: key of a known shape → column.
    """
    return ",".join(f"{key}={column}" for key, column in columns.items())


def proposal_text(rows: Sequence[Mapping[Any, Any]]) -> str:
    """Return a sentence that proposes a mapping, or the empty string.

    Args:
        rows: rows of the data set.
    """
    columns = propose_columns(rows)
    if not columns:
        return ""
    return (
        f" If the columns mean that, map them with --columns {as_option(columns)!r}, or in Python "
        f"with ml.load_dataset(…, columns={columns})."
    )


def _columns(rows: Sequence[Mapping[Any, Any]]) -> dict[str, list[Any]]:
    """Return the present values of each column that has some."""
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in present(row).items():
            columns.setdefault(str(name), []).append(value)
    return columns


def _is_messages(value: Any) -> bool:
    """Return True for a list of messages or its JSON text."""
    if not isinstance(value, list | tuple) or not value:
        return is_message_list(value)
    return all(isinstance(entry, Mapping) and {"role", "from"} & entry.keys() for entry in value)


def _messages_key(value: Any) -> str:
    """Return the key of the shape of a list of messages."""
    return "messages" if "role" in str(value) else "conversations"


def _is_text(name: str, values: Sequence[Any]) -> bool:
    """Return True for a column of texts that is not an id, a date or the like.

    A column without letters is one only by its name, such as an answer that is a number.
    """
    words = _words(name)
    if words & NO_CONTENT or not all(isinstance(value, str) for value in values):
        return False
    if any(words & set(known) for known in NAMES.values()):
        return True
    return any(character.isalpha() for value in values for character in value)


def _words(name: str) -> set[str]:
    """Return the words of a column's name: "Customer_question" → {"customer", "question"}."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return set(re.findall(r"[^\W_]+", spaced.lower()))


def _by_name(names: Iterable[str]) -> dict[str, str]:
    """Return key → column for the columns whose names are known words, each column once."""
    names = list(names)
    meanings: dict[str, str] = {}
    for key, known in NAMES.items():
        for word in known:
            named = [n for n in names if word in _words(n) and n not in meanings.values()]
            if named:
                meanings[key] = named[0]
                break
    return meanings


def _prompt_and_answer(
    columns: Mapping[str, Sequence[Any]], texts: Sequence[str], meanings: dict[str, str]
) -> dict[str, str]:
    """Return the columns of the prompt and the answer among at least two columns of text."""
    if "completion" not in meanings:
        rest = _others(texts, [meanings.get("prompt", "")])
        few = min(reversed(rest), key=lambda name: _share_of_different(columns[name]))
        is_label = _share_of_different(columns[few]) <= LABEL_SHARE
        meanings["completion"] = few if is_label else rest[-1]
    if meanings.get("prompt") in (None, meanings["completion"]):
        meanings["prompt"] = _longest(columns, _others(texts, [meanings["completion"]]))
    return meanings


def _others(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Return the names that are not taken."""
    taken = set(taken)
    return [name for name in names if name not in taken]


def _longest(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> str:
    """Return the column with the most characters a row, or the empty string without a column."""
    return max(names, key=lambda name: mean_length(columns[name]), default="")


def mean_length(values: Sequence[Any]) -> float:
    """Return the mean number of characters of some values, written as text.

    Args:
        values: the values of a column.
    """
    return sum(len(str(value)) for value in values) / max(1, len(values))


def _share_of_different(values: Sequence[Any]) -> float:
    return len(set(values)) / len(values)
