"""What a worker is told: the settings of precompute, as JSON knows them, so that they reach any process or machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gistfast.engines.shards import Part, embed_shards
from gistfast.guides.batch_done import OnBatch
from gistfast.guides.guide import Guide
from gistfast.guides.open_guide import open_guide
from gistfast.store import GuideInfo
from gistfast.store.vectors import VectorShards


def stored_info(guide: Guide, settings: Mapping[str, Any]) -> GuideInfo:
    """What the store records of a guide: vectors are kept in a precision of their own."""
    return replace(guide.info, dtype=settings["store_dtype"])


def describe_guide(settings: Mapping[str, Any]) -> GuideInfo:
    """What the store records of the guide that the settings name, as this machine and its device have it.

    Raises:
        GistfastError: As `open_guide` does.
    """
    return stored_info(open_guide(settings), settings)


def embed_part(
    settings: Mapping[str, Any],
    store: str | Path,
    part: Sequence[int],
    *,
    on_batch: OnBatch,
    on_commit: Callable[[int], None],
) -> None:
    """Load the guide that the settings name and embed the shards of a part, as `embed_shards` says.

    Raises:
        GistfastError: As `open_guide` does.
        StoreError: When the store is missing, made with another guide, or cannot be written.
        VectorError: When the guide gives a vector that is zero or not finite.
    """
    guide = open_guide(settings)
    vectors = VectorShards.open(Path(store), stored_info(guide, settings))
    embed_shards(vectors, guide, part=Part(*part), on_batch=on_batch, on_commit=on_commit)
