"""What the environment says of the processes that torchrun started; nothing heavy is imported here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from gistfast.errors import GistfastError


def rank() -> int:
    """The number of this process among those of the run; 0 where there is no other."""
    # Clusters set RANK for other ends, too; LOCAL_RANK is torchrun's.
    return int(os.environ.get("RANK", "0")) if "LOCAL_RANK" in os.environ else 0


@contextmanager
def alike() -> Iterator[None]:
    """What is refused in this context each process of a machine refuses: the first of them says so."""
    try:
        yield
    except GistfastError as error:
        error.said_elsewhere = int(os.environ.get("LOCAL_RANK", "0")) > 0
        raise
