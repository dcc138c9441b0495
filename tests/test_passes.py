"""How texts are cut into forward passes."""

import itertools

import numpy as np
import pytest

from gistfast.training.passes import Passes, cut_forwards


def cost(sizes: np.ndarray, cuts: list[tuple[int, int]], overhead: int) -> int:
    return sum(int(sizes[first]) * (end - first) + overhead for first, end in cuts)


def every_cut(length: int) -> list[list[tuple[int, int]]]:
    inner = [itertools.combinations(range(1, length), number) for number in range(length)]
    return [list(itertools.pairwise([0, *edges, length])) for edges in itertools.chain(*inner)]


@pytest.mark.parametrize("overhead", [0, 3, 40])
def test_cuts_between_lengths_cost_least(overhead: int) -> None:
    draws = np.random.default_rng(0)
    for _ in range(5):
        sizes = -np.sort(-draws.choice(np.arange(1, 60), 9, replace=False))
        cuts = cut_forwards(sizes, 10_000, overhead)
        assert cost(sizes, cuts, overhead) == min(cost(sizes, other, overhead) for other in every_cut(len(sizes)))


@pytest.mark.parametrize("sizes", [[7], [300], [5] * 50, [256] * 40 + [30] * 11 + [3], [1, 1, 1], [0, 0]], ids=str)
@pytest.mark.parametrize("budget", [1, 100, 2048])
def test_passes_hold_every_text_once_within_the_budget(sizes: list[int], budget: int) -> None:
    cuts = cut_forwards(np.array(sizes), budget, 24)
    assert [place for first, end in cuts for place in range(first, end)] == list(range(len(sizes)))
    assert all(end - first == 1 or (end - first) * sizes[first] <= budget for first, end in cuts)


def test_kinds_are_cut_apart() -> None:
    sizes, kinds = np.array([9, 8, 9, 8, 8]), np.array([0, 0, 1, 1, 1])
    assert Passes(1000, 1000).cut(sizes, kinds).tolist() == [[0, 2, 0], [2, 5, 1]]


def test_padding_of_mixed_lengths_is_under_five_percent() -> None:
    # Lengths of first lines and of texts cut at 256 tokens: 64 rows.
    draws = np.random.default_rng(0)
    sizes = np.concatenate([draws.lognormal(2.9, 0.5, 64), draws.lognormal(4.6, 0.9, 64)]).clip(5, 256).astype(int)
    sizes = -np.sort(-sizes)
    assert cost(sizes, cut_forwards(sizes, 2048, 24), 0) < 1.05 * sizes.sum()
