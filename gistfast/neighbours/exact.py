"""Exact search in blocks: the nearest candidates of every query, and how many score above a threshold.

Scores are made in half precision first, where matrix products are cheap. The error of such a score has a bound, the
*slack*, so all but the few that stand close to what they are compared with are settled; those few are made again in
full precision. What is found therefore depends neither on the first precision nor on the size of a block.

# Q queries, A asks, N candidates, G guide width, K neighbours, E exclusions
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gistfast.guides.precision import cpu_multiplies_bfloat16
from gistfast.neighbours.scorer import Scorer
from gistfast.neighbours.tiles import Block, Tile

Array = np.ndarray[Any, Any]

# Asks and candidates that meet at once: 16 MiB of scores on a CPU.
CPU_TILE = (1024, 8192)
GPU_TILE = (4096, 65_536)
# Candidates whose mean is taken for that of all.
CENTRE_SAMPLE = 4096


@dataclass(frozen=True, kw_only=True)
class Asks:
    """What is wanted of a search; asks of one query share its scores.

    Attributes:
        queries: Position of each ask's query, (A,) int64, ascending.
        thresholds: Candidates that score above are counted, (A,) float32.
        ceilings: Candidates that score above are not kept, (A,) float32.
    """

    queries: Array
    thresholds: Array
    ceilings: Array

    @classmethod
    def nearest(cls, num_queries: int) -> "Asks":
        """The nearest candidates of each query, whatever their score; nothing is counted."""
        anything = np.full(num_queries, np.inf, np.float32)
        return cls(queries=np.arange(num_queries), thresholds=anything, ceilings=anything)

    def __len__(self) -> int:
        return len(self.queries)

    def part(self, first: int, last: int) -> "Asks":
        """The asks from `first` to before `last`."""
        part = slice(first, last)
        return Asks(queries=self.queries[part], thresholds=self.thresholds[part], ceilings=self.ceilings[part])


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found, one row an ask.

    Attributes:
        ids: The nearest candidates, best first, of equal ones the smaller id first; (A, K) int64, -1 for none.
        scores: Their scores, (A, K) float32, -inf for none.
        above: Candidates that score above the threshold, (A,) int64.
        cut: Whether more candidates may be below the ceiling or above the threshold than were seen, (A,) bool.
    """

    ids: Array
    scores: Array
    above: Array
    cut: Array


