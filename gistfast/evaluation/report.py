"""Results as people read them: tables on the terminal, a picture in a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gistfast.errors import DependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Keys of an evaluation's retrieval section, and how a table calls them.
RETRIEVAL = {
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "recall@1": "recall@1",
    "recall@10": "recall@10",
    "recall@100": "recall@100",
}
# How sentence-transformers' evaluator calls the correlation with scored pairs.
SPEARMAN = "spearman_cosine"
# From pale to dark, told apart in print too.
COLOURS = ("#b6c2cf", "#e8590c", "#343a40")


@dataclass(frozen=True)
class Panel:
    """One table, or one group of bars: `rows[model][measure]`, written with `form`."""

    title: str
    rows: Mapping[str, Mapping[str, float]]
    form: str = ".3f"

    @property
    def measures(self) -> list[str]:
        """All measures, in the order in which they first occur."""
        return list(dict.fromkeys(measure for values in self.rows.values() for measure in values))


def scores_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The scores of one evaluation, named as a table names its columns."""
    retrieval = results.get("retrieval", {})
    scores: dict[str, float] = {name: retrieval[key] for key, name in RETRIEVAL.items() if key in retrieval}
    if "sts" in results:
        scores["Spearman"] = results["sts"]["spearman"]
    scores.update(results.get("mteb", {}))
    return scores


def print_panels(panels: Sequence[Panel]) -> None:
    """Print each panel as a table on stdout: one row a model, one column a measure."""
    console = Console()
    for panel in panels:
        table = Table(title=panel.title, title_justify="left", box=SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        for measure in panel.measures:
            table.add_column(measure, justify="right")
        for model, values in panel.rows.items():
            cells = (format(values[name], panel.form) if name in values else "" for name in panel.measures)
            table.add_row(model, *cells)
        console.print(table)


def print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Print a table of names and values on stdout."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    # Paths and texts of a store are data: no markup, no emoji codes.
    for name, value in facts:
        table.add_row(name, Text(value))
    Console(highlight=False).print(table)


def draw_panels(path: Path, panels: Sequence[Panel]) -> Path:
    """Draw the panels side by side, one bar for each value; returns the PNG's path.

    Raises:
        DependencyError: When matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError("pictures need matplotlib: run `pip install gistfast[plot]`") from None
    widths = [1.5 + 0.4 * len(panel.measures) * (1 + len(panel.rows)) for panel in panels]
    figure = Figure(figsize=(sum(widths), 4.0), layout="constrained")
    all_axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, panel)
    figure.savefig(path, dpi=150)
    return path


def _draw(axes: "Axes", panel: Panel) -> None:
    measures = panel.measures
    width = 0.8 / len(panel.rows)
    axes.set_prop_cycle(color=COLOURS if len(panel.rows) > 1 else COLOURS[-1:])
    for place, (model, values) in enumerate(panel.rows.items()):
        middles = [group + (place + 0.5) * width for group in range(len(measures))]
        heights = [values.get(measure, 0.0) for measure in measures]
        bars = axes.bar(middles, heights, width * 0.94, label=model)
        axes.bar_label(bars, [format(height, panel.form) for height in heights], fontsize=8, padding=2)
    axes.set_xticks([group + 0.4 for group in range(len(measures))], measures, fontsize=9)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.margins(y=0.2)
    axes.set_title(panel.title, loc="left", fontsize=10)
    if len(panel.rows) > 1:
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=len(panel.rows))
