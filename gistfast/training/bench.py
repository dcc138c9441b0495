"""A training step beside sentence-transformers': `python -m gistfast.training.bench`.

The student is all-MiniLM-L6-v2 without dropout, the rows are docstrings of installed packages, first line and text, cut
at 256 tokens. Every contender is a process; they take their steps in turn, on the same rows. A step is all that a
trainer's loop does. Memory is the most that the process has held.

Cases: "mixed" lengths at 64 and 256 rows, "equal" lengths, "large" batches by embedding twice, a "whole" run from its
start to the saved student, what a tolerance does to the "quality" of a student of three layers, and with --mpnet a
guide of 768 dimensions. Without that it takes some 40 minutes on two cores and 20 GB, most of them for the others'
steps; --quick is for development.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from gistfast.demo.models import demo_guide
from gistfast.errors import GistfastError, OneLineParser
from gistfast.training.bench_contenders import OURS, Task
from gistfast.training.bench_measure import Found, measure_runs, measure_steps
from gistfast.training.bench_quality import measure_quality, show_quality
from gistfast.training.bench_rows import make_store


@dataclass(frozen=True)
class Case:
    """Contenders that are measured side by side.

    Attributes:
        name: As the table calls it.
        batch_size: Rows of a step.
        contenders: Names of those who take part; the last one is compared with each of the others.
        steps: Steps measured of each.
        warm_up: Whether a step goes before that is not measured.
        num_rows: Rows of the store.
        max_length: Tokens of a text at most.
        equal: Whether all texts are as long as that.
        guide: "minilm" or "mpnet".
        whole: Whether what is measured is a run, from its start to the saved student, of as many steps.
        seeds: Runs of as many steps whose students are judged on held-out rows; 0 where time is measured.
    """

    name: str
    batch_size: int
    contenders: tuple[str, ...]
    steps: int
    warm_up: bool = True
    num_rows: int = 2048
    max_length: int = 256
    equal: bool = False
    guide: str = "minilm"
    whole: bool = False
    seeds: int = 0


# Of the rows, where students are judged.
_HOLDOUT = 0.1

_LIVE = ("mnrl", "gist", "cached gist", "gistfast")
_LARGE = ("cached gist", "gistfast cached", "gistfast unbiased 0.05", "gistfast tolerance 0.05")
_WAYS = ("gistfast padded", "gistfast compiled", "gistfast")
CASES = (
    Case("mixed-64", 64, _LIVE, steps=5),
    Case("mixed-256", 256, _LIVE, steps=2),
    Case("equal-64", 64, ("mnrl", "gistfast"), steps=5, num_rows=448, max_length=128, equal=True),
    Case("ways-64", 64, _WAYS, steps=5),
    Case("ways-short-64", 64, _WAYS, steps=5, max_length=32),
    Case("large-2048", 2048, _LARGE, steps=1, warm_up=False),
    Case("quality-2048", 2048, _LARGE[1:], steps=6, num_rows=9216, max_length=32, seeds=3),
    Case("whole-64", 64, ("mnrl", "gistfast"), steps=16, whole=True),
    Case("mpnet-64", 64, ("gist", "cached gist", "gistfast"), steps=3, num_rows=512, guide="mpnet"),
    Case("mpnet-256", 256, ("gist", "gistfast"), steps=1, num_rows=512, guide="mpnet"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each case; the exit code."""
    names = [case.name for case in CASES]
    parser = OneLineParser(
        prog="python -m gistfast.training.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="which (default: all)")
    parser.add_argument(
        "--rows", metavar="SOURCE", help="pairs to train on, as precompute reads them (default: docstrings)"
    )
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help="leave the others out")
    parser.add_argument("--steps", type=int, help="steps measured of each contender")
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows, 64 tokens: for development")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--mpnet", type=Path, help="folder of all-mpnet-base-v2, for the cases with it")
    parser.add_argument("--folder", type=Path, help="keep the stores here for the next run")
    parser.add_argument("--json", type=Path, help="append what is found to this file, a line for each contender")
    options = parser.parse_args(argv)
    guides = {"minilm": demo_guide()} | ({"mpnet": options.mpnet} if options.mpnet else {})
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for case in _chosen(options, guides):
            try:
                _run(case, guides[case.guide], options.folder or Path(temporary), options)
            except GistfastError as error:
                print(f"\n{case.name}: {error}", flush=True)
                failed = True
    return int(failed)


def _run(case: Case, guide: Path, folder: Path, options: argparse.Namespace) -> None:
    """Measure a case and print its table.

    Raises:
        GistfastError: When a contender fails.
    """
    store = make_store(
        folder,
        case.guide,
        guide,
        case.num_rows,
        source=options.rows,
        equal_length=case.max_length if case.equal else None,
        holdout=_HOLDOUT if case.seeds else 0.0,
    )
    lengths = f"of {case.max_length} tokens each" if case.equal else f"of up to {case.max_length} tokens"
    title = f"{case.name}: {case.batch_size} rows, texts {lengths}, guide {case.guide}"
    if case.seeds:
        sizes = {"batch_size": case.batch_size, "num_steps": case.steps, "max_length": case.max_length}
        qualities = measure_quality(
            case.contenders, store, demo_guide(), num_seeds=case.seeds, threads=options.threads, **sizes
        )
        print(f"\n{title}, {case.steps} steps\n")
        show_quality(qualities)
        return
    with tempfile.TemporaryDirectory() as work:
        tasks = [
            Task(name, store, demo_guide(), guide, case.batch_size, case.max_length, options.threads, Path(work, name))
            for name in case.contenders
        ]
        found = (
            measure_runs(tasks, case.steps) if case.whole else measure_steps(tasks, case.steps, warm_up=case.warm_up)
        )
    print(f"\n{title}\n")
    _show(case, found)
    if options.json:
        _append(options.json, case, found, options.threads)


def _chosen(options: argparse.Namespace, guides: dict[str, Path]) -> Iterator[Case]:
    """The cases that are asked for, as far as their guides are there."""
    for case in CASES:
        wanted = tuple(name for name in case.contenders if not options.only or name in options.only)
        if case.name not in options.cases or case.guide not in guides or not wanted:
            continue
        if options.quick:
            case = replace(case, batch_size=case.batch_size // 4, num_rows=case.num_rows // 4, max_length=64)
        yield replace(case, contenders=wanted, steps=options.steps or case.steps)


def _show(case: Case, found: dict[str, Found]) -> None:
    """A table in Markdown."""
    last = case.contenders[-1]
    what = f"run of {case.steps} steps" if case.whole else "step"
    print(f"| trainer | {what}, s | 20 % to 80 % | {last} takes | in CPU time | other than model and loss | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for name, values in found.items():
        low, median, high = np.percentile(values.seconds, [20, 50, 80])
        ratio, cpu_ratio = (
            np.median(np.divide(getattr(found[last], what), getattr(values, what))) for what in ("seconds", "cpu_s")
        )
        share = np.median(np.divide(values.other_s, values.seconds))
        cells = [f"{median:.2f}", f"{low:.2f} to {high:.2f}", f"{ratio:.2f}x", f"{cpu_ratio:.2f}x"]
        cells += [f"{share:.1%}" if name in OURS and not case.whole else "", f"{values.peak_mib:,.0f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    sys.stdout.flush()


def _append(path: Path, case: Case, found: dict[str, Found], threads: int) -> None:
    machine = {"date": str(date.today()), "machine": platform.machine(), "threads": threads}
    with path.open("a", encoding="utf-8") as file:
        for name, values in found.items():
            file.write(json.dumps({**machine, **vars(case), "contender": name, **vars(values)}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
