"""Loading of a model with little memory: the (quantised) model plus one tensor.

The module tree is built on the meta device, where parameters have shapes and no storage. Then each
tensor is read, checked, cast or quantised, and put in its place; a linear layer becomes an
NF4Linear or a GGUFLinear at that moment. The output layer, embeddings and norms are never rounded.

Simplified: unlike transformers, there is one device, no pickle, no remote code, and no missing
tensor is initialised: a missing, unexpected, mis-shaped or non-finite tensor is an error.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import is_within, read_json
from minilora.common.notebook import note
from minilora.common.progress import ProgressBar
from minilora.lora.files.save_load import load_adapter
from minilora.lora.files.source import resolve_base, split_source, trained_storage
from minilora.models.checkpoint import Checkpoint, SafetensorsCheckpoint
from minilora.models.decoder import CausalLM
from minilora.models.gguf.keep import kept_layers, load_kept
from minilora.models.gguf.read import GGUFCheckpoint
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.storage import describe
from minilora_kernels import NF4Weight, quantize_nf4
from minilora_kernels.c import bindings

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_INV_FREQ = (
    ".rotary_emb.inv_freq"  # old Llama checkpoints store RoPE's frequencies; the config has them
)
_MOST_VALUES = 2**40  # of one tensor; a config that claims more is damaged


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
    """Load a model of Llama, Mistral, Qwen2, Qwen3, SmolLM3 or Gemma 3 (text), in eval mode.

    The folder of an adapter, or of a run that trained one, gives the base that the adapter states,
    in the storage that it was trained on, with the adapter "default" active. To choose the base or
    its storage, load the base and call `load_adapter`.

    Args:
        source: a Hub id, a folder with config.json and safetensors, a .gguf file, or the folder of
            an adapter or a run (`output_dir` of `minilora train`).
        quantize: "nf4" rounds the linear layers to 4 bits. "keep" keeps linear layers and embedding
            in the bytes of a quantised GGUF file, without any rounding. None keeps them in `dtype`,
            or as an adapter's folder states. A checkpoint in 4 bits (bitsandbytes' NF4) keeps its
            bits; "keep" means the same for it, and "nf4" then only checks their kind.
        double_quant: quantise the scales too, as in `quantize_nf4`.
        blocksize: weights that share a scale.
        dtype: dtype of dense tensors and of the computation. "auto" chooses the dtype that is fast
            on this hardware, and prints it.
        device: None is a CUDA GPU if there is one, else the CPU.
        revision: branch, tag or commit of the model or base on the Hub; None is its default branch.
        token: access token of the Hub; None uses the stored one.
        local_files_only: True asks no network; None follows HF_HUB_OFFLINE.

    Raises:
        ValueError: an argument is invalid, or a file or tensor is at fault.
        OSError: a file cannot be read or downloaded.
    """
    if quantize not in (None, "nf4", "keep"):
        raise ValueError(f"quantize must be None, 'nf4' or 'keep', got {quantize!r}.")
    if quantize != "nf4" and (blocksize, double_quant) != (64, True):
        raise ValueError(
            f"blocksize={blocksize}, double_quant={double_quant} have no effect without "
            "quantize='nf4': add that, or leave them out."
        )
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "local_files_only": local_files_only,
    }
    base, adapter = split_source(source)
    path = resolve_base(base, adapter, source, **hub)
    blocks = (blocksize, double_quant) if quantize == "nf4" else None
    keep = quantize == "keep"
    if adapter is not None and quantize is None:
        blocks, keep = _trained_settings(adapter, path)
    if keep and not path.is_file() and not is_four_bit(path):
        raise ValueError(
            f"quantize='keep' keeps the bits of a quantised checkpoint, and {path} is not "
            "quantised. Leave quantize out, or pass quantize='nf4'."
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    model = _load_base(path, blocks, keep, pick_dtype(dtype, device), device)
    model.name_or_path = str(base)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def _trained_settings(adapter: Path, base: Path) -> tuple[tuple[int, bool] | None, bool]:
    """Return the storage that an adapter was trained on: (block size, double_quant), and keep.

    A base that is stored in 4 bits keeps its bits, so the first is None then too.
    """
    storage = trained_storage(adapter)
    kept = storage is not None and storage["quantize"] == "keep" and base.is_file()
    in_nf4 = storage is not None and storage["quantize"] == "nf4" and not is_four_bit(base)
    if storage is None or not (kept or in_nf4):
        return None, False
    note(
        f"minilora: the base of {adapter} is loaded {describe(storage)}, because the adapter was "
        "trained on it so."
    )
    if kept:
        return None, True
    return (storage["blocksize"], storage["double_quant"] is not False), False


def is_four_bit(path: Path) -> bool:
    """Return True if a checkpoint is in 4 bits already.

    Args:
        path: the folder or .gguf file.
    """
    config = path / "config.json"
    return config.is_file() and "quantization_config" in read_json(config)


def _load_base(
    path: Path,
    blocks: tuple[int, bool] | None,
    keep: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> CausalLM:
    """Read a checkpoint; quantise it if `blocks` (block size, double_quant), or keep its bytes."""
    checkpoint: Checkpoint
    if path.is_file():
        checkpoint = GGUFCheckpoint(path)
    else:
        checkpoint = SafetensorsCheckpoint(path)
    if device.type == "cpu":
        bindings.begin(dtype)  # the compiler runs while weights are read
    _check_sizes(checkpoint)
    with torch.device("meta"):
        model = CausalLM(checkpoint.config)
    names = _match(model, checkpoint)
    kept = set()
    if keep and isinstance(checkpoint, GGUFCheckpoint):  # bitsandbytes' NF4 keeps its bits anyway
        kept = kept_layers(model, checkpoint)
    _check_skip(model, checkpoint)
    with ProgressBar("load", len(names), "tensor") as bar:
        for name in names:  # sorted: a layer's bias is there before its weight is quantised
            if name in kept:
                assert isinstance(checkpoint, GGUFCheckpoint)
                load_kept(model, checkpoint, name, dtype, device)
            else:
                _load_tensor(model, checkpoint, name, dtype, device, blocks)
            bar.update()
    model.tie_weights()
    return model.eval()


def _load_tensor(
    model: CausalLM,
    checkpoint: Checkpoint,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    blocks: tuple[int, bool] | None,
) -> None:
    """Read a tensor and put it in its place; quantise it if `blocks` (block size, double_quant)."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    where = checkpoint.where(name)
    tensor = checkpoint.read(name)
    if isinstance(tensor, NF4Weight):
        _check_kind(tensor, where, name, blocks)
        _check(tensor.absmax.to(dtype), where, f"{name} in {dtype}")
        model.set_submodule(path, NF4Linear(tensor.to(device), module.bias))
        return
    is_linear = leaf == "weight" and isinstance(module, nn.Linear) and module is not model.lm_head
    if blocks is None or checkpoint.four_bit or not is_linear:
        _check(tensor, where, name)
        tensor = tensor.to(device, dtype, copy=True)  # a copy: the original can be a mapped file
        _check(tensor, where, f"{name} in {dtype}")  # fp16 overflows where bf16 does not
        setattr(module, leaf, nn.Parameter(tensor))
        return
    _check(tensor, where, name, finite=False)
    try:
        weight = quantize_nf4(tensor.to(device), *blocks)
    except ValueError:  # quantising examines every value; _check names the first one at fault
        _check(tensor, where, name)
        raise
    weight = replace(weight, dtype=dtype)
    model.set_submodule(path, NF4Linear(weight, module.bias, tensor))


