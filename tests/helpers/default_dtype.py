"""Print a hash of the result of each public function, under a default dtype of torch.

    python default_dtype.py PARTS FOLDER DTYPE [DTYPE ...]

PARTS are names of PARTS below, separated by commas, or "all". FOLDER holds a model, which
`write_model` saves. With several dtypes, one process runs all functions
under each of them in turn, so that tables which are made once are made under the first. Each dtype
prints one line of JSON: {function: hash}.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import minilora as ml
from helpers.toy import Letters, llama, rows
from minilora.training.optim.adamw_8bit import AdamW8bit

FAST = {"learning_rate": 1e-2, "max_steps": 2, "save_steps": None, "max_length": 24}


def digest(*values: Any) -> str:
    """Return a hash of tensors by their bytes, and of other values by their repr."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()[:16]


def files(folder: Path) -> str:
    """Return a hash of all files below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest(*[(str(path.relative_to(folder)), path.read_bytes()) for path in paths])


def write_model(folder: Path) -> None:
    """Save the model that the functions use."""
    ml.save_model(llama(), folder)


def normal(*shape: int) -> torch.Tensor:
    """Return normally distributed values in fp32."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def loaded(folder: Path, **options: Any) -> Any:
    """Return the saved model in fp32."""
    return ml.load_model(folder, dtype="float32", **options)


def adapted(folder: Path, quantize: str | None = None, **fields: Any) -> Any:
    """Return the saved model with an adapter whose B is not zero."""
    options = {"quantize": quantize, "blocksize": 32} if quantize else {}
    model = loaded(folder, **options)
    ml.inject(model, ml.LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(normal(*parameter.shape) / 8)
    return model


def quantization(folder: Path) -> dict[str, str]:
    """Quantise and dequantise."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = normal(64, 96).to(dtype)
        for double in (False, True):
            q = ml.quantize_nf4(weight, blocksize=64, double_quant=double)
            tensors = list(q.state_dict().values())
            found[f"nf4 {dtype} {double}"] = digest(*tensors, ml.dequantize_nf4(q))
    model = loaded(folder)
    ml.quantize_model(model, blocksize=32, double_quant=True)
    found["quantize_model"] = digest(*model.state_dict().values())
    return found


def adapters(folder: Path) -> dict[str, str]:
    """Make adapters of all kinds, save, combine and merge them."""
    found = {}
    ids = torch.arange(12)[None]
    variants = {
        "lora": {},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "loftq": {"init_lora_weights": "loftq"},
    }
    for name, fields in variants.items():
        model = adapted(folder, **fields)
        state = ml.adapter_state_dict(model).values()
        with torch.no_grad():
            found[name] = digest(*state, model(ids))
    model = loaded(folder)
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["embed_tokens"], tie="untie"))
    found["embedding"] = digest(*ml.adapter_state_dict(model).values())
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        model = adapted(folder)
        ml.save_adapter(model, out / "a")
        found["saved adapter"] = digest(*[p.read_bytes() for p in sorted((out / "a").iterdir())])
        ml.load_adapter(loaded(folder), out / "a")
        parts = [ml.AdapterWeights.of(model)] * 2
        for method in ("linear", "svd", "ties", "dare"):
            options = {} if method == "linear" else {"rank": 3}
            if method in ("ties", "dare"):
                options["density"] = 0.5
            combined = ml.combine_adapters(parts, [0.7, 0.6], method=method, **options)
            combined.save(out / method)
            found[f"combined {method}"] = files(out / method)
        found["merged"] = digest(*ml.merge(model).state_dict().values())
        quantized = adapted(folder, "nf4")
        found["merged 4 bits"] = digest(*ml.merge(quantized).state_dict().values())
        ml.save_model(loaded(folder), out / "model", dtype="bfloat16")
        ml.save_model(loaded(folder, quantize="nf4"), out / "nf4", format="bnb-4bit")
        found["saved models"] = digest(files(out / "model"), files(out / "nf4"))
    return found


def training(folder: Path) -> dict[str, str]:
    """Train, evaluate and generate."""
    found = {}
    for optim in ("adamw_torch", "adamw_8bit"):
        for quantize in (None, "nf4"):
            model = adapted(folder, quantize)
            config = ml.TrainConfig(optim=optim, **FAST)
            result = ml.train(model, Letters(), rows(), config)
            state = ml.adapter_state_dict(model).values()
            found[f"train {optim} {quantize}"] = digest(result.losses, *state)
    found["evaluate"] = digest(ml.evaluate(model, Letters(), rows(4)).loss)
    found["generate"] = digest(ml.generate(model, Letters(), "abc", max_new_tokens=5))
    p = torch.nn.Parameter(normal(4096))
    optimizer = AdamW8bit([p], lr=1e-3)
    for _ in range(300):  # more steps than bf16 can count
        p.grad = normal(4096)
        optimizer.step()
    found["adamw_8bit, 300 steps"] = digest(p, optimizer.state[p]["step"])
    return found


def tools(folder: Path) -> dict[str, str]:
    """Measure and plan."""
    model = adapted(folder)
    config = ml.TrainConfig(max_length=16)
    report = ml.merge_report(model)
    return {
        "merge_report": digest(str(report)),
        "plan_memory": digest(ml.plan_memory(model, config=config).total),
        "inspect": digest(str(ml.inspect(folder)).split("\n", 1)[1]),
        "count_parameters": digest(str(ml.count_parameters(model))),
    }


PARTS = {"quantization": quantization, "adapters": adapters, "training": training, "tools": tools}


def main(names: str, folder: Path, dtypes: list[str]) -> None:
    """Run the functions of some parts under each default dtype."""
    parts = [PARTS[name] for name in (PARTS if names == "all" else names.split(","))]
    for dtype in dtypes:
        torch.set_default_dtype(getattr(torch, dtype))
        found: dict[str, str] = {}
        for part in parts:
            found |= part(folder)
        print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
