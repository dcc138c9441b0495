"""Small training runs, and what they leave."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gistfast.stages.train import TrainReport, train
from gistfast.training.trainer import GuidedTrainer

# What the clock says, which is never the same twice.
CLOCK = {"step_ms", "data_wait_ms", "tokens_per_s", "pairs_per_s", "peak_mib"}

# Two anchors share a positive.
WORDS = ("oak", "river", "bread", "violin", "bank", "judge", "car", "sleep")
ROWS = [(f"{word} {number}", f"what {word} means") for word in WORDS for number in range(2)]


def train_small(**options: Any) -> TrainReport:
    """Six steps on the CPU, against a store of `ROWS`, unless told otherwise."""
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "temperature": 0.1,
        "save_steps": 0,
        "trackers": (),
        "picture": False,
        "device": "cpu",
    }
    return train(**defaults | options)


def records(folder: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[dict[str, Any]]:
    """The records of the log that have a loss."""
    return [record for record in records(folder) if "loss" in record]


def without_clock(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without what the clock says."""
    return [{name: value for name, value in record.items() if name not in CLOCK} for record in log]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a saved model, those of its modules too, by their paths."""
    return {
        f"{path.parent.relative_to(folder)}/{name}": weight
        for path in sorted(folder.glob("**/model.safetensors"))
        if "checkpoints" not in path.relative_to(folder).parts
        for name, weight in load_file(path).items()
    }


def same_weights(one: Path, other: Path) -> bool:
    """Whether two saved models have the same weights, bit for bit."""
    found, wanted = weights(one), weights(other)
    return found.keys() == wanted.keys() and all(torch.equal(weight, wanted[name]) for name, weight in found.items())


@contextmanager
def at_step(number: int, act: Callable[[], Any]) -> Iterator[None]:
    """Let something happen at the beginning of a step, counted from 1."""
    training_step, taken = GuidedTrainer.training_step, []

    def step(self: GuidedTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        taken.append(None)
        if len(taken) == number:
            act()
        return training_step(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuidedTrainer, "training_step", step)
        yield


@contextmanager
def killed_at(number: int) -> Iterator[None]:
    """Let the process seem to die at the beginning of a step, counted from 1."""

    def die() -> None:
        raise RuntimeError("the power went")

    with at_step(number, die), pytest.raises(RuntimeError, match="the power went"):
        yield


def resumes_exactly(run: Callable[..., TrainReport], folder: Path, **options: Any) -> tuple[TrainReport, TrainReport]:
    """An undisturbed run, and one that dies in its fifth step and goes on; their logs and weights are the same."""
    undisturbed = run(out=folder / "undisturbed", save_steps=2, **options)
    with killed_at(5):
        run(out=folder / "killed", save_steps=2, **options)
    resumed = run(out=folder / "killed", save_steps=2, resume=True, **options)
    assert without_clock(steps(undisturbed.path)) == without_clock(steps(resumed.path))
    assert same_weights(undisturbed.path, resumed.path)
    return undisturbed, resumed
