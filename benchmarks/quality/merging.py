"""What a merge into 4 bits keeps of a trained adapter, by the loss and by the answers.

    python benchmarks/quality/merging.py out/merging

The demo's task (diagnosis -> chapter of ICD-10-CM, held out by category) and model
(SmolLM2-135M-Instruct in NF4) give one adapter. Then each form of the model is measured:

    base          the 4-bit base without the adapter
    adapter       the adapter next to the base, not merged
    nearest       W + ΔW at the nearest level, with new scales
    stochastic s  one of the two neighbouring levels, drawn with seed s; the scales of the base
    original      W₁₆ + ΔW, quantised: needs the base before its quantisation

`recovery` is (L(base) − L) / (L(base) − L(adapter)) for the loss L on the held-out rows, `nats` is
L − L(adapter), `codes` the share of the 4-bit codes that differ from the base, and `projection` is
⟨ΔŴ, ΔW⟩ / ⟨ΔW, ΔW⟩ for the stored change ΔŴ. `prose` is the perplexity of English prose.

Everything is kept in the folder: the adapter, checkpoints of its training and the figures of each
form. A second call continues where the first one ended. The last line is one JSON document.
"""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import minilora as ml
from benchmarks._lib.side_by_side import (
    add_dtype,
    compute_dtype,
    dtype_name,
    machine,
    small_chat_model,
)

FORMS = ("base", "adapter", "nearest", "stochastic 0", "stochastic 1", "stochastic 2", "original")
SHOWN = ("loss", "recovery", "nats", "exact_match", "prose", "codes", "projection")
FIGURES = "figures.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="folder to keep results in, and to continue from")
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--test_rows", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--prose", type=int, default=20, help="texts of prose")
    parser.add_argument("--adapter", help="folder of a trained adapter, instead of training one")
    parser.add_argument(
        "--short", action="store_true", help="a random model of two layers, two steps"
    )
    add_dtype(parser)
    options = parser.parse_args()
    if options.short:
        options.steps, options.batch, options.test_rows, options.prose = 2, 2, 4, 2
    dtype = compute_dtype(options.dtype)
    document: dict[str, Any] = {"benchmark": "merging", **machine(dtype), "steps": options.steps}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        source = ml.samples.smollm2()
        if options.short:
            source = small_chat_model(Path(temporary) / "model", dtype)
        figures = measure(source, dtype_name(dtype), folder, options)
    print_table(figures)
    print(f"{options.steps} steps of {options.batch} rows, {options.test_rows} rows held out")
    print(json.dumps(document | {"forms": figures}))


def measure(source: Any, dtype: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of each form, and write them to the folder as they are measured."""
    task = ml.samples.icd10(
        test_rows=options.test_rows, train_rows=max(options.steps * options.batch, 1)
    )
    tokenizer = ml.load_tokenizer(source)
    adapter = Path(options.adapter or folder / "adapter")
    if not adapter.exists():
        train(source, dtype, task.train, folder, options)
    path = folder / FIGURES
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    missing = [form for form in FORMS if form not in figures]
    model: Any = None
    if missing:
        model = ml.load_model(source, quantize="nf4", dtype=dtype)
        ml.load_adapter(model, adapter)
    for form in missing:
        without = ml.disable_adapters(model) if form == "base" else nullcontext()
        stored = in_form(form, model, source, dtype)
        figures[form] = weights(model, stored)
        with without:
            figures[form] |= scores(stored, tokenizer, task.test, options.prose)
        del stored
        path.write_text(json.dumps(figures, indent=1))
        print(form, figures[form], flush=True)
    gain = figures["base"]["loss"] - figures["adapter"]["loss"]
    for values in figures.values():
        values["recovery"] = (figures["base"]["loss"] - values["loss"]) / gain
        values["nats"] = values["loss"] - figures["adapter"]["loss"]
    return figures


def train(
    source: Any, dtype: str, rows: list[Any], folder: Path, options: argparse.Namespace
) -> None:
    """Train the demo's adapter and save it; continue from a checkpoint if there is one."""
    model = ml.load_model(source, quantize="nf4", dtype=dtype)
    tokenizer = ml.load_tokenizer(source)
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    begun = any((folder / "run").glob("checkpoint-*"))
    checkpoint = "last" if begun else None
    config = ml.TrainConfig(
        output_dir=str(folder / "run"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        warmup_ratio=0.1,
        save_steps=20,
        save_total_limit=1,
        resume_from_checkpoint=checkpoint,
    )
    ml.train(model, tokenizer, rows, config)
    ml.save_adapter(model, folder / "adapter")


def in_form(form: str, model: Any, source: Any, dtype: str) -> Any:
    """Return the model with its adapter in one of FORMS; `model` itself where none is merged."""
    if form in ("base", "adapter"):
        return model
    if form == "nearest":
        return ml.merge(model, "nf4", rounding="nearest")
    if form == "original":
        return ml.merge(model, "nf4", original=ml.load_model(source, dtype=dtype))
    return ml.merge(model, "nf4", seed=int(form.split()[1]))


def weights(model: Any, merged: Any) -> dict[str, float | None]:
    """Return the share of changed codes and the projection of the stored change on ΔW."""
    if merged is model:  # nothing was merged
        return {"codes": None, "projection": None}
    changed = 0
    total = 0
    inner = 0.0  # ⟨ΔŴ, ΔW⟩
    square = 0.0  # ⟨ΔW, ΔW⟩
    for path, layer in adapted_layers(model).items():
        base: Any = layer.base_layer
        stored: Any = merged.get_submodule(path)
        differing: Tensor = stored.packed ^ base.packed  # two codes a byte
        changed += count(differing & 15) + count(differing >> 4)
        total += layer.in_features * layer.out_features
        W = base.dequantize(torch.float32)  # (out, in)
        adapter: Any = layer.adapters["default"]
        change = (stored.dequantize(torch.float32) - W).double().flatten()  # ΔŴ
        delta = adapter.delta(torch.float64).detach().flatten()  # ΔW
        inner += (change @ delta).item()
        square += (delta @ delta).item()
    return {"codes": changed / total, "projection": inner / square}


def adapted_layers(model: Any) -> dict[str, ml.LoRALayer]:
    """Return the layers with an adapter by path."""
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, ml.LoRALayer):
            layers[path] = module
    return layers


def count(values: Tensor) -> int:
    """Return the number of values that are not zero."""
    return int(values.count_nonzero().item())


def scores(model: Any, tokenizer: Any, test: list[Any], prose: int) -> dict[str, float | None]:
    """Return loss and exact match on the held-out rows, and the perplexity of prose."""
    answers = ml.evaluate(model, tokenizer, test, max_new_tokens=4, batch_size=32)
    general = ml.evaluate(model, tokenizer, ml.samples.prose(prose), batch_size=4)
    return {
        "loss": answers.loss,
        "exact_match": answers.exact_match,
        "prose": general.perplexity,
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print a line for each form."""
    print(f"{'':<14}" + "".join(f"{name:>13}" for name in SHOWN))
    for form, values in figures.items():
        cells = [cell(values[name]) for name in SHOWN]
        print(f"{form:<14}" + "".join(cells))


def cell(value: float | None) -> str:
    """Return a figure as a cell of the table."""
    return f"{'-':>13}" if value is None else f"{value:>13.4f}"


if __name__ == "__main__":
    main()
