"""How fast a run goes: what its steps take, what of it they wait for batches, and the memory that is held."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gistfast.process_memory import peak_mib


class Pace(TrainerCallback):
    """The clock of the steps: from the moment one asks for its batch to its end.

    What lies between steps, evaluations and checkpoints, is not counted. On a GPU the end of a step does not wait for
    the device; the loss does, in each step, so that the mean over several is right.
    """

    def __init__(self) -> None:
        """Begin with no step."""
        self._begun_s = 0.0
        self._steps = 0
        self._elapsed_s = 0.0
        self._waited_s = 0.0

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """A step begins, and waits for its batch as long as the context lasts."""
        self._begun_s = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - self._begun_s

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step ends."""
        self._elapsed_s += time.perf_counter() - self._begun_s
        self._steps += 1

    def take(self, counts: Mapping[str, float], device: torch.device) -> dict[str, float]:
        """The pace since it was last taken, for the log.

        "step_ms" and of it "data_wait_ms", "tokens_per_s", "pairs_per_s", and "peak_mib": on a GPU what was allocated
        there at its highest, else this process.

        Args:
            counts: Mean "tokens" and "rows" of the steps; each row is a pair of an anchor and a positive.
            device: Of the student.
        """
        step_s, wait_s = self._elapsed_s / self._steps, self._waited_s / self._steps
        self._steps, self._elapsed_s, self._waited_s = 0, 0.0, 0.0
        return {
            "step_ms": round(1000 * step_s, 3),
            "data_wait_ms": round(1000 * wait_s, 3),
            "tokens_per_s": round(counts["tokens"] / step_s, 1),
            "pairs_per_s": round(counts["rows"] / step_s, 1),
            "peak_mib": round(peak_mib(device), 1),
        }


def in_words(record: Mapping[str, float]) -> str:
    """A record of the log as it stands beside the bar."""
    parts = [
        f"loss {record['loss']:.4f}",
        f"{record.get('dropped/ap', 0.0):.1%} dropped",
        f"scores {record['score/positive']:.2f} own",
        f"{record['score/hardest']:.2f} hardest" if "score/hardest" in record else "no candidate",
        f"{record['padding']:.1%} padding",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        f"{record['pairs_per_s']:,.0f} pairs/s",
        f"{record['data_wait_ms'] / record['step_ms']:.1%} waiting for data",
        f"{record['peak_mib']:,.0f} MiB",
    ]
    return ", ".join(parts)
