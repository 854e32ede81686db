"""Tests that no file hangs, crashes or fills memory.

A file that is not a model raises ValueError or OSError within a second. Property (hypothesis): any
hostile value at any position of a safetensors header, an index, a config, a quant_state or a GGUF
header. Then single attacks by name: claims of 10 GB and of endless counts, paths that leave the
folder, deep nesting. Each load is timed, and its peak memory is measured if the system reports it.
"""

import json
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import minilora as ml
from helpers.tiny import oracle, twin
from minilora.data import load_tokenizer
from minilora.models.gguf.header import read_header
from minilora.models.save import save_model
from tests.models.test_gguf import write

NASTY = [
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**63,
    10**30,
    0.5,
    1e400,
    float("nan"),
    "",
    "x",
    "../x",
    [],
    [[]],
    {},
    {"a": 1},
]
NASTY += [
    [-1],
    [2**40, 2**40],
    [0, 2**63],
    ["x"],
    "F8_E4M3",
    "I8",
    "BOOL",
    "F64",
    "nf4",
    "llama3",
    "\0",
]
GROWTH = 64e6  # bytes by which a load may raise the peak; an attack asks for gigabytes


def peak() -> int:
    text = Path("/proc/self/status").read_text() if sys.platform == "linux" else "VmHWM: 0 kB"
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


