"""Scores of a model's vectors as they are, and cut to smaller widths."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.model import BaseModel

# Between the name of a score and the width.
AT = "_at/"


class AtWidths(BaseEvaluator):
    """An evaluator at several widths; texts are embedded once.

    The scores of whole vectors keep their names, those of vectors cut to a width have "_at/WIDTH" behind them.
    """

    def __init__(self, evaluator: BaseEvaluator, widths: Sequence[int]) -> None:
        """Take the evaluator, which embeds texts by `embed_inputs` as sentence-transformers' do, and the widths."""
        super().__init__()  # type: ignore[no-untyped-call]  # theirs is untyped
        self._remembered: dict[Any, Any] = {}
        self._whole = self._cut(evaluator, None)
        self._by_width = {width: self._cut(evaluator, width) for width in widths}

    def _cut(self, evaluator: Any, width: int | None) -> Any:
        other = copy(evaluator)
        # For the model's card; the vectors come cut.
        other.truncate_dim = width
        other.embed_inputs = partial(_remembered, self._remembered, evaluator.embed_inputs, width)
        return other

    def __call__(
        self, model: BaseModel, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The scores by their names."""
        try:
            found: dict[str, float] = dict(self._whole(model, output_path, epoch, steps))
            for width, evaluator in self._by_width.items():
                scores = evaluator(model, output_path, epoch, steps)
                found |= {f"{name}{AT}{width}": score for name, score in scores.items()}
        finally:
            self._remembered.clear()
        return found


def _remembered(
    known: dict[Any, Any],
    embed: Callable[..., Any],
    width: int | None,
    model: BaseModel,
    texts: Sequence[str],
    *arguments: Any,
    **options: Any,
) -> Any:
    """The vectors of the texts, cut to a width; those of texts that were asked for before are known."""
    key = (tuple(texts), arguments, tuple(sorted(options.items())))
    if key not in known:
        known[key] = embed(model, texts, *arguments, **options)
    return known[key][:, :width]
