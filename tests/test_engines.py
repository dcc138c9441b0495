"""One worker after the other and beside the other, in this process; worker processes are in test_processes.py."""

import errno
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RandomGuide

from gistfast.engines.claims import claim
from gistfast.engines.shards import Part, embed_shards
from gistfast.errors import StoreError, VectorError
from gistfast.guides.batch_done import BatchDone, OnBatch
from gistfast.rows.dataset import read_rows
from gistfast.rows.formats import JsonFile
from gistfast.stages.precompute import precompute, precompute_part, write_rows
from gistfast.store import GuideStore, StoreWriter
from gistfast.store.plan import finish_plan, read_plan
from gistfast.store.vectors import VectorShards

NUM_SHARDS = 10
TEXTS_PER_SHARD = 4


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", TEXTS_PER_SHARD)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = ({"anchor": f"anchor {row}", "positive": f"positive {row}"} for row in range(NUM_SHARDS * 2))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def begin(source: Path, tmp_path: Path) -> Callable[[], VectorShards]:
    """Makes a store that has its rows and lacks all vectors."""

    def make(name: str = "store") -> VectorShards:
        rows = read_rows(source)
        with StoreWriter.create(tmp_path / name, guide=RandomGuide().info, source=rows) as writer:
            write_rows(writer, rows)
            return writer.vectors

    return make


class SlowGuide(RandomGuide):
    """Calls back after each text, and takes a moment for it."""

    def __init__(self, seconds: float = 0.005) -> None:
        super().__init__()
        self.seconds = seconds

    def embed(self, texts: Sequence[str], role: str, on_batch: OnBatch | None = None) -> Any:
        for _ in texts:
            time.sleep(self.seconds)
            if on_batch is not None:
                on_batch(BatchDone(1))
        return super().embed(texts, role)


def vectors_of(vectors: VectorShards) -> torch.Tensor:
    finish_plan(vectors.store, read_plan(vectors.store))
    store = GuideStore.open(vectors.store)
    assert store.verify() == []
    return store.gather(torch.arange(store.num_texts))


def committed(vectors: VectorShards) -> int:
    return NUM_SHARDS - len(vectors.pending())


def test_workers_share_a_store_and_do_nothing_twice(begin: Callable[..., VectorShards]) -> None:
    vectors, guides = begin(), [SlowGuide() for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda guide: embed_shards(vectors, guide), guides))
    assert sum(guide.num_embedded for guide in guides) == NUM_SHARDS * TEXTS_PER_SHARD
    assert all(guide.num_embedded for guide in guides)
    alone = begin("alone")
    embed_shards(alone, RandomGuide())
    assert torch.equal(vectors_of(vectors), vectors_of(alone))
    assert not list(vectors.store.glob("commits/.*"))


def test_workers_without_locks_still_share(begin: Callable[..., VectorShards], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*ignored: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    vectors, guides = begin(), [SlowGuide() for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda guide: embed_shards(vectors, guide), guides))
    assert len(vectors_of(vectors)) == NUM_SHARDS * TEXTS_PER_SHARD
    assert all(guide.num_embedded < NUM_SHARDS * TEXTS_PER_SHARD for guide in guides)


def test_shard_of_a_worker_that_is_gone_is_taken(
    begin: Callable[..., VectorShards], caplog: pytest.LogCaptureFixture
) -> None:
    vectors = begin()
    other = claim(vectors.lock_path(3))
    assert other is not None
    assert claim(vectors.lock_path(3)) is None
    with caplog.at_level(logging.INFO, "gistfast"), ThreadPoolExecutor(1) as threads:
        run = threads.submit(embed_shards, vectors, RandomGuide())
        while not caplog.messages:
            time.sleep(0.01)
        assert vectors.pending() == [3]
        assert caplog.messages == ["other processes are at all shards that are left (1): waiting for them"]
        other.release(remove=False)
        run.result(10)
    assert vectors.pending() == []


def test_part_is_every_nth_shard(begin: Callable[..., VectorShards]) -> None:
    vectors = begin()
    embed_shards(vectors, RandomGuide(), part=Part(1, 3))
    assert vectors.pending() == [0, 2, 3, 5, 6, 8, 9]


def test_interrupted_worker_commits_what_it_has_and_leaves_the_rest(begin: Callable[..., VectorShards]) -> None:
    def interrupt(done: BatchDone) -> None:
        if committed(vectors) == 2:
            raise KeyboardInterrupt

    vectors = begin()
    with pytest.raises(KeyboardInterrupt):
        embed_shards(vectors, SlowGuide(), on_batch=interrupt)
    assert 2 <= committed(vectors) <= 3
    # Nothing stays locked, and nothing is repeated.
    left, guide = len(vectors.pending()), RandomGuide()
    embed_shards(vectors, guide)
    assert guide.num_embedded == left * TEXTS_PER_SHARD


