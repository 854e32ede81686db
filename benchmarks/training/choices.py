"""Measurements behind the design of the ops: the profile of a step, and the sizes that were tried.

    python benchmarks/training/choices.py

The step is a QLoRA step of SmolLM2-135M, r = 16 on all linear layers, 4 x 512 real tokens, in bf16,
or in fp32 on a CPU without it (--dtype):

    profile         the share of each kind of operation, by torch's profiler
    attention       forward and backward of a layer's attention, by the number of queries at a time
                    in backward
    cross-entropy   the loss and its gradient, by the number of rows of logits at a time
    steps           seconds and peak of the step without the compiled C code, and without the pool
                    of freed blocks
    malloc          the same, by the size from which glibc gives a freed block back at once
    token           one token through dense layers, as a matrix and as a vector (generate.py); and
                    one token of each of 8 rows through the LoRA factors of that row
                    (lora/batched.py), by their bits: 16 only where the dtype is bf16

The alternatives take turns. The figures are medians with min-max, and the ratio to the present
choice. The run takes minutes on two cores. The last line is one JSON document.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import minilora as ml
import minilora_kernels.ops.attention as attention_op
from benchmarks._lib.side_by_side import (
    TINY,
    Contender,
    add_dtype,
    checkpoint,
    compute_dtype,
    dtype_name,
    machine,
    report,
    serve,
    take_turns,
)
from benchmarks._lib.steps import own_step
from benchmarks.training.bench_train import SMOLLM2
from minilora.training import runtime
from minilora_kernels import allocator
from minilora_kernels.ops.cross_entropy import CHUNK_BYTES, linear_cross_entropy

KINDS = {  # part of an operation's name -> its kind; the first that fits counts
    "mm": "matrix products",  # mm, addmm, bmm, baddbmm
    "dequantize": "dequantisation",
    "copy_": "copies",
    "attention": "attention's forward",
    "softmax": "softmax and its gradient",
    "mul": "element-wise products",
    "add": "sums",
}
BLOCKS = (32, 64, 256)  # queries
ROWS = (64, 256, 2048)  # of logits
MEGABYTES = (2, 4, 8, 16)  # MALLOC_MMAP_THRESHOLD_


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--short",
        action="store_true",
        help="a random model of two layers, short rows, one of malloc's sizes",
    )
    add_dtype(parser)
    parser.add_argument("--side", type=Path, metavar="FOLDER", help="serve steps in this process")
    parser.add_argument(
        "--no-pool", action="store_true", help="with --side: freed blocks go back to malloc"
    )
    options = parser.parse_args()
    if options.no_pool:
        allocator.SMALL = sys.maxsize  # no block is large enough for the pool
    dtype = compute_dtype(options.dtype)
    if options.side:
        return contend(options.side, dtype)
    batch, length = (2, 64) if options.short else (4, 512)
    found: dict[str, Any] = {"benchmark": "choices", **machine(dtype)}
    with tempfile.TemporaryDirectory() as name:
        rows = checkpoint(Path(name) / "base", options.short, batch, length, dtype)
        (Path(name) / "rows.json").write_text(json.dumps(rows))
        given = SimpleNamespace(
            folder=Path(name), batch=batch, length=length, rounds=options.rounds, dtype=dtype
        )
        given.shape = TINY if options.short else SMOLLM2
        given.megabytes = MEGABYTES[:1] if options.short else MEGABYTES
        for part in options.only.split(","):
            found[part] = PARTS[part](given)
    print(json.dumps(found))


def contend(folder: Path, dtype: torch.dtype) -> None:
    """Serve steps in this process, on the files that `main` wrote."""
    model = adapted(folder, dtype)
    with runtime.training_mode(model, gradient_checkpointing=False):
        serve(own_step(model, [json.loads((folder / "rows.json").read_text())]))


def adapted(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load the base in 4 bits and inject an adapter."""
    model = ml.load_model(folder / "base", quantize="nf4", dtype=dtype)
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    return model.train()


def profile(given: SimpleNamespace) -> dict[str, float]:
    """Return the share of each kind of operation in the time of one step."""
    rows = json.loads((given.folder / "rows.json").read_text())
    step = own_step(adapted(given.folder, given.dtype), [rows])
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total
    shares = {kind: round(time / spent.total(), 3) for kind, time in spent.most_common()}
    print()
    for kind, share in shares.items():
        print(f"{kind:28}{share:6.0%}")
    return shares


def kind_of(operation: str) -> str:
    """Return the kind of an operation by its name."""
    for part, kind in KINDS.items():
        if part in operation:
            return kind
    return "other"


def attention(given: SimpleNamespace) -> dict[str, Any]:
    """Time attention with each number of queries at a time in backward."""
    shape = given.shape
    d = shape["hidden_size"] // shape["num_attention_heads"]
    heads = [shape[f"num_{kind}_heads"] for kind in ("attention", "key_value", "key_value")]
    q, k, v = [
        torch.randn(given.batch, n, given.length, d).to(given.dtype).requires_grad_() for n in heads
    ]

    def run(block: int) -> None:
        attention_op.BLOCK = block
        out = attention_op.attention(q, k, v)
        torch.autograd.grad(out, (q, k, v), out.detach())

    used = attention_op.BLOCK
    found = compared("attention, blocks of queries", run, (used, *BLOCKS), given.rounds, times=10)
    attention_op.BLOCK = used
    return found


