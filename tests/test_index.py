import builtins
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from gistfast import index
from gistfast.errors import DependencyError, StoreError
from gistfast.index import build_index, load_index, read_report
from gistfast.store import GuideStore

MakeStore = Callable[..., GuideStore]
NUM_ROWS = 1500


def rows(number: int = NUM_ROWS) -> list[tuple[str, str]]:
    return [(f"anchor {row}", f"positive {row}") for row in range(number)]


def nearest(store: GuideStore, queries: torch.Tensor, number: int) -> "np.ndarray[Any, Any]":
    vectors = store.gather(torch.arange(store.num_texts)).float()
    return (queries @ vectors.T).topk(number).indices.numpy()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_flat_index_finds_what_exact_search_finds(make_store: MakeStore, dtype: str) -> None:
    store = make_store(rows(), dtype=dtype)
    report = build_index(store, "flat")
    assert report is not None
    assert (report.kind, report.num_vectors, report.width, report.recall_at_10) == (
        "flat",
        2 * NUM_ROWS,
        16,
        1.0,
    )
    queries = store.gather(torch.arange(0, 3000, 100)).float()
    _, found = load_index(store).search(queries.numpy(), 1)
    assert (found == nearest(store, queries, 1)).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_ivf_index_looks_further_until_recall_is_reached(make_store: MakeStore, dtype: str) -> None:
    store = make_store(rows(), dtype=dtype)
    report = build_index(store, "ivf")
    assert report is not None
    assert report.kind == "ivf"
    assert report.num_lists > 1
    assert 1 <= report.num_probes <= report.num_lists
    assert report.recall_at_10 >= index.WANTED_RECALL
    assert load_index(store).nprobe == report.num_probes


def test_recall_falls_where_lists_are_left_out(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WANTED_RECALL", 0.0)
    report = build_index(make_store(rows()), "ivf")
    assert report is not None
    assert report.num_probes == 1
    assert 0.2 < report.recall_at_10 < 0.95


def test_automatic_kind_follows_the_size(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(rows(300))
    monkeypatch.setattr(index, "FLAT_AT_MOST", 600)
    flat = build_index(store)
    monkeypatch.setattr(index, "FLAT_AT_MOST", 599)
    ivf = build_index(store)
    assert flat is not None
    assert ivf is not None
    assert (flat.kind, ivf.kind) == ("flat", "ivf")
    assert read_report(store) == ivf


def test_store_smaller_than_the_sample_and_the_neighbours_is_indexed(make_store: MakeStore) -> None:
    store = make_store([("one", "two")])
    for kind in ("flat", "ivf"):
        report = build_index(store, kind)  # type: ignore[arg-type]
        assert report is not None
        assert (report.num_vectors, report.recall_at_10, report.num_queries) == (2, 1.0, 2)


def test_duplicates_are_as_good_as_the_neighbour(
    make_store: MakeStore, random_guide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(guide: Any, texts: Sequence[str], role: str, on_batch: object = None) -> "np.ndarray[Any, Any]":
        return np.full((len(texts), 16), 0.25, np.float32)

    monkeypatch.setattr(random_guide, "embed", embed)
    # Any ten of the texts are the ten nearest.
    report = build_index(make_store(rows(50)), "flat")
    assert report is not None
    assert report.recall_at_10 == 1.0


def test_index_can_be_left_out(make_store: MakeStore) -> None:
    store = make_store(rows(10))
    assert build_index(store, "none") is None
    assert not (store.path / "index").exists()
    with pytest.raises(StoreError, match=r"has no index of its vectors: run gistfast\.index\.build_index"):
        load_index(store)


def test_index_that_is_there_is_kept(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(rows(10))
    report = build_index(store, "flat")
    monkeypatch.setattr(index, "_empty_index", lambda *ignored: pytest.fail("built again"))
    assert build_index(store, "flat") == report


def test_index_of_another_store_is_not_taken_for_its_own(make_store: MakeStore) -> None:
    store = make_store(rows(10))
    build_index(store, "flat")
    record = json.loads((store.path / "index" / "index.json").read_text())
    record["store_fingerprint"] = "another"
    (store.path / "index" / "index.json").write_text(json.dumps(record))
    assert read_report(store) is None
    with pytest.raises(StoreError, match="has no index"):
        load_index(store)


def test_damaged_index_is_named(make_store: MakeStore) -> None:
    store = make_store(rows(10))
    build_index(store, "flat")
    path = store.path / "index" / "vectors.faiss"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StoreError, match="is damaged, faiss cannot read it: delete the folder"):
        load_index(store)
    (store.path / "index" / "index.json").write_text("{}")
    with pytest.raises(StoreError, match="has other fields than expected"):
        load_index(store)


def test_missing_faiss_names_both_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_faiss(name: str, *args: Any, **options: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(DependencyError, match=r"gistfast\[cpu\]` or `pip install gistfast\[gpu\]`, never both"):
        index.import_faiss()
