"""Proves that a push to the Hub uploads exactly the right files and explains refusals.

The files come back bit for bit. huggingface_hub's own client, in separate processes, uses a
stand-in for the Hub over HTTP.
"""

import json
import re
from types import SimpleNamespace

import pytest
import torch

import minilora as ml
from helpers import toy
from helpers.hub import COMMIT, READER, WRITER, serve
from helpers.tiny import python, save
from minilora.cli.main import main
from minilora.tools.model_card import is_ours

JUNK = (
    "optimizer.pt",
    "trainer_state.json",
    "trainer_state.safetensors",
    "log.jsonl",
    "adapter_model.bin",
    "token.txt",
)
JUNK += (".env", ".secret.gguf", "credentials.json", "model-optimizer.safetensors")
ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors"]

ASK = """
import json, sys
import minilora as ml
answers = {}
for what, call in json.loads(sys.argv[1]).items():
    try:
        if "load" in call:
            model = ml.load_model(call["base"], dtype="float32", device="cpu")
            ml.load_adapter(model, call["load"], **call.get("options", {}))
            tensors = ml.adapter_state_dict(model)
            answers[what] = {key: tensor.numpy().tobytes().hex() for key, tensor in tensors.items()}
        else:
            source, repo = call["push"]
            if "base" in call:
                model = ml.load_model(call["base"], dtype="float32", device="cpu")
                ml.load_adapter(model, source)
                source = model
            answers[what] = ml.push_to_hub(source, repo, **call.get("options", {}))
    except (OSError, ValueError) as error:
        answers[what] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Write a base model, its adapter among private files, a merged model and a GGUF file."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    save(place / "base", dtype=torch.bfloat16)
    model = ml.load_model(place / "base", dtype="float32", device="cpu")
    toy.lora(model, targets=["q_proj", "up_proj"])
    for layer in model.modules():
        if isinstance(layer, ml.LoRALayer):
            layer.adapters["default"].lora_B.data.normal_()
    model.name_or_path = "tiny/base"
    ml.save_adapter(model, place / "adapter")
    ml.save_model(model, place / "merged", merge=True)
    ml.save_model(ml.merge(model), place / "gguf", format="gguf")
    ml.write_model_card(place / "gguf")
    for name in JUNK:
        (place / "adapter" / name).write_text("secret")
    (place / "adapter" / "checkpoint-3").mkdir()
    (place / "adapter" / "checkpoint-3" / "adapter_config.json").write_text("{}")
    return SimpleNamespace(path=place, tensors=ml.adapter_state_dict(model))


@pytest.fixture(scope="module")
def pushed(place, tmp_path_factory):
    """Return the results of a writer's calls and the Hub after them.

    The Hub holds the base and a private repository from the beginning.
    """
    base = {path.name: path.read_bytes() for path in (place.path / "base").iterdir()}
    adapter, merged, gguf = (str(place.path / name) for name in ("adapter", "merged", "gguf"))
    calls = {
        "adapter": {
            "push": [adapter, "me/adapter"],
            "options": {"private": True, "commit_message": "The first"},
        },
        "again": {"load": "me/adapter", "base": "tiny/base"},
        "branch": {"push": [adapter, "me/adapter"], "options": {"revision": "branch"}},
        "at branch": {
            "load": "me/adapter",
            "base": "tiny/base",
            "options": {"revision": "branch", "token": WRITER},
        },
        "merged": {"push": [merged, "merged"]},
        "gguf": {"push": [gguf, "org/gguf"]},
        "model": {"push": [adapter, "me/model"], "base": "tiny/base"},
        "carded": {"push": [adapter, "tiny/carded"]},
        "not private": {"push": [adapter, "tiny/base"], "options": {"private": True}},
        "no revision": {"push": [adapter, "me/adapter"], "options": {"revision": "absent"}},
        "no repository": {"push": [adapter, "me/absent"], "options": {"revision": "branch"}},
        "gated": {"push": [adapter, "me/gated"], "options": {"revision": "branch"}},
        "full": {"push": [adapter, "me/full"]},
        "broken": {"push": [adapter, "broken/adapter"]},
        "reader": {"push": [adapter, "me/other"], "options": {"token": READER}},
        "stranger": {"push": [adapter, "me/other"], "options": {"token": "hf_stranger"}},
        "nothing": {"push": [str(place.path / "adapter" / "checkpoint-3"), "me/other"]},
        "no folder": {"push": [str(place.path / "absent"), "me/other"]},
        "bad id": {"push": [adapter, "me/my/other"]},
        "load absent": {"load": "me/absent", "base": "tiny/base"},
        "load gated": {"load": "me/gated", "base": "tiny/base"},
        "load revision": {
            "load": "me/adapter",
            "base": "tiny/base",
            "options": {"revision": "absent"},
        },
        "load private": {
            "load": "tiny/hidden",
            "base": "tiny/base",
            "options": {"token": "hf_stranger"},
        },
        "load no adapter": {"load": "tiny/base", "base": "tiny/base"},
    }
    with serve({"tiny/base": base, "tiny/carded": {"README.md": b"# Mine"}, "tiny/hidden": {}}) as (
        hub,
        env,
    ):
        hub.private.add("tiny/hidden")
        env |= {"HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_TOKEN": WRITER}

        def ask(calls: dict, **also: str) -> dict:
            return json.loads(python(ASK, json.dumps(calls), **env | also))

        answers = ask(calls)
        commits, asked = list(hub.commits), len(hub.requests)
        answers |= ask({"offline": calls["merged"]}, HF_HUB_OFFLINE="1")
        nobody = {"no token": calls["adapter"], "unreachable": calls["reader"]}
        answers |= ask(nobody, HF_TOKEN="", HF_ENDPOINT="http://127.0.0.1:9")
        assert len(hub.requests) == asked
    return SimpleNamespace(answers=answers, commits=commits, hub=hub, endpoint=env["HF_ENDPOINT"])


# ---- round trip


def test_an_adapter_comes_back_bit_for_bit(place, pushed):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert pushed.hub.repos["me/adapter"][name] == (place.path / "adapter" / name).read_bytes()
    bits = {key: tensor.numpy().tobytes().hex() for key, tensor in place.tensors.items()}
    assert pushed.answers["again"] == pushed.answers["at branch"] == bits
    assert pushed.answers["adapter"] == f"{pushed.endpoint}/me/adapter/commit/{COMMIT}"


def test_only_the_files_of_a_model_or_adapter_are_uploaded(place, pushed):
    first, branch, merged, gguf, _, carded = pushed.commits
    assert first | {"paths": sorted(first["paths"])} == {
        **{"repo": "me/adapter", "revision": "main", "summary": "The first", "paths": ADAPTER}
    }
    # the card of the first push stays
    assert branch["revision"] == "branch" and branch["paths"] == ADAPTER[1:]
    assert merged["repo"] == "me/merged"  # a name without an owner belongs to the user
    assert sorted(merged["paths"]) == ["README.md", "config.json", "model.safetensors"]
    assert sorted(gguf["paths"]) == ["README.md", "model.gguf"]
    assert (
        carded["paths"] == ADAPTER[1:] and pushed.hub.repos["tiny/carded"]["README.md"] == b"# Mine"
    )
    assert pushed.hub.private == {"me/adapter", "tiny/hidden"}
    assert not (place.path / "adapter" / "README.md").exists()
    assert b"secret" not in b"".join(
        content for repo in pushed.hub.repos.values() for content in repo.values()
    )


@pytest.mark.slow
def test_the_code_of_the_card_loads_the_pushed_adapter(place, pushed, tmp_path):
    """Run its code for minilora and for PEFT, without the tokenizer's lines: the logits agree."""
    card = pushed.hub.repos["me/adapter"]["README.md"].decode()
    assert is_ours(card)
    ours, theirs = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert ours.count("\n") == 6
    lines = "\n".join(line for line in (ours + theirs).splitlines() if "tokenizer" not in line)
    code = lines.replace("from peft", "first = model\nfrom peft") + CHECK
    with serve(pushed.hub.repos) as (_, env):
        printed = python(code, **env | {"HF_HOME": str(tmp_path), "HF_TOKEN": WRITER})
    error, learned = json.loads(printed.splitlines()[-1])
    assert error < 1e-4 and learned > 0.5  # fp32, sums in other orders


