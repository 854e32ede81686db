"""Context manager that records every intermediate tensor of LoRA layers by name.

    with ml.trace(model, "layers.0.self_attn.q_proj") as t:
        model(ids).mean().backward()
    print(t)

Inside the block, each traced layer computes the equations of layer.py one statement at a time
(forward.py), and records each value and its gradient. All other layers use the reference
implementation of the ops, so outputs and gradients have the same bits as a run inside
`ml.reference_ops()`; the fast implementations round in other places. After the block the layers are
as before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from minilora.common import ends_with, ends_with_any, unknown_name
from minilora.lora.embedding_conv import unwrapped
from minilora.lora.layer import LoRALayer
from minilora.quant.nf4_linear import NF4Linear
from minilora.tools.trace.forward import (
    TRACED,
    attach,
    detach,
    has_other_forward,
    named_adapters,
)
from minilora.tools.trace.nf4 import weight_rows
from minilora.tools.trace.steps import LayerTrace, Trace
from minilora_kernels.ops.mode import reference_ops


@contextmanager
def trace(
    module: nn.Module,
    layers: str | Sequence[str] | None = None,
    *,
    source: Tensor | Mapping[str, Tensor] | None = None,
    tensors: bool | None = None,
) -> Iterator[Trace]:
    """Record the steps of the last call of each traced layer.

    A step that did not occur has no row: dx needs an x that requires a gradient, dA needs a
    backward pass. The backward pass of checkpointed layers and the optimiser's step must happen
    inside the block. Under a GradScaler the recorded gradients are the scaled ones.

    Args:
        module: A layer, or a model whose LoRALayers, quantised and dense layers are traced.
        layers: Paths of the layers to trace, or the ends of paths; None traces all.
        source: The dense weight (out, in) that the only traced 4-bit layer was made from, or such
            weights by name, as in the state dict of the dense model. With it, the steps that exist
            only while quantising (block, normalised …) are recorded. None leaves them out.
        tensors: Keep copies of full tensors, and not only their shape, dtype, range, rms and first
            values. The default keeps them if a single layer is traced.

    Yields:
        The trace.

    Raises:
        ValueError: If a name matches nothing; if a model is compiled, sharded or on the meta
            device; if another tool replaced the forward of a layer; or if `source` is not the
            weight that was quantised.
    """
    chosen = _choose(module, layers)
    keep = len(chosen) == 1 if tensors is None else tensors
    result = Trace()
    for path, layer in chosen.items():
        result[path] = LayerTrace(path, _description(layer), keep)
    _record_weights(chosen, source, result)
    with reference_ops(), ExitStack() as stack:
        for path, layer in chosen.items():
            attach(layer, result[path])
            stack.callback(detach, layer, result[path])
        updates = _Updates(chosen, result)
        stack.callback(register_optimizer_step_pre_hook(updates.before_step).remove)
        stack.callback(register_optimizer_step_post_hook(updates.after_step).remove)
        yield result


def _choose(module: nn.Module, layers: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the layers to trace by path, without modules inside a LoRALayer."""
    candidates = _candidates(module)
    if not candidates:
        raise ValueError(
            f"{type(module).__name__} has no LoRALayer, QuantizedLinear or nn.Linear to trace."
        )
    chosen = candidates
    if layers is not None:
        entries = [layers] if isinstance(layers, str) else layers
        for entry in entries:
            if not any(ends_with(path, entry) for path in candidates):
                raise unknown_name("layers", entry, candidates)
        chosen = {path: layer for path, layer in candidates.items() if ends_with_any(path, entries)}
    _check_traceable(module, chosen)
    return chosen


def _candidates(module: nn.Module) -> dict[str, nn.Module]:
    """Return all layers that can be traced, by path; a layer without path has its class name."""
    inside_lora_layer = set()
    for layer in module.modules():
        if isinstance(layer, LoRALayer):
            inside_lora_layer.update(id(m) for m in layer.modules() if m is not layer)
    candidates = {}
    for path, layer in module.named_modules():
        if type(layer) in TRACED and id(layer) not in inside_lora_layer:
            candidates[path or type(layer).__name__] = layer
    return candidates


