"""Tests of modules that read the weight of a layer instead of calling it.

While an adapter is active, the `weight` and `bias` of its layer contain the adapter. Oracle:
PyTorch's own TransformerEncoderLayer, whose eval mode reads the weights that its train mode calls,
and the merged model. Property: gradients reach A and B through a weight that is read.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora as ml
from helpers.kinds import build, close, shake
from minilora.lora.registry import lora_layers
from minilora.quant.nf4_linear import NF4Linear
from tests.lora.test_adapter_kinds import KINDS

WIDTH = 16
X = torch.linspace(-1, 1, 2 * 5 * WIDTH).view(2, 5, WIDTH)
IDS = torch.arange(10).view(2, 5)


def adapted(model: nn.Module, targets, **fields) -> nn.Module:
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=targets, task_type=None, **fields))
    return shake(model)


def encoder_layer(**fields) -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True, **fields).eval()


def encoder() -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(), 2).eval()


# ---- oracle: PyTorch's encoder reads the weights in eval mode and calls the layers in train mode


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}],
    ids=["lora", "dora", "pissa", "lora_bias"],
)
@pytest.mark.parametrize("make", [encoder_layer, encoder], ids=["layer", "encoder"])
def test_transformer_encoder_computes_the_same_in_train_and_eval(make, fields, four_bit):
    model = make()
    if four_bit:
        with pytest.warns(UserWarning, match="self_attn.in_proj_weight"):
            ml.quantize_model(model)
        with torch.no_grad():  # PyTorch calls the layers when the weights are no tensors
            close(model(X), model.train()(X), 1e-5)
    with torch.no_grad():
        base = model.eval()(X)
    adapted(model, ["linear1", "linear2"], **fields)
    with torch.no_grad():
        called = model.train()(X)
        read = model.eval()(X)
        close(read, called, 1e-5)  # W x + B A x and (W + B A) x, through two layers
        close(ml.merge(model)(X), called, 1e-5)
        assert (called - base).norm() > 0.1 * base.norm()
        with ml.disable_adapters(model):
            assert torch.equal(model(X), base)


def test_transformer_encoder_with_padding_computes_the_same_in_train_and_eval():
    """With padding the eval mode takes nested tensors."""
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    model = adapted(encoder(), ["linear1", "linear2"])
    with torch.no_grad():
        called = model.train()(X, src_key_padding_mask=padding)[~padding]
        read = model.eval()(X, src_key_padding_mask=padding)[~padding]
    close(read, called, 1e-5)


# ---- property: what a parent reads is what merging writes

TIED = {"embedding and head"}  # their two adapters end the tie, which a model without a tie lacks


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TIED])
def test_the_weight_of_a_layer_is_that_of_the_merged_model(kind):
    name, fields = KINDS[kind]
    model = build(name)
    bases = {path: module for path, module in model.named_modules()}
    ml.inject(model, ml.LoRAConfig(**{"r": 4, "task_type": None} | fields))
    shake(model)
    merged = ml.merge(model)
    for path, layer in lora_layers(model).items():
        plain = merged.get_submodule(path)
        close(layer.weight, plain.weight)
        bias = getattr(plain, "bias", None)
        if bias is not None:
            close(layer.bias, bias)
        else:
            assert getattr(layer, "bias", None) is None
        with ml.disable_adapters(model):
            assert layer.weight is bases[path].weight
            assert getattr(layer, "bias", None) is getattr(bases[path], "bias", None)


class TiedHead(nn.Module):
    """A model whose output layer is the transposed embedding, as a function."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix(self.embed(ids)).tanh() @ self.embed.weight.T


class Projection(nn.Module):
    """A module that multiplies by the weight of its layer in the ways of several libraries."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        if self.how == "F.linear":  # WavLM
            return F.linear(x, weight, self.inner.bias)
        if self.how == "weight @ x":  # Mamba
            return (weight @ x.transpose(1, 2)).transpose(1, 2) + self.inner.bias
        if self.how == "x @ weight":
            return x @ weight + self.inner.bias
        if self.how == "einsum":
            return torch.einsum("bti,oi->bto", x, weight) + self.inner.bias
        if self.how == "conv1d":  # DETR
            return F.conv1d(x.mT, torch.unsqueeze(weight, -1), self.inner.bias).mT
        parts = torch.chunk(weight, 2)  # DeBERTa
        return torch.cat([F.linear(x, part) for part in parts], dim=-1) + self.inner.bias


WAYS = ["F.linear", "weight @ x", "x @ weight", "einsum", "conv1d", "chunk"]


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("how", WAYS)
def test_a_module_that_reads_a_weight_trains_and_merges(how, four_bit):
    torch.manual_seed(0)
    model = nn.Sequential(Projection(how), nn.Tanh(), nn.Linear(WIDTH, 4))
    base = model(X)
    if four_bit:
        ml.quantize_model(model)
        layer = model[0].inner
        assert isinstance(layer, NF4Linear)
        plain = copy.deepcopy(model)
        plain[0].inner = nn.Linear(WIDTH, WIDTH)
        plain[0].inner.load_state_dict({"weight": layer.dequantize(), "bias": layer.bias})
        base = plain(X)
        close(model(X), base)
    adapted(model, ["inner"])
    close(model(X), ml.merge(model)(X))
    assert (model(X) - base).norm() > 0.1 * base.norm()
    model(X).square().sum().backward()
    for parameter in model[0].inner.adapters.parameters():
        assert parameter.grad is not None and parameter.grad.any()


def test_a_head_that_reads_the_embedding_uses_its_adapter():
    torch.manual_seed(0)
    model = adapted(TiedHead(), ["embed"])
    close(model(IDS), ml.merge(model)(IDS))
    model(IDS).square().sum().backward()
    A = model.embed.adapters["default"].lora_A
    assert A.grad[:, 10].any()  # the head reads the rows of tokens that are not in the input, too


def test_mamba_uses_the_adapter_of_dt_proj():
    """Mamba multiplies by the weight of dt_proj. In PEFT its adapter has no effect."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=11, hidden_size=WIDTH, num_hidden_layers=1, state_size=4, time_step_rank=4
    )
    model = MambaForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)  # large enough for the time steps to matter
    with torch.no_grad():
        base = model(IDS).logits
    adapted(model, ["dt_proj"])
    model(IDS).logits.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        found = model(IDS).logits
        close(ml.merge(model)(IDS).logits, found, 1e-5)
    assert (found - base).abs().max() > 1e-3 * base.abs().max()


def test_the_weight_is_in_the_dtype_of_the_base():
    model = adapted(nn.Sequential(Projection("F.linear")).bfloat16(), ["inner"], lora_bias=True)
    assert model[0].inner.weight.dtype == model[0].inner.bias.dtype == torch.bfloat16
    assert model(X.bfloat16()).dtype == torch.bfloat16


# ---- error


def test_a_read_convolution_with_groups_is_refused():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, groups=4, padding=1)

        def forward(self, x):
            return F.conv1d(x, self.conv.weight, self.conv.bias, padding=1, groups=4)

    model = adapted(nn.Sequential(Reader()), ["conv"], rank_pattern={"conv": 4})
    with pytest.raises(ValueError, match="reads the weight of a convolution with groups.*Leave"):
        model(torch.ones(1, 4, 5))
