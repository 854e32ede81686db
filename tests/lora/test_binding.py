"""Tests of the base and the tokenizer that an adapter file records.

Another base of equal shape is refused, and so is another tokenizer or chat template. PEFT reads the
file. Equal contents give equal bytes in every process, although safetensors writes its metadata in
a random order. test_base_kinds.py tests bases in other kinds of storage.
"""

import copy
import json
import shutil
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.tiny import oracle, python, tokens, twin
from helpers.toy import FAST, Letters, llama, lora, rows
from minilora.lora.active import delete_adapter
from minilora.lora.config import LoRAConfig
from minilora.lora.files.base_check import KEY, fingerprint, hash_tokenizer
from minilora.lora.files.save_load import WEIGHTS_FILE, load_adapter, save_adapter
from minilora.lora.inject import inject
from minilora.lora.registry import lora_layers
from minilora.quant.fingerprint import ROWS
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantize_model import quantize_model
from minilora.training.config import TrainConfig
from minilora.training.loop import train

TARGETS = ["q_proj", "up_proj"]
FIRST = "model.layers.0.self_attn.q_proj"


class Spelled(Letters):
    """Letters with `convert_ids_to_tokens`, which identifies a vocabulary.

    Two vocabularies can differ in their last letter.
    """

    last = "z"

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.decode([i]).replace("z", self.last) for i in ids]


def adapted(model: nn.Module, seed: int = 0) -> nn.Module:
    inject(model, LoRAConfig(r=2, target_modules=TARGETS), seed=seed)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.adapters["default"].get_parameter("lora_B"), generator=generator)
    return model


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return twin(oracle())


@pytest.fixture
def saved(base, tmp_path):
    save_adapter(adapted(copy.deepcopy(base), seed=7), tmp_path)
    return tmp_path


def metadata(folder) -> dict:
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return json.loads(file.metadata()[KEY])


