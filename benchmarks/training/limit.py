"""The necessary parts of a training step, timed separately: the limit in peers.py.

    matmuls       each linear layer forward and for dx; the head in chunks; LoRA's six small
                  products
    attention     forward and backward, the faster of this library's and PyTorch's
    cross-entropy one softmax over the logits in chunks, which is also their gradient
    elementwise   the reads and writes of norms, rotations, SwiGLU and residual sums, at the speed
                  of copying

All results go to kept buffers, so there are no page faults. Dequantisation, the optimiser and
Python are left out. Only a few of the equal layers run, and their time is scaled to all.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minilora.models.config import DecoderConfig
from minilora_kernels.ops.attention import attention

CHUNK = 256  # rows of logits at a time
REPEATS = 6  # layers that run, at most


def elementwise_values(config: DecoderConfig) -> int:
    """Return the values read and written for a token and layer, forward and backward."""
    width, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    norms = 2 * (2 + 3) * width  # forward x -> y; backward x, dy -> dx
    heads = config.num_attention_heads + config.num_key_value_heads
    rotations = 2 * 2 * heads * d  # q and k, read and written, forward and backward
    swiglu = (3 + 5) * inner  # gate, up -> h; gate, up, dh -> dgate, dup
    residuals = 2 * (3 + 3) * width  # x, y -> x + y; and the sum of their gradients
    return norms + rotations + swiglu + residuals


class Limit:
    """The parts for `batch` rows of `length` tokens, rank `r`, in `dtype`.

    `seconds()` runs and times each part.
    """

    def __init__(
        self, config: DecoderConfig, batch: int, length: int, dtype: torch.dtype, r: int = 16
    ) -> None:
        self.config = config
        self.layers = config.num_hidden_layers
        self.dtype = dtype
        self.rows = batch * length
        width = config.hidden_size
        inner = config.intermediate_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.shapes = [(queries, width), (keys, width), (keys, width), (width, queries)]
        self.shapes += [(inner, width), (inner, width), (width, inner)]  # (out, in) of a layer
        self.buffers = {size: self._new(self.rows, size) for shape in self.shapes for size in shape}
        self.outputs = {size: self._new(self.rows, size) for size in self.buffers}
        self.weights = {shape: self._new(*shape) for shape in self.shapes}
        self.factors = {
            shape: (self._new(r, shape[1]), self._new(shape[0], r)) for shape in self.shapes
        }
        self.small = [self._new(self.rows, r) for _ in range(2)]
        self.head = self._new(config.vocab_size, width)
        chunk = min(CHUNK, self.rows)
        self.logits = self._new(chunk, config.vocab_size)
        self.errors = self._new(chunk, config.vocab_size)
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.qkv = [self._new(batch, n, length, config.head_dim).requires_grad_() for n in heads]

    def _new(self, *shape: int) -> Tensor:
        return torch.randn(shape).mul_(0.05).to(self.dtype)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part in a step."""
        grouped = self.config.num_attention_heads != self.config.num_key_value_heads
        sdpa = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=grouped)
        forms: dict[str, Callable[..., Tensor]] = {"minilora": attention, "sdpa": sdpa}
        attended = {
            f"attention, {name}": self._time(self._attention, form) for name, form in forms.items()
        }
        found = {
            "linears": self._time(self._linears),
            "lora": self._time(self._lora),
            "head": self._time(self._head, times=1),
            "cross-entropy": self._time(self._softmax, times=1),
            "attention": min(attended.values()),
            "elementwise": self._time(self._copies),
        }
        return {"seconds": sum(found.values())} | found | attended

    def _time(self, part: Callable[..., None], *given: Any, times: int = 0) -> float:
        """Return the seconds of a part in all layers; with times=1 those of one run."""
        repeats = times or min(REPEATS, self.layers)
        begun = time.perf_counter()
        for _ in range(repeats):
            part(*given)
        return (time.perf_counter() - begun) * (1 if times else self.layers / repeats)

    def _linears(self) -> None:
        for out, size in self.shapes:
            W = self.weights[out, size]
            torch.mm(self.buffers[size], W.T, out=self.outputs[out])  # y = x Wᵀ
            torch.mm(self.buffers[out], W, out=self.outputs[size])  # dx = dy W

    def _lora(self) -> None:
        z, dz = self.small  # (N, r)
        for out, size in self.shapes:
            A, B = self.factors[out, size]
            torch.mm(self.buffers[size], A.T, out=z)
            torch.addmm(self.outputs[out], z, B.T, out=self.outputs[out])
            torch.mm(self.buffers[out], B, out=dz)
            torch.mm(self.buffers[out].T, z)  # dB (out, r)
            torch.mm(dz.T, self.buffers[size])  # dA (r, in)
            torch.addmm(self.outputs[size], dz, A, out=self.outputs[size])

    def _head(self) -> None:
        hidden = self.buffers[self.config.hidden_size]
        gradient = self.outputs[self.config.hidden_size]
        for start in range(0, self.rows, CHUNK):
            rows, logits = hidden[start : start + CHUNK], self.logits[: self.rows - start]
            torch.mm(rows, self.head.T, out=logits)
            torch.mm(logits, self.head, out=gradient[start : start + CHUNK])

    def _softmax(self) -> None:
        for start in range(0, self.rows, CHUNK):
            torch.softmax(
                self.logits[: self.rows - start], -1, out=self.errors[: self.rows - start]
            )

    def _attention(self, form: Callable[..., Tensor]) -> None:
        out = form(*self.qkv)
        torch.autograd.grad(out, self.qkv, out.detach())

    def _copies(self) -> None:
        wide = self.config.intermediate_size
        for _ in range(elementwise_values(self.config) // (2 * wide)):  # a copy reads and writes
            self.outputs[wide].copy_(self.buffers[wide])
