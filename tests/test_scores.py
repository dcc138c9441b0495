from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_cases import GUIDE, embed, source_of
from store_cases import make_store as store_at

from gistfast.errors import StoreError
from gistfast.neighbours import pair_scores as scores
from gistfast.neighbours.pair_scores import score_pairs
from gistfast.store import GuideStore, StoreWriter, pending_scores, write_scores

# The anchor of the first row is its own positive; two rows share a positive.
ROWS = [("same", "same", "other"), ("a", "b", "c"), ("d", "b", "a")] + [
    (f"anchor {number}", f"positive {number}", f"negative {number}") for number in range(20)
]


def exact(store: GuideStore) -> "np.ndarray[Any, Any]":
    vectors = store.gather(torch.arange(store.num_texts)).double().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    of_rows = vectors[store.rows]
    return np.einsum("rg,rcg->rc", of_rows[:, 0], of_rows[:, 1:])


@pytest.mark.parametrize("rows_per_block", [1, 7, 4096])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scores_are_cosines_of_the_stored_vectors(
    make_store: Callable[..., GuideStore], dtype: str, rows_per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "PAIRS_PER_BLOCK", rows_per_block)
    store = make_store(ROWS, dtype=dtype)
    score_pairs(store)
    assert store.pair_scores.shape == (len(ROWS), 2)
    assert store.pair_scores.dtype == np.float32
    np.testing.assert_allclose(store.pair_scores, exact(store), atol=1e-6)
    assert store.pair_scores[0, 0] == pytest.approx(1, abs=1e-6)


def test_scores_are_asked_for_before_they_are_there(make_store: Callable[..., GuideStore]) -> None:
    with pytest.raises(StoreError, match="has pair scores for 0 of 1 shards"):
        _ = make_store(ROWS).pair_scores


def test_stopped_pass_goes_on_where_it_was(
    make_store: Callable[..., GuideStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 8)
    store = make_store(ROWS)
    assert pending_scores(store) == [0, 1, 2]
    stand_in = np.zeros((8, 2), np.float32)
    assert write_scores(store, 1, stand_in)
    score_pairs(store)
    expected = exact(store)
    expected[8:16] = stand_in
    np.testing.assert_allclose(store.pair_scores, expected, atol=1e-6)
    assert pending_scores(store) == []
    score_pairs(store)


@pytest.mark.parametrize("how", ["mean", "min", "max"])
def test_score_of_several_guides_is_joined_from_their_cosines(tmp_path: Path, how: Any) -> None:
    second = replace(GUIDE, name="second", weights_hash="second", width=5, dtype="float32")
    source = source_of(tmp_path / "rows.jsonl", ROWS)
    with StoreWriter.create(
        store_at(tmp_path / "store", source).path,
        guide=second, source=source, mode="add_guide", guide_score=how, guide_weight=3.0,
    ) as writer:  # fmt: skip
        embed(writer)
        store = writer.store()
    score_pairs(store)
    each = [
        GuideStore(store.path, replace(store.manifest, guides=(guide,), weights=(1.0,))) for guide in (GUIDE, second)
    ]
    first, other = map(exact, each)
    expected = {"mean": (first + 3 * other) / 4, "min": np.minimum(first, other), "max": np.maximum(first, other)}
    # The first guide's vectors are halves, and length 1 only within their precision.
    np.testing.assert_allclose(store.pair_scores, expected[how], atol=5e-4 if how == "mean" else 1e-6)
