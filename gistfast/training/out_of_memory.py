"""Too little memory for a step, said in one line: which passes were too large, and what to try."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch

from gistfast.errors import TrainingError
from gistfast.training.collate import MixedCollator
from gistfast.training.run_folder import RunFolder
from gistfast.training.trainer import GuidedTrainer

# What PyTorch says in a plain RuntimeError.
_SIGNS = ("DefaultCPUAllocator", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ASKED_FOR = re.compile(r"(?:tried to|unable to) allocate (\d[\d.]* \w+)", re.IGNORECASE)


@contextmanager
def memory_errors_in_one_line(trainer: GuidedTrainer, run: RunFolder | None, *, recomputes: bool) -> Iterator[None]:
    """Turn what is raised where memory ran out into one line; everything else passes.

    Args:
        trainer: Says which step it is and how its texts are embedded.
        run: Has the checkpoints; None where there is nothing to go on with.
        recomputes: Whether the student recomputes its activations already.

    Raises:
        TrainingError: In place of the error of PyTorch or Python.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        asked_for = _ASKED_FOR.search(str(error))
        what = f"out of memory ({asked_for[1]} asked for)" if asked_for else "out of memory"
        step = trainer.state.global_step
        if trainer.evaluating:
            raise TrainingError(
                f"evaluation after step {step}: {what}: hold fewer rows out of the store, or leave --eval-steps out "
                "and use `gistfast evaluate` afterwards"
            ) from error
        raise TrainingError(f"step {step + 1}: {what} {_advice(trainer, run, recomputes)}") from error


def _ran_out(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in _SIGNS)


def _advice(trainer: GuidedTrainer, run: RunFolder | None, recomputes: bool) -> str:
    """How the texts are embedded, and which settings need less memory; a resumed run may have all but the batch."""
    budget = cast(MixedCollator, trainer.data_collator).of_stores[0].passes.budget
    checkpoint = None if run is None else run.last_checkpoint()
    if not budget:
        where = "" if checkpoint is None else f", which may begin where this one stood (--student {checkpoint})"
        return f"with all texts of a batch in one pass: try a smaller --batch-size in a new run{where}"
    ways = [f"--tokens-per-forward {max(budget // 2, 1)}"]
    if trainer.replay is None:
        ways.append("--cached, which keeps the activations of one pass in place of all")
    if not recomputes:
        ways.append("--gradient-checkpointing")
    advice = f"with --tokens-per-forward {budget}: try {', and '.join(ways)}"
    if run is None:
        return advice
    where = "begins anew: there is no checkpoint yet" if checkpoint is None else f"goes on from {checkpoint}"
    return f"{advice}; --resume {where}"
