"""One step of training, stretch by stretch: what is held when.

    embedding · layer 0 … layer L-1 forward · logits · head's backward · layer L-1 … layer 0 backward · optimiser

The model is built whole on the meta device, as load_model builds it. Layers that are alike in every shape, and in
whether something below them trains, hold the same, so one of each sort is run (meter.py) and counted as often as it
stands there: a model of 80 layers takes the time of three. It is the CPU's code that runs, on any machine.
"""

import copy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minilora.lora.config import LoRAConfig
from minilora.lora.inject import inject
from minilora.lora.registry import lora_configs
from minilora.losses.sft import SFT
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantize_model import quantize_model
from minilora.tools.memory_plan.meter import Meter, Stretch, Unfilled
from minilora.training.config import TrainConfig
from minilora.training.optim.param_groups import new_optimizer
from minilora.training.precision import precision_of
from minilora.training.runtime import switched_to_training

STATIC = ("packed", "scales", "dense", "adapters")
Step = tuple[list[tuple[str, Stretch]], int]  # the stretches by name, and the bytes of the optimiser's state


def shapes(
    config: DecoderConfig, lora: LoRAConfig | None, dtype: torch.dtype, nf4: tuple[int, bool] | None
) -> CausalLM:
    """The model on the meta device; nf4: (blocksize, double_quant) or None; lora: None trains every parameter."""
    with torch.device("meta"), Unfilled():
        model = CausalLM(config).to(dtype)
        model.tie_weights()
        if nf4 is not None:
            quantize_model(model, *nf4)
        if lora is not None:
            inject(model, lora)
    return model


def stored(model: CausalLM) -> dict[str, int]:
    """Bytes of the weights by STATIC part: 4-bit codes, their scales, what is dense, what trains beside them."""
    found: dict[str, int] = dict.fromkeys(STATIC, 0)
    full = not lora_configs(model)
    codes = {id(m.packed) for m in model.modules() if isinstance(m, NF4Linear)}
    replaced = {p for part in lora_configs(model).parts.originals.values() for p in _parameters(part)}
    for p in {*model.parameters(), *replaced}:
        if p.dtype == torch.uint8:
            found["packed" if id(p) in codes else "scales"] += p.nbytes
        else:
            found["adapters" if p.requires_grad and not full else "dense"] += p.nbytes
    return found


