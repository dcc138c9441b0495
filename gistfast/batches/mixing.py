"""Batches of several stores in one epoch; none mixes rows of two stores, whose guides may differ.

The two ways, and their names, are sentence-transformers' own. What is added: the order follows from seed and epoch
alone, and where several processes take a step together all of them take it in the same store.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers.base import sampler as library
from torch.utils.data import ConcatDataset

from gistfast.batches.orders import Array
from gistfast.batches.samplers import EvenBatchSampler


class ProportionalBatchSampler(library.ProportionalBatchSampler):
    """Every batch of every store, the stores in random order: each in proportion to its batches."""

    def __iter__(self) -> Iterator[list[int]]:
        """The numbers of the rows of each batch, counted through the concatenated stores."""
        counts = [_num_steps(sampler) for sampler in _samplers(self)]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        visit = torch.randperm(sum(counts), generator=generator).numpy()
        yield from _steps(self, np.repeat(np.arange(len(counts)), counts)[visit])


class RoundRobinBatchSampler(library.RoundRobinBatchSampler):
    """One step of each store in turn, until the store with the fewest is used up; other rows in each epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        """The numbers of the rows of each batch, counted through the concatenated stores."""
        counts = [_num_steps(sampler) for sampler in _samplers(self)]
        yield from _steps(self, np.tile(np.arange(len(counts)), min(counts)))


MIXERS: dict[str, type[ProportionalBatchSampler | RoundRobinBatchSampler]] = {
    "proportional": ProportionalBatchSampler,
    "round_robin": RoundRobinBatchSampler,
}


def _samplers(mixer: Any) -> Sequence[EvenBatchSampler]:
    return cast(Sequence[EvenBatchSampler], mixer.batch_samplers)


def _num_steps(sampler: EvenBatchSampler) -> int:
    return len(sampler) // sampler.processes


def _steps(mixer: Any, stores: Array) -> Iterator[list[int]]:
    """The batches of a step of each of `stores`, (steps,) numbers of stores."""
    samplers = _samplers(mixer)
    begun = [iter(sampler) for sampler in samplers]
    offsets = [0, *cast(ConcatDataset[Any], mixer.dataset).cumulative_sizes]
    for store in stores.tolist():
        for batch in islice(begun[store], samplers[store].processes):
            yield [row + offsets[store] for row in batch]
