"""Five jobs on one layer for kernel_bench.py, done by our kernels, plain torch and bitsandbytes.

    for job in jobs((4096, 14336), torch.device("cuda"), clock, PEERS):
        job.calls["minilora"](turn)

Our calls go directly to the launchers; on a CPU without Triton's interpreter they go to the CPU
implementation. Plain torch computes with the reference's arithmetic and has its tables on the
device, so that no call waits for a copy from the host. bitsandbytes dequantises the same bits as
our kernels. All take bf16 and double-quantised weights in blocks of 64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._lib.bench_timing import Call, Clock, buffers
from minilora_kernels import NF4Weight, dynamic_map, nf4_codebook, nf4_thresholds
from minilora_kernels.nf4 import reference, torch_cpu
from minilora_kernels.nf4.codebook import midpoints
from minilora_kernels.nf4.reference import NESTED_BLOCKSIZE
from minilora_kernels.triton import nf4_dequantize, nf4_gemv, nf4_matmul, nf4_quantize
from minilora_kernels.triton.launch import interpreted

BLOCKSIZE = 64
OURS = "minilora"
PEERS = ("eager", "compile", "bitsandbytes")
DEQUANTISE = "dequantise, double"
QUANTISE = "quantise"
QUANTISE_TWICE = "quantise, double"
GEMV = "GEMV"
FEW, TOKENS = "16 tokens", 16
# In a product each contender adds up in another order, and some round W in a GEMV.
PRODUCTS = (GEMV, FEW)
# Operations of the formula for one weight. Dequantise: level * absmax. Quantise: max, * 1/absmax,
# and four comparisons, since 15 thresholds are halved 4 times. Products: level * x, and add.
OPERATIONS = {DEQUANTISE: 1, QUANTISE: 6, QUANTISE_TWICE: 6, GEMV: 2, FEW: 2 * TOKENS}
Calls = dict[str, dict[str, Call]]  # job -> contender -> call of a turn


@dataclass(frozen=True)
class Job:
    """One operation to time, with the calls of all contenders."""

    name: str
    bytes: int  # of the inputs and results of one call
    operations: int
    calls: dict[str, Call]  # contender -> call of a turn, ours first; the results are compared


def jobs(
    shape: tuple[int, int], device: torch.device, clock: Clock, peers: Sequence[str]
) -> Iterator[Job]:
    """Yield the jobs on a layer (out, in), with buffers used in turn. `peers`: some of PEERS."""
    b = Buffers(shape, device, clock)
    every: list[Calls] = [our_calls(b)]
    if "eager" in peers:
        every.append(plain_calls(b, "eager", lambda function: function))
    if "compile" in peers:
        torch.compiler.reset()  # otherwise the number of shapes reaches the limit of recompilations
        every.append(
            plain_calls(b, "compile", lambda function: torch.compile(function, dynamic=False))
        )
    if "bitsandbytes" in peers:
        every.append(bitsandbytes_calls(b))
    every.append(
        {job: {"dense": lambda turn, x=x: F.linear(x, at(b.outs, turn))} for job, x in b.xs.items()}
    )

    dense = b.dense[0].nbytes
    weight = sum(part.nbytes for part in b.weights[0])
    plain = b.weights[0][0].nbytes + 4 * len(b.weights[0][1])  # packed codes and fp32 absmax
    vectors = sum(shape) * b.xs[GEMV].element_size()
    moved = {
        DEQUANTISE: weight + dense,
        QUANTISE: dense + plain,
        QUANTISE_TWICE: dense + weight,
        GEMV: weight + vectors,
        FEW: weight + TOKENS * vectors,
    }
    for name, operations in OPERATIONS.items():
        calls: dict[str, Call] = {}
        for group in every:
            calls |= group.get(name, {})
        yield Job(name, moved[name], operations * b.dense[0].numel(), calls)


class Buffers:
    """Several copies of each tensor of a layer."""

    def __init__(self, shape: tuple[int, int], device: torch.device, clock: Clock) -> None:
        generator = torch.Generator(device).manual_seed(0)
        W = (torch.randn(shape, generator=generator, device=device) * 0.02).bfloat16()
        self.shape = shape
        x = torch.randn(TOKENS, shape[1], generator=generator, device=device).bfloat16()
        self.xs = {GEMV: x[0].clone(), FEW: x}
        parts = quantize_twice(W)
        count = buffers(sum(part.nbytes for part in parts), clock)
        # each: packed, scales, nested, offset
        self.weights = [tuple(part.clone() for part in parts) for _ in range(count)]
        self.dense = [W.clone() for _ in range(buffers(W.nbytes, clock))]
        # the outputs of dequantising, and the dense weights of the products
        self.outs = [dequantize(parts, torch.empty_like(W)) for _ in self.dense]

    def keep(self, call: Callable[[int], Sequence[Tensor]]) -> Call:
        """Return a call that returns the codes and keeps its results for some turns.

        Kept results are not freed, so the next turn writes to other memory.
        """
        kept: list[Any] = [None] * len(self.weights)

        def kept_call(turn: int) -> Tensor:
            kept[turn % len(kept)] = results = call(turn)
            return results[0].view(-1)

        return kept_call


def at(buffers: Sequence[Any], turn: int) -> Any:
    """Return the buffer of this turn."""
    return buffers[turn % len(buffers)]


# ---- ours


def our_calls(b: Buffers) -> Calls:
    """Return our calls of every job: the launchers."""
    return {
        DEQUANTISE: {OURS: lambda turn: dequantize(at(b.weights, turn), at(b.outs, turn))},
        QUANTISE: {OURS: b.keep(lambda turn: quantize(at(b.dense, turn)))},
        QUANTISE_TWICE: {OURS: b.keep(lambda turn: quantize_twice(at(b.dense, turn)))},
        GEMV: {OURS: lambda turn: multiply(b.xs[GEMV], at(b.weights, turn), b.shape)},
        FEW: {
            OURS: lambda turn: multiply(b.xs[FEW], at(b.weights, turn), b.shape),
            "dequantised": lambda turn: F.linear(
                b.xs[FEW], dequantize(at(b.weights, turn), at(b.outs, turn))
            ),
        },
    }


def on_triton(t: Tensor) -> bool:
    """Return True if the kernels run on this tensor."""
    return t.is_cuda or interpreted()


def dequantize(parts: Sequence[Tensor], out: Tensor) -> Tensor:
    """Dequantise packed, scales, nested_absmax, offset to `out` and return it."""
    packed, scales, nested, offset = parts
    if on_triton(out):
        nf4_dequantize.dequantize(packed, scales, nested, offset, BLOCKSIZE, out)
    else:
        torch_cpu.dequantize(
            packed, torch_cpu.double_dequantize(scales, nested, offset), BLOCKSIZE, out
        )
    return out


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed and absmax of x."""
    implementation = nf4_quantize if on_triton(x) else torch_cpu
    return implementation.quantize(x, BLOCKSIZE)


