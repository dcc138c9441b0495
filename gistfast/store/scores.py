"""Guide scores beside a store: one shard of scores for each shard of rows, committed alike."""

from typing import Any

import numpy as np
import pyarrow as pa

from gistfast.errors import StoreError
from gistfast.store.reader import GuideStore
from gistfast.store.shards import fixed_size_lists, pending_shards, replace_shard, write_shard


def pending_scores(store: GuideStore) -> list[int]:
    """Numbers of the shards of rows that have no scores yet, in order."""
    return pending_shards(store.path, store.manifest.scores, store.manifest)


def write_scores(store: GuideStore, shard: int, scores: np.ndarray[Any, Any], *, replace: bool = False) -> bool:
    """Write and commit the guide scores of a shard of rows; False when another process had done so first.

    Args:
        store: The store.
        shard: Number of the shard of rows; `store.rows_of` gives its ids.
        scores: (rows of the shard, C - 1): guide score of the anchor with each other column, as float32.
        replace: Whether they take the place of scores that are there.

    Raises:
        StoreError: When the array has another shape, the disk is full, or the folder cannot be written.
    """
    expected = (store.manifest.plan.rows[shard], len(store.columns) - 1)
    if scores.shape != expected:
        raise StoreError(f"shard {shard} got scores of shape {scores.shape}, expected {expected}")
    field, column = fixed_size_lists("scores", np.ascontiguousarray(scores, dtype=np.float32))
    batch = pa.record_batch([column], schema=pa.schema([field]))
    kind = store.manifest.scores
    recipe = store.manifest.recipe(kind, shard)
    if replace:
        replace_shard(store.path, kind, shard, batch, recipe)
        return True
    return write_shard(store.path, kind, shard, batch, recipe)
