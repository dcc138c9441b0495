"""Worker processes of this machine: real ones, which load a real model."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from gistfast.engines.job import describe_guide
from gistfast.engines.processes import LocalProcesses, local_devices
from gistfast.engines.shards import WHOLE
from gistfast.errors import VectorError, WorkerError
from gistfast.progress import Bar
from gistfast.rows.dataset import read_rows
from gistfast.settings.stages import PrecomputeSettings, build, to_dict
from gistfast.stages.precompute import precompute, write_rows
from gistfast.store import StoreWriter

NUM_SHARDS = 24


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 64)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    count = NUM_SHARDS * 32
    rows = ({"anchor": f"question {row} about rivers", "positive": f"answer {row}"} for row in range(count))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "gistfast.engines.worker" in child.cmdline()]


class CallingBar(Bar):
    """Calls back at its first move."""

    def __init__(self, total: int, call: Callable[[], None]) -> None:
        super().__init__("embedding texts", total, "texts")
        self.call = call
        self.called = False

    def advance(self, count: int = 1, note: str = "") -> None:
        super().advance(count, note)
        if not self.called:
            self.called = True
            self.call()


def embed_with_two(source: Path, guide: Path, store: Path, when_first_moved: Callable[[], None]) -> tuple[Any, Bar]:
    """The shards of a new store after two processes embedded it, and their bar."""
    settings = to_dict(build(PrecomputeSettings, {"source": source, "guide": guide, "out": store, "device": "cpu"}))
    rows = read_rows(source)
    with StoreWriter.create(store, guide=describe_guide(settings), source=rows) as writer:
        write_rows(writer, rows)
        bar = CallingBar(sum(writer.vectors.sizes), when_first_moved)
        LocalProcesses(settings, ["cpu", "cpu"]).embed(writer.vectors, WHOLE, bar)
        return writer.vectors, bar


def test_processes_make_the_same_store_although_one_is_killed(
    source: Path, tiny_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def kill_one() -> None:
        children()[0].kill()

    with caplog.at_level(logging.INFO, "gistfast"):
        vectors, bar = embed_with_two(source, tiny_student, tmp_path / "two", kill_one)
    assert vectors.pending() == []
    assert "2 processes on cpu, 1 threads each" in caplog.messages
    line = "process 0 on cpu was ended by SIGKILL, as the system does when memory is short: others take its shard"
    assert line in caplog.messages
    # What the dead process had embedded and not committed is not counted.
    assert bar.done <= sum(vectors.sizes)
    options: dict[str, Any] = {"guide": tiny_student, "index": "none", "device": "cpu"}
    store = precompute(source, out=tmp_path / "two", resume=True, **options)
    alone = precompute(source, out=tmp_path / "one", **options)
    ids = torch.arange(alone.num_texts)
    assert torch.equal(store.gather(ids), alone.gather(ids))
    assert np.array_equal(store.pair_scores, alone.pair_scores)
    assert not children()


def test_death_of_all_processes_is_an_error_and_the_store_resumes(
    source: Path, tiny_student: Path, tmp_path: Path
) -> None:
    def kill_all() -> None:
        for child in children():
            child.kill()

    with pytest.raises(WorkerError, match=r"all 2 processes died with \d+ shards left: .* go on with --resume"):
        embed_with_two(source, tiny_student, tmp_path / "store", kill_all)
    store = precompute(source, guide=tiny_student, out=tmp_path / "store", index="none", resume=True, device="cpu")
    assert store.num_texts == NUM_SHARDS * 64


def test_error_of_a_process_is_raised_here(source: Path, tiny_student: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    folder = tmp_path / "poisoned"
    model.save(str(folder))
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][model.tokenizer.convert_tokens_to_ids("rivers")] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VectorError, match=r"text 'question \d+ about rivers': the vector is not finite"):
        precompute(source, guide=folder, out=tmp_path / "store", index="none", processes=2, device="cpu")
    assert not children()


def test_processes_are_one_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_devices("auto", None) == ["cuda:0", "cuda:1"]
    assert local_devices("auto", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert local_devices("auto", 1) == ["cuda:0"]
    assert local_devices("cuda:1", None) == ["cuda:1"]
    assert local_devices("cpu", 2) == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert local_devices("auto", None) == ["cuda"]
