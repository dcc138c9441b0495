"""A store that grows: rows that are appended, guides that are added."""

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_cases import GUIDE, MORE, ROWS, TWO_PROMPTS, contents, embed, fill, make_store, source_of

from gistfast.errors import StoreError
from gistfast.neighbours.pair_scores import score_pairs
from gistfast.rows.dataset import RowSource
from gistfast.store import GuideInfo, GuideStore, StoreWriter
from gistfast.store.verify import check_store

SECOND = replace(GUIDE, name="second", weights_hash="second", width=5, dtype="float32")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 16)


@pytest.fixture(params=[GUIDE, TWO_PROMPTS], ids=["one prompt", "two prompts"])
def guide(request: pytest.FixtureRequest) -> GuideInfo:
    asked: GuideInfo = request.param
    return asked


def files_of(store: Path) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in store.rglob("*") if path.is_file()]
    return {str(path.relative_to(store)): (path.stat().st_ino, path.read_bytes()) for path in paths}


def texts_of_rows(store: GuideStore) -> list[tuple[str, ...]]:
    columns = [store.texts.take(store.rows[:, column]) for column in range(len(store.columns))]
    return list(zip(*columns, strict=True))


class TestAppending:
    def test_appended_rows_are_those_that_were_missing(
        self, tmp_path: Path, source: RowSource, more: RowSource, guide: GuideInfo
    ) -> None:
        make_store(tmp_path / "store", source, guide, holdout=0.3)
        grown = make_store(tmp_path / "store", more, guide, mode="append")
        assert texts_of_rows(grown) == [*ROWS, *MORE[:-1]]
        assert grown.manifest.data.segments[1].repeated == 1
        assert grown.verify() == []

    @pytest.mark.parametrize("kind", ["texts", "rows"])
    def test_append_to_texts_or_rows_that_lost_a_bit_is_refused_and_changes_nothing(
        self, tmp_path: Path, source: RowSource, more: RowSource, kind: str
    ) -> None:
        store = make_store(tmp_path / "store", source)
        path = sorted((store.path / kind).glob("*.arrow"))[1]
        data = bytearray(path.read_bytes())
        # In the values, which begin behind the headers.
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        before = files_of(store.path)
        with pytest.raises(StoreError, match=f"{path.name} was changed after it was written .* mend it with"):
            make_store(tmp_path / "store", more, mode="append")
        assert files_of(store.path) == before

    def test_store_grown_of_two_files_holds_what_one_made_of_both_holds(
        self, tmp_path: Path, source: RowSource, more: RowSource, guide: GuideInfo
    ) -> None:
        make_store(tmp_path / "store", source, guide, holdout=0.3)
        grown = make_store(tmp_path / "store", more, guide, mode="append")
        both = source_of(tmp_path / "both.jsonl", [*ROWS, *MORE[:-1]])
        whole = make_store(tmp_path / "whole", both, guide, holdout=0.3)
        assert contents(grown) == contents(whole)
        assert np.array_equal(grown.held_out, whole.held_out)
        ids = torch.arange(whole.num_texts)
        assert torch.equal(grown.identity(ids), whole.identity(ids))

    def test_only_unseen_texts_are_embedded_and_old_files_stay(
        self, tmp_path: Path, source: RowSource, more: RowSource
    ) -> None:
        make_store(tmp_path / "store", source)
        before = files_of(tmp_path / "store")
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=more, mode="append") as writer:
            fill(writer, more)
            new = [text for shard in writer.vectors.pending() for text in writer.vectors.texts_of(shard)]
            embed(writer)
            writer.publish()
        known = {text for row in ROWS for text in row}
        assert new == list(dict.fromkeys(text for row in MORE for text in row if text not in known))
        after = files_of(tmp_path / "store")
        changed = {name for name in before if before[name] != after.get(name)}
        assert changed - {"sources.json"} == {"store.json"}

    @pytest.mark.parametrize("order", [1, -1], ids=["the same file", "a file with the same rows"])
    def test_rows_that_are_there_change_nothing(self, tmp_path: Path, source: RowSource, order: int) -> None:
        make_store(tmp_path / "store", source)
        before = files_of(tmp_path / "store")
        again = source_of(tmp_path / "again.jsonl", ROWS[::order]) if order < 0 else source
        make_store(tmp_path / "store", again, mode="append")
        assert files_of(tmp_path / "store") == before

    def test_many_appends_are_many_segments(self, tmp_path: Path) -> None:
        for first in range(0, 60, 12):
            part = source_of(tmp_path / f"{first}.jsonl", ROWS[first : first + 12])
            store = make_store(tmp_path / "store", part, mode="append")
        assert len(store.manifest.data.segments) == 5
        # Rows that an earlier source has come in once.
        assert texts_of_rows(store) == list(dict.fromkeys(ROWS))
        assert store.verify() == []

    def test_readers_see_the_store_of_before_until_the_append_is_complete(
        self, tmp_path: Path, source: RowSource, more: RowSource
    ) -> None:
        old = make_store(tmp_path / "store", source)
        score_pairs(old)
        seen = contents(old)
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=more, mode="append") as writer:
            fill(writer, more)
            embed(writer, writer.vectors.pending()[:1])
            note = check_store(tmp_path / "store", deep=False).notes[0]
            assert note.endswith("store is not finished: the command that began it goes on")
            during = GuideStore.open(tmp_path / "store")
            assert contents(during) == seen
            assert during.fingerprint == old.fingerprint
            assert len(during.pair_scores) == len(ROWS)
            embed(writer)
            score_pairs(writer.store())
            assert contents(GuideStore.open(tmp_path / "store")) == seen
            new = GuideStore.open(writer.publish())
        assert contents(old) == seen
        assert new.num_rows == len(ROWS) + len(MORE) - 1
        assert len(new.pair_scores) == new.num_rows
        assert np.array_equal(new.pair_scores[: len(ROWS)], old.pair_scores)

    def test_append_that_stopped_while_reading_leaves_the_store_open_for_others(
        self, tmp_path: Path, source: RowSource, more: RowSource
    ) -> None:
        make_store(tmp_path / "store", source)
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=more, mode="append") as writer:
            for _ in range(3):
                writer.add_rows(next(iter(more.batches())))
        assert GuideStore.open(tmp_path / "store").num_rows == len(ROWS)
        other = source_of(tmp_path / "other.jsonl", [(f"{i}", f"answer to {i}", "none") for i in range(40)])
        assert make_store(tmp_path / "store", other, mode="append").verify() == []

    @pytest.mark.parametrize("mode", ["append", "resume"])
    def test_append_that_stopped_while_embedding_goes_on(
        self, tmp_path: Path, source: RowSource, more: RowSource, mode: Any
    ) -> None:
        make_store(tmp_path / "store", source)
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=more, mode="append") as writer:
            fill(writer, more)
            first, *rest = writer.vectors.pending()
            embed(writer, [first])
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=more, mode=mode) as writer:
            assert not writer.needs_rows
            assert writer.vectors.pending() == rest
            embed(writer)
            assert texts_of_rows(GuideStore.open(writer.publish())) == [*ROWS, *MORE[:-1]]

    def test_unfinished_append_keeps_others_out(self, tmp_path: Path, source: RowSource, more: RowSource) -> None:
        make_store(tmp_path / "store", source)
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=more, mode="append") as writer:
            fill(writer, more)
        other = source_of(tmp_path / "other.jsonl", [("a", "b", "c")])
        with pytest.raises(StoreError, match=r"not finished: complete it with --resume and more\.jsonl"):
            StoreWriter.create(tmp_path / "store", guide=GUIDE, source=other, mode="append")
        with pytest.raises(StoreError, match="not finished: complete it first with --resume, then add the guide"):
            StoreWriter.create(tmp_path / "store", guide=SECOND, source=source, mode="add_guide")

    def test_second_process_waits_and_takes_the_rows_of_the_first(
        self, tmp_path: Path, source: RowSource, more: RowSource
    ) -> None:
        make_store(tmp_path / "store", source)
        joined: list[bool] = []

        def join() -> None:
            with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=more, mode="append") as writer:
                joined.append(writer.needs_rows)

        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=more, mode="append") as writer:
            other = threading.Thread(target=join)
            other.start()
            fill(writer, more)
            other.join()
        assert joined == [False]

    @pytest.mark.parametrize(
        ("guide", "holdout", "message"),
        [
            (replace(GUIDE, query_prompt="query: "), None, "guide.query_prompt: store has '', asked for 'query: '"),
            (replace(GUIDE, pooling="cls"), None, "guide.pooling: store has 'mean', asked for 'cls'"),
            (replace(GUIDE, max_length=64), None, "guide.max_length: store has 128, asked for 64"),
            (replace(GUIDE, compute_dtype="bfloat16"), None, "guide.compute_dtype: store has 'float32'"),
            (GUIDE, 0.5, "data.holdout: store has 0.3, asked for 0.5"),
        ],
    )
    def test_append_with_other_settings_names_the_field(
        self, tmp_path: Path, source: RowSource, more: RowSource, guide: GuideInfo, holdout: float | None, message: str
    ) -> None:
        make_store(tmp_path / "store", source, holdout=0.3)
        before = files_of(tmp_path / "store")
        with pytest.raises(StoreError) as caught:
            StoreWriter.create(tmp_path / "store", guide=guide, source=more, holdout=holdout, mode="append")
        assert message in str(caught.value)
        assert files_of(tmp_path / "store") == before

    def test_append_of_other_columns_names_them(self, tmp_path: Path, source: RowSource) -> None:
        make_store(tmp_path / "store", source)
        pairs = source_of(tmp_path / "pairs_only.jsonl", [("a", "b")])
        with pytest.raises(StoreError, match=r"data\.columns: store has \('anchor', 'positive', 'negative_1'\)"):
            StoreWriter.create(tmp_path / "store", guide=GUIDE, source=pairs, mode="append")

    def test_append_to_nothing_makes_the_store(self, tmp_path: Path, source: RowSource) -> None:
        assert make_store(tmp_path / "store", source, mode="append").num_rows == len(ROWS)

    def test_late_process_does_not_finish_the_next_append(
        self, tmp_path: Path, source: RowSource, more: RowSource
    ) -> None:
        make_store(tmp_path / "store", source)
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=more, mode="append") as quick:
            fill(quick, more)
            late = StoreWriter.create(tmp_path / "store", guide=GUIDE, source=more, mode="append")
            embed(quick)
            quick.publish()
        other = source_of(tmp_path / "other.jsonl", [("a", "b", "c")])
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=other, mode="append") as next_one:
            fill(next_one, other)
        late.publish()
        assert GuideStore.open(tmp_path / "store").num_rows == len(ROWS) + len(MORE) - 1


