"""Tests, in Triton's interpreter, of the kernels for 8-bit AdamW and for cross-entropy.

8-bit AdamW has the bits of its reference implementation. Cross-entropy is exact up to roundings of
fp32 and one rounding to the logits' dtype. Oracles: the reference step, and fp64.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

from helpers.kernel_parts import few_fast
from minilora.training.optim import adamw_8bit as plain
from minilora_kernels import dynamic_map
from minilora_kernels.backend import has_kernels
from minilora_kernels.nf4.codebook import midpoints
from minilora_kernels.ops import cross_entropy as ce
from minilora_kernels.triton import adamw_8bit as adam8bit
from minilora_kernels.triton import cross_entropy, launch

CPU = torch.device("cpu")
TILE = dict(launch.TILES["cross_entropy"]["default"].constants)["WIDTH"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def test_has_kernels_follows_the_environment(monkeypatch):
    assert has_kernels(CPU)  # under MINILORA_NF4=triton
    monkeypatch.setenv("MINILORA_NF4", "auto")
    assert not has_kernels(CPU) and has_kernels(torch.device("cuda"))
    monkeypatch.setenv("MINILORA_NF4", "reference")
    assert not has_kernels(torch.device("cuda"))


# ---- 8-bit AdamW: the bits of the reference step


def numbers(t, beta1=0.9, beta2=0.99, lr=1e-2):
    return (
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 / math.sqrt(1 - beta2**t),
        1e-8,
        1 - lr * 0.1,
        -lr / (1 - beta1**t),
    )


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1003, 256 * 9, 256 * 13 + 77])
def test_an_adamw_step_has_the_bits_of_the_reference_step(n):
    p = torch.randn(n)
    moments = plain.zero_moments(p, True)
    ours, kept = p.clone(), [part.clone() for part in moments]
    for t in range(1, 7):
        g = torch.randn(n) * 10 ** (torch.rand(n) * 9 - 8)  # nine orders of magnitude
        g[torch.rand(n) < 0.1] = 0
        g[: n // 3] *= t != 2  # in the second step, moments of whole blocks only shrink
        plain.plain_step(p, g, moments, numbers(t))
        adam8bit.step(ours, g, kept, numbers(t))
        for a, b in zip((p, *moments), (ours, *kept), strict=True):
            assert torch.equal(a, b), t


@pytest.mark.parametrize("paged", [False, True])
def test_the_optimiser_has_the_same_bits_with_and_without_kernels(paged, monkeypatch):
    def run(kernels):
        monkeypatch.setattr(plain, "has_kernels", lambda device: kernels)
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in ((70, 100), (3, 5))]
        optimizer = plain.AdamW8bit(params, lr=1e-2, weight_decay=0.1, paged=paged)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).T.contiguous().T  # not contiguous
            optimizer.step()
        return params, [value for p in params for value in optimizer.state[p].values()]

    for a, b in zip(sum(run(True), []), sum(run(False), []), strict=True):
        assert torch.equal(a, b)


@triton.jit
def _codes_of(y_ptr, midpoints_ptr, out_ptr, SIGNED: tl.constexpr):
    i = tl.program_id(0) * 256 + tl.arange(0, 256)
    tl.store(out_ptr + i, adam8bit._codes(tl.load(y_ptr + i), midpoints_ptr, SIGNED))


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_begins_at_its_midpoint(signed):
    """Test each midpoint and the next number above it, which proves all numbers.

    The bin never falls as y grows (it is the smallest of seven rising lines, rounded), so between
    two midpoints it is the bin of one of the two, and a comparison selects the code.
    """
    t = midpoints(dynamic_map(signed))
    ends = torch.tensor([-1.0, 0.0, -0.0, 1e-45, 2.0**-126, 1.0, 1 + 2.0**-23])
    far = torch.full_like(t, torch.inf)
    y = torch.cat([t, torch.nextafter(t, far), torch.nextafter(t, -far), dynamic_map(signed), ends])
    y = torch.cat([y, torch.randn(10**4) * 10 ** (torch.rand(10**4) * 8 - 8)]).clamp(
        -1, 1 + 2.0**-23
    )
    y = y if signed else y.abs()
    y = torch.cat([y, torch.zeros(-len(y) % 256)])
    table = (adam8bit._signed_midpoints if signed else adam8bit._unsigned_midpoints)()
    _codes_of[(len(y) // 256,)](
        y, table, out := torch.empty(len(y), dtype=torch.int32), SIGNED=signed
    )
    assert torch.equal(out, torch.bucketize(y, t, out_int32=True))


@pytest.mark.parametrize("scale", [1.0, 0.75, 0.7, 0.3, 1e-3, 3.1e-5, 1.7e18, 2.0**-126, 1e-40])
def test_values_next_to_a_midpoint_get_the_code_of_the_reference_step(scale):
    """Here a quotient and a product with an inexact reciprocal give different codes."""
    t = midpoints(dynamic_map()) * scale
    near = [torch.nextafter(t, torch.full_like(t, side)) for side in (-torch.inf, torch.inf)]
    g = torch.cat([torch.cat([torch.tensor([scale]), x]) for x in (t, *near)])  # three blocks
    p, moments, kept = torch.zeros(len(g)), plain.zero_moments(g, True), plain.zero_moments(g, True)
    adam8bit.step(p.clone(), g, moments, numbers(1, beta1=0.0))
    plain.plain_step(p, g, kept, numbers(1, beta1=0.0))
    assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))


@pytest.mark.parametrize("largest", [2.0**-125, 2.0**-126, 2.0**-127, 2.0**-140])
def test_a_block_around_the_smallest_normal_number(largest):
    """Below that number the reciprocal of the largest value would be infinite or nearly so."""
    g = torch.linspace(-1, 1, 256) * largest
    p, moments, kept = torch.zeros(256), plain.zero_moments(g, True), plain.zero_moments(g, True)
    adam8bit.step(p.clone(), g, moments, numbers(1, beta1=0.0))
    plain.plain_step(p, g, kept, numbers(1, beta1=0.0))
    assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_affects_only_its_block(bad):
    p, g = torch.randn(3 * 256), torch.randn(3 * 256)
    g[300] = bad
    expected, moments, kept = p.clone(), plain.zero_moments(p, True), plain.zero_moments(p, True)
    adam8bit.step(p, g, moments, numbers(1))
    plain.plain_step(expected, g, kept, numbers(1))
    assert (
        torch.isfinite(moments[1]).tolist()
        == torch.isfinite(kept[1]).tolist()
        == [True, False, True]
    )
    assert p.isnan().nonzero().tolist() == expected.isnan().nonzero().tolist() == [[300]]


@pytest.mark.parametrize("n", [1, 300, 1024, 5 * 256])
def test_an_adamw_step_writes_only_its_results(n):
    rows = -(-n // 256)
    sizes = [(n, torch.float32), (rows * 256, torch.uint8), (rows, torch.float32)] + [
        (rows * 256, torch.uint8)
    ]
    memory = [
        torch.full((size + 64,), 77, dtype=dtype) for size, dtype in [*sizes, (rows, torch.float32)]
    ]
    p, *moments = (whole[:-64] for whole in memory)
    adam8bit.step(
        p,
        torch.randn(n),
        [m.view(rows, -1) if m.dtype == torch.uint8 else m for m in moments],
        numbers(1),
    )
    assert all((whole[-64:] == 77).all() for whole in memory), "written past the end"


@pytest.mark.parametrize("rows, warps", [(1, 1), (2, 4), (16, 8)])
def test_other_tiles_give_the_same_adamw_step(rows, warps):
    p, g = torch.randn(2000), torch.randn(2000)
    ours, moments, kept = p.clone(), plain.zero_moments(p, True), plain.zero_moments(p, True)
    with launch.overridden("adamw_8bit", launch.tile(warps, ROWS=rows)):
        adam8bit.step(ours, g, kept, numbers(1))
    plain.plain_step(p, g, moments, numbers(1))
    assert all(torch.equal(a, b) for a, b in zip((p, *moments), (ours, *kept), strict=True))


# ---- cross-entropy


def exact(logits, labels):
    """Return loss (C,) and gradient (C, V) in fp64."""
    log_p = logits.double().log_softmax(1)
    own = log_p.gather(1, labels[:, None])
    return -own[:, 0], log_p.exp().scatter_(1, labels[:, None], own.expm1())


def ours(logits, labels, gradient=True, lift=1.0):
    loss, out = torch.empty(len(logits)), logits.clone()
    cross_entropy.cross_entropy(out, labels, loss, gradient, lift)
    return loss, out


@pytest.mark.parametrize(
    "columns, dtype", few_fast([1, 2, 50, TILE - 1, TILE, TILE + 1, 3 * TILE + 5], DTYPES)
)
def test_loss_and_gradient_of_a_chunk(columns, dtype):
    logits = (torch.randn(6, columns) * 5).to(dtype)
    labels = torch.tensor([0, columns - 1, columns // 2, min(TILE, columns) - 1, TILE % columns, 0])
    loss, gradient = ours(logits, labels)
    expected_loss, expected = exact(logits, labels)
    # 2^-16: the rounding of z - m, below 2^6, is 2^-19. The product with log2 e adds as much, and
    # the sums are rounded too.
    assert ((loss - expected_loss).abs() <= 2.0**-16).all()
    unit = torch.finfo(dtype).eps / 2
    bound = (2.0**-16 + unit) * expected.abs() + torch.finfo(dtype).smallest_normal * unit
    assert gradient.dtype == dtype and ((gradient.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_shift_of_all_logits_changes_nothing(shift):
    """The logits are integers, so the shift is exact. Without the maximum e^z would be 0 or inf."""
    logits, labels = (
        torch.randint(-9, 9, (4, TILE + 7)).float(),
        torch.tensor([0, 1, TILE, TILE + 6]),
    )
    for found, expected in zip(ours(logits + shift, labels), ours(logits, labels), strict=True):
        torch.testing.assert_close(found, expected, rtol=2.0**-16, atol=2.0**-16)


def test_the_gradient_of_a_very_likely_token_does_not_vanish():
    """1 - p is 6e-6 to 1e-26, and p in fp32 is 1."""
    logits = torch.zeros(4, 3)
    logits[:, 1] = torch.tensor([12.0, 20.0, 40.0, 60.0])
    labels = torch.ones(4, dtype=torch.long)
    _, gradient = ours(logits, labels, lift=2.0)
    expected = 2 * exact(logits, labels)[1]
    # The gradient of a row sums to 0. In fp64 some p is 1 too, so its gradient is computed from
    # the others.
    expected[:, 1] = -expected[:, 0] - expected[:, 2]
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=0)


def test_cross_entropy_of_distant_and_infinite_logits():
    logits = torch.tensor(
        [[3e4, -3e4, 0.0], [-torch.inf, 1.0, 2.0], [5.0, 5.0, 5.0], [-torch.inf, -torch.inf, 7.0]]
    )
    labels = torch.tensor([1, 2, 0, 2])
    loss, gradient = ours(logits, labels)
    expected_loss, expected = exact(logits, labels)
    torch.testing.assert_close(loss.double(), expected_loss)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-30)


def test_an_invalid_label_or_logit_gives_nan_in_its_row():
    logits = torch.randn(6, 7)
    logits[3, 2] = torch.nan
    loss, gradient = ours(logits, torch.tensor([6, -1, 3, 3, 7, 2**40]))
    assert (
        loss.isnan().tolist()
        == gradient.isnan().all(1).tolist()
        == [False, True, False, True, True, True]
    )


def test_without_a_gradient_the_logits_do_not_change():
    for dtype in DTYPES:
        logits, labels = torch.randn(3, 100).to(dtype), torch.tensor([1, 2, 3])
        loss, after = ours(logits, labels, gradient=False)
        assert torch.equal(after, logits) and torch.equal(loss, ours(logits, labels)[0])


@pytest.mark.parametrize("columns", [5, TILE - 3, TILE + 8])
def test_cross_entropy_writes_only_its_results(columns):
    memory = torch.full((3 * columns + 64,), 77.0)
    memory[:-64] = torch.randn(3 * columns)
    loss = torch.full((3 + 64,), 77.0)
    labels = torch.tensor([0, 1, columns - 1])
    cross_entropy.cross_entropy(memory[:-64].view(3, -1), labels, loss[:3], True, 1.0)
    assert (memory[-64:] == 77).all() and (loss[3:] == 77).all()


@pytest.mark.parametrize("dtype, trained", few_fast(DTYPES, [False, True]))
def test_head_logprobs_with_and_without_the_kernel_agree(dtype, trained, monkeypatch):
    """Both are within their own roundings of fp64.

    So the difference between the two is compared with the distance of one of them to fp64.
    """
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(37, 24, generator=generator).to(dtype)
    weight = (torch.randn(301, 24, generator=generator) / 3).to(dtype)
    labels = torch.randint(301, (37,), generator=generator)
    labels[::5] = ce.IGNORE
    outside = torch.rand(37, generator=generator)  # each row's own factor, as DPO has

    def run(kernels, kind):
        monkeypatch.setattr(ce, "has_kernels", lambda device: kernels)
        h, W = (t.to(kind).requires_grad_() for t in (hidden, weight))
        head = nn.Linear(24, 301, bias=False)
        head.weight = nn.Parameter(W.detach(), requires_grad=trained)
        log_p = ce.head_logprobs(h, head, labels, 8)
        return log_p, *torch.autograd.grad((log_p * outside).sum(), (h, *[head.weight] * trained))

    plain_rows, kernel, right = run(False, dtype), run(True, dtype), run(False, torch.float64)
    for a, b, c in zip(plain_rows, kernel, right, strict=True):
        assert b.dtype == a.dtype
        a, b, c = a.double(), b.double(), c.double()
        assert (b - a).norm() <= 1.5 * (a - c).norm() + 1e-6 * c.norm()
    assert (kernel[0][::5] == 0).all() and (kernel[1][::5] == 0).all()


@pytest.mark.slow
def test_linear_cross_entropy_compiles_without_a_graph_break():
    hidden, weight, labels = (
        torch.randn(9, 8, requires_grad=True),
        torch.randn(11, 8),
        torch.randint(11, (9,)),
    )

    def f(h):
        return ce.linear_cross_entropy(h, weight, labels, 4)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), f(hidden))
    assert torch.equal(*(torch.autograd.grad(g(hidden), hidden)[0] for g in (compiled, f)))


def test_opcheck_of_cross_entropy():
    for gradient in (False, True):
        arguments = (torch.randn(3, 20), torch.tensor([1, 2, 3]), torch.empty(3), gradient, 1.0)
        torch.library.opcheck(torch.ops.minilora.cross_entropy_, arguments)