def cross_entropy(given: SimpleNamespace) -> dict[str, Any]:
    """Time the loss with each number of rows of logits at a time."""
    words, width = given.shape["vocab_size"], given.shape["hidden_size"]
    # Logits are as small as those of a model. With larger ones most probabilities are subnormal
    # numbers, which are slow on a CPU.
    tokens = given.batch * given.length
    hidden = torch.randn(tokens, width).mul_(0.2).to(given.dtype)  # (N, D)
    W = torch.randn(words, width).mul_(0.2).to(given.dtype)  # (V, D)
    labels = torch.randint(0, words, (tokens,))  # (N,)

    def run(rows: int) -> None:
        linear_cross_entropy(hidden.requires_grad_(), W, labels, rows).backward()

    used = CHUNK_BYTES // W.element_size() // words
    return compared("cross-entropy, rows of logits", run, (used, *ROWS), given.rounds, times=1)


def token(given: SimpleNamespace) -> dict[str, Any]:
    """Time F.linear against torch.mv, and the adapters' products in 32 and 16 bits."""
    width, wide = given.shape["hidden_size"], given.shape["intermediate_size"]
    layers = [
        torch.randn(wide, width).to(given.dtype)
        for _ in range(3 * given.shape["num_hidden_layers"])
    ]
    row = torch.randn(1, 1, width).to(given.dtype)  # (1, T, in)
    x, h = torch.randn(2, 8, 1, width).to(given.dtype)  # (rows, T, in), (rows, T, out)
    A, B = torch.randn(8, 8, width), torch.randn(8, width, 8)  # (rows, r, in), (rows, out, r)
    factors = {32: (A, B)}
    if given.dtype != torch.float32:
        factors[16] = A.to(given.dtype), B.to(given.dtype)

    def dense(way: str) -> None:
        for W in layers:
            if way == "linear":
                torch.nn.functional.linear(row, W)
            else:
                torch.mv(W, row.view(-1)).view(1, 1, -1)

    def rows(bits: int) -> None:
        A, B = factors[bits]
        torch.baddbmm(h.to(B.dtype), x.to(A.dtype) @ A.mT, B.mT).to(h.dtype)

    return {
        "dense": compared(
            "a token through dense layers", dense, ("linear", "mv"), given.rounds, times=10
        ),
        "rows": compared(
            "a token's adapters, bits", rows, tuple(factors), given.rounds, times=1000
        ),
    }


def compared(
    title: str, run: Callable[[Any], None], sizes: tuple[Any, ...], rounds: int, times: int
) -> dict[str, Any]:
    """Report seconds of `times` runs with each size in turns; the first size is in use."""

    def timed(size: Any) -> dict[str, float]:
        begun = perf_counter()
        for _ in range(times):
            run(size)
        return {"seconds": perf_counter() - begun}

    sides = {str(size): SimpleNamespace(step=partial(timed, size)) for size in sizes}
    found = take_turns(sides, 3 * rounds)
    return report(f"{title}: seconds for {times}", found, "seconds", str(sizes[0]))


def steps(given: SimpleNamespace) -> dict[str, Any]:
    """Time steps without the compiled C code, without the pool, and without both."""
    by_torch = {"MINILORA_STEPS": "torch"}
    sides = {
        "no C": ([], by_torch),
        "no pool": (["--no-pool"], {}),
        "neither": (["--no-pool"], by_torch),
    }
    return processes("without", given, sides)


def malloc(given: SimpleNamespace) -> dict[str, Any]:
    """Time steps with each size from which glibc gives memory back."""
    sides = {
        f"{size} MB": ([], {"MALLOC_MMAP_THRESHOLD_": str(size << 20)}) for size in given.megabytes
    }
    return processes("MALLOC_MMAP_THRESHOLD_", given, sides)


def processes(
    title: str, given: SimpleNamespace, sides: dict[str, tuple[list[str], dict[str, str]]]
) -> dict[str, Any]:
    """Return seconds and memory of steps in processes with these arguments and variables.

    They are compared with a process without any.
    """
    command = [__file__, "--dtype", dtype_name(given.dtype), "--side"]
    contenders = {
        name: Contender(name, [*command, given.folder, *arguments], variables)
        for name, (arguments, variables) in {"as it is": ([], {}), **sides}.items()
    }
    found = take_turns(contenders, given.rounds, warm_up=1)
    for contender in contenders.values():
        contender.close()
    return report(f"{title}: seconds a step", found, "seconds", "as it is")


PARTS = {
    "profile": profile,
    "attention": attention,
    "cross-entropy": cross_entropy,
    "steps": steps,
    "malloc": malloc,
    "token": token,
}

if __name__ == "__main__":
    main()
