"""Tests on a GPU: custom ops, NF4Linear, cross-entropy, elementwise kernels, 8-bit AdamW, graphs.

NF4Linear is tested in training and with few tokens, also compiled. `pytest -m gpu` runs this file
and the check of benchmarks/gpu_kernels/kernel_bench.py. These tests have not run yet, because no
GPU was available.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import minilora as ml
from helpers.kinds import shake
from helpers.prompts import VOCABULARY, pair, ragged
from helpers.tiny import KINDS, oracle, twin
from minilora.generation import cuda_graph as graph
from minilora.generation.generate import generate_ids
from minilora.generation.sampling import Decoding
from minilora.models.padded_batch import Context, inference
from minilora.quant.nf4_linear import NF4Linear
from minilora.training.optim.adamw_8bit import AdamW8bit
from minilora_kernels import backend, dequantize_nf4, quantize_nf4
from minilora_kernels.ops.cross_entropy import IGNORE, linear_cross_entropy, plain_cross_entropy
from minilora_kernels.ops.rms_norm import rms_norm
from minilora_kernels.ops.rope import rotate
from minilora_kernels.ops.swiglu import gated

pytestmark = pytest.mark.gpu
OPS = torch.ops.minilora
SHAPES = [(33, 64), (7, 13), (1, 1), (0, 3), (96, 2080)]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_ops_have_the_bits_of_the_cpu(shape, double_quant):
    x = torch.randn(shape)
    here, there = quantize_nf4(x, 64, double_quant), quantize_nf4(x.cuda(), 64, double_quant)
    assert backend.path_for(there.device) == "triton"
    for ours, theirs in zip(here.parts()[:4], there.parts()[:4], strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs.cpu())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(dequantize_nf4(here, dtype), dequantize_nf4(there, dtype).cpu())
    torch.library.opcheck(OPS.dequantize_nf4, (*there.parts(), torch.bfloat16))
    if shape[0]:
        for tokens in ((), (17,)):
            torch.library.opcheck(
                OPS.gemv_nf4, (torch.randn(*tokens, shape[1]).cuda(), *there.parts(), None)
            )


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_nf4_linear_forward_and_gradient(mode):
    """The compiled call is the first call, so that CUDA graphs must find the tables themselves."""
    layer = NF4Linear.from_linear(nn.Linear(128, 96)).cuda()
    run = layer if mode is None else torch.compile(layer, mode=mode, fullgraph=True)
    W, b = layer.dequantize(torch.float64), layer.bias.double()
    x, tokens = (
        torch.randn(5, 128, device="cuda", requires_grad=True),
        torch.randn(7, 128, device="cuda"),
    )
    for _ in range(3):  # warm-up, capture, replay
        with torch.no_grad():
            y, few = run(tokens[:1]).clone(), run(tokens).clone()
        x.grad = None
        run(x).sum().backward()
        # fp32, or TF32 if the user allows it: sums of 128 products, each rounded to 10 bits in the
        # worst case.
        for found in (y, few):
            expected = F.linear(tokens[: len(found)].double(), W, b)
            torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(x.grad.double(), W.sum(0).expand(5, -1), rtol=1e-2, atol=1e-2)


def test_8_bit_adamw_has_the_bits_of_the_cpu():
    params = {}
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(70, 100, generator=generator).to(device))
        optimizer = AdamW8bit([p], lr=1e-2, weight_decay=0.1)
        for _ in range(5):
            p.grad = (torch.randn(70, 100, generator=generator) ** 5).to(device)
            optimizer.step()
        params[device] = [p.detach(), *optimizer.state[p].values()]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*params.values(), strict=True))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_cross_entropy_loss_and_gradients(dtype, trained):
    """Compare two chunks with fp64.

    The rounding of logits of rms 1 to 8 bits changes the gradient by 2 %. fp32 may be TF32.
    """
    N, D, V = 700, 256, 32000
    hidden = torch.randn(N, D, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, D, device="cuda") / 16).to(dtype).requires_grad_(trained)
    labels = torch.randint(V, (N,), device="cuda")
    labels[::7] = IGNORE
    parameters = [hidden, *[weight] * trained]
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    found, expected = (
        linear_cross_entropy(hidden, weight, labels, 512),
        plain_cross_entropy(*exact, labels),
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0, check_dtype=False)
    for a, b in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, exact), strict=False
    ):
        assert ((a.double() - b).norm() / b.norm()).item() < 2e-2


@pytest.mark.parametrize("kind", ["llama", "llama3", "window 5", "qwen3 window between", "gemma3"])
@pytest.mark.parametrize("bits", [4, 32])
def test_a_captured_step_gives_the_logits_of_the_growing_cache(kind, bits, monkeypatch):
    """Decode through full steps (16, then 32 columns), and with one row less.

    Attention over masked columns may use another kernel, which adds in another order. The logits
    are in fp32, about 4, after three layers.
    """
    monkeypatch.setattr(graph, "LEAST", 16)
    monkeypatch.setattr(graph, "UNIT", 16)
    model = twin(oracle(**KINDS[kind]))
    if bits == 4:
        ml.quantize_model(model)
    ml.inject(model, ml.LoRAConfig(target_modules="all-linear"))
    shake(model).cuda()
    with inference(model):
        context = Context(model)
        context.extend([[1, 2, 3], [4]])
        growing, decode = context.select([0, 1]), graph.Graphs(model, 40)(context)
        for rows in ([0, 1], [1]):
            decode, growing = decode.select(rows), growing.select(rows)
            for token in range(20):
                new = [[token + row] for row in rows]
                torch.testing.assert_close(
                    decode.extend(new), growing.extend(new), atol=1e-4, rtol=0
                )
            assert decode.step.replay is not None and decode.step.rows == len(rows)


def test_answers_with_and_without_a_graph_are_equal():
    model = twin(pair()[0]).cuda()
    rule = {"batch_size": 3, "ends": frozenset(range(0, VOCABULARY, 11))}
    found = [
        generate_ids(model, ragged(3, 12, 1, 7), Decoding(30, cuda_graph=wanted, **rule))
        for wanted in (True, False)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_elementwise_kernels_agree_with_torch(dtype, monkeypatch):
    """Compare values and gradients with torch on the same GPU, up to a few roundings."""
    shapes = (70, 576), (576,), (70, 576)
    x, w, up = (
        torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes
    )
    turn = torch.rand(1, 1, 70, 32, device="cuda").repeat(1, 1, 1, 2)
    cos, sin = turn.cos().to(dtype), turn.sin().to(dtype)
    forms = {
        "norm": lambda: rms_norm(x, w, 1e-5),
        "gate": lambda: gated(x, up),
        "gelu": lambda: gated(x, up, gelu=True),
        "rotate": lambda: rotate(x.view(1, 70, 9, 64).transpose(1, 2), cos, sin),
    }
    for name, form in forms.items():
        results = []
        for choice in ("auto", "torch"):
            monkeypatch.setenv("MINILORA_STEPS", choice)
            y = form()
            results.append(
                [y, *torch.autograd.grad(y.float().square().sum(), (x, w, up), allow_unused=True)]
            )
        for found, expected in zip(*results, strict=True):
            close_to = 4 * torch.finfo(dtype).eps
            assert (
                found is expected is None or (found - expected).norm() <= close_to * expected.norm()
            ), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none: NOT TESTED here")
def test_a_tensor_on_a_gpu_that_is_not_the_current_one():
    x = torch.randn(64, 64)
    with torch.cuda.device(0):
        assert torch.equal(
            dequantize_nf4(quantize_nf4(x.to("cuda:1"))).cpu(), dequantize_nf4(quantize_nf4(x))
        )
