"""The shards of a guide's vectors: which are missing, their texts, and the way of their vectors into the store."""

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import pyarrow as pa

from gistfast.errors import StoreError, VectorError
from gistfast.models.prompts import ROLES, Role
from gistfast.store.info import GuideInfo
from gistfast.store.manifest import Manifest
from gistfast.store.plan import read_plan
from gistfast.store.shards import commit_path, fixed_size_lists, pending_shards, read_shard, write_shard

Array = np.ndarray[Any, Any]


class VectorShards:
    """The shards of one guide's vectors in a store whose rows are in.

    Any number of processes, on any number of machines, may write them at once: the first commit of a shard stands.

    Attributes:
        store: Folder of the store.
        plan: What the store will be.
        kind: Folder of the shards.
        sizes: Texts in each shard.
    """

    def __init__(self, store: Path, plan: Manifest, guide: GuideInfo) -> None:
        """Use `open`, or `StoreWriter.vectors`, which know the plan.

        Args:
            store: Folder of the store.
            plan: What the store will be.
            guide: One of its guides.
        """
        self.store = store
        self.sizes = plan.plan.texts
        self.plan = plan
        self._guide = guide
        self.kind = f"vectors/{guide.key}"

    @classmethod
    def open(cls, store: Path, guide: GuideInfo) -> "VectorShards":
        """The vectors of `guide` in the store at `store`, for a worker that knows nothing of its rows.

        Raises:
            StoreError: When there is no store, or it is to hold another guide's vectors.
        """
        plan = read_plan(store)
        if difference := plan.difference(guide, plan.data.columns, plan.data.holdout):
            raise StoreError(
                f"{store} was made with another guide: {difference}: give every worker the same guide and settings"
            )
        return cls(store, plan, guide)

    def pending(self) -> list[int]:
        """Numbers of the shards whose vectors are not committed, by this process or another, in order."""
        return pending_shards(self.store, self.kind, self.plan)

    def is_committed(self, shard: int) -> bool:
        """Whether the vectors of `shard` are there."""
        return commit_path(self.store, self.kind, shard).is_file()

    def lock_path(self, shard: int) -> Path:
        """The file that a process locks while it embeds `shard`, so that others take another one."""
        commit = commit_path(self.store, self.kind, shard)
        return commit.with_name(f".{commit.stem}.lock")

    def texts_of(self, shard: int) -> list[str]:
        """The texts whose vectors make up `shard`, in order."""
        texts: list[str] = self._text_columns(shard).column("text").to_pylist()
        return texts

    def roles_of(self, shard: int) -> list[Role]:
        """The role under whose prompt the guide reads each text of `shard`.

        All are "query" when both prompts are the same, because one vector then serves both roles.
        """
        return [ROLES[role] for role in self._text_columns(shard).column("role").to_pylist()]

    def write(self, shard: int, vectors: Array) -> bool:
        """Write and commit the vectors of `shard`; False when another process had done so first.

        Args:
            shard: Number of the shard.
            vectors: (texts of the shard, G) float32, in their order; stored in the guide's dtype.

        Raises:
            VectorError: When a vector is zero or not finite in the stored dtype (the text is named), or the
                array has another shape.
            StoreError: When the disk is full or the folder cannot be written.
        """
        expected = (self.sizes[shard], self._guide.width)
        if vectors.shape != expected:
            raise VectorError(
                f"shard {shard} got vectors of shape {vectors.shape}, expected {expected}: check the guide"
            )
        batch = vector_batch(vectors, self._guide.dtype, lambda: self.texts_of(shard), sum(self.sizes[:shard]))
        return self.commit(shard, batch)

    def commit(self, shard: int, batch: pa.RecordBatch) -> bool:
        """Write and commit a shard as it lies on disk; False when another process had done so first."""
        return write_shard(self.store, self.kind, shard, batch, self.plan.recipe(self.kind, shard))

    def _text_columns(self, shard: int) -> pa.RecordBatch:
        return read_shard(self.store, "texts", shard, self.plan).batch


def vector_batch(vectors: Array, dtype: str, texts: Callable[[], Sequence[str]], first_entry: int) -> pa.RecordBatch:
    """The columns of a shard of vectors.

    Args:
        vectors: (N, G) float32.
        dtype: In which they are stored.
        texts: Gives the N texts, to name the one whose vector is bad.
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
        text = shorten(texts()[bad], 80, placeholder=" ...")
        others = int((~good).sum()) - 1
        raise VectorError(
            f"the guide gave {what} as {stored.dtype} for text {first_entry + bad}, {text!r}"
            f"{f', and {others} more like it' if others else ''}: check the guide and its --dtype"
        )
    field, column = fixed_size_lists("vector", stored)
    return pa.record_batch([column], schema=pa.schema([field]))
