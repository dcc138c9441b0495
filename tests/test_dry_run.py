"""A dry run says what a run would be, and leaves no trace of it."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from store_cases import files_of
from train_cases import ROWS, at_step, steps, train_small
from typer.testing import CliRunner

from gistfast.batches import StoreBatches
from gistfast.cli.main import app
from gistfast.errors import ConfigError, ModelError, StoreError, TrainingError
from gistfast.stages.dry_run import DryRun, dry_run, facts
from gistfast.stages.train import TrainReport
from gistfast.store import GuideStore
from gistfast.training.pace import Pace
from gistfast.training.trainer import GuidedTrainer

OPTIONS: dict[str, Any] = {"batch_size": 4, "save_steps": 0, "trackers": (), "picture": False, "device": "cpu"}


@pytest.fixture
def store(make_store: Callable[..., GuideStore]) -> GuideStore:
    return make_store(ROWS, holdout=0.3)


@pytest.fixture
def arguments(store: GuideStore, tiny_student: Path, tmp_path: Path) -> dict[str, Any]:
    return {"store": store.path, "student": tiny_student, "out": tmp_path / "student"}


@pytest.fixture
def trial(arguments: dict[str, Any]) -> Callable[..., DryRun]:
    return partial(dry_run, **arguments, **OPTIONS)


@pytest.fixture
def run(arguments: dict[str, Any]) -> Callable[..., TrainReport]:
    return partial(train_small, **arguments)


def test_nothing_is_left_but_the_tokens(
    trial: Callable[..., DryRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(temporary)
    before = files_of(tmp_path)
    found = trial(eval_steps=1, save_steps=1, keep_best=True, trackers=None, picture=True)
    after = files_of(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {Path(name).parts[:2] for name in after.keys() - before.keys()} == {("store", "tokens")}
    assert found.tokens_at == (tmp_path / "store" / "tokens",)
    assert not list(temporary.iterdir())
    assert not (tmp_path / "student").exists()


def test_figures_are_those_of_the_run(trial: Callable[..., DryRun], run: Callable[..., TrainReport]) -> None:
    found = trial(epochs=2.0, freeze=("embeddings",))
    report = run(epochs=2.0, max_steps=None, freeze=("embeddings",))
    log = steps(report.path)
    assert (found.rows, found.rows + found.held_out) == (report.rows, len(ROWS))
    assert found.steps == found.taken == report.steps == 2 * found.batches
    for name, value in (("tokens", found.tokens), ("padded_tokens", found.padded_tokens)):
        assert value == pytest.approx(sum(record[name] for record in log) / 2)
    assert 0 < found.trained < found.weights
    assert found.peak_mib > 0
    assert found.whole_s == found.steps * found.step_s > 0


def test_several_stores_are_counted_together(
    trial: Callable[..., DryRun], store: GuideStore, make_store: Callable[..., GuideStore]
) -> None:
    other = make_store([(f"{anchor} again", positive) for anchor, positive in ROWS], name="other")
    alone, both = trial(max_steps=1), trial(store=(store.path, other.path), max_steps=1)
    assert both.rows == alone.rows + len(ROWS)
    assert both.batches == alone.batches + len(ROWS) // 4
    assert both.tokens_at == (store.path / "tokens", other.path / "tokens")


@pytest.mark.parametrize(("max_steps", "taken"), [(1, 1), (10, 10), (4000, 10)])
def test_at_most_ten_steps_are_taken(
    max_steps: int, taken: int, trial: Callable[..., DryRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step, counted = GuidedTrainer.training_step, []

    def step(self: GuidedTrainer, *arguments: Any) -> torch.Tensor:
        counted.append(None)
        return training_step(self, *arguments)

    monkeypatch.setattr(GuidedTrainer, "training_step", step)
    found = trial(max_steps=max_steps)
    assert (found.steps, found.taken, len(counted)) == (max_steps, taken, taken)


@pytest.mark.parametrize(("steps_ms", "step_s"), [((3000.0,), 3.0), ((9000.0, 2000.0, 1000.0), 1.5)])
def test_first_step_is_not_timed_where_there_are_more(
    steps_ms: tuple[float, ...], step_s: float, trial: Callable[..., DryRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    take, left = Pace.take, list(steps_ms)

    def timed(self: Pace, *arguments: Any) -> dict[str, float]:
        return take(self, *arguments) | {"step_ms": left.pop(0)}

    monkeypatch.setattr(Pace, "take", timed)
    assert trial(max_steps=len(steps_ms)).step_s == step_s


def test_store_that_is_gone_before_the_next_epoch_is_one_line(
    trial: Callable[..., DryRun], store: GuideStore, tmp_path: Path
) -> None:
    epoch = len(StoreBatches(store)(store.to_dataset("train"), OPTIONS["batch_size"], False, seed=42))
    with at_step(epoch, lambda: store.path.rename(tmp_path / "elsewhere")), pytest.raises(StoreError) as refused:
        trial(workers=1, max_steps=epoch + 1)
    assert str(refused.value) == f"{store.path} has no store.json: make a guide store with `gistfast precompute`"


def test_run_that_is_there_is_left_as_it_is(
    trial: Callable[..., DryRun], run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    run(save_steps=2)
    before = files_of(tmp_path / "student")
    with pytest.raises(ConfigError, match="holds a training run: go on with --resume or replace it with --overwrite"):
        trial()
    trial(overwrite=True)
    assert files_of(tmp_path / "student") == before


def test_run_to_be_resumed_has_fewer_steps_to_come(
    trial: Callable[..., DryRun], run: Callable[..., TrainReport]
) -> None:
    options = {"max_steps": 20, "learning_rate": 1e-3, "temperature": 0.1}

    def fail() -> None:
        raise RuntimeError("the power went")

    with at_step(17, fail), pytest.raises(RuntimeError, match="the power went"):
        run(save_steps=8, **options)
    found = trial(resume=True, save_steps=8, **options)
    assert (found.steps, found.done, found.taken) == (20, 16, 4)
    assert found.whole_s == 4 * found.step_s
    assert dict(facts(found))["steps"].startswith("20, 16 of them done: ")
    run(save_steps=8, resume=True, **options)
    with pytest.raises(ConfigError, match="is complete: nothing to resume"):
        trial(resume=True, save_steps=8, **options)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"batch_size": 50}, ConfigError, "--batch-size 50 is larger than the data"),
        ({"student": "/no/such/folder"}, ModelError, "is not a folder"),
        ({"store": "/no/such/store"}, StoreError, r"no store\.json"),
        ({"push_to_hub": "no/such/name"}, ConfigError, "--push-to-hub"),
        ({"learning_rates": {"nothing": 1.0}}, ConfigError, "finds none of the weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_run_refuses_is_refused(
    option: dict[str, Any], error: type[Exception], message: str, trial: Callable[..., DryRun]
) -> None:
    with pytest.raises(error, match=message):
        trial(**option)


def test_too_little_memory_names_the_settings_to_try(trial: Callable[..., DryRun]) -> None:
    def fail() -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    with (
        at_step(2, fail),
        pytest.raises(TrainingError, match=r"--tokens-per-forward 1024, .* --gradient-checkpointing$"),
    ):
        trial()


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, "CPU, fp32, loss backend chunked, passes of up to 2,048 tokens"),
        (
            {"bf16": True, "cached": True, "gradient_checkpointing": True, "backend": "reference"},
            "CPU, bf16 where it is safe, loss backend reference, passes of up to 2,048 tokens, "
            "each embedded twice (cached), activations recomputed",
        ),
    ],
    ids=["plain", "sparing"],
)
def test_choices_are_named(options: dict[str, Any], how: str, trial: Callable[..., DryRun]) -> None:
    assert trial(max_steps=1, **options).how == how


def test_table_says_it_all_in_a_few_lines(tmp_path: Path) -> None:
    found = DryRun(
        rows=1765, held_out=235, batch_size=64, batches=28, steps=84, done=0, weights=1000, trained=1000,
        tokens=28_291.4, padded_tokens=30_000.0, how="CPU", peak_mib=975.2, on_gpu=False, taken=10, step_s=150.0,
        tokens_at=(tmp_path / "tokens",),
    )  # fmt: skip
    assert dict(facts(found)) == {
        "rows": "1,765 to train on, 235 held out",
        "steps": "84: 3 epochs of 28 batches of up to 64",
        "weights": "1,000, all trained",
        "tokens": "about 28,300 an epoch; padding makes 5.7% of what is computed",
        "computes on": "CPU",
        "memory": "975 MiB for the process, at its highest in 10 steps",
        "a step": "150 s, mean of steps 2 to 10",
        "whole run": "about 3 h 30 min, evaluations and checkpoints not counted",
        "written": f"nothing to --out; the student's tokens stay in {tmp_path / 'tokens'}, for the run",
    }


def test_command_prints_the_table(arguments: dict[str, Any]) -> None:
    given = [str(arguments["store"]), "--student", str(arguments["student"]), "--out", str(arguments["out"])]
    done = CliRunner().invoke(app, ["train", *given, "--batch-size", "4", "--device", "cpu", "--dry-run"])
    assert done.exit_code == 0
    lines = [line for line in done.stdout.splitlines() if line[:1].strip()]
    assert lines[0].startswith("a dry run of ")
    names = [line.split("  ")[0] for line in lines]
    assert names[names.index("rows") :] == [name for name, _ in facts(dry_run(**arguments, **OPTIONS))]
    assert not arguments["out"].exists()


def test_function_that_trains_does_not_run_dry(run: Callable[..., TrainReport]) -> None:
    with pytest.raises(ConfigError, match=r"call gistfast\.stages\.dry_run\.dry_run"):
        run(dry_run=True)