def pick_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """Return the dtype asked for, or for "auto" the one that is fast on this hardware.

    The choice of "auto" is printed with its reason.

    Args:
        dtype: "auto", a dtype or its name.
        device: the device of the model.

    Raises:
        ValueError: the dtype is unknown.
    """
    if isinstance(dtype, torch.dtype) or dtype in _DTYPES:
        chosen = _DTYPES.get(str(dtype).removeprefix("torch."))
        if chosen is None:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}.")
        return chosen
    if dtype != "auto":
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(_DTYPES)}, got {dtype!r}.")
    name, reason = fast_dtype(device)
    note(f"minilora: dtype auto is {name}: {reason}")
    return _DTYPES[name]


def fast_dtype(device: torch.device) -> tuple[str, str]:
    """Return the name of the dtype that "auto" chooses, and the reason.

    Args:
        device: the device of the model.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "this GPU has it"
        return "float16", "this GPU has no bfloat16"
    if device.type == "cpu":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return "bfloat16", "this CPU has AVX512-BF16 or AMX"
    return "float32", f"no 16-bit arithmetic known of this {device.type}"


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Check the config before the model is built: it may claim any number of layers of any size."""
    config = checkpoint.config
    attention = config.num_attention_heads * config.head_dim
    rows = max(config.vocab_size, config.intermediate_size, attention)
    too_large = rows * config.hidden_size > _MOST_VALUES
    if config.num_hidden_layers > len(checkpoint.shapes) or too_large:
        raise ValueError(
            f"{checkpoint.where('')}: its config describes {config.num_hidden_layers} layers of "
            f"{rows} x {config.hidden_size}, which its {len(checkpoint.shapes)} tensors cannot be. "
            "Download it again."
        )
    limits = (("rms_norm_eps", config.rms_norm_eps, 1), ("rope_theta", config.rope.theta, 1e15))
    for name, value, limit in limits:
        if not isinstance(value, int | float) or not 0 <= value < limit:
            raise ValueError(
                f"{checkpoint.where('')}: {name} must be a number below {limit:g}, got {value!r:.50}."
            )


