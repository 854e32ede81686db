"""QuantizedLinear: the protocol of a frozen linear layer whose weight is stored in few bits.

    y  = x · dequantise(Wq)ᵀ + b           QLoRA §3, eq. 5 (arXiv:2305.14314), without the LoRA term
    dx = dy · dequantise(Wq)               Wq is frozen and receives no gradient

The LoRA term is added by the LoRALayer around this layer. The weight is dense only while it is
used: forward and backward dequantise it separately. If forward kept the dense W for backward, the
16-bit weights of all layers would be in memory at once, and QLoRA exists to avoid that. Backward
calls the dequantisation under another operator name, because torch.compile would merge two equal
calls and keep W between them.

Two classes follow the protocol: NF4Linear (nf4_linear.py), and GGUFLinear (gguf_linear.py) for the
types of GGUF files. Both store uint8 parameters without gradient, which `.half()`, `.to(dtype)` and
mixed-precision sharding do not cast, and compute in the dtype of x.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora_kernels import FEW
from minilora_kernels.quantized_weight import (
    TENSORS,
    QuantizedWeight,
    dequantize_parts,
    dequantize_parts_for_backward,
    dequantize_parts_into,
)


class _Multiply(torch.autograd.Function):
    """y = x Wᵀ + b for a quantised W.

    Backward needs W alone. Kept for it are the stored bytes, which the layer has anyway. Neither
    the dense W nor x is kept: x would be needed for the gradient of W only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kind: str, *parts: Any) -> Tensor:
        count = TENSORS[kind]
        ctx.save_for_backward(*parts[:count])
        ctx.kind = kind
        ctx.numbers = parts[count:]
        W = dequantize_parts(kind, parts, x.dtype)  # (out, in)
        return F.linear(x, W, bias)  # (…, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads  # (…, out)
        parts = (*ctx.saved_tensors, *ctx.numbers)
        dx = None
        if ctx.needs_input_grad[0]:
            W = dequantize_parts_for_backward(ctx.kind, parts, dy.dtype)  # (out, in)
            dx = dy @ W  # (…, in)
        db = None
        if ctx.needs_input_grad[1]:
            db = dy.flatten(0, -2).sum(0)  # (out,)
        no_gradient = [None] * (1 + len(parts))  # for the kind and the weight's parts
        return dx, db, *no_gradient


