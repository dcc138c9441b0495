import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gistfast.errors import ConfigError, StoreError
from gistfast.neighbours import index_search, mining
from gistfast.neighbours.index import build_index
from gistfast.neighbours.index_search import ExactSearch, IndexSearch, choose_search
from gistfast.neighbours.mining import mine
from gistfast.store import GuideStore
from gistfast.store.export import check_negatives, rows_with_negatives
from gistfast.store.mined import MinedInfo, mined_info, pending_mined, remove_other_mined

MakeStore = Callable[..., GuideStore]
Array = np.ndarray[Any, Any]

# Anchors with several positives, positives of several anchors, a positive that is the anchor itself, texts that are
# anchor here and document there, and own negatives that are hard.
ROWS = [(f"anchor {i % 60}", f"document {i % 47}", f"document {(7 * i) % 83}") for i in range(150)] + [
    ("same", "same", "anchor 3"),
    ("document 5", "document 6", "same"),
]
TWO_PROMPTS = {"query_prompt": "query: "}


def info_of(store: GuideStore, negatives: int = 4, margin: float = 0.05, strategy: Any = "relative") -> MinedInfo:
    return MinedInfo(negatives=negatives, margin=margin, margin_strategy=strategy, store_fingerprint=store.fingerprint)


def reference(store: GuideStore, info: MinedInfo) -> list[dict[str, Any]]:
    """Row by row, from texts and a full table of scores in double precision."""
    vectors = store.gather(torch.arange(store.num_texts)).double()
    vectors /= vectors.norm(dim=1, keepdim=True)
    scores = (vectors @ vectors.T).numpy().astype(np.float32)
    texts, rows, held_out = list(store.texts), store.rows, store.held_out
    expected = []
    for row, out in zip(rows, held_out, strict=True):
        anchor, positive = row[:2]
        documents = np.unique(rows[:, 1:] if out else rows[~held_out, 1:])
        documents = [entry for entry in documents if texts[entry] != texts[anchor]]
        known = {entry for other in rows for entry in other[1:2] if texts[other[0]] == texts[anchor]}
        unknown = [entry for entry in documents if entry not in known]
        own = scores[anchor, positive]
        ceiling = own - info.margin * (abs(own) if info.margin_strategy == "relative" else 1)
        hard = [entry for entry in unknown if scores[anchor, entry] <= ceiling and entry not in row[2:]]
        hard.sort(key=lambda entry: (-scores[anchor, entry], entry))
        expected.append(
            {
                "rank": 1 + sum(scores[anchor, entry] > own for entry in documents if entry != positive),
                "false_negatives": sum(scores[anchor, entry] > own for entry in unknown),
                "negatives": hard[: info.negatives],
                "scores": scores[anchor, hard[: info.negatives]],
            }
        )
    return expected


def assert_mined(store: GuideStore, info: MinedInfo) -> None:
    mined = store.mined
    for row, expected in enumerate(reference(store, info)):
        assert mined.positive_rank[row] == expected["rank"]
        assert mined.false_negatives[row] == expected["false_negatives"]
        found = len(expected["negatives"])
        assert mined.negatives[row, :found].tolist() == expected["negatives"]
        assert (mined.negatives[row, found:] == -1).all()
        np.testing.assert_allclose(mined.negative_scores[row, :found], expected["scores"], atol=2e-7)
        assert (mined.negative_scores[row, found:] == -np.inf).all()
    assert not mined.truncated.any()


@pytest.mark.parametrize("guide", [{}, TWO_PROMPTS], ids=["one prompt", "two prompts"])
@pytest.mark.parametrize(("margin", "strategy"), [(0.0, "absolute"), (0.1, "absolute"), (0.3, "relative")])
def test_ranks_false_negatives_and_hard_negatives_are_those_of_a_full_table(
    make_store: MakeStore, guide: dict[str, str], margin: float, strategy: str
) -> None:
    store = make_store(ROWS, holdout=0.3, **guide)
    assert 0 < store.held_out.sum() < len(ROWS)
    info = info_of(store, margin=margin, strategy=strategy)
    mine(store, info, ExactSearch(store, "cpu"))
    assert_mined(store, info)
    assert {1} < set(store.mined.positive_rank.tolist())
    assert (store.mined.positive_rank > 1 + store.mined.false_negatives).any()


