"""From a store and the name of a way to batch to the sampler that does it."""

import logging
from collections.abc import Sized
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from gistfast.batches.clusters import cluster_places, default_count
from gistfast.batches.orders import Array, cut
from gistfast.batches.samplers import (
    ClusterBatchSampler,
    EvenBatchSampler,
    LengthBatchSampler,
    TaskBatchSampler,
    num_batches,
)
from gistfast.errors import ConfigError
from gistfast.neighbours.index import import_faiss
from gistfast.store import GuideStore

logger = logging.getLogger(__name__)

Batching = Literal["random", "length", "task", "cluster"]


@dataclass(frozen=True)
class StoreBatches:
    """Makes batch samplers for a store's rows; sentence-transformers takes one as its `batch_sampler`.

    Samplers give numbers of rows in `store.to_dataset("train")`. Held-out rows are not trained on: they are always
    drawn at random, so that evaluation losses compare between the ways to batch.

    Attributes:
        store: The guide store.
        batching: Which rows meet: any ("random"), those of similar length, of one task, or of one cluster.
        clusters: How many, for "cluster"; chosen from rows and batch size when None.
        processes: Batches that meet in a step.
    """

    store: GuideStore
    batching: Batching = "random"
    clusters: int | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        """Find what the batches need.

        Raises:
            ConfigError: When the store does not know the tasks of its rows.
            DependencyError: When faiss is needed and not installed.
        """
        if self.batching == "task" and not self.store.tasks:
            raise ConfigError(
                f"--batching task needs a task for each row, {self.store.path} has none: make the store from a "
                "source with a column task, or choose another --batching"
            )
        if self.batching == "cluster":
            import_faiss("--batching cluster", "choose another --batching")

    def __call__(
        self,
        dataset: Sized,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> EvenBatchSampler:
        """The sampler of a data set of `store.to_dataset`, with what sentence-transformers' trainer gives to one.

        Args:
            dataset: The rows.
            batch_size: Rows of a batch at most.
            drop_last: Whether every batch must be full.
            valid_label_columns: Not used.
            generator: Not used.
            seed: Decides the order, with the epoch, and the clusters.

        Raises:
            ConfigError: When the data set has other rows than the store, or there are too few for the clusters.
            StoreError: When the clusters cannot be written.
        """
        given = (dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        if getattr(dataset, "split", None) == "held_out":
            # Processes share no candidates when they evaluate.
            return EvenBatchSampler(*given)
        if self.batching == "random":
            return EvenBatchSampler(*given, processes=self.processes)
        if self.batching == "length":
            return LengthBatchSampler(*given, keys=row_lengths(self.store), processes=self.processes)
        if self.batching == "task":
            tasks = self._tasks()
            if drop_last:
                self._name_left_out(tasks, batch_size * self.processes)
            return TaskBatchSampler(*given, keys=tasks, processes=self.processes)
        count = self.clusters or default_count(len(dataset), batch_size * self.processes)
        places = cluster_places(self.store, count, seed=seed)
        return ClusterBatchSampler(*given, keys=places, processes=self.processes)

    def num_batches(self, batch_size: int) -> int:
        """Batches of each process in an epoch of the store's training rows; several processes have full ones alone."""
        rows_of_step, drop_last = batch_size * self.processes, self.processes > 1
        if self.batching == "task":
            starts, _ = cut(np.bincount(self._tasks()), rows_of_step, drop_last=drop_last)
            return len(starts)
        return num_batches(int(np.count_nonzero(~self.store.held_out)), rows_of_step, drop_last=drop_last)

    def _tasks(self) -> Array:
        """The number of each training row's task, (R,) int32; 0 for rows without one, who are a task together."""
        tasks: Array = self.store.task_of_rows[~self.store.held_out] + 1
        return tasks

    def _name_left_out(self, tasks: Array, rows_of_step: int) -> None:
        """Log which tasks have too few rows for a full step."""
        sizes = np.bincount(tasks)
        names = ("no task", *self.store.tasks)
        if small := [name for name, size in zip(names, sizes, strict=False) if 0 < size < rows_of_step]:
            logger.warning("fewer rows than a step of %d, so left out: %s", rows_of_step, ", ".join(small))


def row_lengths(store: GuideStore) -> Array:
    """Characters of the longest text of each training row, (R,) int32."""
    lengths = store.texts.num_characters()
    columns = range(len(store.columns))
    longest: Array = np.maximum.reduce([lengths[store.rows[~store.held_out, column]] for column in columns])
    return longest
