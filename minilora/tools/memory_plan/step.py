"""Memory of one training step, part by part.

    embedding · layer 0 … layer L-1 forward · logits · backward of the head
    · layer L-1 … layer 0 backward · optimiser

The model is built on the meta device in the way of load_model. Two layers take the same memory if
they agree in all shapes, and in having a trainable parameter below them or not. One layer of each
kind runs under the meter (meter.py) and counts as often as the kind occurs: a model of 80 layers
takes the time of three.

Simplified: the CPU's code path runs, on any machine.
"""

import copy
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minilora.lora.config import LoRAConfig
from minilora.lora.inject import inject
from minilora.lora.registry import lora_configs
from minilora.losses.sft import SFT
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.quant.gguf_embedding import GGUFEmbedding
from minilora.quant.gguf_linear import GGUFLinear
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantize_model import layers_to_quantize, replace_layers
from minilora.tools.memory_plan.base import Bits, keep_layers
from minilora.tools.memory_plan.meter import Meter, Stretch, Unfilled
from minilora.training.config import TrainConfig
from minilora.training.optim.param_groups import new_optimizer
from minilora.training.precision import precision_of
from minilora.training.runtime import switched_to_training

Step = tuple[list[tuple[str, Stretch]], int]  # parts by name, and bytes of the optimiser's state

_Key = tuple[str, int]  # name of a part, and kind of its layer (-1 outside all layers)


class _Measured(NamedTuple):
    """Parts of a step of the small model, and bytes of optimiser state by kind of layer."""

    stretches: dict[_Key, Stretch]
    optimizer_state: Counter[int]


def shapes(
    config: DecoderConfig,
    lora: LoRAConfig | None,
    dtype: torch.dtype,
    bits: Bits,
) -> CausalLM:
    """Build a model on the meta device.

    Args:
        config: Shape of the model.
        lora: Config of its adapter; None trains every parameter.
        dtype: dtype of dense weights.
        bits: Storage of its linear layers (base.py); None is dense.

    Returns:
        The model without storage.
    """
    with torch.device("meta"), Unfilled():
        model = CausalLM(config).to(dtype)
        model.tie_weights()
        if isinstance(bits, dict):
            keep_layers(model, bits)
        elif bits is not None:
            blocksize, double_quant = bits
            replace_layers(model, layers_to_quantize(model), blocksize, double_quant)
        if lora is not None:
            inject(model, lora)
    return model


def stored(model: CausalLM) -> dict[str, int]:
    """Return the bytes of a model's weights.

    Args:
        model: A model, on the meta device or loaded.

    Returns:
        Bytes by part: "packed" (codes; of a GGUF file with their scales), "scales", "dense" and
        "adapters" (trainable parameters that are added to the base).
    """
    sizes = {"packed": 0, "scales": 0, "dense": 0, "adapters": 0}
    configs = lora_configs(model)
    full = not configs
    codes = set()
    for module in model.modules():
        if isinstance(module, NF4Linear):
            codes.add(id(module.packed))
        elif isinstance(module, GGUFLinear | GGUFEmbedding):
            codes.add(id(module.blocks))
    parameters = set(model.parameters())
    for original in configs.parts.originals.values():  # replaced by modules_to_save
        parameters.update(_parameters(original))
    for p in parameters:
        if p.dtype == torch.uint8:
            part = "packed" if id(p) in codes else "scales"
        else:
            part = "adapters" if p.requires_grad and not full else "dense"
        sizes[part] += p.nbytes
    return sizes


