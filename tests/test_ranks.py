"""What a process finds out about others without there being any; `test_train_ranks.py` starts several."""

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gistfast.batches import MixedBatches, StoreBatches
from gistfast.errors import ConfigError, StoreError, WorkerError
from gistfast.launch import alike, rank
from gistfast.store import GuideStore
from gistfast.training.ranks import Ranks, join, left_in_one_line
from gistfast.training.run_folder import check_same_run
from gistfast.training.setup import check_steps
from gistfast.training.stores import check_stores


@pytest.fixture
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_agrees_with_itself(no_process_group: None) -> None:
    ranks = join("cpu")
    assert (ranks.count, ranks.own, ranks.first) == (1, 0, True)
    assert ranks.gather("value") == ["value"]
    assert [ranks.any(True), ranks.any(False)] == [True, False]
    assert ranks.in_turn(lambda: 7) == 7


def test_refusal_in_one_process_is_its_own(no_process_group: None) -> None:
    error = StoreError("no such store")
    with pytest.raises(StoreError) as caught, Ranks().together():
        raise error
    assert caught.value is error
    assert not error.said_elsewhere


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 processes on this machine, and 2 GPUs: start one for each GPU"):
        join("cuda")


def test_gpus_that_are_left_idle_are_mentioned(
    no_process_group: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with caplog.at_level(logging.INFO, "gistfast"):
        join("cpu")
        assert not caplog.text
        join("cuda")
    assert "training on one of 2 GPUs; `torchrun --nproc-per-node 2 -m gistfast train` uses all of them" in caplog.text


def test_rank_of_another_launcher_is_not_taken(monkeypatch: pytest.MonkeyPatch, no_process_group: None) -> None:
    monkeypatch.setenv("RANK", "3")
    assert rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank() == 3


@pytest.mark.parametrize("local_rank", [0, 1])
def test_first_process_of_a_machine_says_what_all_refuse(monkeypatch: pytest.MonkeyPatch, local_rank: int) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(ConfigError) as caught, alike():
        raise ConfigError("bad")
    assert caught.value.said_elsewhere == bool(local_rank)


def test_end_of_another_process_is_left_to_it() -> None:
    with pytest.raises(WorkerError) as caught, left_in_one_line():
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:55515.")
    assert caught.value.said_elsewhere
    with pytest.raises(RuntimeError, match="mat1 and mat2"), left_in_one_line():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_processes_of_two_runs_are_refused() -> None:
    records = [
        {"settings": {"seed": seed, "store": store}, "processes": 2, "store": {"fingerprint": "f", "mined": None}}
        for seed, store in [(1, "here"), (1, "there"), (2, "here")]
    ]
    check_same_run(records[:2])
    with pytest.raises(ConfigError, match="process 2 was started otherwise than the first one: --seed was 1, found 2"):
        check_same_run(records)


def test_stores_that_fill_no_step_of_several_processes_are_refused(make_store: Callable[..., GuideStore]) -> None:
    rows = [(f"question {row}", f"answer {row}") for row in range(12)]
    store = make_store(rows, tasks=["one", "two", "three"] * 4)
    batches = MixedBatches((StoreBatches(store, "task", processes=2),))
    check_steps(batches, 2)
    with pytest.raises(ConfigError, match=r"--batch-size 3 in 2 processes: no task of .* has the 6 rows of a step"):
        check_steps(batches, 3)
    limits: dict[str, Any] = {"batch_size": 7, "mined_negatives": 0, "evaluate": False}
    check_stores({"store": store}, **limits)
    with pytest.raises(ConfigError, match=r"--batch-size 7 in 2 processes is larger .* has 12 rows .*: give 6 or less"):
        check_stores({"store": store}, **limits, processes=2)


def test_package_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["gistfast", "train", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("gistfast", run_name="__main__")
    assert ended.value.code == 0
    assert "Train a student against the guide store STORE" in capsys.readouterr().out
