"""Reward models: a number for an answer, learned from pairs of a better and a worse one.

    r(x, y) = W_score · h_T        h_T (D,): hidden state of the last token of prompt x and answer y
    P(y_w is preferred) = sigmoid(r(x, y_w) − r(x, y_l))          Bradley–Terry
    loss = −log sigmoid(r(x, y_w) − r(x, y_l))                    summed over the pairs

y_w is the chosen answer, y_l the rejected one; the rows are those of DPO. Only differences count,
so r has no zero: rewards of different prompts cannot be compared. GRPO compares within a prompt.

    objective = ml.RewardModel()
    objective.add_head(model)
    ml.inject(model, ml.LoRAConfig(task_type="SEQ_CLS", modules_to_save=["score"]))
    ml.train(model, tokenizer, pairs, objective=objective)
    reward = objective.reward_function(model, tokenizer)      # for ml.GRPO(reward=reward)

The head is that of a classifier with one output, and the adapter file is the one that PEFT writes
for its task SEQ_CLS with one label, as TRL's reward models. Means over the pairs are reported:
accuracy (share of pairs whose chosen answer has the higher reward) and margin (its lead).

Source: Bradley and Terry 1952, Biometrika 39; Ouyang et al. 2022, arXiv 2203.02155, eq. 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from minilora.data import encode_dataset
from minilora.data.dataset import Encoded
from minilora.losses.classification import add_score_head, last_token_scores
from minilora.losses.dpo import DPO, Pair
from minilora.losses.sft import padded
from minilora.models.padded_batch import inference


@dataclass(frozen=True)
class RewardModel:
    """Train a model to rate answers as the preferences of the rows do."""

    better: ClassVar[tuple[str, ...]] = ("accuracy", "margin")

    def add_head(self, model: Any, seed: int = 0) -> None:
        """Add a head `score` with one output to a model.

        Call it before `inject`, which makes the head trainable, or before `load_adapter`.

        Args:
            model: A model without a head `score`.
            seed: Seed of the head's weights.

        Raises:
            ValueError: If the model has a layer `score` already.
        """
        add_score_head(model, 1, seed)

    def encode(self, dataset: Any, tokenizer: Any, max_length: int | None) -> Encoded:
        """Encode preference rows as pairs of answers, as DPO does.

        Args:
            dataset: Rows of a form of `losses/preference_rows.py`, or a path.
            tokenizer: The model's tokenizer.
            max_length: Largest number of tokens of prompt and answer; None for no limit.

        Returns:
            A `Pair` for each row, with a report.

        Raises:
            ValueError: If a row is not a preference, no pair is left, or all pairs are equal.
        """
        return DPO().encode(dataset, tokenizer, max_length)

    def collate(self, examples: Sequence[Pair]) -> dict[str, Tensor]:
        """Return the batch of some pairs: all chosen answers, then all rejected ones.

        Args:
            examples: B pairs.

        Returns:
            Tensors (2B, T).
        """
        return DPO().collate(examples)

    def weight(self, batch: dict[str, Tensor]) -> int:
        """Return the number of pairs in a batch.

        Args:
            batch: A batch of `collate`.
        """
        return DPO().weight(batch)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, summed over its pairs.

        Args:
            model: A model with a head `score` of one output.
            batch: A batch of `collate`.

        Returns:
            The sum, an fp32 scalar, and the sums of accuracy and margin.

        Raises:
            ValueError: If the model has no such head.
        """
        chosen, rejected = _rewards(model, batch).chunk(2)  # (B,) each
        margin = chosen - rejected  # (B,)
        # −log sigmoid(r_w − r_l)
        losses = -F.logsigmoid(margin)  # (B,)
        margin = margin.detach()
        return losses.sum(), {"accuracy": (margin > 0).float().sum(), "margin": margin.sum()}

    def score(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Any],
        answers: Sequence[str],
        batch_size: int = 16,
    ) -> list[float]:
        """Return the reward of each answer.

        Args:
            model: A trained reward model.
            tokenizer: Its tokenizer.
            prompts: The prompt of each answer, in the form of the training rows: texts or lists of
                messages.
            answers: The answers.
            batch_size: Answers in one forward pass; changes no result, up to rounding.

        Returns:
            One number for each answer.
        """
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            is_text = isinstance(prompt, str)
            completion = answer if is_text else [{"role": "assistant", "content": answer}]
            rows.append({"prompt": prompt, "completion": completion})
        examples = encode_dataset(rows, tokenizer, None)
        if len(examples) < len(rows):
            raise ValueError(f"answers: {len(rows) - len(examples)} of {len(rows)} have no tokens.")
        rewards: list[float] = []
        with inference(model):
            for start in range(0, len(examples), batch_size):
                batch = padded(examples[start : start + batch_size])
                rewards += _rewards(model, batch).tolist()
        return rewards

    def reward_function(self, model: Any, tokenizer: Any) -> Callable[[Any, str, Any], float]:
        """Return the model as a reward function of `ml.GRPO`.

        Args:
            model: A trained reward model; it is not the model that GRPO trains.
            tokenizer: Its tokenizer.
        """

        def learned_reward(prompt: Any, answer: str, row: Any) -> float:
            return self.score(model, tokenizer, [prompt], [answer])[0]

        return learned_reward


def _rewards(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the reward of each row of a batch, fp32 (B,)."""
    scores = last_token_scores(model, batch)  # (B, outputs)
    if scores.shape[1] != 1:
        raise ValueError(
            f"the model's `score` has {scores.shape[1]} outputs, and a reward is one number: use a "
            "model with the head of RewardModel().add_head."
        )
    return scores.squeeze(1)
