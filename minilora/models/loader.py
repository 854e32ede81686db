"""Load a model with no more memory than it needs: the (quantised) model plus one tensor.

The module tree is built on the meta device, where parameters have shapes and no storage. Then each tensor is read,
checked, cast or quantised, and put in its place; a linear layer becomes an NF4Linear at that moment. The output layer,
embeddings and norms are never quantised. Simplified against transformers: one device, no pickle, no remote code, and
nothing is initialised for want of a tensor: what is missing, left over, mis-shaped or not finite is an error.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.hub import resolve
from minilora.models.checkpoint import Checkpoint, SafetensorsCheckpoint
from minilora.models.decoder import CausalLM
from minilora.models.gguf.read import GGUFCheckpoint
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import NF4Weight, quantize_nf4
from minilora_kernels.c import bindings

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_OLD = ".rotary_emb.inv_freq"  # old Llama checkpoints store RoPE's frequencies, which the config determines


def load_model(
    source: str | Path,
    *,
    quantize: str | None = None,
    double_quant: bool = True,
    blocksize: int = 64,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool | None = None,
) -> CausalLM:
    """A model of a family that models/config.py knows, in eval mode: Llama, Mistral, Qwen2, Qwen3, Gemma 3 text.

    source: a Hub id, a folder with config.json and safetensors, or a .gguf file.
    quantize: "nf4" keeps the linear layers in 4 bits (`double_quant` and `blocksize` as in `quantize_nf4`); None keeps
        them in `dtype`. A checkpoint already in 4 bits (bitsandbytes' NF4) keeps its own bits, and "nf4" then only
        checks that they are of the kind asked for.
    dtype: of everything dense and of computing; "auto" picks what the hardware is fast in and prints it.
    device: default a CUDA GPU if there is one, else the CPU.
    Raises ValueError or OSError that name the file and tensor at fault and say what to do.
    """
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize must be None or 'nf4', got {quantize!r}.")
    if quantize is None and (blocksize, double_quant) != (64, True):
        raise ValueError(
            f"blocksize={blocksize}, double_quant={double_quant}: they do nothing without quantize='nf4': add that, or "
            "leave them out."
        )
    place = resolve(source, revision, token, local_files_only)
    checkpoint: Checkpoint = GGUFCheckpoint(place) if place.is_file() else SafetensorsCheckpoint(place)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = pick_dtype(dtype, device)
    if device.type == "cpu":
        bindings.begin(dtype)  # the compiler runs while weights are read
    _check_sizes(checkpoint)
    with torch.device("meta"):
        model = CausalLM(checkpoint.config)
    names = _match(model, checkpoint)
    _check_skip(model, checkpoint)
    for name in names:  # sorted: a layer's bias is there before its weight is quantised
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        tensor = checkpoint.read(name)
        if isinstance(tensor, NF4Weight):
            _check_kind(tensor, checkpoint.where(name), name, (blocksize, double_quant) if quantize else ())
            _check(tensor.absmax.to(dtype), checkpoint.where(name), f"{name} in {dtype}")
            model.set_submodule(path, NF4Linear(tensor.to(device), module.bias))
            continue
        is_linear = leaf == "weight" and isinstance(module, nn.Linear) and module is not model.lm_head
        four_bit = quantize is not None and not checkpoint.four_bit and is_linear
        _check(tensor, checkpoint.where(name), name, finite=not four_bit)
        if four_bit:
            try:
                weight = quantize_nf4(tensor.to(device), blocksize, double_quant)
            except ValueError:  # it looks at every value anyway, and names the first at fault
                _check(tensor, checkpoint.where(name), name)
                raise
            weight = replace(weight, dtype=dtype)
            model.set_submodule(path, NF4Linear(weight, module.bias, tensor))
        else:
            tensor = tensor.to(device, dtype, copy=True)  # a copy: what was read may be mapped from the file
            _check(tensor, checkpoint.where(name), f"{name} in {dtype}")  # fp16 overflows where bf16 does not
            setattr(module, leaf, nn.Parameter(tensor))
        del tensor  # before the next one is read
    model.tie_weights()
    model.name_or_path = str(source)
    return model.eval()


def pick_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The dtype asked for; for "auto" the one this hardware is fast in, which is printed with the reason."""
    if isinstance(dtype, torch.dtype) or dtype in _DTYPES:
        chosen = _DTYPES.get(str(dtype).removeprefix("torch."))
        if chosen is None:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}.")
        return chosen
    if dtype != "auto":
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(_DTYPES)}, got {dtype!r}.")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        name, why = ("bfloat16", "this GPU has it") if fast else ("float16", "this GPU has no bfloat16")
    elif device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        name, why = "bfloat16", "this CPU has AVX512-BF16 or AMX"
    else:
        name, why = "float32", f"no 16-bit arithmetic known of this {device.type}"
    print(f"minilora: dtype auto is {name}: {why}", file=sys.stderr)
    return _DTYPES[name]


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Before anything is built: a config may claim any number of layers, of any size."""
    config = checkpoint.config
    rows = max(config.vocab_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    if config.num_hidden_layers > len(checkpoint.shapes) or rows * config.hidden_size > 2**40:
        raise ValueError(
            f"{checkpoint.where('')}: its config says {config.num_hidden_layers} layers of {rows} x "
            f"{config.hidden_size}, which its {len(checkpoint.shapes)} tensors cannot be. Download it again."
        )
    for name, value, limit in (("rms_norm_eps", config.rms_norm_eps, 1), ("rope_theta", config.rope.theta, 1e15)):
        if not isinstance(value, int | float) or not 0 <= value < limit:
            raise ValueError(f"{checkpoint.where('')}: {name} must be a number below {limit:g}, got {value!r:.50}.")


def _match(model: CausalLM, checkpoint: Checkpoint) -> list[str]:
    """The names to read, after checking that the checkpoint has each with the right shape, and nothing else."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: shape for name, shape in checkpoint.shapes.items() if not name.endswith(_OLD)}
    tied = found.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{checkpoint.where('')} lacks {_some(missing)}, which its config asks for.")
    if unexpected := sorted(found.keys() - expected.keys()):
        raise ValueError(
            f"{checkpoint.where(unexpected[0])} has {_some(unexpected)}, which a {model.config.model_type} model of "
            "this config has no place for. Is config.json the right one?"
        )
    for name, shape in sorted(found.items()):
        if shape != expected[name]:
            raise ValueError(f"{checkpoint.where(name)}: {name} has shape {shape}, its config says {expected[name]}.")
    if tied is not None:
        _check_tied(checkpoint)
    return sorted(expected)


