"""How texts sorted by length are cut into forward passes: the least padding for the fewest passes.

Shapes: N texts, F forward passes.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Passes:
    """What forward passes may hold and what they cost.

    Attributes:
        budget: Tokens of a pass at most, padding included. A text longer than that is a pass of its own.
        overhead: What a pass costs beside its tokens, in tokens.
    """

    budget: int
    overhead: int

    def cut(self, sizes: Array, kinds: Array) -> Array:
        """First text, last text + 1 and kind (F, 3) of each pass, such that their cost is least.

        Args:
            sizes: (N,) tokens of each text, longest first within a kind.
            kinds: (N,) kind of each text, ascending; texts of two kinds share no pass.
        """
        bounds = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
        found = []
        for begin, stop in pairwise(bounds):
            for first, end in self.cut_kind(sizes[begin:stop]):
                found.append((begin + first, begin + end, kinds[begin]))
        return np.array(found, np.int64)

    def cut_kind(self, sizes: Array) -> list[tuple[int, int]]:
        """First text and last text + 1 of each pass over texts of one kind."""
        return cut_forwards(sizes, self.budget, self.overhead)

    def num_tokens(self, sizes: Array, forwards: Array) -> int:
        """Tokens that passes (F, 3) compute, padding included."""
        first, end, _ = forwards.T
        return int(((end - first) * sizes[first]).sum())


class WholePasses(Passes):
    """One pass for all texts of a kind, for students that take them without padding."""

    def __init__(self) -> None:
        super().__init__(budget=0, overhead=0)

    def cut_kind(self, sizes: Array) -> list[tuple[int, int]]:
        """One pass."""
        return [(0, len(sizes))]

    def num_tokens(self, sizes: Array, forwards: Array) -> int:
        """As many as there are."""
        return int(sizes.sum())


class PackedPasses(Passes):
    """As few passes as the budget allows, for students whose texts stand in one row without padding."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget, overhead=0)

    def cut_kind(self, sizes: Array) -> list[tuple[int, int]]:
        """Each pass takes the next texts that it has room for."""
        ends = np.cumsum(sizes)
        cuts, first, taken = [], 0, 0
        while first < len(sizes):
            end = max(int(np.searchsorted(ends, taken + self.budget, side="right")), first + 1)
            cuts.append((first, end))
            first, taken = end, int(ends[end - 1])
        return cuts

    def num_tokens(self, sizes: Array, forwards: Array) -> int:
        """As many as there are."""
        return int(sizes.sum())


def cut_forwards(sizes: Array, budget: int, overhead: int) -> list[tuple[int, int]]:
    """First text and last text + 1 of each forward pass, such that their cost is least.

    A pass costs its tokens, each text padded to the longest, and `overhead`. A text longer than the budget is a pass
    of its own.

    Args:
        sizes: (N,) tokens of each text, longest first.
        budget: Tokens of a pass at most, padding included.
        overhead: In tokens.
    """
    # Texts of one length are interchangeable: the best cuts lie between lengths, and inside one only for the budget.
    lengths, firsts = np.unique(-np.maximum(sizes, 1), return_index=True)
    lengths, bounds = -lengths, np.append(firsts, len(sizes))
    least, cut_at = np.zeros(len(bounds)), np.zeros(len(bounds), np.int64)
    for stop in range(1, len(bounds)):
        texts = bounds[stop] - bounds[:stop]
        costs = least[:stop] + texts * lengths[:stop]
        costs += overhead * -(-texts // np.maximum(budget // lengths[:stop], 1))
        cut_at[stop] = costs.argmin()
        least[stop] = costs[cut_at[stop]]
    cuts: list[tuple[int, int]] = []
    stop = len(bounds) - 1
    while stop:
        begin = int(cut_at[stop])
        first, end = int(bounds[begin]), int(bounds[stop])
        passes = -(-(end - first) // max(budget // int(lengths[begin]), 1))
        edges = [first + (end - first) * part // passes for part in range(passes + 1)]
        cuts += reversed(list(pairwise(edges)))
        stop = begin
    return cuts[::-1]
