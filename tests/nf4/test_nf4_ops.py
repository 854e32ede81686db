"""Proves that the NF4 ops work under opcheck, torch.compile, meta, threads and inference mode.

It also proves that a forced path is obeyed or refused, and that a slow path is announced. The
oracle of the compiled and the forced paths is the eager fast path, whose bits test_nf4_quantize.py
proves.
"""

import os
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F

import minilora_kernels
from minilora_kernels import backend as paths
from minilora_kernels import dequantize_nf4, quantize_nf4
from minilora_kernels.nf4 import torch_cpu

OPS = torch.ops.minilora
DEQUANTIZE = [OPS.dequantize_nf4, OPS.dequantize_nf4_backward]


def weight_of(shape=(33, 64), double_quant=True, dtype=torch.bfloat16):
    return quantize_nf4(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), 64, double_quant
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(33, 64), (7, 13), (), (0, 3)])
def test_opcheck(shape, double_quant):
    weight = weight_of(shape, double_quant)
    packed, scales, nested, offset, shape, blocksize = weight.parts()
    torch.library.opcheck(OPS.quantize_nf4, (torch.randn(shape), blocksize))
    for op in DEQUANTIZE:
        torch.library.opcheck(op, (*weight.parts(), torch.float16))
    torch.library.opcheck(
        OPS.dequantize_nf4_out, (packed, scales, nested, offset, blocksize, torch.empty(shape))
    )
    torch.library.opcheck(OPS.double_quantize_nf4, (weight.absmax,))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [(), (3,)])
@pytest.mark.parametrize("shape", [(33, 64), (7, 13), (5, 96)])
def test_opcheck_of_few_tokens(shape, tokens, bias, double_quant):
    weight, x = weight_of(shape, double_quant), torch.randn(*tokens, shape[1])
    arguments = (x, *weight.parts(), torch.randn(shape[0]) if bias else None)
    torch.library.opcheck(OPS.gemv_nf4, arguments)
    dense = F.linear(
        x.double(),
        dequantize_nf4(weight, torch.float64),
        None if not bias else arguments[-1].double(),
    )
    # the error of an fp32 sum of n products and a bias, in any order, is at most (n + 1) u times
    # the sum of magnitudes
    sizes = F.linear(
        x.abs(),
        dequantize_nf4(weight, torch.float32).abs(),
        None if not bias else arguments[-1].abs(),
    )
    assert (
        (OPS.gemv_nf4(*arguments).double() - dense).abs() <= (shape[1] + 1) * 2**-24 * sizes
    ).all()


def test_a_token_that_does_not_fit_raises():
    weight = weight_of()  # (33, 64)
    for x, bias in [
        (torch.randn(32), None),
        (torch.randn(64, 1), None),
        (torch.randn(64), torch.randn(2)),
    ]:
        with pytest.raises(ValueError, match="expected x of .…, 64. and a bias of .33,. or None"):
            OPS.gemv_nf4(x, *weight.parts(), bias)
    with pytest.raises(ValueError, match="expected a dtype of"):
        OPS.gemv_nf4(torch.ones(64, dtype=torch.int64), *weight.parts(), None)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_forward_and_backward_dequantize_ops_are_equal(dtype, double_quant):
    weight = weight_of(double_quant=double_quant)
    first, second = (op(*weight.parts(), dtype) for op in DEQUANTIZE)
    assert first.dtype == dtype and first.shape == weight.shape
    assert torch.equal(first, second) and torch.equal(first, dequantize_nf4(weight, dtype))


@pytest.mark.parametrize("double_quant", [False, True])
def test_compiled_without_a_graph_break(double_quant):
    weight, x = weight_of(double_quant=double_quant), torch.randn(5, 64)

    def f(x, *parts):
        return (
            x @ OPS.dequantize_nf4(*parts, x.dtype).T
            + OPS.dequantize_nf4_backward(*parts, x.dtype).sum()
        )

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *weight.parts()), f(x, *weight.parts()))
    scale = torch.compile(lambda t: OPS.quantize_nf4(t, 64)[1], fullgraph=True, backend="aot_eager")
    assert torch.equal(scale(x), quantize_nf4(x, double_quant=False).absmax)


