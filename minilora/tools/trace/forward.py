"""Forward pass of a traced layer: the equations of layer.py, one recorded value a statement.

y  = x Wᵀ + b            xW, by the base's own forward
xA = dropout(x) Aᵀ       (…, r)
h  = y + (s · xA) Bᵀ     (…, out)
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora.embedding_conv import unwrapped
from minilora.lora.layer import LoRAAdapter, LoRALayer
from minilora.quant.gguf_linear import GGUFLinear
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantized_linear import QuantizedLinear
from minilora.tools.trace.steps import LayerTrace

TRACED = (LoRALayer, NF4Linear, GGUFLinear, nn.Linear)


class _Tap:
    """Recorder on a traced layer, which passes each value and gradient to all its traces."""

    def __init__(self) -> None:
        self.layers: list[LayerTrace] = []
        self.handles: list[Any] = []  # of hooks on tensors
        self.grad = False  # the last call recorded a graph
        self.prefix = ""  # name of the adapter, where several are active
        self.shares = 0  # number of terms of dx
        self.arrived: list[Tensor] = []  # terms of dx that backward has computed

    def begin(self) -> None:
        """Begin a call."""
        self.end()
        self.grad = torch.is_grad_enabled()
        self.shares = 0
        self.arrived = []
        for layer in self.layers:
            layer.begin()

    def end(self) -> None:
        """Remove the hooks, so that later gradients of the last call are not recorded."""
        while self.handles:
            self.handles.pop().remove()

    def note(self, value: Tensor, name: str, maths: str, phase: str = "forward") -> Tensor:
        """Record a value, and return it."""
        for layer in self.layers:
            layer.add(value, self.prefix + name, maths, phase)
        return value

    def gradient(self, value: Tensor, name: str, maths: str, share: bool = False) -> Tensor:
        """Record the gradient of a value when backward computes it, and return the value.

        With `share` it is one term of dx; the last term is followed by their sum.
        """
        if not self.layers or not value.requires_grad:
            return value
        name = self.prefix + name
        layers = list(self.layers)
        arrived = self.arrived

        def arrive(gradient: Tensor) -> None:
            for layer in layers:
                layer.add(gradient, name, maths, "backward")
            if not share:
                return
            arrived.append(gradient)
            if len(arrived) == self.shares:
                total = sum(arrived[1:], arrived[0])
                for layer in layers:
                    layer.add(total, "dx", "sum of the dx terms", "backward")
                arrived.clear()

        if share:
            self.shares += 1
        self.handles.append(value.register_hook(arrive))
        return value

    def view(self, value: Tensor, name: str, maths: str, share: bool = False) -> Tensor:
        """Return a view for one use of a value, and record the gradient of this use alone."""
        return self.gradient(value.view_as(value), name, maths, share)


_taps: dict[int, _Tap] = {}  # by id of a layer, while a trace refers to it


def attach(layer: nn.Module, steps: LayerTrace) -> None:
    """Replace the forward of a layer by one that records its steps.

    Args:
        layer: The layer.
        steps: Trace that receives the steps.
    """
    _taps.setdefault(id(layer), _Tap()).layers.append(steps)
    layer.forward = MethodType(_forward, layer)  # bound, so that a copy of the layer binds its own


def detach(layer: nn.Module, steps: LayerTrace) -> None:
    """End a trace of a layer, and restore its forward after the last one.

    Args:
        layer: The layer.
        steps: Trace that was given to `attach`.
    """
    steps.open = False
    tap = _taps[id(layer)]
    tap.layers = [other for other in tap.layers if other is not steps]
    if not tap.layers:
        tap.end()
        del _taps[id(layer)]
        del layer.forward


def has_other_forward(layer: nn.Module) -> bool:
    """Return True if another tool replaced the forward of a layer.

    Args:
        layer: The layer.
    """
    forward = vars(layer).get("forward", _forward)
    return getattr(forward, "__func__", _forward) is not _forward


def named_adapters(layer: Any) -> list[tuple[str, Any]]:
    """Return the active adapters of a layer, each with the prefix of its steps.

    Args:
        layer: A layer; only a LoRALayer has adapters.

    Returns:
        Pairs of a prefix ("name.", or empty for the only adapter) and an adapter.
    """
    if not isinstance(layer, LoRALayer):
        return []
    pairs = []
    for name in layer.active:
        prefix = f"{name}." if len(layer.active) > 1 else ""
        pairs.append((prefix, layer.adapters[name]))
    return pairs


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Compute the output of a traced layer, and record each step."""
    if id(layer) not in _taps:  # a copy that was made while the layer was traced
        return type(layer).forward(layer, *args, **kwargs)
    (x,) = (*args, *kwargs.values())
    tap = _taps[id(layer)]
    if tap.grad and torch._C._current_graph_task_id() >= 0:
        # A checkpointed layer computes the same again inside backward: record nothing.
        tap = _Tap()
    tap.begin()
    tap.note(x, "x", "the layer's input")
    h = _base_output(layer, x, tap)  # (…, out)
    adapters = named_adapters(layer)
    for prefix, adapter in adapters:
        tap.prefix = prefix
        h = _add_adapter(adapter, x, h, layer.base_layer, tap)  # (…, out)
    tap.prefix = ""
    if adapters:
        maths = "xW + sxAB" if len(adapters) == 1 else "xW + the sxAB of each adapter"
        tap.note(h, "h", maths)
    return tap.gradient(h, "dh", "gradient of the output")


