"""What to expect of a card before it has been asked: the table in docs/gpu.md, out of machine code and datasheets.

    python benchmarks/expected.py

kernel_report.py compiles and counts our kernels, roofline.py says how long their bytes and instructions take at least.
In the table microseconds are those of a layer of 4096 x 14336 weights in bf16, blocks of 64, double quantised; a pipe
in brackets sets the time, where DRAM does not. A token goes once through every linear layer of Llama-3-8B, in 4 bits,
and through its bf16 head; norms, attention, keys and launches are left out, so nothing is faster. Nothing is measured.
The last line is one JSON document.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import triton

from bench_timing import MODELS
from kernel_report import LAYER, rows
from roofline import CARDS, HALF, binding, bounds

MODEL, BLOCKS, VOCABULARY = "Llama-3-8B", 32, 128256  # num_hidden_layers and vocab_size of its config.json
DEQUANTISE, QUANTISE, TOKEN = KERNELS = ("dequantize_nf4_double_quant", "quantize_nf4", "gemv_nf4_double_quant")
HEADINGS = ("card", "GB/s", "dequantise, µs", "quantise, µs", "one token, µs", f"tokens/s of {MODEL}, at most")


def linear_weights() -> int:
    """Of all of MODEL's linear layers but the head."""
    m = MODELS[MODEL]
    attention = 2 * (m.heads + m.kv_heads) * m.head_dim * m.hidden  # q and o, k and v
    return BLOCKS * (attention + 3 * m.intermediate * m.hidden)  # gate, up, down


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
        token_us = max(times(TOKEN, linear_weights()).values()) + bounds(card, head, HALF, {})["DRAM"]
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
        binds = {kernel: "" if row["binds"][kernel] == "DRAM" else f" ({row['binds'][kernel]})" for kernel in KERNELS}
        cells = [f"{row['us'][kernel]:.0f}{binds[kernel]}" for kernel in KERNELS]
        lines.append(
            "| " + " | ".join([row["card"], f"{row['gb_per_s']}", *cells, f"{row['tokens_per_s']:.0f}"]) + " |"
        )
    return lines


def main() -> None:
    """The table, the JSON."""
    targets = dict.fromkeys(card.target for card in CARDS.values())
    found = expectations(rows(targets, KERNELS))
    print(f"triton: {triton.__version__}; compiled and counted, nothing ran on a GPU\n")
    print("\n".join(table(found)) + "\n")
    print(json.dumps({"benchmark": "expected", "triton": triton.__version__, "rows": found}))


if __name__ == "__main__":
    main()