def test_anchor_is_searched_once_however_many_rows_it_has(make_store: MakeStore) -> None:
    store, queries = make_store(ROWS), []
    exact = ExactSearch(store, "cpu")

    def search(asked: Array, *others: Any) -> Any:
        queries.extend(asked.tolist())
        return exact(asked, *others)

    mine(store, info_of(store), search)
    assert len(queries) == len(set(queries)) == 62


def test_nothing_held_out_is_mined_for_a_row_in_training(make_store: MakeStore) -> None:
    store = make_store(ROWS, holdout=0.4)
    mine(store, info_of(store, margin=0.0), ExactSearch(store, "cpu"))
    in_training = set(store.rows[~store.held_out, 1:].ravel().tolist())
    mined = store.mined.negatives[~store.held_out]
    assert set(mined[mined >= 0].tolist()) <= in_training
    assert not set(store.rows[:, 1:].ravel().tolist()) <= in_training


def test_row_without_enough_documents_below_its_positive_says_so(make_store: MakeStore) -> None:
    store = make_store([("a", "b"), ("c", "d")])
    mine(store, info_of(store, negatives=3, margin=0.0), ExactSearch(store, "cpu"))
    assert (store.mined.negatives[:, 1:] == -1).all()
    assert (store.mined.negative_scores[:, 1:] == -np.inf).all()


