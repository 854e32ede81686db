"""Tests that kernels use 64-bit offsets for tensors of more than 2^31 elements.

Only a program near the end runs. The operating system allocates no pages for the rest of the
tensor, because nothing accesses it.
"""

import pytest
import torch
from triton.runtime import interpreter

from helpers.kernel_parts import DEQUANTIZE, GEMV, dense, normal, parts_of
from minilora_kernels.nf4 import reference
from minilora_kernels.ops.rope import plain_rotate
from minilora_kernels.triton import (
    adamw_8bit,
    cross_entropy,
    launch,
    nf4_dequantize,
    nf4_gemv,
    nf4_matmul,
    nf4_quantize,
    rms_norm,
    rope,
    swiglu,
)


@pytest.fixture
def only_program(monkeypatch):
    """Function only_program(i): of every launch, one program runs, with program id i."""
    run = launch.run

    def only(number: int) -> None:
        def program(builder: object, axis: int) -> interpreter.TensorHandle:
            return interpreter.TensorHandle(
                torch.tensor([number], dtype=torch.int32).numpy(), interpreter.tl.int32
            )

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", program)
        nf4 = nf4_dequantize, nf4_quantize, nf4_gemv, nf4_matmul
        for module in (*nf4, adamw_8bit, cross_entropy, swiglu, rms_norm, rope):
            monkeypatch.setattr(
                module, "run", lambda name, kernel, programs, *a, **k: run(name, kernel, 1, *a, **k)
            )

    return only


FAR = 2**31 + 4096 * 64  # elements; the tests compare the last 4096


