"""One base and many adapters behind OpenAI's HTTP interface: `minilora serve`, `ml.serve` (docs/serve.md).

    socket -> middleware.py (token, limits) -> app.py (routes) -> engine_client.py | engine_thread.py -> engine.py (the
    batch) a thread for HTTP ------------------------------------------------ | the caller's

FastAPI and uvicorn are an extra (pip install 'minilora[serve]') and imported when a server starts.
"""

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from minilora.generation.engine import Engine
from minilora.lora.files.save_load import load_adapter
from minilora.serving.config import ServeConfig

TOKEN = "MINILORA_API_KEY"  # the variable


def serve(
    model: nn.Module,
    tokenizer: Any,
    adapters: Mapping[str, str | Path] | None = None,
    config: ServeConfig | None = None,
    *,
    check_base: bool = True,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then finish those under way, refuse new ones, and return.

    model, tokenizer: of ml.load_model and ml.load_tokenizer. Adapters that the model has are served as well.
    adapters: name -> folder or Hub id, loaded first; clients ask for them as models beside the base.
    check_base: False accepts adapters that were trained on another base, tokenizer or template.

    The token that clients must send is read from the environment, MINILORA_API_KEY.
    ValueError: an address beyond this machine without a token, a name given twice, an adapter that is not linear LoRA.
    ImportError without the extra. What the engine failed with, so that a supervisor starts a new process.
    """
    config = config or ServeConfig()
    token = check(config)
    from minilora.serving.server import run

    name = config.name or base_name(getattr(model, "name_or_path", ""))
    for own, folder in (adapters or {}).items():
        load_adapter(model, folder, own, tokenizer=tokenizer, check_base=check_base)
    limits = {"batch_size": config.batch_size, "waiting": config.waiting, "max_length": config.max_length}
    engine = Engine(model, tokenizer, **limits)
    if name in engine.adapters:
        engine.close()
        raise ValueError(f"name: {name!r} is the base's and an adapter's. Give the base another (--name).")
    print(f"minilora serves {', '.join([name, *engine.adapters])}", file=sys.stderr)
    run(engine, config, name, token)


def check(config: ServeConfig) -> str | None:
    """The token, if there is one. Raises what `serve` raises before there is a model."""
    token = os.environ.get(TOKEN)
    if token is not None and (size := len(token.strip())) < 8:
        raise ValueError(f"{TOKEN} is set, to {size} characters: expected 8 or more, or no such variable.")
    if not config.is_local and token is None and not config.allow_no_token:
        raise ValueError(
            f"host {config.host}: others could ask without a token. Set {TOKEN}, listen at 127.0.0.1, or allow it "
            "with allow_no_token."
        )
    if config.adapter_folder is not None and not Path(config.adapter_folder).is_dir():
        raise ValueError(f"adapter_folder: {config.adapter_folder} is no folder.")
    if absent := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise ImportError(f"serve needs {' and '.join(absent)}: pip install 'minilora[serve]'")
    return None if token is None else token.strip()


def base_name(source: str) -> str:
    """What a base is called: its Hub id, or the last part of a path, which says nothing about this machine."""
    if source and Path(source).exists():
        return Path(source).resolve().name.removesuffix(".gguf")
    return source or "base"
