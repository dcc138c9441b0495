"""Vectors that lie in files already, read by row number: a .npy file, or a column of Parquet files.

# N rows asked for, G guide width
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from gistfast.errors import DataError, first_line
from gistfast.guides.directions import Vectors, unit_vectors

Array = np.ndarray[Any, Any]

# Rows decoded at once: enough to be quick, few enough for any width.
ROWS_AT_ONCE = 4096


class RowVectors(Protocol):
    """Vectors by row number, from 0."""

    @property
    def num_rows(self) -> int:
        """How many there are."""

    @property
    def width(self) -> int:
        """Numbers in a vector (G)."""

    def name_of(self, row: int) -> str:
        """What errors call a row: its file, and its number there from 1."""

    def digest(self) -> str:
        """What tells the vectors from others of the same texts' files."""

    def read(self, rows: Array) -> Iterator[tuple[slice, Vectors]]:
        """The vectors of the rows, as they are stored, part by part.

        Args:
            rows: (N,) integers, ascending; repeats allowed.

        Raises:
            DataError: When a row holds no vector, or one of another width.
        """


def take_directions(vectors: RowVectors, rows: Array, on_part: Callable[[int], None] | None = None) -> Vectors:
    """The vectors (N, G) of the rows, in any order, of length 1.

    Args:
        vectors: Where they lie.
        rows: (N,) integers, in any order.
        on_part: Called with the number of rows of each part that was read.

    Raises:
        DataError: When a row holds no vector.
        VectorError: When a vector is zero or not finite; its row is named.
    """
    taken = np.empty((len(rows), vectors.width), np.float32)
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    for part, stored in vectors.read(ascending):
        taken[order[part]] = unit_vectors(stored, ascending[part], vectors.name_of, "mend or remove the row")
        if on_part is not None:
            on_part(len(stored))
    return taken


class NpyVectors:
    """A .npy file of shape (rows, G), mapped: what is not asked for is not read."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            DataError: When it is missing, no .npy file, or does not hold one vector of numbers a row.
        """
        self._path = path
        try:
            self._array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise DataError(f"{path} is not there: expected a .npy file of vectors, mend --vectors") from error
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{path} is not a readable .npy file ({first_line(error)}): save floats of shape (texts, width) "
                "by numpy.save"
            ) from error
        array = self._array
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or not array.size:
            found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
            raise DataError(f"{path.name} holds {found}, expected floats of shape (texts, width): save such an array")

    @property
    def num_rows(self) -> int:
        """How many vectors there are."""
        return len(self._array)

    @property
    def width(self) -> int:
        """Numbers in a vector (G)."""
        return int(self._array.shape[1])

    def name_of(self, row: int) -> str:
        """The file, and the number of the row from 1."""
        return f"{self._path.name}, row {row + 1}"

    def digest(self) -> str:
        """The xxh3_128 of the file's bytes, in hex."""
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

    def read(self, rows: Array) -> Iterator[tuple[slice, Vectors]]:
        """The vectors of the rows, ascending, part by part."""
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(first, min(first + ROWS_AT_ONCE, len(rows)))
            # A number beyond float32 shows as an infinite one, which is refused by its row.
            with np.errstate(over="ignore"):
                yield part, self._array[rows[part]].astype(np.float32)


