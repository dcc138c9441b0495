"""File formats that rows are read from: column names, and raw values in batches, in bounded memory."""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from gistfast.errors import DataError, first_line
from gistfast.rows.json_array import array_items

if TYPE_CHECKING:
    from datasets import Dataset

# Columns of raw values, one list each.
RawColumns = list[list[Any]]

_LONGEST_FIELD_CHARS = 1 << 26
_RESTORE = "restore it, or rename it where it is of another format"


@dataclass(frozen=True)
class BadRow:
    """Stands in each column of a row that cannot be read.

    Attributes:
        problem: What is wrong with it, such as "is not valid JSON".
    """

    problem: str


class RowFile(Protocol):
    """Rows from one place."""

    @property
    def name(self) -> str:
        """What errors call it: the file's base name, or the data set's description."""

    def columns(self) -> list[str]:
        """Names of the columns, in order; empty when there is no row.

        Raises:
            DataError: When the file cannot be read.
        """

    def num_rows(self) -> int | None:
        """Number of rows, or None when only reading them tells."""

    def digest(self) -> str:
        """Hash of the contents, in hex."""

    def stamp(self) -> tuple[str, int, int] | None:
        """Path, size and time of change in ns; None for what is no plain file."""

    def batches(self, names: Sequence[str], rows_per_batch: int) -> Iterator[RawColumns]:
        """The values of the columns `names`, None where a row lacks one, up to `rows_per_batch` at a time.

        Raises:
            DataError: When the file is damaged.
        """


class _File:
    """What files of all formats have in common."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The file's base name."""
        return self.path.name

    def num_rows(self) -> int | None:
        """None: only reading the file tells."""
        return None

    def digest(self) -> str:
        """The xxh3_128 of the file's bytes, in hex."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

    def stamp(self) -> tuple[str, int, int]:
        """Path, size and time of change in ns."""
        status = self.path.stat()
        return str(self.path.resolve()), status.st_size, status.st_mtime_ns


class ParquetFile(_File):
    """A .parquet file."""

    def columns(self) -> list[str]:
        """Names of the columns, in order; empty when there is no row."""
        with self._open() as file:
            return list(file.schema_arrow.names)

    def num_rows(self) -> int:
        """Number of rows."""
        with self._open() as file:
            return int(file.metadata.num_rows)

    def batches(self, names: Sequence[str], rows_per_batch: int) -> Iterator[RawColumns]:
        """The values of the columns `names`, None where a row lacks one."""
        with self._open() as file:
            yield from _values(file.iter_batches(rows_per_batch, columns=list(names)), names, self.name)

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.name} is not a readable Parquet file ({first_line(error)}): {_RESTORE}") from error


class ArrowFile(_File):
    """An .arrow file, in Arrow's file or stream format."""

    def columns(self) -> list[str]:
        """Names of the columns, in order; empty when there is no row."""
        return list(self._open().schema.names)

    def batches(self, names: Sequence[str], rows_per_batch: int) -> Iterator[RawColumns]:
        """The values of the columns `names`, None where a row lacks one."""
        reader = self._open()
        stored = (
            (reader.get_batch(index) for index in range(reader.num_record_batches))
            if isinstance(reader, pa.ipc.RecordBatchFileReader)
            else reader
        )
        pieces = (
            batch.slice(first, rows_per_batch) for batch in stored for first in range(0, batch.num_rows, rows_per_batch)
        )
        yield from _values(pieces, names, self.name)

    def _open(self) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
        source = pa.memory_map(str(self.path))
        try:
            if source.read(6) == b"ARROW1":
                return pa.ipc.open_file(source)
            source.seek(0)
            return pa.ipc.open_stream(source)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.name} is not a readable Arrow file ({first_line(error)}): {_RESTORE}") from error


