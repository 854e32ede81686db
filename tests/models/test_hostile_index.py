"""Tests that contradicting shards, indexes and ties, and links out of the folder, are refused."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import minilora as ml
from helpers.tiny import oracle, twin
from minilora.models.save import save_model
from tests.models.test_hostile_files import refused

INDEX = "model.safetensors.index.json"
NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Save a model in two shards: the norm in b, all other tensors in a."""
    save_model(twin(oracle(num_hidden_layers=1)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    save_file({NORM: tensors.pop(NORM)}, tmp_path / "b.safetensors")
    save_file(tensors, tmp_path / "a.safetensors")
    index(tmp_path, **dict.fromkeys(tensors, "a.safetensors") | {NORM: "b.safetensors"})
    ml.load_model(tmp_path, dtype="float32", device="cpu")  # the model loads at first
    return tmp_path


def index(folder: Path, **places: str) -> None:
    old = (
        json.loads((folder / INDEX).read_text())["weight_map"] if (folder / INDEX).is_file() else {}
    )
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": old | places}))


def test_an_index_that_swaps_two_files_is_refused(folder):
    index(folder, **{NORM: "a.safetensors", EMBEDDING: "b.safetensors"})
    refused(folder, "tensor .* is in [ab].safetensors, but .*index.json names [ab].safetensors")


def test_a_tensor_in_two_shards_is_refused(folder):
    tensors = load_file(folder / "a.safetensors")
    save_file(
        tensors | {NORM: tensors["model.layers.0.input_layernorm.weight"].clone()},
        folder / "a.safetensors",
    )
    refused(folder, f"tensor {NORM} is in both .*a.safetensors and .*b.safetensors")


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_an_index_that_names_another_file_is_refused(folder, name):
    index(folder, **{NORM: name})
    refused(folder, f"{name} is damaged or cut off")


def test_an_index_that_names_a_folder_or_a_circular_link_is_refused(folder):
    (folder / "c").mkdir()
    index(folder, **{NORM: "c"})
    refused(folder, "c is missing")
    (folder / "d").symlink_to("d")
    index(folder, **{NORM: "d"})
    refused(folder, "d is missing")


def test_links_out_of_the_folder_are_refused(folder, tmp_path_factory):
    """A link out of the folder is refused, also through a second link.

    Links within the folder, and those of the Hub's cache, are accepted.
    """
    outside = tmp_path_factory.mktemp("outside")
    (folder / "b.safetensors").rename(outside / "b.safetensors")
    (folder / "b.safetensors").symlink_to(outside / "b.safetensors")
    refused(folder, "b.safetensors is a link to .*outside.*b.safetensors, outside its folder")
    (folder / "b.safetensors").unlink()
    (folder / "other").symlink_to(outside / "b.safetensors")
    (folder / "b.safetensors").symlink_to("other")
    refused(folder, "outside its folder")
    (outside / "b.safetensors").rename(folder / "real")
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").symlink_to("real")
    ml.load_model(folder, dtype="float32", device="cpu")

    revision = outside / "snapshots" / "0123"
    for old in sorted(folder.glob("*.*")):
        blob = outside / "blobs" / old.name.replace(".", "")
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(old.read_bytes())
        revision.mkdir(parents=True, exist_ok=True)
        (revision / old.name).symlink_to(blob)
    ml.load_model(revision, dtype="float32", device="cpu")


def test_a_tied_config_with_another_head_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refused(folder, "lm_head.weight is not the embedding, but config.json ties the two")
    tensors = load_file(folder / "a.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING][:5].clone()}, folder / "a.safetensors")
    refused(folder, "lm_head.weight is not the embedding, but config.json ties the two")
    del tensors[HEAD]
    save_file(tensors, folder / "a.safetensors")
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    places.pop(HEAD)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    ml.load_model(folder, dtype="float32", device="cpu")
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    refused(folder, "lacks lm_head.weight, which its config asks for")
