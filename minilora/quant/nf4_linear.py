"""QLoRA's frozen layer: a linear map whose weight lies in 4 bits and is dense only while it is used.

    y = x · dequantise(Wq)ᵀ + b            QLoRA §3, eq. 5, without the LoRA term, which a LoRALayer adds around it
    dX = dY · dequantise(Wq)               no gradient for Wq: it is frozen

Backward dequantises a second time: keeping the dense W for it would hold every layer's 16 bits at once, which is the
memory that QLoRA saves. It calls the dequantisation under another name, or torch.compile would merge the two calls
and keep W after all.

Stored as uint8 parameters without gradient (minilora_kernels/nf4/weight.py): packed codes; absmax; with double
quantisation absmax as 8-bit codes, and nested absmax and offset beside them. What is fp32 is kept as its bytes, because
.half(), .to(dtype) and mixed-precision sharding cast any fp32 tensor they meet and would ruin a scale silently. The
codes are padded to 16 bytes, so that a kernel may load 128 bits. Unlike bitsandbytes' Linear4bit, nothing is repacked
by eval() or by a forward; computing is in x.dtype.
What was quantised here is remembered by a hash, so that the 4-bit layer and its 16-bit source are known as one base.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.common import ends_with, output_layer, tied_modules, unknown
from minilora_kernels import FEW, FEW_ON_A_GPU, NF4Weight, dequantize_nf4, multiplier, prepare, quantize_nf4
from minilora_kernels.ops.mode import plain_now

_PARTS = ("packed", "absmax_bytes", "nested_bytes", "offset_bytes")  # of an NF4Weight, and of NF4Linear
ROWS = 64
_KINDS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def hash_rows(weight: Tensor, kind: str | None = None) -> str:
    """How a weight (rows, …) of any rank is told from others: "kind:hash,kind:hash…" of 64 rows spread evenly over it.

    First as it is stored (`kind`, by default the dtype), then rounded to each dtype that is no wider, so that one
    checkpoint loaded in two dtypes is known as one. Only the rows are copied to the CPU.
    """
    count = min(ROWS, len(weight))
    chosen = torch.arange(count, device=weight.device) * len(weight) // max(count, 1)  # the first, and evenly on
    rows = weight.detach()[chosen].contiguous().cpu()
    own = kind or next((name for name, dtype in _KINDS.items() if dtype == rows.dtype), str(rows.dtype))
    casts = {own: rows}
    for name, dtype in _KINDS.items() if rows.is_floating_point() else ():
        if name != own and dtype.itemsize <= rows.dtype.itemsize:
            casts[name] = rows.to(dtype)
    return ",".join(f"{name}:{digest(t.view(torch.uint8).numpy())}" for name, t in casts.items())


def digest(content: Any) -> str:
    """16 hexadecimal digits of the sha256 of some bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


