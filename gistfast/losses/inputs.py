"""What is asked of the loss's inputs, and the one line that says what is wrong with them."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gistfast.errors import ConfigError, ShapeError


def check_options(
    temperature: float | Tensor,
    margin: float,
    margin_strategy: str,
    reduction: str = "mean",
    chunk_mib: float | None = None,
) -> None:
    """Refuse options out of their range; a temperature on a device is taken as it is, for reading it would wait.

    Raises:
        ConfigError: Naming the option.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ConfigError(f"temperature has shape {tuple(temperature.shape)}: give a scalar")
    elif not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(
            f"temperature is {temperature}: it divides the scores, so give a number above 0, such as 0.01"
        )
    if not math.isfinite(margin):
        raise ConfigError(f"margin is {margin}: give a finite number, such as 0.0")
    if margin_strategy not in ("absolute", "relative"):
        raise ConfigError(f"margin_strategy is {margin_strategy!r}: choose absolute or relative")
    if reduction not in ("mean", "none"):
        raise ConfigError(f"reduction is {reduction!r}: choose mean or none")
    if chunk_mib is not None and not chunk_mib > 0:
        raise ConfigError(f"chunk_mib is {chunk_mib}: give a size above 0, or None to choose by the free memory")


def check_triplet(triplet: str | None, triplet_margin: float) -> None:
    """Raise ConfigError when there is no such triplet term, or its margin is no distance of cosines."""
    if triplet not in (None, "soft", "hard"):
        raise ConfigError(f"triplet is {triplet!r}: choose soft or hard, or None for no triplet term")
    if not 0 <= triplet_margin <= 2:
        raise ConfigError(f"triplet_margin is {triplet_margin}: give a distance of cosines, from 0 to 2")


def check_rows(row_offset: int, num_rows: int, num_anchors: int) -> None:
    """Raise ShapeError when the slice of rows is empty or leaves the batch."""
    if num_rows < 1 or row_offset < 0 or row_offset + num_rows > num_anchors:
        raise ShapeError(
            f"rows {row_offset} to {row_offset + num_rows} were asked for, of {num_anchors} anchors: "
            "row_offset and num_rows must name at least one row and stay inside"
        )


def vector_columns(what: str, columns: Sequence[Tensor | None]) -> list[Tensor]:
    """The columns that are there: matrices of one width and device, as many positives as anchors."""
    names = ("anchor", "positive", "negative")
    given = [(name, column) for name, column in zip(names, columns, strict=True) if column is not None]
    first = given[0][1]
    for name, column in given:
        if column.ndim != 2 or not column.is_floating_point():
            raise ShapeError(
                f"the {what} vectors of {name} have shape {tuple(column.shape)} and dtype {column.dtype}: "
                "give a floating-point matrix, one vector a row"
            )
        if column.shape[1] != first.shape[1] or column.device != first.device:
            raise ShapeError(
                f"the {what} vectors of {name} are {column.shape[1]} wide on {column.device}, those of {given[0][0]} "
                f"{first.shape[1]} wide on {first.device}: all must agree"
            )
    if len(given[1][1]) != len(first):
        raise ShapeError(
            f"{len(first)} {what} vectors of anchor and {len(given[1][1])} of positive: give one of each a row"
        )
    return [column for _, column in given]


def guide_columns(students: list[Tensor], columns: Sequence[Tensor | None]) -> list[Tensor]:
    """Guide vectors for every student column; none when there is no guide.

    Raises:
        ShapeError: When some are given and others are not, or their numbers differ from the students'.
    """
    names = ("guide_anchor", "guide_positive", "guide_negative")[: len(students)]
    if all(column is None for column in columns):
        return []
    for name, column, student in zip(names, columns, students, strict=False):
        if column is None or len(column) != len(student):
            found = "is missing" if column is None else f"has {len(column)} vectors"
            raise ShapeError(
                f"{name} {found}, the student has {len(student)}: give one guide vector for each, or no guide at all"
            )
    if len(students) == 2 and columns[2] is not None:
        raise ShapeError("guide_negative is given without negative: give both or neither")
    guides = vector_columns("guide", columns)
    if guides[0].device != students[0].device:
        raise ShapeError(f"guide vectors are on {guides[0].device}, student vectors on {students[0].device}: move one")
    return [column.detach() for column in guides]


def widths_of_guides(guides: list[Tensor], widths: Sequence[int] | None, guide_score: str) -> tuple[int, ...]:
    """The widths of guides that judge one by one; empty where the guide vectors are judged as a whole.

    Raises:
        ConfigError: When `guide_score` is unknown, or takes more guides than there are.
        ShapeError: When the widths are not those of the guide vectors.
    """
    if guide_score not in ("mean", "min", "max"):
        raise ConfigError(f"guide_score is {guide_score!r}: choose mean, min or max")
    width = guides[0].shape[1] if guides else 0
    if widths is not None and (sum(widths) != width or min(widths, default=0) < 1):
        raise ShapeError(
            f"guide_widths is {tuple(widths)}, guide vectors are {width} wide: give the width of each guide's vectors, "
            f"{width} in sum"
        )
    if guide_score == "mean":
        return ()
    if widths is None or len(widths) < 2:
        raise ConfigError(
            f"guide_score is {guide_score!r} and guide_widths {widths}: the lowest or highest score is one of several "
            "guides', so give the width of each, or choose mean"
        )
    return tuple(widths)


def id_columns(students: list[Tensor], columns: Sequence[Tensor | None]) -> list[Tensor]:
    """Text ids of each column; without ids every vector is a text of its own.

    Raises:
        ShapeError: When some are given and others are not, or one has another length or dtype than expected.
    """
    if all(column is None for column in columns):
        every = torch.arange(sum(map(len, students)), dtype=torch.int32, device=students[0].device)
        return list(torch.split(every, [len(student) for student in students]))
    ids = []
    for name, column, student in zip(("anchor_ids", "positive_ids", "negative_ids"), columns, students, strict=False):
        if column is None or column.shape != student.shape[:1] or column.dtype not in (torch.int32, torch.int64):
            found = "is missing" if column is None else f"has shape {tuple(column.shape)} and dtype {column.dtype}"
            raise ShapeError(f"{name} {found}: give {len(student)} int32 or int64 ids, or no ids at all")
        ids.append(column)
    return [column.to(students[0].device) for column in ids]


def by_column(found: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """What the store holds for ids (B, C), one tensor of B rows for each column, on `device`."""
    return found.to(device, non_blocking=True).unbind(1)


def roles(columns: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Anchors, positives, and all negatives in one, if there are any."""
    anchor, positive, *negatives = columns
    return anchor, positive, torch.cat(negatives) if negatives else None
