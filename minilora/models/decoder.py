r"""One decoder on one page: Llama 2/3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3, Gemma 3's text models.

    x = embed(tokens)
    for each layer:
        x = x + attention(norm(x))        q, k rotated by position (minilora_kernels/ops/rope.py); heads share keys
                                          (minilora_kernels/ops/attention.py)
        x = x + mlp(norm(x))              SwiGLU (arXiv 2002.05202, eq. 6)
    logits = lm_head(norm(x))

What a family does differently is a switch of its config (config.py): biases and norms of q and k in Qwen, more norms,
another activation and scaled embeddings in Gemma, a window and another rotation by the kind of layer (layer_types).
Modules carry Hugging Face's names, so their paths are the keys of a checkpoint. Values agree with transformers' also in
16 bit, because every rounding is where theirs is: to the bit with MINILORA_STEPS=torch; what is compiled otherwise sums
in another order. Simplified against transformers: no labels, losses, dropout, attention-mask argument or output
classes; document_ids says who sees whom, and padding has the id -1.

Shapes: B rows, T new tokens, S keys (T and what the cache holds), D hidden size, H heads of d numbers each, V words.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.models.config import SLIDING, DecoderConfig
from minilora.models.kv_cache import KVCache
from minilora.models.rope_config import frequencies, rotation
from minilora_kernels.ops.attention import Documents, attention, causal_mask, document_runs
from minilora_kernels.ops.residual import residual
from minilora_kernels.ops.rms_norm import rms_norm
from minilora_kernels.ops.rope import rotate
from minilora_kernels.ops.swiglu import gated

Mask = Tensor | Mapping[str, Tensor] | None
LayerMask = Tensor | Documents | None


class RMSNorm(nn.Module):
    """y = w · x / √(mean(x²) + ε), in fp32 (minilora_kernels/ops/rms_norm.py). Gemma stores w - 1."""

    def __init__(self, size: int, eps: float, gemma: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if gemma else torch.ones(size))
        self.eps, self.gemma = eps, gemma

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.gemma)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class Attention(nn.Module):
    """Causal self-attention with rotated queries and keys; several query heads share a key head."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        family, width, bias = config.family, config.hidden_size, config.attention_bias
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(width, queries, bias=bias or family.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=bias or family.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=bias or family.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=bias)
        norm = partial(RMSNorm if family.qk_norm else nn.Identity, config.head_dim, config.rms_norm_eps, family.gemma)
        self.q_norm, self.k_norm = norm(), norm()  # over each head's channels: keeps q·k small (arXiv 2302.05442, §2)
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: LayerMask, cache: KVCache | None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, D) -> (B, heads, T, d)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if cache is not None:
            k, v = cache.update(self.index, k, v)  # (B, kv_heads, S, d)
        return self.o_proj(attention(q, k, v, mask, self.scale).transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) · up x). Gemma's GeGLU has gelu, in its tanh form, for silu."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.gelu = config.family.gemma

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.gelu))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): `rope` is the cos and sin of rope_config.py.

    In Gemma each block's output has a norm as well, and post_attention_layernorm is that of attention.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.gemma = config.family.gemma
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, self.gemma)
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        if self.gemma:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: LayerMask, cache: KVCache | None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), rope, mask, cache)
        if self.gemma:
            x = residual(x, self.post_attention_layernorm(attended))
            return residual(x, self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))
        x = residual(x, attended)
        return residual(x, self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers and final norm; `CausalLM.hidden` runs them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        table = torch.empty(config.vocab_size, config.hidden_size)  # filled by _initialise
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.family.gemma)


