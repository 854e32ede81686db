"""Puts the library's numbers into docs/explorer.html. python benchmarks/docs/explorer.py [--check]

The page is its own template: what stands between its <script id="data"> and </script> is replaced
by JSON.

    models       layers, linear layers and parameters, of a model built on meta from its config, as the planner does
    levels, thresholds    of NF4
    block        64 weights of SmolLM2-135M-Instruct that share a scale
    errors       ‖W' - W‖ / ‖W‖ over all linear layers of it, and over numbers from a normal law, by block size

It stands beside pictures.py because what it makes is a picture of the docs too. --check writes
nothing, and fails if the page holds other numbers.
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
FURTHER = {  # model -> what config.json says beside its Sizes
    "SmolLM2-135M": {"num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True},
    "Llama-3-8B": {"num_hidden_layers": 32, "vocab_size": 128256},
    "Mistral-7B": {"model_type": "mistral", "num_hidden_layers": 32, "vocab_size": 32000},
    "Qwen2.5-7B": {"model_type": "qwen2", "num_hidden_layers": 28, "vocab_size": 152064},
}
NORMAL = 1 << 20  # numbers from a normal law
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
        if (kept := embedded()) != found:
            raise SystemExit(
                f"{PAGE} differs in {[key for key in found if kept.get(key) != found[key]]}"
            )
        return
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        DATA.sub(lambda parts: parts[1] + compact(found) + parts[3], text, count=1),
        encoding="utf-8",
    )
    print(PAGE)


def embedded() -> dict[str, Any]:
    """The numbers that the page holds."""
    found = DATA.search(PAGE.read_text(encoding="utf-8"))
    assert found, "the page has lost its markers"
    return json.loads(found[2])


def compact(found: dict[str, Any]) -> str:
    """JSON, a line a key."""
    return (
        "{\n"
        + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        + "\n}"
    )


def config(name: str) -> DecoderConfig:
    """The shape of one of MODELS, as DecoderConfig reads it from config.json."""
    sizes = MODELS[name]
    read = {"hidden_size": sizes.hidden, "intermediate_size": sizes.intermediate}
    read |= {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads}
    return DecoderConfig.from_hf(
        {"model_type": "llama", "rms_norm_eps": 1e-5} | read | FURTHER[name]
    )


def fixed() -> dict[str, Any]:
    """What no weight is needed for."""
    models = {}
    for name in FURTHER:
        model = shapes(config(name), None, torch.bfloat16, None)
        block = model.model.layers[0]
        linear = {
            path.rpartition(".")[2]: m
            for path, m in block.named_modules()
            if isinstance(m, torch.nn.Linear)
        }
        models[name] = {
            "layers": len(model.model.layers),
            "parameters": ml.count_parameters(model).total,
            "targets": {target: [m.out_features, m.in_features] for target, m in linear.items()},
        }
    return {
        "models": models,
        "levels": nf4_codebook().tolist(),
        "thresholds": nf4_thresholds().tolist(),
    }


def measured(source: str) -> dict[str, Any]:
    """What real weights give: a block of them, and the error by block size."""
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
            "blocksizes": BLOCKSIZES,
            "error": errors(weights),
            "normal": normal(),
        },
    }


def normal() -> dict[str, list[float]]:
    """The same for numbers from a normal law."""
    return errors([torch.randn(NORMAL, generator=torch.Generator().manual_seed(0))])


def errors(
    weights: Iterable[Tensor], blocksizes: Iterable[int] = BLOCKSIZES
) -> dict[str, list[float]]:
    """‖W' - W‖ / ‖W‖ over all of `weights` by block size, scales in fp32 ("plain") or quantised too ("double")."""
    weights = list(weights)
    length = sum(weight.double().square().sum().item() for weight in weights)

    def error(blocksize: int, double_quant: bool) -> float:
        square = 0.0
        for weight in weights:
            again = ml.dequantize_nf4(ml.quantize_nf4(weight, blocksize, double_quant))
            square += (again - weight).double().square().sum().item()
        return round(
            math.sqrt(square / length), 6
        )  # below that, sums depend on the number of threads

    return {
        kind: [error(size, kind == "double") for size in blocksizes] for kind in ("plain", "double")
    }


if __name__ == "__main__":
    main()
