"""Runs clients that need JSON answers or tools, each as a short script in its own process.

Oracle: each script asserts that its client builds the pydantic class that it asked for.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.chats import real
from helpers.served import build, serving, tokenizer
from minilora.generation.engine import Engine

CLIENTS = {"openai_structured": "openai", "instructor": "instructor", "pydantic_ai": "pydantic_ai"}
PYTHON = os.environ.get("STRUCTURED_CLIENTS_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def server():
    context = {"max_position_embeddings": 4096}  # the template writes long instructions for tools
    model = build(adapters=0, eos_token_id=tokenizer().eos_token_id, **context)
    with serving(model, engine=Engine(model, real("qwen2_5"))) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_client_gets_objects_of_its_class(client, server):
    python = sys.executable if CLIENTS[client] == "openai" else PYTHON
    if subprocess.run([python, "-c", f"import {CLIENTS[client]}"], capture_output=True).returncode:
        pytest.skip(
            f"{CLIENTS[client]} is not installed: tests/clients/structured_requirements.txt"
        )
    script = Path(__file__).parent / f"{client}_client.py"
    environment = os.environ | {"NO_PROXY": "127.0.0.1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, script, server.url], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
