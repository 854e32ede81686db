"""Tests, in Triton's interpreter, of the kernels for RMSNorm, RoPE and the gated activation.

Each kernel is compared with its reference implementation, alone and inside a model that trains.
Oracles: fp64, and for RoPE the bits of the reference implementation.
"""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import minilora as ml
from helpers.kernel_parts import few_fast, normal
from helpers.toy import llama, lora
from minilora_kernels.ops import dispatch
from minilora_kernels.ops.rms_norm import plain_rms_norm
from minilora_kernels.ops.rope import plain_rotate, rotate
from minilora_kernels.triton import launch, rope
from minilora_kernels.triton import rms_norm as norm_kernels
from minilora_kernels.triton import swiglu as gate_kernels

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# VALUES is the number of values per program of the norm in these tests. A strip is the number of
# rows over which one program sums dw.
VALUES, STRIP = (256, norm_kernels.STEPS * 16)
UNIT = 2.0**-24  # half an ulp of fp32


def exact(function, *inputs):
    """Return the value in fp64 and the gradients of the inputs. The last input is dy."""
    *inputs, dy = (x.double().requires_grad_() for x in inputs)
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy.detach())


def close(found: Tensor, expected: Tensor, roundings: int, terms: Tensor) -> bool:
    """Return True if the error is at most `roundings` to found's dtype plus UNIT times `terms`."""
    info = torch.finfo(found.dtype)
    bound = (
        roundings * info.eps / 2 * expected.abs()
        + UNIT * terms.abs()
        + info.smallest_normal * info.eps
    )
    return bool(((found.double() - expected).abs() <= bound).all())


def rounded_between(
    found: Tensor, inner: Tensor, factor: Tensor, units: Tensor | float, lost: Tensor | float = 0
):
    """Return True if found can be round(round(inner) · factor).

    inner (fp64) may be wrong by `units` roundings of fp32, plus `lost`. Rounding and multiplication
    keep the order of numbers, so the result is between the results of the two ends. In 16 bits the
    two ends mostly give the same number, so a missing rounding or a truncation is detected.
    """
    dtype = found.dtype
    error = UNIT * units * inner.abs() + lost
    ends = [(inner + side * error).to(dtype).double() * factor.double() for side in (-1, 1)]
    low, high = (pick(*(end.to(dtype) for end in ends)) for pick in (torch.minimum, torch.maximum))
    return bool(((low <= found) & (found <= high)).all())


# ---- norm


ROWS_OF = [
    (1, 1),
    (0, 8),
    (5, 24),
    (37, 128),
    (5, 576),
    (2, VALUES - 1),
    (2, VALUES),
    (3, VALUES + 5),
    (STRIP + 3, 40),
]


@pytest.mark.parametrize("shape, dtype, gemma", few_fast(ROWS_OF, DTYPES, [False, True]))
def test_rms_norm_and_its_gradients(shape, dtype, gemma, monkeypatch):
    rows, width = shape
    for name in ("rms_norm", "rms_norm_backward"):  # the interpreter is slow
        monkeypatch.setitem(launch._overridden, name, launch.tile(1, VALUES=VALUES))
    # In most cases the rows are a multiple of this tile; some cases have several strips.
    monkeypatch.setitem(launch._overridden, "rms_norm_weight", launch.tile(1, ROWS=16, COLUMNS=8))
    x, w, dy = (
        normal(*shape, dtype=dtype, scale=1.0) for shape in ((rows, width), (width,), (rows, width))
    )
    y, r = norm_kernels.rms_norm(x, w, 1e-5, gemma)
    expected, dx, dw = exact(lambda x, w: plain_rms_norm(x, w, 1e-5, gemma), x, w, dy)
    assert y.dtype == dtype and r.shape == (rows, 1)
    # Roundings of a pairwise sum along a row, and of the operations after it.
    sums = math.log2(width) + 8
    assert close(y, expected, 2, sums * expected)
    h = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
    if gemma:
        assert rounded_between(y, h * (1 + w.double()), torch.ones(()), sums)
    else:  # Llama's h is rounded before the product
        assert rounded_between(y, h, w, sums)
    found = norm_kernels.rms_norm_backward(x, w, r, dy, gemma)
    dh, h = dy.double() * (w.double() + gemma), x.double() * r
    assert close(
        found, dx, 1, sums * r * (dh.abs() + h.abs() * (dh * h).abs().mean(1, keepdim=True))
    )
    found = norm_kernels.rms_norm_weight(x, r, dy)
    assert found.dtype == torch.float32
    assert close(found, dw, 0, (rows + 8) * (dy * h).abs().sum(0))


def test_rms_norm_of_zeros_and_of_values_that_are_not_finite():
    x = torch.zeros(4, 40)
    x[1, 3], x[2, 5], x[3] = torch.nan, torch.inf, 1.0
    y, _ = norm_kernels.rms_norm(x, torch.ones(40), 1e-5, False)
    assert (y[0] == 0).all() and torch.equal(
        y.isnan(), plain_rms_norm(x, torch.ones(40), 1e-5).isnan()
    )
    assert (y[3] - 1).abs().max() < 1e-5


