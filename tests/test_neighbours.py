from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gistfast.neighbours import exact as neighbours
from gistfast.neighbours import tiles
from gistfast.neighbours.exact import Asks, Found, search
from gistfast.neighbours.scorer import Scorer

Array = np.ndarray[Any, Any]
WIDTH = 24


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 256 candidates and 64 asks: a store of a thousand makes several."""
    monkeypatch.setattr(neighbours, "CPU_TILE", (64, 256))


def clustered(number: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """Vectors around ten directions: some scores are high, as among real texts."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(10, width))
    vectors = centres[random.integers(10, size=number)] + random.normal(size=(number, width))
    return torch.from_numpy(vectors.astype(np.float16))


def gather_of(vectors: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: vectors[ids]


def reference(
    vectors: torch.Tensor, queries: Array, candidates: Array, asks: Asks, excluded: set[tuple[int, int]], number: int
) -> Found:
    """All scores in double precision, sorted."""
    unit = Scorer((vectors.shape[1],)).unit(vectors).double().numpy()
    scores = (unit[queries] @ unit[candidates].T).astype(np.float32)
    ids, best, above = [], [], []
    for query, threshold, ceiling in zip(asks.queries, asks.thresholds, asks.ceilings, strict=True):
        admitted = np.array([(int(query), int(candidate)) not in excluded for candidate in candidates], bool)
        above.append(int((admitted & (scores[query] > threshold)).sum()))
        kept = np.flatnonzero(admitted & (scores[query] <= ceiling))
        kept = kept[np.lexsort((candidates[kept], -scores[query][kept]))][:number]
        missing = number - len(kept)
        ids.append(np.append(candidates[kept], np.full(missing, -1)))
        best.append(np.append(scores[query][kept], np.full(missing, -np.inf, np.float32)))
    return Found(
        ids=np.array(ids, np.int64).reshape(len(asks), number),
        scores=np.array(best, np.float32).reshape(len(asks), number),
        above=np.array(above, np.int64),
        cut=np.zeros(len(asks), bool),
    )


def assert_same(found: Found, expected: Found) -> None:
    np.testing.assert_allclose(found.scores, expected.scores, atol=2e-7)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.above, expected.above)


# One candidate, a prime, one short of a block, one past it, several blocks.
@pytest.mark.parametrize("num_candidates", [1, 127, 255, 257, 1009])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_search_is_exact_in_every_first_precision(num_candidates: int, dtype: torch.dtype) -> None:
    vectors = clustered(1100)
    queries, candidates = np.arange(1009, 1100), np.arange(num_candidates)
    asks = Asks.nearest(len(queries))
    found = search(
        gather_of(vectors), queries, candidates, scorer=Scorer((WIDTH,)), num_neighbours=10, first_dtype=dtype
    )
    assert_same(found, reference(vectors, queries, candidates, asks, set(), 10))
    assert not found.cut.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("number", [0, 1, 7, 300])
def test_thresholds_ceilings_and_exclusions_hold_for_each_ask(number: int, dtype: torch.dtype) -> None:
    vectors = clustered(1200, seed=1)
    random = np.random.default_rng(2)
    queries, candidates = np.arange(40), np.sort(random.choice(np.arange(1200), 700, replace=False))
    # Three asks a query, at every height: from all candidates above to none.
    asks = Asks(
        queries=np.repeat(np.arange(40), 3),
        thresholds=random.uniform(-0.6, 1.0, 120).astype(np.float32),
        ceilings=random.uniform(-0.6, 1.0, 120).astype(np.float32),
    )
    # Half of them are no candidates.
    pairs = random.integers(40, size=500), random.integers(1200, size=500)
    found = search(
        gather_of(vectors), queries, candidates,
        scorer=Scorer((WIDTH,)), num_neighbours=number, asks=asks, excluded=pairs, first_dtype=dtype,
    )  # fmt: skip
    excluded = {(int(query), int(candidate)) for query, candidate in zip(*pairs, strict=True)}
    assert_same(found, reference(vectors, queries, candidates, asks, excluded, number))


def test_queries_may_be_asked_for_once_often_or_not_at_all() -> None:
    vectors, anything = clustered(400), np.full(3, np.inf, np.float32)
    asks = Asks(queries=np.array([1, 1, 3]), thresholds=anything, ceilings=anything)
    found = search(
        gather_of(vectors), np.arange(5), np.arange(5, 400), scorer=Scorer((WIDTH,)), num_neighbours=3, asks=asks
    )
    assert_same(found, reference(vectors, np.arange(5), np.arange(5, 400), asks, set(), 3))


def test_equal_scores_are_resolved_by_the_smaller_id() -> None:
    # Every vector occurs in each block, often more than once.
    vectors = clustered(50)[torch.arange(1000) % 50]
    queries = np.arange(20)
    found = search(gather_of(vectors), queries, np.arange(1000), scorer=Scorer((WIDTH,)), num_neighbours=30)
    # A query's own direction occurs twenty times: the ids are those, in their order.
    assert (found.ids[:, :20] == queries[:, None] + 50 * np.arange(20)).all()
    assert_same(found, reference(vectors, queries, np.arange(1000), Asks.nearest(20), set(), 30))


