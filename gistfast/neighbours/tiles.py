"""One tile of an exact search: a few asks that meet one block of candidates after another.

# Q queries, A asks, N candidates of a block, G guide width, K neighbours, H groups looked at, P pairs left open
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from gistfast.neighbours.scorer import Scorer

Array = np.ndarray[Any, Any]

# Candidates whose best score is looked at first.
GROUP = 128
# An ask that leaves a larger share of a block open is looked at again in full precision: that costs less.
CROWDED_SHARE = 1 / 64
# Hits of an ask that are merged at once.
ROOM = 64


class Block:
    """Vectors of candidates, as they are, and rounded after the centre was taken off.

    Texts of one corpus have a direction in common, which makes scores large and tells nothing. Without it the
    vectors are shorter, and so are the errors of what is computed with them.

    Attributes:
        ids: Their entry ids, (N,), ascending.
        start: Position of the first among all candidates.
        fine: Unit vectors, (N, G).
        coarse: The same less the centre, rounded, then zeros up to whole groups, (N + padding, G).
        rounding: The longest difference that rounding made.
        length: The longest vector of `coarse`.
    """

    def __init__(self, vectors: Tensor, ids: Array, start: int, centre: Tensor, dtype: torch.dtype) -> None:
        """Round unit vectors (N, G) to `dtype`; the centre is (G,)."""
        self.ids = torch.from_numpy(ids).to(vectors.device)
        self.start = start
        self.fine = vectors
        coarse, self.rounding = rounded(vectors - centre, dtype)
        self.length = float(coarse.float().norm(dim=1).max())
        self.coarse = pad(coarse, (0, 0, 0, -len(ids) % GROUP))


def rounded(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The vectors (N, G) in `dtype`, and the length of the longest difference that it made."""
    coarse = vectors.to(dtype)
    return coarse, float((vectors - coarse).norm(dim=1).max())


def flags_a_row(flags: Tensor) -> Tensor:
    """How many of each row's GROUP flags are set, (H,) int64; eight are added at a time, as bytes of a long."""
    eights = flags.view(torch.int64).sum(dim=1)
    return eights.view(torch.uint8).view(len(flags), 8).sum(dim=1)


@dataclass(frozen=True)
class Error:
    """How far a rough score can be from the true one: `base` plus `relative` times the score."""

    base: float
    relative: float

    def at(self, scores: Tensor) -> Tensor:
        """The bound at these scores, which may be infinite."""
        return self.base + self.relative * scores.abs().clamp(max=2)


