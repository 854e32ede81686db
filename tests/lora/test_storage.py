"""Tests that an adapter file states the storage of its base, and that a difference is reported.

Oracle: PEFT loads the folder with the same tensors and logits. Round trip: dense, and 4 bits with
one and with two levels of scales; the statement survives another load and save. Errors: a warning,
once, with the way to load the base as it was trained on.
"""

import json
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

import minilora as ml
from helpers.kinds import shake
from helpers.tiny import oracle, tokens, twin
from helpers.toy import FAST, Letters, llama, rows
from minilora.lora.files.base_check import KEY, read_binding
from minilora.lora.files.find import WEIGHTS_FILE
from minilora.quant.storage import base_storage, stored_storage

CONFIG = ml.LoRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
NF4 = {"quantize": "nf4", "blocksize": 64, "double_quant": True}
STORAGES: dict[str, dict[str, Any]] = {
    "dense": {"quantize": None},
    "double": NF4,
    "single": NF4 | {"double_quant": False},
    "128": NF4 | {"blocksize": 128},
}


def base(storage: dict[str, Any]) -> Any:
    """Return a base in a storage."""
    model = twin(oracle())
    if storage["quantize"]:
        ml.quantize_model(model, storage["blocksize"], storage["double_quant"])
    return model


def save(model: Any, folder: Any) -> None:
    ml.inject(model, CONFIG)
    shake(model)
    ml.save_adapter(model, folder)


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_file_states_the_storage_and_loads_into_it_silently(storage, tmp_path):
    save(base(storage), tmp_path)
    assert stored_storage(read_binding(tmp_path / WEIGHTS_FILE)) == storage
    model = base(storage)
    assert base_storage(model) == storage
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.load_adapter(model, tmp_path)


def test_peft_loads_a_folder_that_states_a_storage(tmp_path):
    dense = twin(oracle())
    save(dense, tmp_path)
    expected = dense(tokens(2, 5))
    theirs = PeftModel.from_pretrained(oracle(), str(tmp_path))
    with torch.no_grad():
        # fp32 roundings of two decoders, whose logits are about 1
        assert (theirs(tokens(2, 5)).logits - expected).abs().max() < 1e-4


DIFFERENT = [
    ("double", "dense", 'quantize="nf4", blocksize=64, double_quant=True'),
    ("single", "dense", 'quantize="nf4", blocksize=64, double_quant=False'),
    ("single", "double", "double_quant=False"),
    ("dense", "double", "Load the base without quantize"),
    ("128", "double", "blocksize=128"),
]


@pytest.mark.parametrize(("trained", "now", "remedy"), DIFFERENT)
def test_base_in_another_storage_is_reported_with_the_remedy(trained, now, remedy, tmp_path):
    save(base(STORAGES[trained]), tmp_path)
    with pytest.warns(UserWarning) as caught:
        ml.load_adapter(base(STORAGES[now]), tmp_path, check_base=False)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1 and remedy in messages[0]
    assert "was trained on a base that was" in messages[0]
    assert caught[0].filename == __file__


def test_storage_of_training_survives_a_load_into_another_base(tmp_path):
    save(base(NF4), tmp_path / "first")
    model = base(STORAGES["dense"])
    with pytest.warns(UserWarning, match="was trained on a base"):
        ml.load_adapter(model, tmp_path / "first")
    ml.save_adapter(model, tmp_path / "second")
    assert stored_storage(read_binding(tmp_path / "second" / WEIGHTS_FILE)) == NF4


def test_training_states_the_storage_that_it_saw(tmp_path):
    model = llama()
    ml.inject(model, CONFIG)
    ml.quantize_model(model)
    ml.train(model, Letters(), rows(), ml.TrainConfig(**FAST | {"max_steps": 1}))
    ml.save_adapter(model, tmp_path)
    assert stored_storage(read_binding(tmp_path / WEIGHTS_FILE)) == NF4


def test_files_of_earlier_versions_state_their_layers_kind(tmp_path):
    save(base(STORAGES["single"]), tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        metadata = json.loads(file.metadata()[KEY])
    del metadata["storage"]
    assert stored_storage(metadata) == NF4 | {"double_quant": None}
    assert stored_storage({}) is None


def test_sum_of_adapters_states_a_storage_that_both_have(tmp_path):
    for name in ("dense", "double"):
        save(base(STORAGES[name]), tmp_path / name)
    one, other = (ml.AdapterWeights.load(tmp_path / name) for name in ("dense", "double"))
    assert (one + one).bound["storage"] == STORAGES["dense"]
    assert (one + other).bound["storage"] is None
