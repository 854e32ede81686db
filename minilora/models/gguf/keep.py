"""The layers of a model in the bytes of a GGUF file.

With quantize="keep" a linear layer whose weight has a quantised type becomes a GGUFLinear, and the
embedding a GGUFEmbedding. An output layer that is tied shares the embedding's bytes. Layers in F32,
F16 and BF16 and norms are dense, as in every other storage.
"""

from typing import Any

import torch
from torch import nn

from minilora.common import get_submodule, named_modules, set_submodule
from minilora.models.decoder import CausalLM
from minilora.models.gguf.read import GGUFCheckpoint
from minilora.quant.gguf_embedding import GGUFEmbedding
from minilora.quant.gguf_linear import GGUFLinear
from minilora_kernels.gguf import FORMATS


def kept_layers(model: CausalLM, checkpoint: GGUFCheckpoint) -> set[str]:
    """Return the names of the weights whose bytes are kept.

    Args:
        model: The model on the meta device.
        checkpoint: The file.

    Raises:
        ValueError: The file has no linear layer in a quantised type.
    """
    kept = set()
    has_linear = False
    for path, module in named_modules(model):
        name = f"{path}.weight"
        if name not in checkpoint.quantized or (path == "lm_head" and _is_tied(model)):
            continue
        if type(module) in (nn.Linear, nn.Embedding):
            kept.add(name)
            has_linear = has_linear or path not in ("lm_head", "model.embed_tokens")
    if not has_linear:
        raise ValueError(
            f"quantize='keep': {checkpoint.path} has no linear layer in a quantised type "
            f"({', '.join(FORMATS)}). Leave quantize out, or pass quantize='nf4'."
        )
    return kept


def load_kept(
    model: CausalLM,
    checkpoint: GGUFCheckpoint,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Read the bytes of a linear layer or of the embedding, and replace the layer.

    Args:
        model: The model; a bias of the layer is loaded already.
        checkpoint: The file.
        name: Name of the weight, from `kept_layers`.
        dtype: Dtype of the dense weight.
        device: Device of the bytes.

    Raises:
        ValueError: A scale is NaN or infinite, or a value is infinite in `dtype`.
    """
    path = name.removesuffix(".weight")
    module: Any = get_submodule(model, path)
    weight = checkpoint.read_quantized(name, dtype).to(device)
    # fp16 overflows where bf16 and fp32 do not
    if dtype == torch.float16 and not weight.dequantize().isfinite().all():
        raise ValueError(
            f"{checkpoint.where(name)}: {name} is infinite in {dtype}. Load with dtype='float32'."
        )
    if isinstance(module, nn.Embedding):
        embedding = GGUFEmbedding(weight)
        set_submodule(model, path, embedding)
        if _is_tied(model):
            set_submodule(model, "lm_head", GGUFLinear(embedding.weight))
    else:
        set_submodule(model, path, GGUFLinear(weight, module.bias))


def _is_tied(model: CausalLM) -> bool:
    """Return True if the output layer shares the embedding's weight."""
    return model.config.tie_word_embeddings
