"""The texts of a store, read from their mapped shards when they are asked for."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Array = np.ndarray[Any, Any]


class Texts(Sequence[str]):
    """A sequence of all texts by entry id; holds none of them in memory.

    Attributes:
        starts: Id of the first entry of each shard, and the number of entries at the end.
    """

    def __init__(self, sizes: Sequence[int], column_of: Callable[[int], pa.Array]) -> None:
        """Read from shards.

        Args:
            sizes: Texts in each shard.
            column_of: Gives the column of texts of a shard by its number.
        """
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._column_of = column_of

    def __len__(self) -> int:
        return int(self.starts[-1])

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """The text of one entry, or a list of them for a slice."""
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        entry = index + len(self) if index < 0 else index
        if not 0 <= entry < len(self):
            raise IndexError(f"entry {index} is out of range: the store holds {len(self)} texts")
        return self.take(np.array([entry]))[0]

    def take(self, ids: Array) -> list[str]:
        """The texts of the entries `ids`, (N,) integers in any order, repeats allowed."""
        texts: list[str] = self.to_arrow(ids).to_pylist()
        return texts

    def num_characters(self) -> Array:
        """How long each text is, (N,) int32."""
        shards = range(len(self.starts) - 1)
        lengths = [pc.utf8_length(self._column_of(shard)).to_numpy().astype(np.int32) for shard in shards]
        return np.concatenate(lengths)

    def to_arrow(self, ids: Array) -> pa.Array:
        """As `take`, as an Arrow array of large strings; no text passes through Python.

        Raises:
            IndexError: When an id is out of range.
        """
        if not len(ids):
            return pa.array([], type=pa.large_string())
        if ids.min() < 0 or ids.max() >= len(self):
            raise IndexError(f"ids from {ids.min()} to {ids.max()}, the store holds {len(self)} texts")
        order, pieces = by_shard(ids, self.starts)
        parts = [self._column_of(shard).take(pa.array(local)) for shard, _, local in pieces]
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return pa.concat_arrays(parts).take(pa.array(places))


def by_shard(ids: Array, starts: Array) -> tuple[Array, list[tuple[int, slice, Array]]]:
    """The order that sorts entries, and what each shard has of them then, so that it is read from its start to its end.

    Args:
        ids: Of the entries, (N,) integers.
        starts: Id of the first entry of each shard, and the number of entries at the end.

    Returns:
        The order (N,); and for each shard that has any its number, which of the sorted entries it has, and their
        places in it.
    """
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    bounds = enumerate(pairwise(np.searchsorted(ordered, starts)))
    return order, [
        (shard, slice(first, last), ordered[first:last] - starts[shard])
        for shard, (first, last) in bounds
        if first < last
    ]
