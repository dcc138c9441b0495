"""Errors that a user can meet; every message says what was found, what was expected and what to do.

GistfastError
├── ConfigError      a setting is unknown, out of range, or contradicts another
├── DataError        a source is missing or empty, a row is bad, columns are not found
├── DependencyError  an optional package is not installed
├── ModelError       a guide or student cannot be loaded, or gives unusable vectors
├── ShapeError       tensors given to the loss do not fit together
├── VectorError      a vector is zero or not finite
├── StoreError       a guide store is missing, unfinished, damaged, or made for something else
├── TrainingError    a training step cannot be taken: numbers that are not finite, too little memory
└── WorkerError      worker processes died, or a cluster cannot be reached
"""

import argparse
from typing import NoReturn


class GistfastError(Exception):
    """Anything that gistfast refuses, said in one line.

    Attributes:
        said_elsewhere: Whether the user hears it from another process of the run.
    """

    said_elsewhere = False


class ConfigError(GistfastError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(GistfastError):
    """A source of rows is missing or empty, a row is bad, or columns are not found."""


class DependencyError(GistfastError, ImportError):
    """An optional package is not installed."""


class ModelError(GistfastError):
    """A guide or student cannot be loaded, or gives unusable vectors."""


class ShapeError(GistfastError, ValueError):
    """Tensors given to the loss do not fit together."""


class VectorError(GistfastError, ValueError):
    """A vector is zero or not finite."""


class StoreError(GistfastError):
    """A guide store is missing, unfinished, damaged, or made for something else."""


class TrainingError(GistfastError):
    """A training step cannot be taken: its numbers are not finite, or memory does not suffice."""


class WorkerError(GistfastError):
    """Worker processes died, or a cluster cannot be reached."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind when it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class OneLineParser(argparse.ArgumentParser):
    """Reads the options of a benchmark; what it cannot read is refused in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2, saying what is wrong and where the options are listed."""
        self.exit(2, f"gistfast: {message}: `{self.prog} --help` lists what there is\n")
