"""LoftQ: A and B begin as what 4 bits lose of W, and the 4 bits as what is left (arXiv 2310.08659, algorithm 1).

    Q_t = NF4(W − s B_{t−1} A_{t−1}),   s B_t A_t = the best approximation of W − Q_t with rank r,   t = 1 … loftq_iter

so that Q + s B A is nearer to W than Q = NF4(W) is. The base is replaced, and says so: each dense layer that is
targeted becomes an NF4Linear that holds Q, and W is gone from the model. With more than one iteration Q is not NF4(W):
an adapter that was trained beside it is noise beside another, so its fingerprint is that of Q, and Q has to be saved
with it (`ml.save_adapter`, `ml.eject`, `ml.save_model(…, format="bnb-4bit")`). The adapter itself is a plain LoRA.
PEFT leaves s out: with α ≠ r its B A is not what W − Q lacks.
"""

import warnings
from typing import Any

from torch import nn

from minilora.lora.config import LoRAConfig
from minilora.lora.layer import LoRAAdapter
from minilora.lora.low_rank import low_rank
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import dequantize_nf4, quantize_nf4

REPLACED = (
    "LoftQ replaces the targeted layers: they hold NF4(W - s B A) in 4 bits, not W, and eject leaves them so. Save "
    'them beside the adapter: ml.save_adapter(model, …), ml.eject(model), ml.save_model(model, …, format="bnb-4bit").'
)


def begin(plain: LoRAAdapter, layer: nn.Module, config: LoRAConfig, _: Any) -> LoRAAdapter:
    """The adapter as LoftQ begins it; its `new_base` is to take the base's place. ValueError for another base."""
    if type(layer) is not nn.Linear or layer.weight.is_meta:
        raise ValueError(
            f"loftq quantises a dense layer by itself, and this is {type(layer).__name__}: load the model without "
            "quantize, inject it first, and plan memory without it."
        )
    W = layer.weight.detach().float()  # (out, in)
    B, A = plain.lora_B.data, plain.lora_A.data
    Q = quantize_nf4(residual := layer.weight.detach())
    for step in range(config.loftq_config.get("loftq_iter", 1)):
        if step:
            Q = quantize_nf4(residual := (W - plain.scaling * B @ A).to(layer.weight.dtype))
        B, A = low_rank(W - dequantize_nf4(Q, W.dtype), plain.r, plain.scaling)
    plain.lora_A.data, plain.lora_B.data = A, B
    plain.__dict__["new_base"] = NF4Linear(Q, layer.bias, residual).train(layer.training)
    warnings.warn(REPLACED, stacklevel=2)
    return plain