class TestSeveralGuides:
    def add(self, path: Path, source: RowSource, guide: GuideInfo = SECOND, **options: Any) -> GuideStore:
        with StoreWriter.create(path, guide=guide, source=source, mode="add_guide", **options) as writer:
            embed(writer)
            score_pairs(writer.store())
            return GuideStore.open(writer.publish())

    @pytest.mark.parametrize("weight", [1.0, 3.0])
    def test_mean_is_the_weighted_mean_of_cosines(self, tmp_path: Path, source: RowSource, weight: float) -> None:
        first = make_store(tmp_path / "store", source, replace(GUIDE, dtype="float32"))
        second = make_store(tmp_path / "second", source, SECOND)
        both = self.add(tmp_path / "store", source, guide_weight=weight)
        ids = torch.arange(both.num_texts)
        products = [vectors @ vectors.T for vectors in (store.gather(ids).double() for store in (first, second, both))]
        expected = (products[0] + weight * products[1]) / (1 + weight)
        assert both.width == sum(both.guide_widths) == first.width + second.width
        assert (products[2] - expected).abs().max() < 1e-6

    @pytest.mark.parametrize("how", ["min", "max"])
    def test_vectors_for_other_scores_stand_side_by_side(self, tmp_path: Path, source: RowSource, how: Any) -> None:
        first = make_store(tmp_path / "store", source)
        second = make_store(tmp_path / "second", source, SECOND)
        both = self.add(tmp_path / "store", source, guide_score=how)
        ids = torch.arange(both.num_texts)
        assert both.guide_score == how
        assert torch.equal(both.gather(ids), torch.cat([first.gather(ids).float(), second.gather(ids)], dim=1))

    def test_readers_see_the_guides_of_before_until_the_new_one_is_complete(
        self, tmp_path: Path, source: RowSource
    ) -> None:
        old = make_store(tmp_path / "store", source)
        with StoreWriter.create(tmp_path / "store", guide=SECOND, source=source, mode="add_guide") as writer:
            embed(writer, [0])
            assert contents(GuideStore.open(tmp_path / "store")) == contents(old)
            assert GuideStore.open(tmp_path / "store").guide_widths == (8,)
        with StoreWriter.create(tmp_path / "store", guide=SECOND, source=source, mode="resume") as writer:
            embed(writer)
            assert GuideStore.open(writer.publish()).guide_widths == (8, 5)

    def test_adding_a_guide_leaves_what_is_there_alone(self, tmp_path: Path, source: RowSource) -> None:
        store = make_store(tmp_path / "store", source)
        score_pairs(store)
        before = files_of(tmp_path / "store")
        both = self.add(tmp_path / "store", source)
        after = files_of(tmp_path / "store")
        changed = {name for name in before if before[name] != after.get(name)}
        assert changed - {"sources.json"} == {"store.json"}
        assert both.fingerprint != store.fingerprint
        assert both.verify() == []

    def test_guide_that_is_there_changes_nothing_and_another_weight_only_scores(
        self, tmp_path: Path, source: RowSource
    ) -> None:
        make_store(tmp_path / "store", source)
        both = self.add(tmp_path / "store", source)
        before = files_of(tmp_path / "store")
        self.add(tmp_path / "store", source)
        assert files_of(tmp_path / "store") == before
        heavier = self.add(tmp_path / "store", source, guide_weight=2.0)
        new = files_of(tmp_path / "store").keys() - before.keys()
        assert {name.split("/")[0] for name in new} == {"scores", "commits"}
        assert not np.array_equal(heavier.pair_scores, both.pair_scores)

    def test_each_guide_is_appended_to_alone(self, tmp_path: Path, source: RowSource, more: RowSource) -> None:
        make_store(tmp_path / "store", source)
        self.add(tmp_path / "store", source)
        with StoreWriter.create(tmp_path / "store", guide=SECOND, source=more, mode="append") as writer:
            fill(writer, more)
            embed(writer)
            assert writer.missing_vectors() == {"guide": 2}
            with pytest.raises(StoreError, match="still lacks 2 shards of vectors"):
                writer.publish()
        assert GuideStore.open(tmp_path / "store").num_rows == len(ROWS)
        grown = make_store(tmp_path / "store", more, mode="append")
        assert grown.num_rows == len(ROWS) + len(MORE) - 1
        assert grown.guide_widths == (8, 5)
        score_pairs(grown)
        assert grown.verify() == []

    def test_guide_with_a_query_prompt_needs_roles(self, tmp_path: Path, source: RowSource) -> None:
        prompted = replace(SECOND, query_prompt="query: ")
        make_store(tmp_path / "store", source)
        with pytest.raises(StoreError, match="make the store anew with --split-roles"):
            self.add(tmp_path / "store", source, prompted)
        with StoreWriter.create(tmp_path / "split", guide=GUIDE, source=source, split_roles=True) as writer:
            fill(writer, source)
            embed(writer)
            writer.publish()
        assert self.add(tmp_path / "split", source, prompted).verify() == []

    def test_guide_of_other_rows_is_refused(self, tmp_path: Path, source: RowSource, more: RowSource) -> None:
        make_store(tmp_path / "store", source)
        with pytest.raises(StoreError, match=r"store has pairs\.jsonl .* asked for more\.jsonl"):
            self.add(tmp_path / "store", more)

    def test_adding_to_nothing_is_refused(self, tmp_path: Path, source: RowSource) -> None:
        with pytest.raises(StoreError, match="is not a guide store: make one without --add-guide first"):
            self.add(tmp_path / "store", source)
