"""Runs clients that need JSON answers or tools, each as a short script in its own process.

Oracle: each script asserts that its client builds the pydantic class that it asked for.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.chats import real
from helpers.environment import environment
from helpers.served import build, serving, tokenizer
from minilora.generation.engine import Engine

CLIENTS = ("openai_structured", "instructor", "pydantic_ai")


@pytest.fixture(scope="module")
def server():
    context = {"max_position_embeddings": 4096}  # the template writes long instructions for tools
    model = build(adapters=0, eos_token_id=tokenizer().eos_token_id, **context)
    with serving(model, engine=Engine(model, real("qwen2_5"))) as server:
        yield server


@pytest.fixture(scope="module")
def other_packages(tmp_path_factory):
    """Variables of a process with the packages of structured_requirements.txt."""
    requirements = str(Path(__file__).parent / "structured_requirements.txt")
    folder = tmp_path_factory.mktemp("packages")
    return environment(folder, ["-r", requirements], dependencies=True)


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_client_gets_objects_of_its_class(client, server, request):
    if client == "openai_structured":  # the version of constraints.txt
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    else:
        variables = request.getfixturevalue("other_packages")
    script = Path(__file__).parent / f"{client}_client.py"
    done = subprocess.run(
        [sys.executable, script, server.url],
        env=variables | {"NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