class CsvFile(_File):
    """A .csv file with a header, comma-separated, in UTF-8."""

    def columns(self) -> list[str]:
        """Names of the columns, in order; empty when there is no row."""
        with self._open() as file:
            return next(self._lines(file), [])

    def batches(self, names: Sequence[str], rows_per_batch: int) -> Iterator[RawColumns]:
        """The values of the columns `names`, None where a row lacks one."""
        with self._open() as file:
            lines = self._lines(file)
            header = next(lines)
            places = [header.index(name) for name in names]
            while chunk := list(islice(lines, rows_per_batch)):
                rows = [_of_length(line, len(header)) for line in chunk]
                yield [[row if isinstance(row, BadRow) else row[place] for row in rows] for place in places]

    def _open(self) -> TextIO:
        # The default of 131,072 characters a field is no limit that texts keep.
        csv.field_size_limit(_LONGEST_FIELD_CHARS)
        return self.path.open(newline="", encoding="utf-8-sig")

    def _lines(self, file: TextIO) -> Iterator[list[str]]:
        try:
            yield from (line for line in csv.reader(file) if line)
        except csv.Error as error:
            raise DataError(f"{self.name} is not a readable CSV file: {error}: mend or remove it") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name} is not UTF-8 (byte {error.start}): convert it first") from error


class JsonFile(_File):
    """A .jsonl or .json file: one object a line, or one array of objects."""

    def columns(self) -> list[str]:
        """Names of the columns, in order; empty when there is no row."""
        first = next((item for item in self._items() if isinstance(item, dict)), {})
        return list(first)

    def first_problem(self) -> str | None:
        """What is wrong with the first row; None where it is sound, or there is none."""
        first = next(self._items(), None)
        return first.problem if isinstance(first, BadRow) else None

    def batches(self, names: Sequence[str], rows_per_batch: int) -> Iterator[RawColumns]:
        """The values of the columns `names`, None where a row lacks one."""
        items = self._items()
        while chunk := list(islice(items, rows_per_batch)):
            yield [[item if isinstance(item, BadRow) else item.get(name) for item in chunk] for name in names]

    def _items(self) -> Iterator[dict[str, Any] | BadRow]:
        with self.path.open("rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        values = self._array() if start.startswith(b"[") else self._lines()
        for value in values:
            if isinstance(value, dict | BadRow):
                yield value
            else:
                yield BadRow(f"is a JSON {type(value).__name__}, expected an object")

    def _lines(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            for line in file:
                if not line.isspace():
                    yield _parsed(line)

    def _array(self) -> Iterator[Any]:
        with self.path.open(encoding="utf-8-sig") as file:
            try:
                yield from array_items(file)
            except ValueError as error:
                raise DataError(f"{self.name} is not valid JSON: {error}: mend it") from error


class SavedDataset:
    """A data set opened by the `datasets` library."""

    def __init__(self, dataset: "Dataset", name: str) -> None:
        self.name = name
        self._dataset = dataset

    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self._dataset.column_names)

    def num_rows(self) -> int:
        """Number of rows."""
        return len(self._dataset)

    def digest(self) -> str:
        """The fingerprint that `datasets` keeps."""
        return str(self._dataset._fingerprint)

    def stamp(self) -> None:
        """None: its digest is known without reading it."""

    def batches(self, names: Sequence[str], rows_per_batch: int) -> Iterator[RawColumns]:
        """The values of the columns `names`."""
        wanted = self._dataset.select_columns(sorted(set(names))).with_format("arrow")
        yield from _values(wanted.iter(rows_per_batch), names, self.name)


FORMATS: Mapping[str, type[ParquetFile] | type[ArrowFile] | type[CsvFile] | type[JsonFile]] = {
    ".parquet": ParquetFile,
    ".jsonl": JsonFile,
    ".json": JsonFile,
    ".csv": CsvFile,
    ".arrow": ArrowFile,
}


def _values(batches: Iterable[Any], names: Sequence[str], origin: str) -> Iterator[RawColumns]:
    """The values of Arrow batches or tables."""
    try:
        for batch in batches:
            if batch.num_rows:
                yield [batch.column(name).to_pylist() for name in names]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{origin} is damaged: {first_line(error)}: restore it") from error


def _of_length(fields: list[str], expected: int) -> list[str] | BadRow:
    return fields if len(fields) == expected else BadRow(f"has {len(fields)} fields, expected {expected}")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return BadRow(f"is not valid JSON ({error})")
