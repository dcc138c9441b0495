"""Batch samplers for sentence-transformers' trainer: one class for each way in which rows meet.

Nothing is avoided: the loss knows texts by their ids, so a repeated text in a batch is dropped as a candidate,
and no row has to wait for a batch without its duplicates.
"""

import math
from collections.abc import Iterator, Sized

import numpy as np
import torch
from sentence_transformers.base.sampler import DefaultBatchSampler

from gistfast.batches.orders import (
    Array,
    Batches,
    cut,
    group_batches,
    length_batches,
    neighbour_batches,
    random_batches,
)
from gistfast.errors import ConfigError


class EvenBatchSampler(DefaultBatchSampler):
    """Every row once an epoch, in random order, in batches whose sizes differ by one row at most.

    The order follows from seed and epoch alone, so a run that is resumed in any epoch sees the rows that an
    undisturbed one sees. With `drop_last`, which several processes need, batches are full and the rest of the
    epoch's order is left out, other rows in each epoch.

    Several processes take a step with as many consecutive batches, one each, and may share their candidates: so
    what holds for a batch holds for those of a step together.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        processes: int = 1,
    ) -> None:
        """Take what sentence-transformers' trainer gives to a sampler.

        Args:
            dataset: The rows.
            batch_size: Rows of a batch at most.
            drop_last: Whether every batch must be full.
            valid_label_columns: Not used.
            generator: Not used.
            seed: Decides the order, with the epoch.
            processes: Batches that meet in a step.

        Raises:
            ConfigError: When several processes are to share steps whose batches may differ in size.
        """
        if processes > 1 and not drop_last:
            raise ConfigError(f"{processes} processes need full batches, found drop_last=False: give drop_last=True")
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.num_rows = len(dataset)
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        """The numbers of the rows of each batch."""
        steps = self._steps(torch.Generator().manual_seed(self.seed + self.epoch))
        for start, end in zip(steps.starts.tolist(), steps.ends.tolist(), strict=True):
            rows = steps.rows[start:end]
            for process in range(self.processes):
                # Every n-th row: where a step's rows are sorted, no process gets all the long ones.
                yield rows[process :: self.processes].tolist()

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.processes * self._num_steps()

    @property
    def _rows_of_step(self) -> int:
        return int(self.batch_size) * self.processes

    def _num_steps(self) -> int:
        return num_batches(self.num_rows, self._rows_of_step, drop_last=self.drop_last)

    def _steps(self, generator: torch.Generator) -> Batches:
        return random_batches(self.num_rows, self._rows_of_step, drop_last=self.drop_last, generator=generator)


class _KeyedBatchSampler(EvenBatchSampler):
    """Batches by one number a row, which a subclass gives its meaning."""

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        keys: Array,
        processes: int = 1,
    ) -> None:
        """As `EvenBatchSampler`, with the number of each row.

        Args:
            dataset: The rows.
            batch_size: Rows of a batch at most.
            drop_last: Whether every batch must be full.
            valid_label_columns: Not used.
            generator: Not used.
            seed: Decides the order, with the epoch.
            keys: Number of each row, (R,) integers from 0.
            processes: Batches that meet in a step.

        Raises:
            ConfigError: When the numbers are not those of these rows, or several processes have no full batches.
        """
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed, processes=processes)
        if len(keys) != self.num_rows:
            raise ConfigError(
                f"batches were prepared for {len(keys)} rows, the data set has {self.num_rows}: "
                "give the whole training split of the same store, store.to_dataset('train')"
            )
        # NumPy sorts 16 bits several times as fast as 32.
        self._keys = keys.astype(np.min_scalar_type(int(keys.max(initial=0))))


class LengthBatchSampler(_KeyedBatchSampler):
    """Rows of similar length meet (the keys are lengths); sizes differ by one row at most."""

    def _steps(self, generator: torch.Generator) -> Batches:
        return length_batches(self._keys, self._rows_of_step, drop_last=self.drop_last, generator=generator)


class TaskBatchSampler(_KeyedBatchSampler):
    """Rows of one task meet (the keys are tasks); within a task sizes differ by one row at most."""

    def _num_steps(self) -> int:
        starts, _ = cut(np.bincount(self._keys), self._rows_of_step, drop_last=self.drop_last)
        return len(starts)

    def _steps(self, generator: torch.Generator) -> Batches:
        return group_batches(self._keys, self._rows_of_step, drop_last=self.drop_last, generator=generator)


class ClusterBatchSampler(_KeyedBatchSampler):
    """Rows of one cluster, or of neighbours, meet (the keys are places on a ring); sizes differ by one at most."""

    def _steps(self, generator: torch.Generator) -> Batches:
        return neighbour_batches(self._keys, self._rows_of_step, drop_last=self.drop_last, generator=generator)


def num_batches(num_rows: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Batches in an epoch of `num_rows` rows that may all meet."""
    return num_rows // batch_size if drop_last else math.ceil(num_rows / batch_size)
