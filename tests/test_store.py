import copy
import errno
import json
import logging
import os
import pickle
import unicodedata
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from store_cases import (
    GUIDE,
    ROWS,
    TWO_PROMPTS,
    WIDTH,
    commit_file,
    contents,
    embed,
    fill,
    flip_bit,
    make_store,
    shard_file,
    source_of,
    vectors_for,
)

from gistfast.errors import ConfigError, StoreError, VectorError
from gistfast.rows.dataset import RowSource, read_rows
from gistfast.store import GuideInfo, GuideStore, StoreWriter, pending_scores, write_scores
from gistfast.store.keys import KeyTable


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Several shards from few rows, nothing in the home folder, no waiting for the disk."""
    import datasets

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 16)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class TestReading:
    @pytest.mark.parametrize("guide", [GUIDE, TWO_PROMPTS], ids=["one prompt", "two prompts"])
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_everything_written_is_read_back(
        self, tmp_path: Path, source: RowSource, guide: GuideInfo, dtype: str
    ) -> None:
        store = make_store(tmp_path / "store", source, replace(guide, dtype=dtype))
        assert store.columns == ("anchor", "positive", "negative_1")
        assert store.num_rows == len(ROWS)
        assert store.width == WIDTH
        for column, expected in enumerate(zip(*ROWS, strict=True)):
            assert store.texts.take(store.rows[:, column]) == list(expected)
            roles = ["document" if column and guide is TWO_PROMPTS else "query"] * len(expected)
            wanted = torch.from_numpy(vectors_for(expected, roles)).to(getattr(torch, dtype))
            assert torch.equal(store.gather(torch.from_numpy(store.rows[:, column].copy())), wanted)
        assert store.verify() == []

    def test_one_prompt_gives_one_entry_for_each_text(self, tmp_path: Path, source: RowSource) -> None:
        store = make_store(tmp_path / "store", source)
        distinct = dict.fromkeys(text for row in ROWS for text in row)
        assert store.texts[:] == list(distinct)
        assert store.identity(torch.tensor([[3, 1]])).tolist() == [[3, 1]]

    def test_two_prompts_give_an_entry_for_each_role_and_one_identity(self, tmp_path: Path, source: RowSource) -> None:
        store = make_store(tmp_path / "store", source, TWO_PROMPTS)
        entries = dict.fromkeys((text, column > 0) for row in ROWS for column, text in enumerate(row))
        texts = [text for text, _ in entries]
        assert store.texts[:] == texts
        identity = store.identity(torch.arange(store.num_texts))
        assert identity.tolist() == [texts.index(text) for text in texts]
        assert (identity != torch.arange(store.num_texts)).sum() == 7

    def test_ids_do_not_depend_on_batches(self, tmp_path: Path, source: RowSource) -> None:
        stores = []
        for rows_per_batch in (1, 7, 1000):
            with StoreWriter.create(
                tmp_path / f"store{rows_per_batch}", guide=TWO_PROMPTS, source=source, holdout=0.3
            ) as writer:
                fill(writer, source, rows_per_batch)
                embed(writer)
                stores.append(GuideStore.open(writer.publish()))
        first, *others = stores
        for other in others:
            assert contents(other) == contents(first)
            assert other.fingerprint == first.fingerprint
            assert np.array_equal(other.held_out, first.held_out)

    def test_texts_that_nfc_makes_equal_are_one(self, tmp_path: Path) -> None:
        decomposed = unicodedata.normalize("NFD", "café")
        store = make_store(tmp_path / "store", source_of(tmp_path / "p.jsonl", [(decomposed, "p"), ("café", "p")]))
        assert store.texts[:] == [decomposed, "p"]

    @pytest.mark.parametrize("shape", [(0,), (1,), (5,), (2, 3), (2, 0, 3), ()])
    def test_gather_keeps_the_shape_of_ids(self, tmp_path: Path, source: RowSource, shape: tuple[int, ...]) -> None:
        store = make_store(tmp_path / "store", source)
        everything = torch.cat([store.vectors_of(shard) for shard in range(len(store.manifest.plan.texts))])
        ids = torch.randint(store.num_texts, shape)
        assert torch.equal(store.gather(ids), everything[ids])
        assert store.gather(ids.int()).shape == (*shape, WIDTH)
        assert store.identity(ids).shape == shape

    def test_single_shard_is_gathered_alike(
        self, tmp_path: Path, source: RowSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        several = make_store(tmp_path / "several", source)
        monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 65_536)
        one = make_store(tmp_path / "one", source)
        assert len(several.manifest.plan.texts) > len(one.manifest.plan.texts) == 1
        assert contents(several) == contents(one)
        assert several.fingerprint == one.fingerprint

    @pytest.mark.parametrize("ids", [[-1], [0, 10**6]])
    def test_ids_out_of_range_are_refused(self, tmp_path: Path, source: RowSource, ids: list[int]) -> None:
        store = make_store(tmp_path / "store", source)
        with pytest.raises(StoreError, match="which holds 65 texts"):
            store.gather(torch.tensor(ids))
        with pytest.raises(IndexError):
            store.texts.take(np.array(ids))

    def test_texts_are_a_sequence(self, tmp_path: Path, source: RowSource) -> None:
        texts = make_store(tmp_path / "store", source).texts
        assert len(texts) == len(list(texts)) == 65
        assert texts[-1] == texts[64] == texts[60:][-1]
        assert texts.take(np.array([], dtype=np.int64)) == []
        with pytest.raises(IndexError):
            texts[65]

    def test_vectors_begin_at_64_bytes(self, tmp_path: Path, source: RowSource) -> None:
        store = make_store(tmp_path / "store", source)
        assert {store.vectors_of(shard).data_ptr() % 64 for shard in range(2)} == {0}

    def test_writing_to_what_was_read_leaves_the_files_alone(self, tmp_path: Path, source: RowSource) -> None:
        store = make_store(tmp_path / "store", source)
        store.vectors_of(0).zero_()
        store.rows_of(0)[:] = 0
        assert store.verify() == []

    def test_store_pickles_and_copies_by_path(self, tmp_path: Path, source: RowSource) -> None:
        store = make_store(tmp_path / "store", source)
        store.gather(torch.tensor([0]))
        ids = torch.randint(store.num_texts, (20,))
        for other in (pickle.loads(pickle.dumps(store)), copy.deepcopy(store)):
            assert torch.equal(other.gather(ids), store.gather(ids))

    def test_store_replaced_while_in_use_is_noticed(self, tmp_path: Path, source: RowSource) -> None:
        state = pickle.dumps(make_store(tmp_path / "store", source))
        make_store(tmp_path / "store", source, TWO_PROMPTS, mode="overwrite")
        with pytest.raises(StoreError, match="was replaced by another store while in use"):
            pickle.loads(state).rows_of(0)


class TestHoldout:
    def test_row_is_held_out_exactly_if_its_positive_is(self, tmp_path: Path) -> None:
        rows = [(f"a{i}", f"p{i % 300}") for i in range(1000)]
        store = make_store(tmp_path / "store", source_of(tmp_path / "p.jsonl", rows), holdout=0.3)
        held = {positive for (_, positive), out in zip(rows, store.held_out, strict=True) if out}
        kept = {positive for (_, positive), out in zip(rows, store.held_out, strict=True) if not out}
        assert not held & kept
        assert 0.2 < len(held) / 300 < 0.4

    def test_larger_share_holds_out_the_same_rows_and_more(self, tmp_path: Path, source: RowSource) -> None:
        shares = [make_store(tmp_path / f"{share}", source, holdout=share).held_out for share in (0.0, 0.3, 0.6, 1.0)]
        assert not shares[0].any()
        assert shares[3].all()
        for fewer, more in pairwise(shares):
            assert (fewer <= more).all()

    def test_tasks_of_rows_are_kept_by_name(self, tmp_path: Path) -> None:
        path = tmp_path / "tasks.jsonl"
        tasks = ["nli", "qa", None, "nli", "qa", "nli"] * 5
        rows = ({"anchor": f"a{row}", "positive": f"b{row}", "task_name": task} for row, task in enumerate(tasks))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        store = make_store(tmp_path / "store", read_rows(path))
        assert store.tasks == ("nli", "qa")
        assert [None if task < 0 else store.tasks[task] for task in store.task_of_rows] == tasks

    def test_rows_without_tasks_have_none(self, tmp_path: Path, source: RowSource) -> None:
        store = make_store(tmp_path / "store", source)
        assert store.tasks == ()
        assert set(store.task_of_rows.tolist()) == {-1}

    def test_dataset_has_texts_and_ids_of_its_split(self, tmp_path: Path, source: RowSource) -> None:
        store = make_store(tmp_path / "store", source, holdout=0.3)
        splits = [store.to_dataset("train"), store.to_dataset("held_out")]
        for dataset, chosen in zip(splits, [~store.held_out, store.held_out], strict=True):
            assert dataset.column_names == ["anchor", "positive", "negative_1", "label"]
            columns = [dataset[name] for name in store.columns]
            assert list(zip(*columns, strict=True)) == [ROWS[row] for row in np.nonzero(chosen)[0]]
            assert dataset["label"][:] == store.rows[chosen].tolist()
        assert sum(map(len, splits)) == len(ROWS)
        assert pickle.loads(pickle.dumps(splits[0]))[0] == splits[0][0]

    def test_dataset_without_rows_is_refused(self, tmp_path: Path, source: RowSource) -> None:
        store = make_store(tmp_path / "store", source)
        with pytest.raises(StoreError, match="has no rows in 'held_out', its --holdout was 0: "):
            store.to_dataset("held_out")
        with pytest.raises(ConfigError, match="split is 'test'"):
            store.to_dataset("test")  # type: ignore[arg-type]

    def test_holdout_of_nothing_is_a_warning(
        self, tmp_path: Path, source: RowSource, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            make_store(tmp_path / "store", source, holdout=1e-9)
        assert "held out 0 of 60 rows" in caplog.text


class TestScores:
    def test_scores_are_read_when_all_are_written(self, tmp_path: Path, source: RowSource) -> None:
        store = make_store(tmp_path / "store", source)
        assert pending_scores(store) == [0, 1, 2, 3]
        scores = np.random.default_rng(0).random((60, 2), dtype=np.float32)
        for shard in (2, 0, 1):
            assert write_scores(store, shard, scores[16 * shard :][:16])
        with pytest.raises(StoreError, match="has pair scores for 3 of 4 shards"):
            _ = store.pair_scores
        assert len(store.verify()) == 1
        write_scores(store, 3, scores[48:])
        assert not write_scores(store, 3, scores[48:])
        assert np.array_equal(GuideStore.open(store.path).pair_scores, scores)
        assert store.verify(deep=False) == []
        with pytest.raises(StoreError, match=r"shape \(3, 2\), expected \(12, 2\)"):
            write_scores(store, 3, scores[:3])


class TestWriting:
    def test_existing_store_is_refused_without_flags(self, tmp_path: Path, source: RowSource) -> None:
        make_store(tmp_path / "store", source)
        with pytest.raises(StoreError, match="exists: go on with --resume, add rows with --append, make it anew"):
            StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source)

    @pytest.mark.parametrize("mode", ["resume", "overwrite"])
    def test_folder_that_is_no_store_is_never_touched(self, tmp_path: Path, source: RowSource, mode: Any) -> None:
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
        with pytest.raises(StoreError, match="exists and is not a guide store"):
            StoreWriter.create(tmp_path / "thesis", guide=GUIDE, source=source, mode=mode)
        assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"

    def test_store_under_a_file_is_refused_before_rows_are_read(self, tmp_path: Path, source: RowSource) -> None:
        (tmp_path / "notes").write_text("years of work")
        with pytest.raises(StoreError, match=f"{tmp_path}/notes is a file, expected a folder to write .* in: choose"):
            StoreWriter.create(tmp_path / "notes" / "deep" / "store", guide=GUIDE, source=source)

    def test_empty_folder_becomes_the_store(self, tmp_path: Path, source: RowSource) -> None:
        (tmp_path / "store").mkdir()
        assert make_store(tmp_path / "store", source).verify() == []

    def test_resume_without_a_store_starts_one(self, tmp_path: Path, source: RowSource) -> None:
        assert make_store(tmp_path / "a" / "store", source, mode="resume").num_rows == 60

    def test_resume_goes_on_where_it_stopped(self, tmp_path: Path, source: RowSource) -> None:
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            fill(writer, source)
            embed(writer, [3, 1])
        with pytest.raises(StoreError, match=r"has 2 of 5 shards of vectors: run `gistfast precompute .* --resume`"):
            GuideStore.open(tmp_path / "store")
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source, mode="resume") as writer:
            assert not writer.needs_rows
            assert writer.vectors.pending() == [0, 2, 4]
            with pytest.raises(StoreError, match="still lacks 3 shards"):
                writer.publish()
            embed(writer)
            assert GuideStore.open(writer.publish()).verify() == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"query_prompt": "query: "}, "guide.query_prompt: store has '', asked for 'query: '"),
            ({"weights_hash": "v"}, "guide.weights_hash: store has 'w', asked for 'v'"),
            ({"weights_hash": "v", "name": "bge"}, "guide.name: store has 'guide', asked for 'bge'"),
            ({"dtype": "float32"}, "guide.dtype: store has 'float16', asked for 'float32'"),
            ({"width": 9}, "guide.width: store has 8, asked for 9"),
        ],
    )
    def test_resume_with_another_guide_names_the_field(
        self, tmp_path: Path, source: RowSource, change: dict[str, Any], message: str
    ) -> None:
        make_store(tmp_path / "store", source)
        with pytest.raises(StoreError) as caught:
            StoreWriter.create(tmp_path / "store", guide=replace(GUIDE, **change), source=source, mode="resume")
        assert message in str(caught.value)

    def test_resume_with_the_guide_in_another_folder_goes_on(self, tmp_path: Path, source: RowSource) -> None:
        store = make_store(tmp_path / "store", source)
        moved = make_store(tmp_path / "store", source, replace(GUIDE, name="elsewhere"), mode="resume")
        assert moved.manifest == store.manifest
        assert make_store(tmp_path / "b", source, replace(GUIDE, name="b")).fingerprint == store.fingerprint

    def test_resume_with_other_data_names_the_field(self, tmp_path: Path, source: RowSource) -> None:
        make_store(tmp_path / "store", source)
        with pytest.raises(StoreError, match=r"data\.holdout: store has 0\.0, asked for 0\.1"):
            StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source, holdout=0.1, mode="resume")
        other = source_of(tmp_path / "pairs.jsonl", ROWS[:-1])
        with pytest.raises(StoreError, match=r"data\.fingerprint: store has "):
            StoreWriter.create(tmp_path / "store", guide=GUIDE, source=other, mode="resume")

    @pytest.mark.parametrize("mode", ["resume", "append", "add_guide"])
    def test_store_with_one_entry_a_text_is_refused_where_one_a_role_is_asked_for(
        self, tmp_path: Path, source: RowSource, mode: Any
    ) -> None:
        make_store(tmp_path / "store", source)
        with pytest.raises(StoreError, match=r"has one vector for a text .*: leave --split-roles out, or make"):
            StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source, mode=mode, split_roles=True)
        anew = make_store(tmp_path / "store", source, mode="overwrite", split_roles=True)
        assert not anew.manifest.data.one_role

    def test_interrupted_reading_leaves_nothing(self, tmp_path: Path, source: RowSource) -> None:
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            writer.add_rows(next(iter(source.batches())))
        assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]

    def test_second_process_takes_the_rows_of_the_first(self, tmp_path: Path, source: RowSource) -> None:
        with (
            StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source, mode="resume") as slow,
            StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source, mode="resume") as quick,
        ):
            fill(quick, source)
            fill(slow, source)
            embed(quick, [0, 1])
            assert slow.vectors.pending() == [2, 3, 4]
            assert not slow.vectors.write(0, vectors_for(slow.vectors.texts_of(0)))
            embed(slow)
            assert quick.vectors.pending() == []
            assert slow.publish() == quick.publish()
        assert len(list((tmp_path / "store" / "vectors").rglob("*.arrow"))) == 5
        assert GuideStore.open(tmp_path / "store").verify() == []

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (np.nan, "gave a vector that is not finite as float16 for text 17, "),
            (np.inf, "gave a vector that is not finite"),
            (1e6, "gave a vector that is not finite as float16"),
            (0.0, "gave a zero vector"),
        ],
    )
    def test_bad_vector_is_named_by_its_text(
        self, tmp_path: Path, source: RowSource, value: float, message: str
    ) -> None:
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            fill(writer, source)
            vectors = vectors_for(writer.vectors.texts_of(1))
            vectors[1] = value
            with pytest.raises(VectorError) as caught:
                writer.vectors.write(1, vectors)
            assert message in str(caught.value)
            assert repr(writer.vectors.texts_of(1)[1]) in str(caught.value)
            assert 1 in writer.vectors.pending()
            with pytest.raises(VectorError, match=r"shape \(16, 3\), expected \(16, 8\)"):
                writer.vectors.write(1, vectors[:, :3])

    def test_full_disk_is_one_clear_line_and_resumable(
        self, tmp_path: Path, source: RowSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            fill(writer, source)
            embed(writer, [0])
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                with pytest.raises(StoreError) as caught:
                    embed(writer, [1])
        assert "No space left on device: what was committed is kept" in str(caught.value)
        assert "--resume" in str(caught.value)
        assert len(list((tmp_path / "store" / "vectors").iterdir())) == 1
        assert make_store(tmp_path / "store", source, mode="resume").verify() == []

    def test_file_stays_when_interrupted_after_its_commit(
        self, tmp_path: Path, source: RowSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(folder: Path) -> None:
            if folder.name == "commits":
                raise KeyboardInterrupt

        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            fill(writer, source)
            with monkeypatch.context() as patch:
                patch.setattr("gistfast.store.files.sync_folder", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    embed(writer, [0])
            assert writer.vectors.pending() == [1, 2, 3, 4]
            embed(writer)
            assert GuideStore.open(writer.publish()).verify() == []


class TestOverwriting:
    def test_old_store_lives_until_the_new_one_is_complete(self, tmp_path: Path, source: RowSource) -> None:
        old = contents(make_store(tmp_path / "store", source))
        with StoreWriter.create(tmp_path / "store", guide=TWO_PROMPTS, source=source, mode="overwrite") as writer:
            assert writer.path != tmp_path / "store"
            fill(writer, source)
            embed(writer)
            assert contents(GuideStore.open(tmp_path / "store")) == old
            writer.publish()
            assert writer.path == tmp_path / "store"
        assert GuideStore.open(tmp_path / "store").manifest.guide == TWO_PROMPTS
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "store"]

    @pytest.mark.parametrize("mode", ["resume", "overwrite"])
    def test_interrupted_overwrite_goes_on(self, tmp_path: Path, source: RowSource, mode: Any) -> None:
        old = contents(make_store(tmp_path / "store", source))
        with StoreWriter.create(tmp_path / "store", guide=TWO_PROMPTS, source=source, mode="overwrite") as writer:
            fill(writer, source)
            embed(writer, [0, 1])
        assert contents(GuideStore.open(tmp_path / "store")) == old
        with StoreWriter.create(tmp_path / "store", guide=TWO_PROMPTS, source=source, mode=mode) as writer:
            assert writer.vectors.pending()[0] == 2
            embed(writer)
            writer.publish()
        assert GuideStore.open(tmp_path / "store").manifest.guide == TWO_PROMPTS

    def test_overwrite_with_other_settings_begins_anew(self, tmp_path: Path, source: RowSource) -> None:
        make_store(tmp_path / "store", source)
        with StoreWriter.create(tmp_path / "store", guide=TWO_PROMPTS, source=source, mode="overwrite") as writer:
            fill(writer, source)
            embed(writer, [0])
        third = replace(GUIDE, weights_hash="third")
        assert make_store(tmp_path / "store", source, third, mode="overwrite").manifest.guide == third
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "store"]

    def test_overwrite_without_exchange_is_mended_after_an_interruption(
        self, tmp_path: Path, source: RowSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_store(tmp_path / "store", source)
        monkeypatch.setattr("gistfast.store.replace._exchange", lambda first, second: False)
        with StoreWriter.create(tmp_path / "store", guide=TWO_PROMPTS, source=source, mode="overwrite") as writer:
            fill(writer, source)
            embed(writer)
        # Where an interruption between the two renames leaves things.
        (tmp_path / "store").rename(tmp_path / ".store.old-12345678")
        with pytest.raises(StoreError, match="is missing, its replacement was interrupted: run the same"):
            GuideStore.open(tmp_path / "store")
        store = make_store(tmp_path / "store", source, TWO_PROMPTS, mode="overwrite")
        assert store.manifest.guide == TWO_PROMPTS
        make_store(tmp_path / "store", source, GUIDE, mode="overwrite")
        assert GuideStore.open(tmp_path / "store").manifest.guide == GUIDE
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "store"]

    def test_link_to_a_store_stays_a_link(self, tmp_path: Path, source: RowSource) -> None:
        make_store(tmp_path / "store", source)
        (tmp_path / "link").symlink_to(tmp_path / "store")
        make_store(tmp_path / "link", source, TWO_PROMPTS, mode="overwrite")
        assert (tmp_path / "link").is_symlink()
        assert GuideStore.open(tmp_path / "store").manifest.guide == TWO_PROMPTS

    def test_damaged_store_can_be_overwritten(self, tmp_path: Path, source: RowSource) -> None:
        make_store(tmp_path / "store", source)
        (tmp_path / "store" / "store.json").write_text("{")
        assert make_store(tmp_path / "store", source, mode="overwrite").verify() == []


class TestVerifying:
    @pytest.fixture
    def store(self, tmp_path: Path, source: RowSource) -> GuideStore:
        return make_store(tmp_path / "store", source, holdout=0.3)

    @pytest.mark.parametrize("kind", ["texts", "rows", "vectors"])
    def test_every_flipped_bit_is_found(self, store: GuideStore, kind: str) -> None:
        path = shard_file(store.path, kind, 1)
        sound = path.read_bytes()
        for place in range(0, len(sound), 97):
            flip_bit(path, place)
            (problem,) = GuideStore.open(store.path).verify()
            assert str(path) in problem
            path.write_bytes(sound)
        assert store.verify() == []

    @pytest.mark.parametrize("kind", ["texts", "rows", "vectors"])
    def test_cut_and_missing_files_are_named(self, store: GuideStore, kind: str) -> None:
        cut, missing = shard_file(store.path, kind, 0), shard_file(store.path, kind, 1)
        size = cut.stat().st_size
        os.truncate(cut, size - 1)
        missing.unlink()
        problems = GuideStore.open(store.path).verify()
        assert len(problems) == 2
        assert f"{cut} has {size - 1} bytes, expected {size}" in problems[0]
        assert f"{missing} is missing" in problems[1]
        with pytest.raises(StoreError, match=r"is missing|bytes, expected"):
            contents(GuideStore.open(store.path))

    def test_missing_commit_is_named(self, store: GuideStore) -> None:
        (store.path / "commits" / "rows-00002.json").unlink()
        (problem,) = store.verify()
        assert "commits/rows-00002.json" in problem

    def test_shard_of_another_store_is_named(self, tmp_path: Path, source: RowSource, store: GuideStore) -> None:
        other = make_store(tmp_path / "other", source, replace(GUIDE, weights_hash="other"), holdout=0.3)
        foreign = shard_file(other.path, "vectors", 1)
        (store.path / store.manifest.vectors[0] / foreign.name).write_bytes(foreign.read_bytes())
        commit = commit_file(store.path, "vectors", 1)
        theirs = commit_file(other.path, "vectors", 1).read_text()
        commit.write_text(theirs.replace(other.manifest.guide.key, store.manifest.guide.key))
        (problem,) = GuideStore.open(store.path).verify()
        assert f"{commit} was written for another guide or other data" in problem

    @pytest.mark.parametrize(
        "file",
        ["/etc/passwd", "../other/vectors/00001-0.arrow", "vectors/../../x.arrow", "rows/00001-0.arrow", 7],
    )
    def test_commit_cannot_point_out_of_its_folder(self, store: GuideStore, file: Any) -> None:
        path = commit_file(store.path, "vectors", 1)
        path.write_text(json.dumps({**json.loads(path.read_text()), "file": file}))
        with pytest.raises(StoreError, match=r"expected one in vectors/"):
            GuideStore.open(store.path).vectors_of(1)

    @pytest.mark.parametrize("change", [{"rows": 15}, {"colour": "red"}])
    def test_edited_commit_is_named(self, store: GuideStore, change: dict[str, Any]) -> None:
        path = commit_file(store.path, "vectors", 1)
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        (problem,) = GuideStore.open(store.path).verify()
        assert str(path) in problem

    def test_edited_store_json_is_refused(self, store: GuideStore) -> None:
        path = store.path / "store.json"
        path.write_text(path.read_text().replace('"query_prompt": ""', '"query_prompt": "query: "'))
        with pytest.raises(StoreError, match=r"store\.json was changed after it was written"):
            GuideStore.open(store.path)

    @pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
    def test_unreadable_store_json_is_one_clear_line(self, store: GuideStore, content: str) -> None:
        (store.path / "store.json").write_text(content, encoding="latin-1")
        with pytest.raises(StoreError) as caught:
            GuideStore.open(store.path)
        assert "\n" not in str(caught.value)

    def test_newer_version_is_refused_by_name(self, store: GuideStore) -> None:
        path = store.path / "store.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 3}))
        with pytest.raises(StoreError, match="has format version 3, this gistfast reads 2: upgrade"):
            GuideStore.open(store.path)

    def test_missing_store_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"nothing has no store\.json: make a guide store with"):
            GuideStore.open(tmp_path / "nothing")

    def test_another_program_can_read_the_shards(self, store: GuideStore) -> None:
        with pa.ipc.open_file(shard_file(store.path, "vectors", 0)) as file:
            vectors = file.read_all().column("vector")
        assert file.num_record_batches == 1
        assert np.array_equal(np.array(vectors.to_pylist()), store.vectors_of(0).numpy())


class TestKeyTable:
    @pytest.mark.parametrize("spread", [1, 2**20, 2**63], ids=["all collide", "some collide", "spread"])
    def test_keys_get_numbers_in_order_of_appearance(self, spread: int) -> None:
        generator = np.random.default_rng(0)
        # Few distinct first words: keys that want the same slot.
        pool = np.stack([generator.integers(0, spread, 3000), generator.permutation(3000)], axis=1).astype(np.uint64)
        table, expected = KeyTable(), dict[tuple[int, ...], int]()
        for _ in range(12):
            keys = pool[np.sort(generator.choice(len(pool), 700, replace=False))]
            wanted = [expected.setdefault(tuple(key), len(expected)) for key in keys.tolist()]
            assert table.number(keys).tolist() == wanted
        assert table.count == len(expected)
