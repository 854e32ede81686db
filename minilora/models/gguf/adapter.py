"""One GGUF file for llama.cpp from an adapter, which llama.cpp adds to a GGUF file of the base.

    adapter.lora.alpha            α
    blk.3.attn_q.weight.lora_a    A, (r, in)
    blk.3.attn_q.weight.lora_b    B, (out, r)

llama.cpp computes W x + (α / r) · B (A x), with r from the shapes and one α for the whole file. The
scaling s of a layer may be another one (rank-stabilised LoRA, `alpha_pattern`). The file therefore
stores B · s r / α, where α is s r of the first layer. A and B are stored in fp32.

Where llama.cpp orders the rows of a weight otherwise, the rows of B have that order too.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minilora.common import atomic_write, unwrap_model
from minilora.common.extras import require
from minilora.lora.active import check_adapters
from minilora.lora.layer import LoRAAdapter
from minilora.lora.registry import lora_configs, lora_layers
from minilora.lora.variants.base import as_plain
from minilora.models.decoder import CausalLM
from minilora.models.gguf.architectures import ARCHITECTURES, gguf_name, permuted_heads
from minilora.models.gguf.write import check_options, permute


def save_gguf_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write an adapter as a GGUF file for llama.cpp and Ollama.

    The base is not in the file. llama.cpp adds the adapter to any GGUF file of the same base, such
    as one in Q4_K_M: `llama-server -m base.gguf --lora adapter.gguf`.

    Args:
        model: A model of `load_model` with adapters.
        path: The file to write; it appears when it is complete.
        name: Name of the adapter.

    Raises:
        ImportError: The gguf package is not installed.
        ValueError: The adapter is unknown, or llama.cpp cannot add it: it is no plain LoRA of
            linear layers, it trains other parts, or llama.cpp has not the architecture.

    Source: llama.cpp, src/llama-adapter.cpp.
    """
    path = Path(path)
    require(f"{path}: writing GGUF", "gguf")
    import gguf

    model = unwrap_model(model)
    check_adapters(model, [name])
    if not isinstance(model, CausalLM):
        raise ValueError(
            f"save_gguf_adapter: expected a model of ml.load_model, got {type(model).__name__}."
        )
    adapters = _plain_adapters(model, name)
    config = model.config
    check_options(config, "float32")
    heads = permuted_heads(config)
    first = next(iter(adapters.values()))
    alpha = first.scaling * first.r
    with atomic_write(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[config.model_type])
        try:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", alpha)
            for layer_name, adapter in adapters.items():
                A = adapter.lora_A.detach().float().cpu()  # (r, in)
                B = _scaled_B(adapter, alpha)  # (out, r)
                module = layer_name.rpartition(".")[2]
                if module in heads:
                    B = permute(B, heads[module])  # (out, r)
                stored_name = gguf_name(f"{layer_name}.weight", config.model_type)
                writer.add_tensor(f"{stored_name}.lora_a", A.contiguous().numpy())
                writer.add_tensor(f"{stored_name}.lora_b", B.contiguous().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _scaled_B(adapter: LoRAAdapter, alpha: float) -> Tensor:
    """Return B · s r / α, fp32 of shape (out, r)."""
    B = adapter.lora_B.detach().float().cpu()  # (out, r)
    factor = adapter.scaling * adapter.r / alpha
    return B if factor == 1 else factor * B


def _plain_adapters(model: CausalLM, name: str) -> dict[str, LoRAAdapter]:
    """Return the adapter of each layer, or raise ValueError for what llama.cpp cannot add."""
    remedy = "Merge it and export the model: ml.save_model(model, …, format='gguf', merge=True)."
    parts = sorted(lora_configs(model).parts.copies_of([name]))
    if parts:
        raise ValueError(
            f"llama.cpp adds low-rank factors alone, and adapter {name!r} also trains {parts[:4]}. "
            f"{remedy}"
        )
    adapters: dict[str, Any] = {}
    for path, layer in lora_layers(model).items():
        if name in layer.adapters:
            adapters[path] = layer.adapters[name]
    config = lora_configs(model).get(name)
    if config is not None and config.begins_from_weight:
        _, adapters = as_plain(config, adapters)
    for path, adapter in adapters.items():
        kind = _unsupported(adapter)
        if path == "lm_head" and model.config.tie_word_embeddings:
            kind = "a head that shares the embedding's weight"
        if kind:
            raise ValueError(
                f"llama.cpp adds plain LoRA of linear layers, and adapter {name!r} of {path} is "
                f"{kind}. {remedy}"
            )
    return adapters


def _unsupported(adapter: Any) -> str:
    """Return the kind of an adapter that is no plain LoRA of a linear layer, else an empty text."""
    if type(adapter) is not LoRAAdapter:
        return type(adapter).__name__
    if adapter.lora_bias is not None:
        return "LoRA with a bias"
    return ""
