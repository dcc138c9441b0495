"""Any source of rows of text, read in batches under canonical column names."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import xxhash

from gistfast.errors import ConfigError, DataError
from gistfast.rows.formats import BadRow, JsonFile, RawColumns, RowFile
from gistfast.rows.sources import find_files

logger = logging.getLogger(__name__)

# Names that a column may have in the file, in the order in which they are looked for.
ANCHOR_NAMES = ("anchor", "query", "question", "sentence1", "sentence")
POSITIVE_NAMES = ("positive", "pos", "answer", "passage", "document", "sentence2")
NEGATIVE_NAMES = ("negative", "neg")
TASK_NAMES = ("task", "task_name")
_NUMBERED_NEGATIVE = re.compile(r"(negative|neg)_\d+")
_CANONICAL = re.compile(r"anchor|positive|negative(_\d+)?|task")


@dataclass(frozen=True)
class Rows:
    """A batch of rows of one file.

    Attributes:
        texts: One list for each column, in the order of the source's `columns`.
        origin: Name of the file.
        first_row: Number of the first row in that file, from 1.
        tasks: Name of each row's task, None for a row without; None when the source has no tasks.
    """

    texts: tuple[list[str], ...]
    origin: str
    first_row: int
    tasks: list[str | None] | None = None


class RowSource:
    """Rows of text from one or more files; made by `read_rows`.

    Attributes:
        columns: Canonical column names: anchor, positive, negative_1, ...
        description: The source in a few words.
        skipped: Bad rows left out so far.
    """

    def __init__(
        self,
        files: Sequence[RowFile],
        *,
        description: str,
        columns: Mapping[str, str] | None,
        on_bad_row: Literal["stop", "skip"],
    ) -> None:
        """Use `read_rows`, which finds the files.

        Raises:
            ConfigError: When `columns` maps a name that is not canonical.
            DataError: When the files are empty or lack the columns.
        """
        self.description = description
        self.skipped = 0
        self._files = files
        self._on_bad_row = on_bad_row
        found = next((names for file in files if (names := file.columns())), [])
        if not found:
            raise DataError(_why_no_rows(files, description))
        self._names = _column_names(found, columns or {}, description)
        self.columns = tuple(self._names)
        self._task = (columns or {}).get("task") or next((name for name in TASK_NAMES if name in found), None)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files' names and contents and of the column mapping: 32 hex digits."""
        contents = [(file.name, file.digest()) for file in self._files]
        record = json.dumps([contents, [*self._names.items(), *([("task", self._task)] if self._task else [])]])
        return xxhash.xxh3_128_hexdigest(record.encode())

    def stamp(self) -> str | None:
        """Hash of the files' paths, sizes and times of change and of the column mapping; None without plain files.

        While it stays the same, the fingerprint does.
        """
        stamps = [file.stamp() for file in self._files]
        if None in stamps:
            return None
        return xxhash.xxh3_128_hexdigest(json.dumps([stamps, list(self._names.items()), self._task]).encode())

    @property
    def num_rows(self) -> int | None:
        """Number of rows, bad ones included, or None when only reading tells."""
        counts = [file.num_rows() for file in self._files]
        return None if None in counts else sum(count or 0 for count in counts)

    def batches(self, rows_per_batch: int = 10_000) -> Iterator[Rows]:
        """All rows in order, in batches of at most `rows_per_batch`; bad rows stop it or are left out.

        Raises:
            DataError: At a missing, empty or non-string text (named by file and row), when a file lacks a
                column or is damaged, or when no row is left.
        """
        self.skipped = 0
        num_rows = 0
        for file in self._files:
            self._refuse_other_columns(file)
            first_row = 1
            names = [*self._names.values(), *([self._task] if self._task else [])]
            for raw in file.batches(names, rows_per_batch):
                tasks = raw.pop() if self._task else None
                texts, kept = self._checked(raw, file.name, first_row)
                if texts[0]:
                    yield Rows(texts, file.name, first_row, tasks and [_task(tasks[place]) for place in kept])
                num_rows += len(texts[0])
                first_row += len(raw[0])
        if not num_rows:
            left_out = f" ({self.skipped} bad rows were skipped)" if self.skipped else ""
            raise DataError(f"{self.description} has no rows{left_out}: check the path and the columns")

    def _refuse_other_columns(self, file: RowFile) -> None:
        found = file.columns()
        missing = [name for name in self._names.values() if name not in found]
        if found and missing:
            raise DataError(
                f"{file.name} has the columns {', '.join(found)} and lacks {', '.join(missing)}: "
                "give files with the same columns"
            )

    def _checked(self, raw: RawColumns, origin: str, first_row: int) -> tuple[tuple[list[str], ...], Sequence[int]]:
        """The batch without its bad rows, and the places that its rows had."""
        if all(_all_good(column) for column in raw):
            return tuple(raw), range(len(raw[0]))
        names = tuple(self._names.values())
        good: list[tuple[str, ...]] = []
        kept: list[int] = []
        for row, values in enumerate(zip(*raw, strict=True), start=first_row):
            try:
                good.append(_texts(values, names))
                kept.append(row - first_row)
            except ValueError as error:
                if self._on_bad_row == "stop":
                    raise DataError(
                        f"{origin}, row {row}: {error}: mend the row, or leave bad rows out with --on-bad-row skip"
                    ) from error
                if not self.skipped:
                    logger.warning("skipping bad rows, the first: %s, row %d: %s", origin, row, error)
                self.skipped += 1
        return tuple([texts[place] for texts in good] for place in range(len(names))), kept


