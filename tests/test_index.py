import builtins
import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_cases import GUIDE, source_of
from store_cases import make_store as store_at

from gistfast.errors import ConfigError, DependencyError, StoreError
from gistfast.neighbours import index, index_build, index_recall, index_types
from gistfast.neighbours.exact import search
from gistfast.neighbours.index import build_index, load_index, read_report, remove_other_indexes
from gistfast.neighbours.index_recall import WANTED_RECALL
from gistfast.neighbours.index_types import plan_index
from gistfast.neighbours.scorer import Scorer
from gistfast.store import GuideStore

MakeStore = Callable[..., GuideStore]
NUM_ROWS = 1500


def rows(number: int = NUM_ROWS) -> list[tuple[str, str]]:
    return [(f"anchor {row}", f"positive {row}") for row in range(number)]


def file_of(store: GuideStore, suffix: str) -> Path:
    (path,) = (store.path / "index").glob(f"*{suffix}")
    return path


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 200 texts: a store of some hundred has several."""
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 200)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_flat_index_finds_what_exact_search_finds(make_store: MakeStore, dtype: str) -> None:
    store = make_store(rows(), dtype=dtype)
    report = build_index(store, "flat")
    assert report is not None
    assert (report.kind, report.num_vectors, report.width, report.recall_at_10) == ("flat", 2 * NUM_ROWS, 16, 1.0)
    assert report.code_bytes == (32 if dtype == "float16" else 64)
    queries, scorer = np.arange(0, 3000, 100), Scorer((16,))
    vectors = scorer.unit(store.gather(torch.from_numpy(queries)))
    scores, _ = load_index(store).search(vectors.numpy(), 5)
    exact = search(store.gather, queries, np.arange(3000), scorer=scorer, num_neighbours=5)
    np.testing.assert_allclose(scores, exact.scores, atol=5e-4 if dtype == "float16" else 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_ivf_index_looks_further_until_recall_is_reached(make_store: MakeStore, dtype: str) -> None:
    store = make_store(rows(), dtype=dtype)
    report = build_index(store, "ivf")
    assert report is not None
    assert report.kind == "ivf"
    assert report.num_lists > 1
    assert 1 <= report.num_probes <= report.num_lists
    assert report.recall_at_10 >= WANTED_RECALL
    assert load_index(store).nprobe == report.num_probes


def test_recall_falls_where_lists_are_left_out(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_recall, "WANTED_RECALL", 0.0)
    report = build_index(make_store(rows()), "ivf")
    assert report is not None
    assert report.num_probes == 1
    assert 0.2 < report.recall_at_10 < 0.95


def test_short_codes_lose_recall_and_say_so(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index_types, "VECTORS_PER_PQ", 1000)
    store = make_store(rows(700), width=32)
    with caplog.at_level(logging.WARNING):
        report = build_index(store, "pq")
    assert report is not None
    assert (report.kind, report.code_bytes) == ("pq", 16)
    assert report.num_probes == report.num_lists
    assert report.recall_at_10 < WANTED_RECALL
    assert "falls short of the wanted recall@10 of 0.95" in caplog.text
    scores, found = load_index(store).search(store.gather(torch.arange(20)).float().numpy(), 1)
    assert scores.min() > 0.8
    assert (found[:, 0] == np.arange(20)).mean() > 0.5


def test_automatic_kind_follows_size_and_memory(caplog: pytest.LogCaptureFixture) -> None:
    def kind_of(num_vectors: int, memory_gib: float | None) -> tuple[str, int]:
        plan = plan_index(num_vectors, 1024, half=True, kind="auto", memory_gib=memory_gib)
        return plan.kind, plan.code_bytes

    with caplog.at_level(logging.INFO):
        assert kind_of(200_000, None) == ("flat", 2048)
        assert kind_of(200_001, None) == ("ivf", 2048)
        # 1 M vectors: ivf takes 1.9 GiB, half a byte a number 0.48 GiB.
        assert kind_of(1_000_000, 2.0) == ("ivf", 2048)
        assert kind_of(1_000_000, 1.5) == ("pq", 512)
        assert kind_of(1_000_000, 0.3) == ("pq", 256)
    assert "index of 1,000,000 vectors: pq, ivf would need 1.9 GiB of memory, 0.3 GiB may be used" in caplog.text
    with pytest.raises(
        ConfigError, match=r"fits into 0.01 GiB, the smallest takes 0\.037: allow more by --index-memory"
    ):
        kind_of(1_000_000, 0.01)
    with pytest.raises(ConfigError, match="learns its codes from 10,000 vectors at least, the store has 9,999"):
        plan_index(9_999, 1024, half=True, kind="pq", memory_gib=None)


def test_free_memory_is_what_the_machine_and_the_container_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2**20 < index_types.available_bytes() < 2**50
    monkeypatch.setattr(index_types, "CONTAINER", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert index_types.available_bytes() == 3000


def test_another_kind_takes_the_place_of_the_first(make_store: MakeStore) -> None:
    store = make_store(rows(300))
    assert build_index(store, "flat") is not None
    ivf = build_index(store, "ivf")
    assert ivf is not None
    assert ivf.kind == "ivf"
    assert read_report(store) == ivf
    assert load_index(store).nlist == ivf.num_lists
    # What is there is as good as what would be chosen now.
    assert build_index(store, "auto") == ivf


KILLED = """
import os, signal, sys
from pathlib import Path
from gistfast.neighbours import index_build
from gistfast.neighbours.index import build_index
from gistfast.store import GuideStore

