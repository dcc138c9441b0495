"""The contenders of `gistfast.training.bench` at work: what their steps and runs take."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from gistfast.errors import GistfastError
from gistfast.training.bench_contenders import Task, run_whole, serve

# What processes get from the system when it has no memory left.
_KILLED = -9


@dataclass(frozen=True)
class Found:
    """What was measured of one contender.

    Attributes:
        seconds: Of each step.
        cpu_s: Of the processor in each step, on all threads: less moved by what else runs on the machine.
        other_s: Of each step, outside forward, backward and optimizer.
        peak_mib: Memory of the process at its highest.
    """

    seconds: list[float]
    cpu_s: list[float]
    other_s: list[float]
    peak_mib: float


@dataclass(frozen=True)
class _Contender:
    """A process, and the way to talk to it."""

    name: str
    process: BaseProcess
    pipe: Connection

    def receive(self) -> Any:
        """What the process sends next.

        Raises:
            GistfastError: When it ends instead.
        """
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
        killed = self.process.exitcode == _KILLED
        why = "was killed, most likely for want of memory" if killed else "failed, see above"
        raise GistfastError(f"{self.name} {why}: leave it out with --only, or make room")


@contextmanager
def _contender(task: Task, target: Callable[..., None], *arguments: Any) -> Iterator[_Contender]:
    """A process that runs `target`, told to stop in the end."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=target, args=(other, task, *arguments), daemon=True)
    process.start()
    other.close()
    try:
        yield _Contender(task.contender, process, pipe)
    finally:
        # One that has ended is told nothing.
        with suppress(BrokenPipeError, ConnectionResetError):
            pipe.send(False)
        process.join()


def measure_steps(tasks: Sequence[Task], num_steps: int, *, warm_up: bool) -> dict[str, Found]:
    """What the contenders' steps took, one after the other in turn, by the contenders' names.

    Args:
        tasks: Of the contenders.
        num_steps: Measured of each.
        warm_up: Whether a step goes before that is not measured.

    Raises:
        GistfastError: When a contender fails.
    """
    received: dict[str, list[tuple[float, float, float, float]]] = {task.contender: [] for task in tasks}
    with ExitStack() as stack:
        contenders = [stack.enter_context(_contender(task, serve)) for task in tasks]
        for contender in contenders:
            contender.receive()
        for number in range(num_steps + warm_up):
            for contender in contenders:
                contender.pipe.send(True)
                took = contender.receive()
                if number >= warm_up:
                    received[contender.name].append(took)
    return {name: _found(steps) for name, steps in received.items()}


def measure_runs(tasks: Sequence[Task], num_steps: int) -> dict[str, Found]:
    """What the contenders' runs of some steps took, one after the other, by the contenders' names.

    Raises:
        GistfastError: When a contender fails.
    """
    found = {}
    for task in tasks:
        begun_s = time.perf_counter()
        with _contender(task, run_whole, num_steps) as contender:
            cpu_s, peak = contender.receive()
            contender.process.join()
            found[task.contender] = Found([time.perf_counter() - begun_s], [cpu_s], [0.0], peak)
    return found


def _found(steps: Sequence[tuple[float, float, float, float]]) -> Found:
    seconds, cpu_s, other_s, peaks = (list(values) for values in zip(*steps, strict=True))
    return Found(seconds, cpu_s, other_s, max(peaks))
