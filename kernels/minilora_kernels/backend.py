"""Choice of the implementation that runs on a device.

    device              path        reason
    cpu                 cpu         torch_cpu.py has the bits of the reference; c/nf4.py comes first
                                    where it is compiled
    cuda, also ROCm     triton      nf4_*.py have the bits of the reference
    cuda, no triton     reference   plain torch runs anywhere; a warning, because it is slow
    any other           reference   the same
    meta                -           shapes only

The environment variable MINILORA_NF4 overrides the choice: "reference" forces the specification
everywhere, "cpu" forces torch_cpu.py without C, and "triton" forces the kernels. With
TRITON_INTERPRET=1 the kernels also run on CPU tensors, slowly, in numpy.
"""

import os
import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch

ENVIRONMENT = "MINILORA_NF4"


def path_for(device: torch.device) -> str:
    """Return the implementation of NF4 that runs on a device.

    Warns once for each kind of device on which the choice is slow.

    Args:
        device: Device of the tensors.

    Returns:
        "cpu", "triton" or "reference".

    Raises:
        ValueError: If MINILORA_NF4 has an unknown value, or names a path that the device cannot
            run.
    """
    requested = os.environ.get(ENVIRONMENT, "auto")
    if requested not in ("auto", "reference", "cpu", "triton"):
        raise ValueError(
            f"{ENVIRONMENT}: expected auto, reference, cpu or triton, got {requested!r}; unset it "
            "or choose one of them"
        )
    if requested == "reference":
        return "reference"
    if requested == "cpu" and device.type != "cpu":
        raise ValueError(
            f"{ENVIRONMENT}=cpu: expected a CPU tensor, got one on {device}; move the tensor, or "
            "unset the variable"
        )
    if requested != "triton" and device.type == "cpu":
        return "cpu"

    installed = bool(find_spec("triton"))
    if requested == "triton" and not (installed and _triton_runs_on(device)):
        raise ValueError(
            f"{ENVIRONMENT}=triton: got a tensor on {device}, triton "
            f"{'installed' if installed else 'not installed'}; Triton runs on a GPU, or on CPU "
            "tensors with TRITON_INTERPRET=1 set before the start; change one of them"
        )
    if requested == "auto" and device.type != "cuda":
        _warn_slow(device.type, "in plain torch", "it has no kernel for this device")
        return "reference"
    if not installed:
        _warn_slow(device.type, "in plain torch", "triton is not installed")
        return "reference"
    if device.type == "cuda" and _interpreter_active():
        _warn_slow(device.type, "in Triton's interpreter", "TRITON_INTERPRET is set")
    return "triton"


def has_kernels(device: torch.device) -> bool:
    """Return True if Triton kernels run on a device.

    Unlike `path_for` it does not warn. It is for operations whose reference implementation in torch
    runs on every device.

    Args:
        device: Device of the tensors.

    Returns:
        True for a GPU with Triton, or where MINILORA_NF4=triton applies.

    Raises:
        ValueError: If MINILORA_NF4 has a value that the device cannot run.
    """
    if os.environ.get(ENVIRONMENT, "auto") == "auto":
        return device.type == "cuda" and bool(find_spec("triton"))
    return path_for(device) == "triton"


def _triton_runs_on(device: torch.device) -> bool:
    """Return True for a GPU, and for the CPU inside Triton's interpreter."""
    if device.type == "cuda":
        return True
    return device.type == "cpu" and _interpreter_active()


def _interpreter_active() -> bool:
    """Return True if kernels run in Triton's interpreter."""
    from minilora_kernels.triton.launch import interpreted

    return interpreted()


@lru_cache
def _warn_slow(device_type: str, where: str, reason: str) -> None:
    """Warn once that NF4 is slow on a kind of device."""
    warnings.warn(
        f"minilora: NF4 on {device_type!r} runs {where}, which is slow: {reason}", stacklevel=5
    )
