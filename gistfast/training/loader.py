"""The loader of a run's batches, and the processes that prepare them.

Such a process is no copy of the training process, which has threads of PyTorch's: a copy takes over the locks that they
hold at that moment, and CPython 3.11 may wait for one forever. A server without threads makes them instead; rows,
stores and tokens reach them as paths.
"""

import multiprocessing
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any, cast

from torch.utils.data import DataLoader

from gistfast.errors import GistfastError, WorkerError
from gistfast.training.collate import MixedCollator, MixedRows

_SERVER_IMPORTS = "gistfast.training.loader_server"

# How PyTorch says that a process could not prepare a batch, and that it is not there any more.
_CAUGHT = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.")
_GONE = re.compile(r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed by signal)")


def loader_of(
    rows: MixedRows, batch_sampler: Any, collate: MixedCollator, *, workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """A loader of batches.

    Args:
        rows: Of a split.
        batch_sampler: Gives places in the rows, batch by batch.
        collate: Makes a batch of the rows.
        workers: Processes that prepare batches; 0 to prepare them in this one.
        pin_memory: Whether a batch is put where a GPU can fetch it by itself.
    """
    return DataLoader(
        rows,
        batch_sampler=batch_sampler,
        collate_fn=cast(Any, collate),
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=_copies_of_a_server() if workers else None,
        worker_init_fn=_begin_worker,
    )


@contextmanager
def worker_errors_in_one_line() -> Iterator[None]:
    """Raise what a process that prepares batches refused as it was raised there, without that process's traceback.

    Raises:
        GistfastError: What was refused.
        WorkerError: When a process was killed.
    """
    try:
        yield
    except GistfastError as error:
        if not (caught := _CAUGHT.match(str(error))):
            raise
        raise type(error)(str(error).rpartition(f"{caught[1]}: ")[2].strip()) from error
    except RuntimeError as error:
        if not _GONE.match(str(error)):
            raise
        raise WorkerError(
            "a process that prepares batches has ended; it said why, or memory was short: "
            "the same command with --resume goes on from the last checkpoint, and --workers 0 does without them"
        ) from error


def _copies_of_a_server() -> BaseContext:
    """Makes processes by copying one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_SERVER_IMPORTS])
    return context


def _begin_worker(worker: int) -> None:
    """Tie a process that prepares batches to the life of the training process, and not to signals to its group."""
    # A server of the user's own did not do so.
    os.setpgrp()
    # PyTorch looks whether the parent lives, which is the server; and the server waits for its last child.
    threading.Thread(target=_end_with_training, daemon=True).start()


def _end_with_training() -> None:
    training = multiprocessing.parent_process()
    assert training is not None
    training.join()
    os._exit(1)
