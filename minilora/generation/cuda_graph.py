"""A token's step as one CUDA graph: one call starts all of its kernels.

    1st step    runs normally: kernels are compiled, libraries allocate their workspace
    2nd step    is captured: CUDA records every kernel with its addresses, sizes and numbers
    later       is replayed

So between steps only the content of tensors may change: no address, no shape, no Python number.
Keys go into a cache of fixed capacity, at the column `at`, a counter on the GPU. A mask (B, S)
selects the columns that attention reads:

    columns   0 1 2 3 4 5 6 7      at = 6: the column of the next key
    real      . . A B C D . .      padding and empty columns are masked; in a layer with a window,
              E F G H I J . .      columns that are too far back are masked too

Finished rows stay, with token 0, until half of the rows are finished: then the others move to a
step of half the rows. A full cache moves to a step of twice the columns. Steps serve one batch
after another. Tokens are chosen outside the graph, in generate.py.

Simplified: attention reads all columns, so that a nearly empty step costs as much as a full one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.models.config import SLIDING
from minilora.models.kv_cache import KVCache
from minilora.models.padded_batch import Context
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels.backend import path_for

# Limits of cuda_graph="auto". They are estimates: no GPU has been measured.
ROWS = 16  # most rows
TOKENS = 16  # fewest new tokens

LEAST = 256  # fewest columns of a step
UNIT = 64  # the columns of a step are a multiple of this

Capture = Callable[[Callable[[], Tensor], torch.device], Callable[[], Tensor]]


def graphs(
    model: nn.Module, wanted: bool | str, rows: int, new_tokens: int
) -> Callable[[Context], Any]:
    """Return a function that prepares a batch's context: `Graphs`, or the identity.

    "auto" chooses `Graphs` for at most ROWS rows and at least TOKENS new tokens, without an
    `obstacle`, and only for modules of torch and minilora, whose code is known to run without the
    host.

    Args:
        model: the model.
        wanted: True, False or "auto".
        rows: rows of a batch.
        new_tokens: longest answer in tokens.

    Raises:
        ValueError: `wanted` is True and there is an obstacle.
    """
    reason = obstacle(model)
    if reason:
        if wanted is True:
            raise ValueError(f"cuda_graph=True: {reason}. Leave it at 'auto', or set it to False.")
        return _identity
    packages = {type(m).__module__.partition(".")[0] for m in model.modules()}
    unknown = packages - {"torch", "minilora"}
    if wanted == "auto" and (rows > ROWS or new_tokens < TOKENS or unknown):
        return _identity
    return Graphs(model, new_tokens)


def _identity(context: Context) -> Context:
    return context


def obstacle(model: nn.Module) -> str | None:
    """Return the reason why steps of a model cannot be captured, or None.

    Args:
        model: the model.
    """
    modules = dict(model.named_modules())
    tensors = (*model.parameters(), *model.buffers())
    devices = {str(tensor.device): tensor.device for tensor in tensors}
    device = next(iter(devices.values()))
    if not hasattr(model, "hidden"):
        return f"{type(model).__name__} is not minilora's decoder, and has its own cache of keys"
    if any(hasattr(m, "unshard") for m in modules.values()):
        return "the model is sharded (FSDP), and its weights move before each layer"
    if len(devices) > 1:
        return (
            f"parts of the model are on {' and '.join(devices)}, and copies between them wait for "
            "the host"
        )
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, and the model is on {device}: model.cuda() moves it"
    if torch.is_autocast_enabled("cuda"):
        return (
            "autocast is on, and a graph would outlive its copies of weights: load the model in "
            "the dtype of the computation"
        )
    has_nf4 = any(type(module) is NF4Linear for module in modules.values())
    if has_nf4 and path_for(device) != "triton":
        return (
            f"4-bit layers run on the path {path_for(device)!r}, which copies tables from the "
            "host: install triton"
        )
    for name, module in modules.items():
        label = name or "the model"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{label} has a hook or a replaced forward, which a replay would leave out"
        if module._compiled_call_impl is not None:
            return f"{label} is compiled, and torch.compile has CUDA graphs already"
    return None


def capture(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Record the GPU work of a step.

    Args:
        step: a function that computes on tensors that stay at their addresses.
        device: the GPU.

    Returns:
        A function that replays the work; each replay overwrites the tensor that it returns.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        # torch's default capture stream is one of the first GPU, so a stream is made here.
        stream = torch.cuda.Stream(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = step()

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay


class StaticCache(KVCache):
    """A KV cache of fixed size.

    Args:
        like: a cache with the layers, heads and dtypes to copy.
        rows: number of rows.
        capacity: number of columns.

    Attributes:
        at: column of the next key, (1,), on the device.
    """

    def __init__(self, like: KVCache, rows: int, capacity: int) -> None:
        super().__init__()
        # Zeros: a masked column has the weight 0, and 0 · NaN would be NaN.
        for key in like.keys:
            self.keys.append(key.new_zeros(rows, key.shape[1], capacity, key.shape[3]))
        for value in like.values:
            self.values.append(value.new_zeros(rows, value.shape[1], capacity, value.shape[3]))
        self.at = torch.zeros(1, dtype=torch.long, device=self.keys[0].device)
        self.frequencies = like.frequencies

    def load(self, cache: KVCache) -> None:
        """Replace the content by that of another cache.

        Args:
            cache: the other cache.
        """
        self.length = cache.length
        targets = [*self.keys, *self.values]
        sources = [*cache.keys, *cache.values]
        for target, source in zip(targets, sources, strict=True):
            target[:, :, : self.length].copy_(source[:, :, : self.length])
        self.at.fill_(self.length)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's key and value; return all columns.

        Args:
            layer: number of the layer.
            key: (B, kv_heads, 1, d).
            value: (B, kv_heads, 1, d).

        Returns:
            All keys and all values, (B, kv_heads, S, d) each.
        """
        keys = self.keys[layer]
        values = self.values[layer]
        return keys.index_copy_(2, self.at, key), values.index_copy_(2, self.at, value)

    def extend_documents(self, document_ids: Tensor | None, rows: int, count: int) -> None:
        """Do nothing: the step's mask separates documents.

        Args:
            document_ids: not used.
            rows: not used.
            count: not used.
        """

    def advance(self, count: int, document_ids: Tensor | None) -> None:
        """Do nothing: the step counts, because a replay calls no Python.

        Args:
            count: not used.
            document_ids: not used.
        """


