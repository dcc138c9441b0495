"""Processes that write a store are killed with SIGKILL, again and again; nothing is lost."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gistfast.store import GuideStore

SCRIPT = Path(__file__).with_name("kill_writers.py")
NUM_ROWS = 40


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = ({"anchor": f"a question {row}", "positive": f"an answer {row % 20}"} for row in range(NUM_ROWS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(source: Path, store: Path, *, workers: int = 1, kills: int = 0, options: tuple[str, ...] = ()) -> GuideStore:
    command = [sys.executable, str(SCRIPT), str(source), str(store), str(workers), str(kills), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    return GuideStore.open(store)


def attempts(store: Path) -> list[int]:
    return [int(line) for line in store.with_suffix(".log").read_text().split()]


def same(one: GuideStore, other: GuideStore) -> bool:
    ids = torch.arange(one.num_texts)
    return (
        one.fingerprint == other.fingerprint
        and one.texts[:] == other.texts[:]
        and np.array_equal(one.rows, other.rows)
        and torch.equal(one.gather(ids), other.gather(ids))
    )


def test_killed_writer_redoes_at_most_one_shard(source: Path, tmp_path: Path) -> None:
    kills = 15
    killed = write(source, tmp_path / "killed", kills=kills)
    undisturbed = write(source, tmp_path / "undisturbed")
    assert killed.verify() == []
    assert same(killed, undisturbed)
    shards = len(killed.manifest.plan.texts)
    assert sorted(attempts(tmp_path / "undisturbed")) == list(range(shards))
    done = attempts(tmp_path / "killed")
    assert set(done) == set(range(shards))
    # Only the shard that a kill interrupted is written again: it is the one that comes next.
    assert len(done) <= shards + kills
    assert done == sorted(done)


def test_two_killed_writers_on_one_store_lose_nothing(source: Path, tmp_path: Path) -> None:
    killed = write(source, tmp_path / "killed", workers=2, kills=24)
    assert killed.verify() == []
    assert same(killed, write(source, tmp_path / "undisturbed"))
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_killed_overwrite_keeps_the_old_store_until_the_new_is_complete(source: Path, tmp_path: Path) -> None:
    store = write(source, tmp_path / "store", kills=12, options=("overwrite",))
    assert store.manifest.guide.name == "second"
    assert store.verify() == []
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_store_is_read_in_another_process(source: Path, tmp_path: Path) -> None:
    store = write(source, tmp_path / "store")
    ids = torch.tensor([[3, 1], [0, 3]])
    store.gather(ids)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(store.gather, (ids,)), store.gather(ids))
