"""The processes that prepare batches: batches as without them, no copy of the training process, errors in one line."""

import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from conftest import PAIRS
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader, get_worker_info

from gistfast.errors import StoreError, WorkerError
from gistfast.store import GuideStore
from gistfast.training.collate import MixedBatch, MixedCollator, MixedRows
from gistfast.training.feed import feed
from gistfast.training.loader import loader_of, worker_errors_in_one_line

BATCHES = [[2, 0, 5], [1, 4], [3]]
LOCK = threading.Lock()


class Instead:
    """Stands in for the collator: says of the process it runs in what `act` finds."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def __call__(self, chosen: Any) -> Any:
        assert get_worker_info() is not None
        return self.act()


def parent_and_group() -> tuple[int, int]:
    """Of this process."""
    return os.getppid(), os.getpgid(0)


def lock_is_free() -> bool:
    """Whether nobody in this process holds the lock."""
    if free := LOCK.acquire(timeout=5):
        LOCK.release()
    return free


def be_killed() -> None:
    """As by a machine whose memory is full."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def store(make_store: Callable[..., GuideStore]) -> GuideStore:
    return make_store(PAIRS)


@pytest.fixture
def loader(store: GuideStore, tiny_student: Path, tmp_path: Path) -> Callable[..., DataLoader[Any]]:
    """A loader of three batches of the store."""
    student = SentenceTransformer(str(tiny_student), device="cpu")
    collate = MixedCollator(feed(student, [store], {}, spare_folder=tmp_path, on_cpu=True)[1])

    def make(collate: Any = collate, workers: int = 1) -> DataLoader[Any]:
        rows = MixedRows([store], "train")
        return loader_of(rows, BATCHES, cast(MixedCollator, collate), workers=workers, pin_memory=False)

    return make


def cells(batches: Iterator[MixedBatch]) -> list[dict[str, list[Any]]]:
    """The tensors of batches, as lists."""
    names = ("rows", "identity", "places", "guide", "counts")
    return [{name: cast(dict[str, Any], batch)[name].tolist() for name in names} for batch in batches]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_those_of_this_process_in_their_order(loader: Callable[..., DataLoader[Any]], workers: int) -> None:
    assert cells(iter(loader(workers=workers))) == cells(iter(loader(workers=0)))


def test_worker_is_made_by_a_server_and_in_no_group_of_ours(loader: Callable[..., DataLoader[Any]]) -> None:
    ((parent, group),) = set(loader(Instead(parent_and_group)))
    assert parent != os.getpid()
    assert psutil.Process(parent).ppid() == os.getpid()
    assert group != os.getpgid(0) != os.getpgid(parent)


def test_lock_that_another_thread_holds_stops_no_worker(loader: Callable[..., DataLoader[Any]]) -> None:
    with LOCK:
        free = next(iter(loader(Instead(lock_is_free))))
    assert free


def test_rows_travel_as_the_path_of_their_store(make_store: Callable[..., GuideStore]) -> None:
    few, many = (
        MixedRows([make_store([(f"text {n}", f"other {n}") for n in range(count)], name=f"of {count}")], "train")
        for count in (10, 1000)
    )
    assert len(pickle.dumps(many)) < len(pickle.dumps(few)) + 100
    unpacked = pickle.loads(pickle.dumps(many))
    assert (unpacked.__getitems__([7, 999])[1] == many.__getitems__([7, 999])[1]).all()


def test_refusal_of_a_worker_is_the_line_that_was_raised_there(
    loader: Callable[..., DataLoader[Any]], store: GuideStore
) -> None:
    batches = loader()
    shutil.rmtree(store.path)
    with pytest.raises(StoreError) as refused, worker_errors_in_one_line():
        next(iter(batches))
    assert str(refused.value) == f"{store.path} has no store.json: make a guide store with `gistfast precompute`"


def test_killed_worker_is_one_line(loader: Callable[..., DataLoader[Any]]) -> None:
    with (
        pytest.raises(WorkerError, match=r"a process that prepares batches has ended.*--resume"),
        worker_errors_in_one_line(),
    ):
        next(iter(loader(Instead(be_killed))))


def test_other_errors_are_left_alone() -> None:
    for error in (StoreError("no such store"), RuntimeError("another"), torch.OutOfMemoryError("of memory")):
        with pytest.raises(type(error)) as raised, worker_errors_in_one_line():
            raise error
        assert raised.value is error
