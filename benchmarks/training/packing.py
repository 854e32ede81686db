"""Attention over a packed row, forward and backward: one mask or one call for each document.

    python benchmarks/training/packing.py [--tokens 2048] [--documents 8] [--rounds 9]

The sizes are SmolLM2's heads (9 queries on 3 keys, 64 wide), fp32, one row. The script checks that
both forms give the same output and gradients, then times them in turns: processor seconds, medians.
Peak memory is the memory that a fresh process adds in its first pass (Linux). The last line is one
JSON document.
"""

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks._lib.side_by_side import fresh
from minilora_kernels.ops.attention import Documents, attention, causal_mask, document_runs

FORMS = ("mask", "per document")


def inputs(tokens: int, documents: int) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v that require gradients, and document ids (1, T)."""
    torch.manual_seed(0)
    qkv = [torch.randn(1, heads, tokens, 64, requires_grad=True) for heads in (9, 3, 3)]
    return qkv, (torch.arange(tokens) * documents // tokens)[None]


def one_pass(form: str, qkv: list[Tensor], ids: Tensor) -> list[Tensor]:
    """Return output and gradients.

    The mask or the runs of documents are made here too, as in a forward pass.
    """
    if form == "mask":
        mask = causal_mask(ids.shape[1], ids.shape[1], document_ids=ids)
    else:
        mask = Documents(document_runs(ids) or [], {})
    q, k, v = qkv
    out = attention(q, k, v, mask)
    return [out, *torch.autograd.grad(out.square().sum(), qkv)]


def peak() -> int:
    """Return the peak of resident bytes since this program started."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("tokens", 2048), ("documents", 8), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--form", choices=FORMS, help="print only the bytes that this form takes")
    options = parser.parse_args()
    qkv, ids = inputs(options.tokens, options.documents)
    if options.form:
        small, few = inputs(64, 2)
        one_pass(options.form, small, few)  # loads the code that is loaded at first use
        before = peak()
        one_pass(options.form, qkv, ids)
        print(peak() - before)
        return
    by_mask, by_document = (one_pass(form, qkv, ids) for form in FORMS)
    pairs = zip(by_mask, by_document, strict=True)
    off = max((a - b).norm() / b.norm() for a, b in pairs).item()
    assert off < 1e-5, f"outputs or gradients differ by {off:.1e}"
    seconds = {form: [] for form in FORMS}
    for form in FORMS * options.rounds:
        begun = time.process_time()
        one_pass(form, qkv, ids)
        seconds[form].append(time.process_time() - begun)
    found = {
        "benchmark": "packing",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "relative_difference": off,
        **vars(options),
    }
    for form in FORMS:
        peak_mb = fresh(*sys.argv, "--form", form) / 1e6
        found[form] = {"seconds": statistics.median(seconds[form]), "peak_mb": peak_mb}
        print(f"{form:<12}{found[form]['seconds']:9.4f} s{found[form]['peak_mb']:9.1f} MB")
    ratios = [found["mask"][unit] / found["per document"][unit] for unit in ("seconds", "peak_mb")]
    print(f"ratio       {ratios[0]:9.2f}  {ratios[1]:9.2f}")
    print(json.dumps(found | {"ratios": ratios}))


if __name__ == "__main__":
    main()