def _parameters(part: Any) -> list[nn.Parameter]:
    """Return the parameters of a module, or a parameter as a list."""
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def walked_as(config: TrainConfig) -> TrainConfig:
    """Return a representative of all configs whose step takes the same memory.

    Args:
        config: Config of a run.
    """
    return replace(
        config,
        # rows are padded, as in losses/sft.py
        max_length=-(-config.max_length // 8) * 8,
        # the second micro-batch adds to existing gradients; a third one takes the same memory
        gradient_accumulation_steps=min(config.gradient_accumulation_steps, 2),
        # the same state, in host memory
        optim=config.optim.removeprefix("paged_"),
    )


def step(model: CausalLM, config: TrainConfig) -> Step:
    """Measure a training step after the first one.

    The batch has per_device_train_batch_size rows of max_length tokens, all of them supervised.

    Args:
        model: A model on the meta device.
        config: Config of the run.

    Returns:
        The parts of the step in order, by name, and the bytes of the optimiser's state.
    """
    layer_kinds = _layer_kinds(model)
    config = walked_as(config)
    _fill_optimizer_tables(config)
    # Some code keeps buffers for each thread. In a thread of its own those without values end here.
    with ThreadPoolExecutor(1) as thread:
        measured = thread.submit(_walk, model, sorted(set(layer_kinds)), config).result()
    stretches = measured.stretches
    # At its end, autocast frees the 16-bit copies of the weights of every layer.
    casts = stretches["casts", -1]
    further = 0
    for kind, size in casts.freed.items():
        if kind >= 0:
            further += (layer_kinds.count(kind) - 1) * size
    stretches["casts", -1] = casts._replace(change=casts.change - further)
    parts = [(name, stretches[key]) for name, key in _order(layer_kinds) if key in stretches]
    state = measured.optimizer_state
    return parts, state[-1] + sum(state[kind] for kind in layer_kinds)


def _order(layer_kinds: list[int]) -> list[tuple[str, _Key]]:
    """Return the parts of a step in order: the name of each, and the key of its measurement."""
    layers = list(enumerate(layer_kinds))
    order: list[tuple[str, _Key]] = [("embedding", ("embedding", -1))]
    for number, kind in layers:
        order.append((f"layer {number}, forward", ("forward", kind)))
    for name in ("logits", "casts", "head"):
        order.append((name, (name, -1)))
    for number, kind in reversed(layers):
        order.append((f"layer {number}, backward", ("backward", kind)))
    for name in ("embedding, backward", "optimiser"):
        order.append((name, (name, -1)))
    return order


def _fill_optimizer_tables(config: TrainConfig) -> None:
    """Run an optimiser on real values, so that the tables that it keeps have values."""
    p = nn.Parameter(torch.zeros(4096, dtype=torch.float32, device="cpu"))  # (4096,)
    p.grad = torch.zeros_like(p)
    new_optimizer(nn.Module(), {"p": p}, config).step()


def _walk(model: CausalLM, kinds: list[int], config: TrainConfig) -> _Measured:
    """Measure a step of a small model with one layer of each kind."""
    sample = _sample(model, kinds)
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        _move_to_fake_cpu(sample)
        return _run(sample, kinds, config, meter)


def _layer_kinds(model: CausalLM) -> list[int]:
    """Return the kind of each layer: the number of the first layer that takes the same memory.

    The layer before must be of the same sort too, because its output is freed in this layer. A
    layer that does not rotate q and k takes as much memory as one that does.
    """
    trains_below = _is_trainable(model.get_input_embeddings())
    first: dict[Any, int] = {}
    kinds = []
    sort_before = -1
    layers = zip(model.model.layers, model.config.layer_types, strict=True)
    for number, (layer, layer_type) in enumerate(layers):
        parts = tuple(
            (name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()
        )
        sort = first.setdefault((layer_type, trains_below, parts), number)
        kinds.append(first.setdefault((sort_before, sort), number))
        trains_below = trains_below or _is_trainable(layer)
        sort_before = sort
    return kinds


def _is_trainable(module: nn.Module) -> bool:
    """Return True if any parameter of a module requires a gradient."""
    return any(p.requires_grad for p in module.parameters())


def _sample(model: CausalLM, numbers: list[int]) -> CausalLM:
    """Return a model of some layers only, which shares nothing with `model`."""
    small = copy.copy(model)
    small._modules = dict(model._modules)
    small.model = copy.copy(model.model)
    small.model._modules = dict(model.model._modules)
    small.model.layers = nn.ModuleList(model.model.layers[i] for i in numbers)
    small.config = model.config.of_layers(numbers)
    return copy.deepcopy(small)


def _move_to_fake_cpu(model: CausalLM) -> None:
    """Replace all parameters by ones on the CPU, in a FakeTensorMode; shared ones stay shared."""
    replacements: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in replacements:
                data = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                replacements[id(p)] = nn.Parameter(data, p.requires_grad)
            module._parameters[name] = replacements[id(p)]


class _Recorder:
    """Divides the measurements of the meter into the parts of a step."""

    def __init__(self, meter: Meter, parameters: list[nn.Parameter]) -> None:
        self.meter = meter
        self.parameters = parameters
        self.stretches: dict[_Key, Stretch] = {}
        self.forward = True
        self._current: _Key = ("start", -1)

    def begin(self, name: str, kind: int = -1) -> None:
        """End the current part, and begin the next one."""
        gradients = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
        self.stretches[self._current] = self.meter.stretch(gradients)
        self._current = (name, kind)
        self.meter.layer_kind = kind

    def attach(self, model: CausalLM, kinds: list[int]) -> None:
        """Add hooks between layers; in backward they run when the gradient of an output arrives."""
        layers = [model.get_input_embeddings(), *model.model.layers]
        following: list[_Key] = [*(("forward", kind) for kind in kinds), ("logits", -1)]
        backward: list[_Key] = [
            ("embedding, backward", -1),
            *(("backward", kind) for kind in kinds),
        ]
        for layer, after, before in zip(layers, following, backward, strict=True):
            layer.register_forward_hook(self._boundary(after, before))

    def _boundary(self, after: _Key, before: _Key) -> Callable[..., None]:
        """Return a hook that begins `after` in forward, and `before` in backward."""

        def arrive(gradient: Tensor) -> None:
            self.begin(*before)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not self.forward:  # gradient checkpointing runs forward again, within backward
                return
            self.begin(*after)
            if output.requires_grad:
                output.register_hook(arrive)

        return hook


def _run(model: CausalLM, kinds: list[int], config: TrainConfig, meter: Meter) -> _Measured:
    """Run a step of the small model under the meter."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    autocast, _ = precision_of(model, config, torch.device("cpu"))
    optimizer = new_optimizer(model, parameters, config)
    shape = (config.per_device_train_batch_size, config.max_length)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),  # (B, T)
        "labels": torch.zeros(shape, dtype=torch.long),  # (B, T)
    }
    recorder = _Recorder(meter, list(parameters.values()))
    recorder.attach(model, kinds)
    with switched_to_training(model, config.gradient_checkpointing):
        for _ in range(config.gradient_accumulation_steps):
            recorder.forward = True
            recorder.begin("embedding")
            with autocast:
                loss, _ = SFT().loss(model, batch)
                recorder.begin("casts")
            recorder.forward = False
            recorder.begin("head")
            loss.backward()
            del loss
            recorder.begin("between")
        optimizer.step()  # allocates the state, which exists before the step that is measured
        recorder.begin("optimiser")
        nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm or float("inf"))
        optimizer.step()
        recorder.begin("end")
    return _Measured(recorder.stretches, _optimizer_state(optimizer, model, kinds))


def _optimizer_state(
    optimizer: torch.optim.Optimizer, model: CausalLM, kinds: list[int]
) -> Counter[int]:
    """Return the bytes of the optimiser's state by kind of layer, -1 outside all layers."""
    kind_by_parameter = {}
    for kind, layer in zip(kinds, model.model.layers, strict=True):
        for p in layer.parameters():
            kind_by_parameter[id(p)] = kind
    sizes: Counter[int] = Counter()
    for p, values in optimizer.state.items():
        size = sum(t.nbytes for t in values.values() if isinstance(t, Tensor))
        sizes[kind_by_parameter.get(id(p), -1)] += size
    return sizes
