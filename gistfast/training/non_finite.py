"""A step that leaves the numbers: its loss, its gradient or the weights after it are not finite.

The run stops before anything of such a step is logged, evaluated or saved, and names its rows.

The loss function waits for the device in each step, to look at the student's vectors. What is read right after it costs
no further wait: so a loss is looked at in its step, before the gradient is taken, and the length of the gradient with
the loss of the next step, or before its own step is logged, evaluated or saved.

Shapes: B rows, C columns, N distinct texts, D student width.
"""

import math
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gistfast.errors import TrainingError
from gistfast.store import GuideStore
from gistfast.training.run_folder import RunFolder

_ROWS_NAMED = 3
_CHARACTERS_OF_A_TEXT = 48


@dataclass(frozen=True)
class RowsOfStep:
    """What the numbers of a step come from.

    Attributes:
        when: The step, in words.
        store: Has the texts.
        rows: (B,) numbers of the rows.
    """

    when: str
    store: GuideStore
    rows: Tensor


class FiniteSteps:
    """Looks at the numbers of each step and refuses those that are not finite."""

    def __init__(self, run: RunFolder, *, bf16: bool = False) -> None:
        """Take what a message needs.

        Args:
            run: Has the checkpoints.
            bf16: Whether half precision may be the cause.
        """
        self._run = run
        self._bf16 = bf16
        self._last: RowsOfStep | None = None
        self._norm: Tensor | float = 0.0

    def take_loss(self, loss: Tensor, step: RowsOfStep) -> None:
        """Look at the loss of a step, and at the gradient of the step before.

        Raises:
            TrainingError: When one of them is not finite.
        """
        self.look()
        self._last = step
        if not math.isfinite(value := loss.item()):
            raise self._error(f"the loss is {value}", step)

    def take_norm(self, norm: Tensor | float) -> None:
        """Keep the length of a step's gradient for `look`, without waiting for it."""
        self._norm = norm

    def look(self, model: nn.Module | None = None) -> None:
        """Look at the gradient of the last step, and at the weights of a student that is to be saved.

        Raises:
            TrainingError: When one of them is not finite.
        """
        if self._last is None:
            return
        if not math.isfinite(norm := float(self._norm)):
            raise self._error(f"the length of the gradient is {norm}", self._last)
        if model is not None and (name := _not_finite(model)) is not None:
            raise self._error(f"{name} is not finite any more", self._last)

    def refuse_vectors(self, vectors: Tensor, places: Tensor, step: RowsOfStep) -> None:
        """Name the rows for which the student gives vectors without a direction, if there are any.

        Args:
            vectors: (N, D) of the student.
            places: (B, C) number of each cell's vector.
            step: Whose vectors they are.

        Raises:
            TrainingError: For these rows, or for the step before when its gradient was not finite.
        """
        self.look()
        lengths = vectors.detach().float().norm(dim=1)
        bad = ~((lengths > 0) & lengths.isfinite())
        if bad.any():
            what = "zero" if (lengths == 0).any() else "not finite"
            raise self._error(
                f"the student's vectors are {what}", replace(step, rows=step.rows[bad[places].any(dim=1)])
            )

    def _error(self, problem: str, step: RowsOfStep) -> TrainingError:
        less = "a lower --learning-rate" + (", or without --bf16" if self._bf16 else "")
        checkpoint = self._run.last_checkpoint()
        if checkpoint is None:
            advice = f"there is no checkpoint yet: try {less}, and a smaller --save-steps"
        else:
            advice = (
                f"the last good checkpoint is {checkpoint}: begin a new run there (--student {checkpoint}) with "
                f"{less}; --resume goes on from it with the same settings"
            )
        rows = name_rows(step.store, step.rows.cpu().numpy())
        return TrainingError(f"{step.when}: {problem}; {rows}; nothing of it is saved; {advice}")


def name_rows(store: GuideStore, rows: "np.ndarray[Any, Any]") -> str:
    """Some rows (B,) by number, with the beginnings of anchor and positive, and how many more there are."""
    shown = rows[:_ROWS_NAMED]
    texts = [shorten(text, _CHARACTERS_OF_A_TEXT, placeholder=" ...") for text in _pairs(store, shown)]
    named = [
        f"{row} ({anchor!r}, {positive!r})"
        for row, anchor, positive in zip(shown.tolist(), texts[::2], texts[1::2], strict=True)
    ]
    more = f" and {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(named)}{more} of {store.path}"


def _pairs(store: GuideStore, rows: "np.ndarray[Any, Any]") -> list[str]:
    """The texts of anchor and positive, row after row."""
    return store.texts.take(store.rows[rows][:, :2].reshape(-1))


def _not_finite(model: nn.Module) -> str | None:
    """The name of a trained weight that is not finite, if there is one; waits for the device once."""
    trained = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    finite = torch.stack([weight.isfinite().all() for weight in trained.values()]).tolist()
    return next((name for name, good in zip(trained, finite, strict=True) if not good), None)