def quantize_twice(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return packed, scales, nested_absmax and offset of x."""
    packed, absmax = quantize(x)
    implementation = nf4_quantize if on_triton(x) else reference
    return packed, *implementation.double_quantize(absmax)


def multiply(x: Tensor, parts: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Return x Wᵀ for x (in,) or (tokens, in), without a dense W where a kernel exists."""
    packed, scales, nested, offset = parts
    if on_triton(x) and x.dim() == 1:
        return nf4_gemv.gemv(x, packed, scales, nested, offset, shape, BLOCKSIZE)
    if on_triton(x) and nf4_matmul.fits(x.dtype, x.device, shape, len(x)):
        return nf4_matmul.matmul(x, packed, scales, nested, offset, shape, BLOCKSIZE)
    return F.linear(x, dequantize(parts, x.new_empty(shape)))


# ---- plain torch


class Tables(NamedTuple):
    """The constants, on the device."""

    levels: Tensor
    map: Tensor
    thresholds: Tensor
    midpoints: Tensor  # of the map


def plain_calls(b: Buffers, name: str, prepare: Callable[[Callable], Callable]) -> Calls:
    """Return the calls of the functions below, each passed through `prepare` first."""
    tables = (nf4_codebook(), dynamic_map(), nf4_thresholds(), midpoints(dynamic_map()))
    t = Tables(*(table.to(b.xs[GEMV].device) for table in tables))
    dequantize = prepare(plain_dequantize)
    quantize = prepare(plain_quantize)
    twice = prepare(plain_twice)
    multiply = prepare(plain_multiply)
    return {
        DEQUANTISE: {name: lambda turn: dequantize(t, at(b.weights, turn), b.shape)},
        QUANTISE: {name: b.keep(lambda turn: quantize(t, at(b.dense, turn)))},
        QUANTISE_TWICE: {name: b.keep(lambda turn: twice(t, at(b.dense, turn)))},
        **{
            job: {name: lambda turn, x=x: multiply(t, x, at(b.weights, turn), b.shape)}
            for job, x in b.xs.items()
        },
    }


def plain_dequantize(t: Tables, parts: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Return the weight in bf16, in `shape`."""
    packed, codes, nested, offset = parts
    nested_of_block = nested.repeat_interleave(NESTED_BLOCKSIZE)[: len(codes)]  # (K,)
    absmax = t.map[codes.int()] * nested_of_block + offset  # (K,)
    levels = t.levels[reference.unpack(packed).int()].view(-1, BLOCKSIZE)  # (K, B)
    return (levels * absmax[:, None]).bfloat16().view(shape)


def plain_quantize(t: Tables, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed and absmax."""
    codes, absmax = _plain_blocks(x.float().view(-1, BLOCKSIZE), t.thresholds)
    return reference.pack(codes.view(-1)), absmax


def plain_twice(t: Tables, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return packed, scales, nested_absmax and offset."""
    packed, absmax = plain_quantize(t, x)
    d = absmax - absmax.mean()
    padded = F.pad(d, (0, -len(d) % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    codes, nested = _plain_blocks(padded, t.midpoints)
    return packed, codes.view(-1)[: len(d)], nested, absmax.mean()


def plain_multiply(t: Tables, x: Tensor, parts: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Return x Wᵀ (…, out) for x (…, in), with W rounded to bf16."""
    return F.linear(x, plain_dequantize(t, parts, shape))


def _plain_blocks(x_KB: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    absmax = x_KB.abs().amax(1)  # (K,)
    inverse = torch.where(absmax < reference.TINY, 0.0, 1 / absmax)
    codes = torch.bucketize(x_KB * inverse[:, None], thresholds, out_int32=True)
    return codes.to(torch.uint8), absmax


# ---- bitsandbytes


def bitsandbytes_calls(b: Buffers) -> Calls:
    """Return the calls of its public functions.

    The GEMV has two: the one that Linear4bit uses, and the older gemv_4bit.
    """
    import bitsandbytes.functional as bnb
    from bitsandbytes.autograd._functions import matmul_4bit

    pairs = []
    for packed, scales, nested, offset in b.weights:
        weight = NF4Weight.from_parts(
            packed, scales, nested, offset, b.shape, BLOCKSIZE, torch.bfloat16
        )
        state = weight.state_dict("w")
        pairs.append((state.pop("w"), bnb.QuantState.from_dict(state, device=b.xs[GEMV].device)))

    def quantize(turn: int, nested: bool) -> tuple[Tensor, Any]:
        return bnb.quantize_4bit(at(b.dense, turn), compress_statistics=nested, quant_type="nf4")

    def dequantize(turn: int) -> Tensor:
        # On a CPU it cannot write into a given tensor.
        out = at(b.outs, turn) if b.outs[0].is_cuda else None
        return bnb.dequantize_4bit(*at(pairs, turn), out=out)

    def multiply(turn: int, x: Tensor) -> Tensor:
        packed, state = at(pairs, turn)
        return matmul_4bit(x, packed.t(), quant_state=state)

    def multiply_alone(turn: int) -> Tensor:
        packed, state = at(pairs, turn)
        return bnb.gemv_4bit(b.xs[GEMV][None], packed, state=state)[0]

    # On a CPU gemv_4bit expects another layout and misreads this one.
    alone = {"gemv_4bit": multiply_alone} if b.outs[0].is_cuda else {}
    return {
        DEQUANTISE: {"bitsandbytes": dequantize},
        QUANTISE: {"bitsandbytes": b.keep(lambda turn: quantize(turn, False))},
        QUANTISE_TWICE: {"bitsandbytes": b.keep(lambda turn: quantize(turn, True))},
        GEMV: {"bitsandbytes": lambda turn: multiply(turn, b.xs[GEMV][None])[0]} | alone,
        FEW: {"bitsandbytes": lambda turn: multiply(turn, b.xs[FEW])},
    }
