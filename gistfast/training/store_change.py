"""In what stores differ from those that a run was made from, by the run's record."""

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]

# They name a guide and say nothing about its vectors.
_NAMES = ("name", "revision")


def stores_difference(before: Record | list[Record], after: Record | list[Record]) -> str | None:
    """The first thing in which the stores differ, which a run's record has alone or as a list; None for nothing."""
    were, are = (stores if isinstance(stores, list) else [stores] for stores in (before, after))
    if len(were) != len(are):
        return f"it had {len(were)} stores, found {len(are)}"
    had, has = ([store["fingerprint"] for store in stores] for stores in (were, are))
    if had != has and sorted(had) == sorted(has):
        return f"its stores come in another order than {', '.join(was['name'] for was in were)}"
    for was, found in zip(were, are, strict=True):
        if (difference := store_difference(was, found)) is not None:
            return difference if len(were) == 1 else f"{was['name']}: {difference}"
    return None


def store_difference(before: Record, after: Record) -> str | None:
    """The first thing that differs, such as "the store had 12 rows, found 16: it has grown"; None for nothing.

    Args:
        before: Fingerprint, guides and data of the store in the record of a run.
        after: The same of a store that is there.
    """
    if before["fingerprint"] == after["fingerprint"]:
        mined = before.get("mined"), after["mined"]
        return None if mined[0] == mined[1] else "the negatives of the store were mined otherwise, or anew"
    differences = (
        _difference_of_guides(before["guides"], after["guides"]),
        _difference_of_rows(before["data"], after["data"]),
        f"the store had fingerprint {before['fingerprint']}, found {after['fingerprint']}",
    )
    return next(filter(None, differences))


def _difference_of_guides(before: list[Record], after: list[Record]) -> str | None:
    if len(before) != len(after):
        return f"the store had guides {_guides(before)}, found {_guides(after)}"
    for number, (was, found) in enumerate(zip(before, after, strict=True), start=1):
        for name in found:
            if name not in _NAMES and was.get(name) != found[name]:
                which = "" if len(before) == 1 else f" {number}"
                return f"guide{which} of the store had {name} {was.get(name)!r}, found {found[name]!r}"
    return None


def _guides(guides: list[Record]) -> str:
    return " and ".join(str(guide["name"]) for guide in guides)


def _difference_of_rows(before: Record, after: Record) -> str | None:
    for name in ("columns", "holdout", "one_role"):
        # JSON has no tuples.
        was, found = (list(value) if isinstance(value, tuple) else value for value in (before[name], after[name]))
        if was != found:
            return f"the store had {name} {was}, found {found}"
    had, has = ([segment["fingerprint"] for segment in data["segments"]] for data in (before, after))
    if had == has:
        return None
    were, are = (sum(segment["num_rows"] for segment in data["segments"]) for data in (before, after))
    if has[: len(had)] == had:
        return f"the store had {were} rows, found {are}: it has grown"
    return f"the store was made of {_sources(before)}, {were} rows, found one of {_sources(after)}, {are} other rows"


def _sources(data: Record) -> str:
    return ", ".join(dict.fromkeys(segment["description"] for segment in data["segments"]))
