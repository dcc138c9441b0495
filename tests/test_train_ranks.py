"""Training by torchrun: two processes with batches of four rows take the steps of one with batches of eight.

The tests start this file under torchrun, and the command itself.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed
from train_cases import records, same_weights, steps, train_small, weights

from gistfast.batches import StoreBatches
from gistfast.cli.main import main
from gistfast.errors import ConfigError, ModelError, StoreError
from gistfast.stages.precompute import precompute
from gistfast.store import GuideStore
from gistfast.training.ranks import Ranks, join
from gistfast.training.trainer import GuidedTrainer

pytestmark = pytest.mark.slow

RANKS = 2
BATCH_SIZE = 4
COLUMNS = ("anchor", "positive", "negative_1")
WORDS = ("oak", "river", "bread", "violin", "bank", "judge", "car", "sleep", "stone", "letter")
# Two anchors share a positive and a negative, and texts are of many lengths.
ROWS = [
    (f"{word} {number}" + " and so on" * (place % 7), f"what {word} means", f"what {word[::-1]} means")
    for place, word in enumerate(WORDS)
    for number in range(2)
]
# How each run differs from `train_small` with a margin and no dropout.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"eval_steps": 3, "workers": 1, "triplet": "soft"},
    "cached": {"cached": True, "tokens_per_forward": 24, "matryoshka_dims": (16, 8)},
    "tolerant": {"cached": True, "tokens_per_forward": 24, "replay_tolerance": 1e-9},
    "lora": {"lora_rank": 4, "dim": 8, "tokens_per_forward": 24},
    "temperature": {
        "learn_temperature": True,
        "learning_rates": {"temperature": 0.01},
        "margin_end": -0.1,
        "eval_steps": 2,
        "keep_best": True,
    },
    "recomputed": {"gradient_checkpointing": True, "freeze": ("embeddings",), "tokens_per_forward": 24},
}
CASES["stores"] = {"mixing": "round_robin", "eval_steps": 3}
# How near the log of two processes is to that of one; shares are rounded there.
NEAR = {
    **{name: {"rel": 1e-5} for name in ("loss", "grad_norm", "temperature", "margin", "rows", "texts")},
    **{name: {"abs": 1.01e-4} for name in ("dropped/ap", "dropped/aa", "dropped/pp", "dropped/an")},
    **{name: {"abs": 1.01e-4} for name in ("loss/other", "loss_at/8", "score/positive", "score/hardest", "triplet")},
}


def given(name: str, folder: Path) -> dict[str, Any]:
    """The options of a case, with its stores."""
    stores = [folder / "store", folder / "other"] if name == "stores" else folder / "store"
    return {"store": stores, **CASES[name]}


run_small = partial(train_small, dropout=0.0, margin=0.05, batch_size=BATCH_SIZE)


# What the processes do.


@contextmanager
def observed() -> Iterator[list[dict[str, int]]]:
    """For each step of a run the forward passes, the weights that are trained, and those exchanged."""
    seen: list[dict[str, int]] = []
    prepare, step = GuidedTrainer._prepare_for_training, GuidedTrainer.training_step

    def exchange(state: None, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        seen[-1]["exchanged"] += bucket.buffer().numel()
        work = distributed.all_reduce(bucket.buffer().div_(RANKS), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    def prepared(self: GuidedTrainer, *given: Any) -> Any:
        model, loader = prepare(self, *given)
        model.register_comm_hook(None, exchange)
        return model, loader

    def taken(self: GuidedTrainer, model: Any, inputs: dict[str, Any], *more: Any) -> Tensor:
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        seen.append({"passes": len(inputs["texts"]["forwards"]), "trained": trained, "exchanged": 0})
        return step(self, model, inputs, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuidedTrainer, "_prepare_for_training", prepared)
        patch.setattr(GuidedTrainer, "training_step", taken)
        yield seen


@contextmanager
def at_step(number: int, act: Callable[[], Any]) -> Iterator[None]:
    """Let something happen in this process at the beginning of a step, counted from 1."""
    step, taken = GuidedTrainer.training_step, []

    def acting(self: GuidedTrainer, *given: Any) -> Tensor:
        taken.append(None)
        if len(taken) == number:
            act()
        return step(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuidedTrainer, "training_step", acting)
        yield


def refusals(ranks: Ranks) -> dict[str, Any]:
    """What this process hears of errors in the other one."""

    def fail(error: Exception, *, when: bool) -> str:
        if when:
            raise error
        return "done"

    heard = {}
    acts: dict[str, Callable[[], Any]] = {
        "second": lambda: fail(StoreError("no such store"), when=ranks.own == 1),
        "both": lambda: fail(ConfigError(f"found by {ranks.own}"), when=True),
        "none": lambda: fail(ModelError("not raised"), when=False),
    }
    for name, act in acts.items():
        try:
            with ranks.together():
                heard[name] = [act()]
        except (ConfigError, StoreError) as error:
            heard[name] = [type(error).__name__, str(error), error.said_elsewhere]
    done: list[str] = []
    ranks.in_turn(lambda: done.append(str(time.monotonic_ns())))
    return {**heard, "turn": int(done[0]), "any": [ranks.any(ranks.own == 1), ranks.any(False)]}


def run_command(*given: str) -> tuple[Any, str]:
    """The exit code of the command in this process, and what it said."""
    with redirect_stderr(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gistfast", *given])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code, said.getvalue()


def work(folder: Path, student: Path) -> None:
    """All that one process does; what it saw goes to a file."""
    torch.set_num_threads(1)
    ranks = join("cpu")
    run = partial(run_small, student=student)
    found: dict[str, Any] = {"refusals": refusals(ranks)}
    where = [str(folder / "store"), "--student", str(student), "--out", str(folder / "refused")]
    found["command"] = run_command("train", *where, "--batch-size", "9", "--device", "cpu")
    for name in CASES:
        with observed() as seen:
            report = run(out=folder / name, **given(name, folder))
        found[name] = {"seen": seen, "losses": [report.loss, report.dropped]}
    # With dropout, which the generators of the processes draw, through the end of an epoch.
    again = partial(run, store=folder / "store", dropout=0.3, save_steps=2, max_steps=8, picture=False)
    again(out=folder / "undisturbed")
    ask = partial(signal.raise_signal, signal.SIGTERM if ranks.own == 1 else 0)
    with at_step(3, ask if ranks.own == 1 else bool), pytest.raises(KeyboardInterrupt, match="after step 3 of 8"):
        again(out=folder / "resumed")
    found["stopped"] = sorted(path.name for path in (folder / "resumed" / "checkpoints").glob("checkpoint-3/*.pth"))
    again(out=folder / "resumed", resume=True)
    (folder / f"rank-{ranks.own}.json").write_text(json.dumps(found))


def torchrun(*command: str) -> subprocess.Popen[str]:
    """Two processes on the CPU, with one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(RANKS),
            "--master-port",
            port,
            *command,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    """All that the processes of torchrun said, which has to end by itself."""
    try:
        return process.communicate(timeout=600)[0]
    finally:
        process.kill()
        process.wait()


