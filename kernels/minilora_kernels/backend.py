"""Which code runs on a device, chosen loudly.

    device              path        why
    cpu                 cpu         torch_cpu.py, bit-equal to the reference; c/nf4.py goes first, once it is
    cuda, also ROCm     triton      nf4_*.py, bit-equal to the reference; others of triton/ for training
    other, or triton    reference   plain torch runs anywhere; announced once, because it is slow
      not installed
    meta                none        shapes only

MINILORA_NF4=reference forces the specification everywhere; =cpu (without C) and =triton insist on theirs, the latter
also on CPU tensors if TRITON_INTERPRET=1 makes Triton run there, slowly, in numpy.
"""

import os
import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch

ENVIRONMENT = "MINILORA_NF4"


def path_for(device: torch.device) -> str:
    """What runs on `device`: "cpu", "triton" or "reference". Raises ValueError if MINILORA_NF4 cannot be obeyed."""
    wanted = os.environ.get(ENVIRONMENT, "auto")
    if wanted not in ("auto", "reference", "cpu", "triton"):
        raise ValueError(
            f"{ENVIRONMENT}: expected auto, reference, cpu or triton, got {wanted!r}; unset it or choose one"
        )
    if wanted == "cpu" and device.type != "cpu":
        raise ValueError(f"{ENVIRONMENT}=cpu: expected a CPU tensor, got one on {device}; move it, or unset it")
    if wanted == "triton" and not (find_spec("triton") and (device.type == "cuda" or _interpreted(device))):
        raise ValueError(
            f"{ENVIRONMENT}=triton: got a tensor on {device}, triton {'' if find_spec('triton') else 'not '}installed; "
            "Triton runs on a GPU, or on CPU tensors with TRITON_INTERPRET=1 set before the start; change one of them"
        )
    if wanted == "auto" and device.type == "cuda" and find_spec("triton"):
        wanted = "triton"
    elif wanted == "auto" and device.type != "cpu":
        _announce(device.type, "in plain torch", "no triton" if device.type == "cuda" else "no kernel for it")
        return "reference"
    if wanted == "triton" and device.type == "cuda" and _interpreted():
        _announce(device.type, "in Triton's interpreter", "TRITON_INTERPRET is set")
    return "cpu" if wanted == "auto" else wanted


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on `device`, for who has a plain form that runs anywhere and nothing to announce."""
    automatic = os.environ.get(ENVIRONMENT, "auto") == "auto"
    return bool(device.type == "cuda" and find_spec("triton")) if automatic else path_for(device) == "triton"


def _interpreted(device: torch.device | None = None) -> bool:
    from minilora_kernels.triton.launch import interpreted

    return (device is None or device.type == "cpu") and interpreted()


@lru_cache
def _announce(kind: str, how: str, why: str) -> None:
    warnings.warn(f"minilora: NF4 on {kind!r} runs {how}, slowly: {why}", stacklevel=5)
