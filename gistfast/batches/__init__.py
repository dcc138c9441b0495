"""Which rows meet in a batch: numbers of rows, in the order of a store's training split."""

from gistfast.batches.choice import Batching, StoreBatches
from gistfast.batches.mixing import MixedBatches, Mixing, ProportionalBatchSampler, RoundRobinBatchSampler
from gistfast.batches.samplers import (
    ClusterBatchSampler,
    EvenBatchSampler,
    LengthBatchSampler,
    TaskBatchSampler,
    num_batches,
)

__all__ = [
    "Batching",
    "ClusterBatchSampler",
    "EvenBatchSampler",
    "LengthBatchSampler",
    "MixedBatches",
    "Mixing",
    "ProportionalBatchSampler",
    "RoundRobinBatchSampler",
    "StoreBatches",
    "TaskBatchSampler",
    "num_batches",
]
