"""Vectors to directions: of length 1, or refused by the text whose vector has none.

# N texts, G guide width
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from gistfast.errors import VectorError

T = TypeVar("T")
Array = np.ndarray[Any, Any]
Vectors = np.ndarray[Any, np.dtype[np.float32]]


def unit_vectors(vectors: Vectors, of: Sequence[T] | Array, name_of: Callable[[T], str], advice: str) -> Vectors:
    """The vectors (N, G) divided by their lengths.

    Args:
        vectors: As the guide gave them.
        of: What each is the vector of: N texts, or numbers of rows.
        name_of: Says what an item of `of` is, for the error.
        advice: What to do about a bad vector, for the error.

    Raises:
        VectorError: When a vector is zero or not finite; the first one is named.
    """
    # The largest number is taken out first, because squares overflow before numbers do.
    largest = np.abs(vectors).max(axis=1, initial=0, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))
    if len(bad):
        what = "has length 0" if largest[bad[0]] == 0 else "is not finite"
        raise VectorError(f"{name_of(of[bad[0]])}: the vector {what}, expected a direction: {advice}")
    scaled = vectors / largest
    directions: Vectors = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
    return directions


def shown(text: str) -> str:
    """A text as errors show it: quoted, on one line, cut to 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
