"""A batch of token sequences that a model has read so far, with its KV cache.

    extend: read rows of different lengths after the earlier tokens, one forward pass for all
    branch: read many continuations of every row in one forward pass, and forget them
    select: take some of the rows, in any order and number: finished answers leave, a shared prompt
            is repeated

Layout of one `extend`: the last tokens are aligned on the right, where the next token is predicted.

    tokens        .  .  A  B  C        document_ids  -1 -1  0  0  0       position_ids  0  0  n  n+1  n+2
                  D  E  F  G  H                       0  0  0  0  0                     n n+1 n+2 n+3 n+4

n is the number of tokens that a row has read before. Tokens attend to tokens only, not to padding,
at the positions that they would have alone.

Simplified: a batch is padded to its longest row, and its cache is one dense tensor a layer (no
pages).
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import unwrap_model
from minilora.models.kv_cache import KVCache

PAD = -1  # the document of padding
LOGITS = 2**24  # most logits that `branch` holds at a time: 64 MB in fp32


class Context:
    """Rows of token ids that a model reads into a KV cache.

    Models of transformers are read through `past_key_values`.

    Args:
        model: a model of minilora or transformers.

    Attributes:
        lengths: tokens of each row, without padding, (B,).
        positions: position of each key in the cache, (B, K).
        real: False at padding, (B, K).
        adapters: per-row adapters (lora/batched.py) and the adapter of each row, or None.
        window: number of tokens that layers with a sliding window see, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.device = next(model.parameters()).device
        self.native = hasattr(model, "hidden")
        self.vocabulary: int = self.model.config.vocab_size
        self.cache: Any = KVCache() if self.native else None
        self.window: int | None = getattr(self.model.config, "sliding_window", None)
        if not self.native and self.window:
            # The model's own cache would drop keys, and `real` and `branch` need all of them.
            from transformers import DynamicCache

            self.cache = DynamicCache()
        self.lengths = torch.zeros(1, dtype=torch.long)  # (B,)
        self.positions = torch.zeros(1, 0, dtype=torch.long)  # (B, K)
        self.real = torch.zeros(1, 0, dtype=torch.bool)  # (B, K)
        self.adapters: tuple[Any, list[str | None]] | None = None

    def extend(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read more tokens of every row; return the logits (B, V), fp32, after the last of them.

        Args:
            rows: new token ids of each row.
        """
        return self.logits(self._append(rows, keep=1))[:, 0]

    def extend_all(self, rows: Sequence[Sequence[int]], keep: int = 0) -> Tensor:
        """Read more tokens of every row, as `extend`; return the inputs of `logits`.

        Args:
            rows: new token ids of each row.
            keep: number of tokens of each row, the last ones, for which they are returned; 0 is
                all.

        Returns:
            (B, keep, D), right-aligned. The logits of all tokens would need much more memory.
        """
        return self._append(rows, keep)

    def _append(self, rows: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Read more tokens; return the inputs of `logits` for the last `keep` tokens (0: all)."""
        width = max(map(len, rows))
        padded = [[0] * (width - len(row)) + list(row) for row in rows]
        tokens = torch.tensor(padded)  # (B, T)
        sizes = torch.tensor([len(row) for row in rows])  # (B,)
        column = torch.arange(width) - (width - sizes[:, None])  # (B, T): 0 at the first token
        real = column >= 0  # (B, T)
        positions = (self.lengths[:, None] + column).where(real, 0)  # (B, T)
        self.lengths = self.lengths + sizes
        self.real = torch.cat([self.real.expand(len(rows), -1), real], dim=1)  # (B, K+T)
        earlier = self.positions.expand(len(rows), -1)
        self.positions = torch.cat([earlier, positions], dim=1)  # (B, K+T)
        return self._read(tokens, positions, None, keep)

    def branch_all(self, tokens: Tensor, sees: Tensor) -> Tensor:
        """Read a tree of continuations after every row, and forget it.

        Args:
            tokens: token of each of the tree's N nodes, (B or 1, N).
            sees: (N, N) or (B, N, N), bool: the nodes to which a node attends: those on its path
                and itself. It attends to its row's tokens too, as far as the model's window
                reaches.

        Returns:
            The inputs of `logits`, (B, N, D).
        """
        depth = sees.sum(-1) - 1  # (N,) or (B, N)
        positions = self.lengths[:, None] + depth  # (B, N)
        rows, size = positions.shape
        mask = self._tree_mask(sees, positions)
        read = self._read(tokens.expand(rows, -1), positions, mask)  # (B, N, D or V)
        if self.native:
            self.cache.truncate(self.real.shape[1])
            return read
        if not self.can_forget:
            raise ValueError(
                f"{type(self.model).__name__} has recurrent layers, whose state cannot forget "
                "tokens, so labels cannot be read after one prompt. Leave the labels out."
            )
        self.cache.crop(-size)
        return read

    @property
    def can_forget(self) -> bool:
        """True if `branch` can forget its tokens; known after the first read.

        A recurrent state (of linear attention or a convolution) cannot.
        """
        if self.native:
            return True
        recurrent = [layer for layer in self.cache.layers if hasattr(layer, "conv_states")]
        return not recurrent

    def branch(self, tokens: Tensor, sees: Tensor, nodes: Tensor, nexts: Tensor) -> Tensor:
        """Read a tree of continuations after every row, and return the likelihood of its edges.

        Args:
            tokens: as in `branch_all`.
            sees: as in `branch_all`.
            nodes: node before each of E edges, (E,) or (B, E).
            nexts: token after each edge, (B or 1, E).

        Returns:
            log p(nexts[e] | row, path to nodes[e]), (B, E).
        """
        read = self.branch_all(tokens, sees)  # (B, N, D or V)
        rows, size = read.shape[:2]
        nodes = nodes.expand(rows, -1).to(self.device)  # (B, E)
        nexts = nexts.expand(rows, -1).to(self.device)  # (B, E)
        chunk = max(1, LOGITS // (size * self.vocabulary))
        parts = zip(read.split(chunk), nodes.split(chunk), nexts.split(chunk), strict=True)
        log_p = []
        for part, node, token in parts:
            logits = self.logits(part)  # (b, N, V)
            row = torch.arange(len(part), device=self.device)[:, None]  # (b, 1)
            totals = logits.logsumexp(-1)  # (b, N)
            log_p.append(logits[row, node, token] - totals.gather(1, node))  # (b, E)
        return torch.cat(log_p)

    def _tree_mask(self, sees: Tensor, positions: Tensor) -> Any:
        """Return the mask (B, 1, N, K+N) of a tree, or one for each kind of layer."""
        rows = len(positions)
        size = sees.shape[-1]
        earlier = self.real[:, None].expand(-1, size, -1)  # (B, N, K)
        mask = torch.cat([earlier, sees.expand(rows, -1, -1)], dim=2)  # (B, N, K+N)
        if not self.window:
            return mask[:, None]
        keys = torch.cat([self.positions, positions], dim=1)  # (B, K+N)
        near = mask & (positions[:, :, None] - keys[:, None] < self.window)  # (B, N, K+N)
        kinds = set(getattr(self.model.config, "layer_types", None) or ())
        if len(kinds) > 1:  # only some layers have a window
            return {"full_attention": mask[:, None], "sliding_attention": near[:, None]}
        return near[:, None]

    def _read(self, tokens: Tensor, positions: Tensor, mask: Any, keep: int = 0) -> Tensor:
        """Run one forward pass; return the input of `logits` for its last `keep` columns (0: all).

        `mask` is bool (B, 1, T, K+T), or one for each kind of layer; None: every token up to
        itself.
        """
        tokens = tokens.to(self.device)
        positions = positions.to(self.device)
        if self.adapters is not None:
            self.adapters[0].choose(self.adapters[1])
        if self.native:
            return self._read_native(tokens, positions, mask, keep)
        return self._read_transformers(tokens, positions, mask, keep)

    def _read_native(self, tokens: Tensor, positions: Tensor, mask: Any, keep: int) -> Tensor:
        documents = None  # plain causal attention, the fast path, if there is no padding
        if mask is None and not self.real.all():
            real = self.real[:, -tokens.shape[1] :]  # (B, T)
            documents = torch.where(real, 0, PAD).to(self.device)  # (B, T)
        if mask is not None:
            mask = _each(mask, lambda one: one.to(self.device))
        hidden = self.model.hidden(tokens, positions, documents, self.cache, mask)  # (B, T, D)
        # A strided tensor would make the head copy its weight for each row, even for a single row
        # that counts as contiguous.
        return hidden[:, -keep:].clone(memory_format=torch.contiguous_format)

    def _read_transformers(self, tokens: Tensor, positions: Tensor, mask: Any, keep: int) -> Tensor:
        if mask is None:
            mask = self.real.long().to(self.device)  # (B, K+T)
        else:  # the form that every attention of transformers adds to its scores
            embedding = self.model.get_input_embeddings()
            zero = getattr(embedding, "base_layer", embedding).weight.new_zeros(())
            least = torch.finfo(zero.dtype).min
            mask = _each(mask, lambda one: zero.masked_fill(~one.to(self.device), least))
        options = {}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = keep
        out = self.model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )
        if not options:
            check_positions(self.model, out.logits, tokens)
        self.cache = out.past_key_values
        return out.logits[:, -keep:]  # (B, T, V)

    def logits(self, read: Tensor) -> Tensor:
        """Return logits in fp32.

        Args:
            read: a result of `extend_all`, or a part of its rows and tokens, (…, D).
        """
        if self.native:
            read = self.model.get_output_embeddings()(read)
        return read.float()

    def select(self, rows: Sequence[int]) -> "Context":
        """Return a new context of some rows; this one stays usable.

        Args:
            rows: row numbers; a row may occur several times.
        """
        index = torch.tensor(rows, dtype=torch.long)
        chosen = copy.copy(self)
        chosen.lengths = self.lengths[index]
        chosen.positions = self.positions[index]
        chosen.real = self.real[index]
        if self.adapters is not None:
            names = self.adapters[1]
            chosen.adapters = self.adapters[0], [names[row] for row in rows]
        if self.native:
            chosen.cache = self.cache.select(index.to(self.device))
        elif self.cache is not None:
            chosen.cache = copy.deepcopy(self.cache)
            chosen.cache.reorder_cache(index.to(self.device))
        return chosen


def check_positions(model: nn.Module, logits: Tensor, tokens: Tensor) -> None:
    """Raise ValueError for a model that returns logits at more positions than it has tokens.

    Args:
        model: a model of transformers.
        logits: its logits, (B, T, V).
        tokens: its tokens, (B, T).

    Raises:
        ValueError: the numbers differ, as with PEFT's prompt tuning.
    """
    if logits.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"{type(model).__name__} returns logits at {logits.shape[1]} positions for "
            f"{tokens.shape[1]} tokens, so labels would meet the wrong ones. Use a model without "
            "additional tokens before the text."
        )


