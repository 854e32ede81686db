"""Tests of Hub ids: one download, the cache offline, and explained errors.

A small replacement of the Hub is served over HTTP and used through huggingface_hub in separate
processes. They test the real client, its cache and its environment variables.
"""

import json

import pytest

from helpers.hub import serve
from helpers.tiny import python, save
from minilora.hub import resolve

ASK = """
import json, sys, torch
from minilora.hub import resolve
from minilora.models.loader import load_model
answers = []
for arguments in json.loads(sys.argv[1]):
    try:
        if arguments.pop("load", False):
            model = load_model(**arguments, dtype="float32", device="cpu")
            answers.append([model.name_or_path, model.lm_head.weight.double().sum().item()])
        else:
            answers.append(sorted(path.name for path in resolve(**arguments).iterdir()))
    except (OSError, ValueError) as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


ONLINE = {
    "tokenizer": {"source": "tiny/llama", "weights": False},
    "model": {"source": "tiny/llama", "load": True},
    "nothing": {"source": "tiny/nothing"},
    "gated": {"source": "tiny/gated"},
    "revision": {"source": "tiny/llama", "revision": "other"},
    "local": {"source": "tiny/other", "local_files_only": True},
    "path": {"source": "tiny/llama/extra"},
    "folder": {"source": "./absent"},
    "gguf": {"source": "absent.gguf"},
}
OFFLINE = {
    "model": {"source": "tiny/llama", "load": True},
    "local": {"source": "tiny/llama", "local_files_only": True},
    "nothing": {"source": "tiny/nothing"},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> tuple[dict, dict, list[str], float]:
    """Return the answers to the calls above, online and then offline with the same cache.

    The third value is the list of requests, and the fourth is the sum of the model's head.
    """
    folder, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    reference = save(folder)
    for name in ("tokenizer.json", "README.md", "consolidated.safetensors", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with serve({"tiny/llama": files}) as (server, env):

        def ask(calls: dict[str, dict], offline: str) -> dict:
            told = env | {"HF_HOME": str(home), "HF_HUB_OFFLINE": offline}
            return dict(
                zip(
                    calls,
                    json.loads(python(ASK, json.dumps([*calls.values()]), **told)),
                    strict=True,
                )
            )

        online, asked = ask(ONLINE, "0"), list(server.requests)
        offline = ask(OFFLINE, "1")
        assert server.requests == asked  # offline sends no request
    return online, offline, asked, reference.lm_head.weight.double().sum().item()


def test_hub_id_is_downloaded_once_then_cached_and_offline(hub):
    online, offline, asked, total = hub
    assert online["tokenizer"] == ["tokenizer.json"]
    assert online["model"] == ["tiny/llama", pytest.approx(total)]
    assert sum(line.startswith("GET") and "model.safetensors" in line for line in asked) == 1
    assert not [
        line for line in asked if any(x in line for x in ("README", "consolidated", ".bin"))
    ]
    assert offline["model"] == online["model"]
    assert offline["local"] == ["config.json", "model.safetensors", "tokenizer.json"]


def test_hub_errors_name_the_cause(hub):
    online, offline, *_ = hub
    assert online["nothing"].startswith(
        "OSError: 'tiny/nothing' is neither a folder nor a file here, nor a repository"
    )
    assert online["gated"].startswith("OSError: 'tiny/gated' is gated: accept its licence")
    assert online["revision"].startswith(
        "OSError: 'tiny/llama' at revision 'other': the Hub has no such revision"
    )
    assert online["local"].startswith(
        "OSError: 'tiny/other' is neither a folder nor a file here, nor in the cache"
    )
    assert offline["nothing"].startswith(
        "OSError: 'tiny/nothing' is neither a folder nor a file here, nor in the cache"
    )
    for wrong in ("path", "folder", "gguf"):
        assert online[wrong].startswith("ValueError: there is no folder or .gguf file"), wrong
        assert "Check the path, which begins at /" in online[wrong]


def test_a_misspelt_folder_is_answered_with_similar_names(tmp_path, monkeypatch):
    (tmp_path / "smollm").mkdir()
    (tmp_path / "smollm2.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"Similar names here: smollm, smollm2\.gguf\.$"):
        resolve("smollmm", local_files_only=True)
    with pytest.raises(OSError, match=r"give a local folder\.$"):
        resolve("tiny/smollmm", local_files_only=True)