def read_rows(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    subset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
) -> RowSource:
    """The rows of `source`, not read yet but for the column names.

    Args:
        source: A .parquet, .jsonl, .json, .csv or .arrow file, a folder or glob of these, a folder saved by
            `datasets`, or the hub id of a data set. JSON may be MEDI's: of [instruction, text] the text is
            kept.
        columns: Names in the file by canonical name, such as {"anchor": "title"}; others are found by the
            names that sentence-transformers uses. "task" names the rows' tasks.
        subset: Subset (configuration) of a hub data set.
        split: Split of a hub or saved data set; "train" when not given.
        revision: Branch, tag or commit of a hub data set.
        on_bad_row: "stop" raises at the first bad row, "skip" leaves bad rows out and counts them.

    Raises:
        ConfigError: When an option does not go with the source.
        DataError: When the source is missing, unreachable or empty, or has no such columns.
    """
    files, description = find_files(source, subset=subset, split=split, revision=revision)
    return RowSource(files, description=description, columns=columns, on_bad_row=on_bad_row)


def _why_no_rows(files: Sequence[RowFile], description: str) -> str:
    for file in files:
        if isinstance(file, JsonFile) and (problem := file.first_problem()):
            return f"{file.name}, row 1: {problem}: give one object a line, or one array of objects"
    return f"{description} has no rows: check the path"


def _column_names(found: list[str], mapping: Mapping[str, str], origin: str) -> dict[str, str]:
    """Names in the file by canonical name, in canonical order."""
    for canonical, name in mapping.items():
        if not _CANONICAL.fullmatch(canonical):
            raise ConfigError(f"--columns names {canonical!r}, expected anchor, positive, negative_1, ... or task")
        if name not in found:
            raise DataError(f"{origin} has no column {name!r}, it has {', '.join(found)}: mend --columns")
    anchor = mapping.get("anchor") or next((name for name in ANCHOR_NAMES if name in found), None)
    positive = mapping.get("positive") or next((name for name in POSITIVE_NAMES if name in found), None)
    if anchor is None or positive is None:
        lacking, known = ("anchor", ANCHOR_NAMES) if anchor is None else ("positive", POSITIVE_NAMES)
        raise DataError(
            f"{origin} has the columns {', '.join(found)} and none for the {lacking} ({', '.join(known)}): "
            "name them with --columns anchor=NAME,positive=NAME"
        )
    negatives = [name for canonical, name in mapping.items() if canonical.startswith("negative")]
    if not negatives:
        negatives = [name for name in found if name in NEGATIVE_NAMES or _NUMBERED_NEGATIVE.fullmatch(name)]
    numbered = {f"negative_{number}": name for number, name in enumerate(negatives, start=1)}
    return {"anchor": anchor, "positive": positive, **numbered}


def _task(value: Any) -> str | None:
    """The name of a row's task; numbers are names too."""
    return None if value is None or isinstance(value, BadRow) else str(value)


def _all_good(column: list[Any]) -> bool:
    """Whether all values are texts, at the price of one pass."""
    if not all(type(value) is str and value and not value.isspace() for value in column):
        return False
    try:
        "".join(column).encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(values: tuple[Any, ...], names: Sequence[str]) -> tuple[str, ...]:
    """The texts of one row.

    Raises:
        ValueError: Saying what is wrong with the row.
    """
    nested = isinstance(values[0], list)
    return tuple(_text(value, name, nested) for value, name in zip(values, names, strict=True))


def _text(value: Any, name: str, nested: bool) -> str:
    if isinstance(value, BadRow):
        raise ValueError(value.problem)
    if nested:
        # Two strings in a list are an instruction and a text only where the anchor has them too.
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"column {name!r} is not [instruction, text] as the anchor is")
        value = value[1]
    if value is None:
        raise ValueError(f"column {name!r} is missing")
    if not isinstance(value, str):
        raise ValueError(f"column {name!r} is {type(value).__name__}, expected text")
    if not value or value.isspace():
        raise ValueError(f"column {name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"column {name!r} is not valid Unicode (half a surrogate pair)") from error
    return value
