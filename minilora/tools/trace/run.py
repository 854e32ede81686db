"""Look inside LoRA and QLoRA while they run: every intermediate by name, forward, backward and update.

    with ml.trace(model, "layers.0.self_attn.q_proj") as t:
        model(ids).mean().backward()
    print(t)

Inside, each traced layer runs layer.py's equations one statement at a time and notes each value, and what comes back to
it in backward. All else runs on the plain form of the ops, so outputs and gradients have the bits of a run inside
`ml.reference_ops()`; the fast forms round in other places. Afterwards the layers are as they were.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from minilora.common import ends_with, unknown
from minilora.lora.embedding_conv import unwrapped
from minilora.lora.layer import LoRAAdapter, LoRALayer
from minilora.quant.nf4_linear import NF4Linear
from minilora.tools.trace.nf4 import weight_rows
from minilora.tools.trace.steps import LayerTrace, Trace
from minilora_kernels.ops.mode import reference_ops

TRACED = (LoRALayer, NF4Linear, nn.Linear)


@contextmanager
def trace(
    module: nn.Module, layers: str | Sequence[str] | None = None, *,
    source: Tensor | Mapping[str, Tensor] | None = None, tensors: bool | None = None,
) -> Iterator[Trace]:  # fmt: skip
    """Record the steps of a layer, or of a model's LoRALayers, NF4Linears and nn.Linears: of each one's last call.

    layers: which of them, by name or the end of one; all by default.
    source: the dense weight (out, in) that the one 4-bit layer was made from, or such weights by name, as in the state
        dict of the dense model. What exists only before quantising (block, normalised …) is shown if it is given.
    tensors: keep whole tensors, copied, and not only their figures (shape, dtype, range, rms, first values). By default
        where one layer is traced.

    A step that did not happen has no row: dx if x wants no gradient, dA without backward. Backward of checkpointed
    layers and the optimiser's step must lie inside. Under a GradScaler gradients are the scaled ones.
    ValueError: a name that fits nothing; a model that is compiled, sharded or on meta; a layer whose forward another
    tool has replaced; a source that is not the weight.
    """
    chosen = _choose(module, layers)
    keep = len(chosen) == 1 if tensors is None else tensors
    found = Trace((path, LayerTrace(path, _kind(layer), keep)) for path, layer in chosen.items())
    packed: dict[str, Any] = {path: base for path, m in chosen.items() if type(base := unwrapped(m)) is NF4Linear}
    sources = {f"{path}.weight": source for path in [*packed][:1]} if isinstance(source, Tensor) else source or {}
    if missing := [path for path in packed if source is not None and f"{path}.weight" not in sources]:
        raise ValueError(f"source: expected {missing[0]}.weight too, as in the state dict of the dense model.")
    if source is not None and not packed:
        raise ValueError("source: no 4-bit layer is traced, and only of those it is the source. Leave it out.")
    for path, base in packed.items():
        for row in weight_rows(base.weight, sources.get(f"{path}.weight")):
            found[path].add(*row, "weight")
    with reference_ops(), ExitStack() as stack:
        for path, layer in chosen.items():
            _enter(layer, found[path])
            stack.callback(_leave, layer, found[path])
        look, compare = _updates(chosen, found)
        stack.callback(register_optimizer_step_pre_hook(look).remove)
        stack.callback(register_optimizer_step_post_hook(compare).remove)
        yield found


def _choose(module: nn.Module, layers: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers to trace, by name: nothing inside a LoRALayer. ValueError for what cannot be traced."""
    inside = {id(m) for layer in module.modules() if isinstance(layer, LoRALayer) for m in [*layer.modules()][1:]}
    modules = {path or type(m).__name__: m for path, m in module.named_modules()}
    there = {path: m for path, m in modules.items() if type(m) in TRACED and id(m) not in inside}
    if not there:
        raise ValueError(f"{type(module).__name__} has no LoRALayer, NF4Linear or nn.Linear to trace.")
    wanted = [layers] if isinstance(layers, str) else [*there] if layers is None else layers
    for entry in wanted:
        if not any(ends_with(path, entry) for path in there):
            raise unknown("layers", entry, there)
    chosen = {path: m for path, m in there.items() if any(ends_with(path, entry) for entry in wanted)}
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules()):
        raise ValueError("trace: the model is compiled, and its layers are not called one by one. Give it uncompiled.")
    for path, layer in chosen.items():
        if any(p.is_meta or hasattr(p, "device_mesh") for p in layer.parameters()):
            raise ValueError(f"trace: {path} is on the meta device or in shards, so its values are not here.")
        if getattr(vars(layer).get("forward", _forward), "__func__", _forward) is not _forward:
            raise ValueError(f"trace: the forward of {path} was replaced by another tool: undo that first.")
    return chosen


