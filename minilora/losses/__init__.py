"""What else can be learned from a row than its answer: values of the form of `minilora.losses.sft.Objective`.

    ml.train(model, tokenizer, rows, config, objective=ml.DPO(beta=0.1))

One file each, with its equation. The training loop knows none of them.
"""

from minilora.losses.classification import Classify
from minilora.losses.distillation import Distill, KLToBase
from minilora.losses.dpo import DPO
from minilora.losses.sft import SFT

OBJECTIVES = {"sft": SFT, "dpo": DPO, "distill": Distill, "kl_to_base": KLToBase, "classify": Classify}

__all__ = ["DPO", "OBJECTIVES", "SFT", "Classify", "Distill", "KLToBase"]
