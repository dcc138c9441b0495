"""What came of a training run, from its log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        evaluation: Loss, nDCG@10, MRR@10 and recall of the last evaluation on the held-out rows, if any; of the
            best one where its student was kept.
        best_step: The step after which the student was kept as the best one, if that was asked for.
        temperature: In the last step, where it changed during the run.
        margin: As `temperature`.
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


def train_report(
    path: Path, history: Sequence[Mapping[str, Any]], *, best: int | None, num_rows: int, elapsed_s: float
) -> TrainReport:
    """The report of a run that has come to its end.

    Args:
        path: Folder of the student.
        history: The trainer's log.
        best: The step whose student was kept, None for the last.
        num_rows: Rows trained on.
        elapsed_s: Seconds that the run took.
    """
    steps = [record for record in history if "loss" in record]
    evaluations = [record for record in history if "eval_loss" in record and best in (None, record["step"])]
    blocks = [name for name in steps[-1] if name.startswith("dropped/")]
    dropped = {name.removeprefix("dropped/"): sum(record[name] for record in steps) / len(steps) for name in blocks}
    return TrainReport(
        path=path,
        steps=history[-1]["step"],
        rows=num_rows,
        loss=steps[-1]["loss"],
        temperature=steps[-1].get("temperature"),
        margin=steps[-1].get("margin"),
        dropped=dropped,
        elapsed_s=elapsed_s,
        evaluation=_scores(evaluations[-1]) if evaluations else {},
        best_step=best,
    )


def _scores(record: Mapping[str, float]) -> dict[str, float]:
    """The measures in a record of an evaluation, under the names that `evaluate` gives them."""
    found = {name.rpartition("_")[2]: value for name, value in record.items() if name.startswith("eval_")}
    return {name: found[name] for name in ("loss", *MEASURES)}
