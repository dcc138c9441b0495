"""Reading a store: texts, rows of text ids, guide vectors and scores, mapped from disk.

Shapes: N ids, R rows, C columns, G guide width.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from gistfast.errors import StoreError
from gistfast.store.info import GuideScore
from gistfast.store.manifest import Manifest
from gistfast.store.mined import Mined, mined_info, read_mined
from gistfast.store.plan import missing_vectors, read_finished
from gistfast.store.replace import replacement_of
from gistfast.store.shards import Shard, pending_shards, read_shard
from gistfast.store.texts import Texts, by_shard

if TYPE_CHECKING:
    from datasets import Dataset

Array = np.ndarray[Any, Any]
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class GuideStore:
    """A finished guide store, open for reading; made by `GuideStore.open`.

    It pickles as its path and manifest and travels to the workers of a loader, where it is the same store, whatever was
    appended since; when another store took its place, the first look at its files is an error.

    Attributes:
        path: Folder of the store.
        manifest: What store.json says: guide, data, plan.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `open`, which checks what is there."""
        self.path = path
        self.manifest = manifest
        self._open_shards: dict[tuple[str, int], Shard] = {}
        self._travelled = False

    @classmethod
    def open(cls, path: str | Path) -> "GuideStore":
        """The store at `path`.

        Raises:
            StoreError: When there is none, stage 1 has not finished it, it has lost vectors, or another version
                of gistfast wrote it.
        """
        folder = Path(path).absolute()
        if not folder.exists() and replacement_of(folder).exists():
            raise StoreError(
                f"{folder} is missing, its replacement was interrupted: "
                "run the same `gistfast precompute ... --overwrite` again"
            )
        manifest = read_finished(folder)
        if lost := sum(missing_vectors(folder, manifest).values()):
            raise StoreError(f"{folder} has lost {lost} of its shards of vectors: run `gistfast store repair {folder}`")
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
    def guide_widths(self) -> tuple[int, ...]:
        """Numbers in a vector of each guide."""
        return tuple(guide.width for guide in self.manifest.guides)

    @property
    def guide_score(self) -> GuideScore:
        """How the scores of several guides become one: "mean", "min" or "max"."""
        return self.manifest.guide_score

    @property
    def width(self) -> int:
        """Numbers in what `gather` gives for a text (G): the vectors of all guides, side by side."""
        return sum(self.guide_widths)

    @property
    def dtype(self) -> str:
        """Of what `gather` gives: "float16", or "float32" when a guide is stored so."""
        return "float32" if any(guide.dtype == "float32" for guide in self.manifest.guides) else "float16"

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
        return _joined([self.rows_of(shard) for shard in self.manifest.shards_of("rows")])

    @cached_property
    def held_out(self) -> Array:
        """Whether each row is held out of training, (R,) bool."""
        return self._row_column("held_out")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the rows' tasks."""
        return self.manifest.data.tasks

    @cached_property
    def task_of_rows(self) -> Array:
        """The number of each row's task in `tasks`, (R,) int32; -1 for none."""
        return self._row_column("task")

    @cached_property
    def pair_scores(self) -> Array:
        """Guide score of each row's anchor with its other columns, (R, C - 1) float32.

        Raises:
            StoreError: When they were not all written.
        """
        kind, total = self.manifest.scores, len(self.manifest.plan.rows)
        if missing := len(pending_shards(self.path, kind, self.manifest)):
            raise StoreError(
                f"{self.path} has pair scores for {total - missing} of {total} shards: "
                "run `gistfast precompute ... --resume`"
            )
        return _joined([self._shard(kind, shard).tensor(0, torch.float32).numpy() for shard in range(total)])

    @cached_property
    def mined_kind(self) -> str:
        """The kind of shard that holds mined negatives.

        Raises:
            StoreError: When none were mined of this store.
        """
        if (info := mined_info(self.path, self.fingerprint)) is None:
            raise StoreError(
                f"{self.path} has no mined negatives: run `gistfast precompute ... --resume --negatives 8`"
            )
        return info.kind

    @cached_property
    def mined(self) -> Mined:
        """Rank of each row's positive, false negatives and hard negatives among all documents; see `mined_kind`."""
        shards = self.manifest.shards_of("rows")
        return Mined.joined([read_mined(self._shard(self.mined_kind, shard)) for shard in shards])

    def rows_of(self, shard: int) -> Array:
        """Entry ids of the rows of one shard, (rows of the shard, C) int64, mapped."""
        ids: Array = self._shard("rows", shard).tensor(0, torch.int64).numpy()
        return ids

    def vectors_of(self, shard: int, guide: int = 0) -> torch.Tensor:
        """A guide's vectors of one shard of texts, (texts of the shard, its width) in its stored dtype, mapped."""
        kind, dtype = self.manifest.vectors[guide], self.manifest.guides[guide].dtype
        return self._shard(kind, shard).tensor(0, _DTYPES[dtype])

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Guide vectors of the entries `ids`, on the CPU.

        The vectors of several guides stand side by side. Where the score is their mean, each is scaled by the
        root of its weight's share: the inner product of two texts is then the weighted mean of their cosines.

        Args:
            ids: Integers of any shape, in any order, repeats allowed.

        Returns:
            (*ids.shape, G) in `dtype`.

        Raises:
            StoreError: When an id is out of range.
        """
        flat = self._checked(ids).numpy()
        guides = self.manifest.guides
        if len(guides) == 1:
            vectors = self._gather_of(0, flat)
        else:
            weights = self.manifest.weights
            scales = [math.sqrt(weight / sum(weights)) if self.guide_score == "mean" else 1.0 for weight in weights]
            parts = [self._gather_of(number, flat) * np.float32(scales[number]) for number in range(len(guides))]
            vectors = np.concatenate(parts, axis=1).astype(self.dtype)
        return torch.from_numpy(vectors).view(*ids.shape, self.width)

    def identity(self, ids: torch.Tensor) -> torch.Tensor:
        """Text identity of the entries `ids`, int64 of the same shape, on the CPU.

        Two entries share it when they are the same text, under whichever prompt.

        Raises:
            StoreError: When an id is out of range.
        """
        flat = self._checked(ids)
        if not self.manifest.data.one_role:
            flat = self._identities[flat]
        return flat.view(ids.shape)

    def to_dataset(self, split: Literal["train", "held_out"], negatives: int = 0) -> "Dataset":
        """The rows of a split as a dataset for sentence-transformers' trainer.

        Columns: anchor, positive, negative_1, ... as text, and `label`, the list of their entry ids. It is
        written once to the cache folder of `datasets` and mapped from there.

        Args:
            split: Which rows.
            negatives: Mined negatives to add to each row, as `gistfast.store.export.rows_with_negatives` has them.

        Raises:
            ConfigError: When fewer negatives were mined.
            StoreError: When the split has no rows, or nothing was mined.
        """
        from gistfast.store.export import dataset_of

        return dataset_of(self, split, negatives)

    def verify(self, deep: bool = True) -> list[str]:
        """What is wrong with the files of the store, in plain words; empty when all is sound.

        Args:
            deep: Whether to read every byte and look at every vector; else commits and sizes of files are checked.
        """
        from gistfast.store.verify import problems_of

        return problems_of(self.path, self.manifest, deep=deep)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # An error here would end a loader's worker before it could say so.
        self.__dict__.update(state, _open_shards={}, _travelled=True)

    def _shard(self, kind: str, index: int) -> Shard:
        key = (kind, index)
        if self._travelled and not self._open_shards:
            self._refuse_another_store()
        if key not in self._open_shards:
            self._open_shards[key] = read_shard(self.path, kind, index, self.manifest)
        return self._open_shards[key]

    def _refuse_another_store(self) -> None:
        if not GuideStore.open(self.path).manifest.continues(self.manifest):
            raise StoreError(f"{self.path} was replaced by another store while in use: start again")

    def _row_column(self, name: str) -> Array:
        shards = (self._shard("rows", shard).batch for shard in self.manifest.shards_of("rows"))
        return _joined([shard.column(name).to_numpy(zero_copy_only=False) for shard in shards])

    @cached_property
    def _identities(self) -> torch.Tensor:
        batches = [self._shard("texts", shard).batch for shard in self.manifest.shards_of("texts")]
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

    def _gather_of(self, guide: int, ids: Array) -> Array:
        """The vectors of one guide, (N, its width), in its stored dtype."""
        if len(self.manifest.plan.texts) == 1:
            vectors: Array = self.vectors_of(0, guide).numpy().take(ids, axis=0)
            return vectors
        info = self.manifest.guides[guide]
        vectors = np.empty((len(ids), info.width), dtype=info.dtype)
        order, pieces = by_shard(ids, self.texts.starts)
        # NumPy, because it writes whole rows to scattered places 1.5 times as fast as torch, and starts no threads in
        # a loader's worker.
        for shard, some, local in pieces:
            vectors[order[some]] = self.vectors_of(shard, guide).numpy().take(local, axis=0)
        return vectors


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
