"""The processes of a training run: which is the first, and how they agree.

torchrun starts them. Each trains on rows of its own. What all of them have to know alike, that a check failed or that
Ctrl-C was pressed, travels beside the gradients and waits for no GPU. The first alone writes files.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from gistfast.errors import ConfigError, GistfastError, WorkerError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The trainer's own, for what the processes compute together.
_STEP_LIMIT = timedelta(minutes=30)
# Tokenising a store may take any time, and the others wait for it.
_WAIT_LIMIT = timedelta(days=30)

# How gloo says that a process at the other end is not there any more.
_GONE = ("Connection closed by peer", "Connection reset by peer")

# Of what sentence-transformers calls, which the user cannot change.
_THEIR_WARNINGS = ("`broadcast_buffers` is deprecated", r"torch\.distributed\.nn\.functional\.all_gather is deprecated")


class Ranks:
    """The processes of a run; without a group this process alone.

    Attributes:
        count: How many there are.
        own: Number of this process.
    """

    def __init__(self, group: Any = None) -> None:
        """Take the group in which they agree; `join` makes it."""
        self._group = group
        self.count = 1 if group is None else distributed.get_world_size(group)
        self.own = 0 if group is None else distributed.get_rank(group)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.own == 0

    def gather(self, value: T) -> list[T]:
        """What each process gives, in their order."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value, self._group)
        return values

    def any(self, asked: bool) -> bool:
        """Whether one process asks."""
        if self.count == 1:
            return asked
        flag = torch.tensor([int(asked)])
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group)
        return bool(flag)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end of the context for the others; what one process refuses in it all of them refuse.

        Raises:
            GistfastError: That of the first process that has one.
        """
        error = None
        try:
            yield
        except GistfastError as caught:
            error = caught
        found = self.gather(error)
        number = next((number for number, other in enumerate(found) if other is not None), None)
        if number is None:
            return
        shared = error if number == self.own and error is not None else found[number]
        assert shared is not None
        shared.said_elsewhere = not self.first
        raise shared

    def in_turn(self, act: Callable[[], T]) -> T:
        """What `act` returns, which the others call after the first one: they find what it wrote.

        Raises:
            GistfastError: That of the first process that has one.
        """
        results = []
        for mine in (self.first, not self.first):
            with self.together():
                if mine:
                    results.append(act())
        return results[0]


def join(device: str) -> Ranks:
    """The processes of the run that torchrun, if anything, started this one for; waits for all of them.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ConfigError: When there are more processes than GPUs.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device != "cpu" and here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} processes on this machine, and {torch.cuda.device_count()} GPUs: start one for each GPU, "
            "or give --device cpu"
        )
    # The trainer asks the same, and finds the same processes.
    if PartialState(cpu=device == "cpu", timeout=_STEP_LIMIT).num_processes == 1:
        if device != "cpu" and (gpus := torch.cuda.device_count()) > 1:
            command = f"torchrun --nproc-per-node {gpus} -m gistfast train"
            logger.info("training on one of %d GPUs; `%s` uses all of them", gpus, command)
        return Ranks()
    return Ranks(distributed.new_group(backend="gloo", timeout=_WAIT_LIMIT))


def leave() -> None:
    """End the group of the processes; NCCL warns of one that is left to the end of the process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def left_in_one_line() -> Iterator[None]:
    """Let the process that failed, and torchrun, say why the run ends, and not those that wait for it.

    Raises:
        WorkerError: When another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _GONE):
            raise
        gone = WorkerError("another process of the run has ended")
        gone.said_elsewhere = True
        raise gone from error


@contextmanager
def without_their_warnings() -> Iterator[None]:
    """Keep quiet about what other libraries should call by another name."""
    with warnings.catch_warnings():
        for message in _THEIR_WARNINGS:
            warnings.filterwarnings("ignore", message, FutureWarning)
        yield
