"""Datasets → rows → conversations or plain text, whatever shape the rows come in.

A dataset is a list, an iterable or a `datasets.Dataset` of dicts, or a path to .jsonl, .json, .csv or .parquet.
Each row is recognised by its keys, in this order; a row of no known shape is an error:

    messages                    OpenAI: [{"role", "content"}, …]; `tools` go to the template
    conversations               ShareGPT: [{"from", "value"}, …]; `system` becomes the first message
    prompt, chosen, rejected    preferences: recognised, but not for supervised training
    prompt, completion          two texts, joined as they are, or two lists of messages; the completion is trained
    instruction, output         Alpaca: `input` follows the instruction after a blank line; `system`
    text                        plain text, all of it trained

As in TRL, plain texts (prompt/completion, text) pass no chat template. Values of None count as absent: Arrow fills
every row with the keys of all others. Other keys are not used; the report lists them.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, Any]

# shape: keys that say so, keys that are used if present
SHAPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "messages": (frozenset({"messages"}), frozenset({"tools"})),
    "conversations": (frozenset({"conversations"}), frozenset({"system", "tools"})),
    "preference": (frozenset({"chosen", "rejected"}), frozenset({"prompt"})),
    "prompt/completion": (frozenset({"prompt", "completion"}), frozenset({"tools"})),
    "instruction/output": (frozenset({"instruction", "output"}), frozenset({"input", "system"})),
    "text": (frozenset({"text"}), frozenset()),
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight"}


@dataclass(frozen=True)
class Chat:
    """A conversation. Assistant messages from number `first_trained` on are trained, but for those of weight 0."""

    messages: list[Message]
    first_trained: int = 0
    tools: list[Any] | None = None

    def trained_turns(self) -> list[int]:
        """Numbers of the assistant messages to train on."""
        turns = enumerate(self.messages[self.first_trained :], self.first_trained)
        return [i for i, message in turns if message["role"] == "assistant" and message.get("weight", 1)]


@dataclass(frozen=True)
class Text:
    """Plain text that no template touches: `completion` is trained, `prompt` is what it follows."""

    completion: str
    prompt: str = field(default="", kw_only=True)


class RawText(str):
    """A prompt to be encoded as it is, also where the tokenizer has a chat template."""


def read_dataset(dataset: Any) -> list[Row]:
    """The rows of a dataset. ValueError: no rows, a row that is no dict, a file that is none of the known kinds."""
    return list(iterate_dataset(dataset))


def iterate_dataset(dataset: Any) -> Iterator[Row]:
    """The rows one by one. In memory are a few of a .jsonl or .csv, a row group of a .parquet, all of a .json file."""
    if isinstance(dataset, str | Path):
        rows = _read_file(Path(dataset))
    elif isinstance(dataset, Mapping):
        raise ValueError(
            f"dataset: expected rows, got a {type(dataset).__name__} with keys {list(dataset)[:8]}. "
            'Pass one split, such as dataset["train"], or a list of dicts.'
        )
    elif isinstance(dataset, Iterable):
        rows = dataset
    else:
        raise ValueError(f"dataset: expected a list, an iterable or a path, got {type(dataset).__name__}.")
    index = -1
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index}: expected a dict, got {type(row).__name__}: {str(row)[:60]!r}.")
        yield row
    if index < 0:
        raise ValueError(f"dataset: {dataset if isinstance(dataset, str | Path) else type(dataset).__name__} is empty.")


def check_file(path: str | Path) -> str:
    """The ending of a dataset file. ValueError for one that is not known, FileNotFoundError if there is no file."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".jsonl", ".json", ".csv", ".parquet"):
        raise ValueError(
            f"dataset: expected a path to .jsonl, .json, .csv or .parquet, got {str(path)!r}. "
            'A data set of the Hub: `datasets.load_dataset(name, split="train")`, and pass what it returns.'
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"dataset: {path} is no file. Expected one of rows; paths begin at {Path.cwd()}.")
    return suffix


def _read_file(path: Path) -> Iterator[Any]:
    suffix = check_file(path)
    try:
        yield from _read_parquet(path) if suffix == ".parquet" else _read_text(path, suffix)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}. Save it as UTF-8.") from error


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ValueError(f'{path}: reading parquet needs pyarrow (pip install "minilora[data]").') from error
    with ParquetFile(path) as file:
        for group in range(file.num_row_groups):  # asked for all of them, it would read ahead without end
            for batch in file.iter_batches(256, row_groups=[group]):
                yield from batch.to_pylist()


def _read_text(path: Path, suffix: str) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if suffix == ".csv":
            try:
                for index, row in enumerate(csv.DictReader(file)):
                    if None in row or None in row.values():  # what DictReader does with cells too many or too few
                        raise ValueError(f"{path}: row {index} has not as many cells as the header has columns.")
                    yield row
            except csv.Error as error:
                raise ValueError(f"{path}: not CSV that Python reads: {error}. .jsonl has no such limits.") from error
        elif suffix == ".jsonl":
            yield from (_json(line, f"{path}, line {n}") for n, line in enumerate(file, 1) if line.strip())
        elif isinstance(rows := _json(file.read(), str(path)), list):
            yield from rows
        else:
            raise ValueError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}.")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " One object a line is .jsonl: rename the file." if error.msg == "Extra data" else ""
        raise ValueError(f"{where}: not JSON: {error}.{hint}") from error


