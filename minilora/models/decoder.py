r"""One decoder on one page: Llama 2/3, SmolLM2/3, Mistral, Qwen2, Qwen2.5, Qwen3, Gemma 3 (text).

    x = embed(tokens)
    for each layer:
        x = x + attention(norm(x))        q and k rotated by position (ops/rope.py), grouped heads
                                          (ops/attention.py)
        x = x + mlp(norm(x))              SwiGLU (arXiv 2002.05202, eq. 6)
    logits = lm_head(norm(x))

A switch of the config (config.py) selects each difference of a family: biases and norms of q and k
in Qwen; more norms, another activation and scaled embeddings in Gemma; a window and another
rotation by the kind of layer (layer_types); no rotation in some layers of SmolLM3. Modules have
Hugging Face's names, so their paths are the keys of a checkpoint. Every rounding is at the same
place as in transformers. In 16 bits the values are therefore equal, bit for bit if the environment
has MINILORA_STEPS=torch; compiled operations add in another order.

Simplified: unlike transformers, there are no labels, losses, dropout, attention-mask argument or
output classes. document_ids states which tokens attend to each other; padding has the id -1.

Shapes: B rows, T new tokens, S keys (T and those in the cache), D hidden size, H heads of d
channels each, V words. The operations are in kernels/minilora_kernels/ops/.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.models.config import DecoderConfig
from minilora.models.kv_cache import KVCache
from minilora.models.masks import LayerMask, Mask, layer_masks
from minilora.models.rope_config import frequencies, rotation
from minilora_kernels.ops.attention import attention, document_runs
from minilora_kernels.ops.residual import residual
from minilora_kernels.ops.rms_norm import rms_norm
from minilora_kernels.ops.rope import rotate
from minilora_kernels.ops.swiglu import gated


class RMSNorm(nn.Module):
    """y = w · x / √(mean(x²) + ε), in fp32.

    Args:
        size: number of channels.
        eps: ε.
        gemma: the stored weight is w - 1, as in Gemma.
    """

    def __init__(self, size: int, eps: float, gemma: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if gemma else torch.ones(size))
        self.eps = eps
        self.gemma = gemma

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, of the same shape and dtype.

        Args:
            x: activations, (…, size).
        """
        return rms_norm(x, self.weight, self.eps, self.gemma)

    def extra_repr(self) -> str:
        """Return the size and ε for `repr`."""
        return f"{self.weight.numel()}, eps={self.eps}"