# ---- gate


def z_of(x, gelu):
    """Return the argument of the sigmoid and its derivative, in fp64."""
    k = math.sqrt(8 / math.pi)
    return (
        (k * (x + 0.044715 * x**3), k * (1 + 3 * 0.044715 * x**2))
        if gelu
        else (x, torch.ones_like(x))
    )


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_over_the_whole_range_of_values(dtype, gelu):
    """Test every sixteenth bf16 number below 2^7, with zeros of both signs.

    GELU's z reaches 10^5.
    """
    gate = torch.arange(0, 1 << 16, 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite() & (gate.abs() < 2**7) & ((gate.abs() > 2**-100) | (gate == 0))].to(
        dtype
    )
    up, dy = normal(len(gate), dtype=dtype, scale=1.0), normal(len(gate), dtype=dtype, scale=1.0)
    # The oracle is not the reference implementation: its 1 + tanh cancels for a small s, even in
    # fp64.
    y, dgate, dup = exact(lambda g, u: g * z_of(g, gelu)[0].sigmoid() * u, gate, up, dy)
    z, dz = z_of(gate.double(), gelu)
    s = z.sigmoid()
    # z is rounded, which changes e^-z by |z| units. Beyond 2^128, e^-z is infinite, and an s below
    # 2^-120 becomes 0. The number that is rounded between two products, f(g) or dy u, may be
    # subnormal in fp16.
    grows, lost = 8 + 4 * z.abs().clamp(max=128), 2.0**-96 + 2.0**-1 * (dtype == torch.float16)
    found = gate_kernels.gated(gate, up, gelu)
    assert close(found, y, 2, grows * y + lost * up)
    assert rounded_between(found, gate * s, up, grows, lost * UNIT)
    found = gate_kernels.gated_backward(gate, up, dy, gelu)
    product, slope = (dy.double() * up.double()).to(dtype).double(), s + gate * s * (1 - s) * dz
    # f' = s + g s (1 - s) z'. The bound uses the sizes of the terms, because they may cancel.
    # 1 - s has the error of s.
    sizes = s * (1 + (gate * dz).abs())
    assert close(found[0], dgate, 2, grows * (dy * up) * sizes + lost * (1 + dz))
    # one rounding after that of dy u
    assert close(found[0], product * slope, 1, grows * product * sizes + lost * (1 + dz))
    assert close(found[1], dup, 2, grows * dup + lost * dy)
    assert rounded_between(found[1], gate * s, dy, grows, lost * UNIT)


def test_gated_passes_on_values_that_are_not_finite():
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 0.0])
    for gelu in (False, True):
        found = gate_kernels.gated(gate, torch.ones(6), gelu)
        assert found[:1].isnan().all() and found[1] == torch.inf and not found[[3, 5]].isnan().any()
        assert found[3] == gate[3] and found[4] == 0 and found[5] == 0


# ---- RoPE: the bits of the reference implementation


