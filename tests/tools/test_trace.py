"""Proves that a trace reports the computation: each step equals its formula, computed here.

Outputs and gradients have the bits of a run inside `reference_ops` without a trace. Any shape and
block size can be traced. test_trace_limits.py tests clean-up, memory, display and errors.
"""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora as ml
from helpers import toy
from helpers.toy import noise
from minilora_kernels import nf4_codebook, nf4_thresholds
from minilora_kernels.nf4 import reference

DTYPES = (torch.float32, torch.bfloat16)


def layer(
    kind: str = "nf4", shape: tuple[int, int] = (40, 48), blocksize: int = 64, **options: Any
) -> ml.LoRALayer:
    """Return a LoRA layer whose B is not zero."""
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(shape[1], shape[0])
    if kind != "dense":
        base = ml.NF4Linear.from_linear(base, blocksize, double_quant=kind == "nf4")
    made = ml.LoRALayer(base, **{"r": min(4, *shape), "lora_alpha": 6} | options)
    made.adapters["default"].lora_B.data.normal_()
    return made


def linear(shape: tuple[int, int] = (40, 48)) -> nn.Linear:
    """Return the dense layer from which `layer` is made."""
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0])


def check_weight(t: Any, weight: ml.NF4Weight, source: Tensor | None) -> None:
    """Compare the steps of a 4-bit weight with the specification."""
    value = {name: step.tensor for name, step in t.items()}
    shape, n = weight.shape, weight.numel
    nibbles = value["nibbles"]
    assert torch.equal(nibbles[:, 0] * 16 + nibbles[:, 1], value["byte"]) and torch.equal(
        value["byte"], weight.packed
    )
    assert torch.equal(nibbles.reshape(-1)[:n].view(shape), value["code"])
    assert torch.equal(nf4_codebook()[value["code"].int()], value["level"])
    absmax = value["absmax" if weight.nested_absmax is None else "decoded absmax"]
    assert torch.equal(absmax, weight.absmax)
    if weight.nested_absmax is not None:
        parts = [value[name] for name in ("nested code", "nested absmax", "offset")]
        assert torch.equal(reference.double_dequantize(*parts), absmax)
    W = torch.empty(shape, dtype=value["W"].dtype)
    reference.dequantize(weight.packed, absmax, weight.blocksize, W)
    assert torch.equal(value["W"], W)
    if source is None:
        assert not value.keys() & {"block", "normalised", "centred absmax", "error"}
        return
    packed, absmax = reference.quantize(source, weight.blocksize)
    assert torch.equal(packed, value["byte"]) and torch.equal(absmax, value["absmax"])
    block, normalised = value["block"], value["normalised"]
    assert (
        torch.equal(block.reshape(-1)[:n].view(shape), source) and not block.reshape(-1)[n:].any()
    )
    assert torch.equal(block.abs().amax(1), absmax) and torch.equal(
        block * (1 / absmax)[:, None], normalised
    )
    assert torch.equal(
        torch.bucketize(normalised, nf4_thresholds()).reshape(-1)[:n].view(shape),
        value["code"].int(),
    )
    if weight.nested_absmax is not None:
        found = reference.double_quantize(value["absmax"])
        assert all(torch.equal(a, b) for a, b in zip(found, parts, strict=True))
        assert torch.equal(value["centred absmax"], absmax - value["offset"])
        names = list(value)
        assert names.index("offset") < names.index("centred absmax") < names.index("nested absmax")
    exact = value["level"] * weight.absmax.repeat_interleave(weight.blocksize)[:n].view(shape)
    assert torch.equal(value["error"], exact - source)


# ---- oracle: each step by hand