def _match(model: CausalLM, checkpoint: Checkpoint) -> list[str]:
    """Return the names to read; check that the checkpoint has each with its shape, and no others."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = {}
    for name, shape in checkpoint.shapes.items():
        if not name.endswith(_INV_FREQ):
            stored[name] = shape
    tied = None
    if model.config.tie_word_embeddings:
        tied = stored.pop("lm_head.weight", None)
    missing = sorted(expected.keys() - stored.keys())
    if missing:
        raise ValueError(
            f"{checkpoint.where('')} lacks {_some(missing)}, which its config asks for."
        )
    unexpected = sorted(stored.keys() - expected.keys())
    if unexpected:
        raise ValueError(
            f"{checkpoint.where(unexpected[0])} has {_some(unexpected)}, which a "
            f"{model.config.model_type} model of this config has no place for. Is config.json the "
            "right one?"
        )
    for name, shape in sorted(stored.items()):
        if shape != expected[name]:
            raise ValueError(
                f"{checkpoint.where(name)}: {name} has shape {shape}, its config says "
                f"{expected[name]}."
            )
    if tied is not None:
        _check_tied(checkpoint)
    return sorted(expected)


def _check(tensor: Tensor, where: str, name: str, finite: bool = True) -> None:
    """Raise ValueError for a tensor that is not floating-point, or has NaN or infinity."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(
            f"{where}: {name} is {tensor.dtype}, expected a 16- or 32-bit floating-point tensor."
        )
    if not finite or not tensor.numel():
        return
    extremes = torch.stack(tensor.aminmax())  # NaN passes through minimum and maximum
    if not extremes.isfinite().all():
        raise ValueError(
            f"{where}: {name} holds NaN or infinity. Download it again, or load with "
            "dtype='float32'."
        )


def _check_kind(weight: NF4Weight, where: str, name: str, blocks: tuple[int, bool] | None) -> None:
    """Raise ValueError if a stored 4-bit weight differs from the kind asked for."""
    if blocks not in (None, (weight.blocksize, weight.double_quant)):
        raise ValueError(
            f"{where}: {name} is already in 4 bits, with blocksize={weight.blocksize} and "
            f"double_quant={weight.double_quant}, not {blocks}. Leave quantize out to keep its bits, "
            "or start from 16 bits."
        )


def _check_skip(model: CausalLM, checkpoint: Checkpoint) -> None:
    """Check a 4-bit checkpoint: all linear layers but lm_head and the config's exceptions."""
    quantised = {name.removesuffix(".weight") for name in checkpoint.four_bit}
    if not quantised:
        return
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear.remove("lm_head")
    expected = {path for path in linear if not _is_skipped(path, checkpoint.skip)}
    wrong = sorted(quantised ^ expected)
    if wrong:
        state = "is" if wrong[0] in quantised else "is not"
        raise ValueError(
            f"{checkpoint.where(f'{wrong[0]}.weight')}: {_some(wrong)} {state} in 4 bits, against "
            "config.json (linear layers but lm_head and llm_int8_skip_modules "
            f"{checkpoint.skip} are)."
        )


def _is_skipped(path: str, skip: list[str]) -> bool:
    for entry in skip:
        if is_within(path, entry) or path.endswith(entry):
            return True
    return False


def _check_tied(checkpoint: Checkpoint) -> None:
    """Raise ValueError if the config ties the output layer and the file has another weight for it."""
    head = checkpoint.read("lm_head.weight")
    embedding = checkpoint.read("model.embed_tokens.weight")
    equal = (
        isinstance(head, Tensor) and isinstance(embedding, Tensor) and torch.equal(head, embedding)
    )
    if not equal:
        raise ValueError(
            f"{checkpoint.where('lm_head.weight')}: lm_head.weight is not the embedding, but "
            "config.json ties the two (tie_word_embeddings). Set it to false, or remove "
            "lm_head.weight."
        )


def _some(names: list[str]) -> str:
    """Return the first three names, and the number of the others."""
    shown = ", ".join(names[:3])
    if len(names) > 3:
        shown += f" and {len(names) - 3} more"
    return shown
