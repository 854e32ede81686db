"""The server of one base and many adapters: `minilora serve` and `ml.serve` (docs/serve.md).

thread for HTTP   socket -> middleware.py (token, limits) -> app.py (routes) -> engine_client.py
caller's thread   engine_thread.py -> generation/engine.py (the batch)

FastAPI and uvicorn are an extra (pip install -e '.[serve]'). They are imported when a server starts.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from minilora.common import unwrap_model
from minilora.common.extras import require
from minilora.common.notebook import note
from minilora.generation.engine import Engine
from minilora.lora.files.save_load import load_adapter
from minilora.serving.config import ServeConfig

TOKEN = "MINILORA_API_KEY"  # the environment variable
MIN_TOKEN_LENGTH = 8


def serve(
    model: nn.Module,
    tokenizer: Any,
    adapters: Mapping[str, str | Path] | None = None,
    config: ServeConfig | None = None,
    *,
    check_base: bool = True,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, finish the running answers, and return.

    While running answers finish, new requests are refused. The token that clients must send comes
    from the environment variable MINILORA_API_KEY.

    Args:
        model: a model of `ml.load_model`; the adapters that it has are served too.
        tokenizer: the tokenizer of `ml.load_tokenizer`.
        adapters: name -> folder or Hub id of adapters to load first; a client selects an adapter
            by its name as the model. None loads nothing.
        config: the options of the server; None takes the defaults.
        check_base: False accepts adapters that were trained on another base, tokenizer or template.

    Raises:
        ValueError: other machines can reach the address without a token, or a name occurs twice.
        ImportError: the extra is not installed. Exception:
        an exception that ended the engine, so that a supervisor starts a new process.
    """
    model = unwrap_model(model)
    config = config or ServeConfig()
    token = check(config)
    from minilora.serving.server import run

    name = config.name or base_name(getattr(model, "name_or_path", ""))
    for adapter, folder in (adapters or {}).items():
        load_adapter(model, folder, adapter, tokenizer=tokenizer, check_base=check_base)
    engine = Engine(
        model,
        tokenizer,
        batch_size=config.batch_size,
        waiting=config.waiting,
        max_length=config.max_length,
    )
    if name in engine.adapters:
        engine.close()
        raise ValueError(
            f"name: {name!r} names the base and an adapter. Give the base another name (--name)."
        )
    note(f"minilora serves {', '.join([name, *engine.adapters])}")
    if engine.exclusive:
        note(
            f"minilora serves {', '.join(engine.exclusive)} one at a time: adapters with more than "
            "linear LoRA (DoRA, embeddings, whole modules) cannot share a batch with others, so "
            "their requests wait for each other."
        )
    run(engine, config, name, token)


def check(config: ServeConfig) -> str | None:
    """Check the options and the environment before a model is loaded.

    Args:
        config: the options of the server.

    Returns:
        The token that clients must send; None if clients need no token.

    Raises:
        ValueError: the token is too short, a token is missing, or `adapter_folder` is not a folder.
        ImportError: the extra is not installed.
    """
    token = os.environ.get(TOKEN)
    if token is not None:
        token = token.strip()
        if len(token) < MIN_TOKEN_LENGTH:
            raise ValueError(
                f"{TOKEN} has {len(token)} characters: expected {MIN_TOKEN_LENGTH} or more. "
                "Set a longer token, or remove the variable."
            )
    if not config.is_local and token is None and not config.allow_no_token:
        raise ValueError(
            f"host {config.host}: other machines could send requests without a token. "
            f"Set {TOKEN}, listen at 127.0.0.1, or allow it with allow_no_token."
        )
    if config.adapter_folder is not None and not Path(config.adapter_folder).is_dir():
        raise ValueError(f"adapter_folder: {config.adapter_folder} is not a folder.")
    require("serve", "fastapi", "uvicorn")
    return token


def base_name(source: str) -> str:
    """Return the model name of a base.

    Args:
        source: a Hub id, a path, or "".

    Returns:
        The Hub id, or the last part of the path, so that clients do not see the server's folders;
        "base" for "".
    """
    if source and Path(source).exists():
        return Path(source).resolve().name.removesuffix(".gguf")
    return source or "base"