class ParquetVectors:
    """A column of lists of numbers in Parquet files; row groups without a row that is asked for are left alone."""

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        """Read what the files say of themselves, and the first vector.

        Raises:
            DataError: When a file is not readable, or the column does not hold lists of floats.
        """
        self._column = column
        self._files = [(path, _metadata_of(path, column)) for path in paths]
        # Row groups of all files in order, and the number of the first row of each, and of all.
        self._groups = [
            (path, metadata, group) for path, metadata in self._files for group in range(metadata.num_row_groups)
        ]
        sizes = [metadata.row_group(group).num_rows for _, metadata, group in self._groups]
        self._starts = np.array([0, *accumulate(sizes)])
        # Not known before the first row is read.
        self._width = 0
        for _, first in self.read(np.zeros(min(self.num_rows, 1), np.int64)):
            self._width = first.shape[1]

    @property
    def num_rows(self) -> int:
        """How many vectors there are."""
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """Numbers in a vector (G)."""
        return self._width

    def name_of(self, row: int) -> str:
        """The file and the column, and the number of the row in the file from 1."""
        for path, metadata in self._files:
            if row < metadata.num_rows:
                return f"{path.name}, row {row + 1}, column {self._column!r}"
            row -= metadata.num_rows
        raise IndexError(f"row {row} of {self.num_rows}")

    def digest(self) -> str:
        """The name of the column; the texts are in the same files."""
        return self._column

    def read(self, rows: Array) -> Iterator[tuple[slice, Vectors]]:
        """The vectors of the rows, ascending, part by part."""
        bounds = np.searchsorted(rows, self._starts)
        for number, group in enumerate(self._groups):
            done, end = int(bounds[number]), int(bounds[number + 1])
            start = int(self._starts[number])
            if done == end:
                continue
            for column in self._decoded(*group):
                last = done + int(np.searchsorted(rows[done:end], start + len(column)))
                if done < last:
                    yield slice(done, last), self._vectors(column, start)[rows[done:last] - start]
                start, done = start + len(column), last
                if done == end:
                    break

    def _decoded(self, path: Path, metadata: pq.FileMetaData, group: int) -> Iterator[Any]:
        try:
            # Mapped, so that the bytes of a row group are not all in memory at once.
            with pq.ParquetFile(path, metadata=metadata, memory_map=True) as file:
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[self._column]):
                    column = batch.column(0)
                    yield column.storage if isinstance(column, pa.ExtensionArray) else column
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path.name} is damaged: {first_line(error)}: restore it") from error

    def _vectors(self, column: Any, first_row: int) -> Vectors:
        """The lists of a decoded column as an array (rows, G); `first_row` is the number of the first."""
        widths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        expected = self._width or widths[0]
        bad = np.flatnonzero(~(widths == expected) | (expected == 0))
        if len(bad):
            found = widths[bad[0]]
            what = "holds no vector" if not found > 0 else f"is {int(found)} wide, the first vector {int(expected)}"
            raise DataError(f"{self.name_of(first_row + int(bad[0]))} {what}: mend or remove the row")
        with np.errstate(over="ignore"):
            numbers: Vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        return numbers.reshape(len(column), -1)


class JoinedVectors:
    """Vectors of the same width, one set after the other."""

    def __init__(self, sets: Sequence[RowVectors]) -> None:
        """At least one set."""
        self._sets = sets
        self._starts = np.array([0, *accumulate(vectors.num_rows for vectors in sets)])

    @property
    def num_rows(self) -> int:
        """How many vectors there are."""
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """Numbers in a vector (G)."""
        return self._sets[0].width

    def name_of(self, row: int) -> str:
        """What its own set calls it."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._sets[number].name_of(row - int(self._starts[number]))

    def digest(self) -> str:
        """The digests of the sets."""
        return ", ".join(vectors.digest() for vectors in self._sets)

    def read(self, rows: Array) -> Iterator[tuple[slice, Vectors]]:
        """The vectors of the rows, ascending, part by part."""
        bounds = np.searchsorted(rows, self._starts)
        for vectors, start, first, last in zip(self._sets, self._starts, bounds, bounds[1:], strict=False):
            for part, stored in vectors.read(rows[first:last] - start):
                yield slice(first + part.start, first + part.stop), stored


def _metadata_of(path: Path, column: str) -> pq.FileMetaData:
    """What the file says of itself, once its column is seen to hold lists of floats."""
    try:
        with pq.ParquetFile(path) as file:
            kind, metadata = file.schema_arrow.field(column).type, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path.name} is not a readable Parquet file ({first_line(error)}): restore it") from error
    lists = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    is_list = pa.types.is_list(lists) or pa.types.is_large_list(lists) or pa.types.is_fixed_size_list(lists)
    if not is_list or not pa.types.is_floating(lists.value_type):
        raise DataError(
            f"{path.name}: column {column!r} holds {kind}, expected lists of floats: name another with --vectors"
        )
    return metadata