def test_score_equal_to_the_threshold_is_not_above_and_one_equal_to_the_ceiling_is_kept() -> None:
    vectors, scorer = clustered(600), Scorer((WIDTH,))
    unit = scorer.unit(vectors)
    at = scorer.pairs(unit, unit, torch.arange(50), torch.arange(100, 150)).numpy()

    def at_height(height: Array) -> Found:
        asks = Asks(queries=np.arange(50), thresholds=height, ceilings=height)
        return search(gather_of(vectors), np.arange(50), np.arange(50, 600), scorer=scorer, num_neighbours=1, asks=asks)

    equal, below = at_height(at), at_height(np.nextafter(at, np.float32(-1)))
    assert (equal.ids[:, 0] == np.arange(100, 150)).all()
    assert (below.ids[:, 0] != np.arange(100, 150)).all()
    assert (below.above == equal.above + 1).all()


def test_what_is_found_does_not_depend_on_tiles_memory_or_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(1500)
    queries, candidates = np.arange(300), np.arange(300, 1500)
    asks = Asks(
        queries=np.sort(np.random.default_rng(0).integers(300, size=500)),
        thresholds=np.linspace(-0.2, 0.9, 500, dtype=np.float32),
        ceilings=np.linspace(0.9, 0.1, 500, dtype=np.float32),
    )

    def run(**options: Any) -> Found:
        return search(
            gather_of(vectors), queries, candidates, scorer=Scorer((WIDTH,)), num_neighbours=8, asks=asks, **options
        )

    first = run(first_dtype=torch.bfloat16)
    others = [run(first_dtype=torch.float32), run(memory_mib=0)]
    monkeypatch.setattr(neighbours, "CPU_TILE", (1000, 10_000))
    monkeypatch.setattr(tiles, "CROWDED_SHARE", 1.0)
    others.append(run(first_dtype=torch.bfloat16))
    monkeypatch.setattr(tiles, "CROWDED_SHARE", 0.0)
    monkeypatch.setattr(tiles, "ROOM", 3)
    others.append(run(first_dtype=torch.bfloat16))
    for other in others:
        for name in ("ids", "scores", "above"):
            np.testing.assert_array_equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize("how", ["mean", "min", "max"])
def test_several_guides_are_searched_by_their_joint_score(how: Any) -> None:
    vectors, scorer = clustered(700, 40), Scorer((24, 16), how)
    unit = scorer.unit(vectors).double().numpy()
    cosines = [unit[:100, part] @ unit[100:, part].T for part in (slice(24), slice(24, 40))]
    joined = {"mean": np.add, "min": np.minimum, "max": np.maximum}[how](*cosines)
    thresholds = np.full(100, 0.3, np.float32)
    asks = Asks(queries=np.arange(100), thresholds=thresholds, ceilings=np.full(100, np.inf, np.float32))
    found = search(gather_of(vectors), np.arange(100), np.arange(100, 700), scorer=scorer, num_neighbours=5, asks=asks)
    best = np.argsort(-joined, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(found.ids, best + 100)
    np.testing.assert_allclose(found.scores, np.take_along_axis(joined, best, 1), atol=2e-7)
    np.testing.assert_array_equal(found.above, (joined > thresholds[0]).sum(axis=1))


def test_scores_are_off_by_less_than_the_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    original = tiles.Tile._rough_scores

    def checked(tile: Any, block: Any) -> torch.Tensor:
        rough = original(tile, block)[:, : len(block.ids)]
        exact = tile._fine.double() @ block.fine.double().T - tile._shifts.double()[:, None]
        errors.append(float(((rough - exact).abs() / tile._error_with(block).at(exact)).max()))
        return original(tile, block)

    monkeypatch.setattr(tiles.Tile, "_rough_scores", checked)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for vectors in (clustered(600), torch.ones(600, WIDTH) + 0.01 * clustered(600), clustered(600, 384)):
            scorer = Scorer((vectors.shape[1],))
            search(
                gather_of(vectors), np.arange(64), np.arange(600), scorer=scorer, num_neighbours=1, first_dtype=dtype
            )
    assert 0.1 < max(errors) < 1


def test_progress_adds_up_to_the_queries() -> None:
    done: list[int] = []
    search(
        gather_of(clustered(1000)), np.arange(150), np.arange(1000),
        scorer=Scorer((WIDTH,)), num_neighbours=1, on_queries=done.append,
    )  # fmt: skip
    assert sum(done) == 150
    assert len(done) > 3


@pytest.mark.parametrize(("num_queries", "num_candidates"), [(0, 10), (10, 0)])
def test_nothing_to_search_finds_nothing(num_queries: int, num_candidates: int) -> None:
    found = search(
        gather_of(clustered(20)), np.arange(num_queries), np.arange(num_candidates),
        scorer=Scorer((WIDTH,)), num_neighbours=3,
    )  # fmt: skip
    assert found.ids.shape == (num_queries, 3)
    assert (found.ids == -1).all()
    assert (found.above == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_card_finds_what_the_processor_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "GPU_TILE", (64, 256))
    vectors = clustered(1500)
    thresholds = np.linspace(-0.2, 0.9, 300, dtype=np.float32)
    asks = Asks(queries=np.arange(300), thresholds=thresholds, ceilings=thresholds[::-1].copy())
    options = {"scorer": Scorer((WIDTH,)), "num_neighbours": 8, "asks": asks}
    expected = search(gather_of(vectors), np.arange(300), np.arange(300, 1500), **options)
    found = search(gather_of(vectors), np.arange(300), np.arange(300, 1500), device="cuda", **options)
    # Unit vectors differ in their last bit there.
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    assert (found.ids == expected.ids).mean() > 0.999
    assert np.abs(found.above - expected.above).max() <= 1
