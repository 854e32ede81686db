"""Tests that an adapter's base is recognised in every kind of storage.

The kinds are 16 or 32 bits, NF4 quantised from either, a bitsandbytes folder, and GGUF. Another
base is refused in each. Only bases that cannot be compared give a warning. A 4-bit layer keeps the
fingerprint of its source through copies, casts and files, and drops it when its codes change.
"""

import copy
import itertools
import json
import pickle
import re
import warnings
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from safetensors import safe_open
from torch import nn

from helpers.tiny import save
from minilora.common import read_tensors
from minilora.lora.config import LoRAConfig
from minilora.lora.files.base_check import KEY, fingerprint, read_binding, same_base, write_bound
from minilora.lora.files.save_load import WEIGHTS_FILE, load_adapter, save_adapter
from minilora.lora.inject import inject
from minilora.lora.merging.merge import dense
from minilora.lora.registry import lora_layers
from minilora.models.loader import load_model
from minilora.models.save import save_model
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantize_model import quantize_model

FIRST = "model.layers.0.self_attn.q_proj"
DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED = {
    **{kind: lambda layer, dtype=dtype: layer.to(dtype) for kind, dtype in DENSE.items()},
    "nf4": NF4Linear.from_linear,
    "nf4, plain scales": lambda layer: NF4Linear.from_linear(layer, double_quant=False),
    "nf4, blocks of 128": lambda layer: NF4Linear.from_linear(layer, 128),
    "nf4 of bf16": lambda layer: NF4Linear.from_linear(layer.bfloat16()),
    "nf4 of fp16": lambda layer: NF4Linear.from_linear(layer.half()),
}


def stored(linear: nn.Linear, kind: str) -> nn.Module:
    return STORED[kind](copy.deepcopy(linear))


def pair(dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    """Return a layer with values that `dtype` holds, and another of equal shape.

    The width is 33, so that rows of codes do not end with a byte.
    """
    return [nn.Linear(33, 70).to(dtype).float() for _ in range(2)]


def without_source(layer: nn.Module) -> NF4Linear:
    """Return the layer as it is read from a bitsandbytes folder."""
    assert isinstance(layer, NF4Linear)
    return NF4Linear(layer.weight)


# ---- property: the rules, kind by kind


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("then", "now"), itertools.product(STORED, STORED))
def test_same_base_accepts_the_source_and_rejects_another(source, then, now):
    """Only bf16 against fp16 is undecided: both were rounded from an unknown source."""
    one, other = pair(source)
    before, same, different = (
        fingerprint(stored(*given)) for given in ((one, then), (one, now), (other, now))
    )
    rounded = {kind.removeprefix("nf4 of ") for kind in (then, now)} == {"bf16", "fp16"}
    quantised = then.startswith("nf4") and now.startswith("nf4")
    assert same_base(before, different) is (None if rounded and not quantised else False)
    if source == torch.bfloat16 or not rounded:
        assert same_base(before, same) is True
    elif not quantised:
        assert same_base(before, same) is None


@pytest.mark.parametrize("kind", ["nf4", "nf4, plain scales", "nf4 of bf16"])
def test_same_base_without_a_source_compares_4_bit_codes_only(kind):
    one, other = pair(torch.bfloat16)
    known, read, unrelated = (
        stored(one, kind),
        without_source(stored(one, kind)),
        without_source(stored(other, kind)),
    )
    for a, b in itertools.permutations((known, read)):
        assert same_base(fingerprint(a), fingerprint(b)) is True
        assert same_base(fingerprint(a), fingerprint(unrelated)) is False
    for dtype in DENSE:
        assert same_base(fingerprint(read), fingerprint(stored(one, dtype))) is None
    assert (
        same_base(fingerprint(read), fingerprint(without_source(stored(one, "nf4, blocks of 128"))))
        is None
    )


