"""Context managers for a run: training mode, delayed Ctrl-C, and out-of-memory errors with a plan.

Also the peak memory of a device or process.
"""

import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.training.config import TrainConfig
from minilora_kernels import allocator


@contextmanager
def training_mode(model: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """Put the model into training mode inside the block, and clear memory before and after it.

    The garbage collector ignores the objects that exist before the block (`gc.freeze`), which would
    cost time in every collection.

    Args:
        model: A minilora or transformers model.
        gradient_checkpointing: Recompute activations in backward.

    Yields:
        Nothing.

    Raises:
        ValueError: If the model does not offer gradient checkpointing.
    """
    with switched_to_training(model, gradient_checkpointing):
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()
            allocator.release()


@contextmanager
def switched_to_training(model: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """Put the model into training mode inside the block, and every module back afterwards.

    Args:
        model: A minilora or transformers model.
        gradient_checkpointing: Recompute activations in backward.

    Yields:
        Nothing.

    Raises:
        ValueError: If the model does not offer gradient checkpointing.
    """
    modes = [(module, module.training) for module in model.modules()]
    switched = gradient_checkpointing and not _recomputes(model)
    try:
        if switched:
            _set_checkpointing(model, True)
        model.train()
        yield
    finally:
        if switched:
            _set_checkpointing(model, False)
        for module, training in modes:
            module.training = training


def _recomputes(model: Any) -> bool:
    """Return True if gradient checkpointing is on; ValueError if the model does not offer it."""
    if hasattr(model, "gradient_checkpointing"):  # minilora
        return model.gradient_checkpointing
    if hasattr(model, "gradient_checkpointing_enable"):  # transformers
        return model.is_gradient_checkpointing
    raise ValueError(
        f"gradient_checkpointing: {type(model).__name__} does not offer it. Leave it False."
    )


def _set_checkpointing(model: Any, enabled: bool) -> None:
    """Switch gradient checkpointing of a model that offers it."""
    if hasattr(model, "gradient_checkpointing"):
        model.gradient_checkpointing = enabled
    elif enabled:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block. Only the main thread receives it in any case."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        # None: the handler was not installed from Python
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
        if received:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def memory_explained(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Add a note to an out-of-memory error of the block: the plan, the memory, and a remedy.

    Args:
        model: The model to be trained.
        config: The run, for the memory plan.

    Yields:
        Nothing.
    """
    before = peak_memory(next(model.parameters()).device)
    try:
        yield
    except RuntimeError as error:
        # torch.OutOfMemoryError is a RuntimeError; the CPU's allocator raises a plain one.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            from minilora.tools.memory_plan.shortage import explain

            error.add_note(explain(model, config, before))
        raise


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of `peak_memory`, where the device can.

    Args:
        device: A GPU; other devices keep their peak.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes.

    Args:
        device: A GPU, or the CPU for this process.

    Returns:
        Bytes allocated on the GPU since the reset, or resident in this process since its start; 0
        where the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # no module `resource`
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # bytes there, kilobytes elsewhere
        return peak
    return _vm_hwm() or peak * 1024


def _vm_hwm() -> int:
    """Return VmHWM of this process in bytes, or 0 where the system has no such line.

    Linux starts `ru_maxrss` at the peak of the process that called exec: a child of a large
    process would report its parent's memory. VmHWM counts this process alone.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