# What came of it.


@pytest.fixture(scope="module")
def folder(guide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with sixteen rows to train on and four that are held out, and another one with eight rows."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, rows, holdout in [("store", ROWS, 0.3), ("other", [row[1::-1] for row in ROWS[:8]], 0.0)]:
        lines = [json.dumps(dict(zip(COLUMNS, row, strict=False))) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        options: dict[str, Any] = {"guide": guide_folder, "index": "none", "device": "cpu", "holdout": holdout}
        store = precompute(folder / f"{name}.jsonl", out=folder / name, **options)
        assert (store.num_rows, int(store.held_out.sum())) == (len(rows), 4 if holdout else 0)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path, tiny_student: Path) -> list[dict[str, Any]]:
    """What each process saw."""
    process = torchrun(__file__, str(folder), str(tiny_student))
    said = ended(process)
    assert process.returncode == 0, said
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone(folder: Path, tiny_student: Path) -> Callable[..., Any]:
    """Training in this process on the joint rows."""
    return partial(run_small, student=tiny_student, batch_size=RANKS * BATCH_SIZE)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one_on_the_joint_batch(
    ranks: list[dict[str, Any]], alone: Callable[..., Any], folder: Path, tmp_path: Path, name: str
) -> None:
    one = alone(out=tmp_path / "one", **given(name, folder))
    pairs = list(zip(steps(one.path), steps(folder / name), strict=True))
    assert len(pairs) == 6
    for expected, found in pairs:
        for logged in NEAR.keys() & expected.keys():
            assert found[logged] == pytest.approx(expected[logged], **NEAR[logged]), logged
    assert any(expected["dropped/ap"] > 0 for expected, _ in pairs)
    begun = weights(
        alone(out=tmp_path / "begun", **given(name, folder) | {"learning_rate": 1e-30, "max_steps": 1}).path
    )
    expected_weights, found_weights = weights(one.path), weights(folder / name)
    for weight, expected in expected_weights.items():
        # Its gradient is 0 but for rounding: the softmax does not see it.
        if not weight.endswith("key.bias"):
            travelled = (expected - begun[weight]).norm()
            assert (found_weights[weight] - expected).norm() <= 1e-3 * travelled + 1e-9, weight


def test_texts_of_a_step_are_shared_by_the_processes(folder: Path) -> None:
    store = GuideStore.open(folder / "store")
    rows = store.rows[~store.held_out]
    batches = StoreBatches(store, processes=RANKS)(store.to_dataset("train"), BATCH_SIZE, True, seed=42)
    first, second, *_ = (rows[batch] for batch in batches)
    assert np.intersect1d(first[:, 1], second[:, 1]).size


def test_evaluation_is_that_of_one_process(
    ranks: list[dict[str, Any]], alone: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    one = alone(out=tmp_path / "one", **given("plain", folder))
    evaluations = [[r for r in records(path) if "eval_loss" in r] for path in (one.path, folder / "plain")]
    assert [record["step"] for record in evaluations[0]] == [0, 3, 6]
    for expected, found in zip(*evaluations, strict=True):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_exchanged_once_a_step(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert [step["exchanged"] for step in rank[name]["seen"]] == [step["trained"] for step in rank[name]["seen"]]
        assert len(rank[name]["seen"]) == 6


@pytest.mark.parametrize("name", ["cached", "lora", "recomputed"])
def test_processes_may_have_other_numbers_of_passes(ranks: list[dict[str, Any]], name: str) -> None:
    passes = [[step["passes"] for step in rank[name]["seen"]] for rank in ranks]
    assert min(map(min, passes)) > 1
    assert passes[0] != passes[1]


def test_every_process_reports_the_same(ranks: list[dict[str, Any]], folder: Path) -> None:
    for name in CASES:
        assert ranks[0][name]["losses"] == ranks[1][name]["losses"]
        assert ranks[0][name]["losses"][0] == steps(folder / name)[-1]["loss"]


def test_error_of_one_process_is_that_of_all_and_is_said_once(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        heard = rank["refusals"]
        assert heard["second"] == ["StoreError", "no such store", number > 0]
        assert heard["both"] == ["ConfigError", "found by 0", number > 0]
        assert heard["none"] == ["done"]
        assert heard["any"] == [True, False]
    assert ranks[0]["refusals"]["turn"] < ranks[1]["refusals"]["turn"]


def test_processes_leave_the_files_of_one(
    ranks: list[dict[str, Any]], alone: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    one = alone(out=tmp_path / "one", **given("plain", folder))
    listed = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (one.path, folder / "plain")]
    assert listed[0] == listed[1]
    assert len(records(one.path)) == len(records(folder / "plain"))
    assert len(list((folder / "store" / "tokens").iterdir())) == 1


def test_stopped_run_goes_on_as_an_undisturbed_one(ranks: list[dict[str, Any]], folder: Path) -> None:
    # The second process alone was asked to stop.
    for rank in ranks:
        assert rank["stopped"] == ["rng_state_0.pth", "rng_state_1.pth"]
    losses = [
        [(record["step"], record["loss"]) for record in steps(folder / name)] for name in ("undisturbed", "resumed")
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 9))
    assert same_weights(folder / "undisturbed", folder / "resumed")


def test_run_of_two_processes_is_not_resumed_by_one(
    ranks: list[dict[str, Any]], alone: Callable[..., Any], folder: Path
) -> None:
    with pytest.raises(ConfigError, match="its steps were those of 2 processes, found 1: resume it as it was"):
        alone(out=folder / "plain", resume=True, batch_size=BATCH_SIZE, **given("plain", folder))


# The command.


def test_command_is_stopped_by_torchrun_with_a_checkpoint(folder: Path, tiny_student: Path) -> None:
    out = folder / "stopped"
    options = {"--batch-size": BATCH_SIZE, "--max-steps": 100_000, "--device": "cpu", "--workers": 1, "--trackers": ""}
    given = [str(part) for pair in options.items() for part in pair]
    process = torchrun(
        "-m", "gistfast", "train", str(folder / "store"), "--student", str(tiny_student), "--out", str(out), *given
    )
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = ended(process)
    assert process.returncode != 0
    assert said.count("2 processes: a step is 2 x 4 rows, all of them candidates") == 1
    assert said.count("gistfast: stopped: the same command with --resume goes on from here") == 1, said
    assert said.count("training: 100,000 steps") == 1
    assert "FutureWarning" not in said
    (checkpoint,) = (out / "checkpoints").glob("checkpoint-*")
    last = [record["step"] for record in records(out) if "loss" in record][-1]
    assert checkpoint.name == f"checkpoint-{last}"
    assert {path.name for path in checkpoint.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_refusal_of_the_command_is_one_line_of_the_first_process(ranks: list[dict[str, Any]], folder: Path) -> None:
    refused = f"--batch-size 9 in 2 processes is larger than the data: {folder / 'store'} has 16 rows to train on"
    assert [rank["command"] for rank in ranks] == [[2, f"gistfast: {refused}: give 8 or less\n"], [0, ""]]
    assert not (folder / "refused").exists()


def test_second_process_says_nothing_of_settings_that_the_first_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = []
    for rank in range(RANKS):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        said.append(run_command("train", "store", "--student", "student"))
    assert [code for code, _ in said] == [2, 0]
    assert said[0][1].startswith("gistfast: --out")
    assert said[1][1] == ""


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