def _check_traceable(module: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Refuse a model that is compiled, sharded, on the meta device or changed by another tool."""
    for part in module.modules():
        if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None:
            raise ValueError(
                "trace: the model is compiled, so its layers are not called one by one. "
                "Give the model that is not compiled."
            )
    for path, layer in chosen.items():
        on_meta = any(parameter.is_meta for parameter in layer.parameters())
        sharded = any(hasattr(parameter, "device_mesh") for parameter in layer.parameters())
        if on_meta or sharded:
            raise ValueError(
                f"trace: {path} is on the meta device or sharded, so its values are not available. "
                "Trace a model that is loaded on one device."
            )
        if has_other_forward(layer):
            raise ValueError(
                f"trace: the forward of {path} was replaced by another tool. Undo that first."
            )


def _description(layer: nn.Module) -> str:
    """Return the class and the settings of a layer and its base."""
    base = unwrapped(layer)
    text = f"{type(base).__name__}({base.extra_repr()})"
    if base is layer:
        return text
    return f"LoRALayer({layer.extra_repr()}) around {text}"


def _record_weights(
    chosen: Mapping[str, nn.Module],
    source: Tensor | Mapping[str, Tensor] | None,
    result: Trace,
) -> None:
    """Record the steps of all 4-bit weights."""
    four_bit: dict[str, Any] = {}
    for path, layer in chosen.items():
        base = unwrapped(layer)
        if type(base) is NF4Linear:
            four_bit[path] = base
    sources = _sources_by_name(source, list(four_bit))
    for path, base in four_bit.items():
        for value, name, maths in weight_rows(base.weight, sources.get(f"{path}.weight")):
            result[path].add(value, name, maths, "weight")


def _sources_by_name(
    source: Tensor | Mapping[str, Tensor] | None, paths: list[str]
) -> Mapping[str, Tensor]:
    """Return the dense weight of each 4-bit layer by name; refuse an incomplete `source`."""
    if source is None:
        return {}
    if not paths:
        raise ValueError(
            "source: no 4-bit layer is traced, and dense layers need no source. Leave it out."
        )
    sources = {f"{paths[0]}.weight": source} if isinstance(source, Tensor) else source
    for path in paths:
        if f"{path}.weight" not in sources:
            raise ValueError(
                f"source: expected {path}.weight too, as in the state dict of the dense model."
            )
    return sources


class _Moved(NamedTuple):
    """A parameter with its values before the optimiser's step."""

    layer: LayerTrace
    name: str
    parameter: Tensor
    before: Tensor


class _Updates:
    """Hooks that record how far a step of any optimiser moves A, B and b of active adapters."""

    def __init__(self, chosen: dict[str, nn.Module], result: Trace) -> None:
        self.chosen = chosen
        self.result = result
        self.moved: list[_Moved] = []

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Copy the parameters of active adapters that this optimiser trains."""
        trained = set()
        for group in optimizer.param_groups:
            trained.update(id(p) for p in group["params"])
        for path, layer in self.chosen.items():
            for prefix, adapter in named_adapters(layer):
                for attribute, letter in (("lora_A", "A"), ("lora_B", "B"), ("lora_bias", "b")):
                    p = getattr(adapter, attribute, None)
                    if p is not None and id(p) in trained:
                        name = f"{prefix}update {letter}"
                        copy = p.detach().clone()
                        self.moved.append(_Moved(self.result[path], name, p, copy))

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Record the differences."""
        maths = f"after {type(optimizer).__name__}.step() - before"
        for layer, name, parameter, before in self.moved:
            layer.add(parameter.detach() - before, name, maths, "update")
        self.moved.clear()
