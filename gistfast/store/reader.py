"""Reading a store: texts, rows of text ids, guide vectors and scores, mapped from disk.

Shapes: N ids, R rows, C columns, G guide width.
"""

from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch

from gistfast.errors import StoreError
from gistfast.store.manifest import Manifest
from gistfast.store.replace import replacement_of
from gistfast.store.shards import Shard, open_shard, pending_shards, read_commit
from gistfast.store.texts import Texts

if TYPE_CHECKING:
    from datasets import Dataset

Array = np.ndarray[Any, Any]
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class GuideStore:
    """A finished guide store, open for reading; made by `GuideStore.open`.

    It pickles as its path and is opened again on the other side: it travels to the workers of a loader.

    Attributes:
        path: Folder of the store.
        manifest: What store.json says: guide, data, plan.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `open`, which checks what is there."""
        self.path = path
        self.manifest = manifest
        self._open_shards: dict[tuple[str, int], Shard] = {}

    @classmethod
    def open(cls, path: str | Path) -> "GuideStore":
        """The store at `path`.

        Raises:
            StoreError: When there is none, stage 1 has not finished it, or a newer gistfast wrote it.
        """
        folder = Path(path).absolute()
        if not folder.exists() and replacement_of(folder).exists():
            raise StoreError(
                f"{folder} is missing, its replacement was interrupted: "
                "run the same `gistfast precompute ... --overwrite` again"
            )
        manifest = Manifest.read(folder)
        total = len(manifest.plan.texts)
        if missing := len(pending_shards(folder, "vectors", manifest.plan)):
            raise StoreError(
                f"{folder} is not finished: stage 1 has {total - missing} of {total} shards: "
                "run `gistfast precompute ... --resume`"
            )
        return cls(folder, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of guide and data: 32 hex digits."""
        return self.manifest.fingerprint

    @property
    def num_rows(self) -> int:
        """Rows (R)."""
        return self.manifest.data.num_rows

    @property
    def num_texts(self) -> int:
        """Entries of text; ids run from 0 to one less."""
        return self.manifest.data.num_texts

    @property
    def width(self) -> int:
        """Numbers in a guide vector (G)."""
        return self.manifest.guide.width

    @property
    def columns(self) -> tuple[str, ...]:
        """Canonical column names: anchor, positive, negative_1, ..."""
        return self.manifest.data.columns

    @cached_property
    def texts(self) -> Texts:
        """All texts by entry id, read when asked for: `store.texts[7]`, `store.texts.take(ids)`."""
        return Texts(self.manifest.plan.texts, lambda shard: self._shard("texts", shard).batch.column("text"))

    @cached_property
    def rows(self) -> Array:
        """Entry ids of every row, (R, C) int64; mapped for one shard, read at once for several."""
        return _joined([self.rows_of(shard) for shard in range(len(self.manifest.plan.rows))])

    @cached_property
    def held_out(self) -> Array:
        """Whether each row is held out of training, (R,) bool."""
        shards = range(len(self.manifest.plan.rows))
        return _joined([_unpacked(self._shard("rows", shard).batch.column("held_out")) for shard in shards])

    @cached_property
    def pair_scores(self) -> Array:
        """Guide score of each row's anchor with its other columns, (R, C - 1) float32.

        Raises:
            StoreError: When they were not all written.
        """
        total = len(self.manifest.plan.rows)
        if missing := len(pending_shards(self.path, "scores", self.manifest.plan)):
            raise StoreError(
                f"{self.path} has pair scores for {total - missing} of {total} shards: "
                "run `gistfast precompute ... --resume`"
            )
        shards = [self._shard("scores", shard) for shard in range(total)]
        return _joined([shard.tensor(0, torch.float32).numpy() for shard in shards])

    def rows_of(self, shard: int) -> Array:
        """Entry ids of the rows of one shard, (rows of the shard, C) int64, mapped."""
        ids: Array = self._shard("rows", shard).tensor(0, torch.int64).numpy()
        return ids

    def vectors_of(self, shard: int) -> torch.Tensor:
        """Guide vectors of one shard of texts, (texts of the shard, G) in the stored dtype, mapped."""
        return self._shard("vectors", shard).tensor(0, _DTYPES[self.manifest.guide.dtype])

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Guide vectors of the entries `ids`, in the stored dtype, on the CPU.

        Args:
            ids: Integers of any shape, in any order, repeats allowed.

        Returns:
            (*ids.shape, G).

        Raises:
            StoreError: When an id is out of range.
        """
        flat = self._checked(ids).numpy()
        if len(self.manifest.plan.texts) == 1:
            vectors = self.vectors_of(0).numpy().take(flat, axis=0)
        else:
            vectors = self._gather_from_shards(flat)
        return torch.from_numpy(vectors).view(*ids.shape, self.width)

    def identity(self, ids: torch.Tensor) -> torch.Tensor:
        """Text identity of the entries `ids`, int64 of the same shape, on the CPU.

        Two entries share it when they are the same text, under whichever prompt.

        Raises:
            StoreError: When an id is out of range.
        """
        flat = self._checked(ids)
        guide = self.manifest.guide
        if guide.query_prompt != guide.document_prompt:
            flat = self._identities[flat]
        return flat.view(ids.shape)

    def to_dataset(self, split: Literal["train", "held_out"]) -> "Dataset":
        """The rows of a split as a dataset for sentence-transformers' trainer.

        Columns: anchor, positive, negative_1, ... as text, and `label`, the list of their entry ids. It is
        written once to the cache folder of `datasets` and mapped from there.

        Raises:
            StoreError: When the split has no rows.
        """
        from gistfast.store.export import dataset_of

        return dataset_of(self, split)

    def verify(self) -> list[str]:
        """What is wrong with the files of the store, in plain words; empty when all is sound.

        Reads every byte.
        """
        from gistfast.store.verify import problems_of

        return problems_of(self.path, self.manifest)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        store = GuideStore.open(state["path"])
        if store.fingerprint != state["fingerprint"]:
            raise StoreError(f"{state['path']} was replaced by another store while in use: start again")
        self.__dict__.update(store.__dict__)

    def _shard(self, kind: str, index: int) -> Shard:
        key = (kind, index)
        if key not in self._open_shards:
            commit = read_commit(self.path, kind, index, plan=self.manifest.plan, recipe=self.manifest.recipe)
            self._open_shards[key] = open_shard(self.path, commit)
        return self._open_shards[key]

    @cached_property
    def _identities(self) -> torch.Tensor:
        batches = [self._shard("texts", shard).batch for shard in range(len(self.manifest.plan.texts))]
        return torch.from_numpy(np.concatenate([batch.column("identity").to_numpy() for batch in batches]))

    def _checked(self, ids: torch.Tensor) -> torch.Tensor:
        flat = ids.detach().reshape(-1).to("cpu", torch.int64)
        if flat.numel():
            low, high = (int(bound) for bound in flat.aminmax())
            if low < 0 or high >= self.num_texts:
                raise StoreError(
                    f"ids from {low} to {high} asked of {self.path}, which holds {self.num_texts} texts: "
                    "take ids from this store's rows"
                )
        return flat

    def _gather_from_shards(self, ids: Array) -> Array:
        # Shards are read in turn, each from its start to its end. NumPy, because it writes whole rows to
        # scattered places 1.5 times as fast as torch, and starts no threads in a loader's worker.
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        starts = self.texts.starts
        bounds = np.searchsorted(ordered, starts)
        vectors = np.empty((len(ids), self.width), dtype=self.manifest.guide.dtype)
        for shard, (first, last) in enumerate(pairwise(bounds)):
            if first < last:
                local = ordered[first:last] - starts[shard]
                vectors[order[first:last]] = self.vectors_of(shard).numpy().take(local, axis=0)
        return vectors


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _unpacked(flags: pa.Array) -> Array:
    array: Array = flags.to_numpy(zero_copy_only=False)
    return array