def test_gguf_bases_are_rejected_only_against_gguf_bases():
    """Rows from GGUF may be rounded: only a difference from another GGUF base is conclusive."""
    one, other = pair()
    for kind in ("fp32", "bf16", "nf4"):
        a, b = (fingerprint(stored(layer, kind), "m-Q4_1.gguf") for layer in (one, other))
        assert a[0].startswith("gguf-") and same_base(a, b) is False and same_base(a, a) is True
        for then in ("fp32", "nf4"):
            # The rows are equal: the file held F32 or F16 and rounded nothing.
            assert same_base(fingerprint(stored(one, then)), a) is True
            assert same_base(fingerprint(stored(one, then)), b) is None


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_same_base_with_an_older_file_compares_its_one_hash(kind):
    one, other = pair()
    stored_as, shape, hashes = fingerprint(stored(one, kind))
    old = [stored_as, shape, hashes.split(",")[0].split(":")[1]]
    assert same_base(old, fingerprint(stored(one, kind))) is True
    assert same_base(old, fingerprint(stored(other, kind))) is False
    if kind == "nf4":
        assert same_base(old, fingerprint(one)) is None


# ---- property: the source of a 4-bit layer


def test_copies_casts_and_files_keep_the_source():
    layer = NF4Linear.from_linear(nn.Linear(64, 70, dtype=torch.bfloat16))
    expected, state = fingerprint(layer), layer.state_dict()
    assert [part.split(":")[0] for part in expected[2].split(",")] == ["nf4/64", "bf16", "fp16"]
    loaded, emptied = copy.deepcopy(layer), copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    for other in (loaded, emptied):
        other.load_state_dict(state)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded, emptied]
    copies += [copy.deepcopy(layer).to(dtype) for dtype in DENSE.values()]
    copies += [nn.Sequential(copy.deepcopy(layer)).half().to("cpu")[0]]
    assert all(fingerprint(copied) == expected for copied in copies)
    assert isinstance(layer.source, str) and len(layer.source) < 100


def test_the_source_adds_nothing_to_the_state_dict():
    layer = NF4Linear.from_linear(nn.Linear(64, 70))
    plain = without_source(layer)
    assert layer.state_dict().keys() - {"bias"} == plain.state_dict().keys()
    assert (
        dict(layer.named_buffers()) == {} and len(list(layer.parameters())) == 5
    )  # four parts and a bias


def test_other_codes_make_the_source_unknown():
    layer, other = (NF4Linear.from_linear(nn.Linear(64, 70)) for _ in range(2))
    layer.load_state_dict(other.state_dict())
    assert fingerprint(layer)[2] == fingerprint(other)[2].split(",")[0]
    assert NF4Linear.from_linear(nn.Linear(64, 70, device="meta")).source is None


