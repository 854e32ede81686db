"""Runs real clients against the server, each as a short script in a process of its own.

Oracle: each script asserts what its client promises; lm-eval's log-likelihoods of a served model
equal those that it computes from the same folder with transformers.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import minilora as ml
from helpers.chats import theirs
from helpers.kinds import shake
from helpers.served import NAMES, serving
from helpers.tiny import save

# script -> the package that it needs, of the extra `clients`
CLIENTS = {
    "openai": "openai",
    "langchain_openai": "langchain_openai",
    "litellm": "litellm",
    "lm_eval": "lm_eval",
    "guidellm": "guidellm",
}
# No client looks for anything on the internet.
OFFLINE = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a checkpoint of a random model, with its tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = theirs("chatml")
    save(path, vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=None)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder):
    model = ml.load_model(str(folder), dtype="float32")
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["q_proj"]), name=NAMES[0])
    shake(model)
    ml.set_adapter(model, [])
    with serving(model, ends=False) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_client_works_with_the_server(client, server, folder, tmp_path):
    if find_spec(CLIENTS[client]) is None:
        pytest.fail(f"{CLIENTS[client]} is not installed: pip install -e '.[clients]'")
    script = Path(__file__).parent / f"{client}_client.py"
    arguments = {"lm_eval": [folder], "guidellm": [folder, tmp_path]}.get(client, [])
    done = subprocess.run(
        [sys.executable, script, server.url, *map(str, arguments)],
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
