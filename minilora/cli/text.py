"""The commands that use a model: generate, serve."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import minilora as ml
from minilora.cli.chat import print_pieces
from minilora.cli.options import (
    POSITIONAL,
    add_command,
    add_no_check_base,
    add_sampling,
    add_storage,
    add_template_kwargs,
    base_and_adapters,
    load,
    storage_options,
    template_check,
)
from minilora.cli.values import add_fields, parse_value
from minilora.common.extras import require
from minilora.data.formats import Chat, as_messages
from minilora.data.read_rows import check_file, read_dataset
from minilora.generation.json_schema import schema_of
from minilora.serving.serve import check as check_server


def generate(
    model: str,
    prompt: str | None,
    messages: str | None,
    system: str | None,
    stream: bool | None,
    schema: str | None,
    adapter: str | None,
    **options: Any,
) -> None:
    """Answer a prompt from the command line or stdin, or the conversations of a file.

    Args:
        model: Hub id, folder or .gguf file, or the folder of a run or an adapter.
        prompt: the text to answer; None or "-" reads it from stdin.
        messages: file of conversations to answer instead of a prompt; None answers the prompt.
        system: text of a system message to put in front; None adds none.
        stream: print the answer while it grows; None does so on a terminal.
        schema: file of a JSON schema that the answers follow, or "json" for any JSON object; None
            allows any text.
        adapter: folder or Hub id of an adapter; None uses that of `model`, or the base alone.
        options: quantize, dtype and check_base (`load`), and the options of ml.generate.

    Raises:
        ValueError: there is no prompt, or two; a number is out of range; or the tokenizer has no
            chat template for `system`.
    """
    prompts = [_with_system(each, system) for each in _prompts(prompt, messages)]
    if stream and len(prompts) > 1:
        raise ValueError(f"--stream true: {messages} has {len(prompts)} conversations, expected 1.")
    if stream is None:
        stream = sys.stdout.isatty() and len(prompts) == 1
    loading = {name: options.pop(name) for name in ("quantize", "dtype", "check_base")}
    template_kwargs = options.pop("chat_template_kwargs")
    if schema is not None:
        options["schema"] = _schema(schema)
    config = ml.GenerationConfig(**options)  # checked before the model is loaded
    needs_template = "--messages" if messages is not None else None
    if system is not None:
        needs_template = "--system"
    loaded, tokenizer = load(
        model, adapter, **loading, check_tokenizer=template_check(model, needs_template)
    )
    if stream:
        pieces = ml.stream_generate(
            loaded, tokenizer, prompts[0], config, chat_template_kwargs=template_kwargs
        )
        print_pieces(pieces)
        return
    answers = ml.generate(loaded, tokenizer, prompts, config, chat_template_kwargs=template_kwargs)
    if len(prompts) == 1:
        print(answers[0])
        return
    for answer in answers:
        print(json.dumps({"answer": answer}, ensure_ascii=False))


def _schema(text: str) -> Any:
    """Return the schema of a file, or "json"; check it before a model is loaded."""
    require("an answer that follows a schema", "llguidance")
    schema: Any = text
    if text != "json":
        if check_file(text) != ".json":
            raise ValueError(f"--schema: expected a .json file or the word json, got {text}.")
        try:
            schema = json.loads(Path(text).read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"--schema: {text} is not JSON: {error}.") from error
    schema_of(schema)
    return schema


def _prompts(prompt: str | None, messages: str | None) -> list[Any]:
    """Return the prompt of the command line or of stdin, or the conversations of a file."""
    if messages is not None:
        if prompt is not None:
            raise ValueError("there is a prompt, and --messages too: give one of them.")
        return _conversations(messages)
    if prompt not in (None, "-"):
        return [prompt]
    if prompt is None and sys.stdin.isatty():
        raise ValueError(
            "there is no prompt: give it as an argument, through stdin, or with --messages FILE."
        )
    text = sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise ValueError("there is no prompt: stdin is empty.")
    return [text]


def _conversations(path: str) -> list[Any]:
    """Return the conversations of a .json or .jsonl file: one list of messages, or rows."""
    if check_file(path) not in (".json", ".jsonl"):
        raise ValueError(f"--messages: expected a .json or .jsonl file, got {path}.")
    rows = _single_row(path) or read_dataset(path)
    if all("role" in row for row in rows):
        return [rows]
    conversations = []
    for number, row in enumerate(rows):
        chat = as_messages(row, number)
        if not isinstance(chat, Chat) or chat.tools or chat.chat_template_kwargs:
            raise ValueError(
                f"{path}, row {number}: expected a row with `messages` and without tools or "
                f"chat_template_kwargs, got the keys {sorted(row)}."
            )
        if chat.messages[-1]["role"] == "assistant":
            raise ValueError(
                f"{path}, row {number}: the last message is the assistant's, so there is nothing "
                "to answer. Remove it, or compare the answers with `minilora evaluate`."
            )
        conversations.append(chat.messages)
    return conversations


def _single_row(path: str) -> list[Any] | None:
    """Return the row of a .json file that holds one object; None for every other file."""
    if not path.lower().endswith(".json"):
        return None
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError:
        return None  # read_dataset reports where the file is damaged
    return [value] if isinstance(value, dict) else None


def _with_system(prompt: Any, system: str | None) -> Any:
    """Return a prompt with a system message in front."""
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0].get("role") == "system":
        raise ValueError("--system: the conversation has a system message already.")
    return [{"role": "system", "content": system}, *messages]


def serve(
    model: str,
    adapter: Sequence[str] | None,
    quantize: str | None,
    dtype: str,
    check_base: bool,
    **options: Any,
) -> None:
    """Serve a base and its adapters over HTTP with OpenAI's interface.

    Args:
        model: Hub id, folder or .gguf file, or the folder of a run or an adapter, which is served
            under the folder's name.
        adapter: adapters as NAME=PATH.
        quantize: "nf4", "keep", "none", or None to follow the adapter.
        dtype: a dtype's name, or "auto".
        check_base: refuse an adapter that was trained on another base.
        options: fields of ServeConfig.

    Raises:
        ValueError: an adapter is not NAME=PATH, or a name occurs twice.
    """
    base, adapters = base_and_adapters(model, adapter or ())
    config = ml.ServeConfig(**options)
    check_server(config)  # before the base is loaded, which takes longer
    storage = storage_options(base, list(adapters.values()), quantize)
    loaded = ml.load_model(base, dtype=dtype, **storage)
    tokenizer = ml.load_tokenizer(base)
    ml.serve(loaded, tokenizer, adapters, config, check_base=check_base)


def add_commands(commands: Any) -> None:
    """Add the commands of this file.

    Args:
        commands: the subparsers of the program.
    """
    _add_generate(commands)
    _add_serve(commands)


def _add_generate(commands: Any) -> None:
    parser = add_command(commands, generate, "model")
    parser.add_argument("prompt", nargs="?", help=POSITIONAL["prompt"])
    parser.add_argument(
        "--messages",
        metavar="FILE",
        help="conversations to answer, of a .json or .jsonl file: one list of messages, or rows "
        "with `messages`; the answers to several rows are printed as JSON, one a line",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message to put in front")
    parser.add_argument(
        "--stream",
        type=lambda value: parse_value(value, bool),
        metavar="true|false",
        help="print the answer while it grows (default: if the output is a terminal)",
    )
    parser.add_argument(
        "--schema",
        metavar="FILE",
        help="a JSON schema, in a .json file, that every answer follows; json allows any JSON object",
    )
    add_sampling(parser, max_new_tokens=64, temperature=0.0)
    parser.add_argument("--adapter", help=POSITIONAL["adapter"])
    add_template_kwargs(parser)
    add_no_check_base(parser)
    add_storage(parser)


def _add_serve(commands: Any) -> None:
    parser = add_command(commands, serve, "model")
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="NAME=PATH",
        help="an adapter (folder or Hub id) and the model name for clients; may be repeated",
    )
    add_no_check_base(parser)
    add_storage(parser)
    add_fields(parser.add_argument_group("the server (ServeConfig)"), ml.ServeConfig)