CHECK = """
import torch
with torch.no_grad():
    ids = torch.arange(9)[None]
    ours, theirs = first.float()(ids), model.float()(ids).logits
    with model.disable_adapter():
        plain = model(ids).logits
print([((other - theirs).norm() / theirs.norm()).item() for other in (ours, plain)])
"""


def test_a_models_adapter_is_pushed_without_a_folder(pushed):
    first, there = pushed.hub.repos["me/adapter"], pushed.hub.repos["me/model"]
    assert (
        sorted(there) == ADAPTER
        and there["adapter_model.safetensors"] == first["adapter_model.safetensors"]
    )
    assert (
        there["README.md"].decode().count("me/model")
        == first["README.md"].decode().count("me/adapter")
        == 2
    )


def test_the_command_prints_the_address(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        ml, "push_to_hub", lambda *given, **options: asked.append((given, options)) or "the/address"
    )
    assert (
        main(["push", "out", "me/it", "--private", "--message", "Two"]) == 0
        and main(["push", "out", "me/it"]) == 0
    )
    assert capsys.readouterr().out == "the/address\n" * 2
    first = {"private": True, "revision": None, "commit_message": "Two"}
    assert asked == [
        (("out", "me/it"), first),
        (("out", "me/it"), first | {"private": None, "commit_message": None}),
    ]


