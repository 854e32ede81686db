"""What stands around the loop: modes set and put back, Ctrl-C held off, precision chosen, the first step checked."""

import gc
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data.report import numbers
from minilora.lora.layer import LoRALayer
from minilora.models.padded_batch import inference
from minilora.training.config import TrainConfig
from minilora_kernels import allocator


def check_causal(model: Any) -> None:
    """ValueError for a model that does not read token ids from left to right, such as T5 or an image encoder."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if encodes or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(
            f"train trains causal language models, and {type(model).__name__} is none. Its adapter can be injected and "
            "saved all the same: train it with a loop of your own over the parameters that require grad."
        )


def check_vocabulary(model: Any, tokenizer: Any, sets: Mapping[str, tuple[Any, Any]]) -> None:
    """ValueError if a token of `sets`, {name: (objective, examples)}, has no row in the model's embedding."""
    table: Any = getattr(model, "get_input_embeddings", lambda: None)()
    size = len(tokenizer) if table is None else getattr(table, "base_layer", table).weight.shape[0]
    for name, (objective, examples) in sets.items() if len(tokenizer) > size else ():
        for example in examples:
            if (largest := int(objective.collate([example])["input_ids"].max())) >= size:
                raise ValueError(
                    f"{name}, row {getattr(example, 'row', '?')}: {tokenizer.decode([largest])!r} has id {largest}, "
                    f"the model's embedding {size} rows. Use its own tokenizer, or rows without the tokens added to it."
                )


def unfreeze(model: nn.Module) -> None:
    """Let every parameter train. ValueError, with nothing changed, unless all are the model's own, in fp32.

    fp32 weights that autocast rounds for each product (bf16=True), and not 16-bit weights beside fp32 masters: both
    take 16 bytes a parameter (4 + gradient 4 + AdamW 8; or 2 + 4 + gradient 2 + AdamW 8), but 16-bit gradients round
    at every micro-batch, so that the split of a batch would change the result.
    """
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        raise ValueError(
            'method="full" trains the model\'s own weights, and it has adapters: ml.merge or ml.eject first.'
        )
    if low := [name for name, p in model.named_parameters() if p.dtype != torch.float32]:
        raise ValueError(
            f'method="full" trains every parameter in fp32, and {low[0]} is {model.get_parameter(low[0]).dtype}: load '
            'it with dtype="float32" and without quantize; bf16=True then computes in 16 bits.'
        )
    model.requires_grad_(True)


def check_packing(model: Any) -> None:
    """ValueError unless documents packed into one row get the logits they have alone, through position_ids only.

    Our decoder is told document_ids. Models of transformers are asked: behind a longer document, a short one must
    differ from what it is alone by little (rounding), measured by how much it differs if it sees the longer one.
    """
    if hasattr(model, "hidden"):
        return
    device = next(model.parameters()).device
    ids = torch.arange(1, 25, device=device)[None]  # (1, T)
    positions = [*range(16), *range(8)]
    try:
        with inference(model):
            alone, joined, packed = (
                model(tokens, position_ids=torch.tensor([at], device=device), use_cache=False).logits[0, -8:].float()
                for tokens, at in ((ids[:, 16:], positions[16:]), (ids, range(24)), (ids, positions))
            )
    except TypeError:  # takes no position_ids
        alone = joined = packed = torch.zeros(1)
    off, seen = (packed - alone).abs().max(), (joined - alone).abs().max()
    if not off < seen * (1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1):
        raise ValueError(
            f"packing: {type(model).__name__} lets packed documents see each other (logits move by {off:.2g}; by "
            f"{seen:.2g} if nothing keeps them apart). Leave packing False, or use a model of minilora.load_model."
        )


