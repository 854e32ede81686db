"""The samples of each training step, a function of (seed, epoch) alone.

An epoch is a seeded permutation of the samples. It is cut into *steps* of

    step size = per_device_train_batch_size · gradient_accumulation_steps · processes

samples, and each step is cut into micro-batches of `per_device_train_batch_size` samples. Steps are
cut first, so batch size · accumulation = 8 · 1, 4 · 2 and 1 · 8 train on the same samples in the
same steps. Every sample occurs once in an epoch; the last step may be smaller than the others.

With `group_by_length` the permutation is sorted by length inside windows of up to 50 steps, and the
steps of a window are shuffled again. A batch then holds samples of similar length and needs little
padding, and the order stays random. An epoch has at least four windows, so that epochs differ.

No number is drawn from a global generator. A resumed run therefore finds its place in the data from
the step number alone.
"""

import hashlib
from collections.abc import Sequence

import torch

from minilora.training.config import TrainConfig

WINDOW = 50  # largest number of steps that are sorted by length together


class BatchPlan:
    """The steps of a run as lists of micro-batches.

    `len(plan)` is the number of steps in an epoch. `plan[step]` is a list of micro-batches, each a
    list of sample indices, for any step ≥ 0. With packing, a sample is a packed row.

    Attributes:
        lengths: Tokens of each sample.
        micro_batch_size: Samples in a micro-batch.
        step_size: Samples in a step, over all processes.
        group_by_length: True if samples of similar length share a step.
        seed: Seed of the permutations.
        identity: The values that give a step number its meaning. A run is resumed only from a
            checkpoint with the same values.
    """

    def __init__(self, lengths: Sequence[int], config: TrainConfig, world_size: int = 1):
        """Prepare the plan.

        Args:
            lengths: Tokens of each sample.
            config: Batch sizes, seed and grouping of the run.
            world_size: Number of processes that share a step.
        """
        self.lengths = list(lengths)
        self.micro_batch_size = config.per_device_train_batch_size
        self.step_size = self.micro_batch_size * config.gradient_accumulation_steps * world_size
        self.group_by_length = config.group_by_length
        self.seed = config.seed
        self.identity = {
            "samples": len(self.lengths),
            "tokens": sum(self.lengths),
            "samples_per_step": self.step_size,
            "group_by_length": config.group_by_length,
            "packing": config.max_length if config.packing else False,
            "seed": config.seed,
        }
        self._epoch = -1  # the epoch that `_steps` belongs to
        self._steps: list[list[int]] = []

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.step_size)

    def __getitem__(self, step: int) -> list[list[int]]:
        epoch, index = divmod(step, len(self))
        if epoch != self._epoch:
            self._steps = self._shuffled_steps(epoch)
            self._epoch = epoch
        samples = self._steps[index]
        if self.group_by_length:
            samples = sorted(samples, key=self.lengths.__getitem__)
        return _chunks(samples, self.micro_batch_size)

    def _shuffled_steps(self, epoch: int) -> list[list[int]]:
        """Return the sample indices of every step of an epoch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group_by_length:
            return _chunks(order, self.step_size)
        steps_per_window = max(1, min(WINDOW, len(self) // 4))
        shuffled = []
        for window in _chunks(order, self.step_size * steps_per_window):
            window.sort(key=self.lengths.__getitem__)
            steps = _chunks(window, self.step_size)
            for index in torch.randperm(len(steps), generator=generator).tolist():
                shuffled.append(steps[index])
        return shuffled


def _chunks(values: list[int], size: int) -> list[list[int]]:
    """Cut a list into consecutive parts of `size` values; the last part may be shorter."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def seed_of(*parts: object) -> int:
    """Derive a seed from its purpose, such as `seed_of(42, "epoch", 3)`.

    Args:
        *parts: Values with a stable `repr` that name the purpose.

    Returns:
        A 32-bit seed, the first bytes of a SHA-256. torch's CPU generator uses 32 bits of a seed.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big")
