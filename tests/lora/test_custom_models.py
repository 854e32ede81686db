"""Tests of adapters of small models of every kind of layer, as PEFT's tests have them.

The models and configs are the kinds of PEFT's own tests of custom models that are plain LoRA, each
with ranks of 1, 2, 8 and above the layer. Files are exchanged in both directions with equal outputs.
fp32 sums in another order differ by a few roundings of 2⁻²⁴.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import minilora as ml
from helpers.kinds import close, shake


class Chain(nn.Module):
    """Named layers in a row, with tanh between them; a convolution gets the shape that it needs.

    Args:
        shape: Shape of the input of one row, without the batch.
        layers: The layers by name.
    """

    def __init__(self, shape: tuple[int, ...], **layers: nn.Module):
        super().__init__()
        self.shape = shape
        self.order = list(layers)
        self.flat = {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), *self.shape)
        for name in self.order:
            if name in self.flat:
                x = x.flatten(1)
            x = self.get_submodule(name)(x).tanh()
        return x


def block(bias: bool = True) -> nn.Module:
    return Chain((10,), lin0=nn.Linear(10, 10, bias), lin1=nn.Linear(10, 10, bias))


MODELS: dict[str, Any] = {
    "MLP": lambda: Chain((10,), lin0=nn.Linear(10, 20), lin1=nn.Linear(20, 2)),
    "MLP without biases": lambda: Chain(
        (10,), lin0=nn.Linear(10, 20, bias=False), lin1=nn.Linear(20, 2, bias=False)
    ),
    "norms": lambda: Chain(
        (10,),
        norm0=nn.LayerNorm(10),
        lin0=nn.Linear(10, 20),
        norm1=nn.LayerNorm(20),
        lin1=nn.Linear(20, 2),
    ),
    "deep": lambda: Chain(
        (10,), layers=nn.Sequential(block(), block(), block()), last=nn.Linear(10, 2)
    ),
    "embedding and Conv1D": lambda: Chain(
        (10,), emb=nn.Embedding(100, 5), conv1d=Conv1D(1, 5), lin0=nn.Linear(10, 2)
    ),
    "embedding tokens": lambda: Chain(
        (10,), embed_tokens=nn.Embedding(100, 5), lin0=nn.Linear(50, 2)
    ),
    "1d": lambda: Chain((1, 10), conv1d=nn.Conv1d(1, 1, 2), lin0=nn.Linear(9, 2)),
    "1d, wide": lambda: Chain((4, 10), conv1d=nn.Conv1d(4, 16, 2), lin0=nn.Linear(144, 2)),
    "1d, kernel 1": lambda: Chain((1, 10), conv1d=nn.Conv1d(1, 1, 1), lin0=nn.Linear(10, 2)),
    "1d, groups": lambda: Chain(
        (8, 10), conv1d=nn.Conv1d(8, 8, 3, groups=2), lin0=nn.Linear(64, 2)
    ),
    "2d": lambda: Chain((5, 3, 3), conv2d=nn.Conv2d(5, 10, 3), lin0=nn.Linear(10, 2)),
    "2d without a bias": lambda: Chain(
        (5, 3, 3), conv2d=nn.Conv2d(5, 10, 3, bias=False), lin0=nn.Linear(10, 2)
    ),
    "2d, kernel 1": lambda: Chain((1, 3, 3), conv2d=nn.Conv2d(1, 10, 1), lin0=nn.Linear(90, 2)),
    "2d, groups": lambda: Chain(
        (16, 5, 5), conv2d=nn.Conv2d(16, 32, 3, padding=1, groups=2), lin0=nn.Linear(800, 2)
    ),
    "3d": lambda: Chain((5, 3, 3, 3), conv3d=nn.Conv3d(5, 10, 3), lin0=nn.Linear(10, 2)),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0"]}),
    ("MLP", {"target_modules": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "use_rslora": True}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "lora_bias": True, "lora_alpha": 32}),
    ("MLP", {"target_modules": ["lin0"], "bias": "all"}),
    ("MLP", {"target_modules": ["lin0"], "bias": "lora_only"}),
    ("MLP", {"target_modules": "lin0", "use_dora": True}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "use_dora": True, "lora_alpha": 32}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 3}}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "alpha_pattern": {"lin0": 3}}),
    ("MLP without biases", {"target_modules": ["lin0", "lin1"]}),
    ("norms", {"target_modules": ["lin0"], "modules_to_save": ["norm0", "norm1"]}),
    ("deep", {"target_modules": ["lin0", "lin1", "last"]}),
    ("deep", {"target_modules": r".*\.lin1", "modules_to_save": ["last"]}),
    ("deep", {"target_modules": ["lin0"], "exclude_modules": ["layers.1.lin0"]}),
    ("embedding and Conv1D", {"target_modules": ["conv1d"]}),
    ("embedding and Conv1D", {"target_modules": ["emb"]}),
    ("embedding and Conv1D", {"target_modules": ["emb", "conv1d"]}),
    ("embedding and Conv1D", {"target_modules": ["emb"], "modules_to_save": ["lin0"]}),
    ("embedding and Conv1D", {"target_modules": ["emb", "conv1d", "lin0"]}),
    ("embedding tokens", {"target_modules": ["embed_tokens"]}),
    ("1d", {"target_modules": ["conv1d"]}),
    ("1d, wide", {"target_modules": ["conv1d"]}),
    ("1d, kernel 1", {"target_modules": ["conv1d"]}),
    ("1d, groups", {"target_modules": ["conv1d"]}),
    ("2d", {"target_modules": ["conv2d"]}),
    ("2d", {"target_modules": ["conv2d", "lin0"]}),
    ("2d", {"target_modules": ["conv2d"], "lora_bias": True, "lora_alpha": 32}),
    ("2d without a bias", {"target_modules": ["conv2d"]}),
    ("2d, kernel 1", {"target_modules": ["conv2d", "lin0"]}),
    ("2d, groups", {"target_modules": ["conv2d"]}),
    ("2d, groups", {"target_modules": ["conv2d", "lin0"]}),
    ("3d", {"target_modules": ["conv3d"]}),
    ("3d", {"target_modules": ["conv3d", "lin0"]}),
    ("3d", {"target_modules": ["conv3d"], "lora_bias": True, "lora_alpha": 32}),
]
RANKS = (1, 2, 8, 150)  # 150 is above a side of every layer
ALL = [
    pytest.param(kind, fields, r, marks=pytest.mark.slow, id=f"{number}-{kind}-{r}")
    for number, (kind, fields) in enumerate(CASES)
    for r in RANKS
    if not (r == 1 and "groups" in kind)  # r must be a multiple of the groups, in PEFT too
]
SOME = [
    pytest.param("MLP", {"target_modules": ["lin0", "lin1"]}, 24, id="linear"),
    pytest.param("embedding and Conv1D", {"target_modules": ["emb", "conv1d"]}, 8, id="embedding"),
    pytest.param("1d", {"target_modules": ["conv1d"]}, 8, id="1d"),
    pytest.param("2d, groups", {"target_modules": ["conv2d", "lin0"]}, 8, id="groups"),
]


def build(kind: str) -> Any:
    """Return the model with the same random weights every time, in eval mode."""
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def rows(model: Any) -> Tensor:
    """Return three rows of input: token ids for an embedding, values for every other layer."""
    count = 3 * torch.tensor(model.shape).prod()
    if isinstance(next(model.children()), nn.Embedding):
        return (torch.arange(count) * 7 % 100).view(3, -1)
    return torch.linspace(-1, 1, count).view(3, -1)


@pytest.mark.filterwarnings("ignore:r. . of . layers have a rank above")
@pytest.mark.parametrize(("kind", "fields", "r"), SOME + ALL)
def test_files_of_custom_models_are_exchanged_with_peft(tmp_path, kind, fields, r):
    from peft import LoraConfig, PeftModel, get_peft_model

    x = rows(build(kind))
    base = build(kind)(x)
    ours = build(kind)
    ml.inject(ours, ml.LoRAConfig(r=r, **fields))
    close(ours(x), base)  # a new adapter changes nothing; DoRA rounds once more
    with ml.disable_adapters(ours):
        assert torch.equal(ours(x), base)
    expected = shake(ours)(x)
    assert not torch.equal(expected, base)
    ml.save_adapter(ours, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(build(kind), str(tmp_path / "ours")).eval()
    close(loaded(x), expected)

    theirs = shake(get_peft_model(build(kind), LoraConfig(r=r, **fields)), seed=1).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = build(kind)
    ml.load_adapter(again, tmp_path / "theirs")
    close(again(x), theirs(x))
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert ml.count_parameters(again).trainable == trainable
    if "groups" not in kind:
        close(ml.merge(again)(x), copy.deepcopy(theirs).merge_and_unload()(x), 1e-5)
