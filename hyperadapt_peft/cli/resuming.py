"""A Trainer that goes on after a kill as if nothing had happened."""

from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler


class _EpochSampler(LengthGroupedSampler):
    """Draws its order from the seed and the epoch: a run resumed within an epoch could not find the global state."""

    seed: int

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class ResumableTrainer(Trainer):
    """A Trainer whose batches grouped by length are, after resuming, those of the uninterrupted run."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler = _EpochSampler(sampler.batch_size, lengths=sampler.lengths)
            sampler.seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler.set_epoch(0)  # accelerate does not find it when there are several processes, and they must agree
        return sampler
