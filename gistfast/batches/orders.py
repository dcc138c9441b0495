"""The ways to cut an epoch's rows into batches, on plain arrays: who meets whom.

Each way shuffles first, so that an epoch differs from the last, and draws from the generator alone, so that the
same state gives the same batches.

Shapes: R rows, N batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

# Batches that are sorted by length together: more of them pad less, fewer mix better.
POOL_BATCHES = 64


@dataclass(frozen=True)
class Batches:
    """The batches of an epoch in the order of their visit: the i-th holds `rows[starts[i]:ends[i]]`.

    Attributes:
        rows: Numbers of the rows, (R,) integers, each once.
        starts: Where each batch begins in `rows`, (N,) int64.
        ends: Where it ends, (N,) int64.
    """

    rows: Array
    starts: Array
    ends: Array


def random_batches(num_rows: int, batch_size: int, *, drop_last: bool, generator: torch.Generator) -> Batches:
    """Any row may meet any other."""
    starts, ends = cut([num_rows], batch_size, drop_last=drop_last)
    return Batches(_shuffled(num_rows, generator), starts, ends)


def length_batches(
    lengths: Array, batch_size: int, *, drop_last: bool, generator: torch.Generator, pool: int = POOL_BATCHES
) -> Batches:
    """Rows of similar length meet: the rows of `pool` random batches are sorted by length and dealt out anew.

    Args:
        lengths: Length of each row in any unit, (R,).
        batch_size: Rows of a batch at most.
        drop_last: Whether every batch must be full.
        generator: Decides the order.
        pool: Random batches that are sorted together.
    """
    batches = random_batches(len(lengths), batch_size, drop_last=drop_last, generator=generator)
    rows, num_batches = batches.rows, len(batches.starts)
    if num_batches:
        pools, _ = cut([num_batches], pool, drop_last=False)
        for first, end in pairwise([*batches.starts[pools].tolist(), int(batches.ends[-1])]):
            of_pool = rows[first:end]
            rows[first:end] = of_pool[np.argsort(lengths[of_pool], kind="stable")]
    return _visited_at_random(rows, batches.starts, batches.ends, generator)


def group_batches(groups: Array, batch_size: int, *, drop_last: bool, generator: torch.Generator) -> Batches:
    """A batch holds rows of one group only; within a group the sizes of its batches differ by one row at most.

    Args:
        groups: Number of each row's group, (R,) integers from 0; small types sort faster.
        batch_size: Rows of a batch at most.
        drop_last: Whether every batch must be full: a group with fewer rows is left out of every epoch.
        generator: Decides the order.
    """
    rows = _shuffled_within(groups, generator)
    starts, ends = cut(np.bincount(groups), batch_size, drop_last=drop_last)
    return _visited_at_random(rows, starts, ends, generator)


def neighbour_batches(places: Array, batch_size: int, *, drop_last: bool, generator: torch.Generator) -> Batches:
    """A batch holds rows of one place, or of as many consecutive places as it takes to fill it.

    The places form a ring, which is cut open somewhere else in each epoch.

    Args:
        places: Place of each row on the ring, (R,) integers from 0; small types sort faster.
        batch_size: Rows of a batch at most.
        drop_last: Whether every batch must be full.
        generator: Decides the order.
    """
    rows = _shuffled_within(places, generator)
    cut_open = int(torch.randint(max(len(rows), 1), (), generator=generator))
    starts, ends = cut([len(rows)], batch_size, drop_last=drop_last)
    return _visited_at_random(np.roll(rows, cut_open), starts, ends, generator)


def cut(sizes: Sequence[int] | Array, batch_size: int, *, drop_last: bool) -> tuple[Array, Array]:
    """Where batches begin and end in runs of rows that follow each other; none crosses from run to run.

    A run of 100 rows in batches of 64 at most gives two of 50: neither a tail of 36 rows, whose step would count
    as much as a full one with fewer candidates, nor 36 rows left out.

    Args:
        sizes: Rows of each run.
        batch_size: Rows of a batch at most.
        drop_last: Whether every batch must be full; the rest of a run is left out.

    Returns:
        Starts and ends, (N,) int64 each.
    """
    sizes = np.asarray(sizes, np.int64)
    counts = sizes // batch_size if drop_last else -(-sizes // batch_size)
    run = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(len(run)) - (np.cumsum(counts) - counts)[run]
    first = (np.cumsum(sizes) - sizes)[run]
    if drop_last:
        starts = first + number * batch_size
        return starts, starts + batch_size
    return first + sizes[run] * number // counts[run], first + sizes[run] * (number + 1) // counts[run]


def _shuffled(num_rows: int, generator: torch.Generator) -> Array:
    dtype = torch.int32 if num_rows <= np.iinfo(np.int32).max else torch.int64
    rows: Array = torch.randperm(num_rows, generator=generator, dtype=dtype).numpy()
    return rows


def _shuffled_within(keys: Array, generator: torch.Generator) -> Array:
    """All rows in the order of their keys, rows of one key at random."""
    rows = _shuffled(len(keys), generator)
    ordered: Array = rows[np.argsort(keys[rows], kind="stable")]
    return ordered


def _visited_at_random(rows: Array, starts: Array, ends: Array, generator: torch.Generator) -> Batches:
    visit = _shuffled(len(starts), generator)
    return Batches(rows, starts[visit], ends[visit])
