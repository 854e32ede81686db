"""The objectives of training, one file each, with their equations.

    sft             supervised fine-tuning, the `Objective` protocol, mean losses
    dpo             direct preference optimisation; preference_rows: its forms of rows
    distillation    distillation from a teacher; a penalty for leaving the base
    classification  sequence classification

    ml.train(model, tokenizer, rows, config, objective=ml.DPO(beta=0.1))

The training loop knows the `Objective` protocol only.
"""

from minilora.losses.classification import Classify
from minilora.losses.distillation import Distill, KLToBase
from minilora.losses.dpo import DPO, answer_logprobs
from minilora.losses.sft import SFT, Objective, mean_loss, means, token_loss

OBJECTIVES = {
    "sft": SFT,
    "dpo": DPO,
    "distill": Distill,
    "kl_to_base": KLToBase,
    "classify": Classify,
}

__all__ = [
    "DPO",
    "OBJECTIVES",
    "SFT",
    "Classify",
    "Distill",
    "KLToBase",
    "Objective",
    "answer_logprobs",
    "mean_loss",
    "means",
    "token_loss",
]
