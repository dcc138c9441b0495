"""What is missing or damaged in a store is found and named."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from store_cases import (
    GUIDE,
    KINDS,
    ROWS,
    commit_file,
    complete,
    edit,
    embed,
    file_of,
    fill,
    flip_bit,
    make_store,
    shard_file,
    source_of,
)

from gistfast.errors import StoreError
from gistfast.neighbours.index import index_path
from gistfast.rows.dataset import RowSource
from gistfast.stages.repair import repair
from gistfast.store import GuideStore, StoreWriter
from gistfast.store.describe import describe_store
from gistfast.store.files import fingerprint_of
from gistfast.store.garbage import collect_garbage
from gistfast.store.shards import fixed_size_lists, replace_shard
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


class TestVerifying:
    def test_sound_store_is_sound(self, store: Path) -> None:
        for deep in (False, True):
            found = check_store(store, deep=deep)
            assert (found.problems, found.notes) == ([], ())
            assert found.num_shards == 5 + 4 + 5 + 4 + 4
            assert found.num_bytes == sum(path.stat().st_size for path in store.rglob("*.arrow"))

    @pytest.mark.parametrize("kind", [*KINDS, "index"])
    def test_flipped_bit_is_named_by_a_deep_look(self, store: Path, kind: str) -> None:
        path = file_of(store, kind)
        flip_bit(path, path.stat().st_size // 2)
        assert check_store(store, deep=False).problems == []
        (problem,) = check_store(store, deep=True).problems
        assert problem.startswith(f"{path} was changed after it was written")
        assert GuideStore.open(store).verify() == [problem]
        assert GuideStore.open(store).verify(deep=False) == []

    @pytest.mark.parametrize("deep", [False, True])
    @pytest.mark.parametrize("kind", [*KINDS, "index"])
    def test_cut_and_missing_files_are_named(self, store: Path, kind: str, deep: bool) -> None:
        path = file_of(store, kind)
        size = path.stat().st_size
        os.truncate(path, size - 8)
        (problem,) = check_store(store, deep=deep).problems
        assert problem.startswith(f"{path} has {size - 8} bytes, expected {size}")
        path.unlink()
        (problem,) = check_store(store, deep=deep).problems
        assert problem.startswith(f"{path} is missing")

    @pytest.mark.parametrize("kind", KINDS)
    def test_missing_commit_is_named(self, store: Path, kind: str) -> None:
        path = commit_file(store, kind, 1)
        path.unlink()
        (problem,) = check_store(store, deep=False).problems
        assert problem.startswith(f"cannot read {path}: No such file")
        assert "gistfast store repair" in problem

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "change",
        [{"rows": 15}, {"bytes": 3}, {"file": "../x.arrow"}, {"recipe": "0" * 32}, {"xxh3_128": "0" * 32}, {"a": 1}],
        ids=lambda change: next(iter(change)),
    )
    def test_edited_commit_is_named(self, store: Path, kind: str, change: dict[str, Any]) -> None:
        path = commit_file(store, kind, 1)
        edit(path, **change)
        (problem,) = check_store(store, deep="xxh3_128" in change).problems
        assert str(path if "bytes" not in change and "xxh3_128" not in change else file_of(store, kind)) in problem

    @pytest.mark.parametrize("kind", KINDS)
    def test_commit_of_another_shard_is_named(self, store: Path, kind: str) -> None:
        shutil.copy(commit_file(store, kind, 2), commit_file(store, kind, 1))
        (problem,) = check_store(store, deep=False).problems
        assert f"{commit_file(store, kind, 1)} names the file '{kind}" in problem

    @pytest.mark.parametrize("kind", ["rows", "vectors", "scores"])
    def test_foreign_shard_is_named(self, tmp_path: Path, store: Path, kind: str) -> None:
        rows = [(anchor, positive, f"another {negative}") for anchor, positive, negative in ROWS]
        guide = replace(GUIDE, weights_hash="other")
        other = complete(make_store(tmp_path / "other", source_of(tmp_path / "other.jsonl", rows), guide))
        theirs, commit = shard_file(other.path, kind, 1), commit_file(store, kind, 1)
        # With its commit a quick look tells it.
        shutil.copy(theirs, file_of(store, kind).with_name(theirs.name))
        named = json.loads(commit.read_text())["file"].rpartition("/")[0] + f"/{theirs.name}"
        edit(commit, **{**json.loads(commit_file(other.path, kind, 1).read_text()), "file": named})
        (problem,) = check_store(store, deep=False).problems
        assert f"{commit} was written for another guide or other data" in problem

    def test_foreign_file_under_the_name_of_our_own_is_named(self, tmp_path: Path, store: Path) -> None:
        rows = [(f"query {anchor[9:]}", positive, negative) for anchor, positive, negative in ROWS]
        other = make_store(tmp_path / "other", source_of(tmp_path / "other.jsonl", rows))
        path = file_of(store, "vectors")
        shutil.copy(shard_file(other.path, "vectors", 1), path)
        (problem,) = check_store(store, deep=True).problems
        assert problem.startswith(f"{path} was changed after it was written")

    def test_index_of_another_store_is_named(self, tmp_path: Path, store: Path, more: RowSource) -> None:
        other = complete(make_store(tmp_path / "other", more))
        report = file_of(store, "index").with_suffix(".json")
        shutil.rmtree(store / "index")
        assert check_store(store, deep=True).problems == []
        (store / "index").mkdir()
        for suffix in (".json", ".faiss"):
            shutil.copy(index_path(other, suffix), report.with_suffix(suffix))
        (problem,) = check_store(store, deep=False).problems
        assert problem.startswith(f"{report} is of other vectors than the store's")

    @pytest.mark.parametrize("contents", ["{}", "[]", "{"])
    def test_damaged_report_of_the_index_is_named(self, store: Path, contents: str) -> None:
        path = file_of(store, "index").with_suffix(".json")
        path.write_text(contents)
        (problem,) = check_store(store, deep=False).problems
        assert str(path) in problem

    def test_edited_store_json_is_named(self, store: Path) -> None:
        path = store / "store.json"
        record = json.loads(path.read_text())
        edit(path, weights=[2.0])
        assert [str(path) in problem for problem in check_store(store, deep=False).problems] == [True]
        # Whoever mends the checksum, too, has to know the format.
        without = {key: value for key, value in record.items() if key not in ("data", "checksum")}
        path.write_text(json.dumps({**without, "checksum": fingerprint_of(without)}))
        (problem,) = check_store(store, deep=False).problems
        assert problem.startswith(f"{path} has other fields than format 2")

    @pytest.mark.parametrize("change", [{"margin": 0.5}, {"negatives": None}, {"colour": "red"}])
    def test_edited_record_of_mined_negatives_is_named(self, store: Path, change: dict[str, Any]) -> None:
        (path,) = (store / "mined").glob("*.json")
        edit(path, **change)
        (problem,) = check_store(store, deep=False).problems
        assert problem.startswith(str(path))

    def test_folder_without_a_store_is_refused(self, tmp_path: Path) -> None:
        for tool in (lambda path: check_store(path, deep=False), repair, collect_garbage, describe_store):
            with pytest.raises(StoreError, match=r"has no store\.json: make a guide store"):
                tool(tmp_path)

    def test_store_that_lost_its_store_json_is_told_from_a_folder_of_something_else(
        self, store: Path, source: RowSource
    ) -> None:
        (store / "store.json").unlink()
        tools: list[Callable[[Path], object]] = [lambda path: check_store(path, deep=False), repair, collect_garbage]
        tools += [describe_store, GuideStore.open]
        tools += [lambda path: StoreWriter.create(path, guide=GUIDE, source=source, mode="resume")]
        for tool in tools:
            with pytest.raises(StoreError, match=r"has the shards of a store and lost its store\.json: restore that"):
                tool(store)


class TestVerifyingWhatWasWritten:
    """Shards whose commits are right and whose values are not: another program wrote them."""

    def write(self, store: Path, kind: str, **columns: Any) -> str:
        manifest = GuideStore.open(store).manifest
        folder = {"vectors": manifest.vectors[0], "scores": manifest.scores}.get(kind, kind)
        folder = GuideStore.open(store).mined_kind if kind == "mined" else folder
        with pa.ipc.open_file(file_of(store, kind)) as file:
            batch = file.get_batch(0)
        for name, change in columns.items():
            number = batch.schema.names.index(name)
            column = batch.column(number)
            if pa.types.is_fixed_size_list(column.type):
                values = column.values.to_numpy().reshape(len(column), -1).copy()
                field, column = fixed_size_lists(name, change(values))
            else:
                field = batch.schema.field(number)
                column = pa.array(change(column.to_numpy(zero_copy_only=False).copy()), field.type)
            batch = batch.set_column(number, field, column)
        replace_shard(store, folder, 1, batch, manifest.recipe(folder, 1))
        # It would be of other vectors.
        shutil.rmtree(store / "index", ignore_errors=True)
        assert check_store(store, deep=False).problems == []
        (problem,) = check_store(store, deep=True).problems
        assert str(file_of(store, kind)) in problem
        return problem

    @staticmethod
    def put(place: Any, value: Any) -> Callable[[Any], Any]:
        def change(values: Any) -> Any:
            values[place] = value
            return values

        return change

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (np.nan, "length nan for text 19"),
            (np.inf, "length inf"),
            (0.0, "a vector of length 0 for text 19, expected length 1"),
            (0.6, "expected length 1"),
        ],
    )
    def test_bad_vector_is_named_by_its_text(self, store: Path, value: float, message: str) -> None:
        assert message in self.write(store, "vectors", vector=self.put(3, value))

    def test_length_is_judged_in_the_stored_precision(self, store: Path) -> None:
        assert "length 1.003" in self.write(store, "vectors", vector=lambda vectors: vectors * np.float16(1.003))

    def test_vectors_of_another_width_or_type_are_named(self, store: Path) -> None:
        problem = self.write(store, "vectors", vector=lambda vectors: vectors[:, :7])
        assert "has the columns vector: fixed_size_list<item: halffloat>[7], expected" in problem
        problem = self.write(store, "vectors", vector=lambda vectors: np.zeros((16, 8), np.float32))
        assert "has the columns vector: fixed_size_list<item: float>[8]" in problem

    @pytest.mark.parametrize(("value", "found"), [(-1, "-1 to "), (65, "to 65, expected 0 to 64")])
    def test_ids_out_of_range_are_named(self, store: Path, value: int, found: str) -> None:
        assert "has ids from" in (problem := self.write(store, "rows", ids=self.put((5, 1), value)))
        assert found in problem

    @pytest.mark.parametrize("value", [-2, 0])
    def test_tasks_out_of_range_are_named(self, store: Path, value: int) -> None:
        assert "has tasks from" in self.write(store, "rows", task=self.put(5, value))

    @pytest.mark.parametrize("value", [-1, 18, 20])
    def test_identities_out_of_range_are_named(self, store: Path, value: int) -> None:
        assert "has an identity" in self.write(store, "texts", identity=self.put(3, value))

    def test_unknown_roles_are_named(self, store: Path) -> None:
        assert "has a role 1, expected 0" in self.write(store, "texts", role=self.put(3, 1))

    def test_scores_that_are_not_finite_are_named(self, store: Path) -> None:
        assert "not finite for row 21" in self.write(store, "scores", scores=self.put((5, 1), np.nan))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"negatives": (5, 65)}, "has negatives from"),
            ({"negatives": (5, -2)}, "has negatives from"),
            ({"negatives": (5, -1)}, "has a score where there is no negative"),
            ({"positive_rank": (5, 0)}, "has a rank"),
            ({"false_negatives": (5, 99)}, "has a rank"),
        ],
    )
    def test_mined_negatives_out_of_range_are_named(
        self, store: Path, changes: dict[str, tuple[int, int]], message: str
    ) -> None:
        assert message in self.write(store, "mined", **{name: self.put(*change) for name, change in changes.items()})


class TestVerifyingWhatIsUnderWay:
    def test_what_is_missing_is_no_damage(self, tmp_path: Path, source: RowSource) -> None:
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            fill(writer, source)
            embed(writer, [0, 2])
        found = check_store(tmp_path / "store", deep=True)
        assert found.problems == []
        assert found.notes[0].endswith("is not finished: the command that began it goes on with --resume")
        assert found.notes[1] == "guide guide has 2 of 5 shards of vectors"

    def test_damage_to_what_is_there_is_named(self, tmp_path: Path, source: RowSource) -> None:
        with StoreWriter.create(tmp_path / "store", guide=GUIDE, source=source) as writer:
            fill(writer, source)
            embed(writer, [1])
        bad = [file_of(tmp_path / "store", kind) for kind in ("texts", "rows", "vectors")]
        for path in bad:
            path.unlink()
        problems = check_store(tmp_path / "store", deep=False).problems
        assert [str(path) in problem for path, problem in zip(bad, problems, strict=True)] == [True] * 3

    def test_append_under_way_is_checked_beside_the_store(self, store: Path, more: RowSource) -> None:
        with StoreWriter.create(store, guide=GUIDE, source=more, mode="append") as writer:
            fill(writer, more)
            embed(writer, writer.vectors.pending()[:1])
        found = check_store(store, deep=True)
        assert (found.problems, len(found.notes)) == ([], 2)
        new, old = shard_file(store, "vectors", 5), shard_file(store, "vectors", 0)
        flip_bit(new, 700)
        flip_bit(old, 700)
        problems = check_store(store, deep=True).problems
        assert [any(str(path) in problem for problem in problems) for path in (new, old)] == [True, True]
        # Readers are not concerned by what is to come.
        assert len(GuideStore.open(store).verify()) == 1

    def test_damaged_plan_is_named_and_can_be_given_up(self, store: Path, more: RowSource) -> None:
        with StoreWriter.create(store, guide=GUIDE, source=more, mode="append") as writer:
            fill(writer, more)
        edit(store / "next.json", weights=[2.0])
        (problem,) = check_store(store, deep=False).problems
        assert f"{store}/next.json was changed" in problem
        assert problem.endswith("`gistfast store gc --unfinished` gives it up")
        collect_garbage(store, unfinished=True)
        assert check_store(store, deep=True).problems == []