def angles(batch, length, size, dtype):
    turns = torch.rand(batch, 1, length, size // 2).repeat(1, 1, 1, 2) * 7
    return turns.cos().to(dtype), turns.sin().to(dtype)


HEADS_OF = [(1, 1, 2), (3, 5, 24), (8, 9, 64), (1, 2, 1200), (4, 0, 8)]


@pytest.mark.parametrize("shape, batch, dtype", few_fast(HEADS_OF, [1, 3], DTYPES))
def test_rotate_has_the_bits_of_the_reference_implementation(shape, batch, dtype, monkeypatch):
    heads, length, size = shape
    monkeypatch.setitem(launch._overridden, "rotate", launch.tile(1, VALUES=512))
    fused = normal(3, length, heads + 2, size, dtype=dtype, scale=1.0)
    for x in (
        fused[:, :, :heads].transpose(1, 2),
        normal(3, heads, length, size, dtype=dtype, scale=1.0),
    ):
        cos, sin = angles(batch, length, size, dtype)
        y = rope.rotate(x, cos, sin, 1.0)
        assert torch.equal(y, plain_rotate(x, cos, sin)) and y.transpose(1, 2).is_contiguous()
        assert torch.equal(rope.rotate(x, cos, sin, -1.0), plain_rotate(x, cos, -sin))


def test_views_give_the_results_of_their_contiguous_copies():
    gate, up = normal(6, 48, scale=1.0).chunk(2, dim=1)  # views of one product
    dy = normal(24, 6, scale=1.0).T
    copies = [t.contiguous() for t in (gate, up, dy)]
    assert torch.equal(gate_kernels.gated(gate, up, True), gate_kernels.gated(*copies[:2], True))
    found, expected = (
        gate_kernels.gated_backward(*given, True) for given in ((gate, up, dy), copies)
    )
    assert all(map(torch.equal, found, expected))
    x, turned = (
        normal(2, 3, 6, 24, scale=1.0),
        [part.mT.contiguous().mT for part in angles(2, 6, 24, torch.float32)],
    )
    assert torch.equal(rope.rotate(x, *turned, 1.0), plain_rotate(x, *turned))


# ---- no writes past the end, for every tile


TILES = [{}, {"VALUES": 64}, {"VALUES": 256}, {"VALUES": 8192}]


@pytest.mark.parametrize("shape, sizes", few_fast([(1, 2), (3, 40), (5, 514)], TILES))
def test_kernels_write_all_of_their_results_and_nothing_else(shape, sizes, monkeypatch):
    rows, width = shape
    made = []

    def marked(shape, dtype, *_):
        made.append(torch.full((math.prod(shape) + 64,), 77, dtype=dtype))
        return made[-1][:-64].view(shape)

    for name in ("rms_norm", "rms_norm_backward", "rotate", "gated", "gated_backward"):
        present = dict(launch.TILES[name]["default"].constants)
        monkeypatch.setitem(launch._overridden, name, launch.tile(4, **present | sizes))
    for module in (norm_kernels, gate_kernels, rope):
        monkeypatch.setattr(module.allocator, "empty", marked)
    x, w = normal(rows, width, scale=1.0), normal(width, scale=1.0)
    y, r = norm_kernels.rms_norm(x, w, 1e-5, False)
    found = [y, norm_kernels.rms_norm_backward(x, w, r, x, False), gate_kernels.gated(x, x, True)]
    found += [*gate_kernels.gated_backward(x, x, x, False)]
    found += [rope.rotate(x[None, None], *angles(1, rows, width, x.dtype), 1.0)]
    assert len(made) == len(found) == 6 and all((memory[-64:] == 77).all() for memory in made), (
        "written past the end"
    )
    assert all((memory[:-64] != 77).all() for memory in made), "a part of a result is not written"


# ---- the choice of kernels, and kernels in a model


def test_unsupported_inputs_do_not_use_triton(monkeypatch):
    x = torch.ones(2, 8)
    assert dispatch.use_triton(x, x) and dispatch.use_triton(nn.Parameter(x).data)
    for other in (x.double(), x.to("meta"), x.to(torch.int64), x.bfloat16()):
        assert not dispatch.use_triton(other, x)
    with torch._subclasses.FakeTensorMode() as mode:
        assert not dispatch.use_triton(mode.from_tensor(x))
    cos, sin = angles(1, 4, 8, x.dtype)
    strided = torch.ones(1, 2, 8, 4).transpose(2, 3)  # last stride is not 1: torch
    assert torch.equal(rotate(strided, cos, sin), plain_rotate(strided, cos, sin))
    for name, value in (("MINILORA_STEPS", "torch"), ("MINILORA_NF4", "auto")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not dispatch.use_triton(x, x)


ALL = {"rms_norm", "rms_norm_backward", "rms_norm_weight", "rotate", "gated", "gated_backward"}


@pytest.fixture
def launched(monkeypatch):
    """Set of the names of the kernels that ran."""
    names = set()
    for module in (norm_kernels, gate_kernels, rope):
        right = module.run

        def run(name, *arguments, right=right, **constants):
            names.add(name)
            right(name, *arguments, **constants)

        monkeypatch.setattr(module, "run", run)
    return names


def trained(model, run) -> list[Tensor]:
    """Return the loss and the gradients of the trainable parameters."""
    model.zero_grad()
    loss = run(torch.arange(40).view(2, 20) % 60).float().square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


KINDS = ["llama", "4-bit", "norms train", "checkpointed", "autocast"]


@pytest.mark.parametrize("kind, dtype", few_fast(KINDS, [torch.float32, torch.bfloat16]))
def test_a_model_has_the_same_gradients_with_and_without_kernels(
    kind, dtype, launched, monkeypatch
):
    model = llama().to(dtype)
    if kind == "4-bit":
        ml.quantize_model(model)
    lora(model)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or (kind == "norms train" and "norm" in name))
    run = partial(checkpoint, model, use_reentrant=False) if kind == "checkpointed" else model
    expected = ALL if kind == "norms train" else ALL - {"rms_norm_weight"}
    results = []
    for choice in ("auto", "torch"):
        monkeypatch.setenv("MINILORA_STEPS", choice)
        launched.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            results.append(trained(model, run))
        assert launched == (expected if choice == "auto" else set())
    for found, right in zip(*results, strict=True):
        # fp32: sums have another order. bf16: some ties are rounded the other way, and all later
        # layers pass the change on.
        close_to = 0.1 if dtype == torch.bfloat16 or kind == "autocast" else 1e-4
        assert (found - right).norm() <= close_to * right.norm() + 1e-9


@pytest.mark.slow
def test_a_compiled_model_uses_the_reference_without_a_graph_break(launched):
    model = lora(llama())
    found = trained(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert not launched
    for a, b in zip(found, trained(model, model), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9
    assert launched
