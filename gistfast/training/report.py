"""What came of a training run, from its log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gistfast.evaluation.report import SPEARMAN
from gistfast.evaluation.retrieval import MEASURES


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What came of a run.

    Attributes:
        path: Folder of the student.
        steps: Steps taken.
        rows: Rows trained on.
        loss: Mean over the steps of the last record of the log, in nats.
        dropped: Share of the candidates dropped in each block ("ap", "aa", "pp", "an"), mean over the log.
        elapsed_s: Seconds of this call.
        evaluation: Loss, nDCG@10, MRR@10 and recall of the last evaluation on the held-out rows, and Spearman's
            correlation on scored pairs, if any; of the best evaluation where its student was kept.
        best_step: The step after which the student was kept as the best one, if that was asked for.
        temperature: In the last step, where it changed during the run.
        margin: As `temperature`.
        stores: Where there are several, of each by its name: "rows" trained on, its last "loss" in the log, and of that
            evaluation its own "ndcg@10".
    """

    path: Path
    steps: int
    rows: int
    loss: float
    dropped: dict[str, float]
    elapsed_s: float
    evaluation: dict[str, float]
    best_step: int | None = None
    temperature: float | None = None
    margin: float | None = None
    stores: dict[str, dict[str, float]] = field(default_factory=dict)


def train_report(
    path: Path, history: Sequence[Mapping[str, Any]], *, best: int | None, num_rows: Mapping[str, int], elapsed_s: float
) -> TrainReport:
    """The report of a run that has come to its end.

    Args:
        path: Folder of the student.
        history: The trainer's log.
        best: The step whose student was kept, None for the last.
        num_rows: Rows trained on of each store, by its name.
        elapsed_s: Seconds that the run took.
    """
    steps = [record for record in history if "loss" in record]
    evaluations = [record for record in history if "eval_runtime" in record and best in (None, record["step"])]
    evaluation = evaluations[-1] if evaluations else {}
    return TrainReport(
        path=path,
        steps=history[-1]["step"],
        rows=sum(num_rows.values()),
        loss=steps[-1]["loss"],
        temperature=steps[-1].get("temperature"),
        margin=steps[-1].get("margin"),
        dropped=_dropped(steps),
        elapsed_s=elapsed_s,
        evaluation=_scores(evaluation) if evaluation else {},
        best_step=best,
        stores=_of_stores(num_rows, steps, evaluation) if len(num_rows) > 1 else {},
    )


def _dropped(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean share of each block over the records that have it: not every store has negatives."""
    found: dict[str, list[float]] = {}
    for record in steps:
        for name, share in record.items():
            if name.startswith("dropped/"):
                found.setdefault(name.removeprefix("dropped/"), []).append(share)
    return {block: sum(shares) / len(shares) for block, shares in found.items()}


def _of_stores(
    num_rows: Mapping[str, int], steps: Sequence[Mapping[str, float]], evaluation: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {name: {"rows": rows} for name, rows in num_rows.items()}
    for record in steps:
        for name, loss in values_of_parts(record, "loss").items():
            found[name]["loss"] = loss
    for name, score in values_of_parts(evaluation, "_ndcg@10").items():
        found[name]["ndcg@10"] = score
    return found


def values_of_parts(record: Mapping[str, Any], measure: str) -> dict[str, float]:
    """The values of a measure in a record of the log by the parts it has one for each of: stores, or widths.

    Args:
        record: Of the log.
        measure: Its name, or the end of its name, from an underscore on.
    """
    found = {}
    for key, value in record.items():
        name, slash, part = key.partition("/")
        if slash and (name == measure or (measure.startswith("_") and name.endswith(measure))):
            found[part] = value
    return found


def _scores(record: Mapping[str, float]) -> dict[str, float]:
    """The measures in a record of an evaluation, under the names that `evaluate` gives them."""
    endings = {name: f"_{name}" for name in ("loss", *MEASURES)} | {"spearman": f"_{SPEARMAN}"}
    return {
        name: value
        for name, ending in endings.items()
        for key, value in record.items()
        if key.startswith("eval_") and key.endswith(ending) and "/" not in key
    }