def _base_output(layer: Any, x: Tensor, tap: _Tap) -> Tensor:
    """Return x Wᵀ + b, by the base's own forward."""
    base: Any = unwrapped(layer)
    if isinstance(base, QuantizedLinear):
        _note_dequantized(base, x, tap)
    elif type(base) is nn.Linear:
        tap.note(base.weight, "W", "dense", "weight")
        tap.gradient(base.weight, "dW", "dhᵀ x, of all uses of W together")
    viewed = tap.view(x, "dx by W", "dh W", share=True)  # (…, in)
    if base is layer:
        y = type(layer).forward(layer, viewed)  # (…, out)
    else:
        y = base(viewed)  # (…, out)
    maths = f"{type(base).__name__} of x"
    if type(base) in TRACED:
        maths = "x Wᵀ" if getattr(base, "bias", None) is None else "x Wᵀ + b"
    return tap.note(y, "xW", maths)


def _note_dequantized(base: QuantizedLinear, x: Tensor, tap: _Tap) -> None:
    """Record W in the dtype of the call; W is frozen, so a second call records nothing new."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if any("W" not in steps or steps["W"].dtype != dtype for steps in tap.layers):
        W = base.dequantize(dtype)  # (out, in)
        maths = "level · absmax" if isinstance(base, NF4Linear) else "from the blocks of the file"
        tap.note(W, "W", f"{maths}, in the dtype of x", "weight")


def _add_adapter(adapter: Any, x: Tensor, h: Tensor, base: nn.Module, tap: _Tap) -> Tensor:
    """Return h + s · (B A dropout(x) + b): LoRAAdapter.forward, with each value recorded."""
    if type(adapter) is not LoRAAdapter:
        h = adapter(tap.view(x, "dx by A", "through the adapter", share=True), h, base)  # (…, out)
        kind = type(adapter).__name__
        return tap.note(h, "sum", f"xW + the update of {kind}, whose steps are not shown")
    s = f"{adapter.scaling:.4g}"
    p = getattr(adapter.dropout, "p", 0) if adapter.training else 0
    x_name = "dropped x" if p else "x"
    A = tap.note(adapter.lora_A, "A", "(r, in)")
    A = tap.view(A, "dA", f"dxAᵀ {x_name}").to(x.dtype)  # (r, in)
    B = tap.note(adapter.lora_B, "B", "(out, r)")
    B = tap.view(B, "dB", "dhᵀ sxA").to(x.dtype)  # (out, r)
    bias = None
    update = "sxA Bᵀ"
    if adapter.lora_bias is not None:
        b = tap.note(adapter.lora_bias, "b", "(out,)")
        b = tap.view(b, "db", f"{s} · Σ dh").to(x.dtype)  # (out,)
        bias = adapter.scaling * b  # (out,)
        update = f"sxA Bᵀ + {s} · b"
    dx_maths = "dxA A, through dropout" if p else "dxA A"
    dropped = adapter.dropout(tap.view(x, "dx by A", dx_maths, share=True))  # (…, in)
    if p:
        tap.note(dropped, x_name, f"x, {p:.4g} of it zeroed, the rest / {1 - p:.4g}")
    xA = tap.note(F.linear(dropped, A), "xA", f"{x_name} Aᵀ")  # (…, r)
    xA = tap.gradient(xA, "dxA", f"{s} · dsxA")
    sxA = tap.note(adapter.scaling * xA, "sxA", f"{s} · xA")  # (…, r)
    sxA = tap.gradient(sxA, "dsxA", "dh B")
    return h + tap.note(F.linear(sxA, B, bias), "sxAB", update)  # (…, out)