def _kind(layer: nn.Module) -> str:
    base = unwrapped(layer)
    kind = f"{type(base).__name__}({base.extra_repr()})"
    return kind if base is layer else f"LoRALayer({layer.extra_repr()}) around {kind}"


class _Tap:
    """On a traced layer: hands each value of its last call, and what backward brings, to all who look at it."""

    def __init__(self) -> None:
        self.layers: list[LayerTrace] = []
        self.handles: list[Any] = []
        self.grad, self.prefix = False, ""
        self.shares, self.arrived = 0, []  # of dx

    def begin(self) -> None:
        self.end()
        self.grad, self.shares, self.arrived = torch.is_grad_enabled(), 0, []
        for layer in self.layers:
            layer.begin()

    def end(self) -> None:  # what is still to come back through the last call is not noted
        while self.handles:
            self.handles.pop().remove()

    def note(self, value: Tensor, name: str, maths: str, phase: str = "forward") -> Tensor:
        for layer in self.layers:
            layer.add(value, self.prefix + name, maths, phase)
        return value

    def gradient(self, value: Tensor, name: str, maths: str, share: bool = False) -> Tensor:
        """Note what comes back to `value`, when it comes; the last share of dx is followed by their sum."""
        name, layers, arrived = self.prefix + name, [*self.layers], self.arrived

        def arrive(gradient: Tensor) -> None:
            for layer in layers:
                layer.add(gradient, name, maths, "backward")
            arrived.extend([gradient] * share)
            if share and len(arrived) == self.shares:
                for layer in layers:
                    layer.add(sum(arrived[1:], arrived[0]), "dx", "the sum of its shares", "backward")
                arrived.clear()

        if layers and value.requires_grad:
            self.shares += share
            self.handles.append(value.register_hook(arrive))
        return value

    def view(self, value: Tensor, name: str, maths: str, share: bool = False) -> Tensor:
        """A view for one reader, so that what comes back through this reader is seen by itself."""
        return self.gradient(value.view_as(value), name, maths, share)


_taps: dict[int, _Tap] = {}  # by id of a layer, for as long as a trace holds it


def _enter(layer: nn.Module, found: LayerTrace) -> None:
    _taps.setdefault(id(layer), _Tap()).layers.append(found)
    layer.forward = MethodType(_forward, layer)  # a method: a copy of the layer has its own


def _leave(layer: nn.Module, found: LayerTrace) -> None:
    found.open = False
    tap = _taps[id(layer)]
    tap.layers = [other for other in tap.layers if other is not found]
    if not tap.layers:
        tap.end()
        del _taps[id(layer)], layer.forward


def _forward(layer: Any, *args: Any, **named: Any) -> Tensor:
    """What a traced layer runs in the place of its forward."""
    if id(layer) not in _taps:  # a copy that was made inside
        return type(layer).forward(layer, *args, **named)
    tap, (x,) = _taps[id(layer)], (*args, *named.values())
    if tap.grad and torch._C._current_graph_task_id() >= 0:  # inside backward: a checkpointed layer, the same again
        tap = _Tap()  # at which nobody looks
    tap.begin()
    tap.note(x, "x", "what comes in")
    h = _based(layer, x, tap)
    for prefix, adapter in (active := _active(layer)):
        tap.prefix = prefix
        h = _adapted(adapter, x, h, layer.base_layer, tap)
    tap.prefix = ""
    if active:
        tap.note(h, "h", "xW + sxAB" if len(active) == 1 else "xW + the sxAB of each adapter")
    return tap.gradient(h, "dh", "what comes back")