add, shards = index_build.ListsOfVectors.add, []

def kill_at_the_third(lists, shard, vectors):
    if len(shards) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    shards.append(shard)
    add(lists, shard, vectors)

index_build.ListsOfVectors.add = kill_at_the_third
build_index(GuideStore.open(sys.argv[1]), "ivf")
"""


def test_killed_build_goes_on_and_ends_with_the_same_bytes(
    make_store: MakeStore, small_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(rows(400))
    undisturbed = GuideStore.open(shutil.copytree(store.path, tmp_path / "undisturbed"))
    build_index(undisturbed, "ivf")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(store.path)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert read_report(store) is None
    (building,) = (store.path / "index").iterdir()
    assert sorted(path.name[:5] for path in building.iterdir()) == ["00000", "00001", "train"]
    monkeypatch.setattr(index_build.IndexBuilder, "_trained", lambda builder: pytest.fail("trained again"))
    build_index(store, "ivf")
    assert file_of(store, ".faiss").read_bytes() == file_of(undisturbed, ".faiss").read_bytes()
    assert file_of(store, ".json").read_bytes() == file_of(undisturbed, ".json").read_bytes()
    assert not building.exists()


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_append_adds_the_new_vectors_to_the_index(
    kind: Any, small_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = store_at(tmp_path / "store", source_of(tmp_path / "old.jsonl", rows(250)))
    build_index(old, kind)
    more = source_of(tmp_path / "more.jsonl", [(f"anchor {row}", f"new {row}") for row in range(200, 400)])
    new = store_at(tmp_path / "store", more, mode="append")
    assert read_report(new) is None
    assert read_report(old) is not None
    monkeypatch.setattr(index_build.IndexBuilder, "empty", lambda builder: pytest.fail("built anew"))
    report = build_index(new, kind)
    assert report is not None
    assert (report.num_vectors, report.num_trained) == (new.num_texts, old.num_texts)
    found = load_index(new)
    if kind == "ivf":
        found.nprobe = report.num_lists
    _, ids = found.search(new.gather(torch.arange(new.num_texts)).float().numpy(), 1)
    assert (ids[:, 0] == np.arange(new.num_texts)).mean() > 0.99
    # Until the old state has no more readers, it keeps its index.
    assert load_index(old).ntotal == old.num_texts
    remove_other_indexes(new)
    assert read_report(old) is None
    assert read_report(new) == report


def test_index_is_built_anew_where_vectors_changed_or_the_store_grew_too_far(
    small_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_at(tmp_path / "store", source_of(tmp_path / "old.jsonl", rows(110)))
    build_index(store, "ivf")
    record = json.loads(file_of(store, ".json").read_text())
    store = store_at(tmp_path / "store", source_of(tmp_path / "more.jsonl", rows(300)), mode="append")
    for change in ({"vectors": "others"}, {"num_trained": 100}):
        path = file_of(store, ".json")
        path.write_text(json.dumps(record | change))
        report = build_index(store, "ivf")
        assert report is not None
        assert report.num_trained == 600
        remove_other_indexes(GuideStore(store.path, store.manifest.with_guide(GUIDE, 2.0, "mean")))
        path.write_text(json.dumps(record))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("suffix", "damage", "problem"),
    [
        (".faiss", flip, "its checksum differs"),
        (".faiss", Path.unlink, "is missing"),
        (".json", lambda path: path.write_text("{}"), "has other fields than expected"),
    ],
)
def test_damaged_index_is_not_taken_over_by_an_append(
    suffix: str,
    damage: Callable[[Path], None],
    problem: str,
    small_shards: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    old = store_at(tmp_path / "store", source_of(tmp_path / "old.jsonl", rows(50)))
    build_index(old, "flat")
    damage(file_of(old, suffix))
    new = store_at(tmp_path / "store", source_of(tmp_path / "more.jsonl", rows(80)), mode="append")
    report = build_index(new, "flat")
    assert report is not None
    assert f"the index is built anew, not added to: {old.path / 'index'}" in caplog.text
    assert problem in caplog.text
    undisturbed = GuideStore.open(shutil.copytree(new.path, tmp_path / "undisturbed"))
    shutil.rmtree(undisturbed.path / "index")
    assert build_index(undisturbed, "flat") == report


class Gpus:
    """faiss with two GPUs, which copy indexes to themselves."""

    def __init__(self, faiss: Any) -> None:
        self._faiss = faiss
        self.copied: list[str] = []

    def get_num_gpus(self) -> int:
        return 2

    def index_cpu_to_all_gpus(self, index: Any) -> Any:
        self.copied.append(type(index).__name__)
        return index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._faiss, name)


def test_gpus_train_and_assign_and_the_file_is_that_of_a_processor(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(rows(300))
    copy = GuideStore.open(shutil.copytree(store.path, tmp_path / "copy"))
    build_index(copy, "ivf")
    gpus = Gpus(index.import_faiss())
    monkeypatch.setattr(index, "import_faiss", lambda: gpus)
    build_index(store, "ivf")
    assert gpus.copied == ["IndexFlatIP", "IndexFlatIP"]
    assert file_of(store, ".faiss").read_bytes() == file_of(copy, ".faiss").read_bytes()


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
    with pytest.raises(StoreError, match=r"has no index of its vectors: run gistfast\.neighbours\.index\.build_index"):
        load_index(store)


def test_index_that_is_there_is_kept(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(rows(10))
    report = build_index(store, "flat")
    monkeypatch.setattr(index_build.IndexBuilder, "fill", lambda *ignored: pytest.fail("built again"))
    assert build_index(store, "flat") == report


def test_index_of_another_store_is_not_taken_for_its_own(make_store: MakeStore) -> None:
    store = make_store(rows(10))
    build_index(store, "flat")
    record = json.loads(file_of(store, ".json").read_text())
    record["store_fingerprint"] = "another"
    file_of(store, ".json").write_text(json.dumps(record))
    assert read_report(store) is None
    with pytest.raises(StoreError, match="has no index"):
        load_index(store)


def test_damaged_index_is_named(make_store: MakeStore) -> None:
    store = make_store(rows(10))
    build_index(store, "flat")
    path = file_of(store, ".faiss")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StoreError, match="is damaged, faiss cannot read it: mend it with `gistfast store repair`"):
        load_index(store)
    file_of(store, ".json").write_text("{}")
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
