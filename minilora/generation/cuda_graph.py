"""One token's step as a CUDA graph: one call starts all of its kernels, where Python would start each by itself.

    1st step    runs as ever: kernels are compiled, libraries take their workspace
    2nd step    is captured: what the GPU is told is written down, with every address, size and number in it
    from then   replayed

So from step to step nothing may change but what lies in tensors: no address, no shape, no number that Python knows.
Keys go into a cache of fixed capacity, at the column `at` that the GPU counts; who is looked at is a mask (B, S):

    columns   0 1 2 3 4 5 6 7      at   6: where the next key goes
    real      . . A B C D . .      padding, and what is still empty, is not looked at; where a layer has a window,
              E F G H I J . .      what is as far back as it is not either

Finished rows stay, on token 0, until half are gone: then the others move to a step of half the rows. A cache that is
full moves to a step of twice the columns, as KVCache grows. Steps serve one batch after another. Tokens are picked
outside, in generate.py. Simplified: attention goes over all columns, so that a full step costs what an empty one does.
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

ROWS, TOKENS = 16, 16  # "auto": at most so many rows, at least so many new tokens; estimates, no GPU has been asked yet
LEAST, UNIT = 256, 64  # columns of a step at least, and of which a multiple

Capture = Callable[[Callable[[], Tensor], torch.device], Callable[[], Tensor]]


def graphs(model: nn.Module, wanted: bool | str, rows: int, new_tokens: int) -> Callable[[Context], Any]:
    """What a batch's context is read on through: `Graphs` if wanted, or "auto" and it should pay; else itself.

    "auto" needs at most ROWS rows, TOKENS new tokens, no `obstacle`, and no module but torch's and minilora's, whose
    code is known to run without the host. ValueError if it is True and there is an obstacle.
    """
    if why := obstacle(model):
        if wanted is True:
            raise ValueError(f"cuda_graph=True: {why}. Leave it at 'auto', or set it to False.")
        return _itself
    strange = any(type(m).__module__.partition(".")[0] not in ("torch", "minilora") for m in model.modules())
    if wanted == "auto" and (rows > ROWS or new_tokens < TOKENS or strange):
        return _itself
    return Graphs(model, new_tokens)


def _itself(context: Context) -> Context:
    return context


def obstacle(model: nn.Module) -> str | None:
    """Why steps of this model cannot be captured; None if they can."""
    modules = dict(model.named_modules())
    devices = {str(tensor.device): tensor.device for tensor in (*model.parameters(), *model.buffers())}
    device = next(iter(devices.values()))
    if not hasattr(model, "hidden"):
        return f"{type(model).__name__} is not minilora's decoder, and keeps keys in a cache of its own"
    if any(hasattr(m, "unshard") for m in modules.values()):
        return "the model is in shards (FSDP), which move before each layer"
    if len(devices) > 1:
        return f"parts of the model lie on {' and '.join(devices)}, and copies between them wait for the host"
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, and the model is on {device}: model.cuda(), where there is one"
    if torch.is_autocast_enabled("cuda"):
        return (
            "autocast is on, whose copies of weights a graph would outlive: load the model in the dtype to compute in"
        )
    if any(type(m) is NF4Linear for m in modules.values()) and path_for(device) != "triton":
        return f"4-bit layers run on the path {path_for(device)!r}, which copies tables from the host: install triton"
    for name, m in modules.items():
        if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m):
            return f"{name or 'the model'} has a hook or a forward of its own, which a replay would leave out"
        if m._compiled_call_impl is not None:
            return f"{name or 'the model'} is compiled, and torch.compile has CUDA graphs of its own"
    return None


def capture(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Writes down what `step` tells the GPU; the result replays that. Its tensor is written over by each replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):  # a stream of its own: torch's default for it is one of the first GPU
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            out = step()

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay


class StaticCache(KVCache):
    """Of `rows` and `capacity`, for good; `at` (1,) is the column of the next key. For the layers that `like` has."""

    def __init__(self, like: KVCache, rows: int, capacity: int) -> None:
        super().__init__()
        for mine, theirs in ((self.keys, like.keys), (self.values, like.values)):
            # zeros: a column that is not looked at has the weight 0, and 0 · NaN would be NaN
            mine += [t.new_zeros(rows, t.shape[1], capacity, t.shape[3]) for t in theirs]
        self.at = torch.zeros(1, dtype=torch.long, device=self.keys[0].device)
        self.frequencies = like.frequencies

    def load(self, cache: KVCache) -> None:
        """Takes the place of what was here before."""
        self.length = cache.length
        for mine, theirs in zip([*self.keys, *self.values], [*cache.keys, *cache.values], strict=True):
            mine[:, :, : self.length].copy_(theirs[:, :, : self.length])
        self.at.fill_(self.length)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one layer's key and value (B, kv_heads, 1, d) and returns all columns (B, kv_heads, S, d)."""
        keys, values = self.keys[layer], self.values[layer]
        return keys.index_copy_(2, self.at, key), values.index_copy_(2, self.at, value)

    def extend_documents(self, document_ids: Tensor | None, rows: int, count: int) -> None:
        """The step's mask says who sees whom."""

    def advance(self, count: int, document_ids: Tensor | None) -> None:
        """The step counts, as a replay calls nothing here."""


