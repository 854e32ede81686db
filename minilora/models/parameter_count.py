"""The size of a model in three numbers: trainable parameters, all parameters, stored bytes."""

from dataclasses import dataclass

from torch import nn

from minilora.common import unwrap_model
from minilora.common.notebook import html_table
from minilora.quant.quantized_linear import QuantizedEmbedding, QuantizedLinear


@dataclass(frozen=True)
class ParameterCount:
    """The size of a model.

    Attributes:
        trainable: Number of parameters that require a gradient.
        total: Number of all parameters. A quantised weight counts like the dense weight it
            represents.
        stored_bytes: Memory of all parameters as they are stored.
    """

    trainable: int
    total: int
    stored_bytes: int

    def __str__(self) -> str:
        share = self.trainable / max(self.total, 1)
        return (
            f"{self.trainable:,} trainable of {self.total:,} parameters ({share:.2%}), "
            f"{self.stored_bytes / 1e6:,.1f} MB stored"
        )

    def _repr_html_(self) -> str:
        share = self.trainable / max(self.total, 1)
        rows = [
            ("trainable parameters", f"{self.trainable:,}"),
            ("all parameters", f"{self.total:,}"),
            ("share that trains", f"{share:.2%}"),
            ("stored", f"{self.stored_bytes / 1e6:,.1f} MB"),
        ]
        return html_table([], rows)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters, adapters included. A tensor that is used twice counts once.

    Args:
        model: Any model.

    Returns:
        The number of trainable parameters, of all parameters, and the stored bytes.
    """
    model = unwrap_model(model)
    parameters = list(model.parameters())
    total = 0
    codes_and_scales = set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            stored = [p for name, p in module.named_parameters(recurse=False) if name != "bias"]
            if any(id(parameter) not in codes_and_scales for parameter in stored):
                total += module.weight.shape.numel()
            codes_and_scales.update(id(parameter) for parameter in stored)
    for parameter in parameters:
        if id(parameter) not in codes_and_scales:
            total += parameter.numel()
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=total,
        stored_bytes=sum(p.nbytes for p in parameters),
    )
