"""What watches a training run: the log file, trackers, the progress bar, and Ctrl-C."""

import json
import logging
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from gistfast.errors import DependencyError
from gistfast.progress import Bar, progress
from gistfast.training.pace import in_words
from gistfast.training.ranks import Ranks
from gistfast.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

# Of a terminal, and of torchrun and cluster schedulers that end a run.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_TRACKER_PACKAGES = {"tensorboard": "gistfast[trackers]", "wandb": "wandb", "trackio": "trackio"}


def choose_trackers(names: Sequence[str] | None) -> tuple[str, ...]:
    """The trackers to use: the named ones, or TensorBoard where it is installed when None.

    Raises:
        DependencyError: When a named tracker is not installed.
    """
    if names is None:
        if find_spec("tensorboard") is not None:
            return ("tensorboard",)
        logger.info("TensorBoard is not installed: metrics.jsonl is the only log (`pip install gistfast[trackers]`)")
        return ()
    for name in names:
        if find_spec(name) is None:
            raise DependencyError(f"--trackers {name}: not installed: run `pip install {_TRACKER_PACKAGES[name]}`")
    return tuple(names)


def tensorboard_callback(folder: Path, first_step: int) -> TrainerCallback:
    """A writer of TensorBoard's files; records after `first_step`, left by a killed run, are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(folder), purge_step=first_step + 1)
    callback: TrainerCallback = TensorBoardCallback(writer)  # type: ignore[no-untyped-call]  # theirs is untyped
    return callback


class MetricsFile(TrainerCallback):
    """Writes each record of the log as a line of JSON.

    The trainer's own history is written first, so a resumed run continues the file at its checkpoint,
    whatever the killed run wrote after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the file with what the trainer remembers."""
        if state.is_world_process_zero:
            self.path.write_text("".join(map(_line, state.log_history)), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append the latest record."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


class RemoveSetAside(TrainerCallback):
    """Removes what the run replaces as soon as it has taken a step."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove it."""
        if state.is_world_process_zero:
            self.run.set_aside.remove()


class StepProgress(TrainerCallback):
    """Shows the steps as they go by, with the latest record of the log; used as a context."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar over the steps that are left."""
        if state.is_world_process_zero:
            steps_left = state.max_steps - state.global_step
            self._bar = self._stack.enter_context(progress("training", total=steps_left, unit="steps"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.advance()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the record beside the bar."""
        if self._bar is not None and logs is not None and "loss" in logs:
            self._bar.advance(0, note=in_words(logs))


class StopOnInterrupt(TrainerCallback):
    """Turns the first Ctrl-C, or SIGTERM, into a checkpoint after the step, the second into an interrupt; a context.

    Of several processes all stop after the same step, whichever was asked to.

    Attributes:
        stopped: Whether the run was stopped before its end.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.stopped = False
        self._ranks = ranks
        self._asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Signals can be handled in the main thread alone; elsewhere Ctrl-C is the caller's affair.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in _STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            # None was not set by Python, which cannot set it again.
            if previous is not None:
                signal.signal(number, previous)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        logger.info("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop when asked to."""
        if self._ranks.any(self._asked):
            self.stopped = state.global_step < state.max_steps
            control.should_save = True
            control.should_training_stop = True
