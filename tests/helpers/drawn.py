"""Inputs for the tests of plots: small models, plans, batches and runs, and one figure per kind."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import minilora as ml
from minilora.data.collate import collate
from minilora.data.loss_mask import IGNORE, Example
from minilora.data.packing import pack
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM

SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
RUN = {"per_device_train_batch_size": 2, "max_length": 128}


@cache
def adapted() -> torch.nn.Module:
    """Return a 4-bit decoder of three layers with an adapter that is not zero."""
    torch.manual_seed(0)
    model = CausalLM(DecoderConfig(**SHAPE))
    ml.quantize_model(model)
    ml.inject(model, ml.LoRAConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@cache
def plans() -> list[ml.MemoryPlan]:
    lora = ml.LoRAConfig(r=4, target_modules="all-linear")
    config = DecoderConfig(**SHAPE)
    found = [
        ml.plan_memory(config, lora, ml.TrainConfig(**RUN), quantize=q, card="20MB")
        for q in ("nf4", None)
    ]
    return [*found, ml.plan_memory(config, None, ml.TrainConfig(method="full", **RUN))]


@cache
def batch() -> dict[str, torch.Tensor]:
    lengths = [31, 12, 20, 5, 17, 9, 26, 14]
    examples = [
        Example([1] * n, [IGNORE] * (n // 2) + [1] * (n - n // 2), row)
        for row, n in enumerate(lengths)
    ]
    return collate([*pack(examples, lengths, 48)], 0)


@cache
def weight() -> tuple[torch.Tensor, ml.NF4Weight]:
    # Rows of 65 values, so that blocks of 64 values cross the ends of rows.
    source = torch.randn(48, 65, generator=torch.Generator().manual_seed(0))
    return source, ml.quantize_nf4(source)


ROWS = [
    {"job": job, "bytes": size, "operations": 2 * n, "label": f"{n} tokens"}
    for job, size in (("4 bits", 0.5), ("bf16", 2))
    for n in (1, 8, 64)
]


def log(folder, seed: int):
    rng = np.random.default_rng(seed)
    lines = [
        {
            "step": s,
            "loss": 3 - s / 20 + rng.random(),
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
            "tokens_per_second": 900.0,
            "eval_loss": 2.5,
            "eval_exact_match": 0.5,
        }
        for s in range(1, 20)
    ]
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join(map(str, lines)).replace("'", '"'))
    return folder


@cache
def figures() -> dict[str, Any]:
    """Return one figure of each kind, by the name of its function."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        runs = ml.plot.runs([log(folder / "short", 0), log(folder / "a-run-with-a-longer-name", 1)])
    report = ml.merge_report(adapted())
    return {
        "codebook": ml.plot.codebook(),
        "histogram": ml.plot.histogram(weight()[1], weight()[0]),
        "memory": ml.plot.memory(plans()),
        "merge_error": ml.plot.merge_error(report),
        "merge_error, one": ml.plot.merge_error(report, ["nf4"]),
        "packed": ml.plot.packed(batch(), row=1),
        "roofline": ml.plot.roofline(ROWS, 100, 1600, "a title"),
        "runs": runs,
        "spectra": ml.plot.spectra(adapted()),
    }
