"""Label names of a classifier, which its adapter file keeps.

Without them, a head made with other labels, or with the same labels in another order, would give
the answers of one class the name of another.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from minilora.lora.registry import lora_configs, lora_layers


def note_labels(model: nn.Module, labels: Sequence[Any]) -> None:
    """Store the label names that the active adapters are trained with, for `save_adapter`.

    Args:
        model: The classifier that is trained.
        labels: The names, in the order of the head's outputs.
    """
    for layer in lora_layers(model).values():
        for name in layer.active:
            lora_configs(model).labels[name] = list(labels)


def labels_of(model: nn.Module) -> list[Any] | None:
    """Return the label names of a classifier in the order of its outputs, or None if unknown.

    They are those of the active adapters, or of the head that `Classify.add_head` made.

    Args:
        model: A model.
    """
    for layer in lora_layers(model).values():
        for name in layer.active:
            if name in lora_configs(model).labels:
                return lora_configs(model).labels[name]
    return getattr(model, "label_names", None)


def check_labels(then: dict[str, Any], model: nn.Module, where: Path) -> None:
    """Compare the label names of an adapter file with those of the model's head.

    Args:
        then: The metadata of the file.
        model: The model; a head of `Classify.add_head` has names.
        where: The adapter's folder, for messages.

    Raises:
        ValueError: The names differ, or their order.
    """
    stored = then.get("labels")
    names = getattr(model, "label_names", None)
    if stored is None or names is None or stored == names:
        return
    difference = "in another order" if sorted(map(str, stored)) == sorted(map(str, names)) else ""
    raise ValueError(
        f"{where}: the classifier was trained with other labels {difference}".rstrip()
        + f": expected {stored}, got {names}. An output would get the name of another class: make "
        f"the head with minilora.Classify({stored})."
    )
