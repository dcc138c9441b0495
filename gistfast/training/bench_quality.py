"""What a way to train does to the student: the same steps from several seeds, judged on held-out rows."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gistfast.stages.train import train
from gistfast.training.bench_contenders import OURS

# Layers of the student that is trained: a small one moves in few steps.
_LAYERS = (0, 1, 2)
_LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Quality:
    """What came of one contender's runs.

    Attributes:
        ndcg: nDCG@10 on the held-out rows after each run.
        seconds: Of each run.
    """

    ndcg: list[float]
    seconds: list[float]


def measure_quality(
    contenders: Sequence[str],
    store: Path,
    student: Path,
    *,
    batch_size: int,
    num_steps: int,
    max_length: int,
    num_seeds: int,
    threads: int,
) -> dict[str, Quality]:
    """What the contenders' runs come to, by the contenders' names.

    Args:
        contenders: Names of `OURS`.
        store: Guide store with held-out rows.
        student: Folder of the student; its first three layers are trained, without dropout.
        batch_size: Rows of a step.
        num_steps: Of each run.
        max_length: Tokens of a text at most.
        num_seeds: Runs of each contender; the seed decides the order of the rows.
        threads: Of PyTorch.
    """
    torch.set_num_threads(threads)
    options: dict[str, Any] = {"batch_size": batch_size, "max_steps": num_steps, "max_length": max_length}
    options |= {"keep_layers": _LAYERS, "learning_rate": _LEARNING_RATE, "dropout": 0.0, "eval_steps": num_steps}
    options |= {"save_steps": 0, "trackers": (), "picture": False, "device": "cpu"}
    found = {}
    for name in contenders:
        reports = []
        for seed in range(num_seeds):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "student")
                reports.append(train(store, student=student, out=out, seed=seed, **options | OURS[name]))
        ndcg = [report.evaluation["ndcg@10"] for report in reports]
        found[name] = Quality(ndcg, [report.elapsed_s for report in reports])
    return found


def show_quality(found: Mapping[str, Quality]) -> None:
    """A table in Markdown."""
    print("| trainer | nDCG@10 of each seed | mean | seconds of a run |\n|---|---|---|---|")
    for name, quality in found.items():
        each = ", ".join(f"{value:.4f}" for value in quality.ndcg)
        print(f"| {name} | {each} | {np.mean(quality.ndcg):.4f} | {np.median(quality.seconds):.0f} |", flush=True)
