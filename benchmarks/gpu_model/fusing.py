"""Which products are worth a kernel of one's own? Least times by datasheets (roofline.py), nothing measured.

    python benchmarks/gpu_model/fusing.py [--tokens 8192]

Two candidates, on a layer of 4096 x 4096. The LoRA branch of many tokens
(minilora/lora/fused_linear.py): what its bytes cost beside the layer's two products, and what each
way of fusing it would save at the most. And few tokens through a 4-bit layer (nf4_matmul.py): from
the codes, as the kernel's machine code is counted, against a dense W that one kernel writes and a
product reads. Tensor cores count with fp32 sums.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.append(
    str(Path(__file__).resolve().parents[2])
)  # the root: benchmarks are imported by their full names

from benchmarks.gpu_model.kernel_report import rows
from benchmarks.gpu_model.roofline import CARDS, HALF, WEIGHT_DOUBLE_QUANT, Card, bounds
from minilora_kernels.triton import nf4_matmul

D, R = 4096, 16  # a layer's size, a rank
FEW = {2: "matmul_nf4", 16: "matmul_nf4", 64: "matmul_nf4_64_tokens"}  # tokens: what was counted
# bf16 multiply-adds with fp32 sums that an SM's tensor cores do in a clock, after NVIDIA's
# architecture whitepapers
TENSOR = {"sm_75": 512, "sm_80": 1024, "sm_86": 256, "sm_89": 256, "sm_90": 2048, "sm_120": 256}


def product_us(card: Card, m: int, k: int, n: int, bytes: float) -> float:
    """(m, k) by (k, n), of which `bytes` are moved."""
    operations = m * k * n / (card.sms * TENSOR[card.target] * card.ghz * 1e3)
    return max(operations, bytes / (card.gb_per_s * 1e3))


def branch(card: Card, N: int) -> dict[str, float]:
    """Microseconds of a layer's two products, and of the branch by its bytes, whose arithmetic is 3 r / D of theirs."""
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
    # y and dx as the products write them; or dy read once, with its dB in parts of 128 tokens,
    # written and read in fp32
    found["saved: in the products' epilogues"] = us(4 * x)
    found["saved: q and dB from one reading"] = us(x) - 2 * us(2 * D * R * N / 128)
    found["saved: y += s z B alone"] = 0.0  # addmm reads and writes y once, too
    return found


def few_tokens(
    card: Card, M: int, ours: dict[str, Any], dequantise: dict[str, Any]
) -> dict[str, float]:
    """Microseconds from the codes, and by way of a dense W: in DRAM, or should the cache hold it all the while.

    ours, dequantise: rows of kernel_report.py. The codes' partial sums are counted as if no cache
    held them.
    """
    n, xy = D * D, 2 * M * D * HALF  # weights; bytes of x and y
    sums = 2 * 4 * M * D * math.ceil(nf4_matmul.ENOUGH / D)  # fp32, written and read
    decode = max(bounds(card, n, WEIGHT_DOUBLE_QUANT, ours["pipes"]).values())
    dense = bounds(card, n, WEIGHT_DOUBLE_QUANT + HALF, dequantise["pipes"])
    cached = max(bounds(card, n, WEIGHT_DOUBLE_QUANT, dequantise["pipes"]).values())
    return {
        "codes": max(
            decode, product_us(card, max(16, M), D, D, n * WEIGHT_DOUBLE_QUANT + xy + sums)
        ),
        "dense": max(dense.values()) + product_us(card, M, D, D, n * HALF + xy),
        "dense, cached": cached + product_us(card, M, D, D, xy),
    }


def main() -> None:
    """Two tables, the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of the LoRA branch")
    args = parser.parse_args()
    branches = {name: branch(card, args.tokens) for name, card in CARDS.items()}
    print(f"LoRA branch, {args.tokens} tokens, {D} x {D}, r = {R}: us at least\n{'':36}", end="")
    print("".join(f"{name:>10}" for name in CARDS))
    for part in next(iter(branches.values())):
        print(f"{part:36}" + "".join(f"{found[part]:10.1f}" for found in branches.values()))
    for way in ("saved: in the products' epilogues", "saved: q and dB from one reading"):
        share = (found[way] / (found["products"] + found["branch"]) for found in branches.values())
        print(
            f"{way.removeprefix('saved: ') + ', of all':36}" + "".join(f"{s:10.1%}" for s in share)
        )

    cards = {
        name: card for name, card in CARDS.items() if card.target != "sm_75"
    }  # for which nf4_matmul.py declines
    names = [*dict.fromkeys(FEW.values()), "dequantize_nf4_double_quant"]
    by = {
        (row["kernel"], row["target"]): row
        for row in rows(sorted({c.target for c in cards.values()}), names)
    }
    few: dict[int, dict[str, dict[str, float]]] = {}
    print(
        f"\nfew tokens through 4 bits, {D} x {D}: us at least, from the codes / dense W / dense W in the cache"
    )
    for M, kernel in FEW.items():
        few[M] = {
            name: few_tokens(
                card, M, by[kernel, card.target], by["dequantize_nf4_double_quant", card.target]
            )
            for name, card in cards.items()
        }
        cells = (
            f"{name} {' / '.join(f'{us:.1f}' for us in times.values())}"
            for name, times in few[M].items()
        )
        print(f"{M:3} tokens", *cells, sep="   ")
    print(json.dumps({"benchmark": "fusing", "branch": branches, "few_tokens": few}))


if __name__ == "__main__":
    main()