# ---- round trip: whole models, from their files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with two bases in bf16, each also in bitsandbytes' 4 bits.

    The first base is also there as GGUF files in F32 and Q8_0.
    """
    folder = tmp_path_factory.mktemp("bases")
    for name, seed in (("one", 0), ("other", 1)):
        save(folder / name, dtype=torch.bfloat16, seed=seed)
        save_model(
            load(folder, name, quantize="nf4"), folder / f"{name}, bitsandbytes", format="bnb-4bit"
        )
    dense = load(folder, "one")
    save_model(dense, folder / "one, f32.gguf", format="gguf", dtype="float32")
    save_model(dense, folder / "one, q8_0.gguf", format="gguf", dtype="q8_0")
    return folder


def load(folder, name: str, **options) -> nn.Module:
    return load_model(folder / name, dtype=options.pop("dtype", "float32"), device="cpu", **options)


def adapter(place, name, model=None, **options):
    model = load(place, name, **options) if model is None else model
    inject(model, LoRAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for layer in lora_layers(model).values():
        nn.init.ones_(layer.adapters["default"].get_parameter("lora_B"))
    save_adapter(model, folder := Path(mkdtemp(dir=place)))
    return folder


OTHER_STORAGE = ".*was trained on a base that was"  # tests/lora/test_storage.py
NF4 = {"quantize": "nf4"}
LOADS = [{"dtype": "bfloat16"}, {}, NF4, NF4 | {"double_quant": False}, NF4 | {"dtype": "bfloat16"}]
NAMES = ["bf16", "fp32", "nf4", "nf4 plain", "nf4 in bf16"]


@pytest.mark.parametrize("loaded", LOADS, ids=NAMES)
@pytest.mark.parametrize("trained", LOADS, ids=NAMES)
def test_adapter_loads_on_its_base_in_every_form_and_on_no_other(place, trained, loaded):
    folder = adapter(place, "one", **trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=OTHER_STORAGE)
        load_adapter(load(place, "one", **loaded), folder)
    model = load(place, "other", **loaded)
    with pytest.raises(
        ValueError, match=f"another base: {FIRST} holds other weights.*check_base=False"
    ):
        load_adapter(model, folder)
    assert not lora_layers(model)


def test_quantize_model_keeps_the_source(place):
    folder = adapter(place, "one", dtype="bfloat16")
    for name, works in (("one", True), ("other", False)):
        model = load(place, name)
        quantize_model(model)
        if works:
            load_adapter(model, folder)
        else:
            with pytest.raises(ValueError, match="another base"):
                load_adapter(model, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_4_bit_base_made_dense_is_the_base_that_was_trained(place, dtype):
    """An adapter of the 4-bit base loads on the dense one, and the reverse."""
    for name, works in (("one", True), ("other", False)):
        model = load(place, name, **NF4)
        for path, layer in model.named_modules():
            if isinstance(layer, NF4Linear):
                model.set_submodule(path, dense(layer, dtype))
        trained = [adapter(place, "one", **NF4), adapter(place, "one", model=copy.deepcopy(model))]
        for folder, base in zip(trained, (model, load(place, "one", **NF4)), strict=True):
            if works:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    warnings.filterwarnings("ignore", message=OTHER_STORAGE)
                    load_adapter(base, folder)
            else:
                with pytest.raises(ValueError, match="another base"):
                    load_adapter(base, folder)


def test_bitsandbytes_folders_are_known_by_their_codes(place):
    for trained, loaded in itertools.permutations([("one", NF4), ("one, bitsandbytes", {})]):
        folder = adapter(place, trained[0], **trained[1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=OTHER_STORAGE)
            load_adapter(load(place, loaded[0], **loaded[1]), folder)
            load_adapter(load(place, "one"), folder)  # the source, which quantises to these codes
        with pytest.raises(ValueError, match="another base"):
            load_adapter(load(place, loaded[0].replace("one", "other"), **loaded[1]), folder)


@pytest.mark.parametrize(
    ("trained", "loaded", "kinds"),
    [
        ("one", "one, bitsandbytes", "was fp32, is nf4/64"),
        ("one, bitsandbytes", "other", "was nf4/64, is fp32"),
        ("one", "one, q8_0.gguf", "was fp32, is gguf-fp32"),
        ("one, q8_0.gguf", "one", "was gguf-fp32, is fp32"),
    ],
)
def test_bases_that_cannot_be_compared_give_a_one_line_warning(place, trained, loaded, kinds):
    folder = adapter(place, trained)
    with pytest.warns(
        UserWarning, match=f"6 layers cannot be compared with the base: {FIRST} {kinds}"
    ) as said:
        load_adapter(load(place, loaded), folder)
    messages = [str(warning.message) for warning in said]
    messages = [message for message in messages if not re.match(OTHER_STORAGE, message)]
    assert len(messages) == 1 and "\n" not in messages[0]


def test_gguf_that_was_not_quantised_is_the_same_base(place):
    folder = adapter(place, "one", **NF4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=OTHER_STORAGE)
        load_adapter(load(place, "one, f32.gguf"), folder)
        load_adapter(load(place, "one, f32.gguf", **NF4), folder)


def test_older_files_load(place):
    """Older files have one hash per layer, of the stored weight, and one of the whole tokenizer."""
    path = adapter(place, "one") / WEIGHTS_FILE
    bound = read_binding(path)
    bound["tokenizer"] = "0123456789abcdef"
    for entry in bound["layers"].values():
        entry[2] = entry[2].split(",")[0].split(":")[1]
    write_bound(path, read_tensors(path), bound)
    with safe_open(path, framework="pt") as file:
        assert len(json.loads(file.metadata()[KEY])["layers"][FIRST][2]) == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=OTHER_STORAGE)
        load_adapter(load(place, "one"), path.parent)
    with pytest.raises(ValueError, match="another base"):
        load_adapter(load(place, "other"), path.parent)
