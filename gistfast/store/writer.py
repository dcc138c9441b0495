"""Writing a store: rows in, then the guide's vectors shard by shard.

A store appears under its name once all its rows are in; from then on any number of processes may add vectors.
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa

from gistfast.dataset import Rows, RowSource
from gistfast.errors import StoreError, VectorError
from gistfast.store.ingest import Ingest
from gistfast.store.manifest import MANIFEST_NAME, DataInfo, GuideInfo, Manifest, recipe_of
from gistfast.store.replace import ReadingFolder, remove_leftovers, replace_store, replacement_of
from gistfast.store.shards import fixed_size_lists, open_shard, pending_shards, read_commit, write_shard

logger = logging.getLogger(__name__)

Role = Literal["query", "document"]
ROLES: tuple[Role, Role] = ("query", "document")


class StoreWriter:
    """One store being written; made by `StoreWriter.create`.

    Attributes:
        path: Where the store is, or will be, written: its own name, or one beside it until `publish`.
    """

    def __init__(self, final_path: Path, path: Path, *, guide: GuideInfo, source: RowSource, holdout: float) -> None:
        """Use `create`, which finds out where to write and what is there already."""
        self.path = path
        self._final_path = final_path
        self._guide = guide
        self._source = source
        self._holdout = holdout
        self._manifest: Manifest | None = None
        self._folder: ReadingFolder | None = None
        self._ingest: Ingest | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        guide: GuideInfo,
        source: RowSource,
        holdout: float = 0.0,
        overwrite: bool = False,
        resume: bool = False,
    ) -> "StoreWriter":
        """A writer for the store at `path`, new or to go on with.

        Args:
            path: Folder of the store.
            guide: The guide whose vectors will be written.
            source: The rows.
            holdout: Share of the distinct positives to hold out, 0 to 1.
            overwrite: Make the store anew; one that is there keeps its place until `publish`.
            resume: Go on with a store that is there, or with an overwrite that was interrupted.

        Raises:
            StoreError: When something is at `path` that neither flag allows to touch, or the store there was
                made with another guide or other data (the first field that differs is named).
        """
        # A link keeps pointing at the store when another one takes its place.
        final = Path(path).resolve()
        _refuse_unless_free(final, replaceable=overwrite or resume)
        remove_leftovers(final)
        replacement = replacement_of(final)
        recipe = recipe_of(guide, source.fingerprint, source.columns, holdout)
        interrupted = (overwrite or resume) and _recipe_at(replacement) == recipe
        target = replacement if interrupted or (overwrite and _is_store(final)) else final
        writer = cls(final, target, guide=guide, source=source, holdout=holdout)
        if interrupted or (resume and _is_store(target)):
            logger.info("going on with %s", target)
            writer._adopt()
        else:
            writer._begin(recipe)
        return writer

    @property
    def needs_rows(self) -> bool:
        """Whether rows are to be added; False when the store had them already."""
        return self._manifest is None

    @property
    def manifest(self) -> Manifest:
        """What store.json says.

        Raises:
            StoreError: While rows are missing.
        """
        if self._manifest is None:
            raise StoreError(f"{self._final_path} lacks its rows: add them and call finish_rows first")
        return self._manifest

    def add_rows(self, rows: Rows) -> None:
        """Add a batch of rows; each distinct text is kept once.

        Raises:
            StoreError: When the disk is full or the folder cannot be written.
        """
        if self._ingest is None:
            raise StoreError(f"{self._final_path} has its rows already: ask needs_rows before adding some")
        self._ingest.add(rows)

    def finish_rows(self) -> None:
        """Write store.json and let the store appear under its name, with all rows and no vectors yet.

        When another process finished the same store first, its rows are taken and this one's removed.

        Raises:
            StoreError: When no row was added, or another store took the name.
        """
        if self._ingest is None or self._folder is None:
            raise StoreError(f"{self._final_path} has its rows already: ask needs_rows before finishing them")
        plan = self._ingest.finish()
        data = DataInfo(
            description=self._source.description,
            columns=self._source.columns,
            holdout=self._holdout,
            fingerprint=self._source.fingerprint,
            num_rows=self._ingest.num_rows,
            num_texts=self._ingest.num_texts,
            skipped=self._source.skipped,
        )
        Manifest(self._guide, data, plan).write(self._folder.path)
        if not self._folder.move_to(self.path):
            logger.info("another process finished the rows of %s first: going on with them", self._final_path)
        self._folder = self._ingest = None
        self._adopt()

    def pending_shards(self) -> list[int]:
        """Numbers of the shards whose vectors are not committed, by this process or another, in order."""
        return pending_shards(self.path, "vectors", self.manifest.plan)

    def texts_of(self, shard: int) -> list[str]:
        """The texts whose vectors make up `shard`, in order."""
        texts: list[str] = self._text_columns(shard).column("text").to_pylist()
        return texts

    def roles_of(self, shard: int) -> list[Role]:
        """The role under whose prompt the guide reads each text of `shard`.

        All are "query" when both prompts are the same, because one vector then serves both roles.
        """
        return [ROLES[role] for role in self._text_columns(shard).column("role").to_pylist()]

    def write_vectors(self, shard: int, vectors: np.ndarray[Any, Any]) -> bool:
        """Write and commit the guide vectors of `shard`; False when another process had done so first.

        Args:
            shard: Number of the shard.
            vectors: (texts of the shard, G) float32, in their order; stored in the guide's dtype.

        Raises:
            VectorError: When a vector is zero or not finite in the stored dtype (the text is named), or the
                array has another shape.
            StoreError: When the disk is full or the folder cannot be written.
        """
        expected = (self.manifest.plan.texts[shard], self._guide.width)
        if vectors.shape != expected:
            raise VectorError(
                f"shard {shard} got vectors of shape {vectors.shape}, expected {expected}: check the guide"
            )
        # An overflow shows as an infinite value, which is refused below with its text.
        with np.errstate(over="ignore", invalid="ignore"):
            stored = np.ascontiguousarray(vectors, dtype=self._guide.dtype)
        self._check_vectors(shard, stored)
        field, column = fixed_size_lists("vector", stored)
        batch = pa.record_batch([column], schema=pa.schema([field]))
        return write_shard(self.path, "vectors", shard, batch, self.manifest.recipe)

    def publish(self) -> Path:
        """Let a replacement take its place, in one step; the folder of the store.

        Raises:
            StoreError: When vectors are missing, or the folders cannot be renamed.
        """
        if missing := self.pending_shards():
            raise StoreError(f"{self.path} still lacks {len(missing)} shards of vectors: go on with --resume")
        if self.path != self._final_path:
            replace_store(self._final_path)
            self.path = self._final_path
        return self.path

    def close(self) -> None:
        """Remove rows that were not finished; a store that has appeared stays as it is."""
        if self._folder is not None:
            self._folder.remove()
            self._folder = self._ingest = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, recipe: str) -> None:
        """Start an empty store."""
        if self.path != self._final_path:
            # What is left of a replacement that was begun with other settings.
            shutil.rmtree(self.path, ignore_errors=True)
        self._folder = ReadingFolder(self._final_path)
        self._ingest = Ingest(
            self._folder.path,
            num_columns=len(self._source.columns),
            holdout=self._holdout,
            shared_prompt=self._guide.query_prompt == self._guide.document_prompt,
            recipe=recipe,
        )

    def _adopt(self) -> None:
        """Go on with the store that is there, if it is the one asked for."""
        manifest = Manifest.read(self.path)
        data = replace(
            manifest.data,
            fingerprint=self._source.fingerprint,
            columns=self._source.columns,
            holdout=self._holdout,
        )
        if difference := manifest.difference(Manifest(self._guide, data, manifest.plan)):
            raise StoreError(
                f"{self.path} was made from something else: {difference}: "
                "give the same settings, or --overwrite, or another --out"
            )
        self._manifest = manifest

    def _text_columns(self, shard: int) -> pa.RecordBatch:
        manifest = self.manifest
        commit = read_commit(self.path, "texts", shard, plan=manifest.plan, recipe=manifest.recipe)
        return open_shard(self.path, commit).batch

    def _check_vectors(self, shard: int, vectors: np.ndarray[Any, Any]) -> None:
        finite = np.isfinite(vectors).all(axis=1)
        good = finite & vectors.any(axis=1)
        if good.all():
            return
        bad = int(np.argmin(good))
        what = "a zero vector" if finite[bad] else "a vector that is not finite"
        entry = sum(self.manifest.plan.texts[:shard]) + bad
        text = shorten(self.texts_of(shard)[bad], 80, placeholder=" ...")
        others = int((~good).sum()) - 1
        raise VectorError(
            f"the guide gave {what} as {vectors.dtype} for text {entry}, {text!r}"
            f"{f', and {others} more like it' if others else ''}: check the guide and its --dtype"
        )


def _is_store(path: Path) -> bool:
    return (path / MANIFEST_NAME).is_file()


def _recipe_at(path: Path) -> str | None:
    """The recipe of the store at `path`; None when there is none that can be read."""
    try:
        return Manifest.read(path).recipe
    except StoreError:
        return None


def _refuse_unless_free(path: Path, *, replaceable: bool) -> None:
    if _is_store(path):
        if not replaceable:
            raise StoreError(
                f"{path} exists: go on with --resume, make it anew with --overwrite, or choose another --out"
            )
    elif path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise StoreError(f"{path} exists and is not a guide store: choose another --out")
