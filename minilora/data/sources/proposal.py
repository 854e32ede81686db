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
LABEL_SHARE = 0.5  # largest share of different values in a column that is taken for labels


def propose_columns(rows: Sequence[Mapping[Any, Any]]) -> dict[str, str]:
    """Return a likely mapping from keys of a known shape to the columns of some rows.

    Args:
        rows: rows of the data set; a hundred are enough.

    Returns:
        Key → column, for columns that do not have the key's name already; empty if no column holds
        text or messages.
    """
    columns = _columns(rows)
    lists = []
    texts = []
    for name, values in columns.items():
        if _are_messages(values):
            lists.append(name)
        elif _is_text(name, values):
            texts.append(name)
    candidates = lists if len(lists) > 1 else texts
    meanings = _by_name(candidates)
    if {"chosen", "rejected"} <= meanings.keys():
        wanted = ["chosen", "rejected"]
        if lists:
            meanings["prompt"] = ""  # conversations hold their prompt
        elif "prompt" not in meanings:
            rest = _others(texts, meanings.values())
            meanings["prompt"] = _longest(columns, rest)
        if meanings["prompt"]:
            wanted.insert(0, "prompt")
    elif lists:
        name = lists[0]
        key = _messages_key(columns[name][0])
        meanings = {key: name}
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
    parts = [f"{key}={column}" for key, column in columns.items()]
    return ",".join(parts)


def proposal_text(rows: Sequence[Mapping[Any, Any]]) -> str:
    """Return a sentence that proposes a mapping, or the empty string.

    Args:
        rows: rows of the data set.
    """
    columns = propose_columns(rows)
    if not columns:
        return ""
    return (
        f" If the columns have these meanings, map them with --columns {as_option(columns)!r}, or in Python "
        f"with ml.load_dataset(…, columns={columns})."
    )


def _columns(rows: Sequence[Mapping[Any, Any]]) -> dict[str, list[Any]]:
    """Return the present values of each column that has some."""
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in present(row).items():
            columns.setdefault(str(name), []).append(value)
    return columns


def _are_messages(values: Sequence[Any]) -> bool:
    """Return True if every value is a list of messages or its JSON text."""
    for value in values:
        if not _is_messages(value):
            return False
    return True


def _is_messages(value: Any) -> bool:
    """Return True for a list of messages or its JSON text."""
    if not isinstance(value, list | tuple) or not value:
        return is_message_list(value)
    for entry in value:
        if not isinstance(entry, Mapping):
            return False
        if "role" not in entry and "from" not in entry:
            return False
    return True


def _messages_key(value: Any) -> str:
    """Return the key of the shape of a list of messages."""
    return "messages" if "role" in str(value) else "conversations"


def _is_text(name: str, values: Sequence[Any]) -> bool:
    """Return True for a column of texts that does not hold ids, dates or the like.

    A column without letters counts only if its name is known, as for answers that are numbers.
    """
    words = _words(name)
    if words & NO_CONTENT:
        return False
    for value in values:
        if not isinstance(value, str):
            return False
    for known in NAMES.values():
        if words.intersection(known):
            return True
    return _has_letter("".join(values))


def _has_letter(text: str) -> bool:
    return any(character.isalpha() for character in text)


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
            unused = _others(names, meanings.values())
            column = _first_with_word(unused, word)
            if column is not None:
                meanings[key] = column
                break
    return meanings


def _first_with_word(names: Sequence[str], word: str) -> str | None:
    """Return the first name that contains a word, or None."""
    for name in names:
        if word in _words(name):
            return name
    return None


def _prompt_and_answer(
    columns: Mapping[str, Sequence[Any]], texts: Sequence[str], meanings: dict[str, str]
) -> dict[str, str]:
    """Return the columns of the prompt and the answer among at least two columns of text."""
    if "completion" not in meanings:
        prompt = meanings.get("prompt", "")
        rest = _others(texts, [prompt])
        different = {name: _share_of_different(columns[name]) for name in rest}
        fewest = min(different.values())
        if fewest <= LABEL_SHARE:
            rest = [name for name in rest if different[name] == fewest]
        meanings["completion"] = rest[-1]
    completion = meanings["completion"]
    if meanings.get("prompt") in (None, completion):
        rest = _others(texts, [completion])
        meanings["prompt"] = _longest(columns, rest)
    return meanings


def _others(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Return the names that are not taken."""
    taken = set(taken)
    return [name for name in names if name not in taken]


def _longest(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> str:
    """Return the column with the most characters a row, or the empty string without a column."""
    longest = ""
    most = -1.0
    for name in names:
        length = mean_length(columns[name])
        if length > most:
            longest = name
            most = length
    return longest


def mean_length(values: Sequence[Any]) -> float:
    """Return the mean number of characters of some values, written as text.

    Args:
        values: the values of a column.
    """
    if not values:
        return 0.0
    total = 0
    for value in values:
        total += len(str(value))
    return total / len(values)


def _share_of_different(values: Sequence[Any]) -> float:
    different = set(values)
    return len(different) / len(values)