class Step:
    """One token more for each of `rows` rows."""

    def __init__(self, model: Any, like: KVCache, rows: int, capacity: int, capture: Capture) -> None:
        self.model, self.rows, self.capacity, self.capture = model, rows, capacity, capture
        self.cache = StaticCache(like, rows, capacity)
        device = self.cache.at.device
        self.tokens, self.positions = torch.zeros(2, rows, 1, dtype=torch.long, device=device)  # (B, 1) each
        self.real = torch.zeros(rows, capacity, dtype=torch.bool, device=device)  # (B, S)
        self.columns = torch.arange(capacity, device=device)  # (S,)
        self.warm = False
        self.replay: Callable[[], Tensor] | None = None

    def load(self, cache: KVCache, real: Tensor, positions: Tensor) -> None:
        """Goes on from `cache` of K columns, of which `real` (B, K) are no padding, with tokens at `positions` (B,)."""
        self.cache.load(cache)
        self.positions.copy_(positions[:, None])
        self.real.zero_()[:, : cache.length].copy_(real)

    def rows_of(self, places: Sequence[int]) -> tuple[KVCache, Tensor, Tensor]:
        """What `load` takes, of some of the rows."""
        index = torch.tensor(places, device=self.tokens.device)
        return self.cache.select(index), self.real[index, : self.cache.length], self.positions[index, 0]

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """The logits (B, V), fp32, that follow one token a row. The next call may write over them."""
        self.tokens.copy_(torch.tensor(tokens)[:, None])
        self.cache.length += 1
        if self.warm and self.replay is None:
            self.replay = self.capture(self.read, self.tokens.device)
        self.warm = True
        return self.read() if self.replay is None else self.replay()

    def read(self) -> Tensor:
        """The work itself, on tensors that stay where they are."""
        at, config = self.cache.at, self.model.config
        self.real.index_fill_(1, at, True)  # a token sees itself
        masks = {}
        for kind in dict.fromkeys(config.layer_types):
            sees = self.real & (self.columns > at - config.sliding_window) if kind == SLIDING else self.real
            masks[kind] = sees[:, None, None]  # (B, 1, 1, S)
        hidden = self.model.hidden(self.tokens, self.positions, None, self.cache, masks)  # (B, 1, D)
        logits = self.model.get_output_embeddings()(hidden)[:, 0].float()  # (B, V)
        at += 1
        self.positions += 1
        return logits


class Graphs:
    """The steps of a model, one for each number of rows; called with a batch's context it gives its `Decode`."""

    def __init__(self, model: nn.Module, new_tokens: int, capture: Capture = capture) -> None:
        self.model, self.new_tokens, self.capture = model, new_tokens, capture
        self.steps: dict[int, Step] = {}

    def __call__(self, context: Context) -> "Decode":
        most = context.cache.length + self.new_tokens
        step = self.step(context.cache, context.real, context.lengths, most)
        return Decode(self, step, range(step.rows), most)

    def step(self, cache: KVCache, real: Tensor, positions: Tensor, most: int) -> Step:
        """A step that goes on from there (`Step.load`), of a capacity for twice the columns, or for `most` if less."""
        need, rows = min(most, max(LEAST, 2 * cache.length)), len(real)
        step = self.steps.get(rows)
        if step is None or not need <= step.capacity <= 2 * max(LEAST, need):
            step = self.steps[rows] = Step(self.model, cache, rows, -(-need // UNIT) * UNIT, self.capture)
        step.load(cache, real, positions)
        return step


class Decode:
    """A context that is read on one token at a time: row b is row places[b] of a step. See `Context` for the methods,
    but what `select` gives takes the place of what it was called on."""

    def __init__(self, graphs: Graphs, step: Step, places: Sequence[int], most: int) -> None:
        self.graphs, self.step, self.places, self.most = graphs, step, list(places), most
        every = self.places == list(range(step.rows))
        self.index = None if every else torch.tensor(self.places, device=step.tokens.device)

    def extend(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read the one token of `rows[b]` on top of row b; the logits (B, V), fp32, that follow it."""
        if self.step.cache.length == self.step.capacity:
            self.step = self.graphs.step(*self.step.rows_of(range(self.step.rows)), self.most)
        tokens = [0] * self.step.rows
        for place, (token,) in zip(self.places, rows, strict=True):
            tokens[place] = token
        logits = self.step(tokens)
        return logits if self.index is None else logits[self.index]

    def select(self, rows: Sequence[int]) -> "Decode":
        """Some of the rows; in a step of half as many, or a quarter …, if they fit."""
        places, size = [self.places[row] for row in rows], self.step.rows
        while size // 2 >= len(places):
            size //= 2
        if size == self.step.rows:
            return Decode(self.graphs, self.step, places, self.most)
        filled = [*places, *places[:1] * (size - len(places))]
        step = self.graphs.step(*self.step.rows_of(filled), self.most)
        return Decode(self.graphs, step, range(len(places)), self.most)
