"""Scored pairs that a run is evaluated on, beside held-out rows or alone."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from train_cases import ROWS, records, resumes_exactly, same_weights, train_small

from gistfast.errors import ConfigError, DataError
from gistfast.evaluation.retrieval import MEASURES
from gistfast.stages.evaluate import evaluate
from gistfast.stages.train import TrainReport
from gistfast.training.best import best_step
from gistfast.training.run_picture import _panels, _read

PAIRS = [("oak 0", "oak 1", 5.0), ("oak 0", "river 0", 1.0), ("bread 0", "car 1", 0.0), ("judge 1", "judge 0", 4.0)]
# Of Spearman and of nDCG@10 before the first step and after each.
SPEARMAN = (0.9, 0.5, 0.7, 0.6, 0.7, 0.65, 0.6)
NDCG = (0.9, 0.1, 0.2, 0.3, 0.5, 0.4, 0.4)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    lines = (json.dumps(dict(zip(("sentence1", "sentence2", "score"), pair, strict=True))) + "\n" for pair in PAIRS)
    path.write_text("".join(lines))
    return path


@pytest.fixture
def run(make_store: Callable[..., Any], pairs: Path, tiny_student: Path, tmp_path: Path) -> Callable[..., TrainReport]:
    """Six steps on a store without held-out rows, with an evaluation after every second one."""
    options = {"eval_sts": pairs, "eval_steps": 2, "student": tiny_student, "out": tmp_path / "student"}
    return partial(train_small, store=make_store(ROWS).path, **options)


@pytest.fixture
def held_out(make_store: Callable[..., Any]) -> Path:
    """A store with held-out rows."""
    path: Path = make_store(ROWS, name="held out", holdout=0.3).path
    return path


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets both evaluators find the scores above."""

    def similarity(self: object, model: object, output_path: object, epoch: object, steps: int) -> dict[str, float]:
        return {"sts_spearman_cosine": SPEARMAN[steps], "sts_pearson_cosine": 0.0}

    def retrieval(self: object, model: object, output_path: object, epoch: object, steps: int) -> dict[str, float]:
        return {f"held_out_cosine_{measure}": NDCG[steps] for measure in MEASURES}

    monkeypatch.setattr(EmbeddingSimilarityEvaluator, "__call__", similarity)
    monkeypatch.setattr(InformationRetrievalEvaluator, "__call__", retrieval)


def evaluations(report: TrainReport) -> list[dict[str, Any]]:
    return [record for record in records(report.path) if "eval_runtime" in record]


def test_pairs_are_scored_as_evaluate_scores_them(run: Callable[..., TrainReport], pairs: Path) -> None:
    report = run()
    found = evaluations(report)
    assert [record["step"] for record in found] == [0, 2, 4, 6]
    assert report.evaluation == {"spearman": found[-1]["eval_sts_spearman_cosine"]}
    assert report.evaluation["spearman"] == pytest.approx(
        evaluate(report.path, sts=str(pairs), device="cpu")["sts"]["spearman"]
    )
    assert json.loads((report.path / "report.json").read_text())["evaluation"] == report.evaluation
    assert not any("eval_loss" in record for record in found)


def test_pairs_are_scored_beside_held_out_rows(run: Callable[..., TrainReport], held_out: Path) -> None:
    report = run(store=held_out)
    assert set(report.evaluation) == {"loss", *MEASURES, "spearman"}
    for record in evaluations(report):
        assert record["eval_loss"] > 0
        assert -1 <= record["eval_sts_spearman_cosine"] <= 1
        assert 0 <= record["eval_held_out_cosine_ndcg@10"] == record["eval_sequential_score"]
    panels = _panels(_read(report.path / "metrics.jsonl"))
    assert panels["similarity of scored pairs"]["Spearman"][0] == (0, 2, 4, 6)
    assert panels["evaluation on held-out rows"]["nDCG@10"][0] == (0, 2, 4, 6)


def test_evaluation_changes_nothing_of_the_training(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    assert same_weights(run().path, run(out=tmp_path / "plain", eval_sts=None, eval_steps=0).path)


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize(("with_rows", "best", "by"), [(False, 2, "Spearman's correlation"), (True, 4, "nDCG@10")])
def test_best_student_is_by_retrieval_where_there_is_any(
    with_rows: bool,
    best: int,
    by: str,
    run: Callable[..., TrainReport],
    held_out: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"store": held_out} if with_rows else {}
    with caplog.at_level(logging.INFO, "gistfast"):
        report = run(eval_steps=1, keep_best=True, **options)
    assert report.best_step == best
    assert report.evaluation["spearman"] == SPEARMAN[best]
    assert same_weights(report.path, report.path / "checkpoints" / f"checkpoint-{best}")
    assert caplog.text.count(f"the best student is the one with the highest {by} on") == 1
    assert f"kept after step {best}, whose {by} was the highest" in (report.path / "README.md").read_text()


@pytest.mark.usefixtures("scores")
def test_resumed_run_finds_the_same_best_and_loses_patience_at_the_same_step(
    run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    undisturbed, resumed = resumes_exactly(partial(run, eval_steps=1, keep_best=True, patience=4), tmp_path)
    assert (undisturbed.steps, undisturbed.best_step) == (resumed.steps, resumed.best_step) == (6, 2)


def test_retrieval_goes_before_similarity() -> None:
    similar = [{"eval_sts_spearman_cosine": score, "step": step} for step, score in enumerate(SPEARMAN)]
    both = [record | {"eval_held_out_cosine_ndcg@10": NDCG[record["step"]]} for record in similar]
    assert (best_step(similar), best_step(both)) == (2, 4)


def test_bad_files_are_refused_before_anything_is_written(
    run: Callable[..., TrainReport], pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="is not a file"):
        run(eval_sts="/no/such/file.jsonl")
    pairs.write_text('{"sentence1": "a", "score": 1}\n')
    with pytest.raises(DataError, match="has no column sentence2"):
        run()
    with pytest.raises(ConfigError, match=r"--eval-sts .* does nothing without evaluations: give --eval-steps"):
        run(eval_steps=0)
    assert not (tmp_path / "student").exists()


def test_card_names_the_file_and_not_where_it_lies(run: Callable[..., TrainReport], pairs: Path) -> None:
    card = (run(max_steps=1).path / "README.md").read_text()
    assert "`eval_sts`: pairs.jsonl" in card
    assert str(pairs) not in card
