"""Seconds to load a model to 4 bits, and from process start to the first forward pass.

    python benchmarks/inference/bench_load.py [--rounds 5] [--folder CHECKPOINT] [--dtype auto]

Each sample is a fresh process. It imports the library, loads a folder whose files are in the page
cache, and runs one forward pass over 64 tokens without a compiler. minilora and transformers
(+ bitsandbytes) take turns. The folder (by default SmolLM2) has the dtype in which both compute:
bf16, or fp32 on a CPU without it. "load" is the call that loads, without the imports; "start" is
the whole time from the creation of the process. Both load to 4 bits ("nf4") and in the dtype of the
folder ("dense"). The script checks that the losses on the 64 tokens agree. The last line is one
JSON document.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks._lib.side_by_side import (
    Contender,
    add_dtype,
    check_close,
    checkpoint,
    compute_dtype,
    dtype_name,
    machine,
    missing_peers,
    report,
    serve,
)

TOKENS = 64
# Relative, for the loss: bf16 rounds at other places, and nested scales may be one code apart.
TOLERANCE = {"nf4": 0.02, "dense": 0.01}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a checkpoint to load instead of SmolLM2")
    parser.add_argument(
        "--short", action="store_true", help="a random model of two layers, one round"
    )
    add_dtype(parser)
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "KIND"), help="run as this contender")
    options = parser.parse_args()
    if options.side:
        side, kind = options.side
        run = ours if side == "minilora" else theirs
        return run(kind, options.folder, options.dtype)
    dtype = compute_dtype(options.dtype)
    found: dict[str, Any] = {"benchmark": "bench_load", **machine(dtype)}
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name) / "base"
        if not options.folder:
            checkpoint(folder, options.short, 1, TOKENS, dtype)
        rounds, warm_up = (1, 0) if options.short else (options.rounds, 1)
        print(json.dumps(found | compare(folder, rounds, dtype, warm_up)))


def compare(folder: Path, rounds: int, dtype: Any, warm_up: int = 1) -> dict[str, Any]:
    """Return both figures of both kinds; peers.py reports them as `load`.

    The round to warm up fills the page cache.
    """
    sides = ("minilora", "transformers")
    missing = missing_peers("transformers", "bitsandbytes", "accelerate")
    if missing:
        print(f"minilora alone: {missing}")
        sides = sides[:1]
    command = [__file__, "--folder", folder, "--dtype", dtype_name(dtype), "--side"]
    tables: dict[str, Any] = {}
    for kind in TOLERANCE:
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(warm_up + rounds):
            for side in sides if number % 2 else sides[::-1]:
                contender = Contender(side, [*command, side, kind])
                contender.close()
                if number >= warm_up:
                    found[side].append(contender.ready)
        losses = {side: answers[0]["loss"] for side, answers in found.items()}
        check_close(f"{kind}, loss", losses, TOLERANCE[kind])
        tables[kind] = {
            "load": report(f"{kind}: seconds to load", found, "load_seconds", "minilora"),
            "start": report(
                f"{kind}: seconds to the first forward pass", found, "start_seconds", "minilora"
            ),
        }
    return tables


def ours(kind: str, folder: Path, dtype: str) -> None:
    """Import minilora, load the model and run it once."""
    import torch

    import minilora as ml

    begun = time.perf_counter()
    model = ml.load_model(folder, quantize="nf4" if kind == "nf4" else None, dtype=dtype)
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        answer(model(tokens(model.config.vocab_size)), seconds)


def theirs(kind: str, folder: Path, dtype: str) -> None:
    """Import transformers, load the model and run it once."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks._lib.steps import four_bit

    quantized = {"quantization_config": four_bit(getattr(torch, dtype))} if kind == "nf4" else {}
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **quantized)
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        answer(model(tokens(model.config.vocab_size)).logits, seconds)


def tokens(vocabulary: int) -> Any:
    """Return token ids (1, TOKENS), the same on both sides."""
    import torch

    return torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def answer(logits: Any, seconds: float) -> None:
    """Answer with the seconds of loading and the model's loss on the tokens."""
    from torch.nn.functional import cross_entropy

    ids = tokens(logits.shape[-1])
    loss = cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item()
    serve(dict, loss=loss, load_seconds=seconds)


if __name__ == "__main__":
    main()
