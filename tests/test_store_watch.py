"""A store that changes while it is in use: it may grow, and everything else is noticed."""

import logging
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from store_cases import GUIDE, MORE, ROWS, TWO_PROMPTS, flip_bit, make_store, shard_file
from train_cases import at_step, same_weights, train_small

from gistfast.errors import ConfigError, StoreError
from gistfast.rows.dataset import RowSource
from gistfast.stages.train import TrainReport
from gistfast.store import GuideStore
from gistfast.store.shards import read_shard, replace_shard
from gistfast.store.watch import StoreWatch
from gistfast.training.store_change import store_difference


@pytest.fixture
def store(tmp_path: Path, source: RowSource) -> GuideStore:
    return make_store(tmp_path / "store", source)


@pytest.fixture
def watch(store: GuideStore) -> StoreWatch:
    return StoreWatch(store)


def vectors_again(store: GuideStore) -> None:
    """A repair: the vectors in a new file."""
    (kind,) = store.manifest.vectors
    batch = read_shard(store.path, kind, 0, store.manifest).batch
    replace_shard(store.path, kind, 0, batch, store.manifest.recipe(kind, 0))


# Looking at a store.


def test_growing_is_told_once(store: GuideStore, watch: StoreWatch, source: RowSource, more: RowSource) -> None:
    assert watch.look() is None
    make_store(store.path, more, mode="append")
    assert [watch.look(), watch.look()] == [f"{len(MORE) - 1} rows", None]
    make_store(store.path, source, replace(GUIDE, weights_hash="second"), mode="add_guide")
    assert [watch.look(), watch.look()] == ["1 guide", None]
    watch.look_at_files()


def test_open_store_stays_as_it_was_beside_an_append(store: GuideStore, more: RowSource) -> None:
    packed = pickle.dumps(store)
    grown = make_store(store.path, more, mode="append")
    unpacked = pickle.loads(packed)
    assert unpacked.fingerprint == store.fingerprint != grown.fingerprint
    assert unpacked.num_rows == len(ROWS)
    ids = torch.arange(store.num_texts)
    assert torch.equal(unpacked.gather(ids), store.gather(ids))


def test_append_between_opening_and_watching_is_told(store: GuideStore, more: RowSource) -> None:
    make_store(store.path, more, mode="append")
    assert StoreWatch(store).look() == f"{len(MORE) - 1} rows"


def test_same_store_made_anew_is_no_change(store: GuideStore, watch: StoreWatch, source: RowSource) -> None:
    make_store(store.path, source, mode="overwrite")
    assert watch.look() is None
    watch.look_at_files()


def test_replaced_store_is_an_error(store: GuideStore, watch: StoreWatch, source: RowSource, more: RowSource) -> None:
    make_store(store.path, source, TWO_PROMPTS, mode="overwrite")
    with pytest.raises(StoreError, match=f"was replaced by another store while in use, .* {store.fingerprint} became"):
        watch.look()
    make_store(store.path, more, mode="overwrite")
    with pytest.raises(StoreError, match="was replaced by another store"):
        watch.look()


def test_removed_store_is_an_error(store: GuideStore, watch: StoreWatch) -> None:
    shutil.rmtree(store.path)
    with pytest.raises(StoreError, match="store was removed while in use: bring that store back"):
        watch.look()


@pytest.mark.parametrize("kind", ["texts", "rows", "vectors"])
def test_lost_and_changed_files_are_errors(kind: str, store: GuideStore, watch: StoreWatch) -> None:
    watch.look_at_files()
    file = shard_file(store.path, kind, 0)
    flip_bit(file, -9)
    with pytest.raises(StoreError, match=f"{file.name} was changed while in use: mend it"):
        watch.look_at_files()
    file.unlink()
    with pytest.raises(StoreError, match=f"{file.name} was removed while in use: bring"):
        watch.look_at_files()


def test_files_with_the_same_bytes_are_no_change(store: GuideStore, watch: StoreWatch) -> None:
    touched, restored = (shard_file(store.path, kind, 0) for kind in ("texts", "rows"))
    os.utime(touched, (1, 1))
    shutil.copy(restored, restored.with_suffix(".copy"))
    restored.with_suffix(".copy").replace(restored)
    vectors_again(store)
    watch.look_at_files()


# A run beside it.


