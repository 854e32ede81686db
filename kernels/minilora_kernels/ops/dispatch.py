"""Choice of the implementation of a fused operation: Triton on a GPU, C on a CPU, or torch.

An operation asks `use_triton` first. Otherwise it calls the function of c/bindings.py, which
returns None where no compiled code fits, and then runs its loop in torch. MINILORA_STEPS=torch
switches Triton and C off. The loss of the head (cross_entropy.py) and 8-bit AdamW (adamw_8bit.py)
call their kernels directly.
"""

import torch
from torch import Tensor, nn

from minilora_kernels.backend import has_kernels
from minilora_kernels.c import bindings

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def use_triton(*tensors: Tensor) -> bool:
    """Return True if a Triton kernel takes the tensors of an operation.

    Args:
        *tensors: All tensors of the operation.

    Returns:
        True for tensors that are not of a subclass, of one dtype in DTYPES, and on one device on
        which kernels run.
    """
    first = tensors[0]
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return False
        if tensor.dtype != first.dtype or tensor.device != first.device:
            return False
    return first.dtype in DTYPES and bindings.wanted() and has_kernels(first.device)