@contextmanager
def frugal() -> Iterator[None]:
    """Assert that a block takes less than a second and little memory."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    before, start = peak(), time.process_time()
    yield
    assert time.process_time() - start < 1
    assert peak() - before < GROWTH


def attempt(source: Path, **options) -> None:
    """Load a model, or check that the error is a ValueError or OSError with a message."""
    with frugal():
        try:
            ml.load_model(source, dtype="float32", device="cpu", **options)
        except (ValueError, OSError) as error:
            assert str(error)


def refused(source: Path, message: str) -> None:
    with frugal(), pytest.raises((ValueError, OSError), match=message):
        ml.load_model(source, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    save_model(twin(oracle(num_hidden_layers=1)), folder)
    return folder


@pytest.fixture(scope="module")
def bnb(tmp_path_factory) -> Path:
    model = twin(oracle(num_hidden_layers=1))
    ml.quantize_model(model)
    save_model(model, tmp_path_factory.mktemp("bnb"), format="bnb-4bit")
    return tmp_path_factory.getbasetemp() / "bnb0"


@pytest.fixture(scope="module")
def one_gguf(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", oracle(num_hidden_layers=1))


def copy(folder: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for old in target.iterdir():
        old.unlink()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def header_of(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(path: Path, header, data: bytes, size: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


nasty = st.sampled_from(NASTY)


# ---- any value at any position


@settings(max_examples=80)
@given(data=st.data())
def test_safetensors_headers(dense, tmp_path_factory, data):
    folder = copy(dense, tmp_path_factory.getbasetemp() / "header")
    header, rest = header_of(folder / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["", "dtype", "shape", "data_offsets"]))
    if field:
        header[name][field] = data.draw(nasty)
    else:
        header[name] = data.draw(nasty)
    with_header(folder / "model.safetensors", header, rest)
    attempt(folder)


@settings(max_examples=150)
@given(data=st.data())
def test_configs(bnb, dense, tmp_path_factory, data):
    folder = copy(
        data.draw(st.sampled_from([dense, bnb])), tmp_path_factory.getbasetemp() / "config"
    )
    config = json.loads((folder / "config.json").read_text())
    place = config
    if "quantization_config" in config and data.draw(st.booleans()):
        place = config["quantization_config"]
    place[data.draw(st.sampled_from([*place, "rope_parameters", "layer_types"]))] = data.draw(nasty)
    (folder / "config.json").write_text(json.dumps(config))
    attempt(folder)


@settings(max_examples=60)
@given(data=st.data())
def test_indexes(dense, tmp_path_factory, data):
    folder = copy(dense, tmp_path_factory.getbasetemp() / "index")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    places: dict = dict.fromkeys(
        header_of(folder / "a.safetensors")[0].keys() - {"__metadata__"}, "a.safetensors"
    )
    index: dict = {"metadata": {}, "weight_map": places}
    place = data.draw(st.sampled_from([index, places]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(nasty)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    attempt(folder)


@settings(max_examples=80)
@given(data=st.data())
def test_quant_states(bnb, tmp_path_factory, data):
    folder = copy(bnb, tmp_path_factory.getbasetemp() / "state")
    tensors = load_file(folder / "model.safetensors")
    key = data.draw(st.sampled_from([key for key in tensors if "quant_state" in key]))
    state = json.loads(bytes(tensors[key].tolist()))
    state[data.draw(st.sampled_from(sorted(state)))] = data.draw(nasty)
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    attempt(folder)


@settings(max_examples=80)
@given(data=st.data())
def test_gguf_headers(one_gguf, tmp_path_factory, data):
    """Replace eight bytes anywhere in the header; then read the model and the tokenizer."""
    raw = one_gguf.read_bytes()
    _, records = read_header(one_gguf)
    place = data.draw(st.integers(4, min(record.offset for record in records.values()) - 8))
    value = data.draw(st.sampled_from([0, 1, 255, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
    path = tmp_path_factory.getbasetemp() / "hostile.gguf"
    path.write_bytes(raw[:place] + struct.pack("<Q", value) + raw[place + 8 :])
    attempt(path)
    with frugal():
        try:
            load_tokenizer(path)
        except (ValueError, OSError) as error:
            assert str(error)


# ---- single attacks


def test_safetensors_with_false_sizes_or_dtypes_are_refused(dense, tmp_path):
    path = copy(dense, tmp_path) / "model.safetensors"
    header, data = header_of(path)
    norm, embedding = header["model.norm.weight"], header["model.embed_tokens.weight"]
    for size in (2**63, 10**10, 10**8 + 1, 2**64 - 1):
        with_header(path, header, data, size)
        refused(tmp_path, "is damaged or cut off")
    with_header(path, b"{" * 10_000, data)
    refused(tmp_path, "is damaged or cut off")
    begin, end = norm["data_offsets"]
    for change in (
        {"shape": [10**10]},
        {"shape": [2**62, 2**62]},
        {"data_offsets": embedding["data_offsets"]},  # two tensors at one place
        {"data_offsets": [begin, 10**10]},
        {"data_offsets": [end, begin]},
        {"dtype": "F99"},
    ):
        with_header(path, header | {"model.norm.weight": norm | change}, data)
        refused(tmp_path, "is damaged or cut off")
    for dtype in ("I32", "U32"):
        with_header(path, header | {"model.norm.weight": norm | {"dtype": dtype}}, data)
        refused(
            tmp_path, "model.norm.weight is torch.u?int32, expected a 16- or 32-bit floating-point"
        )


def test_a_config_of_endless_layers_or_width_is_refused(dense, tmp_path):
    config = json.loads((copy(dense, tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    refused(tmp_path, "num_hidden_layers is out of the range of a model")
    for change in (
        {"num_hidden_layers": 9999},
        {"hidden_size": 2**40},
        {"vocab_size": 10**30},
        {"head_dim": 2**62},
        {"num_attention_heads": 2**62, "num_key_value_heads": 1},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        refused(tmp_path, "which its 12 tensors cannot be")
    for change in ({"rms_norm_eps": float("nan")}, {"rms_norm_eps": 1e400}, {"rope_theta": 1e400}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        refused(tmp_path, f"{next(iter(change))} must be a number below")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_bombs_are_refused(dense, tmp_path, name):
    copy(dense, tmp_path)
    if "index" in name:
        (tmp_path / "model.safetensors").unlink()
    for text in (
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": ' + "9" * 100_000 + "}",
        "\ud800".encode("utf-8", "surrogatepass"),
    ):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(tmp_path, "is not JSON")
    with (tmp_path / name).open("wb") as file:
        file.truncate(10**10)  # sparse: takes no disk space
    refused(tmp_path, "has 10000000000 bytes, expected at most")


def test_4_bit_weights_with_scales_out_of_range_are_refused(bnb, tmp_path):
    path = copy(bnb, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | {"nested_offset": 1e300}
    save_file(
        tensors | {key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}, path
    )
    refused(tmp_path, "up_proj.weight in torch.float32 holds NaN or infinity")
