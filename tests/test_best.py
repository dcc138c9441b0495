import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from train_cases import ROWS, resumes_exactly, same_weights, train_small

from gistfast.errors import ConfigError
from gistfast.evaluation.retrieval import MEASURES
from gistfast.settings.stages import TrainSettings, build
from gistfast.training.best import best_step, out_of_patience
from gistfast.training.trainer import GuidedTrainer

# nDCG@10 after each of the steps; before the first it is higher than ever after.
SCORES = (0.9, 0.5, 0.7, 0.6, 0.7, 0.65, 0.6)


@pytest.fixture
def run(
    make_store: Callable[..., Any], tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Training with an evaluation after each step, whose scores are `SCORES`."""

    def scores(self: object, model: object, output_path: object, epoch: object, steps: int) -> dict[str, float]:
        return {f"held_out_cosine_{measure}": SCORES[steps] for measure in MEASURES}

    monkeypatch.setattr(InformationRetrievalEvaluator, "__call__", scores)
    store = make_store(ROWS, holdout=0.3)
    options = {"eval_steps": 1, "keep_best": True, "save_total_limit": 1}
    return partial(train_small, store=store.path, student=tiny_student, out=tmp_path / "student", **options)


def log(*scores: float) -> list[dict[str, float]]:
    """A log with an evaluation every second step, and a record of each step."""
    evaluations = [{"eval_held_out_cosine_ndcg@10": score, "step": 2 * step} for step, score in enumerate(scores)]
    return [{"loss": 9.0, "step": 1}, *evaluations, {"train_loss": 1.0, "step": 99}]


@pytest.mark.parametrize(
    ("scores", "best"), [((), None), ((0.9,), None), ((0.9, 0.1), 2), ((0.9, 0.1, 0.3, 0.2), 4), ((0.0, 0.3, 0.3), 2)]
)
def test_best_step_is_the_first_of_the_highest_after_training_began(scores: list[float], best: int | None) -> None:
    assert best_step(log(*scores)) == best


def test_patience_is_counted_from_the_best() -> None:
    assert not out_of_patience(log(), 1)
    assert not out_of_patience(log(0.9), 1)
    assert not out_of_patience(log(0.9, 0.1, 0.3, 0.2), 2)
    assert out_of_patience(log(0.9, 0.1, 0.3, 0.2, 0.3), 2)
    assert not out_of_patience(log(0.9, 0.1, 0.3, 0.2, 0.3), None)


def test_best_student_is_saved_and_reported(run: Callable[..., Any]) -> None:
    report = run(save_steps=1)
    assert (report.steps, report.best_step) == (6, 2)
    assert report.evaluation["ndcg@10"] == 0.7
    assert same_weights(report.path, report.path / "checkpoints" / "checkpoint-2")
    last = run(save_steps=1, keep_best=False, out=report.path.parent / "last")
    assert (last.best_step, last.evaluation["ndcg@10"]) == (None, 0.6)
    assert not same_weights(report.path, last.path)


def test_checkpoints_of_the_best_need_no_others(run: Callable[..., Any]) -> None:
    report = run(save_steps=0)
    assert report.best_step == 2
    assert same_weights(report.path, report.path / "checkpoints" / "checkpoint-2")


def test_run_stops_where_none_was_better_for_a_while(run: Callable[..., Any]) -> None:
    report = run(patience=2)
    assert (report.steps, report.best_step) == (4, 2)
    assert json.loads((report.path / "report.json").read_text())["best_step"] == 2
    assert "kept after step 2, whose nDCG@10 was the highest" in (report.path / "README.md").read_text()
    assert run(patience=5, out=report.path.parent / "patient").steps == 6


@pytest.mark.parametrize("patience", [None, 4], ids=["to the end", "stopped early"])
def test_resumed_run_decides_as_an_undisturbed_one(
    patience: int | None, run: Callable[..., Any], tmp_path: Path
) -> None:
    undisturbed, resumed = resumes_exactly(run, tmp_path, patience=patience)
    assert (undisturbed.steps, undisturbed.best_step) == (resumed.steps, resumed.best_step) == (6, 2)


def test_run_that_had_stopped_early_takes_no_further_step(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = partial(run, patience=2, save_steps=1, save_total_limit=2)
    undisturbed = run(out=tmp_path / "undisturbed")

    def fail(*arguments: object) -> None:
        raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr("gistfast.stages.train.add_section", fail)
        with pytest.raises(RuntimeError, match="the power went"):
            run()
    monkeypatch.setattr(GuidedTrainer, "training_step", fail)
    resumed = run(resume=True)
    assert (resumed.steps, resumed.best_step) == (4, 2)
    assert same_weights(resumed.path, undisturbed.path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_best": True}, "--keep-best needs evaluations to compare: give --eval-steps"),
        ({"patience": 2, "eval_steps": 5}, "--patience does nothing without --keep-best"),
    ],
)
def test_best_of_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TrainSettings, {"store": "store", "student": "student", "out": "out", **options})