# ---- error


REFUSALS = {
    "no token": (
        "ValueError: not logged in to the Hub: run `hf auth login`, set HF_TOKEN, or in Python"
    ),
    "stranger": "OSError: 'me/other': .*401.* The Hub does not know this token. .* `hf auth login`",
    "reader": "OSError: 'me/other': .*403.* This token may not do that. .* `hf auth login`",
    "broken": "OSError: 'broken/adapter': .*500.* Try again later",
    "full": (
        "OSError: 'me/full': Error while uploading 'adapter_model.safetensors' to the Hub. "
        ".*403.* Try again"
    ),
    "not private": "ValueError: 'tiny/base' exists and is public",
    "no revision": "OSError: 'me/adapter' at revision 'absent': the Hub has no such revision",
    "no repository": (
        "OSError: 'me/absent' at revision 'branch' is neither a folder nor a file here, nor a repository"
    ),
    "gated": "OSError: 'me/gated' at revision 'branch' is gated",
    "nothing": "ValueError: .* holds neither an adapter .* nor a model",
    "no folder": "ValueError: .*absent is not a folder",
    "bad id": "HFValidationError: Repo id must be in the form",
    "offline": "OSError: 'merged': the Hub is not asked in offline mode",
    "unreachable": "OSError: 'me/other': no answer from the Hub",
    "load absent": "OSError: 'me/absent' is neither a folder nor a file here, nor a repository",
    "load gated": "OSError: 'me/gated' is gated: accept its licence on the Hub, then run `hf auth login`",
    "load revision": "OSError: 'me/adapter' at revision 'absent': the Hub has no such revision",
    "load private": (
        "OSError: 'tiny/hidden' is neither a folder nor a file here, nor a repository.*"
        "For a private one run `hf auth login`"
    ),
    "load no adapter": "FileNotFoundError: .*adapter_config.json: no such file",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_cause_or_the_remedy(pushed, case):
    assert re.match(REFUSALS[case], pushed.answers[case]), pushed.answers[case]


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="no adapter: write the model"):
        ml.push_to_hub(toy.llama(), "me/adapter")
