"""LoftQ: A and B start as the part of W that 4 bits lose (arXiv:2310.08659, algorithm 1).

    Q_t = NF4(W − s B_{t−1} A_{t−1})
    s B_t A_t = the best approximation of W − Q_t with rank r,          t = 1 … loftq_iter

Q + s B A is therefore nearer to W than Q = NF4(W) alone. Each targeted dense layer is replaced by
an NF4Linear that holds Q, and a warning reports it, because W is then no longer in the model.

With more than one iteration Q differs from NF4(W). An adapter trained with one Q is noise for any
other, so its fingerprint is that of Q, and Q has to be saved together with the adapter
(`ml.save_adapter`, `ml.eject`, `ml.save_model(…, format="bnb-4bit")`). The adapter is a plain LoRA.
PEFT leaves s out: for α ≠ r its B A does not correct W − Q.
"""

import warnings

from torch import nn

from minilora.lora.base_layers.dense_weight import linear_weight
from minilora.lora.base_layers.linear_forward import holds_codes
from minilora.lora.config import LoRAConfig
from minilora.lora.layer import LoRAAdapter
from minilora.lora.low_rank import low_rank
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import dequantize_nf4, quantize_nf4

REPLACED = (
    "LoftQ replaces the targeted layers: they hold NF4(W - s B A) in 4 bits, not W, and eject "
    "leaves them so. Save them together with the adapter: ml.save_adapter(model, …), "
    'ml.eject(model), ml.save_model(model, …, format="bnb-4bit").'
)


def begin(plain: LoRAAdapter, layer: nn.Module, config: LoRAConfig) -> LoRAAdapter:
    """Give a plain adapter the initial values of LoftQ.

    Args:
        plain: A new plain adapter.
        layer: The layer, a dense nn.Linear.
        config: The config; `loftq_config` sets the number of iterations.

    Returns:
        The adapter. Its attribute `new_base` is the NF4Linear that replaces the layer.

    Raises:
        ValueError: The layer is not a dense nn.Linear with values.
    """
    if type(layer) is not nn.Linear or layer.weight.is_meta or holds_codes(layer):
        raise ValueError(
            f"loftq quantises a dense layer, and this is {type(layer).__name__}: "
            "load the model without quantize, inject it first, and plan memory without it."
        )
    W = linear_weight(layer)  # (out, in)
    B = plain.lora_B.data  # (out, r)
    A = plain.lora_A.data  # (r, in)
    residual = layer.weight.detach()  # (out, in); B A is zero at first
    Q = quantize_nf4(residual)
    for iteration in range(config.loftq_config.get("loftq_iter", 1)):
        if iteration > 0:
            residual = (W - plain.scaling * B @ A).to(layer.weight.dtype)  # (out, in)
            Q = quantize_nf4(residual)
        error = W - dequantize_nf4(Q, W.dtype)  # (out, in)
        B, A = low_rank(error, plain.r, plain.scaling)  # (out, r), (r, in)
    plain.lora_A.data = A
    plain.lora_B.data = B
    new_base = NF4Linear(Q, layer.bias, residual).train(layer.training)
    plain.__dict__["new_base"] = new_base  # a plain attribute, not a submodule
    warnings.warn(REPLACED, stacklevel=2)
    return plain