class Attention(nn.Module):
    """Causal self-attention with rotated queries and keys; several query heads share a key head.

    Args:
        config: the shape of the model.
        index: number of the layer.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        family = config.family
        width = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        qkv_bias = config.attention_bias or family.qkv_bias
        self.q_proj = nn.Linear(width, queries, bias=qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=config.attention_bias)
        # Norms over each head's channels keep q·k small (arXiv 2302.05442, section 2).
        self.q_norm = self._head_norm(config)
        self.k_norm = self._head_norm(config)
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5

    @staticmethod
    def _head_norm(config: DecoderConfig) -> nn.Module:
        if not config.family.qk_norm:
            return nn.Identity()
        return RMSNorm(config.head_dim, config.rms_norm_eps, config.family.gemma)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: LayerMask,
        cache: KVCache | None,
    ) -> Tensor:
        """Return the attention's output, (B, T, D).

        Args:
            x: activations, (B, T, D).
            rope: cos and sin of the rotation, (B or 1, 1, T, d) each; None rotates nothing.
            mask: None for plain causal attention, a mask (B or 1, 1, T, S), or Documents.
            cache: keys and values of earlier tokens, or None.
        """
        q = self._heads(self.q_proj(x))  # (B, H, T, d)
        k = self._heads(self.k_proj(x))  # (B, kv_heads, T, d)
        v = self._heads(self.v_proj(x))  # (B, kv_heads, T, d)
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.index, k, v)  # (B, kv_heads, S, d)
        out = attention(q, k, v, mask, self.scale)  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)

    def _heads(self, x: Tensor) -> Tensor:
        """Return (B, T, heads · d) as (B, heads, T, d)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) · up x). Gemma's GeGLU has gelu, in its tanh form, in place of silu.

    Args:
        config: the shape of the model.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, width, bias=config.mlp_bias)
        self.gelu = config.family.gemma

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output, (B, T, D).

        Args:
            x: activations, (B, T, D).
        """
        hidden = gated(self.gate_proj(x), self.up_proj(x), self.gelu)  # (B, T, inner)
        return self.down_proj(hidden)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    In Gemma each block's output has a norm too: post_attention_layernorm normalises the output of
    attention. In the other families it normalises the input of the MLP.

    Args:
        config: the shape of the model.
        index: number of the layer.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.gemma = config.family.gemma
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)
        if self.gemma:
            self.pre_feedforward_layernorm = _norm(config)
            self.post_feedforward_layernorm = _norm(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: LayerMask,
        cache: KVCache | None,
    ) -> Tensor:
        """Return the layer's output, (B, T, D); the arguments are those of `Attention`.

        Args:
            x: activations, (B, T, D).
            rope: cos and sin of the rotation, or None.
            mask: the attention mask.
            cache: keys and values of earlier tokens, or None.
        """
        attended = self.self_attn(self.input_layernorm(x), rope, mask, cache)
        if self.gemma:
            x = residual(x, self.post_attention_layernorm(attended))
            fed_forward = self.mlp(self.pre_feedforward_layernorm(x))
            return residual(x, self.post_feedforward_layernorm(fed_forward))
        x = residual(x, attended)
        return residual(x, self.mlp(self.post_attention_layernorm(x)))


def _norm(config: DecoderConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps, config.family.gemma)


class Decoder(nn.Module):
    """Embedding, layers and final norm; `CausalLM.hidden` runs them.

    Args:
        config: the shape of the model.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        table = torch.empty(config.vocab_size, config.hidden_size)  # filled by _initialise
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        layers = [DecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = _norm(config)


class CausalLM(nn.Module):
    """A decoder and its output layer.

    Args:
        config: the shape of the model.

    Attributes:
        name_or_path: source of the weights.
        gradient_checkpointing: True recomputes activations in backward, to save memory.
        task_type: PEFT's name of the kind of model, for the files of adapters.
        vocabulary_before_resize: Number of tokens before `resize_embeddings`; None without it.
    """

    task_type = "CAUSAL_LM"

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.name_or_path = ""
        self.gradient_checkpointing = False
        self.vocabulary_before_resize: int | None = None
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
        logits: bool = True,
    ) -> Tensor:
        """Return the logits, (B, T, V); the arguments are those of `hidden`.

        Args:
            input_ids: token ids, (B, T).
            position_ids: positions, (B, T).
            document_ids: documents, (B, T).
            cache: the earlier tokens, or None.
            logits: False returns `hidden`'s output, for wrappers, which have only `forward`.
        """
        x = self.hidden(input_ids, position_ids, document_ids, cache)  # (B, T, D)
        return self.lm_head(x) if logits else x

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        mask: Mask = None,
    ) -> Tensor:
        """Return the last layer's output after the final norm, (B, T, D).

        Args:
            input_ids: token ids, (B, T).
            position_ids: positions, (B, T); None counts on from the cache's length. RoPE depends on
                differences only, so padding on the left and packed documents need no positions.
            document_ids: (B, T), equal ids next to each other: a token attends to itself and to
                earlier tokens with its id. None is one document (id 0) or, with a cache, the
                document of the row's last token. Padding has the id -1. Without a cache, each
                document is computed by itself and padding not at all (ops/attention.py).
            cache: the earlier tokens, or None; the new tokens are appended to it.
            mask: (B or 1, 1, T, S), bool, for example of a tree of continuations. If only some
                layers have a window, by kind: {"full_attention": …, "sliding_attention": …}.
        """
        rows, count = input_ids.shape
        past = cache.length if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + count, device=input_ids.device)[None]  # (1, T)
        if cache is not None:
            document_ids = cache.extend_documents(document_ids, rows, count)  # (B, S)
        x = self.model.embed_tokens(input_ids)  # (B, T, D)
        if self.config.family.gemma:
            root = self.config.hidden_size**0.5
            x = x * torch.full((), root, dtype=x.dtype, device=x.device)  # rounded to x's dtype
        runs = None
        if document_ids is not None and cache is None and mask is None:
            runs = document_runs(document_ids)
        shape = (count, past + count)
        masks = layer_masks(self.config, mask, shape, document_ids, runs, input_ids.device)
        ropes = {}
        for kind in masks:
            omega = self._frequencies(kind, x.device, cache)  # (d/2,)
            ropes[kind] = rotation(omega, position_ids, x.dtype)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        config = self.config
        layers = zip(self.model.layers, config.layer_types, config.no_rope_layers, strict=True)
        for layer, kind, rotates in layers:
            rope = ropes[kind] if rotates else None
            inputs = (x, rope, masks[kind], cache)
            if recompute:
                x = checkpoint(layer, *inputs, use_reentrant=False)  # (B, T, D)
            else:
                x = layer(*inputs)  # (B, T, D)
        if cache is not None:
            cache.advance(count, document_ids)
        return self.model.norm(x)

    def _frequencies(self, kind: str, device: torch.device, cache: KVCache | None) -> Tensor:
        """Return ω of a kind of layer, (d/2,).

        A cache keeps them: copying them to a GPU would make each token wait.
        """
        cached = {} if cache is None else cache.frequencies
        if kind not in cached:
            cached[kind] = frequencies(self.config.rope_of(kind), self.config.head_dim).to(device)
        return cached[kind]

    def tie_weights(self) -> None:
        """Share the embedding's weight with the output layer if the config asks for it."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.lm_head

    def declare_untied(self) -> None:
        """State in the config that the output layer's weight differs from the embedding's."""
        self.config = replace(self.config, tie_word_embeddings=False)


def _initialise(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02²), as transformers starts an untrained model."""
    if getattr(getattr(module, "weight", None), "is_meta", False):
        return  # there is no storage to fill, and the call would make torch import sympy
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