def silently(model, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*was trained on a base that was")
        return load_adapter(model, folder, **options)


# ---- oracle: PEFT


def test_peft_reads_fingerprinted_files_and_we_read_files_without(tmp_path):
    from peft import PeftModel

    reference = oracle()
    ours = adapted(copy.deepcopy(reference))
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(reference), str(tmp_path / "ours")).eval()
    expected = ours(tokens(1, 8)).logits
    torch.testing.assert_close(theirs(tokens(1, 8)).logits, expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = oracle(seed=1)  # PEFT's file does not record its base: no comparison, no warning
    silently(again, tmp_path / "theirs")


# ---- property


def test_metadata_holds_seed_version_tokenizer_and_layers(saved):
    values = metadata(saved)
    assert values["seed"] == 7 and values["version"] and values["tokenizer"] is None
    assert values["layers"].keys() == {
        f"model.layers.{i}.{n}" for i in range(3) for n in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert values["layers"][FIRST][:2] == ["fp32", [64, 64]]


@pytest.mark.slow
def test_equal_contents_are_equal_bytes_in_every_process(tmp_path):
    """safetensors keeps metadata in a hash map with a random seed per process.

    In its own order, 8 files would be equal by chance once in 128 runs.
    """
    code = """
import sys, hashlib, pathlib, torch
from minilora.lora.files.base_check import write_bound
path = pathlib.Path(sys.argv[1]) / "a.safetensors"
for i in range(4):
    write_bound(path, {"ä": torch.ones(3), "b": torch.zeros(2, 2)}, {"version": "ö", "layers": {}})
    print(hashlib.sha256(path.read_bytes()).hexdigest())
"""
    assert len(set((python(code, tmp_path) + python(code, tmp_path)).split())) == 1
    assert load_file(tmp_path / "a.safetensors").keys() == {"ä", "b"}


@given(st.integers(1, 200), st.integers(1, 9), st.booleans())
def test_a_fingerprint_reads_64_rows_and_notices_any_change_in_them(out, width, nf4):
    linear = nn.Linear(width * 2, out, bias=False)
    changed = copy.deepcopy(linear)
    changed.weight.data[0].neg_()  # the first row is always read
    layers = [NF4Linear.from_linear(layer) if nf4 else layer for layer in (linear, changed)]
    one, other = map(fingerprint, layers)
    assert (
        one[:2] == other[:2] == ["nf4/64" if nf4 else "fp32", [out, width * 2]]
        and one[2] != other[2]
    )
    rows = {i * out // min(ROWS, out) for i in range(min(ROWS, out))}
    changed.weight.data = linear.weight.data.clone()
    changed.weight.data[[i for i in range(out) if i not in rows]] = 5
    assert fingerprint(changed) == fingerprint(linear) and len(rows) == min(64, out)


@pytest.mark.parametrize(
    "layer", [nn.Embedding(70, 6), nn.Conv1d(4, 70, 3), nn.Conv2d(4, 70, 3).bfloat16()]
)
def test_a_weight_of_any_rank_has_a_fingerprint(layer):
    kind, shape, hashes = fingerprint(layer)
    assert shape == list(layer.weight.shape) and hashes.startswith(f"{kind}:")
    assert (
        fingerprint(layer.to(memory_format=torch.channels_last) if len(shape) == 4 else layer)[2]
        == hashes
    )
    layer.weight.data[63 * 70 // 64][..., -1] += 1  # in the last row that is read
    assert fingerprint(layer)[2] != hashes


def test_nf4_fingerprint_ignores_double_quantisation_and_dtype():
    linear = nn.Linear(33, 70)  # rows of codes do not end with a byte
    plain, double = (NF4Linear.from_linear(linear, double_quant=flag) for flag in (False, True))
    assert fingerprint(plain) == fingerprint(double) == fingerprint(double.to(torch.bfloat16))
    assert fingerprint(plain)[2] != fingerprint(NF4Linear.from_linear(nn.Linear(33, 70)))[2]


# ---- round trip: the same base is recognised


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_checkpoint_in_two_dtypes_is_one_base(base, tmp_path, dtype):
    """The cast to fp32 is exact, so that the adapter may be saved on either of the two."""
    low = copy.deepcopy(base).to(dtype)
    high = copy.deepcopy(low).float()
    for trained_on, loaded_into in ((low, high), (high, low)):
        save_adapter(adapted(copy.deepcopy(trained_on)), tmp_path)
        silently(copy.deepcopy(loaded_into), tmp_path)


def test_the_same_base_loads_silently_next_to_another_adapter(base, saved):
    model = copy.deepcopy(base)
    silently(model, saved)
    silently(model, saved, name="second")
    save_adapter(model, saved / "again", name="second")
    # The bytes are equal, so that the seed was loaded and saved again.
    assert (saved / "again" / WEIGHTS_FILE).read_bytes() == (saved / WEIGHTS_FILE).read_bytes()


def test_train_records_the_tokenizer_for_all_later_files(tmp_path):
    """Checkpoints and saved adapters record the tokenizer; so does a file saved after loading."""
    model, tokenizer = lora(), Spelled()
    train(
        model,
        tokenizer,
        rows(),
        TrainConfig(**FAST | {"save_steps": 3}, output_dir=tmp_path / "run"),
    )
    save_adapter(model, tmp_path / "end")
    again = llama()
    silently(again, tmp_path / "end", tokenizer=tokenizer)
    save_adapter(again, tmp_path / "again")
    for folder in ("run/checkpoint-3", "run/checkpoint-5", "end", "again"):
        assert metadata(tmp_path / folder)["tokenizer"] == hash_tokenizer(tokenizer), folder
    silently(again, tmp_path / "end", name="second")
    delete_adapter(again, "default")
    save_adapter(lora(again), tmp_path / "new")
    assert metadata(tmp_path / "new")["tokenizer"] is None
    assert hash_tokenizer(Letters()).keys() == {"chat_template"}  # its tokens are unknown


def test_a_padded_vocabulary_is_the_same_one():
    """GGUF names the ids between the tokenizer's last id and the embedding's last id."""

    class Padded(Spelled):
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [*super().convert_ids_to_tokens(ids[:131]), "[PAD131]", "[PAD132]"]

        def __len__(self) -> int:
            return 133

    assert hash_tokenizer(Padded()) == hash_tokenizer(Spelled())


# ---- error


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4 bits"])
def test_another_base_of_equal_shape_is_refused_and_the_model_untouched(base, tmp_path, quantised):
    """PEFT loads onto different base weights of equal shape without a warning."""
    models = [copy.deepcopy(base), twin(oracle(seed=1))]
    if quantised:
        for model in models:
            quantize_model(model)
    save_adapter(adapted(copy.deepcopy(models[0])), tmp_path)
    silently(models[0], tmp_path)
    with pytest.raises(
        ValueError, match=f"another base: {FIRST} holds other weights.*check_base=False"
    ):
        load_adapter(models[1], tmp_path)
    assert not lora_layers(models[1])
    silently(models[1], tmp_path, check_base=False)
    assert lora_layers(models[1])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"chat_template": "{{ messages }}"}, "another chat_template"),
        ({"last": "Z"}, "another vocabulary"),
        (
            {"chat_template": "{{ messages }}", "last": "Z"},
            "another chat_template and another vocabulary",
        ),
    ],
)
def test_another_tokenizer_is_refused_and_the_difference_is_named(base, tmp_path, change, what):
    tokenizer: Any = Spelled()
    save_adapter(adapted(copy.deepcopy(base)), tmp_path, tokenizer=tokenizer)
    silently(copy.deepcopy(base), tmp_path, tokenizer=tokenizer)
    vars(tokenizer).update(change)
    model = copy.deepcopy(base)
    with pytest.raises(
        ValueError, match=f"trained with {what}. Use the .*check_base=False .--no_check_base"
    ):
        load_adapter(model, tmp_path, tokenizer=tokenizer)
    assert not lora_layers(model)
    silently(model, tmp_path, tokenizer=tokenizer, check_base=False)
    silently(copy.deepcopy(base), tmp_path)  # without a tokenizer: not compared


def test_one_changed_layer_is_enough_to_refuse(base, saved):
    model = copy.deepcopy(base)
    model.get_submodule("model.layers.2.mlp.up_proj").weight.data += 1e-3
    with pytest.raises(ValueError, match="model.layers.2.mlp.up_proj holds other weights"):
        load_adapter(model, saved)
    model = copy.deepcopy(base)
    # This layer has no adapter and is not compared.
    model.get_submodule("model.layers.2.mlp.down_proj").weight.data += 1e-3
    silently(model, saved)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"layers": {"a": 1}}',
        '{"layers": {"a": ["fp32"]}}',
        '{"layers": {"a": ["fp32", [1], "fp32:1,"]}}',
    ],
)
def test_damaged_metadata_is_refused(base, saved, tmp_path, text):
    shutil.copytree(saved, tmp_path / "damaged")
    save_file(
        load_file(saved / WEIGHTS_FILE), tmp_path / "damaged" / WEIGHTS_FILE, metadata={KEY: text}
    )
    with pytest.raises(ValueError, match="metadata 'minilora' is damaged"):
        load_adapter(copy.deepcopy(base), tmp_path / "damaged")