class Step:
    """One more token for each row.

    Args:
        model: the model.
        like: a cache of the model.
        rows: number of rows, B.
        capacity: number of columns, S.
        capture: a function that records the step.
    """

    def __init__(
        self, model: Any, like: KVCache, rows: int, capacity: int, capture: Capture
    ) -> None:
        self.model = model
        self.rows = rows
        self.capacity = capacity
        self.capture = capture
        self.cache = StaticCache(like, rows, capacity)
        device = self.cache.at.device
        buffers = torch.zeros(2, rows, 1, dtype=torch.long, device=device)
        self.tokens, self.positions = buffers  # (B, 1) each
        self.real = torch.zeros(rows, capacity, dtype=torch.bool, device=device)  # (B, S)
        self.columns = torch.arange(capacity, device=device)  # (S,)
        self.warm = False
        self.replay: Callable[[], Tensor] | None = None

    def load(self, cache: KVCache, real: Tensor, positions: Tensor) -> None:
        """Continue from another cache.

        Args:
            cache: a cache of K columns.
            real: True where a column is not padding, (B, K).
            positions: position of the next token of each row, (B,).
        """
        self.cache.load(cache)
        self.positions.copy_(positions[:, None])
        self.real.zero_()[:, : cache.length].copy_(real)

    def rows_of(self, places: Sequence[int]) -> tuple[KVCache, Tensor, Tensor]:
        """Return the arguments of `load` for some of the rows.

        Args:
            places: row numbers.
        """
        index = torch.tensor(places, device=self.tokens.device)
        real = self.real[index, : self.cache.length]
        return self.cache.select(index), real, self.positions[index, 0]

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits (B, V), fp32, after one more token a row.

        The next call overwrites them.

        Args:
            tokens: one token a row.
        """
        self.tokens.copy_(torch.tensor(tokens)[:, None])
        self.cache.length += 1
        if self.warm and self.replay is None:
            self.replay = self.capture(self.read, self.tokens.device)
        self.warm = True
        return self.read() if self.replay is None else self.replay()

    def read(self) -> Tensor:
        """Run the step on tensors that stay at their addresses; return the logits (B, V)."""
        at = self.cache.at
        config = self.model.config
        self.real.index_fill_(1, at, True)  # a token attends to itself
        masks = {}
        for kind in dict.fromkeys(config.layer_types):
            visible = self.real  # (B, S)
            if kind == SLIDING:
                visible = self.real & (self.columns > at - config.sliding_window)
            masks[kind] = visible[:, None, None]  # (B, 1, 1, S)
        hidden = self.model.hidden(
            self.tokens, self.positions, None, self.cache, masks
        )  # (B, 1, D)
        logits = self.model.get_output_embeddings()(hidden)[:, 0].float()  # (B, V)
        at += 1
        self.positions += 1
        return logits


class Graphs:
    """The steps of a model, one for each number of rows.

    Args:
        model: the model.
        new_tokens: longest answer in tokens.
        capture: a function that records a step.
    """

    def __init__(self, model: nn.Module, new_tokens: int, capture: Capture = capture) -> None:
        self.model = model
        self.new_tokens = new_tokens
        self.capture = capture
        self.steps: dict[int, Step] = {}

    def __call__(self, context: Context) -> "Decode":
        """Return the context of a batch as one that reads single tokens by CUDA graphs.

        Args:
            context: the batch.
        """
        most = context.cache.length + self.new_tokens
        step = self.step(context.cache, context.real, context.lengths, most)
        return Decode(self, step, range(step.rows), most)

    def step(self, cache: KVCache, real: Tensor, positions: Tensor, most: int) -> Step:
        """Return a step that continues from a cache (`Step.load`).

        Its capacity is twice the cache's columns, or `most` if that is less.

        Args:
            cache: the cache.
            real: True where a column is not padding, (B, K).
            positions: position of the next token of each row, (B,).
            most: columns at the end of the longest answer.
        """
        needed = min(most, max(LEAST, 2 * cache.length))
        rows = len(real)
        step = self.steps.get(rows)
        if step is None or not needed <= step.capacity <= 2 * max(LEAST, needed):
            capacity = -(-needed // UNIT) * UNIT  # rounded up to a multiple of UNIT
            step = Step(self.model, cache, rows, capacity, self.capture)
            self.steps[rows] = step
        step.load(cache, real, positions)
        return step


class Decode:
    """A context that reads one token a row by CUDA graphs; it has the methods of `Context`.

    Unlike a Context, it must not be used after `select`: the result takes its place.

    Args:
        graphs: the steps of the model.
        step: the current step.
        places: row b of the batch is row places[b] of the step.
        most: columns at the end of the longest answer.
    """

    def __init__(self, graphs: Graphs, step: Step, places: Sequence[int], most: int) -> None:
        self.graphs = graphs
        self.step = step
        self.places = list(places)
        self.most = most
        self.index = None  # None: the batch has all rows of the step, in order
        if self.places != list(range(step.rows)):
            self.index = torch.tensor(self.places, device=step.tokens.device)

    def extend(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read one token a row; return the logits (B, V), fp32, after it.

        Args:
            rows: a list of one token for each row.
        """
        if self.step.cache.length == self.step.capacity:
            everything = self.step.rows_of(range(self.step.rows))
            self.step = self.graphs.step(*everything, self.most)
        tokens = [0] * self.step.rows
        for place, (token,) in zip(self.places, rows, strict=True):
            tokens[place] = token
        logits = self.step(tokens)
        return logits if self.index is None else logits[self.index]

    def select(self, rows: Sequence[int]) -> "Decode":
        """Return some of the rows, in a step of half as many rows, a quarter and so on if they fit.

        Args:
            rows: row numbers.
        """
        places = [self.places[row] for row in rows]
        size = self.step.rows
        while size // 2 >= len(places):
            size //= 2
        if size == self.step.rows:
            return Decode(self.graphs, self.step, places, self.most)
        filled = places + places[:1] * (size - len(places))
        step = self.graphs.step(*self.step.rows_of(filled), self.most)
        return Decode(self.graphs, step, range(len(places)), self.most)
