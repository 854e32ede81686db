"""Is the LoRA branch worth a kernel of its own on a GPU? Least times by datasheets (roofline.py), nothing measured.

    python benchmarks/fusing.py [--tokens 8192]

On a layer of 4096 x 4096 and many tokens (minilora/ops/lora_linear.py): what the branch's bytes cost beside the layer's
two products, and what each way of fusing it would save at the most. Tensor cores count with fp32 sums.
"""

import argparse
import json

from roofline import CARDS, HALF, Card

D, R = 4096, 16  # a layer's size, a rank
# bf16 multiply-adds with fp32 sums that an SM's tensor cores do in a clock, after NVIDIA's architecture whitepapers
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
    # y and dx as the products write them; or dy read once, with its dB in parts of 128 tokens, written and read in fp32
    found["saved: in the products' epilogues"] = us(4 * x)
    found["saved: q and dB from one reading"] = us(x) - 2 * us(2 * D * R * N / 128)
    found["saved: y += s z B alone"] = 0.0  # addmm reads and writes y once, too
    return found


def main() -> None:
    """The table, the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the LoRA branch")
    args = parser.parse_args()
    branches = {name: branch(card, args.tokens) for name, card in CARDS.items()}
    print(f"LoRA branch, {args.tokens} tokens, {D} x {D}, r = {R}: us at least\n{'':36}", end="")
    print("".join(f"{name:>10}" for name in CARDS))
    for part in next(iter(branches.values())):
        print(f"{part:36}" + "".join(f"{found[part]:10.1f}" for found in branches.values()))
    for way in ("saved: in the products' epilogues", "saved: q and dB from one reading"):
        share = (found[way] / (found["products"] + found["branch"]) for found in branches.values())
        print(f"{way.removeprefix('saved: ') + ', of all':36}" + "".join(f"{s:10.1%}" for s in share))
    print(json.dumps({"benchmark": "fusing", "branch": branches}))


if __name__ == "__main__":
    main()