@pytest.mark.parametrize("kind", ["dense", "nf4", "nf4 once"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str
)
def test_each_step_is_its_formula(kind, dtype, options):
    made = layer(kind, **{key: value for key, value in options.items() if key != "lora_bias"})
    made.train()
    adapter, base = made.adapters["default"], made.base_layer
    if "lora_bias" in options:
        adapter.lora_bias = nn.Parameter(noise(40).detach())
    made.to(dtype)
    x = noise(2, 3, 48, dtype=dtype)
    weights = linear().weight if kind != "dense" else None
    with ml.trace(made, source=weights) as t:
        h = made(x)
        h.backward(noise(2, 3, 40, dtype=dtype, seed=1).detach())
    value: dict[str, Any] = {name: step.tensor for name, step in t["LoRALayer"].items()}
    if kind != "dense":
        check_weight(t["LoRALayer"], base.weight, weights)
    A, B, s = adapter.lora_A.to(dtype), adapter.lora_B.to(dtype), adapter.scaling
    b = None if adapter.lora_bias is None else s * adapter.lora_bias.to(dtype)
    xd = value.get("dropped x", x)
    if options.get("lora_dropout"):
        assert (xd == 0).any() and torch.equal(xd[xd != 0], (x / 0.5)[xd != 0])
    forward = {
        "x": x,
        "xW": F.linear(x, value["W"], base.bias.to(dtype)),
        "A": adapter.lora_A,
        "B": adapter.lora_B,
        "xA": F.linear(xd, A),
        "sxA": s * value["xA"],
        "sxAB": F.linear(value["sxA"], B, b),
        "h": value["xW"] + value["sxAB"],
    }
    assert all(torch.equal(value[name], expected) for name, expected in forward.items())
    assert torch.equal(value["h"], h)
    dh = noise(2, 3, 40, dtype=dtype, seed=1).detach()
    flat = {name: value[name].flatten(0, 1) for name in ("dxA", "sxA")}
    backward = {
        "dh": dh,
        "dsxA": dh @ B,
        "dxA": s * value["dsxA"],
        "dB": dh.flatten(0, 1).T @ flat["sxA"],
        "dA": flat["dxA"].T @ xd.flatten(0, 1),
        "dx by W": dh @ value["W"],
        "dx by A": (value["dxA"] @ A) * (1 if xd is x else (xd != 0) / 0.5),
        "dx": value["dx by W"] + value["dx by A"],
    }
    if b is not None:
        backward["db"] = s * dh.sum((0, 1))
    # sums in another order: within the rounding of the largest value
    for name, expected in backward.items():
        bound = 8 * torch.finfo(dtype).eps * expected.abs().max()
        assert (value[name] - expected).abs().max() <= bound, name
    assert torch.equal(value["dx"], x.grad) and torch.equal(value["dA"], adapter.lora_A.grad)
    assert torch.equal(value["dB"], adapter.lora_B.grad) and set(value) >= {*forward, *backward}


def test_figures_are_those_of_the_values():
    made, x = layer(), noise(3, 48)
    with ml.trace(made) as t:
        made(x).sum().backward()
    for name, step in t["LoRALayer"].items():
        value = step.tensor.double()
        assert step.shape == value.shape and step.dtype == step.tensor.dtype and step.name == name
        assert (step.min, step.max) == (value.min(), value.max()) and step.first == (
            *value.reshape(-1)[:4].tolist(),
        )
        # summed in fp32
        assert step.rms == pytest.approx(value.square().mean().sqrt().item(), rel=1e-5)
    assert t["xA"] is t["LoRALayer"]["xA"] and str(t["xA"].tensor) in repr(t["xA"])


# ---- oracle: a traced model computes the same


def run_step(model: nn.Module, x: Any = None) -> list[Tensor]:
    """Return the output and the gradients of the trainable parameters."""
    model.zero_grad()
    torch.manual_seed(1)  # the seed of dropout
    y = model(noise(3, 48) if x is None else x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("way", ["dense", "nf4", "checkpointed", "autocast", "several", "full"])
def test_a_model_has_the_bits_of_plain_ops(way):
    model = toy.llama() if way in ("dense", "full") else toy.llama(intermediate_size=72)
    if way not in ("dense", "full"):
        ml.quantize_model(model)
    if way != "full":
        toy.lora(model, dropout=0.1)
    if way == "several":
        ml.inject(model, ml.LoRAConfig(r=2, target_modules=["q_proj", "down_proj"]), name="other")
        ml.set_adapter(model, ["default", "other"])
    model.train().gradient_checkpointing = way == "checkpointed"
    for name, p in model.named_parameters():
        p.data.normal_(std=0.1) if name.endswith("lora_B") else None
    ids = torch.randint(3, 99, (2, 9))
    mode = torch.autocast("cpu", torch.bfloat16) if way == "autocast" else nullcontext()
    with mode, ml.reference_ops():
        expected = run_step(model, ids)
    with mode, ml.trace(model) as t:
        found = run_step(model, ids)
    assert len(found) > 9 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = t["layers.1.mlp.down_proj"]
    assert len(t) == 15 and {name.calls for name in t.values()} == {1}
    names = {
        "several": {"default.dA", "other.dA", "other.xA", "dx", "h"},
        "full": {"dW", "dx"},
    }.get(way, {"dA", "dx"})
    assert names <= set(one) and "rms of" in str(t)
    if way == "several":
        assert "default.xA" not in t["layers.1.mlp.up_proj"] and "xA" in t["layers.1.mlp.up_proj"]
    assert one["xW"].dtype == (torch.bfloat16 if way == "autocast" else torch.float32)


def test_a_traced_model_differs_from_the_fast_ops_by_rounding():
    model = toy.lora()
    ids = torch.randint(3, 99, (2, 9))
    fast = run_step(model, ids)
    with ml.trace(model):
        found = run_step(model, ids)
    for a, b in zip(found, fast, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm().clamp_min(1e-9)  # fp32, sums in other orders


def test_an_update_is_what_the_optimiser_changed():
    made = layer(lora_dropout=0.1).train()
    optimizer = torch.optim.SGD(made.adapters.parameters(), lr=0.5)
    with ml.trace(made) as t:
        made(noise(3, 48)).sum().backward()
        before = copy.deepcopy(made.adapters["default"].state_dict())
        torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()  # a step of another optimiser
        assert "update A" not in t["LoRALayer"]
        optimizer.step()
    after = made.adapters["default"].state_dict()
    for name in "AB":
        assert torch.equal(
            t[f"update {name}"].tensor, after[f"lora_{name}"] - before[f"lora_{name}"]
        )
        assert torch.allclose(
            t[f"update {name}"].tensor, -0.5 * t[f"d{name}"].tensor, rtol=1e-5, atol=1e-6
        )
        # a copy, which the step did not change
        assert torch.equal(t[name].tensor, before[f"lora_{name}"])
    assert t["update A"].maths == "after SGD.step() - before"


# ---- property


@settings(max_examples=25)
@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from([32, 64, 256]),
    st.booleans(),
    st.integers(0, 3),
)
def test_any_shape_and_block_size(out, inside, blocksize, double, rows):
    made = layer("nf4" if double else "nf4 once", (out, inside), blocksize, r=1)
    x = noise(rows, inside)
    with ml.trace(made, source=linear((out, inside)).weight) as t:
        made(x).sum().backward()
    check_weight(t["LoRALayer"], made.weight, linear((out, inside)).weight)
    shapes = {
        "x": (rows, inside),
        "xA": (rows, 1),
        "h": (rows, out),
        "dA": (1, inside),
        "dB": (out, 1),
    }
    assert {name: t[name].shape for name in shapes} == shapes and t["dx"].shape == x.shape
    assert len(str(t).splitlines()) == 2 + 3 + len(
        t["LoRALayer"]
    )  # a title, a header, three phases
