"""A batch of token sequences that a model has read so far, and the keys and values it keeps of them.

    extend: rows of different lengths are read on top of what is there, one forward for all
    branch: many continuations of every row are read side by side in one forward, and forgotten again
    select: some of the rows, in any order and number: finished answers leave, a shared prompt is repeated

Layout of one `extend` (the last real tokens stand under each other, where the next one is predicted):

    tokens        .  .  A  B  C        document_ids  -1 -1  0  0  0       position_ids  0  0  n  n+1  n+2
                  D  E  F  G  H                       0  0  0  0  0                     n n+1 n+2 n+3 n+4

with n the tokens a row has read before. Real tokens see real tokens only, at the positions they would have alone.
Simplified: a batch is padded to its longest row and its cache is one dense tensor a layer (no pages).
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minilora.models.kv_cache import KVCache

PAD = -1  # the document of padding
LOGITS = 2**24  # held at a time by `branch`: 64 MB in fp32


class Context:
    """`model` reads rows of token ids into a KV cache; models of transformers are read through `past_key_values`."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.device = next(model.parameters()).device
        self.native = hasattr(model, "hidden")
        self.vocabulary: int = self.model.config.vocab_size
        self.cache: Any = KVCache() if self.native else None
        if not self.native and getattr(self.model.config, "sliding_window", None):
            from transformers import DynamicCache  # its own would drop keys, which `real` and `branch` count on

            self.cache = DynamicCache()
        self.lengths = torch.zeros(1, dtype=torch.long)  # (B,) tokens read, padding aside
        self.positions = torch.zeros(1, 0, dtype=torch.long)  # (B, K) of each key in the cache
        self.real = torch.zeros(1, 0, dtype=torch.bool)  # (B, K) False at padding
        self.adapters: tuple[Any, list[str | None]] | None = None  # who gives each row its own, and each row's

    def extend(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read `rows[b]` on top of row b; the logits (B, V), fp32, that follow its last token."""
        width = max(map(len, rows))
        tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])  # (B, T)
        sizes = torch.tensor([len(row) for row in rows])  # (B,)
        column = torch.arange(width) - (width - sizes[:, None])  # (B, T) 0 at a row's first token
        real = column >= 0  # (B, T)
        positions = (self.lengths[:, None] + column).where(real, 0)  # (B, T)
        self.lengths = self.lengths + sizes
        self.real = torch.cat([self.real.expand(len(rows), -1), real], dim=1)  # (B, K+T)
        self.positions = torch.cat([self.positions.expand(len(rows), -1), positions], dim=1)  # (B, K+T)
        return self._logits(self._read(tokens, positions, None, keep=1))[:, 0]

    def branch(self, tokens: Tensor, sees: Tensor, nodes: Tensor, nexts: Tensor) -> Tensor:
        """Read a tree of continuations on top of every row, and forget it: log p (B, E) of nexts[e] after nodes[e].

        tokens (B or 1, N): of the tree's nodes. sees (N, N), bool: the nodes that a node looks at, those on its path
        and itself; it looks at its row's real tokens too, as far as the model's window reaches.
        nodes (E,): numbers of nodes. nexts (B or 1, E): tokens.
        """
        depth = sees.sum(-1) - 1  # (N,)
        positions = self.lengths[:, None] + depth  # (B, N)
        rows, size, past = len(positions), len(sees), self.real.shape[1]
        mask = torch.cat([self.real[:, None].expand(-1, size, -1), sees.expand(rows, -1, -1)], dim=2)  # (B, N, K+N)
        if window := getattr(self.model.config, "sliding_window", None):
            keys = torch.cat([self.positions, positions], dim=1)  # (B, K+N)
            near = mask & (positions[:, :, None] - keys[:, None] < window)
            mixed = len({*(getattr(self.model.config, "layer_types", None) or ())}) > 1  # a window in some layers only
            mask = {"full_attention": mask[:, None], "sliding_attention": near[:, None]} if mixed else near
        mask = mask if isinstance(mask, dict) else mask[:, None]
        read = self._read(tokens.expand(rows, -1), positions, mask)  # (B, N, D or V)
        if self.native:
            self.cache.truncate(past)
        else:
            self.cache.crop(-size)
        nodes, nexts = nodes.to(self.device), nexts.expand(rows, -1).to(self.device)  # (E,), (B, E)
        chunk = max(1, LOGITS // (size * self.vocabulary))
        found = []
        for some, wanted in zip(read.split(chunk), nexts.split(chunk), strict=True):
            logits = self._logits(some)  # (b, N, V)
            row = torch.arange(len(some), device=self.device)[:, None]
            found.append(logits[row, nodes, wanted] - logits.logsumexp(-1)[:, nodes])  # (b, E)
        return torch.cat(found)

    def _read(self, tokens: Tensor, positions: Tensor, mask: Any, keep: int = 0) -> Tensor:
        """One forward; of its last `keep` columns (0: all) what `_logits` makes logits of.

        mask bool (B, 1, T, K+T), or one for each kind of layer; None: every real token up to the own one.
        """
        tokens, positions = tokens.to(self.device), positions.to(self.device)
        if self.adapters is not None:
            self.adapters[0].choose(self.adapters[1])
        if self.native:
            documents = None  # plain causal, the fast path, as long as there is no padding
            if mask is None and not self.real.all():
                documents = torch.where(self.real, 0, PAD)[:, -tokens.shape[1] :].to(self.device)  # (B, T)
            mask = None if mask is None else _each(mask, lambda one: one.to(self.device))
            hidden = self.model.hidden(tokens, positions, documents, self.cache, mask)  # (B, T, D)
            # strided, it would cost a copy of the frozen head a row, even a single row that counts as contiguous
            return hidden[:, -keep:].clone(memory_format=torch.contiguous_format)
        if mask is None:
            mask = self.real.long().to(self.device)  # (B, K+T)
        else:  # what every attention of transformers adds to its scores
            zero = self.model.get_input_embeddings().weight.new_zeros(())
            least = torch.finfo(zero.dtype).min
            mask = _each(mask, lambda one: zero.masked_fill(~one.to(self.device), least))
        slim = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        out = self.model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **({"logits_to_keep": keep} if slim else {}),
        )
        self.cache = out.past_key_values
        return out.logits[:, -keep:]  # (B, T, V)

    def _logits(self, read: Tensor) -> Tensor:
        return (self.model.get_output_embeddings()(read) if self.native else read).float()

    def select(self, rows: Sequence[int]) -> "Context":
        """A new context of the given rows; this one can be read on as if nothing had happened."""
        index = torch.tensor(rows, dtype=torch.long)
        chosen = copy.copy(self)
        chosen.lengths, chosen.positions, chosen.real = self.lengths[index], self.positions[index], self.real[index]
        if self.adapters is not None:
            chosen.adapters = self.adapters[0], [self.adapters[1][row] for row in rows]
        if self.native:
            chosen.cache = self.cache.select(index.to(self.device))
        elif self.cache is not None:
            chosen.cache = copy.deepcopy(self.cache)
            chosen.cache.batch_select_indices(index.to(self.device))
        return chosen


def _each(mask: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return {kind: change(one) for kind, one in mask.items()} if isinstance(mask, dict) else change(mask)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, every module in eval mode; afterwards each is back in the mode it had.

    Not `torch.inference_mode`: a table that a model makes there and keeps could not be trained through afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def shared_prefix(model: nn.Module, rows: Sequence[list[int]]) -> tuple[Context, int]:
    """The tokens that all `rows` begin with (a system prompt), read once: their context and their number.

    At least the last token of each row is left over, because its logits are what comes next. A sliding window counts
    columns, padding included, so with one nothing is shared and padding stays in front.
    """
    context = Context(model)
    size = 0
    if len(rows) > 1 and not getattr(context.model.config, "sliding_window", None):
        least, greatest = min(rows), max(rows)  # what these two share in front, all share
        limit = min(map(len, rows)) - 1
        size = next((i for i in range(limit) if least[i] != greatest[i]), limit)
    if size:
        context.extend([rows[0][:size]])
    return context, size