@pytest.mark.parametrize("per_program, dequantize", [(4096, DEQUANTIZE[0]), (1024, DEQUANTIZE[1])])
def test_dequantising_far_elements(only_program, per_program, dequantize):
    x = normal(per_program)
    small = parts_of(x, 64, True)
    packed, codes = (
        torch.empty(FAR // 2, dtype=torch.uint8),
        torch.empty(FAR // 64, dtype=torch.uint8),
    )
    packed[-per_program // 2 :], codes[-per_program // 64 :] = small[0], small[1]
    nested, out = (
        small[2].expand(FAR // 64 // 256).contiguous(),
        torch.empty(FAR, dtype=torch.float16),
    )
    only_program(FAR // per_program - 1)
    dequantize(packed, codes, nested, small[3], 64, out)
    assert torch.equal(out[-per_program:], dense(small, 64, (per_program,), torch.float16))


def test_quantising_far_elements(only_program):
    x = torch.empty(FAR, dtype=torch.bfloat16)
    x[-2048:] = normal(2048, dtype=torch.bfloat16)
    only_program(FAR // 2048 - 1)
    packed, absmax = nf4_quantize.quantize(x, 64)
    expected = reference.quantize(x[-2048:], 64)
    assert torch.equal(packed[-1024:], expected[0]) and torch.equal(absmax[-32:], expected[1])


@pytest.mark.parametrize("gemv, rows_per_program", [(GEMV[0], 2), (GEMV[1], 1)])
def test_a_token_through_far_rows(only_program, gemv, rows_per_program):
    rows, k = 2**34 // 4096 + 2, 4096  # more than 2^31 words
    small = parts_of(normal(2, k), 64, True)
    packed, codes = (
        torch.empty(rows * k // 2, dtype=torch.uint8),
        torch.empty(rows * k // 64, dtype=torch.uint8),
    )
    packed[-k:], codes[-2 * k // 64 :] = small[0], small[1]
    nested = small[2].expand(-(-rows * k // 64 // 256)).contiguous()
    x = torch.zeros(k)
    x[-1] = 1
    only_program(rows // rows_per_program - 1)
    y = gemv(x, packed, codes, nested, small[3], (rows, k), 64)
    expected = dense(small, 64, (2, k))[:, -1]
    assert torch.equal(y[-rows_per_program:], expected[-rows_per_program:])


def test_few_tokens_through_far_rows(only_program):
    rows, k = 2**24 + 64, 1024  # more than 2^31 words
    small = parts_of(normal(64, k), 64, True)
    sizes = rows * k // 2, rows * k // 64, rows * k // 64 // 256
    far = [torch.empty(size, dtype=part.dtype) for size, part in zip(sizes, small[:3], strict=True)]
    for whole, part in zip(far, small[:3], strict=True):
        whole[-len(part) :] = part
    x = torch.zeros(2, k, dtype=torch.float16)
    x[0, -1] = x[1, 0] = 1
    tile = dict(launch.tile_for("matmul_nf4").constants)
    only_program(-(-rows // tile["ROWS"]) - 1)
    y = nf4_matmul.matmul(x, *far, small[3], (rows, k), 64)
    assert torch.equal(y[:, -64:], dense(small, 64, (64, k), x.dtype)[:, [-1, 0]].T)


def test_a_row_of_far_logits(only_program):
    columns, rows = 2**18, 2**13 + 2
    logits, labels = (
        torch.empty(rows, columns, dtype=torch.float16),
        torch.zeros(rows, dtype=torch.long),
    )
    logits[-1] = 1.0
    only_program(rows - 1)
    cross_entropy.cross_entropy(logits, labels, loss := torch.empty(rows), True, 2.0**10)
    assert loss[-1].item() == pytest.approx(18 * 0.6931472, rel=1e-6)
    # lift (p - 1), rounded, and lift / V
    assert logits[-1, 0] == -(2**10) and (logits[-1, 1:] == 2.0**-8).all()


@pytest.mark.slow
def test_a_step_on_far_values(only_program):
    p = torch.empty(FAR, dtype=torch.float32)
    small = torch.randn(1024)
    p[-1024:] = small
    codes, scales = torch.empty(FAR // 256, 256, dtype=torch.uint8), torch.zeros(FAR // 256)
    only_program(FAR // 1024 - 1)
    numbers = (0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0)
    adamw_8bit.step(p, p, (codes, scales, codes.clone(), scales.clone()), numbers)
    assert torch.equal(p[-1024:], small + small.sign())


def test_a_norm_of_far_rows(only_program):
    x, w = (
        torch.empty(FAR // 4096, 4096, dtype=torch.float16),
        torch.full((4096,), 3.0, dtype=torch.float16),
    )
    x[-1] = 2.0
    only_program(len(x) - 1)
    y, r = rms_norm.rms_norm(x, w, 0.0, False)
    assert (y[-1] == 3).all() and r[-1] == 0.5
    # dy = x, so dh = 6, h = 1 and dx = r (6 - 1 * 6)
    dx = rms_norm.rms_norm_backward(x, w, r, x, False)
    assert (dx[-1] == 0).all()


def test_the_weight_of_a_norm_of_far_rows(only_program, monkeypatch):
    x, r, strip = (
        torch.empty(FAR // 4096, 4096, dtype=torch.float16),
        torch.empty(FAR // 4096, 1),
        16 * rms_norm.STEPS,
    )
    x[-strip:], r[-strip:] = 2.0, 0.5  # dy = x, so dw is 2 per row
    sums = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda self, dim: sums.append(self))
    only_program(-(-len(x) // strip) * 32 - 1)  # the last of 32 pieces of the last strip
    rms_norm.rms_norm_weight(x, r, x)
    assert (sums[0][-1, -128:] == len(x) % strip * 2).all()


def test_a_gate_of_far_values(only_program):
    x = torch.empty(FAR, dtype=torch.float16)
    x[-1024:] = normal(1024, dtype=torch.float16, scale=1.0)
    only_program(FAR // 1024 - 1)
    near = x[-1024:].clone()
    y, (dgate, dup) = swiglu.gated(x, x, False), swiglu.gated_backward(x, x, x, False)
    only_program(0)
    expected = swiglu.gated(near, near, False), *swiglu.gated_backward(near, near, near, False)
    assert all(
        torch.equal(far[-1024:], part) for far, part in zip((y, dgate, dup), expected, strict=True)
    )


def test_a_rotation_of_far_heads(only_program):
    x = torch.empty(FAR // 2**19 + 1, 2**12, 2, 64, dtype=torch.float16)
    x = x.transpose(1, 2)  # (B, 2, T, 64)
    x[-1, :, -8:] = normal(2, 8, 64, dtype=torch.float16, scale=1.0)
    cos, sin = (torch.rand(1, 1, 2**12, 32).half().repeat(1, 1, 1, 2) for _ in range(2))
    only_program(x.numel() // 64 // 32 - 1)  # 32 heads of 32 pairs
    y = rope.rotate(x, cos, sin, 1.0)
    assert torch.equal(y[-1:, :, -8:], plain_rotate(x[-1:, :, -8:], cos[:, :, -8:], sin[:, :, -8:]))
