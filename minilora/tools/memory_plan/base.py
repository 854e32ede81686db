"""The base of a planned run: its config, and the storage of its linear layers.

None                         dense
(blocksize, double_quant)    NF4
{"….q_proj.weight": "Q4_K"}  the bytes of a GGUF file: the type of each layer's weight
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.common import get_submodule, named_modules, read_json, set_submodule
from minilora.hub import HUB_ID, download, resolve
from minilora.lora.config import LoRAConfig
from minilora.lora.registry import lora_configs
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.models.gguf.keep import kept_layers
from minilora.models.gguf.read import GGUFCheckpoint
from minilora.quant.gguf_embedding import GGUFEmbedding
from minilora.quant.gguf_linear import GGUFLinear
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels.gguf import FORMATS, GGUFWeight

Bits = tuple[int, bool] | dict[str, str] | None
FOUR_BIT_FOLDER: Bits = (0, False)  # a folder of bitsandbytes, whose settings are not read


def read_config(source: Any, keep: bool = False) -> tuple[DecoderConfig, Bits]:
    """Return the config of a model and the storage of its checkpoint.

    Args:
        source: A config, a config.json as a dict, a Hub id, a folder or a .gguf file.
        keep: Return the types of a .gguf file's layers; without it, it counts as dense.

    Returns:
        The config, and the storage; FOUR_BIT_FOLDER for a checkpoint that is in 4 bits already.

    Raises:
        ValueError: The source is not a model, or `keep` is given and it is not quantised.
    """
    if isinstance(source, DecoderConfig):
        return source, _four_bit({}, keep)
    if not isinstance(source, Mapping):
        path = Path(source).expanduser()
        if not path.exists() and HUB_ID.fullmatch(str(source)) and path.suffix != ".gguf":
            path = download(str(source), ["config.json"])
        path = resolve(path)  # raises for anything but a folder or a .gguf file
        if path.is_file():
            return _read_gguf(path, keep)
        source = read_json(path / "config.json")
    content = dict(source)
    quantization = content.pop("quantization_config", None) or {}
    return DecoderConfig.from_hf(content), _four_bit(quantization, keep)


def _read_gguf(path: Path, keep: bool) -> tuple[DecoderConfig, Bits]:
    """Return the config of a GGUF file, and the types of its linear layers if they are kept."""
    checkpoint = GGUFCheckpoint(path)
    if not keep:
        return checkpoint.config, None
    with torch.device("meta"):
        model = CausalLM(checkpoint.config)
    types = {name: checkpoint.quantized[name] for name in kept_layers(model, checkpoint)}
    return checkpoint.config, types


def _four_bit(quantization: Mapping[str, Any], keep: bool) -> Bits:
    """Return FOUR_BIT_FOLDER for the config of a quantised folder, else None."""
    if quantization.get("load_in_4bit"):
        return FOUR_BIT_FOLDER
    if keep:
        raise ValueError(
            "quantize='keep' keeps the bits of a quantised checkpoint, and this config is of a "
            "dense one. Give a quantised .gguf file, or pass quantize='nf4'."
        )
    return None


def settings_of(model: CausalLM) -> tuple[LoRAConfig | None, Bits, torch.dtype]:
    """Return the adapter config, storage and dtype of a loaded model.

    Args:
        model: A model of `load_model`.
    """
    lora = next(iter(lora_configs(model).values()), None)
    bits: Bits = None
    types: dict[str, str] = {}
    for path, module in named_modules(model):
        if isinstance(module, NF4Linear):
            bits = (module.blocksize, module.nested_bytes is not None)
            break
        if isinstance(module, GGUFLinear | GGUFEmbedding):
            types[f"{path.removesuffix('.base_layer')}.weight"] = module.type_name
    return lora, types or bits, model.model.norm.weight.dtype


def keep_layers(model: Any, types: Mapping[str, str]) -> None:
    """Replace layers of a decoder on the meta device by layers in the types of a GGUF file.

    Args:
        model: The model to change.
        types: Type of each weight by its name.
    """
    tied = model.config.tie_word_embeddings
    for name, type_name in types.items():
        if name == "lm_head.weight" and tied:
            continue
        path = name.removesuffix(".weight")
        layer: Any = get_submodule(model, path)
        out_features, in_features = layer.weight.shape
        block_format = FORMATS[type_name]
        row_bytes = in_features // block_format.values * block_format.nbytes
        blocks = torch.empty(out_features, row_bytes, dtype=torch.uint8, device="meta")
        weight = GGUFWeight(blocks, layer.weight.shape, layer.weight.dtype, type_name)
        if isinstance(layer, nn.Embedding):
            embedding = GGUFEmbedding(weight)
            set_submodule(model, path, embedding)
            if tied:
                model.lm_head = GGUFLinear(embedding.weight)
        else:
            set_submodule(model, path, GGUFLinear(weight, layer.bias))