class Tile:
    """What a few asks have found so far.

    Attributes:
        query_of: Position of each ask's query among the tile's, (A,).
        scores: Best first, (A, K); -inf where fewer were found.
        ids: Of the same, (A, K); -1 where fewer were found.
        above: Candidates above each ask's threshold, (A,).
    """

    def __init__(
        self,
        vectors: Tensor,
        query_of: Tensor,
        thresholds: Tensor,
        ceilings: Tensor,
        *,
        excluded: tuple[Array, Array],
        scorer: Scorer,
        num_neighbours: int,
        centre: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """Begin with nothing found.

        Args:
            vectors: Unit vectors of the queries, (Q, G).
            query_of: (A,) int64, ascending.
            thresholds: (A,) fp32.
            ceilings: (A,) fp32.
            excluded: Position of a query of the tile, and position of a candidate that it must not meet; the
                candidates in ascending order.
            scorer: How vectors become scores.
            num_neighbours: Candidates to keep (K).
            centre: What is taken off the candidates, (G,).
            dtype: Precision of the first look.
        """
        device, num_asks = vectors.device, len(query_of)
        self.query_of = query_of
        self.scores = torch.full((num_asks, num_neighbours), -torch.inf, device=device)
        self.ids = torch.full((num_asks, num_neighbours), -1, device=device)
        self.above = torch.zeros(num_asks, dtype=torch.int64, device=device)
        self._fine = vectors
        self._coarse, self._rounding = rounded(vectors, dtype)
        self._thresholds, self._ceilings = thresholds, ceilings
        # What rough scores lack of true ones.
        self._shifts = (vectors @ centre)[query_of]
        self._excluded = excluded
        self._scorer = scorer
        self._one_ask_each = torch.equal(query_of, torch.arange(len(vectors), device=device))

    def meet(self, block: Block) -> None:
        """Look at every candidate of the block; blocks come in ascending order."""
        rough = self._rough_scores(block)
        rows = torch.arange(len(self.query_of), device=rough.device)
        is_last_look = self._coarse.dtype == torch.float32
        limit = len(block.ids) if is_last_look else int(CROWDED_SHARE * len(block.ids))
        crowded = self._look(rough, rows, block, self._shifts, self._error_with(block), limit)
        if len(crowded):
            precise = self._scorer.block(self._fine[self.query_of[crowded]], block.fine)
            precise = pad(precise, (0, rough.shape[1] - precise.shape[1]))
            precise[rough[crowded] == -torch.inf] = -torch.inf
            shifts = torch.zeros_like(self._shifts[crowded])
            self._look(precise, crowded, block, shifts, self._error_in(torch.float32), len(block.ids))

    def _rough_scores(self, block: Block) -> Tensor:
        """Scores (A, N) less the shifts, padded to whole groups; -inf for what an ask must not meet."""
        rough = self._scorer.block(self._coarse, block.coarse)
        rough[:, len(block.ids) :] = -torch.inf
        of_query, of_candidate = self._excluded
        first, last = np.searchsorted(of_candidate, [block.start, block.start + len(block.ids)])
        columns = torch.from_numpy(of_candidate[first:last] - block.start)
        rough[torch.from_numpy(of_query[first:last]).to(rough.device), columns.to(rough.device)] = -torch.inf
        return rough if self._one_ask_each else rough[self.query_of]

    def _error_in(self, dtype: torch.dtype) -> Error:
        """Of scores of exact vectors: fp32 sums have an error that grows with G, the result is rounded to `dtype`."""
        return Error((self._fine.shape[1] + 8) * 2.0**-24, 0.51 * torch.finfo(dtype).eps)

    def _error_with(self, block: Block) -> Error:
        """Of rough scores: by Cauchy and Schwarz, rounding moves a score by no more than it moves the vectors."""
        error = self._error_in(self._coarse.dtype)
        base = error.base + self._rounding * block.length + block.rounding
        if self._fine.is_cuda:
            # Parts of a sum may be added in half precision there.
            base += 4 * error.relative * block.length
        return Error(base, error.relative)

    def _look(self, rough: Tensor, asks: Tensor, block: Block, shifts: Tensor, error: Error, limit: int) -> Tensor:
        """Count and keep what the scores (len(asks), N) settle, score again what they leave open.

        Returns:
            The asks that leave more than `limit` open; nothing was counted or kept for them.
        """
        thresholds, ceilings = self._thresholds[asks] - shifts, self._ceilings[asks] - shifts
        floors = self._floors(rough, asks, ceilings, shifts, error)
        lowest = torch.minimum(floors - error.at(floors), thresholds - error.at(thresholds))
        groups = rough.view(len(asks), -1, GROUP)
        row, group = (groups.amax(dim=2) > lowest[:, None]).nonzero(as_tuple=True)
        values = groups.flatten(0, 1).index_select(0, row * groups.shape[1] + group).float()
        sure = values > (thresholds + error.at(thresholds))[row, None]
        left_open = ~sure & (values > (thresholds - error.at(thresholds))[row, None])
        left_open |= (values > (floors - error.at(floors))[row, None]) & (
            values <= (ceilings + error.at(ceilings))[row, None]
        )
        num_open = torch.zeros(len(asks), dtype=torch.int64, device=row.device)
        num_open.index_add_(0, row, flags_a_row(left_open))
        crowded = num_open > limit
        left_open &= ~crowded[row, None]
        sure &= ~crowded[row, None]
        self.above.index_add_(0, asks[row], flags_a_row(sure))
        hit, column = left_open.nonzero(as_tuple=True)
        self._settle(asks[row[hit]], group[hit] * GROUP + column, sure[hit, column], block)
        return asks[crowded]

    def _floors(self, rough: Tensor, asks: Tensor, ceilings: Tensor, shifts: Tensor, error: Error) -> Tensor:
        """What a true score (len(asks),) must exceed to be kept, as far as it is known; less the shifts.

        An ask that has not found K candidates yet will find K that are no worse than the K-th best rough score.
        """
        num_wanted = self.scores.shape[1]
        if num_wanted == 0:
            return torch.full((len(asks),), torch.inf, device=asks.device)
        floors = self.scores[asks, -1] - shifts
        (new,) = (floors == -torch.inf).nonzero(as_tuple=True)
        if len(new) and rough.shape[1] >= num_wanted:
            ours = rough if len(new) == len(asks) else rough[new]
            surely_kept = (ceilings - error.at(ceilings))[new, None]
            worst = ours.masked_fill(ours > surely_kept, -torch.inf).topk(num_wanted, dim=1).values[:, -1].float()
            floors[new] = worst - error.at(worst)
        return floors

    def _settle(self, asks: Tensor, columns: Tensor, counted: Tensor, block: Block) -> None:
        """Score pairs (P,) of asks and candidates in full precision, both ascending; count and keep them."""
        scores = self._scorer.pairs(self._fine, block.fine, self.query_of[asks], columns)
        is_above = (scores > self._thresholds[asks]) & ~counted
        self.above.index_add_(0, asks, is_above.long())
        if self.scores.shape[1]:
            # Of equal scores the earlier candidate stays, whose id is smaller.
            keep = (scores <= self._ceilings[asks]) & (scores > self.scores[asks, -1])
            self._merge(asks[keep], scores[keep], block.ids[columns[keep]])

    def _merge(self, asks: Tensor, scores: Tensor, ids: Tensor) -> None:
        """Let hits (P,), in the order of their asks and ids, join the best of each ask."""
        _, counts = torch.unique_consecutive(asks, return_counts=True)
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(asks), device=asks.device) - starts.repeat_interleave(counts)
        for first in range(0, int(counts.max()) if len(counts) else 0, ROOM):
            now = (place >= first) & (place < first + ROOM)
            rows, row = torch.unique_consecutive(asks[now], return_inverse=True)
            width = int(place[now].max()) - first + 1
            new_scores = torch.full((len(rows), width), -torch.inf, device=asks.device)
            new_ids = torch.full((len(rows), width), -1, device=asks.device)
            new_scores[row, place[now] - first] = scores[now]
            new_ids[row, place[now] - first] = ids[now]
            best = torch.cat([self.scores[rows], new_scores], dim=1).sort(dim=1, descending=True, stable=True)
            kept = slice(self.scores.shape[1])
            self.scores[rows] = best.values[:, kept]
            self.ids[rows] = torch.cat([self.ids[rows], new_ids], dim=1).gather(1, best.indices[:, kept])
