"""Tests of merging adapters into a copy of the model.

The merged model computes the same as the adapted model and is an ordinary dense model. The adapted
model keeps every byte.
"""

import warnings

import pytest
import torch
from torch import nn

from helpers.kinds import build, output
from helpers.toy import llama
from minilora.lora.active import set_adapter
from minilora.lora.config import LoRAConfig
from minilora.lora.inject import inject
from minilora.lora.layer import LoRALayer
from minilora.lora.merging.merge import dequantized_weights, merge
from minilora.lora.registry import lora_configs, lora_layers
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantize_model import quantize_model
from minilora_kernels import FEW

TOKENS = torch.arange(8)[None]


def model_with_adapter(
    kind: str = "llama", quantize: bool = False, dtype: torch.dtype = torch.float32
) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
            attention_bias=kind == "biases",
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    model = model.eval().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    if quantize:
        quantize_model(model)
    inject(model, LoRAConfig(target_modules="all-linear"))
    inject(
        model,
        LoRAConfig(target_modules=["c_attn" if kind == "gpt2" else "q_proj"], r=2),
        name="second",
    )
    for layer in lora_layers(model).values():
        for adapter in layer.adapters.values():
            nn.init.normal_(adapter.lora_B, std=0.1)
    set_adapter(model, ["default", "second"])
    return model


# ---- oracle


@pytest.mark.parametrize(
    ("kind", "quantize"),
    [("llama", False), ("gpt2", False), ("llama", True), ("biases", False), ("biases", True)],
)
def test_the_merged_model_computes_the_same(kind, quantize):
    model = model_with_adapter(kind, quantize)
    expected = model(TOKENS).logits
    merged = merge(model)
    # fp32, sums in another order
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=2e-5)
    set_adapter(model, [])
    assert (model(TOKENS).logits - expected).abs().max() > 1e-2  # the adapters have an effect
    assert not any(isinstance(m, (LoRALayer, NF4Linear)) for m in merged.modules())


def test_rounds_once_to_the_base_dtype():
    model = model_with_adapter(dtype=torch.bfloat16)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    W = layer.base_layer.weight.float()
    for adapter in layer.adapters.values():
        W = W + adapter.scaling * adapter.lora_B @ adapter.lora_A
    merged = merge(model).get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(merged.weight, W.bfloat16())


# ---- property


@pytest.mark.parametrize(
    ("kind", "quantize"), [("biases", False), ("biases", True), ("gpt2", False)]
)
def test_the_given_model_keeps_every_byte(kind, quantize):
    model = model_with_adapter(kind, quantize=quantize)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules, logits = dict(model.named_modules()), model(TOKENS).logits
    merged = merge(model)
    for parameter in merged.parameters():
        parameter.data.zero_()  # a change of the copy
    merged.bfloat16()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(TOKENS).logits, logits)


def test_a_merged_layer_shares_no_buffer_or_hook_with_the_given_one():
    """Gemma's embedding has a buffer that is not in the state dict."""
    model = build("gemma")
    inject(model, LoRAConfig(r=2, target_modules=["embed_tokens"]))
    words, expected = model.model.embed_tokens.base_layer, output(model)
    merged = merge(model)
    merged.model.embed_tokens.register_forward_hook(lambda module, ids, found: found + 1)
    assert (output(merged) - expected).abs().max() > 0.1
    merged.bfloat16()
    assert words.embed_scale.dtype == torch.float32 and torch.equal(output(model), expected)


def test_merge_warns_of_a_new_bias_in_a_transformers_model():
    """The config has no field for the bias: from_pretrained would drop it from the saved model."""
    model = build("llama")
    inject(model, LoRAConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    with pytest.warns(
        UserWarning, match="3 layers have a bias now .* first model.layers.0.self_attn.q_proj"
    ):
        merge(model)
    for kind, bias in (("gpt2", True), ("llama", False)):
        model = build(kind)
        inject(
            model, LoRAConfig(r=2, target_modules=["c_attn" if bias else "q_proj"], lora_bias=bias)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merge(model)


def test_merge_rounds_the_fp32_bias_of_a_4_bit_layer():
    model = llama(attention_bias=True).bfloat16()
    quantize_model(model)
    inject(model, LoRAConfig(target_modules=["q_proj"], bias="lora_only"))
    layer = model.model.layers[0].self_attn.q_proj
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.adapters["default"].lora_B, std=0.1)
    merged = merge(model)
    assert (
        {parameter.dtype for parameter in merged.parameters()}
        == {torch.bfloat16}
        != {layer.bias.dtype}
    )
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.bias, layer.bias.bfloat16())
    assert torch.isfinite(merged(TOKENS)).all()


def test_the_merged_model_is_ordinary():
    model = model_with_adapter()
    merged = merge(model)
    assert all(
        p.is_contiguous()
        for p in [*merged.parameters(), *merge(model_with_adapter("gpt2")).parameters()]
    )
    assert not lora_configs(merged) and not any(module.training for module in merged.modules())
    assert not any(module.training for module in merge(model_with_adapter(quantize=True)).modules())
    plain = type(model)(model.config)
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(plain.eval()(TOKENS).logits, merged(TOKENS).logits)
    assert inject(merged)  # it can be adapted again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_weights_give_the_same_output(dtype):
    """The outputs are equal bit for bit, except for few tokens.

    Few tokens are multiplied from the codes: W is not rounded, and sums are in another order.
    """
    model = llama().to(dtype)
    quantize_model(model)
    inject(model, LoRAConfig(target_modules=["q_proj", "down_proj"]))
    four_bit = {path: m for path, m in model.named_modules() if isinstance(m, NF4Linear)}
    with torch.no_grad():
        many = TOKENS.repeat(3, 1)
        expected, few = model(many), model(TOKENS[:, :1])
        assert many.numel() > FEW >= TOKENS[:, :1].numel()
        with dequantized_weights(model):
            assert not any(isinstance(module, NF4Linear) for module in model.modules())
            assert torch.equal(model(many), expected)
            # Each weight and each sum is rounded, through two layers.
            assert (model(TOKENS[:, :1]) - few).norm() <= 8 * torch.finfo(dtype).eps * few.norm()
            model.train()
    for path, layer in four_bit.items():
        assert model.get_submodule(path) is layer and layer.training
    with pytest.raises(ZeroDivisionError), dequantized_weights(model):
        1 / 0  # noqa: B018 the error is the test
    assert all(model.get_submodule(path) is layer for path, layer in four_bit.items())


# ---- error


def test_nothing_to_merge_raises():
    model = model_with_adapter()
    set_adapter(model, [])
    with pytest.raises(ValueError, match="no active adapter"):
        merge(model)
    set_adapter(model, "default")
    with pytest.raises(
        ValueError, match="storage: expected None or one of float32, .*, got 'int8'"
    ):
        merge(model, "int8")