def test_stopped_pass_goes_on_where_it_was(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 40)
    store = make_store(ROWS)
    info, searched, mine_shard = info_of(store), [], mining._mine_shard

    def stop_at_the_third(corpus: Any, info: Any, search: Any, shard: int, bar: Any) -> Any:
        if shard == 2:
            raise KeyboardInterrupt
        return mine_shard(corpus, info, search, shard, bar)

    monkeypatch.setattr(mining, "_mine_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        mine(store, info, ExactSearch(store, "cpu"))
    assert pending_mined(store, info) == [2, 3]
    with pytest.raises(StoreError, match="has no mined negatives: run"):
        _ = store.mined

    def counted(corpus: Any, info: Any, search: Any, shard: int, bar: Any) -> Any:
        searched.append(shard)
        return mine_shard(corpus, info, search, shard, bar)

    monkeypatch.setattr(mining, "_mine_shard", counted)
    mine(store, info, ExactSearch(store, "cpu"))
    mine(store, info, ExactSearch(store, "cpu"))
    assert searched == [2, 3]
    assert_mined(store, info)
    assert store.verify() == []


def test_other_settings_are_mined_anew_and_take_the_place_of_the_first(make_store: MakeStore) -> None:
    store = make_store(ROWS)
    first, second = info_of(store), info_of(store, negatives=2, margin=0.2)
    for info in (first, second):
        mine(store, info, ExactSearch(store, "cpu"))
    assert mined_info(store.path, store.fingerprint) == second
    assert_mined(GuideStore.open(store.path), second)
    remove_other_mined(store)
    assert sorted(path.name for path in (store.path / "mined").iterdir()) == [
        second.kind.removeprefix("mined/"),
        second.kind.removeprefix("mined/") + ".json",
    ]
    assert pending_mined(store, first) == [0]
    assert pending_mined(store, second) == []


def test_damaged_shard_is_named(make_store: MakeStore) -> None:
    store = make_store(ROWS)
    mine(store, info_of(store), ExactSearch(store, "cpu"))
    (path,) = (store.path / info_of(store).kind).iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (problem,) = store.verify()
    assert path.name in problem
    assert "its checksum differs" in problem
    (store.path / f"{info_of(store).kind}.json").write_text("{}")
    (problem,) = store.verify()
    assert "has other fields than expected: delete it and mine again" in problem


def test_index_that_sees_everything_mines_what_exact_search_mines(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(ROWS, holdout=0.2)
    build_index(store, "flat")
    monkeypatch.setitem(index_search.EXACT_AT_MOST, "cpu", 10)
    search = choose_search(store, "cpu")
    assert isinstance(search, IndexSearch)
    info = info_of(store)
    mine(store, info, search)
    assert_mined(store, info)


def test_short_lists_of_an_index_are_marked(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(ROWS)
    build_index(store, "flat")
    monkeypatch.setitem(index_search.EXACT_AT_MOST, "cpu", 10)
    monkeypatch.setattr(index_search, "LONGEST_LIST", 20)
    info = info_of(store)
    mine(store, info, choose_search(store, "cpu"))
    mined, expected = store.mined, reference(store, info)
    # A row that is not marked is right; one that is marked is not always wrong.
    for row in np.flatnonzero(~mined.truncated):
        assert mined.negatives[row].tolist() == expected[row]["negatives"]
        assert mined.false_negatives[row] == expected[row]["false_negatives"]
    assert 0 < mined.truncated.sum() < len(ROWS)
    assert mined.truncated[(mined.negatives < 0).any(axis=1)].all()


def test_search_is_exact_up_to_a_size_and_where_the_index_is_not_good_enough(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(ROWS)
    with caplog.at_level(logging.INFO):
        assert isinstance(choose_search(store, "cpu"), ExactSearch)
        monkeypatch.setitem(index_search.EXACT_AT_MOST, "cpu", 10)
        assert isinstance(choose_search(store, "cpu"), ExactSearch)
        report = build_index(store, "flat")
        assert report is not None
        poor = replace(report, recall_at_10=0.9)
        monkeypatch.setattr(index_search, "read_report", lambda store: poor)
        assert isinstance(choose_search(store, "cpu"), ExactSearch)
        monkeypatch.undo()
    reasons = [record.message for record in caplog.records if record.message.startswith("mining by exact search")]
    assert reasons == [
        "mining by exact search: up to 5,000,000 texts everything is compared",
        "mining by exact search: there is no index: this takes long",
        "mining by exact search: the index finds 0.900 of the ten nearest, 0.95 are wanted",
    ]


def test_dataset_has_the_hardest_negatives_behind_its_own_columns(make_store: MakeStore) -> None:
    store = make_store(ROWS, holdout=0.2)
    mine(store, info_of(store, negatives=5, margin=0.0), ExactSearch(store, "cpu"))
    expected = rows_with_negatives(store, np.arange(len(ROWS)), 2)
    for split, rows in (("train", np.flatnonzero(~store.held_out)), ("held_out", np.flatnonzero(store.held_out))):
        data = store.to_dataset(split, negatives=2)  # type: ignore[arg-type]
        assert data.column_names == ["anchor", "positive", "negative_1", "negative_2", "negative_3", "label"]
        labels = np.array(data["label"])
        assert (labels == expected[rows]).all()
        found = (store.mined.negatives[rows, :2] >= 0).all(axis=1)
        assert (labels[found, 3:] == store.mined.negatives[rows[found], :2]).all()
        assert data["negative_3"][0] == store.texts[int(labels[0, 4])]
    assert store.to_dataset("train").column_names == ["anchor", "positive", "negative_1", "label"]


def test_rows_with_too_few_negatives_repeat_them_or_their_positive(
    make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(ROWS)
    mine(store, info_of(store, negatives=30, margin=0.6, strategy="absolute"), ExactSearch(store, "cpu"))
    with caplog.at_level(logging.WARNING):
        check_negatives(store, 20)
    rows = rows_with_negatives(store, np.arange(len(ROWS)), 20)
    assert (rows[:, :3] == store.rows).all()
    found = [[entry for entry in negatives if entry >= 0] for negatives in store.mined.negatives[:, :20].tolist()]
    for row, negatives in zip(rows.tolist(), found, strict=True):
        assert row[3:] == [*(negatives or row[1:2]) * 20][:20]
    few, none = sum(len(negatives) < 20 for negatives in found), sum(not negatives for negatives in found)
    assert 0 < none < few < len(ROWS)
    assert f"{few} of 152 rows have fewer than 20 mined negatives, which are repeated; {none} have none" in caplog.text


def test_more_negatives_than_were_mined_are_refused(make_store: MakeStore) -> None:
    store = make_store(ROWS)
    with pytest.raises(StoreError, match=r"has no mined negatives: run `gistfast precompute \.\.\. --resume"):
        store.to_dataset("train", negatives=1)
    mine(store, info_of(store), ExactSearch(store, "cpu"))
    with pytest.raises(ConfigError, match=r"5 mined negatives are asked for, .* has 4 of each row"):
        store.to_dataset("train", negatives=5)