def shape_of(row: Row, index: int = 0) -> str:
    """The row's shape, a key of SHAPES; ValueError if it has none."""
    keys = {key for key, value in row.items() if value is not None}
    for shape, (required, _) in SHAPES.items():
        if required <= keys:
            return shape
    known = "; ".join(", ".join(sorted(required)) for required, _ in SHAPES.values())
    raise ValueError(f"row {index}: keys {sorted(map(str, keys))} are no known shape. Expected one of: {known}.")


def extra_keys(row: Row, index: int = 0) -> set[str]:
    """Keys of a row, and of its messages (as "messages[].key"), that nothing but perhaps the template reads."""
    shape = shape_of(row, index)
    required, optional = SHAPES[shape]
    found = {str(key) for key, value in row.items() if value is not None and key not in required | optional}
    for key in required & {"messages", "conversations", "prompt", "completion"}:
        for message in row[key] if isinstance(row[key], list) else ():
            known = MESSAGE_KEYS | {"from", "value"} if key == "conversations" else MESSAGE_KEYS
            found |= {f"{key}[].{k}" for k, v in message.items() if v is not None and k not in known}
    return found


def as_messages(row: Row, index: int = 0) -> Chat | Text:
    """A row of any shape as a conversation, or as the plain text that it is.

    ValueError naming the row: no known shape, preference data, an unknown role, content that is not a text.
    """
    shape = shape_of(row, index)
    if shape == "preference":
        raise ValueError(
            f"row {index}: chosen/rejected is preference data, which supervised training cannot use. "
            "To train on the chosen answers, rename `chosen` to `completion` and drop `rejected`."
        )
    if shape == "text":
        return Text(_text(row, "text", index))
    if shape == "prompt/completion":
        return _prompt_completion(row, index)
    if shape == "instruction/output":
        question = _text(row, "instruction", index)
        if row.get("input"):
            question += "\n\n" + _text(row, "input", index)
        pairs = [("user", question), ("assistant", _text(row, "output", index))]
        messages = [{"role": role, "content": content} for role, content in pairs]
    else:
        messages = _messages(row[shape], index, shape)
    if row.get("system") and shape != "messages":
        messages.insert(0, {"role": "system", "content": _text(row, "system", index)})
    return Chat(messages, tools=row.get("tools") if shape != "instruction/output" else None)


def _prompt_completion(row: Row, index: int) -> Chat | Text:
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        if row.get("tools") is not None:
            raise ValueError(f"row {index}: tools need a chat, but prompt and completion are plain texts.")
        return Text(_text(row, "completion", index), prompt=_text(row, "prompt", index))
    if isinstance(row["prompt"], str) or isinstance(row["completion"], str):
        kinds = f"{type(row['prompt']).__name__} and {type(row['completion']).__name__}"
        raise ValueError(f"row {index}: prompt and completion must both be texts or both be messages, got {kinds}.")
    prompt = _messages(row["prompt"], index, "prompt")
    return Chat(prompt + _messages(row["completion"], index, "completion"), len(prompt), row.get("tools"))


def _text(row: Row, key: str, index: int) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"row {index}: {key!r} must be a text, got {type(row[key]).__name__}.")
    return _whole(row[key], f"row {index}, {key!r}")


def _whole(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write it, and no tokenizer reads it
        raise ValueError(
            f"{where}: half a surrogate pair at character {error.start}: its text was cut there."
        ) from error
    return text


def _messages(messages: Any, index: int, key: str) -> list[Message]:
    if not isinstance(messages, list | tuple) or not messages:
        got = "an empty one" if isinstance(messages, list | tuple) else type(messages).__name__
        raise ValueError(f"row {index}: {key!r} must be a list of messages, got {got}.")
    return [_message(message, f"row {index}, {key}[{turn}]", key) for turn, message in enumerate(messages)]


def _message(message: Any, where: str, key: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected a dict with role and content, got {type(message).__name__}.")
    message = {k: v for k, v in message.items() if v is not None}
    if key == "conversations" and "from" in message:
        role = message.pop("from")
        message = {"role": SHAREGPT_ROLES.get(role, role), "content": message.pop("value", None), **message}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        names = ", ".join(ROLES if key != "conversations" else [*SHAREGPT_ROLES, *ROLES])
        raise ValueError(f"{where}: unknown role {role!r}. Expected one of {names}.")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        hint = " Join its text parts into one text." if isinstance(content, list) else ""
        raise ValueError(f"{where}: content must be a text, got {type(content).__name__}.{hint}")
    _whole(content or "", where)
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(f"{where}: weight must be 0 (not trained) or 1, got {message['weight']!r}.")
    return message
