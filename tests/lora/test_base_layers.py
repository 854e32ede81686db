"""Tests of the frozen layers: their dense weight, and which of them can have an adapter.

Oracle: bitsandbytes dequantises its own layers, and PyTorch computes what a layer computes.
Property: a layer that is accepted gives the same output merged and unmerged. Error: codes with an
unknown scale have no dense weight, and layers that compute something else than W x + b are refused.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

import minilora as ml
from helpers.kinds import close, shake
from minilora.lora.base_layers.dense_weight import dense_weight
from minilora.lora.registry import lora_layers

IN, OUT = 64, 32
X = torch.linspace(-1, 1, 3 * IN).view(3, IN)
METHODS = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
methods = pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)


def bitsandbytes_layer(kind: str) -> nn.Module:
    """Return a quantised layer of bitsandbytes: "nf4", "nf4, nested", "fp4" or "int8"."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            IN,
            OUT,
            compute_dtype=torch.float32,
            quant_type=kind[:3],
            compress_statistics="nested" in kind,
        )
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")  # bitsandbytes quantises on this move


def in_model(layer: nn.Module) -> nn.Module:
    """Return a model of a layer and a dense one."""
    torch.manual_seed(1)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(OUT, 8)).eval()


def adapted(model: nn.Module, targets="all-linear", **fields) -> nn.Module:
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=targets, task_type=None, **fields))
    return shake(model)


# ---- oracle: bitsandbytes


@pytest.mark.parametrize("kind", ["nf4", "nf4, nested", "fp4"])
def test_dense_weight_of_4_bits_equals_bitsandbytes(kind):
    from bitsandbytes.functional import dequantize_4bit

    layer = bitsandbytes_layer(kind)
    W = dense_weight(layer)
    assert torch.equal(W, dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    product = layer.train()(torch.eye(IN, requires_grad=True)) - layer.bias  # (in, out)
    close(W, product.T.detach())  # W x + b - b rounds twice


def test_dense_weight_of_8_bits_equals_bitsandbytes():
    from bitsandbytes.functional import int8_vectorwise_dequant

    layer = bitsandbytes_layer("int8")
    expected = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).float()
    close(dense_weight(layer), expected)  # bitsandbytes multiplies by a rounded 1 / 127
    layer(X.half())  # moves the scales into layer.state
    assert layer.weight.SCB is None
    close(dense_weight(layer), expected)


