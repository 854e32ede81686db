"""Tokens a second of greedy decoding, one row at a time, here and in transformers (+ bitsandbytes).

    python benchmarks/inference/bench_generate.py [--rounds 5] [--prompt 64] [--new 64] [--dtype
    auto]

SmolLM2-135M, a prompt of real tokens, `--new` tokens after it, prompt included in the time; the
contenders take turns:

    dense   both in the dtype that all compute in: bf16, or fp32 on a CPU without it
    nf4     both in 4 bits with double quantisation, each token multiplied straight from the codes, in C on either side;
            without a C compiler ours makes every weight dense again for each token; and "minilora,
            dense": ours in 4 bits, within `ml.dequantized_weights`: made dense once, and in memory
            as such meanwhile

Checked first: the contenders of a kind begin with the same tokens. The last line is one JSON
document.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.append(
    str(Path(__file__).resolve().parents[2])
)  # the root: benchmarks are imported by their full names

from benchmarks._lib.side_by_side import (
    Contender,
    add_dtype,
    checkpoint,
    compute_dtype,
    dtype_name,
    machine,
    missing_peers,
    report,
    serve,
    take_turns,
)
from benchmarks._lib.steps import four_bit

SAME = 4  # tokens that the contenders have in common at least; later ones may differ where two are nearly as likely


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument(
        "--short", action="store_true", help="a random model of two layers, two short rounds"
    )
    add_dtype(parser)
    parser.add_argument(
        "--side", nargs=3, metavar=("SIDE", "KIND", "FOLDER"), help="be this contender"
    )
    options = parser.parse_args()
    dtype = compute_dtype(options.dtype)
    if options.side:
        side, kind, folder = options.side
        prompt = json.loads((Path(folder) / "prompt.json").read_text())
        given = kind, Path(folder) / "base", prompt, options.new, dtype
        return ours(*given) if side == "minilora" else theirs(*given)
    if options.short:
        options.rounds, options.prompt, options.new = 2, 8, 8
    found: dict[str, Any] = {"benchmark": "bench_generate", **machine(dtype)}
    found |= {"new": options.new, "prompt": options.prompt}
    peers = not (why := missing_peers("transformers", "bitsandbytes", "accelerate"))
    if not peers:
        print(f"minilora alone: {why}")
    with tempfile.TemporaryDirectory() as name:
        rows = checkpoint(Path(name) / "base", options.short, 1, options.prompt, dtype)
        (Path(name) / "prompt.json").write_text(json.dumps(rows[0]))
        for kind in ("dense", "nf4"):
            found[kind] = compare(
                kind, ("minilora", "transformers")[: 1 + peers], Path(name), options, dtype
            )
    print(json.dumps(found))


def compare(
    kind: str, sides: tuple[str, ...], folder: Path, options: argparse.Namespace, dtype: torch.dtype
) -> dict[str, Any]:
    """Run a kind's contenders in turns; "minilora, dense" goes beside the others in 4 bits."""
    command = [__file__, "--new", options.new, "--dtype", dtype_name(dtype), "--side"]
    contenders = {side: Contender(side, [*command, side, kind, folder]) for side in sides}
    if kind == "nf4":
        contenders["minilora, dense"] = Contender(
            "minilora", [*command, "minilora", "made dense", folder]
        )
    found = take_turns(contenders, options.rounds)
    for contender in contenders.values():
        contender.close()
    answers = {side: one[0]["tokens"] for side, one in found.items()}
    shared = next(
        (i for i, some in enumerate(zip(*answers.values(), strict=True)) if len({*some}) > 1),
        options.new,
    )
    print(f"\n{kind}: the first {shared} of {options.new} tokens are the same")
    if shared < min(SAME, options.new):
        raise SystemExit(f"{kind}: the contenders say different things: {answers}")
    rows = report(f"{kind}: seconds for {options.new} tokens", found, "seconds", "minilora")
    for side, row in rows.items():
        row["tokens_per_second"] = round(options.new / row["seconds"]["median"], 1)
        print(f"{side:22}{row['tokens_per_second']:10.1f} tokens/s")
    return rows


def ours(kind: str, folder: Path, prompt: list[int], new: int, dtype: torch.dtype) -> None:
    """Greedy decoding here, without an end token."""
    import minilora as ml
    from minilora.generation.generate import generate_ids
    from minilora.generation.sampling import Decoding

    model = ml.load_model(folder, quantize=None if kind == "dense" else "nf4", dtype=dtype)
    with ml.dequantized_weights(model) if kind == "made dense" else nullcontext():
        serve(lambda: timed(lambda: generate_ids(model, [prompt], Decoding(new))[0]))


def theirs(kind: str, folder: Path, prompt: list[int], new: int, dtype: torch.dtype) -> None:
    """transformers' generate, likewise."""
    from transformers import AutoModelForCausalLM

    quantized = {"quantization_config": four_bit(dtype)} if kind == "nf4" else {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantized)
    ids = torch.tensor([prompt])
    given = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    given |= {"max_new_tokens": new, "min_new_tokens": new}
    serve(lambda: timed(lambda: model.generate(ids, **given)[0, len(prompt) :].tolist()))


def timed(call: Any) -> dict[str, Any]:
    """Seconds of one call, and its tokens."""
    begun = time.perf_counter()
    tokens = call()
    return {"seconds": time.perf_counter() - begun, "tokens": tokens}


if __name__ == "__main__":
    main()
