"""The objectives of training, one file each, with their equations.

    sft             supervised fine-tuning, the `Objective` protocol, mean losses
    dpo             direct preference optimisation; preference_rows: its forms of rows
    distillation    distillation from a teacher; a penalty for leaving the base
    classification  sequence classification
    grpo            learning from rewards; rewards: the reward functions
    on_policy       prompts and sampled answers, which grpo trains on, and on_policy_distillation
    reward_model    rewards that are learned from preferences

    ml.train(model, tokenizer, rows, config, objective=ml.DPO(beta=0.1))

The training loop knows the `Objective` protocol only.
"""

from minilora.losses.classification import Classify
from minilora.losses.distillation import Distill, KLToBase
from minilora.losses.dpo import DPO, answer_logprobs
from minilora.losses.grpo import GRPO, group_advantages
from minilora.losses.on_policy_distillation import OnPolicyDistill
from minilora.losses.reward_model import RewardModel
from minilora.losses.sft import SFT, Objective, mean_loss, means, token_loss

OBJECTIVES = {
    "sft": SFT,
    "dpo": DPO,
    "distill": Distill,
    "kl_to_base": KLToBase,
    "classify": Classify,
    "grpo": GRPO,
    "on_policy_distill": OnPolicyDistill,
    "reward_model": RewardModel,
}

__all__ = [
    "DPO",
    "GRPO",
    "OBJECTIVES",
    "SFT",
    "Classify",
    "Distill",
    "KLToBase",
    "Objective",
    "OnPolicyDistill",
    "RewardModel",
    "answer_logprobs",
    "group_advantages",
    "mean_loss",
    "means",
    "token_loss",
]
