"""Workers on a real Ray cluster, on this machine's loopback address."""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from gistfast.engines import ray_actors
from gistfast.engines.ray_actors import RayCluster
from gistfast.engines.shards import WHOLE
from gistfast.errors import ConfigError, DependencyError, ModelError, WorkerError
from gistfast.progress import Bar
from gistfast.settings.stages import PrecomputeSettings, build, to_dict
from gistfast.stages.precompute import precompute

NUM_SHARDS = 24
NUM_ACTORS = 2


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 64)
    path = tmp_path / "rows.jsonl"
    count = NUM_SHARDS * 32
    rows = ({"anchor": f"question {row} about rivers", "positive": f"answer {row}"} for row in range(count))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One cluster for all tests, started as gistfast starts it."""
    # Not imported here: what keeps Ray on the loopback address is read at its first import.
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    ray, is_ours = ray_actors._connected(None, NUM_ACTORS)
    assert is_ours
    yield ray
    ray.shutdown()


def kill_one_at_work(store: Path) -> None:
    """End an actor's process as soon as a shard is committed."""
    while not list(store.glob("commits/vectors-*.json")):
        time.sleep(0.01)
    actors = [
        child for child in psutil.Process().children(recursive=True) if child.name().startswith("ray::EmbedActor")
    ]
    actors[0].kill()


def test_cluster_that_does_not_answer_is_named() -> None:
    # First of all: once this process has joined a cluster, no address counts.
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with pytest.raises(WorkerError, match=r"no Ray cluster answers at 127\.0\.0\.1:9 \(.*\): check --address"):
        ray_actors._connected("127.0.0.1:9", None)


@pytest.mark.slow
def test_actors_make_the_same_store_although_one_is_killed(
    ray: Any, source: Path, tiny_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"guide": tiny_student, "index": "none", "device": "cpu"}
    killer = threading.Thread(target=kill_one_at_work, args=(tmp_path / "ray",))
    killer.start()
    with caplog.at_level(logging.INFO, "gistfast"):
        store = precompute(source, out=tmp_path / "ray", engine="ray", processes=NUM_ACTORS, **options)
    killer.join()
    assert "Ray: 2 slots on 1 machines with 0 GPUs and 2 CPUs" in caplog.messages
    assert f"Ray: 2 actors for {NUM_SHARDS} shards" in caplog.messages
    assert any(message.endswith("died: others take its shard") for message in caplog.messages)
    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    local = precompute(source, out=tmp_path / "local", **options)
    ids = torch.arange(local.num_texts)
    assert torch.equal(store.gather(ids), local.gather(ids))
    assert (store.pair_scores == local.pair_scores).all()


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_error_of_an_actor_is_raised_here(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a model: found neither modules\.json nor config\.json"):
        precompute(source, guide=tmp_path, out=tmp_path / "store", engine="ray", device="cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_more_actors_than_slots_are_refused(source: Path, tiny_student: Path) -> None:
    settings = to_dict(build(PrecomputeSettings, {"source": source, "guide": tiny_student, "out": "store"}))
    with pytest.raises(ConfigError, match="--processes 3: the Ray cluster has 2 CPU slots: give at most that"):
        RayCluster(settings, address=None, processes=3)


@dataclass(eq=False)
class FakeActor:
    """An actor, and the answer to all that it is asked."""

    end: str

    def __getattr__(self, call: str) -> Any:
        answer = self if call == "embed" else FakeActor("alive")
        return SimpleNamespace(remote=lambda *ignored: answer)


class FakeRay:
    """A cluster whose actors end as they are told to."""

    exceptions = SimpleNamespace(
        **{name: type(name, (Exception,), {}) for name in (*ray_actors._DEATHS, "RayTaskError")}
    )

    def __init__(self, ends: Sequence[str]) -> None:
        self._actors = [FakeActor(end) for end in ends]
        self.killed: list[FakeActor] = []

    def remote(self, made: Any) -> Any:
        return SimpleNamespace(options=lambda **ignored: SimpleNamespace(remote=lambda *given: self._actors.pop(0)))

    def wait(self, refs: list[FakeActor], **ignored: Any) -> tuple[list[FakeActor], list[FakeActor]]:
        return refs[:1], refs[1:]

    def get(self, ref: FakeActor) -> tuple[int, int]:
        if ref.end in ray_actors._DEATHS:
            raise getattr(self.exceptions, ref.end)("gone")
        return 0, 0

    def kill(self, actor: FakeActor) -> None:
        self.killed.append(actor)


def cluster_of(fake: FakeRay, num_actors: int) -> RayCluster:
    cluster = RayCluster.__new__(RayCluster)
    cluster.__dict__.update(_settings={}, _ray=fake, _resources={}, _num_actors=num_actors)
    return cluster


def shards_left(number: int) -> Any:
    return SimpleNamespace(pending=lambda: list(range(number)), store=Path("store"))


@pytest.mark.parametrize("death", ray_actors._DEATHS)
def test_others_go_on_however_an_actor_dies(death: str, caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeRay([death, "done"])
    cluster_of(fake, 2).embed(shards_left(9), WHOLE, Bar("embedding", 9, "texts"))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["Ray actor 0 died: others take its shard"]
    with pytest.raises(WorkerError, match=r"all 1 Ray actors died with 9 shards left: .*"):
        cluster_of(FakeRay([death]), 1).embed(shards_left(9), WHOLE, Bar("embedding", 9, "texts"))


def test_there_are_no_more_actors_than_shards() -> None:
    fake = FakeRay(["done"] * 5)
    cluster_of(fake, 5).embed(shards_left(2), WHOLE, Bar("embedding", 2, "texts"))
    assert len(fake.killed) == 2


def test_worker_that_dies_with_the_guide_is_one_line() -> None:
    with pytest.raises(WorkerError, match=r"the Ray worker that loaded the guide died \(gone\): give it more memory"):
        cluster_of(FakeRay(["OutOfMemoryError"]), 1).guide_info()


def test_missing_ray_is_named_with_its_install_line(
    source: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r'pip install "gistfast\[ray\]"'):
        precompute(source, guide=tiny_student, out=tmp_path / "store", engine="ray")
