"""Batches of several stores in one epoch; none mixes rows of two stores, whose guides may differ.

The two ways, and their names, are sentence-transformers' own. What is added: the order follows from seed and epoch
alone, and where several processes take a step together all of them take it in the same store.
"""

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast

import numpy as np
import torch
from sentence_transformers.base import sampler as library
from torch.utils.data import ConcatDataset

from gistfast.batches.choice import StoreBatches
from gistfast.batches.orders import Array
from gistfast.batches.samplers import EvenBatchSampler

Mixing = Literal["proportional", "round_robin"]


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


MIXERS: dict[Mixing, type[ProportionalBatchSampler | RoundRobinBatchSampler]] = {
    "proportional": ProportionalBatchSampler,
    "round_robin": RoundRobinBatchSampler,
}


@dataclass(frozen=True)
class MixedBatches:
    """Makes batch samplers for the rows of several stores, one after the other; as `StoreBatches` does for one store.

    Of held-out rows all are taken, whatever the mixing.

    Attributes:
        of_stores: How each store is batched.
        mixing: How their batches are mixed.
    """

    of_stores: tuple[StoreBatches, ...]
    mixing: Mixing = "proportional"

    def __call__(
        self,
        dataset: ConcatDataset[Any],
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> ProportionalBatchSampler | RoundRobinBatchSampler:
        """The sampler of the stores' rows, with what sentence-transformers' trainer gives to one.

        Args:
            dataset: The rows of each store, in the order of the stores.
            batch_size: Rows of a batch at most.
            drop_last: Whether every batch must be full.
            valid_label_columns: Not used.
            generator: Not used.
            seed: Decides the order, with the epoch, and the clusters.

        Raises:
            ConfigError: When the rows are not those of the stores, or there are too few for the clusters.
            StoreError: When the clusters cannot be written.
        """
        pairs = zip(self.of_stores, cast(Sequence[Sized], dataset.datasets), strict=True)
        samplers: list[Any] = [batches(rows, batch_size, drop_last, seed=seed) for batches, rows in pairs]
        mixing = "proportional" if getattr(dataset, "split", None) == "held_out" else self.mixing
        return MIXERS[mixing](dataset, samplers, generator, seed)

    def num_batches(self, batch_size: int) -> tuple[int, ...]:
        """Batches of each store in an epoch, of each process."""
        counts = tuple(batches.num_batches(batch_size) for batches in self.of_stores)
        return counts if self.mixing == "proportional" else (min(counts),) * len(counts)


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
