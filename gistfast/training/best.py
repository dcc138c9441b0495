"""Which evaluation of a run was the best, and when to wait no longer for a better one.

Students are compared by nDCG@10 on held-out rows, or where there are none by Spearman's correlation on scored pairs.
All follows from the log of the run, which the checkpoints hold: a resumed run decides as an undisturbed one.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gistfast.evaluation.report import SPEARMAN
from gistfast.evaluation.retrieval import HELD_OUT
from gistfast.evaluation.similarity import STS

logger = logging.getLogger(__name__)

History = Sequence[Mapping[str, Any]]

_NDCG = "ndcg@10"


def score_name(model: SentenceTransformer, *, held_out: bool) -> str:
    """What the trainer's log calls the score by which students are compared; of several stores it is the mean.

    Args:
        model: The student.
        held_out: Whether there are held-out rows.
    """
    return f"eval_{HELD_OUT}_{model.similarity_fn_name}_{_NDCG}" if held_out else f"eval_{STS}_{SPEARMAN}"


def best_step(history: History) -> int | None:
    """The step after which the evaluation was the best, of several the first; None before there is one.

    The student as it was before the first step does not count.
    """
    scores = _scores(history)
    return max(scores, key=lambda step: scores[step]) if scores else None


def out_of_patience(history: History, patience: int | None) -> bool:
    """Whether the last `patience` evaluations were no better than one before."""
    best = best_step(history)
    return patience is not None and best is not None and sum(step > best for step in _scores(history)) >= patience


def _scores(history: History) -> dict[int, float]:
    """Score by step, ascending."""
    return _scores_by(_NDCG, history) or _scores_by(SPEARMAN, history)


def _scores_by(measure: str, history: History) -> dict[int, float]:
    return {
        record["step"]: value
        for record in history
        for name, value in record.items()
        if record["step"] and name.startswith("eval_") and name.endswith(f"_{measure}") and "/" not in name
    }


class KeepBest(TrainerCallback):
    """Saves a checkpoint of each student that is better than all before, and stops where none comes any more."""

    def __init__(self, patience: int | None = None) -> None:
        """Stop after `patience` evaluations without a better student; never when None."""
        self.patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save, or stop, or neither."""
        best = best_step(state.log_history)
        if best == state.global_step:
            control.should_save = True
        elif out_of_patience(state.log_history, self.patience):
            logger.info("stopping: no evaluation was better than that of step %d in the last %d", best, self.patience)
            control.should_training_stop = True