def test_dense_weight_of_the_layout_for_cpus_is_what_the_layer_stores():
    """The layout rounds the absmax to bf16. Reading it does not change the layer."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = bitsandbytes_layer("nf4")
    W = dense_weight(layer).view(-1, 64)  # (blocks, 64)
    absmax = layer.weight.quant_state.absmax.clone()[:, None]  # (blocks, 1)
    layer.weight.data, _ = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    stored = copy.deepcopy(layer.weight.data)
    for _ in range(2):
        found = dense_weight(layer).view(-1, 64)
        # bitsandbytes returns W in bf16: two roundings of 2⁻⁹ each, of absmax and of W.
        close(found, W / absmax * absmax.bfloat16().float(), 2**-8)
    assert torch.equal(layer.weight.data, stored)
    assert layer.weight.quant_state.packing_format_for_cpu


# ---- property: accepted layers merge


@methods
@pytest.mark.parametrize("kind", ["nf4", "nf4, nested", "fp4", "int8"])
def test_merging_a_layer_of_bitsandbytes_gives_its_dense_weight_plus_the_change(kind, fields):
    model = adapted(in_model(bitsandbytes_layer(kind)), targets=["0"], **fields)
    plain = in_model(nn.Linear(IN, OUT))
    plain[0].load_state_dict(
        {"weight": dense_weight(model[0].base_layer), "bias": model[0].base_layer.bias}
    )
    adapted(plain, targets=["0"], **fields)
    for name, tensor in model[0].adapters.state_dict().items():
        plain[0].adapters.state_dict()[name].copy_(tensor)
    merged = ml.merge(model)
    assert type(merged[0]) is nn.Linear and merged[0].weight.dtype == torch.float32
    close(merged(X), plain(X), 1e-5)  # (W + B A) x and W x + B A x, through tanh and a layer
    if kind != "int8":  # its own product rounds x to 8 bits
        # In eval mode bitsandbytes rounds x and the scales to bf16 on a CPU with AVX512-BF16.
        close(model.train()(X), merged(X), 1e-5)
    assert ml.merge_report(model).total.error["float32"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_transformers_model_merges_into_an_ordinary_one(tmp_path, bits):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from helpers.tiny import oracle, tokens

    oracle().save_pretrained(tmp_path / "base")
    quantisation = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, quantization_config=quantisation
    )
    adapted(model)
    merged = ml.merge(model)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, merged(ids).logits)
        if bits == 4:
            # In training mode bitsandbytes does not change the layout of the codes.
            close(merged(ids).logits, model.train()(ids).logits, 1e-5)
    assert model.config.quantization_config is not None  # the given model is unchanged


class InOtherWords(nn.Linear):
    def forward(self, x):
        return (self.weight @ x.mT).mT + self.bias


class ForSequences(nn.Linear):
    def forward(self, x):
        batch, length, _ = x.shape
        return super().forward(x.view(batch * length, -1)).view(batch, length, -1)


def falcon() -> nn.Module:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    return FalconLinear(IN, OUT)


@methods
@pytest.mark.parametrize(
    "make",
    [falcon, lambda: InOtherWords(IN, OUT), lambda: ForSequences(IN, OUT)],
    ids=["falcon", "in other words", "for sequences"],
)
def test_a_subclass_that_computes_w_x_plus_b_is_adapted_and_merges(make, fields):
    model = adapted(in_model(make()), **fields)
    assert set(lora_layers(model)) == {"0", "2"}
    close(ml.merge(model)(X[None]), model(X[None]), 1e-5)


# ---- error: layers that compute something else


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Activated(nn.Linear):
    def forward(self, x):
        return F.gelu(super().forward(x))


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-20, 20))


class RoundedTo8Bits(nn.Linear):
    def forward(self, x):
        scale = self.weight.abs().amax(1, keepdim=True) / 127
        return F.linear(x, (self.weight / scale).round() * scale, self.bias)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(OUT)


class Router(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), logits


class WithContext(nn.Linear):
    def forward(self, x, context):
        return super().forward(x) + context


def replaced_forward(in_features: int, out_features: int) -> nn.Module:
    layer = nn.Linear(in_features, out_features)
    layer.forward = lambda x: -F.linear(x, layer.weight, layer.bias)
    return layer


OTHERS = {
    "scaled": (Scaled, "computes something else than W x"),
    "activated": (Activated, "computes something else than W x"),
    "clipped": (Clipped, "computes something else than W x"),
    "8 bits": (RoundedTo8Bits, "computes something else than W x"),
    "noisy": (Noisy, "computes something else than W x"),
    "a router": (Router, "returns tuple and not one tensor"),
    "another argument": (WithContext, "fails for an input of shape .*missing 1 required"),
    "replaced on the object": (replaced_forward, "computes something else than W x"),
}


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
def test_a_layer_with_another_forward_is_refused_by_name(make, message):
    model = in_model(make(IN, OUT))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"^0: .*{message}.*exclude_modules"):
        adapted(model, targets=["0"])
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
def test_all_linear_leaves_a_layer_with_another_forward_out_and_reports_it(make, message):
    model = in_model(make(IN, OUT))
    size = IN * OUT / sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning, match=f"adapts 1 layers.* {size:.1%} .*0.weight \\(32, 64\\)"):
        adapted(model)
    assert set(lora_layers(model)) == {"2"}


def test_a_refused_forward_changes_no_buffer_of_the_layer():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(IN, OUT)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.calls += 1
            return 2 * super().forward(x)

    model = in_model(Counting())
    with pytest.raises(ValueError, match="something else"):
        adapted(model, targets=["0"])
    assert model[0].calls == 0


PARAMETRISED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "older weight_norm": weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("kind", PARAMETRISED)
def test_a_computed_weight_is_refused_until_it_is_made_plain(tmp_path, kind):
    layer = PARAMETRISED[kind](nn.Linear(IN, OUT))
    model = in_model(layer)
    with pytest.raises(ValueError, match="^0: .*computes its weight in every forward pass"):
        adapted(model, targets=["0"])
    with pytest.warns(UserWarning, match="adapts 1 layers"):
        ml.inject(model, ml.LoRAConfig(r=2, target_modules="all-linear", task_type=None))
    ml.eject(model)
    if parametrize.is_parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")
    elif kind == "pruned":
        prune.remove(layer, "weight")
    else:
        remove_weight_norm(layer)
    adapted(model, targets=["0"])
    ml.save_adapter(model, tmp_path)
    close(ml.merge(model)(X), model(X), 1e-5)


def test_a_convolution_with_a_computed_weight_is_refused():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), nn.Conv1d(4, 4, 3))
    with pytest.raises(ValueError, match="^0: .*computes its weight"):
        adapted(model, targets=["0"])


# ---- error: codes with a scale of their own


class Int8(nn.Module):
    """A layer whose codes and scale are buffers, as in many quantisation libraries."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.bias = IN, OUT, None
        W = torch.linspace(-1, 1, IN * OUT).view(OUT, IN)
        self.register_buffer("weight", (127 * W).round().to(torch.int8))
        self.register_buffer("scale", torch.full((OUT, 1), 1 / 127))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