def _check(tensor: Tensor, where: str, name: str, finite: bool = True) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(f"{where}: {name} is {tensor.dtype}, expected a 16- or 32-bit floating-point tensor.")
    if (
        finite and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all()
    ):  # NaN passes through min and max
        raise ValueError(f"{where}: {name} holds NaN or infinity. Download it again, or load with dtype='float32'.")


def _check_kind(weight: NF4Weight, where: str, name: str, asked: tuple[int, bool] | tuple[()]) -> None:
    if asked not in ((), (weight.blocksize, weight.double_quant)):
        raise ValueError(
            f"{where}: {name} is already in 4 bits, with blocksize={weight.blocksize} and double_quant="
            f"{weight.double_quant}, not {asked}. Leave quantize out to take it as it is, or start from 16 bits."
        )


def _check_skip(model: CausalLM, checkpoint: Checkpoint) -> None:
    """In a 4-bit checkpoint every linear layer is in 4 bits, but the output layer and what its config excepts."""
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    found = {name.removesuffix(".weight") for name in checkpoint.four_bit}
    skip = {path for path in linear if any(f"{path}.".startswith(f"{e}.") or path.endswith(e) for e in checkpoint.skip)}
    if found and (wrong := sorted(found ^ (linear - skip))):
        raise ValueError(
            f"{checkpoint.where(f'{wrong[0]}.weight')}: {_some(wrong)} {'is' if wrong[0] in found else 'is not'} in 4 "
            f"bits, against config.json (linear layers but lm_head and llm_int8_skip_modules {checkpoint.skip} are)."
        )


def _check_tied(checkpoint: Checkpoint) -> None:
    head, embedding = (checkpoint.read(f"{path}.weight") for path in ("lm_head", "model.embed_tokens"))
    if isinstance(head, NF4Weight) or isinstance(embedding, NF4Weight) or not torch.equal(head, embedding):
        raise ValueError(
            f"{checkpoint.where('lm_head.weight')}: lm_head.weight is not the embedding, but config.json ties the two "
            "(tie_word_embeddings). Set it to false, or remove lm_head.weight."
        )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