def _parameters(part: Any) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def walked_as(config: TrainConfig) -> TrainConfig:
    """The config whose step takes the same memory, and which is the same for all configs that walk alike."""
    return replace(
        config,
        max_length=-(-config.max_length // 8) * 8,  # padded, as in losses/sft.py
        gradient_accumulation_steps=min(config.gradient_accumulation_steps, 2),  # the second adds to gradients
        optim=config.optim.removeprefix("paged_"),  # the same state, in host memory
    )


def step(model: CausalLM, config: TrainConfig) -> Step:
    """The stretches of a step from the second on, in order, and the bytes of the optimiser's state.

    A batch of per_device_train_batch_size rows of max_length tokens, each of which is learned.
    """
    alike = _alike(model)
    config = walked_as(config)
    _make_tables(config)
    with ThreadPoolExecutor(1) as thread:  # buffers that code keeps, one a thread, have no values here, and end with it
        found, state = thread.submit(_walk, model, sorted(set(alike)), config).result()
    layers = list(enumerate(alike))
    casts = found["casts", -1]  # autocast's 16-bit copies of weights, of every layer, go at its end
    further = sum((alike.count(kind) - 1) * size for kind, size in casts.freed.items() if kind >= 0)
    found["casts", -1] = casts._replace(change=casts.change - further)
    order = [("embedding", "embedding", -1), *((f"layer {i}, forward", "forward", kind) for i, kind in layers)]
    order += [(name, name, -1) for name in ("logits", "casts", "head")]
    order += [(f"layer {i}, backward", "backward", kind) for i, kind in reversed(layers)]
    order += [(name, name, -1) for name in ("embedding, backward", "optimiser")]
    total = state[-1] + sum(state[kind] for kind in alike)
    return [(name, found[key, kind]) for name, key, kind in order if (key, kind) in found], total


def _make_tables(config: TrainConfig) -> None:
    """What an optimiser looks up and keeps, made by a step with values."""
    p = nn.Parameter(torch.zeros(4096, device="cpu"))
    p.grad = torch.zeros_like(p)
    new_optimizer(nn.Module(), {"p": p}, config).step()


def _walk(model: CausalLM, kinds: list[int], config: TrainConfig) -> tuple[dict, Counter[int]]:
    sample = _sample(model, kinds)
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        _without_values(sample)
        return _run(sample, kinds, config, meter)


def _alike(model: CausalLM) -> list[int]:
    """For each layer the number of the first one like it, and after one like it: what a layer leaves is freed there."""
    below = _trains(model.get_input_embeddings())
    first: dict[Any, int] = {}
    found, before = [], -1
    for number, (layer, kind) in enumerate(zip(model.model.layers, model.config.layer_types, strict=True)):
        parts = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        sort = first.setdefault((kind, below, parts), number)
        found.append(first.setdefault((before, sort), number))
        below, before = below or _trains(layer), sort
    return found


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _sample(model: CausalLM, numbers: list[int]) -> CausalLM:
    """A model of these layers only, sharing nothing with `model`."""
    small = copy.copy(model)
    small._modules = dict(model._modules)
    small.model = copy.copy(model.model)
    small.model._modules = dict(model.model._modules)
    small.model.layers = nn.ModuleList(model.model.layers[i] for i in numbers)
    kinds = tuple(model.config.layer_types[i] for i in numbers)
    small.config = replace(model.config, num_hidden_layers=len(numbers), layer_types=kinds)
    return copy.deepcopy(small)


def _without_values(model: CausalLM) -> None:
    """Parameters that say they are on the CPU, in a FakeTensorMode; what was shared stays shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu"), p.requires_grad)
                module._parameters[name] = made[id(p)]


class _Recorder:
    """Cuts what the meter sees into stretches, each under its name and the sort of layer (-1: none)."""

    def __init__(self, meter: Meter, parameters: list[nn.Parameter]) -> None:
        self.meter, self.parameters = meter, parameters
        self.found: dict[tuple[str, int], Stretch] = {}
        self.forward, self._now = True, ("start", -1)

    def begin(self, name: str, kind: int = -1, *_: Any) -> None:
        gradients = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
        self.found[self._now], self._now = self.meter.stretch(gradients), (name, kind)
        self.meter.sort = kind

    def attach(self, model: CausalLM, kinds: list[int]) -> None:
        """Hooks where one layer ends and the next begins; in backward that is where a gradient arrives."""
        layers = [model.get_input_embeddings(), *model.model.layers]
        following = [*(("forward", kind) for kind in kinds), ("logits", -1)]
        within = [("embedding, backward", -1), *(("backward", kind) for kind in kinds)]
        for layer, after, before in zip(layers, following, within, strict=True):
            layer.register_forward_hook(self._passed(after, before))

    def _passed(self, after: tuple[str, int], before: tuple[str, int]) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.forward:  # and not in backward, once more, for gradient checkpointing
                self.begin(*after)
                if output.requires_grad:
                    output.register_hook(lambda gradient: self.begin(*before))

        return hook


def _run(model: CausalLM, kinds: list[int], config: TrainConfig, meter: Meter) -> tuple[dict, Counter[int]]:
    """The stretches of a step of this small model, and the bytes of the optimiser's state by sort of layer."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    autocast, _ = precision_of(model, config, torch.device("cpu"))
    optimizer = new_optimizer(model, parameters, config)
    shape = config.per_device_train_batch_size, config.max_length
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "labels")}
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
        optimizer.step()  # makes its state, which the measured one then has
        recorder.begin("optimiser")
        nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm or float("inf"))
        optimizer.step()
        recorder.begin("end")
    owner = {id(p): kind for kind, layer in zip(kinds, model.model.layers, strict=True) for p in layer.parameters()}
    state: Counter[int] = Counter()
    for p, values in optimizer.state.items():
        state[owner.get(id(p), -1)] += sum(t.nbytes for t in values.values() if isinstance(t, Tensor))
    return recorder.found, state
