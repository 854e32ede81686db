"""NF4Linear: the frozen linear layer of QLoRA, with a weight of 4 bits.

    y  = x · dequantise(Wq)ᵀ + b           QLoRA §3, eq. 5 (arXiv:2305.14314), without the LoRA term
    dx = dy · dequantise(Wq)               Wq is frozen and receives no gradient

The LoRA term is added by the LoRALayer around this layer. The weight is dense only while it is
used: forward and backward dequantise it separately. If forward kept the dense W for backward, the
16-bit weights of all layers would be in memory at once, and QLoRA exists to avoid that. Backward
calls the dequantisation under another operator name, because torch.compile would merge two equal
calls and keep W between them.

One multiplication takes this way: NF4Linear → custom op (minilora_kernels/nf4/functional.py) →
choice of the implementation for the device (backend.py) → kernel launch → kernel. For a few tokens
and without gradients, the operator `gemv_nf4` multiplies by the codes directly, without a dense W,
if the device has such a kernel.

Storage: uint8 parameters without gradient, described in minilora_kernels/nf4/weight.py. The codes
are packed two in a byte. The scales (absmax) are fp32 numbers or, with double quantisation, 8-bit
codes with a second level of fp32 scales and an offset. The fp32 numbers are stored as bytes,
because `.half()`, `.to(dtype)` and mixed-precision sharding cast every fp32 tensor, which would
destroy the scales without an error. The codes are padded to a multiple of 16 bytes, so that a
kernel can load 128 bits at once. In contrast to Linear4bit of bitsandbytes, neither eval() nor
forward repacks the weight, and the layer computes in the dtype of x.

A hash of the original weight is stored too (fingerprint.py). With it a 4-bit layer and its 16-bit
original are recognised as one base.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.quant.fingerprint import hash_rows
from minilora_kernels import (
    FEW,
    FEW_ON_A_GPU,
    NF4Weight,
    dequantize_nf4,
    multiplier,
    prepare,
    quantize_nf4,
)
from minilora_kernels.ops.mode import plain_now

# The stored tensors, under the same names in NF4Weight and NF4Linear.
_STORED_TENSORS = ("packed", "absmax_bytes", "nested_bytes", "offset_bytes")
_PACKED_ALIGNMENT = 16  # bytes


class _NF4Multiply(torch.autograd.Function):
    """y = x Wᵀ + b for a 4-bit W.

    Backward needs W alone. Kept for it are the 4-bit codes and their scales, which the layer stores
    anyway. Neither the dense W nor x is kept: x would be needed for the gradient of W only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *weight_parts: Any) -> Tensor:
        packed, scales, nested_absmax, offset, shape, blocksize = weight_parts
        ctx.save_for_backward(packed, scales, nested_absmax, offset)
        ctx.shape = shape
        ctx.blocksize = blocksize
        W = torch.ops.minilora.dequantize_nf4(*weight_parts, x.dtype)  # (out, in)
        return F.linear(x, W, bias)  # (…, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads  # (…, out)
        dx = None
        if ctx.needs_input_grad[0]:
            weight_parts = (*ctx.saved_tensors, ctx.shape, ctx.blocksize)
            W = torch.ops.minilora.dequantize_nf4_backward(*weight_parts, dy.dtype)  # (out, in)
            dx = dy @ W  # (…, in)
        db = None
        if ctx.needs_input_grad[1]:
            db = dy.flatten(0, -2).sum(0)  # (out,)
        return dx, db, None, None, None, None, None, None  # no gradient for the weight's parts