def _based(layer: Any, x: Tensor, tap: _Tap) -> Tensor:
    """x Wᵀ + b, by the base's own forward."""
    base: Any = unwrapped(layer)
    if type(base) is NF4Linear:
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if any("W" not in found or found["W"].dtype != dtype for found in tap.layers):  # frozen: not in every call
            tap.note(base.dequantize(dtype), "W", "level · absmax, in the dtype of x", "weight")
    elif type(base) is nn.Linear:
        tap.note(base.weight, "W", "dense", "weight")
        tap.gradient(base.weight, "dW", "dhᵀ x, of all uses of W together")
    seen = tap.view(x, "dx by W", "dh W", share=True)
    y = type(layer).forward(layer, seen) if base is layer else base(seen)
    linear = "x Wᵀ" if getattr(base, "bias", None) is None else "x Wᵀ + b"
    return tap.note(y, "xW", linear if type(base) in TRACED else f"{type(base).__name__} of x")


def _adapted(adapter: Any, x: Tensor, h: Tensor, base: nn.Module, tap: _Tap) -> Tensor:
    """h + s · (B A dropout(x) + b): LoRAAdapter.forward, each value noted."""
    if type(adapter) is not LoRAAdapter:
        h = adapter(tap.view(x, "dx by A", "through the adapter", share=True), h, base)
        return tap.note(h, "sum", f"xW + what {type(adapter).__name__} adds: its steps are not shown")
    s, p = f"{adapter.scaling:.4g}", getattr(adapter.dropout, "p", 0) if adapter.training else 0
    xd, way = ("dropped x", ", through dropout") if p else ("x", "")
    A = tap.view(tap.note(adapter.lora_A, "A", "(r, in)"), "dA", f"dxAᵀ {xd}").to(x.dtype)
    B = tap.view(tap.note(adapter.lora_B, "B", "(out, r)"), "dB", "dhᵀ sxA").to(x.dtype)
    b = None
    if adapter.lora_bias is not None:
        b = adapter.scaling * tap.view(tap.note(adapter.lora_bias, "b", "(out,)"), "db", f"{s} · Σ dh").to(x.dtype)
    dropped = adapter.dropout(tap.view(x, "dx by A", f"dxA A{way}", share=True))
    if p:
        tap.note(dropped, xd, f"x, {p:.4g} of it zeroed, the rest / {1 - p:.4g}")
    z = tap.gradient(tap.note(F.linear(dropped, A), "xA", f"{xd} Aᵀ"), "dxA", f"{s} · dsxA")  # (…, r)
    sz = tap.gradient(tap.note(adapter.scaling * z, "sxA", f"{s} · xA"), "dsxA", "dh B")  # (…, r)
    return h + tap.note(F.linear(sz, B, b), "sxAB", "sxA Bᵀ" if b is None else f"sxA Bᵀ + {s} · b")  # (…, out)


def _updates(chosen: dict[str, nn.Module], found: Trace) -> tuple[Any, Any]:
    """What runs before and after a step of any optimiser, and notes how far it moves A, B and b of active adapters."""
    moved: list[tuple[LayerTrace, str, Tensor, Tensor]] = []  # …, the parameter, its values before

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for path, prefix, adapter in [(path, *pair) for path, layer in chosen.items() for pair in _active(layer)]:
            for part, name in (("lora_A", "A"), ("lora_B", "B"), ("lora_bias", "b")):
                if id(p := getattr(adapter, part, None)) in held and p is not None:
                    moved.append((found[path], f"{prefix}update {name}", p, p.detach().clone()))

    def compare(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for layer, name, p, before in moved:
            layer.add(p.detach() - before, name, f"after {type(optimizer).__name__}.step() - before", "update")
        moved.clear()

    return look, compare


def _active(layer: Any) -> list[tuple[str, Any]]:
    """The adapters at work, each with what its steps are named after: nothing if it is the only one."""
    names = layer.active if isinstance(layer, LoRALayer) else ()
    return [(f"{name}." if len(names) > 1 else "", layer.adapters[name]) for name in names]
