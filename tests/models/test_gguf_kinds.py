"""Tests of every type of GGUF tensor, and of the architecture qwen2, against two other readers."""

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import minilora as ml
from helpers.bounds import assert_rounded, rounding
from helpers.tiny import SIZES, oracle, tokens
from minilora.models.gguf.read import GGUFCheckpoint, unpermute
from tests.models.test_gguf import gguf_name, write

ALL_KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_kind_of_tensor_equals_gguf_and_transformers(tmp_path, kind):
    """Oracles: the gguf package's numpy on each tensor, transformers' torch kernels on the file."""
    path = write(
        tmp_path / "m.gguf",
        oracle(hidden_size=256, intermediate_size=256, num_hidden_layers=1),
        kind,
    )
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, value in ml.load_model(path, dtype="float32", device="cpu").state_dict().items():
        stored = raw[gguf_name(name)]
        assert stored.tensor_type.name == (kind if value.dim() == 2 else "F32")
        expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        assert torch.equal(value, unpermute(expected, heads) if heads else expected), name
        assert torch.equal(value, reference[name]), name


def test_qwen2_has_biases_and_its_own_row_order(tmp_path):
    """This holds for the file, and for the model that is loaded from it and saved again."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from minilora.models.save import save_model

    reference = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)).eval()
    for name, parameter in reference.named_parameters():
        parameter.data = float("norm" in name) + 0.2 * torch.randn(parameter.shape)
    path = write(tmp_path / "m.gguf", reference, arch="qwen2")
    checkpoint, state = GGUFCheckpoint(path), reference.state_dict()
    assert checkpoint.config.model_type == "qwen2"
    assert checkpoint.shapes.keys() == state.keys()
    assert "model.layers.0.self_attn.k_proj.bias" in state
    for name in state:
        assert torch.equal(checkpoint.read(name), state[name]), name
    model = ml.load_model(path, dtype="float32", device="cpu")
    save_model(model, tmp_path / "again.gguf", format="gguf")
    again = ml.load_model(tmp_path / "again.gguf", dtype="float32", device="cpu")
    with torch.no_grad():
        bound = rounding(model, lambda model: model(tokens(2, 30)))
        assert_rounded(model(tokens(2, 30)), reference(tokens(2, 30)).logits, bound)
        assert torch.equal(again(tokens(2, 30)), model(tokens(2, 30)))