class NF4Linear(nn.Module):
    """A linear layer with a frozen 4-bit weight.

    `from_linear` creates it from an nn.Linear. Its state dict has the keys of bitsandbytes (weight,
    weight.absmax, …, bias). Loading is strict: another shape, block size or kind of scales, a wrong
    dtype or a missing key is an error.

    Args:
        weight: The 4-bit weight, (out, in).
        bias: The bias (out,), or None. It is trainable if it required a gradient before.
        source: The tensor that was quantised, if it is available. Only a hash of it is kept.

    Attributes:
        packed: uint8, two codes in each byte, padded to a multiple of 16 bytes.
        absmax_bytes: uint8, bytes of the fp32 scales; with double quantisation their 8-bit codes.
        nested_bytes: uint8, bytes of the second-level scales; None without double quantisation.
        offset_bytes: uint8, bytes of the fp32 mean of the scales; None without double quantisation.
        bias: The bias (out,), or None.
        in_features: Size of the input.
        out_features: Size of the output.
        blocksize: Number of values that share one scale.
        dtype: Dtype of the weight before it was quantised.
        source: Fingerprint at the time of the quantisation; None if the original is unknown.

    Raises:
        ValueError: The weight does not have two dimensions.
    """

    packed: nn.Parameter
    absmax_bytes: nn.Parameter
    nested_bytes: nn.Parameter | None
    offset_bytes: nn.Parameter | None
    bias: nn.Parameter | None
    source: str | None = None

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None, source: Tensor | None = None):
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(
                "weight: expected two dimensions (out, in), "
                f"got the shape {tuple(weight.shape)}. Reshape it before quantising."
            )
        self.out_features, self.in_features = weight.shape
        self.blocksize = weight.blocksize
        self.dtype = weight.dtype
        self._store(weight)
        if bias is None:
            self.bias = None
        else:
            self.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        if source is not None and not source.is_meta:
            self.source = f"{self.fingerprint()},{hash_rows(source)}"

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = True
    ) -> "NF4Linear":
        """Return a quantised copy of a linear layer, which is left unchanged.

        Args:
            linear: The dense layer.
            blocksize: Number of values that share one scale.
            double_quant: Store the scales in 8 bits instead of 32.

        Raises:
            ValueError: The weight contains NaN or infinity, or the block size is not supported.
        """
        W = linear.weight.detach()  # (out, in)
        layer = cls(quantize_nf4(W, blocksize, double_quant), linear.bias, W)
        layer.training = linear.training
        return layer

    def _store(self, weight: NF4Weight) -> None:
        """Register the tensors of a weight as parameters, with the codes padded."""
        for name in _STORED_TENSORS:
            data = getattr(weight, name)
            if name == "packed" and len(data) % _PACKED_ALIGNMENT:
                data = F.pad(data, (0, -len(data) % _PACKED_ALIGNMENT))
            parameter = None
            if data is not None:
                parameter = nn.Parameter(data, requires_grad=False)
            self.register_parameter(name, parameter)
        prepare(weight.device)

    @property
    def weight(self) -> NF4Weight:
        """The 4-bit weight (out, in), a view of the stored bytes; not a Tensor."""
        bytes_without_padding = (self.in_features * self.out_features + 1) // 2
        return NF4Weight(
            self.packed[:bytes_without_padding],
            self.absmax_bytes,
            torch.Size((self.out_features, self.in_features)),
            self.dtype,
            self.blocksize,
            self.nested_bytes,
            self.offset_bytes,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight (out, in).

        Args:
            dtype: Dtype of the result; None is the dtype of the weight before it was quantised.
        """
        return dequantize_nf4(self.weight, dtype)

    def fingerprint(self) -> str:
        """Return hashes of the codes and, if it is known, of the original weight.

        The scales are not hashed: double quantisation on or off is the same base. The original is
        unknown after other codes were loaded.
        """
        packed = self.weight.packed
        row_bytes = max(1, self.in_features // 2)  # approximate if in_features is odd
        rows = len(packed) // row_bytes
        codes = packed[: rows * row_bytes].view(-1, row_bytes)  # (rows, row_bytes)
        hashes = hash_rows(codes, f"nf4/{self.blocksize}")
        if self.source is not None and self.source.startswith(hashes):
            return self.source
        return hashes

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
        weight_parts = self.weight.parts()
        if not torch.is_grad_enabled() and not plain_now():
            few = FEW if device == "cpu" else FEW_ON_A_GPU
            if 0 < x.shape[:-1].numel() <= few:
                return torch.ops.minilora.gemv_nf4(x, *weight_parts, bias)  # (…, out)
        return _NF4Multiply.apply(x, bias, *weight_parts)  # (…, out)

    def for_tokens(self) -> Callable[[Tensor], Tensor]:
        """Return a faster `forward` for the generation of text on a CPU.

        The returned function looks up the addresses of the layer's memory once. For a few tokens
        and a small matrix the look-up takes longer than the multiplication. The function is valid
        while the layer does not change, and works without gradients and autocast.
        """
        weight = self.weight
        multiply = None

        def forward(x: Tensor) -> Tensor:
            nonlocal multiply
            multiply = multiply or multiplier(weight)  # None until the kernel is compiled
            right_size = x.shape[-1] == self.in_features
            few_tokens = 0 < x.numel() <= FEW * self.in_features
            right_dtype = x.dtype in (torch.float32, torch.bfloat16)
            if multiply is None or not (right_size and few_tokens and right_dtype and x.is_cpu):
                return NF4Linear.forward(self, x)  # (…, out)
            bias = None
            if self.bias is not None:
                bias = self.bias.to(x.dtype).contiguous()  # (out,)
            return multiply(x.contiguous(), bias)  # (…, out)

        return forward

    def _apply(self, fn, recurse=True):
        """Prepare the kernels of the new device after a move."""
        super()._apply(fn, recurse)
        prepare(self.packed.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Write the keys of bitsandbytes."""
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
        """Read the keys of bitsandbytes, and report everything that does not fit."""
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
            weight = NF4Weight.from_state_dict(state)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        expected = (self.weight.shape, self.blocksize, self.weight.double_quant)
        loaded = (weight.shape, weight.blocksize, weight.double_quant)
        bias_fits = bias is None or bias.shape == (self.out_features,)
        if loaded != expected or not bias_fits:
            error_msgs.append(
                f"{prefix}weight (shape, blocksize, double_quant): "
                f"expected {expected}, got {loaded}."
            )
            return
        self._load(weight, bias, local_metadata.get("assign_to_params_buffers", False))

    def _load(self, weight: NF4Weight, bias: Tensor | None, assign: bool) -> None:
        """Take over a checked weight and bias; with `assign` without copying the 4-bit tensors."""
        if assign:
            self._store(weight)
        else:
            self._store(copy.deepcopy(weight).to(self.packed.device))
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

    def extra_repr(self) -> str:
        """Return sizes, bias and format for `repr(module)`."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += f", bias={self.bias is not None}, nf4/{self.blocksize}"
        if self.nested_bytes is not None:
            text += ", double_quant"
        return text
