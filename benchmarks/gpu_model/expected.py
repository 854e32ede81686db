"""Expected times on each card: the table in docs/gpu.md, from machine code and datasheets.

    python benchmarks/gpu_model/expected.py

Nothing is measured. kernel_report.py compiles our kernels and counts their instructions;
roofline.py computes the least time that their bytes and instructions take. The microseconds in the
table are those of a layer of 4096 x 14336 weights in bf16, blocks of 64, double quantised. A pipe
in brackets sets the time where DRAM does not. A token goes once through every linear layer of
Llama-3-8B in 4 bits, and through its bf16 head. Norms, attention, keys and launches are left out,
so no real card is faster. The launches are counted by running a step on shapes alone: an operation
that returns a new tensor, or writes to one, starts one kernel or more. The last line is one JSON
document.
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

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import minilora as ml
from benchmarks._lib.bench_timing import MODELS
from benchmarks.gpu_model.kernel_report import LAYER, rows
from benchmarks.gpu_model.roofline import CARDS, HALF, binding, bounds
from minilora.generation.cuda_graph import Step, capture
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.models.kv_cache import KVCache
from minilora.models.padded_batch import inference

MODEL = "Llama-3-8B"
BLOCKS = 32  # num_hidden_layers in its config.json
VOCABULARY = 128256  # vocab_size in its config.json
TOKEN = "gemv_nf4_double_quant"
KERNELS = ("dequantize_nf4_double_quant", "quantize_nf4", TOKEN)
HEADINGS = (
    "card",
    "GB/s",
    "dequantise, µs",
    "quantise, µs",
    "one token, µs",
    f"tokens/s of {MODEL}, at most",
)


def linear_weights() -> int:
    """Return the number of weights in MODEL's linear layers, without the head."""
    m = MODELS[MODEL]
    attention = 2 * (m.heads + m.kv_heads) * m.head_dim * m.hidden  # q and o, k and v
    return BLOCKS * (attention + 3 * m.intermediate * m.hidden)  # gate, up, down


class Count(TorchDispatchMode):
    """Counter of the operations on `device` inside its context, without views."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.operations = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        on_device = isinstance(out, torch.Tensor) and out.device.type == self.device
        views = [
            returned.alias_info and not returned.alias_info.is_write
            for returned in func._schema.returns
        ]
        if on_device and not any(views) and "empty" not in str(func):
            self.operations += 1
        return out


def launches() -> int:
    """Return the least number of kernels that a token of MODEL in 4 bits starts.

    The batch has one row and no adapters; attention counts as one kernel.
    """
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
        step.read()  # moves RoPE's frequencies to the device
        with Count("meta") as count:
            step.read()
    return count.operations


def expectations(counted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each of CARDS.

    `counted` are the rows of kernel_report.py for KERNELS and the cards' targets.
    """
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
    """Return the table as lines of Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for row in found:
        cells = [row["card"], f"{row['gb_per_s']}"]
        for kernel in KERNELS:
            cell = f"{row['us'][kernel]:.0f}"
            if row["binds"][kernel] != "DRAM":
                cell += f" ({row['binds'][kernel]})"
            cells.append(cell)
        cells.append(f"{row['tokens_per_s']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print the table and the JSON."""
    targets = dict.fromkeys(card.target for card in CARDS.values())
    found = expectations(rows(targets, KERNELS))
    print(f"triton: {triton.__version__}; compiled and counted, nothing ran on a GPU\n")
    print("\n".join(table(found)) + "\n")
    print(f"A token of {MODEL} starts at least {launches():,} kernels.\n")
    print(json.dumps({"benchmark": "expected", "triton": triton.__version__, "rows": found}))


if __name__ == "__main__":
    main()
