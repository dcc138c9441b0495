"""Which rows meet in a batch.

Rows are drawn at random and nothing is avoided: the loss knows texts by their ids, so a repeated text in a
batch is dropped as a candidate, and no row has to wait for a batch without its duplicates.
"""

import math
from collections.abc import Iterator, Sized
from itertools import pairwise

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler


class EvenBatchSampler(DefaultBatchSampler):
    """Every row once an epoch, in random order, in batches whose sizes differ by one row at most.

    The order follows from seed and epoch alone, so a run that is resumed in any epoch sees the rows that an
    undisturbed one sees. 100 rows in batches of 64 are two batches of 50: neither a tail of 36 rows, whose
    step would count as much as a full one with fewer candidates, nor 36 rows left out. With `drop_last`,
    which several processes need, batches are full and the rest of the epoch's order is left out, other rows
    in each epoch.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        """Take what sentence-transformers' trainer gives to a sampler.

        Args:
            dataset: The rows.
            batch_size: Rows of a batch at most.
            drop_last: Whether every batch must be full.
            valid_label_columns: Not used.
            generator: Not used.
            seed: Decides the order, with the epoch.
        """
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.num_rows = len(dataset)

    def __iter__(self) -> Iterator[list[int]]:
        """The numbers of the rows of each batch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_rows, generator=generator).tolist()
        for first, end in pairwise(self._bounds()):
            yield order[first:end]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return num_batches(self.num_rows, self.batch_size, drop_last=self.drop_last)

    def _bounds(self) -> list[int]:
        if self.drop_last:
            return [index * self.batch_size for index in range(len(self) + 1)]
        return [self.num_rows * index // max(len(self), 1) for index in range(len(self) + 1)]


def num_batches(num_rows: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Batches in an epoch of `num_rows` rows."""
    return num_rows // batch_size if drop_last else math.ceil(num_rows / batch_size)