class CausalLM(nn.Module):
    """A decoder and its output layer. `gradient_checkpointing = True` trades a second forward for activation memory."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.name_or_path = ""  # where the weights came from
        self.gradient_checkpointing = False
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(_initialise)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of input_ids (B, T); the other arguments as in `hidden`."""
        return self.lm_head(self.hidden(input_ids, position_ids, document_ids, cache))

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        mask: Mask = None,
    ) -> Tensor:
        """The last layer's output after the final norm, (B, T, D).

        position_ids (B, T): default count on from the cache's length. Only differences matter to RoPE, so padding on
            the left and packed documents need none.
        document_ids (B, T), equal ids side by side: a token sees itself and earlier tokens of its id. None: all are one
            document (id 0), or, with a cache, go on with the document of their row's last token. Padding takes the id
            -1. Without a cache each document is attended to by itself and padding not at all
            (minilora_kernels/ops/attention.py).
        cache: holds the earlier tokens; the new ones are appended.
        mask (B or 1, 1, T, S), bool: who may look at whom, given outright (a tree of continuations, for example). If
            only some layers have a window, a mask by the kind of layer: {"full_attention": …, "sliding_attention": …}.
        """
        rows, count = input_ids.shape
        past = cache.length if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + count, device=input_ids.device)[None]  # (1, T)
        if cache is not None:
            document_ids = cache.extend_documents(document_ids, rows, count)  # (B, S)
        x = self.model.embed_tokens(input_ids)  # (B, T, D)
        if self.config.family.gemma:
            x = x * torch.full((), self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)  # a rounded root
        runs = None if document_ids is None or cache is not None or mask is not None else document_runs(document_ids)
        masks = self._masks(mask, (count, past + count), document_ids, runs, input_ids.device)
        omegas = {kind: self._frequencies(kind, x.device, cache) for kind in masks}
        ropes = {kind: rotation(omega, position_ids, x.dtype) for kind, omega in omegas.items()}
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer, kind in zip(self.model.layers, self.config.layer_types, strict=True):
            inputs = x, ropes[kind], masks[kind], cache
            x = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)  # (B, T, D)
        if cache is not None:
            cache.advance(count, document_ids)
        return self.model.norm(x)

    def _masks(
        self,
        mask: Mask,
        shape: tuple[int, int],
        document_ids: Tensor | None,
        runs: list[tuple[int, bool]] | None,
        device: torch.device,
    ) -> Mapping[str, LayerMask]:
        """For each kind of layer a mask (T, S); None: plain causal, the fast path; or Documents: the same, one by one.

        runs: (tokens, whether they are real) of each stretch of one id, row after row.
        """
        if isinstance(mask, Mapping):
            return mask
        masks: dict[str, LayerMask] = dict.fromkeys(self.config.layer_types, mask)
        if mask is not None and len(masks) > 1:
            raise ValueError(f"some layers have a window: give a mask for each kind of layer, {' and '.join(masks)}.")
        for kind in masks if mask is None else ():
            window = self.config.sliding_window if kind == SLIDING else None
            if window is not None and window >= shape[1]:
                window = None  # nothing is that far back yet
            if runs is not None:
                wide = {size for size, real in runs if real and window is not None and size > window}
                masks[kind] = Documents(runs, {n: causal_mask(n, n, window=window, device=device) for n in wide})
            elif window is not None or document_ids is not None:
                masks[kind] = causal_mask(*shape, window=window, document_ids=document_ids, device=device)
        return masks

    def _frequencies(self, kind: str, device: torch.device, cache: KVCache | None) -> Tensor:
        """Of a kind of layer, (d/2,). A cache keeps them: moving them to a GPU makes each token wait."""
        kept = {} if cache is None else cache.frequencies
        if kind not in kept:
            kept[kind] = frequencies(self.config.rope_of(kind), self.config.head_dim).to(device)
        return kept[kind]

    def tie_weights(self) -> None:
        """Where the config says so, the output layer's weight *is* the embedding."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def declare_untied(self) -> None:
        """State in the config that the output layer has a weight of its own."""
        self.config = replace(self.config, tie_word_embeddings=False)


def _initialise(module: nn.Module) -> None:
    """Small random weights, N(0, 0.02²), as transformers starts an untrained model."""
    if getattr(getattr(module, "weight", None), "is_meta", False):
        return  # nothing to fill, and asking PyTorch to would make it import sympy
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