class FP8(nn.Linear):
    """A layer with FP8 codes and one scale, as in DeepSeek-V3's checkpoints."""

    def __init__(self):
        super().__init__(IN, OUT, bias=False)
        W = torch.linspace(-1, 1, IN * OUT).view(OUT, IN)
        codes = (448 * W).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.tensor(1 / 448), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv, self.bias)


def unscaled() -> nn.Module:
    """Return an nn.Linear whose weight was replaced by codes; the scale is somewhere else."""
    layer = nn.Linear(IN, OUT)
    layer.weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.int8), requires_grad=False)
    return layer


CODES = {"int8 buffer": Int8, "fp8": FP8}
codes = pytest.mark.parametrize("make", CODES.values(), ids=CODES)


@codes
def test_plain_lora_on_codes_trains_saves_and_loads(tmp_path, make):
    model = adapted(in_model(make()), targets=["0", "2"])
    model(X).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert "bits=8" in repr(model[0])
    ml.save_adapter(model, tmp_path)
    again = in_model(make())
    ml.load_adapter(again, tmp_path)
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("make", [*CODES.values(), unscaled], ids=[*CODES, "unscaled"])
def test_what_needs_the_dense_weight_refuses_codes(make):
    for method in ("dora", "pissa", "loftq"):
        fields = METHODS.get(method, {"init_lora_weights": "loftq"})
        with pytest.raises(ValueError, match=f"^0: {method} needs the dense weight.*holds codes"):
            adapted(in_model(make()), targets=["0"], **fields)
    model = adapted(in_model(make()), targets=["0"])
    before = copy.deepcopy(model.state_dict())
    for act in (ml.merge, ml.merge_report):
        with pytest.raises(ValueError, match="^0: merging needs the dense weight.*save_adapter"):
            act(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_merge_report_refuses_codes_as_the_original():
    model = adapted(in_model(nn.Linear(IN, OUT)), targets=["0"])
    with pytest.raises(ValueError, match="original: expected a dense weight .* at 0, got FP8"):
        ml.merge_report(model, original=in_model(FP8()))