@pytest.fixture
def run(store: GuideStore, tiny_student: Path, tmp_path: Path) -> Callable[..., TrainReport]:
    """Six steps, with a checkpoint every second step."""
    options = {"store": store.path, "student": tiny_student, "out": tmp_path / "student", "save_steps": 2}
    return partial(train_small, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_run_beside_an_append_goes_on_with_its_rows(
    workers: int,
    run: Callable[..., TrainReport],
    store: GuideStore,
    more: RowSource,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # More than an epoch of the fifteen batches.
    run = partial(run, max_steps=18, workers=workers)
    undisturbed = run(out=tmp_path / "undisturbed")
    with at_step(3, lambda: make_store(store.path, more, mode="append")):
        beside = run()
    assert same_weights(beside.path, undisturbed.path)
    assert beside.rows == len(ROWS)
    ours = [record for record in caplog.records if record.name.startswith("gistfast")]
    assert [record.getMessage() for record in ours if record.levelno >= logging.WARNING] == [
        f"{store.path} got {len(MORE) - 1} rows: "
        f"this run goes on with the {len(ROWS)} rows and the guides that it began with"
    ]


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_run_whose_store_is_gone_ends_with_a_checkpoint_and_goes_on_when_it_is_back(
    how: str, run: Callable[..., TrainReport], store: GuideStore, source: RowSource, tmp_path: Path
) -> None:
    undisturbed = run(out=tmp_path / "undisturbed")

    def act() -> None:
        store.path.rename(tmp_path / "elsewhere")
        if how == "replaced":
            make_store(store.path, source, TWO_PROMPTS)

    with at_step(3, act), pytest.raises(StoreError, match=f"was {how}.*while in use.*bring that store back"):
        run()
    assert (tmp_path / "student" / "checkpoints" / "checkpoint-3" / "trainer_state.json").is_file()
    assert not (tmp_path / "student" / "report.json").exists()
    shutil.rmtree(store.path, ignore_errors=True)
    (tmp_path / "elsewhere").rename(store.path)
    assert same_weights(run(resume=True).path, undisturbed.path)


def test_run_saves_nothing_of_vectors_that_were_changed(
    run: Callable[..., TrainReport], store: GuideStore, tmp_path: Path
) -> None:
    vectors = shard_file(store.path, "vectors", 0)
    with at_step(3, lambda: flip_bit(vectors, -9)), pytest.raises(StoreError, match="was changed while in use"):
        run()
    assert [path.name for path in (tmp_path / "student" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_resuming_on_a_store_that_has_grown_is_refused(
    run: Callable[..., TrainReport], store: GuideStore, more: RowSource
) -> None:
    run()
    make_store(store.path, more, mode="append")
    grown = len(ROWS) + len(MORE) - 1
    with pytest.raises(ConfigError, match=f"the store had {len(ROWS)} rows, found {grown}: it has grown"):
        run(resume=True)


def record(store: GuideStore, **changes: Any) -> dict[str, Any]:
    """What a run's record has of a store."""
    manifest = store.manifest
    return {
        "fingerprint": manifest.fingerprint,
        "guides": [asdict(guide) for guide in manifest.guides],
        "data": asdict(manifest.data),
        "mined": None,
        **changes,
    }


def test_difference_names_what_differs(store: GuideStore, source: RowSource, more: RowSource, tmp_path: Path) -> None:
    before = record(store)
    prompted, fewer, held_out, twice = (
        make_store(tmp_path / "prompted", source, TWO_PROMPTS),
        make_store(tmp_path / "other", more),
        make_store(tmp_path / "held out", source, holdout=0.5),
        make_store(tmp_path / "wider", source, replace(GUIDE, max_length=9)),
    )
    found = [store_difference(before, record(other)) for other in (store, prompted, fewer, held_out, twice)]
    assert found == [
        None,
        "guide of the store had query_prompt '', found 'query: '",
        "the store was made of pairs.jsonl, 60 rows, found one of more.jsonl, 21 other rows",
        "the store had holdout 0.0, found 0.5",
        "guide of the store had max_length 128, found 9",
    ]
    second = make_store(store.path, source, replace(GUIDE, name="second", weights_hash="2"), mode="add_guide")
    assert store_difference(before, record(second)) == "the store had guides guide, found guide and second"
    assert store_difference(before, before | {"mined": "mined/1"}) == (
        "the negatives of the store were mined otherwise, or anew"
    )
    assert "had fingerprint" in str(store_difference(before, before | {"fingerprint": "0"}))