class _Multiply(torch.autograd.Function):
    """x (…, in) · Wᵀ + b → (…, out), saving the 4-bit parts for backward: no dense weight, and no x, as W is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
        packed, scales, nested_absmax, offset, *ctx.layout = parts  # layout: shape, blocksize
        ctx.save_for_backward(packed, scales, nested_absmax, offset)
        W = torch.ops.minilora.dequantize_nf4(*parts, x.dtype)  # (out, in)
        return F.linear(x, W, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads  # (…, out)
        dx = db = None
        if ctx.needs_input_grad[0]:
            W = torch.ops.minilora.dequantize_nf4_backward(*ctx.saved_tensors, *ctx.layout, g.dtype)  # (out, in)
            dx = g @ W  # (…, in)
        if ctx.needs_input_grad[1]:
            db = g.flatten(0, -2).sum(0)  # (out,)
        return dx, db, *[None] * 6  # packed, scales, nested absmax, offset, shape, blocksize


class NF4Linear(nn.Module):
    """A linear layer with a frozen 4-bit weight. Made by `from_linear` or from an NF4Weight of shape (out, in).

    source: the tensor that was quantised, where it is at hand; only a hash of it is kept (`fingerprint`).

    Its state dict has bitsandbytes' keys (weight, weight.absmax, …, bias) and is read strictly: another shape, block
    size or kind of scales, a wrong dtype or a missing key is an error.
    """

    packed: nn.Parameter
    absmax_bytes: nn.Parameter
    nested_bytes: nn.Parameter | None
    offset_bytes: nn.Parameter | None
    bias: nn.Parameter | None
    source: str | None = None  # the fingerprint as it was when the weight was quantised here

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None, source: Tensor | None = None):
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(f"weight: expected two dimensions (out, in), got the shape {tuple(weight.shape)}.")
        self.out_features, self.in_features = weight.shape
        self.blocksize, self.dtype = weight.blocksize, weight.dtype
        self._store(weight)
        trainable = bias is not None and bias.requires_grad
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=trainable)
        if source is not None and not source.is_meta:
            self.source = f"{self.fingerprint()},{hash_rows(source)}"

    @classmethod
    def from_linear(cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = True) -> "NF4Linear":
        """Quantise a linear layer; it is left as it was. NaN or infinity in its weight raises ValueError."""
        W = linear.weight.detach()  # (out, in)
        layer = cls(quantize_nf4(W, blocksize, double_quant), linear.bias, W)
        layer.training = linear.training
        return layer

    def _store(self, weight: NF4Weight) -> None:
        for part in _PARTS:
            data = getattr(weight, part)
            if data is not None and part == "packed" and len(data) % 16:
                data = F.pad(data, (0, -len(data) % 16))
            self.register_parameter(part, None if data is None else nn.Parameter(data, requires_grad=False))
        prepare(weight.device)

    @property
    def weight(self) -> NF4Weight:
        """The 4-bit weight, as a view of the stored bytes; logical shape (out, in). `dequantize()` gives a tensor."""
        packed = self.packed[: (self.in_features * self.out_features + 1) // 2]
        rest = self.nested_bytes, self.offset_bytes
        shape = torch.Size((self.out_features, self.in_features))
        return NF4Weight(packed, self.absmax_bytes, shape, self.dtype, self.blocksize, *rest)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), in `dtype` or in that of the weight which was quantised."""
        return dequantize_nf4(self.weight, dtype)

    def fingerprint(self) -> str:
        """`hash_rows` of the codes and, if these are the ones that were quantised here, of the source they came from.

        Scales are left out: double quantisation on or off is one base. Loading other codes makes the source unknown.
        """
        packed, width = self.weight.packed, max(1, self.in_features // 2)  # bytes of a row, or nearly where in is odd
        codes = hash_rows(packed[: len(packed) // width * width].view(-1, width), f"nf4/{self.blocksize}")
        return self.source if self.source is not None and self.source.startswith(codes) else codes

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), in x.dtype; under autocast in autocast's dtype."""
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        parts = self.weight.parts()
        few = FEW if device == "cpu" else FEW_ON_A_GPU
        if not torch.is_grad_enabled() and not plain_now() and 0 < x.shape[:-1].numel() <= few:
            return torch.ops.minilora.gemv_nf4(x, *parts, bias)  # without a dense W where a kernel does
        return _Multiply.apply(x, bias, *parts)

    def for_tokens(self) -> Callable[[Tensor], Tensor]:
        """`forward` of a layer that does not change meanwhile, without gradients or autocast: on a CPU a few tokens
        find the layer's addresses looked up, which takes longer than to multiply by a small matrix."""
        weight, multiply = self.weight, None

        def forward(x: Tensor) -> Tensor:
            nonlocal multiply
            multiply = multiply or multiplier(weight)  # None as long as it is being compiled
            fits = x.shape[-1] == self.in_features and 0 < x.numel() <= FEW * self.in_features and x.is_cpu
            if multiply is None or not fits or x.dtype not in (torch.float32, torch.bfloat16):
                return NF4Linear.forward(self, x)
            return multiply(x.contiguous(), None if self.bias is None else self.bias.to(x.dtype).contiguous())

        return forward

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        prepare(self.packed.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        state = self.weight.state_dict(f"{prefix}weight")
        if self.bias is not None:
            state[f"{prefix}bias"] = self.bias
        destination.update(state if keep_vars else {key: value.detach() for key, value in state.items()})

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        mine = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        bias = mine.pop("bias", None)
        unexpected_keys += [prefix + key for key in mine if strict and key.split(".")[0] != "weight"]
        if (bias is None) != (self.bias is None):
            (missing_keys if bias is None else unexpected_keys).append(f"{prefix}bias")
        if "weight" not in mine:
            missing_keys.append(f"{prefix}weight")
            return
        try:
            weight = NF4Weight.from_state_dict(mine)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        expected = (self.weight.shape, self.blocksize, self.weight.double_quant)
        found = (weight.shape, weight.blocksize, weight.double_quant)
        if found != expected or (bias is not None and bias.shape != (self.out_features,)):
            error_msgs.append(f"{prefix}weight (shape, blocksize, double_quant): expected {expected}, got {found}.")
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        self._store(weight if assign else copy.deepcopy(weight).to(self.packed.device))
        self.dtype = weight.dtype
        if bias is not None and self.bias is not None:
            bias = bias if assign else bias.to(self.bias)
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=self.bias.requires_grad)

    def _replicate_for_data_parallel(self):
        raise RuntimeError("nn.DataParallel copies parameters every step; use DistributedDataParallel (DDP) instead.")

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.nested_bytes is not None else ""
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {bias=}, nf4/{self.blocksize}{nested}"
        )


def quantize_model(
    model: nn.Module, blocksize: int = 64, double_quant: bool = True, skip: Sequence[str] | None = None
) -> list[str]:
    """Replace every nn.Linear in `model` by an NF4Linear, in place and one at a time; returns their names.

    The output layer and layers that share their weight with another module stay dense, and so does everything
    that an entry of `skip` (a name or the end of one) fits. Raises ValueError, with the model untouched, for an
    entry that fits no linear layer and for a model without any.
    """
    linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    for entry in skip or ():
        if not any(ends_with(path, entry) for path in linears):
            raise unknown("skip", entry, linears)
    output, tied = output_layer(model), tied_modules(model)
    names = [
        path
        for path, layer in linears.items()
        if layer is not output
        and path.removesuffix(".base_layer") not in tied
        and not any(ends_with(path, entry) for entry in skip or ())
    ]
    if not names:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantise (an output layer stays dense).")
    for path in names:
        model.set_submodule(path, NF4Linear.from_linear(linears.pop(path), blocksize, double_quant))
    return names
