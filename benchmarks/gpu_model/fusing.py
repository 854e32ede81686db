"""Least times of products that a kernel could fuse, from datasheets (roofline.py), not measured.

    python benchmarks/gpu_model/fusing.py [--tokens 8192]

The question is whether a separate kernel would pay for two candidates, on a layer of 4096 x 4096.
The first is the LoRA branch for many tokens (minilora/lora/fused_linear.py): the time of its bytes,
compared with the layer's two products, and the most that each way of fusing could save. The second
is a 4-bit layer for few tokens (nf4_matmul.py): a product from the codes, with the counted machine
code of the kernel, against a dense W that one kernel writes and a product reads. Tensor cores count
with fp32 sums.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu_model.kernel_report import rows
from benchmarks.gpu_model.roofline import CARDS, HALF, WEIGHT_DOUBLE_QUANT, Card, bounds
from minilora_kernels.triton import nf4_matmul

D, R = 4096, 16  # size of the layer, rank
FEW = {2: "matmul_nf4", 16: "matmul_nf4", 64: "matmul_nf4_64_tokens"}  # tokens -> counted kernel
# bf16 multiply-adds with fp32 sums in one clock of an SM's tensor cores, from NVIDIA's architecture
# whitepapers
TENSOR = {"sm_75": 512, "sm_80": 1024, "sm_86": 256, "sm_89": 256, "sm_90": 2048, "sm_120": 256}


def product_us(card: Card, m: int, k: int, n: int, bytes: float) -> float:
    """Return the least microseconds of (m, k) by (k, n) that moves `bytes`."""
    operations = m * k * n / (card.sms * TENSOR[card.target] * card.ghz * 1e3)
    return max(operations, bytes / (card.gb_per_s * 1e3))


def branch(card: Card, N: int) -> dict[str, float]:
    """Return microseconds of a layer's two products, and of the LoRA branch by its bytes.

    The branch has 3 r / D times the arithmetic of the products.
    """
    x = N * D  # values of x, y, dy or dx

    def us(values: float) -> float:
        return values * HALF / (card.gb_per_s * 1e3)

    found = {
        "products": 2 * product_us(card, N, D, D, HALF * (2 * x + D * D)),
        "z = x A": us(x),
        "y += s z B": us(2 * x),
        "q = s dy B": us(x),
        "dB = dy z": us(x),
        "dx += q A": us(2 * x),
        "dA = q x": us(x),
    }
    found["branch"] = sum(found.values()) - found["products"]
    # The first adds to y and dx while the products write them. The second reads dy once; its dB
    # comes in parts of 128 tokens, written and read in fp32.
    found["saved: in the products' epilogues"] = us(4 * x)
    found["saved: q and dB from one reading"] = us(x) - 2 * us(2 * D * R * N / 128)
    found["saved: y += s z B alone"] = 0.0  # addmm also reads and writes y once
    return found


def few_tokens(
    card: Card, M: int, ours: dict[str, Any], dequantise: dict[str, Any]
) -> dict[str, float]:
    """Return microseconds from the codes, through a dense W in DRAM, and through one in the cache.

    `ours` and `dequantise` are rows of kernel_report.py. The partial sums of the product from the
    codes count as DRAM traffic, as if no cache held them.
    """
    n, xy = D * D, 2 * M * D * HALF  # weights; bytes of x and y
    sums = 2 * 4 * M * D * math.ceil(nf4_matmul.ENOUGH / D)  # fp32, written and read
    decode = max(bounds(card, n, WEIGHT_DOUBLE_QUANT, ours["pipes"]).values())
    dense = bounds(card, n, WEIGHT_DOUBLE_QUANT + HALF, dequantise["pipes"])
    cached = max(bounds(card, n, WEIGHT_DOUBLE_QUANT, dequantise["pipes"]).values())
    multiply = product_us(card, max(16, M), D, D, n * WEIGHT_DOUBLE_QUANT + xy + sums)
    return {
        "codes": max(decode, multiply),
        "dense": max(dense.values()) + product_us(card, M, D, D, n * HALF + xy),
        "dense, cached": cached + product_us(card, M, D, D, xy),
    }


def main() -> None:
    """Print two tables and the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the LoRA branch")
    args = parser.parse_args()
    branches = {name: branch(card, args.tokens) for name, card in CARDS.items()}
    print(f"LoRA branch, {args.tokens} tokens, {D} x {D}, r = {R}: us at least\n{'':36}", end="")
    print("".join(f"{name:>10}" for name in CARDS))
    for part in next(iter(branches.values())):
        cells = [f"{found[part]:10.1f}" for found in branches.values()]
        print(f"{part:36}" + "".join(cells))
    for way in ("saved: in the products' epilogues", "saved: q and dB from one reading"):
        cells = []
        for found in branches.values():
            share = found[way] / (found["products"] + found["branch"])
            cells.append(f"{share:10.1%}")
        print(f"{way.removeprefix('saved: ') + ', of all':36}" + "".join(cells))

    # nf4_matmul.py does not support sm_75.
    cards = {name: card for name, card in CARDS.items() if card.target != "sm_75"}
    targets = sorted({card.target for card in cards.values()})
    dequantise = "dequantize_nf4_double_quant"
    counted = rows(targets, [*dict.fromkeys(FEW.values()), dequantise])
    row_of = {(row["kernel"], row["target"]): row for row in counted}
    few: dict[int, dict[str, dict[str, float]]] = {}
    print(f"\nfew tokens through 4 bits, {D} x {D}: us at least, ", end="")
    print("from the codes / dense W / dense W in the cache")
    for M, kernel in FEW.items():
        few[M] = {}
        print(f"{M:3} tokens", end="")
        for name, card in cards.items():
            times = few_tokens(
                card, M, row_of[kernel, card.target], row_of[dequantise, card.target]
            )
            few[M][name] = times
            shown = " / ".join(f"{us:.1f}" for us in times.values())
            print(f"   {name} {shown}", end="")
        print()
    print(json.dumps({"benchmark": "fusing", "branch": branches, "few_tokens": few}))


if __name__ == "__main__":
    main()