def test_shard_is_written_while_the_next_is_embedded(
    begin: Callable[..., VectorShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = VectorShards.write
    embedding_again = threading.Event()

    def write(vectors: VectorShards, shard: int, array: Any) -> bool:
        # Never set when the worker waits for this write before it goes on.
        assert embedding_again.wait(60)
        return original(vectors, shard, array)

    def on_batch(done: BatchDone) -> None:
        nonlocal embedded
        embedded += done.num_texts
        if embedded > TEXTS_PER_SHARD:
            embedding_again.set()

    embedded = 0
    monkeypatch.setattr(VectorShards, "write", write)
    vectors = begin()
    embed_shards(vectors, SlowGuide(), on_batch=on_batch)
    assert vectors.pending() == []


def test_full_disk_stops_the_run_while_the_next_shard_is_embedded(
    begin: Callable[..., VectorShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*ignored: object) -> bool:
        raise StoreError("cannot write: No space left on device")

    monkeypatch.setattr(VectorShards, "write", fail)
    vectors, seen = begin(), []
    with pytest.raises(StoreError, match="No space left"):
        embed_shards(vectors, SlowGuide(0.05), on_batch=seen.append)
    # Before the second shard was through.
    assert len(seen) < 2 * TEXTS_PER_SHARD


def test_damaged_text_read_ahead_is_an_error_of_the_run(begin: Callable[..., VectorShards]) -> None:
    vectors = begin()
    for path in vectors.store.glob("texts/*.arrow"):
        path.write_bytes(b"")
    with pytest.raises(StoreError, match="has 0 bytes"):
        embed_shards(vectors, RandomGuide())


def test_worker_with_another_guide_is_refused_by_the_field(begin: Callable[..., VectorShards]) -> None:
    store = begin().store
    with pytest.raises(StoreError, match=r"guide.query_prompt: store has '', asked for 'q: ': give every worker"):
        VectorShards.open(store, RandomGuide(query_prompt="q: ").info)


def test_vector_error_is_the_workers(begin: Callable[..., VectorShards]) -> None:
    class Broken(RandomGuide):
        def embed(self, texts: Sequence[str], role: str, on_batch: OnBatch | None = None) -> Any:
            return super().embed(texts, role) * 0

    with pytest.raises(VectorError, match="a zero vector"):
        embed_shards(begin(), Broken())


def test_last_of_several_runs_completes_the_store(
    source: Path, tiny_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(**options: Any) -> GuideStore | None:
        return precompute_part(source, guide=tiny_student, out=tmp_path / "parts", index="none", **options)

    with caplog.at_level(logging.INFO, "gistfast"):
        assert run(rows_only=True) is None
        assert run(shards="1/2", resume=True) is None
        assert "this run takes 5 of the 10 shards that are left" in caplog.messages
        assert any("5 shards of vectors are left to other runs" in message for message in caplog.messages)
        # Again, as when a job of an array is queued twice.
        assert run(shards="1/2", resume=True) is None
        with pytest.raises(StoreError, match="is not finished: stage 1 has 5 of 10 shards"):
            GuideStore.open(tmp_path / "parts")
        store = run(shards="0/2", resume=True)
    whole = precompute(source, guide=tiny_student, out=tmp_path / "whole", index="none")
    assert store is not None
    ids = torch.arange(whole.num_texts)
    assert torch.equal(store.gather(ids), whole.gather(ids))
    assert (store.pair_scores == whole.pair_scores).all()


def test_python_caller_is_told_that_its_part_is_no_store(source: Path, tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="this run did its part"):
        precompute(source, guide=tiny_student, out=tmp_path / "store", index="none", shards=(0, 2))


def test_source_that_did_not_change_is_not_read_again(
    source: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**options: Any) -> GuideStore | None:
        return precompute_part(source, guide=tiny_student, out=tmp_path / "store", index="none", **options)

    def refuse(file: JsonFile) -> str:
        raise AssertionError(f"{file.name} was read")

    run(rows_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(JsonFile, "digest", refuse)
        assert run(resume=True) is not None
        source.write_text(source.read_text())
        with pytest.raises(AssertionError, match="was read"):
            run(resume=True)
    # The same rows in a file that was written again are the same source.
    assert run(resume=True) is not None
    source.write_text(source.read_text().replace("anchor 3", "anchor three"))
    with pytest.raises(StoreError, match="was made from something else"):
        run(resume=True)
