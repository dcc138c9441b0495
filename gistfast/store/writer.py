"""Writing a store: rows in, then the guide's vectors shard by shard.

A store appears under its name once all its rows are in; from then on any number of processes may add vectors.
"""

import logging
import shutil
from pathlib import Path
from typing import Self

from gistfast.errors import StoreError
from gistfast.rows.dataset import Rows, RowSource
from gistfast.store.info import GuideInfo, GuideScore
from gistfast.store.ingest import Ingest
from gistfast.store.manifest import PLAN_NAME, Manifest
from gistfast.store.plan import (
    FolderLock,
    finish_plan,
    is_store,
    missing_vectors,
    read_finished,
    read_plan,
    refuse_missing_vectors,
    remove_unplanned,
)
from gistfast.store.reader import GuideStore
from gistfast.store.replace import ReadingFolder, remove_leftovers, replace_store, replacement_of
from gistfast.store.request import Mode, Request, refuse_unless_free
from gistfast.store.sources_seen import keep_fingerprint, recall_fingerprint
from gistfast.store.vectors import VectorShards

logger = logging.getLogger(__name__)


class StoreWriter:
    """One store being written; made by `StoreWriter.create`.

    Attributes:
        path: Where the store is, or will be, written: its own name, or one beside it until `publish`.
    """

    def __init__(self, final_path: Path, path: Path, request: Request) -> None:
        """Use `create`, which finds out where to write and what is there already."""
        self.path = path
        self._final_path = final_path
        self._request = request
        self._plan: Manifest | None = None
        self._ingest: Ingest | None = None
        # Rows are read into a folder of their own, or into a store that no one else may add to meanwhile.
        self._folder: ReadingFolder | None = None
        self._lock: FolderLock | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        guide: GuideInfo,
        source: RowSource,
        holdout: float | None = None,
        mode: Mode = "new",
        split_roles: bool = False,
        guide_weight: float = 1.0,
        guide_score: GuideScore | None = None,
    ) -> "StoreWriter":
        """A writer for the store at `path`, new or to go on with.

        Args:
            path: Folder of the store.
            guide: The guide whose vectors will be written.
            source: The rows.
            holdout: Share of the distinct positives to hold out, 0 to 1; when None, as the store has it, and none
                of a new one.
            mode: "new" makes a store where none is. "resume" goes on with one that is there, or with an
                overwrite that was interrupted. "overwrite" makes it anew; the one that is there keeps its place
                until `publish`. "append" adds rows that the store does not have, "add_guide" another guide.
            split_roles: Give a text one entry for each role even where the guide reads both alike, for guides
                that are added later.
            guide_weight: Weight of a guide that is added.
            guide_score: How scores of several guides become one; when None, as the store has it.

        Raises:
            StoreError: When something is at `path` that the mode does not allow to touch, or the store there was
                made with another guide or other data (the first field that differs is named).
        """
        # A link keeps pointing at the store when another one takes its place.
        final = Path(path).resolve()
        refuse_unless_free(final, mode)
        remove_leftovers(final)
        request, replacement = Request(guide, source, holdout, split_roles), replacement_of(final)
        recall_fingerprint(replacement if replacement.exists() else final, source)
        interrupted = mode in ("overwrite", "resume") and request.made(replacement)
        target = replacement if interrupted or (mode == "overwrite" and is_store(final)) else final
        writer = cls(final, target, request)
        try:
            if mode == "append" and is_store(target):
                writer._begin_append()
            elif mode == "add_guide":
                writer._add_guide(guide_weight, guide_score)
            elif interrupted or (mode == "resume" and is_store(target)):
                logger.info("going on with %s", target)
                writer._adopt(read_plan(target))
            else:
                writer._begin(request.new_store())
        except BaseException:
            writer.close()
            raise
        return writer

    @property
    def guide(self) -> GuideInfo:
        """The guide whose vectors are written."""
        return self._request.guide

    @property
    def needs_rows(self) -> bool:
        """Whether rows are to be added; False when the store had them already."""
        return self._plan is None

    @property
    def manifest(self) -> Manifest:
        """What the store will be.

        Raises:
            StoreError: While rows are missing.
        """
        if self._plan is None:
            raise StoreError(f"{self._final_path} lacks its rows: add them and call finish_rows first")
        return self._plan

    def add_rows(self, rows: Rows) -> None:
        """Add a batch of rows; each distinct text is kept once.

        Raises:
            StoreError: When the disk is full or the folder cannot be written.
        """
        if self._ingest is None:
            raise StoreError(f"{self._final_path} has its rows already: ask needs_rows before adding some")
        self._ingest.add(rows)

    def finish_rows(self) -> None:
        """Plan the store with all its rows, and no vectors of them yet; a new one appears under its name.

        When another process finished the same store first, its rows are taken and this one's removed.

        Raises:
            DataError: When no row was added.
            StoreError: When another store took the name, or the folder cannot be written.
        """
        if self._ingest is None:
            raise StoreError(f"{self._final_path} has its rows already: ask needs_rows before finishing them")
        plan = self._ingest.finish(skipped=self._request.source.skipped)
        new = plan.data.segments[-1]
        if self._folder is not None:
            plan.write(self._folder.path / PLAN_NAME)
            if not self._folder.move_to(self.path):
                logger.info("another process finished the rows of %s first: going on with them", self._final_path)
            self._folder = None
            self._adopt(read_plan(self.path))
        elif new.num_rows:
            plan.write(self.path / PLAN_NAME)
            keep_fingerprint(self.path, self._request.source)
            self._plan = plan
            logger.info("%d rows and %d texts are new, %d rows were there", new.num_rows, new.num_texts, new.repeated)
        else:
            self._plan = read_finished(self.path)
            logger.info("all %d rows were there already: %s stays as it is", new.repeated, self.path)
        self.close()

    @property
    def vectors(self) -> VectorShards:
        """The shards of vectors: what workers read and write.

        Raises:
            StoreError: While rows are missing.
        """
        return VectorShards(self.path, self.manifest, self.guide)

    def missing_vectors(self) -> dict[str, int]:
        """How many shards of vectors are missing of each guide that lacks some, by its name."""
        return missing_vectors(self.path, self.manifest)

    def store(self) -> GuideStore:
        """The store to be, for what is made of its vectors before others may read it.

        Raises:
            StoreError: When vectors are missing.
        """
        refuse_missing_vectors(self.path, self.manifest)
        return GuideStore(self.path, self.manifest)

    def publish(self) -> Path:
        """Let what was written be the store, in one step; its folder.

        Raises:
            StoreError: When vectors are missing, or the folders cannot be renamed.
        """
        refuse_missing_vectors(self.path, self.manifest)
        finish_plan(self.path, self.manifest)
        if self.path != self._final_path:
            replace_store(self._final_path)
            self.path = self._final_path
        return self.path

    def close(self) -> None:
        """Remove rows that were not finished; a store that has appeared stays as it is."""
        if self._folder is not None:
            self._folder.remove()
        if self._lock is not None:
            self._lock.release()
        self._folder = self._ingest = self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, plan: Manifest) -> None:
        """Start a store."""
        if self.path != self._final_path:
            # What is left of a replacement that was begun with other settings.
            shutil.rmtree(self.path, ignore_errors=True)
        self._folder = ReadingFolder(self._final_path)
        self._ingest = Ingest(self._folder.path, plan)

    def _begin_append(self) -> None:
        """Start a segment, or go on with the one that these rows have."""
        self._lock = FolderLock(self.path)
        plan = read_plan(self.path)
        if self._request.has_rows_in(plan):
            logger.info("%s has the rows of %s already", self.path, self._request.source.description)
            self._adopt(plan)
            self.close()
            return
        if (self.path / PLAN_NAME).is_file():
            raise StoreError(
                f"{self.path} is not finished: complete it with --resume and {plan.data.segments[-1].description}, "
                "or give up what is unfinished with `gistfast store gc --unfinished`"
            )
        self._request.refuse_difference(self.path, plan)
        remove_unplanned(self.path, plan)
        self._ingest = Ingest(self.path, plan.with_segment(self._request.segment))

    def _add_guide(self, weight: float, guide_score: GuideScore | None) -> None:
        """Plan the store with this guide beside those that it has."""
        self._lock = FolderLock(self.path)
        plan = read_plan(self.path)
        wanted = self._request.with_guide(self.path, plan, weight, guide_score or plan.guide_score)
        if wanted != plan:
            if (self.path / PLAN_NAME).is_file():
                raise StoreError(f"{self.path} is not finished: complete it first with --resume, then add the guide")
            wanted.write(self.path / PLAN_NAME)
        self._adopt(wanted)
        self.close()

    def _adopt(self, plan: Manifest) -> None:
        """Go on with the store that is there, if it is the one asked for."""
        self._request.refuse_difference(self.path, plan)
        self._request.refuse_other_rows(self.path, plan)
        keep_fingerprint(self.path, self._request.source)
        self._plan = plan
