"""The library's numbers in docs/explorer.html, and the script that writes them.

    python benchmarks/docs/explorer.py [--check]

The page is its own template: JSON replaces the text between <script id="data"> and </script>.

    models       layers, linear layers and parameters of a model that is built on the meta device
                 from its config, as in the memory planner
    levels, thresholds    of NF4
    block        64 weights of SmolLM2-135M-Instruct that share a scale
    errors       ‖W' - W‖ / ‖W‖ by block size, over all its linear layers, and over normally
                 distributed numbers

The page is a picture of the docs, so this script is in the folder of pictures.py. --check writes
nothing and fails if the page holds other numbers.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import minilora as ml
from benchmarks._lib.bench_timing import MODELS
from minilora.models.config import DecoderConfig
from minilora.tools.memory_plan.step import shapes
from minilora_kernels import nf4_codebook, nf4_thresholds
from minilora_kernels.nf4.weight import BLOCKSIZES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explorer.html"
DATA = re.compile(r'(<script type="application/json" id="data">\n)(.*?)(\n</script>)', re.S)
FURTHER = {  # model -> the fields of config.json that its Sizes do not have
    "SmolLM2-135M": {"num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True},
    "Llama-3-8B": {"num_hidden_layers": 32, "vocab_size": 128256},
    "Mistral-7B": {"model_type": "mistral", "num_hidden_layers": 32, "vocab_size": 32000},
    "Qwen2.5-7B": {"model_type": "qwen2", "num_hidden_layers": 28, "vocab_size": 152064},
}
NORMAL = 1 << 20  # normally distributed numbers
NAME = "SmolLM2-135M-Instruct"
NOTE = (
    "Measured over the {weights:,} weights in the linear layers of SmolLM2-135M-Instruct{source}."
)
FROM_GGUF = ", from a GGUF file that had already rounded them to 4 bits"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the page instead of writing it"
    )
    options = parser.parse_args()
    found = {**fixed(), **measured(ml.samples.smollm2())}
    if options.check:
        kept = embedded()
        different = [key for key in found if kept.get(key) != found[key]]
        if different or kept != found:
            raise SystemExit(f"{PAGE} differs in {different}")
        return
    text = PAGE.read_text(encoding="utf-8")
    text = DATA.sub(lambda parts: parts[1] + compact(found) + parts[3], text, count=1)
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)


def embedded() -> dict[str, Any]:
    """Return the numbers that the page holds."""
    found = DATA.search(PAGE.read_text(encoding="utf-8"))
    assert found, "the page has no data between its markers"
    return json.loads(found[2])


def compact(found: dict[str, Any]) -> str:
    """Return JSON with one line for each key."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def config(name: str) -> DecoderConfig:
    """Return the config of one of MODELS, as DecoderConfig reads it from config.json."""
    sizes = MODELS[name]
    fields = {
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
    }
    return DecoderConfig.from_hf(fields | FURTHER[name])


def fixed() -> dict[str, Any]:
    """Return the numbers that need no weights."""
    models = {}
    for name in FURTHER:
        model = shapes(config(name), None, torch.bfloat16, None)
        targets: dict[str, list[int]] = {}  # name -> [out, in]
        for path, layer in model.model.layers[0].named_modules():
            if isinstance(layer, torch.nn.Linear):
                targets[path.rpartition(".")[2]] = [layer.out_features, layer.in_features]
        models[name] = {
            "layers": len(model.model.layers),
            "parameters": ml.count_parameters(model).total,
            "targets": targets,
        }
    return {
        "models": models,
        "levels": nf4_codebook().tolist(),
        "thresholds": nf4_thresholds().tolist(),
    }


def measured(source: str) -> dict[str, Any]:
    """Return the numbers of real weights: one block, and the error by block size."""
    model = ml.load_model(source, dtype=torch.float32, device="cpu")
    layers = [layer for path, layer in model.named_modules() if path.startswith("model.layers.")]
    weights = [layer.weight.detach() for layer in layers if isinstance(layer, torch.nn.Linear)]
    block = weights[0].flatten()[:64]
    count = sum(weight.numel() for weight in weights)
    note = NOTE.format(weights=count, source=FROM_GGUF if source.endswith(".gguf") else "")
    return {
        "block": {
            "of": f"the first 64 weights of q_proj in layer 0 of {NAME}",
            "values": block.tolist(),
        },
        "errors": {
            "name": NAME,
            "note": note,
            "blocksizes": list(BLOCKSIZES),
            "error": errors(weights),
            "normal": normal(),
        },
    }


def normal() -> dict[str, list[float]]:
    """Return the errors of normally distributed numbers."""
    return errors([torch.randn(NORMAL, generator=torch.Generator().manual_seed(0))])


def errors(
    weights: Iterable[Tensor], blocksizes: Iterable[int] = BLOCKSIZES
) -> dict[str, list[float]]:
    """Return ‖W' - W‖ / ‖W‖ over all `weights` by block size.

    The scales are in fp32 ("plain") or quantised ("double").
    """
    weights = list(weights)
    length = sum(weight.double().square().sum().item() for weight in weights)

    def error(blocksize: int, double_quant: bool) -> float:
        square = 0.0
        for weight in weights:
            again = ml.dequantize_nf4(ml.quantize_nf4(weight, blocksize, double_quant))
            square += (again - weight).double().square().sum().item()
        # Further digits of the sums depend on the number of threads.
        return round(math.sqrt(square / length), 6)

    return {
        kind: [error(size, kind == "double") for size in blocksizes] for kind in ("plain", "double")
    }


if __name__ == "__main__":
    main()
