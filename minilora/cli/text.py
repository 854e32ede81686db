"""The commands that use a model: generate, serve."""

from collections.abc import Sequence
from typing import Any

import minilora as ml
from minilora.cli.options import (
    POSITIONAL,
    add_command,
    add_no_check_base,
    add_storage,
    add_template_kwargs,
    load,
    storage_options,
)
from minilora.cli.values import add_fields, parse_value
from minilora.lora.files.save_load import find_adapter
from minilora.serving.serve import check as check_server


def generate(
    model: str,
    prompt: str,
    adapter: str | None,
    quantize: str | None,
    dtype: str,
    check_base: bool,
    **sampling: Any,
) -> None:
    """Answer a prompt.

    Args:
        model: Hub id, folder or .gguf file.
        prompt: the text to answer.
        adapter: folder or Hub id of an adapter; None uses the base alone.
        quantize: "nf4", "none", or None to follow the adapter.
        dtype: a dtype's name, or "auto".
        check_base: refuse an adapter that was trained on another base.
        sampling: options of ml.generate.
    """
    loaded, tokenizer = load(model, adapter, quantize, dtype, check_base)
    print(ml.generate(loaded, tokenizer, prompt, **sampling))


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
        model: Hub id, folder or .gguf file.
        adapter: adapters as NAME=PATH.
        quantize: "nf4", "none", or None to follow the adapter.
        dtype: a dtype's name, or "auto".
        check_base: refuse an adapter that was trained on another base.
        options: fields of ServeConfig.

    Raises:
        ValueError: an adapter is not NAME=PATH, or a name occurs twice.
    """
    adapters = _named_adapters(adapter or ())
    config = ml.ServeConfig(**options)
    check_server(config)  # before the base is loaded, which takes longer
    storage = storage_options(model, list(adapters.values()), quantize)
    loaded = ml.load_model(model, dtype=dtype, **storage)
    tokenizer = ml.load_tokenizer(model)
    ml.serve(loaded, tokenizer, adapters, config, check_base=check_base)


def _named_adapters(items: Sequence[str]) -> dict[str, Any]:
    """Return name → folder of the adapters given as NAME=PATH."""
    adapters = {}
    for item in items:
        name, equals, folder = item.partition("=")
        if name and equals:
            adapters[name] = find_adapter(folder)[0]
    if len(adapters) < len(items):
        raise ValueError(f"--adapter: expected NAME=PATH, each name once, got {' '.join(items)}.")
    return adapters


def add_commands(commands: Any) -> None:
    """Add the commands of this file.

    Args:
        commands: the subparsers of the program.
    """
    _add_generate(commands)
    _add_serve(commands)


def _add_generate(commands: Any) -> None:
    parser = add_command(commands, generate, "model", "prompt")
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, help="longest answer (default %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="nucleus to sample from (default %(default)s)"
    )
    parser.add_argument(
        "--stop", action="append", help="a text before which the answer ends; may be repeated"
    )
    parser.add_argument("--seed", type=int, help="seed of the sampling")
    parser.add_argument(
        "--cuda_graph",
        type=lambda value: parse_value(value, bool | str),
        default="auto",
        choices=("auto", True, False),
        metavar="VALUE",
        help="run each token's step on a GPU as one CUDA graph: auto (where it should pay), true "
        "or false (default auto)",
    )
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