def _each(mask: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to a mask, or to the mask of each kind of layer."""
    if isinstance(mask, dict):
        return {kind: change(one) for kind, one in mask.items()}
    return change(mask)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Disable gradients and put every module into eval mode; restore the modes afterwards.

    This is not `torch.inference_mode`: a table that a model makes there and keeps could not be
    trained through afterwards.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    model = unwrap_model(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def shared_prefix(model: nn.Module, rows: Sequence[list[int]]) -> tuple[Context, int]:
    """Read the tokens with which all rows begin (a system prompt) once.

    At least the last token of each row is left over, because its logits predict the next token.

    Nothing is shared in two cases, so that padding stays on the left of a row's first token: a
    sliding window counts columns, padding included, and a recurrent state reads the padding.

    Args:
        model: the model.
        rows: token ids of each row.

    Returns:
        The context of the shared tokens, and their number.
    """
    context = Context(model)
    size = 0
    if len(rows) > 1 and not context.window:
        size = _common_length(min(rows), max(rows), min(map(len, rows)) - 1)
    if size:
        context.extend([rows[0][:size]])
        if not context.can_forget:
            return Context(model), 0
    return context, size


def _common_length(least: list[int], greatest: list[int], limit: int) -> int:
    """Return the length of the common beginning of two rows, at most `limit`.

    The least and the greatest of all rows share a beginning only if all rows share it.
    """
    for i in range(limit):
        if least[i] != greatest[i]:
            return i
    return limit
