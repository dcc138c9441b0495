"""What a search of all documents found for each row: rank, false negatives, hard negatives.

One shard for each shard of rows, committed alike, in a folder named after what was searched and how. A file
mined/<key>.json says that the folder is complete.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch

from gistfast.errors import StoreError
from gistfast.store.files import fingerprint_of, read_json, write_json
from gistfast.store.shards import Shard, commits_of, fixed_size_lists, pending_shards, replace_shard, write_shard

if TYPE_CHECKING:
    from gistfast.store.reader import GuideStore

Array = np.ndarray[Any, Any]

# Columns of a shard, in their order.
_LISTS = ("negatives", "negative_scores")
_NUMBERS = ("positive_rank", "false_negatives", "truncated")


@dataclass(frozen=True, kw_only=True)
class MinedInfo:
    """What mined negatives depend on.

    Attributes:
        negatives: Hard negatives of a row (K).
        margin: How far a negative's guide score is below the positive's at least.
        margin_strategy: Whether the margin is a score, or a share of the positive's score.
        store_fingerprint: The store whose documents were searched.
    """

    negatives: int
    margin: float
    margin_strategy: Literal["absolute", "relative"]
    store_fingerprint: str

    @cached_property
    def kind(self) -> str:
        """The folder of the shards."""
        return f"mined/{fingerprint_of(asdict(self))[:8]}"


@dataclass(frozen=True, kw_only=True)
class Mined:
    """What was found for R rows, K negatives each.

    Attributes:
        positive_rank: Place of the positive among all documents by guide score; 1 is best; (R,) int32.
        false_negatives: Documents that score above the positive and are no known positive of the anchor, (R,) int32.
        negatives: Entry ids of the hardest negatives, best first, -1 where fewer were found; (R, K) int64.
        negative_scores: Their guide scores, -inf where fewer were found; (R, K) float32.
        truncated: Whether the search saw too few documents to fill the row, or to count what is above; (R,) bool.
    """

    positive_rank: Array
    false_negatives: Array
    negatives: Array
    negative_scores: Array
    truncated: Array

    @classmethod
    def empty(cls, num_rows: int, num_negatives: int) -> "Mined":
        """Nothing found for any row yet."""
        return cls(
            positive_rank=np.zeros(num_rows, np.int32),
            false_negatives=np.zeros(num_rows, np.int32),
            negatives=np.full((num_rows, num_negatives), -1, np.int64),
            negative_scores=np.full((num_rows, num_negatives), -np.inf, np.float32),
            truncated=np.zeros(num_rows, bool),
        )

    @classmethod
    def joined(cls, parts: Sequence["Mined"]) -> "Mined":
        """The rows of all parts."""
        if len(parts) == 1:
            return parts[0]
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def put(self, rows: Array, found: "Mined") -> None:
        """Let `found` be what was found for `rows`."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(found, field.name)


def pending_mined(store: "GuideStore", info: MinedInfo) -> list[int]:
    """Numbers of the shards of rows for which nothing was mined yet, in order."""
    return pending_shards(store.path, info.kind, store.manifest)


def write_mined(store: "GuideStore", info: MinedInfo, shard: int, mined: Mined, *, replace: bool = False) -> bool:
    """Write and commit what was found for a shard of rows; False when another process had done so first.

    Args:
        store: The store.
        info: How it was mined.
        shard: Number of the shard of rows.
        mined: What was found.
        replace: Whether it takes the place of what is there.

    Raises:
        StoreError: When the disk is full, or the folder cannot be written.
    """
    columns = [fixed_size_lists(name, getattr(mined, name)) for name in _LISTS]
    for name in _NUMBERS:
        column = pa.array(getattr(mined, name))
        columns.append((pa.field(name, column.type, nullable=False), column))
    batch = pa.record_batch([column for _, column in columns], schema=pa.schema([field for field, _ in columns]))
    recipe = store.manifest.recipe(info.kind, shard)
    if replace:
        replace_shard(store.path, info.kind, shard, batch, recipe)
        return True
    return write_shard(store.path, info.kind, shard, batch, recipe)


def read_mined(shard: Shard) -> Mined:
    """What was found for a shard of rows, mapped."""
    numbers = {name: shard.batch.column(name).to_numpy(zero_copy_only=False) for name in _NUMBERS}
    ids, scores = shard.tensor(0, torch.int64).numpy(), shard.tensor(1, torch.float32).numpy()
    return Mined(negatives=ids, negative_scores=scores, **numbers)


def finish_mined(store: "GuideStore", info: MinedInfo) -> None:
    """Let what was mined be what readers of this store find.

    Raises:
        StoreError: When shards are missing, or the folder cannot be written.
    """
    if missing := pending_mined(store, info):
        raise StoreError(f"{store.path / info.kind} still lacks {len(missing)} shards: go on with --resume")
    write_json(_record_path(store, info.kind), asdict(info))


def mined_infos(store: Path) -> list[MinedInfo]:
    """What was mined of the store in a folder, in whichever of its states, the latest first.

    Raises:
        StoreError: When a record is damaged.
    """
    paths = sorted((store / "mined").glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    infos = []
    for path in paths:
        record = read_json(path)
        if record.keys() != {field.name for field in fields(MinedInfo)}:
            raise StoreError(f"{path} has other fields than expected: delete it and mine again")
        infos.append(MinedInfo(**record))
        if infos[-1].kind != f"mined/{path.stem}":
            raise StoreError(f"{path} was changed after it was written: delete it and mine again")
    return infos


def mined_info(store: Path, fingerprint: str) -> MinedInfo | None:
    """How negatives of the state of a store with this fingerprint were mined; None when they were not.

    Raises:
        StoreError: When a record is damaged.
    """
    return next((info for info in mined_infos(store) if info.store_fingerprint == fingerprint), None)


def remove_other_mined(store: "GuideStore") -> None:
    """Remove all that was mined for other states of the store, or otherwise; no reader of this one misses it."""
    info = mined_info(store.path, store.fingerprint)
    folder = store.path / "mined"
    kinds = {f"mined/{path.stem}" for path in folder.iterdir()} if folder.is_dir() else set()
    for kind in kinds - {info.kind if info else ""}:
        # The record goes first: without it the rest is not there.
        _record_path(store, kind).unlink(missing_ok=True)
        for commit in commits_of(store.path, kind):
            commit.unlink(missing_ok=True)
        shutil.rmtree(store.path / kind, ignore_errors=True)


def _record_path(store: "GuideStore", kind: str) -> Path:
    return store.path / f"{kind}.json"