def test_dequantize_compiles_with_a_weight_as_argument():
    weight = weight_of()
    assert torch.equal(
        torch.compile(dequantize_nf4, fullgraph=True, backend="aot_eager")(weight),
        dequantize_nf4(weight),
    )


def test_compiling_keeps_the_two_names_apart():
    """One op name would let the compiler merge both calls and keep the dense weight."""
    names = []

    def count(graph, inputs):
        names.extend(node.target for node in graph.graph.nodes if "dequantize" in str(node.target))
        return graph

    weight = weight_of()
    from torch._dynamo.backends.common import aot_autograd

    torch.compile(
        lambda *parts: [op(*parts, torch.float32).sum() for op in DEQUANTIZE],
        fullgraph=True,
        backend=aot_autograd(fw_compiler=count),
    )(*weight.parts())
    assert names == [op.default for op in DEQUANTIZE]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(33, 64), (7, 13), (), (0, 3)])
def test_meta_has_the_shapes(shape, double_quant):
    real = weight_of(shape, double_quant)
    meta = quantize_nf4(
        torch.empty(shape, device="meta", dtype=torch.bfloat16), double_quant=double_quant
    )
    for a, b in zip(
        (*real.parts()[:4], real.absmax), (*meta.parts()[:4], meta.absmax), strict=True
    ):
        assert (a is None) == (b is None)
        assert a is None or (a.shape, a.dtype, "meta") == (b.shape, b.dtype, b.device.type)
    assert (
        dequantize_nf4(meta).shape == shape
        and dequantize_nf4(meta, torch.float32).dtype == torch.float32
    )
    assert dequantize_nf4(real.to("meta")).is_meta
    assert list(meta.state_dict()) == list(real.state_dict())


