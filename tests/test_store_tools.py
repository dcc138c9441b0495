"""Clearing a store up, looking into it, and the commands that do so."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_cases import (
    GUIDE,
    KINDS,
    MORE,
    ROWS,
    commit_file,
    complete,
    edit,
    embed,
    file_of,
    files_of,
    fill,
    flip_bit,
    make_store,
    shard_file,
    two_negatives,
)
from typer.testing import CliRunner

from gistfast.cli.main import app
from gistfast.errors import StoreError
from gistfast.neighbours.index import build_index, index_path, load_index
from gistfast.neighbours.index_search import choose_search
from gistfast.neighbours.mining import mine
from gistfast.neighbours.pair_scores import score_pairs
from gistfast.rows.dataset import RowSource
from gistfast.store import GuideInfo, GuideStore, StoreWriter
from gistfast.store.describe import describe_store
from gistfast.store.garbage import collect_garbage
from gistfast.store.mined import Mined, write_mined
from gistfast.store.plan import FolderLock
from gistfast.store.verify import check_store


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards from few rows, and no waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 16)


@pytest.fixture
def store(tmp_path: Path, source: RowSource) -> Path:
    """A finished store with scores and index."""
    return complete(make_store(tmp_path / "store", source, holdout=0.3)).path


def make_old(*paths: Path) -> None:
    """Let files be written more than an hour ago."""
    for path in paths:
        changed = path.stat().st_mtime - 3601
        os.utime(path, (changed, changed))


class TestClearingUp:
    def test_finished_store_has_nothing_to_remove(self, store: Path) -> None:
        before = files_of(store)
        for options in ({}, {"now": True}, {"unfinished": True}):
            assert collect_garbage(store, **options).garbage == ()
        assert files_of(store) == before

    def litter(self, store: Path) -> list[Path]:
        """What killed writers leave: temporary files, shards without a commit, folders beside the store."""
        manifest = GuideStore.open(store).manifest
        files = [f"commits/.{manifest.vectors[0].replace('/', '-')}-00001.json.ab12cd34.tmp", ".store.json.1.tmp"]
        files += ["texts/.00000-ab12cd34.arrow.1.tmp", "index/.00ff00ff.faiss.1.tmp"]
        files += ["vectors/00ff00ff/00000-1.arrow"]
        files += [f"{kind}/00001-ab12cd34.arrow" for kind in ("texts", "rows", manifest.vectors[0], manifest.scores)]
        paths = [store / file for file in files]
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"12345")
        return paths

    def test_leftovers_go_when_nobody_can_be_writing_them(self, store: Path) -> None:
        before = files_of(store)
        left = self.litter(store)
        young = collect_garbage(store)
        assert (young.garbage, young.num_young) == ((), len(left))
        make_old(*left)
        listed = collect_garbage(store, dry_run=True)
        assert sorted(item.path for item in listed.garbage) == sorted(left)
        assert all(path.exists() for path in left)
        done = collect_garbage(store)
        assert (done, done.num_bytes, done.num_young) == (listed, 5 * len(left), 0)
        assert files_of(store) == before
        assert not list(store.glob("*/00ff00ff"))

    def test_leftovers_go_at_once_when_told_that_nobody_writes(self, store: Path) -> None:
        before = files_of(store)
        left = self.litter(store)
        assert len(collect_garbage(store, now=True).garbage) == len(left)
        assert files_of(store) == before

    def test_folders_beside_the_store_go_unless_a_process_holds_them(self, store: Path) -> None:
        for name in (".store.reading-1", ".store.reading-2", ".store.old-1", ".store.new"):
            (store.parent / name).mkdir()
            (store.parent / name / "file").write_bytes(b"12345")
        with FolderLock(store.parent / ".store.reading-2"):
            done = collect_garbage(store)
        assert {item.path.name for item in done.garbage} == {".store.reading-1", ".store.old-1"}
        assert done.num_bytes == 10
        assert {path.name for path in store.parent.glob(".store*")} == {".store.reading-2", ".store.new"}
        # A replacement that was begun goes with all that is unfinished.
        collect_garbage(store, unfinished=True)
        assert [path.name for path in store.parent.glob(".store*")] == []

    def test_store_that_another_process_adds_to_is_left_alone(self, store: Path, more: RowSource) -> None:
        with StoreWriter.create(store, guide=GUIDE, source=more, mode="append") as writer:
            for _ in range(3):
                writer.add_rows(next(iter(more.batches())))
            before = files_of(store)
            for options in ({}, {"now": True}, {"unfinished": True}, {"dry_run": True}):
                with pytest.raises(StoreError, match=r"another process is at .*: try again when it has ended"):
                    collect_garbage(store, **options)
            assert files_of(store) == before
            fill(writer, more)
        assert complete(make_store(store, more, mode="resume")).verify() == []

    def test_interrupted_reading_of_rows_is_cleared_up(self, store: Path, more: RowSource) -> None:
        before = files_of(store)
        with StoreWriter.create(store, guide=GUIDE, source=more, mode="append") as writer:
            for _ in range(3):
                writer.add_rows(next(iter(more.batches())))
        assert files_of(store) != before
        assert collect_garbage(store).num_bytes > 0
        assert files_of(store) == before

    def test_what_is_under_way_stays_until_it_is_given_up(self, store: Path, more: RowSource) -> None:
        before = files_of(store)
        with StoreWriter.create(store, guide=GUIDE, source=more, mode="append") as writer:
            fill(writer, more)
            embed(writer, writer.vectors.pending()[:1])
            begun = files_of(store)
            # Nobody holds the store while vectors are made.
            assert collect_garbage(store, now=True).garbage == ()
            assert files_of(store) == begun
        collect_garbage(store, unfinished=True)
        # What sources were read is remembered, and means nothing.
        assert {**files_of(store), "sources.json": before["sources.json"]} == before

    def test_added_guide_is_given_up_with_its_vectors(self, store: Path, source: RowSource) -> None:
        before = files_of(store)
        second = replace(GUIDE, weights_hash="second", width=5)
        with StoreWriter.create(store, guide=second, source=source, mode="add_guide") as writer:
            embed(writer)
            score_pairs(writer.store())
        collect_garbage(store, unfinished=True)
        assert files_of(store) == before
        assert len(list((store / "vectors").iterdir())) == len(list((store / "scores").iterdir())) == 1

    def test_store_that_was_never_finished_is_not_given_up(self, tmp_path: Path, source: RowSource) -> None:
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            fill(writer, source)
            embed(writer, [1])
        before = files_of(tmp_path / "store")
        with pytest.raises(StoreError, match="was never finished: go on with --resume, or delete the folder"):
            collect_garbage(tmp_path / "store", unfinished=True)
        assert collect_garbage(tmp_path / "store", now=True).garbage == ()
        assert files_of(tmp_path / "store") == before

    def test_shards_of_interrupted_writers_of_an_unfinished_store_go(self, tmp_path: Path, source: RowSource) -> None:
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            fill(writer, source)
            embed(writer, [0, 1])
        commit = commit_file(tmp_path / "store", "vectors", 1)
        file = shard_file(tmp_path / "store", "vectors", 1)
        commit.unlink()
        assert [item.path for item in collect_garbage(tmp_path / "store", now=True).garbage] == [file]

    def test_scores_of_earlier_scorings_go(self, store: Path, source: RowSource) -> None:
        first = GuideStore.open(store).manifest.scores
        second = replace(GUIDE, weights_hash="second", width=5)
        with StoreWriter.create(store, guide=second, source=source, mode="add_guide") as writer:
            embed(writer)
            complete(writer.store())
            writer.publish()
        done = collect_garbage(store)
        assert {item.path.relative_to(store).parts[0] for item in done.garbage} == {
            "commits",
            "scores",
            "index",
            "mined",
        }
        assert not (store / first).exists()
        both = GuideStore.open(store)
        assert both.verify() == []
        assert len(both.pair_scores) == len(ROWS)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("text", [None, "{", '{"file": "a"}'])
    def test_file_whose_commit_is_lost_is_kept(self, store: Path, kind: str, text: str | None) -> None:
        commit, file = commit_file(store, kind, 1), shard_file(store, kind, 1)
        lost = commit.read_text()
        commit.unlink() if text is None else commit.write_text(text)
        assert collect_garbage(store, now=True).garbage == ()
        commit.write_text(lost)
        assert file.exists()
        assert check_store(store, deep=True).problems == []

    def test_commit_that_was_copied_does_not_take_the_file_with_it(self, store: Path) -> None:
        copy = commit_file(store, "rows", 1).with_name("rows-00077.json")
        shutil.copy(commit_file(store, "rows", 1), copy)
        assert [item.path for item in collect_garbage(store).garbage] == [copy]
        assert check_store(store, deep=True).problems == []

    def test_index_of_other_vectors_goes(self, store: Path, more: RowSource) -> None:
        grown = make_store(store, more, mode="append")
        assert build_index(grown, "flat") is not None
        garbage = [item.path for item in collect_garbage(store).garbage if item.path.parent == store / "index"]
        assert [path.suffix for path in garbage] == [".json", ".faiss"]
        load_index(grown)
        file_of(store, "index").with_suffix(".json").unlink()
        assert collect_garbage(store).garbage == ()
        assert [item.path.suffix for item in collect_garbage(store, now=True).garbage] == [".faiss"]

    def test_mined_negatives_of_other_states_and_settings_go(self, store: Path, more: RowSource) -> None:
        kinds = [GuideStore.open(store).mined_kind]
        grown = complete(make_store(store, more, mode="append"))
        mine(grown, replace(two_negatives(grown), margin=0.1), choose_search(grown, "cpu"))
        kinds.append(two_negatives(grown).kind)
        before = grown.mined.negatives.tolist()
        assert {f"mined/{item.path.stem}" for item in collect_garbage(store).garbage} >= set(kinds)
        assert not any(path.exists() for kind in kinds for path in (store / kind, store / f"{kind}.json"))
        assert GuideStore.open(store).mined.negatives.tolist() == before
        assert GuideStore.open(store).verify() == []

    def test_mining_that_was_interrupted_stays_until_it_is_given_up(self, store: Path) -> None:
        before = files_of(store)
        opened = GuideStore.open(store)
        info = replace(two_negatives(opened), margin=0.1)
        found = Mined.empty(16, 2)
        write_mined(opened, info, 0, found)
        begun = files_of(store)
        assert collect_garbage(store, now=True).garbage == ()
        assert files_of(store) == begun
        with FolderLock(store / "commits"), pytest.raises(StoreError, match=r"another process is at .*commits"):
            collect_garbage(store, unfinished=True)
        collect_garbage(store, unfinished=True)
        assert files_of(store) == before

    def test_what_an_index_was_built_from_goes(self, store: Path) -> None:
        building = index_path(GuideStore.open(store), ".building")
        building.mkdir()
        (building / "00000-1.npy").write_bytes(b"12345")
        assert collect_garbage(store).num_young == 1
        make_old(building)
        assert collect_garbage(store).num_bytes == 5
        assert not building.exists()

    @pytest.mark.parametrize("folder", ["texts", "commits", "vectors/00ff00ff", "index"])
    def test_nothing_is_removed_where_a_link_leads_out_of_the_store(
        self, tmp_path: Path, store: Path, folder: str
    ) -> None:
        outside, inside = tmp_path / "outside", store / folder
        if inside.exists():
            inside.rename(outside)
        else:
            outside.mkdir()
        inside.symlink_to(outside)
        for name in ("00077-ab.arrow", ".a.1.tmp"):
            (outside / name).write_text("")
        if folder.startswith("vectors"):
            record = {"file": f"{folder}/00077-ab.arrow"}
            (store / "commits" / "vectors-00ff00ff-00077.json").write_text(json.dumps(record))
        before = files_of(outside)
        collect_garbage(store, now=True)
        assert files_of(outside) == before
        # Reading follows links: a store from the hub's cache consists of them.
        assert check_store(store, deep=True).problems == []

    def test_damaged_store_json_stops_it(self, store: Path) -> None:
        edit(store / "store.json", weights=[2.0])
        before = files_of(store)
        with pytest.raises(StoreError, match=r"store\.json was changed after it was written"):
            collect_garbage(store, now=True)
        assert files_of(store) == before

    def test_readers_keep_what_they_have(self, store: Path, source: RowSource) -> None:
        early = GuideStore.open(store)
        seen = early.pair_scores
        with StoreWriter.create(store, guide=replace(GUIDE, width=5), source=source, mode="add_guide") as writer:
            embed(writer)
            writer.publish()
        kept = seen.copy()
        assert collect_garbage(store).num_bytes > 0
        assert np.array_equal(early.pair_scores, kept)
        assert len(early.texts[:]) == early.num_texts


class TestDescribing:
    def test_everything_in_the_store_is_told(self, store: Path, more: RowSource) -> None:
        grown = complete(make_store(store, more, mode="append"))
        told = json.loads(json.dumps(describe_store(store)))
        assert (told["fingerprint"], told["finished"], told["to_come"]) == (grown.fingerprint, True, None)
        assert told["guides"] == [{**json.loads(json.dumps(vars_of(GUIDE))), "key": GUIDE.key, "weight": 1.0}]
        data = told["data"]
        assert (data["rows"], data["texts"]) == (grown.num_rows, grown.num_texts)
        assert data["held_out"] == int(grown.held_out.sum())
        assert (data["repeated"], data["skipped"], data["columns"]) == (1, 0, list(grown.columns))
        assert [segment["description"] for segment in data["segments"]] == ["pairs.jsonl", "more.jsonl"]
        assert sum(told["bytes"].values()) == sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        assert {".", "commits", "index", "mined", grown.mined_kind, *grown.manifest.kinds} < set(told["bytes"])
        assert (told["index"]["kind"], told["index"]["num_vectors"]) == ("flat", grown.num_texts)
        assert (told["mined"]["negatives"], told["mined"]["margin"]) == (2, 0.05)
        assert told["shards"]["texts"] == {"done": 7, "planned": 7}

    def test_file_that_goes_while_sizes_are_taken_counts_nothing(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, walk = describe_store(store)["bytes"], os.walk
        monkeypatch.setattr(os, "walk", lambda top: ((*found, [*names, ".x.tmp"]) for *found, names in walk(top)))
        assert describe_store(store)["bytes"] == before

    def test_what_is_under_way_is_told_beside_what_is_there(self, store: Path, more: RowSource) -> None:
        with StoreWriter.create(store, guide=GUIDE, source=more, mode="append") as writer:
            fill(writer, more)
            embed(writer, writer.vectors.pending()[:1])
        told = describe_store(store)
        assert (told["finished"], told["data"]["rows"]) == (True, len(ROWS))
        assert told["to_come"] == {"rows": len(MORE) - 1, "texts": 30, "guides": []}
        assert told["shards"][f"vectors/{GUIDE.key}"] == {"done": 6, "planned": 7}

    def test_store_that_was_never_finished_is_told_as_it_will_be(self, tmp_path: Path, source: RowSource) -> None:
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            fill(writer, source)
            embed(writer, [3])
        told = describe_store(tmp_path / "store")
        assert (told["finished"], told["to_come"], told["index"]) == (False, None, None)
        assert told["data"]["rows"] == len(ROWS)
        assert told["shards"][f"vectors/{GUIDE.key}"] == {"done": 1, "planned": 5}


def vars_of(guide: GuideInfo) -> dict[str, Any]:
    return {name: getattr(guide, name) for name in guide.__dataclass_fields__}


class TestCommands:
    def run(self, *arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["store", *map(str, arguments)])
        return result.exit_code, result.stdout

    def test_verify_ends_with_1_exactly_if_something_is_wrong(self, store: Path) -> None:
        code, said = self.run("verify", store)
        assert (code, said.count("\n")) == (0, 1)
        assert said.startswith(f"{store} is sound: 22 shards, ")
        path = file_of(store, "rows")
        flip_bit(path, 600)
        assert self.run("verify", store)[0] == 0
        code, said = self.run("verify", store, "--deep")
        assert (code, said.count("\n")) == (1, 1)
        assert str(path) in said

    def test_repair_ends_with_1_exactly_if_something_is_left(self, store: Path) -> None:
        assert self.run("repair", store) == (0, f"{store} is sound: nothing to mend\n")
        file_of(store, "scores").unlink()
        code, said = self.run("repair", store)
        assert (code, said.splitlines()[-1]) == (0, f"{store} is sound")
        file_of(store, "texts").unlink()
        code, said = self.run("repair", store)
        assert code == 1
        assert said.startswith(f"still bad: {store}/texts shard 1: give --source with pairs.jsonl")

    def test_info_is_a_table_or_json(self, store: Path) -> None:
        code, said = self.run("info", store)
        assert code == 0
        for word in ("guide, key", "8 wide, float16", "60, ", "held out", "pairs.jsonl", "flat, recall@10", "in all"):
            assert word in said
        assert json.loads(self.run("info", store, "--json")[1]) == describe_store(store)

    def test_info_of_an_unfinished_store_shows_its_progress(self, tmp_path: Path, source: RowSource) -> None:
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            fill(writer, source)
            embed(writer, [3])
        assert f"vectors/{GUIDE.key}: 1 of 5 shards" in self.run("info", tmp_path / "store")[1]

    def test_info_of_a_store_that_lacks_nothing_but_its_name_says_that_it_is_unfinished(
        self, tmp_path: Path, source: RowSource
    ) -> None:
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            fill(writer, source)
            embed(writer)
            score_pairs(writer.store())
        assert "the command that began it goes on with --resume" in self.run("info", tmp_path / "store")[1]

    def test_info_tells_of_a_store_that_will_take_its_place(self, store: Path, source: RowSource) -> None:
        with StoreWriter.create(store, guide=GUIDE, source=source, mode="overwrite") as writer:
            fill(writer, source)
        assert describe_store(store)["replacement"] == str(store.with_name(".store.new"))
        assert "--overwrite goes on with it" in self.run("info", store)[1]

    def test_gc_says_what_it_freed(self, store: Path) -> None:
        assert self.run("gc", store) == (0, "freed 0 bytes: nothing to remove\n")
        (store / "texts" / ".x.tmp").write_bytes(b"12345")
        assert "1 files younger than an hour were kept: a process may be writing" in self.run("gc", store)[1]
        listed = self.run("gc", store, "--now", "--dry-run")[1].splitlines()
        assert listed == [f"{store}/texts/.x.tmp (5 bytes)", "would free 5 bytes: 1 temporary files"]
        assert self.run("gc", store, "--now") == (0, "freed 5 bytes: 1 temporary files\n")

    def test_refusals_are_one_line(self, tmp_path: Path) -> None:
        for name in ("verify", "repair", "info", "gc"):
            result = CliRunner().invoke(app, ["store", name, str(tmp_path)])
            assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