def search(
    gather: Callable[[Tensor], Tensor],
    queries: Array,
    candidates: Array,
    *,
    scorer: Scorer,
    num_neighbours: int,
    asks: Asks | None = None,
    excluded: tuple[Array, Array] | None = None,
    device: str = "cpu",
    first_dtype: torch.dtype | None = None,
    memory_mib: int = 1024,
    on_queries: Callable[[int], None] | None = None,
) -> Found:
    """The nearest candidates of each ask, exactly.

    Args:
        gather: Gives the vectors (N, G) of ids (N,), such as `store.gather`.
        queries: Ids of the queries, (Q,) int64.
        candidates: Ids of the candidates, (N,) int64, ascending.
        scorer: How vectors become scores.
        num_neighbours: Candidates to keep (K).
        asks: What is wanted; the nearest of each query when None.
        excluded: Position of a query, and id of a candidate that it must not meet: two arrays (E,). Ids that are no
            candidates are passed over.
        device: Where the scores are made.
        first_dtype: Precision of the first look; what the device is quickest in when None.
        memory_mib: What queries and what they found may take; where that is too little, they are searched in turns.
        on_queries: Called with numbers of queries that add up to Q as the search goes on.
    """
    asks = Asks.nearest(len(queries)) if asks is None else asks
    dtype = first_dtype or quickest_dtype(device)
    exclusions = _Exclusions(excluded, candidates)
    num_asks, num_candidates = GPU_TILE if torch.device(device).type == "cuda" else CPU_TILE
    report = _Report(len(queries), len(asks) * len(candidates), on_queries)

    def unit(ids: Array) -> Tensor:
        return scorer.unit(gather(torch.from_numpy(ids)).to(device))

    centre = scorer.centre(unit(candidates[:: max(len(candidates) // CENTRE_SAMPLE, 1)]))

    def tile_of(part: Asks) -> Tile:
        first, last = part.queries[0], part.queries[-1] + 1
        wanted = (part.queries - first, part.thresholds, part.ceilings)
        return Tile(
            unit(queries[first:last]),
            *(torch.from_numpy(values).to(device) for values in wanted),
            excluded=exclusions.of_queries(first, last),
            scorer=scorer,
            num_neighbours=num_neighbours,
            centre=centre,
            dtype=dtype,
        )

    found = [_found([], num_neighbours)]
    in_memory = (memory_mib << 20) // (6 * sum(scorer.widths) + 12 * num_neighbours + 32)
    for turn in _parts(asks, max(in_memory, num_asks)):
        tiles = [tile_of(part) for part in _parts(turn, num_asks)]
        for start in range(0, len(candidates), num_candidates):
            ids = candidates[start : start + num_candidates]
            block = Block(unit(ids), ids, start, centre, dtype)
            for tile in tiles:
                tile.meet(block)
                report.advance(len(tile.query_of) * len(ids))
        found.append(_found(tiles, num_neighbours))
    names = ("ids", "scores", "above", "cut")
    return Found(**{name: np.concatenate([getattr(part, name) for part in found]) for name in names})


def quickest_dtype(device: str) -> torch.dtype:
    """The precision in which a device multiplies matrices quickest, of those whose error stays small."""
    if torch.device(device).type == "cuda":
        return torch.float16
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


def _parts(asks: Asks, size: int) -> Iterator[Asks]:
    for first in range(0, len(asks), size):
        yield asks.part(first, first + size)


def _found(tiles: Sequence[Tile], num_neighbours: int) -> Found:
    def joined(tensors: Sequence[Tensor], empty: Tensor) -> Array:
        array: Array = torch.cat([empty, *(tensor.cpu() for tensor in tensors)]).numpy()
        return array

    above = joined([tile.above for tile in tiles], torch.empty(0, dtype=torch.int64))
    return Found(
        ids=joined([tile.ids for tile in tiles], torch.empty((0, num_neighbours), dtype=torch.int64)),
        scores=joined([tile.scores for tile in tiles], torch.empty((0, num_neighbours))),
        above=above,
        cut=np.zeros(len(above), bool),
    )


class _Exclusions:
    """Pairs of query and candidate that must not meet, by their positions."""

    def __init__(self, excluded: tuple[Array, Array] | None, candidates: Array) -> None:
        queries, ids = (np.empty(0, np.int64),) * 2 if excluded is None else excluded
        positions = np.searchsorted(candidates, ids)
        known = np.flatnonzero(positions < len(candidates))
        known = known[candidates[positions[known]] == ids[known]]
        order = known[np.argsort(queries[known], kind="stable")]
        self._queries, self._positions = queries[order], positions[order]

    def of_queries(self, first: int, last: int) -> tuple[Array, Array]:
        """The pairs of the queries from `first` to before `last`, counted from there; candidates ascend."""
        low, high = np.searchsorted(self._queries, [first, last])
        order = low + np.argsort(self._positions[low:high], kind="stable")
        return self._queries[order] - first, self._positions[order]


class _Report:
    """Turns scores that were made into queries that are done."""

    def __init__(self, num_queries: int, num_scores: int, on_queries: Callable[[int], None] | None) -> None:
        self._num_queries, self._num_scores, self._on_queries = num_queries, num_scores, on_queries
        self._scores = self._queries = 0

    def advance(self, scores: int) -> None:
        """Count scores as made."""
        self._scores += scores
        queries = self._scores * self._num_queries // self._num_scores
        if self._on_queries is not None:
            self._on_queries(queries - self._queries)
        self._queries = queries
