"""What to expect of a card before it has been asked: the table in docs/gpu.md, out of machine code and datasheets.

    python benchmarks/gpu_model/expected.py

kernel_report.py compiles and counts our kernels, roofline.py says how long their bytes and
instructions take at least. In the table microseconds are those of a layer of 4096 x 14336 weights
in bf16, blocks of 64, double quantised; a pipe in brackets sets the time, where DRAM does not. A
token goes once through every linear layer of Llama-3-8B, in 4 bits, and through its bf16 head;
norms, attention, keys and launches are left out, so nothing is faster. The launches are counted by
running a step on shapes alone: an operation that gives a new tensor, or writes to one, starts a
kernel or more. Nothing is measured. The last line is one JSON document.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(
    str(Path(__file__).resolve().parents[2])
)  # the root: benchmarks are imported by their full names

import minilora as ml
from benchmarks._lib.bench_timing import MODELS
from benchmarks.gpu_model.kernel_report import LAYER, rows
from benchmarks.gpu_model.roofline import CARDS, HALF, binding, bounds
from minilora.generation.cuda_graph import Step, capture
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.models.kv_cache import KVCache
from minilora.models.padded_batch import inference

MODEL, BLOCKS, VOCABULARY = (
    "Llama-3-8B",
    32,
    128256,
)  # num_hidden_layers and vocab_size of its config.json
DEQUANTISE, QUANTISE, TOKEN = KERNELS = (
    "dequantize_nf4_double_quant",
    "quantize_nf4",
    "gemv_nf4_double_quant",
)
HEADINGS = (
    "card",
    "GB/s",
    "dequantise, µs",
    "quantise, µs",
    "one token, µs",
    f"tokens/s of {MODEL}, at most",
)


def linear_weights() -> int:
    """Of all of MODEL's linear layers but the head."""
    m = MODELS[MODEL]
    attention = 2 * (m.heads + m.kv_heads) * m.head_dim * m.hidden  # q and o, k and v
    return BLOCKS * (attention + 3 * m.intermediate * m.hidden)  # gate, up, down


class Count(TorchDispatchMode):
    """Of the operations inside that do something on `device`: views do not."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.operations = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = [
            given.alias_info and not given.alias_info.is_write for given in func._schema.returns
        ]
        here = isinstance(out, torch.Tensor) and out.device.type == self.device
        self.operations += here and not any(views) and "empty" not in str(func)
        return out


def launches() -> int:
    """Kernels at least that a token of MODEL in 4 bits starts, one row, no adapters; attention counts as one."""
    m = MODELS[MODEL]
    config = DecoderConfig(
        VOCABULARY, m.hidden, m.intermediate, BLOCKS, m.heads, m.kv_heads, m.head_dim
    )
    with torch.device("meta"):
        model, like = CausalLM(config).bfloat16(), KVCache()
        for buffers in (like.keys, like.values):
            buffers += [
                torch.empty(1, m.kv_heads, 0, m.head_dim, dtype=torch.bfloat16)
                for _ in range(BLOCKS)
            ]
    ml.quantize_model(model)
    step = Step(model, like, 1, 64, capture)
    with (
        inference(model),
        patch("torch.nn.functional.scaled_dot_product_attention", lambda q, *_, **__: q.clone()),
    ):
        step.read()  # moves RoPE's frequencies
        with Count("meta") as count:
            step.read()
    return count.operations


def expectations(counted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each of CARDS; `counted` are rows of kernel_report.py, of KERNELS and the cards' targets."""
    of = {(row["kernel"], row["target"]): row for row in counted}
    head = VOCABULARY * MODELS[MODEL].hidden
    found = []
    for name, card in CARDS.items():

        def times(kernel: str, elements: int, card=card) -> dict[str, float]:
            row = of[kernel, card.target]
            return bounds(card, elements, row["bytes_per_element"], row["pipes"])

        layer = {kernel: times(kernel, LAYER) for kernel in KERNELS}
        token_us = (
            max(times(TOKEN, linear_weights()).values()) + bounds(card, head, HALF, {})["DRAM"]
        )
        found.append(
            {"card": name, "gb_per_s": card.gb_per_s, "tokens_per_s": 1e6 / token_us}
            | {"us": {kernel: max(t.values()) for kernel, t in layer.items()}}
            | {"binds": {kernel: binding(t) for kernel, t in layer.items()}}
        )
    return found


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for row in found:
        binds = {
            kernel: "" if row["binds"][kernel] == "DRAM" else f" ({row['binds'][kernel]})"
            for kernel in KERNELS
        }
        cells = [f"{row['us'][kernel]:.0f}{binds[kernel]}" for kernel in KERNELS]
        lines.append(
            "| "
            + " | ".join([row["card"], f"{row['gb_per_s']}", *cells, f"{row['tokens_per_s']:.0f}"])
            + " |"
        )
    return lines


def main() -> None:
    """The table, the JSON."""
    targets = dict.fromkeys(card.target for card in CARDS.values())
    found = expectations(rows(targets, KERNELS))
    print(f"triton: {triton.__version__}; compiled and counted, nothing ran on a GPU\n")
    print("\n".join(table(found)) + "\n")
    print(f"A token of {MODEL} starts at least {launches():,} kernels.\n")
    print(json.dumps({"benchmark": "expected", "triton": triton.__version__, "rows": found}))


if __name__ == "__main__":
    main()
