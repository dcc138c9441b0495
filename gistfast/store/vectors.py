"""Guide vectors on their way into a shard: checked, and in the precision in which they are stored."""

from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import numpy as np
import pyarrow as pa

from gistfast.errors import VectorError
from gistfast.store.shards import fixed_size_lists

Array = np.ndarray[Any, Any]


def vector_batch(vectors: Array, dtype: str, texts: Sequence[str], first_entry: int) -> pa.RecordBatch:
    """The columns of a shard of vectors.

    Args:
        vectors: (N, G) float32.
        dtype: In which they are stored.
        texts: The N texts, to name the one whose vector is bad.
        first_entry: Id of the first text.

    Raises:
        VectorError: When a vector is zero or not finite in the stored dtype.
    """
    # An overflow shows as an infinite value, which is refused with its text.
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(vectors, dtype=dtype)
    finite = np.isfinite(stored).all(axis=1)
    good = finite & stored.any(axis=1)
    if not good.all():
        bad = int(np.argmin(good))
        what = "a zero vector" if finite[bad] else "a vector that is not finite"
        text = shorten(texts[bad], 80, placeholder=" ...")
        others = int((~good).sum()) - 1
        raise VectorError(
            f"the guide gave {what} as {stored.dtype} for text {first_entry + bad}, {text!r}"
            f"{f', and {others} more like it' if others else ''}: check the guide and its --dtype"
        )
    field, column = fixed_size_lists("vector", stored)
    return pa.record_batch([column], schema=pa.schema([field]))