def test_out_is_written_in_its_own_dtype():
    weight = weight_of()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        out = torch.full(weight.shape, torch.nan, dtype=dtype)
        assert dequantize_nf4(weight, out=out) is out
        assert torch.equal(out, dequantize_nf4(weight, dtype))


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton's interpreter supports only one thread",
)
def test_threads_do_not_share_scratch():
    weights = [weight_of((700 + i, 512)) for i in range(4)]
    expected, right = [dequantize_nf4(weight) for weight in weights], []

    def work(i: int) -> None:
        right.extend(torch.equal(dequantize_nf4(weights[i]), expected[i]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert right == [True] * 20  # 4 threads x 5 checks


def test_first_use_in_inference_mode_does_not_spoil_training():
    for table in (torch_cpu._bin_tables, torch_cpu._levels_of_byte, torch_cpu._dynamic_table):
        table.cache_clear()
    with torch.inference_mode():
        weight = weight_of()
        dequantize_nf4(weight)
    x = torch.randn(3, 64, requires_grad=True)
    (x @ dequantize_nf4(weight_of(), torch.float32).T).sum().backward()
    assert x.grad is not None


def test_parameters_that_require_grad_are_quantised_without_a_graph():
    weight = quantize_nf4(torch.nn.Linear(64, 8).weight)
    assert not weight.packed.requires_grad and not weight.absmax.requires_grad


# ---- the choice of a path


def test_the_reference_can_be_forced_and_has_the_same_bits(monkeypatch):
    x, fast = torch.randn(5, 100), []
    for path in ("auto", "cpu", "reference"):
        monkeypatch.setenv("MINILORA_NF4", path)
        assert paths.path_for(x.device) == ("reference" if path == "reference" else "cpu")
        weight = quantize_nf4(x)
        fast.append((weight.packed, weight.scales, dequantize_nf4(weight)))
    assert all(torch.equal(a, b) for other in fast[1:] for a, b in zip(fast[0], other, strict=True))
    monkeypatch.delattr(torch_cpu, "quantize")
    quantize_nf4(x)  # raises unless the reference runs


def test_a_forced_path_that_cannot_run_raises(monkeypatch):
    monkeypatch.setenv("MINILORA_NF4", "gpu")
    with pytest.raises(ValueError, match="expected auto, reference, cpu or triton, got 'gpu'"):
        quantize_nf4(torch.ones(64))
    monkeypatch.setenv("MINILORA_NF4", "cpu")
    with pytest.raises(ValueError, match="on cuda:0"):
        paths.path_for(torch.device("cuda:0"))
    monkeypatch.setenv("MINILORA_NF4", "triton")
    for device in ("mps", "xpu"):
        with pytest.raises(
            ValueError,
            match=f"on {device}, triton installed; Triton runs on a GPU, or on CPU tensors",
        ):
            paths.path_for(torch.device(device))
    monkeypatch.setattr(paths, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="on cuda, triton not installed"):
        paths.path_for(torch.device("cuda"))


def test_a_gpu_takes_triton_and_a_device_without_a_kernel_is_announced_once(monkeypatch):
    monkeypatch.setenv("MINILORA_NF4", "auto")
    paths._warn_slow.cache_clear()
    assert paths.path_for(torch.device("cuda:0")) == "triton"
    with pytest.warns(
        UserWarning, match="'mps' runs in plain torch, which is slow: it has no kernel"
    ):
        assert paths.path_for(torch.device("mps")) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths.path_for(torch.device("mps"))
    monkeypatch.setattr(paths, "find_spec", lambda name: None)
    with pytest.warns(
        UserWarning, match="'cuda' runs in plain torch, which is slow: triton is not installed"
    ):
        assert paths.path_for(torch.device("cuda:0")) == "reference"


# ---- errors


def test_an_out_that_does_not_fit_raises():
    weight = weight_of()
    for out in (torch.empty(64, 33), torch.empty(64, 33).T, torch.empty(33, 64, device="meta")):
        with pytest.raises(ValueError, match="expected out to be contiguous"):
            dequantize_nf4(weight, out=out)
    packed, scales, nested, offset, shape, blocksize = weight.parts()
    with pytest.raises(ValueError, match="expected a contiguous out"):
        OPS.dequantize_nf4_out(
            packed, scales, nested, offset, blocksize, torch.full((33, 128), 7.0)[:, :64]
        )
    with pytest.raises(ValueError, match="expected dtype to be that of out"):
        dequantize_nf4(weight, torch.float16, out=torch.empty(33, 64))
    with pytest.raises(ValueError, match="expected a dtype of"):
        dequantize_nf4(weight, torch.int32)
    with pytest.raises(ValueError, match="expected a dtype of"):
        dequantize_nf4(weight, out=torch.empty(33, 64, dtype=torch.uint8))


@pytest.mark.parametrize("op", DEQUANTIZE)
def test_parts_that_do_not_fit_raise(op):
    packed, scales, nested, offset, shape, blocksize = weight_of().parts()
    absmax = weight_of().absmax
    for parts, message in [
        ((packed[1:], scales, nested, offset, shape, blocksize), "expected .* to be"),
        ((packed, scales[1:], nested, offset, shape, blocksize), "expected .* to be"),
        ((packed, scales, nested, offset, (33, 65), blocksize), "expected .* to be"),
        ((packed, scales, nested, offset, shape, 128), "expected .* to be"),
        ((packed.int(), scales, nested, offset, shape, blocksize), "expected .* to be"),
        (
            (packed, scales, None, None, shape, blocksize),
            "pass fp32 scales alone, or uint8 scales with",
        ),
        (
            (packed, scales, nested, None, shape, blocksize),
            "pass fp32 scales alone, or uint8 scales with",
        ),
        (
            (packed, absmax, nested, offset, shape, blocksize),
            "pass fp32 scales alone, or uint8 scales with",
        ),
        (
            (packed, absmax.half(), None, None, shape, blocksize),
            "pass fp32 scales alone, or uint8 scales with",
        ),
        ((packed, absmax, None, None, shape, 63), "expected a blocksize"),
    ]:
        with pytest.raises(ValueError, match=message):
            op(*parts, torch.float32)


def test_all_is_sorted_and_importable():
    assert minilora_kernels.__all__ == sorted(minilora_kernels.__all__)
    assert all(hasattr(minilora_kernels, name) for name in minilora_kernels.__all__)
