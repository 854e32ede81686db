"""Tests that the commands load a base as it was stored while the adapter was trained.

Oracle: the Python calls with the same storage. Errors: a storage that the command names itself, and
that differs, is reported.
"""

import json
import warnings

import pytest
import torch

import minilora as ml
from helpers.chats import furnish
from helpers.kinds import shake
from minilora.cli.main import main

ROWS = [{"prompt": f"{n} plus 1", "completion": str(n + 1)} for n in range(4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a model, rows, and an adapter that was trained on NF4 with one level of scales."""
    folder = furnish(tmp_path_factory.mktemp("place"), rows=ROWS)
    model = quantised(folder)
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj", "up_proj"]))
    shake(model)
    ml.save_adapter(model, folder / "adapter")
    return folder


def quantised(place):
    return ml.load_model(place / "model", quantize="nf4", double_quant=False, dtype="float32")


def loss(place, output: str) -> float:
    return json.loads(output.splitlines()[-1])["loss"]


def expected_loss(place, model) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ml.load_adapter(model, place / "adapter")
    tokenizer = ml.load_tokenizer(place / "model")
    return ml.evaluate(model, tokenizer, ROWS, max_new_tokens=0).loss


def run(place, command: str, *options: str) -> list[str]:
    return [command, str(place / "model"), *options, "--dtype", "float32"]


def test_evaluate_loads_the_base_as_the_adapter_was_trained(place, capsys):
    adapter = ["--adapter", str(place / "adapter"), "--max_new_tokens", "0"]
    command = run(place, "evaluate", str(place / "rows.jsonl"), *adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(command) == 0
    printed = capsys.readouterr()
    assert loss(place, printed.out) == expected_loss(place, quantised(place))
    line = "the base is loaded in NF4 (block size 64, without double quantisation)"
    assert printed.err.count(line) == 1 and "--quantize none" in printed.err

    with pytest.warns(UserWarning, match="was trained on a base that was in NF4"):
        assert main([*command, "--quantize", "none"]) == 0
    dense = ml.load_model(place / "model", dtype="float32")
    assert loss(place, capsys.readouterr().out) == expected_loss(place, dense)


def test_merge_starts_from_the_base_that_was_trained_on(place, tmp_path, capsys):
    adapter = str(place / "adapter")
    assert main(run(place, "merge", adapter, str(tmp_path / "merged"))) == 0
    model = quantised(place)
    ml.load_adapter(model, adapter)
    expected = ml.merge(model).state_dict()
    merged = ml.load_model(tmp_path / "merged", dtype="float32").state_dict()
    assert all(torch.equal(merged[key], value) for key, value in expected.items())

    with warnings.catch_warnings():  # the target itself is another storage
        warnings.simplefilter("error")
        options = [adapter, str(tmp_path / "original"), "--target", "original"]
        assert main(run(place, "merge", *options)) == 0
    capsys.readouterr()


def test_generate_needs_no_storage_without_an_adapter(place, capsys):
    assert main(run(place, "generate", "1 plus 1", "--max_new_tokens", "2")) == 0
    assert "the base is loaded" not in capsys.readouterr().err


def test_serve_loads_the_base_as_its_adapters_were_trained(place, monkeypatch, capsys):
    served = {}

    def serve(model, tokenizer, adapters, config, check_base):
        served["storage"] = {type(module).__name__ for module in model.modules()}

    monkeypatch.setattr(ml, "serve", serve)
    assert main(run(place, "serve", "--adapter", f"a={place / 'adapter'}")) == 0
    assert "NF4Linear" in served["storage"]
    capsys.readouterr()
