"""Which samples make which step: a function of (seed, epoch) and of nothing else.

An epoch is a seeded permutation, cut into *steps* of batch size x accumulation x processes samples; a step is cut into
micro-batches. Because steps are cut first, 8 x 1, 4 x 2 and 1 x 8 train on the same samples step by step. Every sample
occurs once an epoch; the last step may be smaller.

With `group_by_length` the permutation is sorted inside windows of up to 50 steps (at least four windows an epoch, so
that epochs differ) and the steps of a window are shuffled again: little padding, still in random order.
Nothing is drawn from a global generator, so a resumed run finds its place from the step number alone.
"""

import hashlib
from collections.abc import Sequence

import torch

from minilora.training.config import TrainConfig

WINDOW = 50  # most steps sorted together


class BatchPlan:
    """`len(plan)` steps an epoch; `plan[step]` lists that step's micro-batches of sample indices, for any step >= 0.

    With `packing` a sample is a packed row, the same in every epoch.
    """

    def __init__(self, lengths: Sequence[int], config: TrainConfig, world: int = 1):
        self.lengths, self.micro, self.seed = list(lengths), config.per_device_train_batch_size, config.seed
        self.step_size = self.micro * config.gradient_accumulation_steps * world
        self.group_by_length = config.group_by_length
        self.identity = {  # what a step number refers to, so that no run resumes at another place in the data
            "samples": len(self.lengths),
            "tokens": sum(self.lengths),
            "samples_per_step": self.step_size,
            "group_by_length": config.group_by_length,
            "packing": config.packing and config.max_length,
            "seed": config.seed,
        }
        self._epoch, self._steps = -1, []

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.step_size)

    def __getitem__(self, step: int) -> list[list[int]]:
        epoch, index = divmod(step, len(self))
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._shuffled(epoch)
        samples = self._steps[index]
        if self.group_by_length:
            samples = sorted(samples, key=lambda i: self.lengths[i])
        return [samples[start : start + self.micro] for start in range(0, len(samples), self.micro)]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group_by_length:
            return [order[start : start + self.step_size] for start in range(0, len(order), self.step_size)]
        steps, size = [], self.step_size * max(1, min(WINDOW, len(self) // 4))
        for start in range(0, len(order), size):
            window = sorted(order[start : start + size], key=lambda i: self.lengths[i])
            cut = [window[first : first + self.step_size] for first in range(0, len(window), self.step_size)]
            steps += [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
        return steps


def seed_of(*parts: object) -> int:
    """A 32-bit seed from what it stands for (all that torch's CPU generator uses of a seed)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