@contextmanager
def training_mode(model: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """`switched_to_training`, with memory cleared before and after."""
    with switched_to_training(model, gradient_checkpointing):
        gc.collect()
        gc.freeze()  # what is there before training is not looked through again for rubbish
        try:
            yield
        finally:
            gc.unfreeze()
            allocator.release()


@contextmanager
def switched_to_training(model: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """`model.train()`, with gradient checkpointing if asked for; afterwards every module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    ours, theirs = hasattr(model, "gradient_checkpointing"), hasattr(model, "gradient_checkpointing_enable")
    if gradient_checkpointing and not (ours or theirs):
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} does not offer it. Leave it False.")
    switch = gradient_checkpointing and not (model.gradient_checkpointing if ours else model.is_gradient_checkpointing)
    try:
        if switch and ours:
            model.gradient_checkpointing = True
        elif switch:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        yield
    finally:
        if switch and ours:
            model.gradient_checkpointing = False
        elif switch:
            model.gradient_checkpointing_disable()
        for module, training in modes:
            module.training = training


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done. (Only the main thread ever sees it.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def precision_of(
    model: nn.Module, config: TrainConfig, device: torch.device
) -> tuple[AbstractContextManager, torch.amp.GradScaler]:
    """The autocast context and the loss scaler: by default the model's own dtype; fp16 always with a scaler."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad}
    asked = {"bf16": (torch.bfloat16, config.bf16), "fp16": (torch.float16, config.fp16)}
    for name, (dtype, wish) in asked.items():
        if wish is False and dtype in kinds:
            raise ValueError(f'{name}=False, but the weights of the model are {dtype}: load it with dtype="float32".')
        if wish and (other := kinds - {dtype, torch.float32}):
            raise ValueError(f"{name}=True, but the weights of the model are {other.pop()}: leave {name} None.")
    wanted = next((dtype for dtype, wish in asked.values() if wish and kinds != {dtype}), None)
    autocast = torch.autocast(device.type, wanted) if wanted else nullcontext()
    return autocast, torch.amp.GradScaler(device.type, enabled=bool(config.fp16) or torch.float16 in kinds)


def check_finite(step: int, losses: Tensor, norm: Tensor, scale: float, samples: list[list[Any]]) -> None:
    """ValueError if a micro-batch's loss is not finite, or the gradient's norm is not at loss scale 1.

    losses (M,), samples: the M lists of examples. Before anything changes. Above loss scale 1 it is fp16's scaler that
    overflowed: it skips the step and lowers its scale.
    """
    for loss, micro in zip(losses, samples, strict=True):
        if not torch.isfinite(loss):
            packed = [row for example in micro for row, _ in getattr(example, "documents", ())]
            rows = numbers(sorted(packed or (getattr(example, "row", i) for i, example in enumerate(micro))))
            raise ValueError(
                f"step {step}: the loss of {rows} is {loss.item()}. Look at them, lower learning_rate, or train in "
                "bf16 or fp32; at step 1 the weights, or an adapter, already hold NaN."
            )
    if not torch.isfinite(norm) and scale <= 1:
        raise ValueError(f"step {step}: the gradient is {norm.item()} and the loss is not. Train in fp32 to see where.")


def check_gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """ValueError if something that should train got no gradient; run once, after the first backward pass.

    B starts at zero, so the gradient of A is zero at first and that of B is not: an adapter is dead if all are zero.
    """
    dead = [name for name, parameter in parameters.items() if parameter.grad is None]
    for path, layer in model.named_modules():
        for name, adapter in layer.adapters.items() if isinstance(layer, LoRALayer) else ():
            gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
            if gradients and not any(gradient.any() for gradient in gradients):
                dead.append(f"{path}.adapters.{name}")
    if dead:
        names = ", ".join(dead[:3]) + ", ..." * (len(dead) > 3)
        raise ValueError(
            f"step 1: {len(dead)} of the trained parts got no gradient: {names}. The forward pass does not use them "
            "or cuts them off (detach, no_grad): target other modules."
        )


@contextmanager
def memory_explained(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Where memory runs out inside, the error carries a note: what was planned, what there was, what would fit."""
    before = peak_memory(next(model.parameters()).device)
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has none of its own
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            from minilora.tools.memory_plan.shortage import explain

            error.add_note(explain(model, config, before))
        raise


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from here, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU since the reset, or resident in this process since its start; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # has no resource module
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
