"""Tests that `load_model`, `load_tokenizer`, `load_adapter` and `inspect` accept a run folder.

Oracle: the base and the adapter's folder, loaded as they were trained. Errors: a base that cannot be
found or is not stated, a run that has not ended, and a folder with two results.
"""

import shutil

import pytest

import minilora as ml
from helpers.runs import broken_run, make_runs, same_state


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("place"))


# ---- oracle


@pytest.mark.parametrize("source", ["out", "out/adapter"])
def test_load_model_gives_the_base_as_trained_with_the_adapter(place, source, capsys):
    loaded = ml.load_model(place / source, dtype="float32")
    expected = ml.load_model(
        place / "model", quantize="nf4", double_quant=False, blocksize=32, dtype="float32"
    )
    ml.load_adapter(expected, place / "out" / "adapter")
    assert same_state(loaded, expected) and ml.list_adapters(loaded) == ["default"]
    assert loaded.name_or_path == str(place / "model")
    assert "is loaded in NF4 (block size 32, without double" in capsys.readouterr().err
    tokenizer = ml.load_tokenizer(place / source)
    assert ml.generate(loaded, tokenizer, "a") == ml.generate(expected, tokenizer, "a")


def test_load_model_takes_the_storage_that_is_asked_for(place):
    with pytest.warns(UserWarning, match="block size 32"):
        loaded = ml.load_model(place / "out", quantize="nf4", dtype="float32")
    layers = [module for module in loaded.modules() if isinstance(module, ml.NF4Linear)]
    assert {layer.blocksize for layer in layers} == {64}


def test_load_adapter_finds_the_adapter_of_a_run(place):
    model = ml.load_model(place / "model", dtype="float32")
    with pytest.warns(UserWarning, match="trained on a base that was in NF4"):
        ml.load_adapter(model, place / "out")
    assert ml.list_adapters(model) == ["default"]


def test_a_run_of_the_full_model_is_that_model(place):
    expected = ml.load_model(place / "model", dtype="float32")
    assert same_state(ml.load_model(place / "full", dtype="float32"), expected)
    assert ml.load_tokenizer(place / "full").chat_template


def test_inspect_describes_the_result_of_a_run(place):
    assert str(ml.inspect(place / "out")) == str(ml.inspect(place / "out" / "adapter"))
    assert str(ml.inspect(place / "full")) == str(ml.inspect(place / "model"))
    compared = ml.inspect(place / "out", place / "out" / "adapter")
    assert compared.kind == "two adapters"


# ---- error


@pytest.mark.parametrize("base", ["models/no-such-base", None])
def test_a_base_that_is_not_there_is_reported_with_the_remedy(base, place, tmp_path):
    source = broken_run(place, tmp_path, base)
    for load in (ml.load_model, ml.load_tokenizer):
        with pytest.raises((OSError, ValueError), match="Give the base yourself") as stop:
            load(source, local_files_only=True)
        assert repr(base) in str(stop.value)
        assert f"minilora generate BASE --adapter {source}" in str(stop.value)


def test_unclear_run_folders_are_refused(place, tmp_path):
    shutil.copytree(place / "out" / "adapter", tmp_path / "early" / "checkpoint-3")
    with pytest.raises(FileNotFoundError, match="the run has not ended.*checkpoint-3"):
        ml.load_model(tmp_path / "early")
    assert ml.list_adapters(ml.load_model(tmp_path / "early" / "checkpoint-3")) == ["default"]
    for source, name in (("out", "adapter"), ("full", "model")):
        shutil.copytree(place / source / name, tmp_path / "both" / name)
    with pytest.raises(ValueError, match="holds both adapter/ and model/"):
        ml.load_tokenizer(tmp_path / "both")
