"""The texts that vectors are ready for: which columns hold them, and where each text stands."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gistfast.errors import DataError
from gistfast.guides.ready_vectors import NpyVectors, ParquetVectors, RowVectors
from gistfast.progress import progress
from gistfast.rows.formats import BadRow, ParquetFile, RowFile
from gistfast.store.keys import KeyTable, key_words, text_keys

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

# Names that columns may have in the file, in the order in which they are looked for.
TEXT_NAMES = ("text", "sentence")
VECTOR_NAMES = ("vector", "embedding", "embeddings")


class TextPlaces:
    """Where each distinct text stands first; texts are the same when they are after Unicode's NFC.

    A place is the number of a row, counted through the first column of texts, then the second, and so on.
    Memory: 32 to 48 bytes a text, and 8 a row while they are read.

    Attributes:
        num_rows: Rows of the files.
        repeats: Places at which a text stands again, (repeats,) int64.
        firsts: The place at which the same text stands first, (repeats,) int64.
    """

    def __init__(self, files: Sequence[RowFile], columns: Sequence[str]) -> None:
        """Read the columns of all files.

        Raises:
            DataError: When a row holds no text, or a file is damaged.
        """
        self._table = KeyTable()
        counts = [file.num_rows() for file in files]
        total = None if None in counts else sum(count or 0 for count in counts)
        numbers: list[list[Array]] = [[] for _ in columns]
        with progress("reading texts of the guide", total=total, unit="rows") as bar:
            for batch in _text_batches(files, columns):
                for place, texts in enumerate(batch):
                    numbers[place].append(self._number(texts))
                bar.advance(len(batch[0]))
        everywhere = np.concatenate([part for parts in numbers for part in parts] or [np.empty(0, np.int64)])
        self.num_rows = len(everywhere) // len(columns)
        places = np.arange(len(everywhere))
        self._first = np.empty(self._table.count, np.int64)
        # Backwards, because of several values for one index the last one stays.
        self._first[everywhere[::-1]] = places[::-1]
        self.repeats: Array = np.flatnonzero(self._first[everywhere] != places)
        self.firsts: Array = self._first[everywhere[self.repeats]]

    def find(self, texts: Sequence[str]) -> Array:
        """The first place of each text, -1 for those that are not there, (N,) int64."""
        numbers = self._table.find(key_words(text_keys(texts)))
        known = numbers >= 0
        places = np.full(len(numbers), -1, np.int64)
        places[known] = self._first[numbers[known]]
        return places

    def _number(self, texts: Sequence[str]) -> Array:
        distinct: dict[bytes, int] = {}
        positions = np.array([distinct.setdefault(key, len(distinct)) for key in text_keys(texts)], dtype=np.int64)
        return self._table.number(key_words(list(distinct)))[positions]


def text_at(files: Sequence[RowFile], column: str, row: int) -> str:
    """The text of a row, counted through all files; read again from the start."""
    for (texts,) in _text_batches(files, [column]):
        if row < len(texts):
            break
        row -= len(texts)
    return texts[row]


def _text_batches(files: Sequence[RowFile], columns: Sequence[str]) -> Iterator[list[list[str]]]:
    """The texts of the columns, one list each, all rows in order."""
    for file in files:
        first_row = 1
        for batch in file.batches(columns, 10_000):
            for name, texts in zip(columns, batch, strict=True):
                for row, text in enumerate(texts, start=first_row):
                    if not _is_text(text):
                        what = text.problem if isinstance(text, BadRow) else f"has no text in column {name!r}"
                        raise DataError(f"{file.name}, row {row}: {what}: mend or remove the row")
            yield batch
            first_row += len(batch[0])


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False


def open_vectors(
    files: Sequence[RowFile], folder: Path, mapping: Mapping[str, str] | None, description: str
) -> dict[str, RowVectors]:
    """The vectors of each column of texts.

    Args:
        files: That hold the texts.
        folder: Where .npy files are looked for first.
        mapping: From columns of texts to columns of vectors or .npy files; found by name when None.
        description: The files in a few words, for errors.

    Raises:
        DataError: When columns or files are missing, or hold no vectors.
    """
    found = files[0].columns()
    if not found:
        raise DataError(f"{description} has no rows: check the path")
    if mapping is None:
        mapping = _found_by_name(found, folder, Path(description).stem, description)
        logger.info(
            "%s: vectors of %s", description, ", ".join(f"{text} in {place}" for text, place in mapping.items())
        )
    opened: dict[str, RowVectors] = {}
    for text, place in mapping.items():
        if text not in found:
            raise DataError(f"{description} has no column {text!r}, it has {', '.join(found)}: mend --vectors")
        opened[text] = _opened(place, files, found, folder, description)
    widths = sorted({vectors.width for vectors in opened.values()})
    if len(widths) > 1:
        raise DataError(f"{description} has vectors {widths} wide, expected one width: name others with --vectors")
    return opened


def _found_by_name(found: list[str], folder: Path, stem: str, description: str) -> dict[str, str]:
    text = next((name for name in TEXT_NAMES if name in found), None)
    beside = f"{stem}.npy"
    vector = next((name for name in VECTOR_NAMES if name in found), beside if (folder / beside).is_file() else None)
    if text is None or vector is None:
        lacking = f"texts ({', '.join(TEXT_NAMES)})" if text is None else f"vectors ({', '.join(VECTOR_NAMES)})"
        raise DataError(
            f"{description} has the columns {', '.join(found)} and none for {lacking}: "
            "name them with --vectors TEXT=VECTOR, where VECTOR is a column or a .npy file"
        )
    return {text: vector}


def _opened(place: str, files: Sequence[RowFile], found: list[str], folder: Path, description: str) -> RowVectors:
    if place in found:
        paths = [file.path for file in files if isinstance(file, ParquetFile)]
        if len(paths) < len(files):
            raise DataError(
                f"{description}: vectors in a column must lie in .parquet files: convert it, or save a .npy"
            )
        return ParquetVectors(paths, place)
    if not place.endswith(".npy"):
        raise DataError(f"{description} has no column {place!r}, it has {', '.join(found)}: mend --vectors")
    beside = folder / place
    return NpyVectors(beside if beside.is_file() else Path(place))
