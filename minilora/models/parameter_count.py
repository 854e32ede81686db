"""How large a model is: three numbers that are easily taken for one another."""

from dataclasses import dataclass

from torch import nn

from minilora.quant.nf4_linear import NF4Linear


@dataclass(frozen=True)
class ParameterCount:
    """`trainable` and `total` count numbers, a 4-bit weight as the dense one it is for; `stored_bytes` is memory."""

    trainable: int
    total: int
    stored_bytes: int

    def __str__(self) -> str:
        share = self.trainable / max(self.total, 1)
        return (
            f"{self.trainable:,} trainable of {self.total:,} parameters ({share:.2%}), "
            f"{self.stored_bytes / 1e6:,.1f} MB stored"
        )


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters, adapters included; a tensor that is used in two places (tied) counts once."""
    parameters = list(model.parameters())
    four_bit = [module for module in model.modules() if isinstance(module, NF4Linear)]
    codes_and_scales = {id(p) for m in four_bit for p in m.parameters(recurse=False) if p is not m.bias}
    total = sum(p.numel() for p in parameters if id(p) not in codes_and_scales)
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=total + sum(m.in_features * m.out_features for m in four_bit),
        stored_bytes=sum(p.nbytes for p in parameters),
    )
