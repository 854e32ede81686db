"""Tests that no GGUF header hangs, crashes or fills memory.

These are single attacks; test_hostile_files.py has random ones.
"""

import struct

import gguf
import numpy as np
import pytest

from helpers.tiny import oracle
from minilora.data import load_tokenizer
from tests.models.test_gguf import write
from tests.models.test_hostile_files import frugal, refused

HEAD = b"GGUF" + struct.pack("<I", 3)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    "content, message",
    [
        (struct.pack("<QQ", 2**63, 0), "cut off or damaged"),
        (struct.pack("<QQ", 0, 2**63), "cut off or damaged"),
        (struct.pack("<QQ", 0, 10**6) + bytes(13 * 10**6), "it contains '' twice"),
        (struct.pack("<QQ", 0, 1) + struct.pack("<Q", 10**10), "cut off or damaged"),
        (struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<IIQ", 9, 6, 10**10), "cut off or damaged"),
        (struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<IIQ", 9, 8, 10**10), "or of 10000000000 elements"),
        (struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9999, "of arrays"),
        (struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<I", 77), "value type 77"),
        (struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<I", 2**31), "has 2147483648 dimensions"),
        (struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<I", 0), "has 0 dimensions"),
        (struct.pack("<QQ", 0, 1) + text(b"general.alignment") + struct.pack("<II", 4, 0), "alignment is 0"),
        (struct.pack("<QQ", 0, 1) + text(b"general.alignment") + struct.pack("<I", 8) + text(b"x"), "alignment is 'x'"),
    ],
)  # fmt: skip
def test_gguf_headers_with_false_counts_are_refused(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(HEAD + content)
    refused(tmp_path / "m.gguf", message)
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.truncate(10**10)  # the file now has 10 GB of zeros
    refused(tmp_path / "m.gguf", "m.gguf")


def test_gguf_tensors_with_false_offsets_or_types_are_refused(tmp_path):
    """Offsets overlap or leave the file, types are unknown, or rows do not fill their blocks."""
    raw, at = write(tmp_path / "whole.gguf", oracle(num_hidden_layers=1)).read_bytes(), {}
    for name in (b"output_norm.weight", b"blk.0.attn_norm.weight"):
        # After the dimensions come the type (u32) and the offset (u64).
        at[name] = raw.index(text(name)) + 8 + len(name) + 4 + 8

    def case(message: str, *edits: tuple[int, bytes]) -> None:
        changed = bytearray(raw)
        for place, new in edits:
            changed[place : place + len(new)] = new
        (tmp_path / "m.gguf").write_bytes(changed)
        refused(tmp_path / "m.gguf", message)

    first, second = at.values()
    offset = raw[second + 4 : second + 12]
    case("tensor .* overlaps the one before it", (first + 4, offset))
    case("is cut off: tensor output_norm.weight ends after", (first + 4, struct.pack("<Q", 2**62)))
    case(
        "output_norm.weight has shape .* and type 999: 999 is not a valid",
        (first, struct.pack("<I", 999)),
    )
    # Type 12 is Q4_K, with blocks of 256.
    case("has shape .64,. and type 12: .*not a multiple", (first, struct.pack("<I", 12)))
    case("is cut off: tensor output_norm.weight ends", (first - 8, struct.pack("<Q", 2**60)))
    case(
        "blk.0.attn_norm.weight.* is damaged|overlaps|cut off",
        (second - 8, struct.pack("<Q", 10**9)),
    )


def test_gguf_fields_of_a_wrong_kind_are_refused(tmp_path):
    for key, add, value, message in [
        (
            "llama.block_count",
            "add_uint64",
            10**9,
            "num_hidden_layers is out of the range of a model",
        ),
        ("llama.attention.key_length", "add_array", [16, 16], "of the wrong kind|positive whole"),
        ("llama.attention.head_count_kv", "add_string", "x", "positive whole number"),
        ("llama.rope.freq_base", "add_float32", float("inf"), "rope_theta must be a number below"),
        (
            "llama.attention.layer_norm_rms_epsilon",
            "add_float32",
            float("nan"),
            "must be a positive number",
        ),
        ("split.count", "add_string", "x", "is one of x parts"),
        ("tokenizer.ggml.bos_token_id", "add_string", "x", "bos_token_id must be a number"),
    ]:

        def change(writer: gguf.GGUFWriter, key=key, add=add, value=value) -> None:
            writer.kv_data[0].pop(key, None)
            getattr(writer, add)(key, value)

        refused(write(tmp_path / "m.gguf", oracle(num_hidden_layers=1), change=change), message)


def test_gguf_tensors_with_unknown_names_or_shapes_are_refused(tmp_path):
    for name, shape, message in [
        ("abc", (3,), "tensor abc is none of"),
        ("", (3,), "tensor  is none of"),
        ("rope_freqs.weight", (0,), "not the scaling of Llama 3.1"),
        ("rope_freqs.weight", (8, 8), "not the scaling of Llama 3.1"),
        ("output.weight", (0, 64), "lm_head.weight has shape"),
        (
            "blk.00.attn_q.weight",
            (64, 64),
            "model.layers.00.self_attn.q_proj.weight, which .* has no place for",
        ),
    ]:

        def change(writer: gguf.GGUFWriter, name=name, shape=shape) -> None:
            writer.add_tensor(name, np.ones(shape, np.float32))

        model = oracle(num_hidden_layers=1, tie_word_embeddings=True)
        refused(write(tmp_path / "m.gguf", model, change=change), message)


@pytest.mark.parametrize(
    "key, value, kind",
    [
        ("tokenizer.ggml.tokens", 3, "UINT32"),
        ("tokenizer.ggml.tokens", "x", "STRING"),
        ("tokenizer.ggml.token_type", "x", "STRING"),
        ("tokenizer.ggml.merges", 5, "UINT32"),
        ("tokenizer.ggml.scores", "x", "STRING"),
        ("tokenizer.ggml.model", "llama", "STRING"),  # without scores
        ("tokenizer.ggml.bos_token_id", 97, "UINT32"),
        ("tokenizer.ggml.eos_token_id", 2**32 - 1, "UINT32"),
        ("tokenizer.ggml.pre", 1, "UINT32"),
        ("tokenizer.chat_template", 1, "UINT32"),
    ],
)
def test_gguf_tokenizer_fields_of_a_wrong_kind_are_refused(tmp_path, key, value, kind):
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, gguf.GGUFValueType[kind])

    path = write(tmp_path / "m.gguf", oracle(num_hidden_layers=1), change=change)
    with frugal(), pytest.raises(ValueError, match="its tokenizer is damaged"):
        load_tokenizer(path)