class QuantizedLinear(nn.Module):
    """A linear layer with a frozen weight in few bits; the base class of all of them.

    A subclass stores a QuantizedWeight in parameters (`_store`) and returns it (`weight`). Loading
    a state dict is strict: another shape or format, a wrong dtype or a missing key is an error.

    Args:
        weight: The weight, (out, in).
        bias: The bias (out,), or None. It is trainable if it required a gradient before.

    Attributes:
        bias: The bias (out,), or None.
        in_features: Size of the input.
        out_features: Size of the output.
        dtype: Dtype of the dense weight.

    Raises:
        ValueError: The weight does not have two dimensions.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(
                "weight: expected two dimensions (out, in), "
                f"got the shape {tuple(weight.shape)}. Reshape it before quantising."
            )
        self.out_features, self.in_features = weight.shape
        self._store(weight)
        self.dtype = weight.dtype
        if bias is None:
            self.bias = None
        else:
            self.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)

    # ---- what a subclass defines

    @property
    def weight(self) -> Any:
        """The weight (out, in), a QuantizedWeight that views the stored bytes; not a Tensor."""
        raise NotImplementedError

    def _store(self, weight: Any) -> None:
        """Register the tensors of a weight as uint8 parameters without gradient."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return hashes of the codes and, if they are known, of the dense rows."""
        raise NotImplementedError

    def storage(self) -> dict[str, Any]:
        """Return the storage of the weight, as storage.py describes it."""
        raise NotImplementedError

    def _settings(self, weight: Any) -> dict[str, Any]:
        """Return what a loaded weight must have in common with this layer's."""
        raise NotImplementedError

    def _multiply_few(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return x Wᵀ + b for a few rows of x without a dense W; None where that is not faster."""
        return None

    def _multiplier(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """Return the product with a few tokens, or None where no compiled code fits."""
        return None

    # ---- what all of them share

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Return the dense weight (out, in).

        Args:
            dtype: Dtype of the result; None is the dtype of the dense weight, or that of `out`.
            out: Contiguous tensor that receives the result; None is a new one.

        Raises:
            ValueError: `out` does not fit.
        """
        weight = self.weight
        if out is None:
            return weight.dequantize(dtype)
        if out.shape != weight.shape or dtype not in (None, out.dtype):
            raise ValueError(
                f"out: expected shape {tuple(weight.shape)} and dtype {dtype or out.dtype}, got "
                f"{tuple(out.shape)} and {out.dtype}. Make it with torch.empty."
            )
        dequantize_parts_into(weight.kind, weight.parts(), out)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b in the dtype of x, or in autocast's dtype under autocast.

        Args:
            x: Input, (…, in).

        Returns:
            Output, (…, out).
        """
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias = None
        if self.bias is not None:
            bias = self.bias.to(x.dtype)  # (out,)
        if not torch.is_grad_enabled():
            y = self._multiply_few(x, bias)  # (…, out), or None
            if y is not None:
                return y
        weight = self.weight
        return _Multiply.apply(x, bias, weight.kind, *weight.parts())  # (…, out)

    def for_tokens(self) -> Callable[[Tensor], Tensor]:
        """Return a faster `forward` for the generation of text on a CPU.

        The returned function looks up the addresses of the layer's memory once. For a few tokens
        and a small matrix the look-up takes longer than the multiplication. The function is valid
        while the layer does not change, and works without gradients and autocast.
        """
        found: dict[torch.dtype, Any] = {}  # the product for each dtype

        def forward(x: Tensor) -> Tensor:
            multiply = found.get(x.dtype)
            if multiply is None:
                multiply = self._multiplier(x.dtype)  # None until the kernel is compiled
                found[x.dtype] = multiply
            right_size = x.shape[-1] == self.in_features
            few_tokens = 0 < x.numel() <= FEW * self.in_features
            right_dtype = x.dtype in (torch.float32, torch.bfloat16)
            if multiply is None or not (right_size and few_tokens and right_dtype and x.is_cpu):
                return QuantizedLinear.forward(self, x)  # (…, out)
            bias = None
            if self.bias is not None:
                bias = self.bias.to(x.dtype).contiguous()  # (out,)
            return multiply(x.contiguous(), bias)  # (…, out)

        return forward

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Write the keys of the weight's format."""
        state = self.weight.state_dict(f"{prefix}weight")
        if self.bias is not None:
            state[f"{prefix}bias"] = self.bias
        for key, value in state.items():
            if not keep_vars:
                value = value.detach()
            destination[key] = value

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ):
        """Read the keys of the weight's format, and report everything that does not fit."""
        state = {}
        for key, value in state_dict.items():
            if key.startswith(prefix):
                state[key.removeprefix(prefix)] = value
        bias = state.pop("bias", None)
        for key in state:
            if strict and key.split(".")[0] != "weight":
                unexpected_keys.append(prefix + key)
        if bias is None and self.bias is not None:
            missing_keys.append(f"{prefix}bias")
        if bias is not None and self.bias is None:
            unexpected_keys.append(f"{prefix}bias")
        if "weight" not in state:
            missing_keys.append(f"{prefix}weight")
            return
        try:
            weight = type(self.weight).from_state_dict(state)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        expected = self._settings(self.weight)
        loaded = self._settings(weight)
        bias_fits = bias is None or bias.shape == (self.out_features,)
        if loaded != expected or not bias_fits:
            error_msgs.append(
                f"{prefix}weight ({', '.join(expected)}): "
                f"expected {tuple(expected.values())}, got {tuple(loaded.values())}."
            )
            return
        self._load(weight, bias, local_metadata.get("assign_to_params_buffers", False))

    def _load(self, weight: Any, bias: Tensor | None, assign: bool) -> None:
        """Take over a checked weight and bias; with `assign` without copying the weight."""
        if assign:
            self._store(weight)
        else:
            self._store(copy.deepcopy(weight).to(self.weight.device))
        self.dtype = weight.dtype
        if bias is not None and self.bias is not None:
            if not assign:
                bias = bias.to(self.bias)  # dtype and device of the present bias
            data = bias.detach().clone()  # (out,)
            self.bias = nn.Parameter(data, requires_grad=self.bias.requires_grad)

    def _replicate_for_data_parallel(self):
        """Refuse nn.DataParallel."""
        raise RuntimeError(
            "nn.DataParallel copies parameters in every step. "
            "Use DistributedDataParallel (DDP) instead."
        )


class QuantizedEmbedding(nn.Module):
    """An embedding with a frozen weight in few bits; the base class of GGUFEmbedding.

    Attributes:
        num_embeddings: Number of rows V.
        embedding_dim: Size of a row D.
        dtype: Dtype of the output.
        padding_idx: None, as in an nn.Embedding without padding.
    """

    num_embeddings: int
    embedding_dim: int
    dtype: torch.dtype
    padding_idx = None

    @property
    def weight(self) -> QuantizedWeight:
        """The weight (V, D), a view of the stored bytes; not a Tensor."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight (V, D).

        Args:
            dtype: Dtype of the result; None is the dtype of the output.
        """
        return self.weight.dequantize(dtype)
