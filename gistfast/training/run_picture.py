"""What a training run was like, drawn from its log: loss, dropped candidates, scores, evaluations against the steps."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gistfast.errors import DataError, DependencyError
from gistfast.evaluation.report import RETRIEVAL, SPEARMAN
from gistfast.evaluation.widths import AT
from gistfast.training.report import values_of_parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]
Line = tuple[Sequence[float], Sequence[float]]

_BLOCKS = {"ap": "anchor-positive", "aa": "anchor-anchor", "pp": "positive-positive", "an": "anchor-negative"}
_DROPPED = "candidates dropped"
_COLOURS = ("#e8590c", "#343a40", "#4c6ef5", "#2b8a3e", "#9c36b5")
_PANELS_IN_A_ROW = 4
# More points than these are drawn as the means of so many groups of neighbours.
_MOST_POINTS = 400
# Points that a smoothed line looks back on, as a share of all.
_SMOOTHING = 0.02


def draw_run(metrics: Path, picture: Path) -> Path:
    """Draw the log of a run, complete or not; returns the PNG's path.

    Args:
        metrics: The log, as JSON lines.
        picture: Where to.

    Raises:
        DataError: When the log has no step yet.
        DependencyError: When matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError("pictures need matplotlib: run `pip install gistfast[plot]`") from None
    records = _read(metrics)
    panels = {title: lines for title, lines in _panels(records).items() if lines}
    if not panels:
        raise DataError(f"{metrics} has no step to draw: let the run take some")
    columns = min(len(panels), _PANELS_IN_A_ROW)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), layout="constrained")
    for number, (title, lines) in enumerate(panels.items(), start=1):
        _draw(figure.add_subplot(rows, columns, number), title, lines)
    figure.savefig(picture, dpi=150)
    return picture


def _read(metrics: Path) -> Records:
    if not metrics.is_file():
        raise DataError(f"{metrics} is not there: give the folder of a training run")
    # The last line of a run that was killed may have no end.
    lines = [line for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in lines]


def _panels(records: Records) -> dict[str, dict[str, Line]]:
    """The lines of each panel by their names."""
    measures = {name: f"_{key}" for key, name in RETRIEVAL.items()}
    return {
        "loss": _lines(records, {"training": "loss", "held-out rows": "eval_loss"}),
        _DROPPED: _lines(records, {name: f"dropped/{block}" for block, name in _BLOCKS.items()}),
        "student's scores": _lines(records, {"own positive": "score/positive", "hardest candidate": "score/hardest"}),
        "evaluation on held-out rows": _lines(records, measures),
        "similarity of scored pairs": _lines(records, {"Spearman": f"_{SPEARMAN}"}),
        "temperature": _lines(records, {"temperature": "temperature"}),
        "loss at each width": _lines_of_parts(records, "loss_at"),
        "nDCG@10 of cut vectors": _lines_of_parts(records, f"_ndcg@10{AT.rstrip('/')}"),
        "loss of each store": _lines_of_parts(records, "loss"),
        "nDCG@10 of each store": _lines_of_parts(records, "_ndcg@10"),
    }


def _lines(records: Records, endings: Mapping[str, str]) -> dict[str, Line]:
    """For each name the records that have a key, or a longer one that ends so, if any."""
    found: dict[str, Line] = {}
    for name, ending in endings.items():
        points = [
            (record["step"], value)
            for record in records
            for key, value in record.items()
            if key == ending or (ending.startswith("_") and key.startswith("eval_") and key.endswith(ending))
        ]
        if points:
            steps, values = zip(*points, strict=True)
            found[name] = (steps, values)
    return found


def _lines_of_parts(records: Records, measure: str) -> dict[str, Line]:
    """The values of a measure by what stands behind the slash, names of stores or widths, where there are several."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in values_of_parts(record, measure).items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(value)
    return dict(found)


def _draw(axes: "Axes", title: str, lines: Mapping[str, Line]) -> None:
    for colour, (name, (all_steps, all_values)) in zip(_COLOURS, lines.items(), strict=False):
        steps, values = _thinned(all_steps), _thinned(all_values)
        window = int(len(values) * _SMOOTHING)
        if window > 1:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = _smooth(values, window)
        axes.plot(steps, values, "o-" if len(values) < 30 else "-", color=colour, label=name, markersize=3)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if title == _DROPPED:
        axes.yaxis.set_major_formatter("{x:.1%}")
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)


def _thinned(values: Sequence[float]) -> list[float]:
    """The values, or the means of groups of neighbours where there are too many."""
    count = min(len(values), _MOST_POINTS)
    bounds = [len(values) * number // count for number in range(count + 1)]
    return [sum(values[first:end]) / (end - first) for first, end in pairwise(bounds)]


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` at most."""
    groups = (values[max(end - window, 0) : end] for end in range(1, len(values) + 1))
    return [sum(group) / len(group) for group in groups]
