"""Mending a store: what is bad is made again, all else stays as it is.

A new file is whole before it takes the place of the bad one: readers may go on, and a repair that was stopped goes on
where it was, because what it had mended is sound when it looks again.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from gistfast.engines.shards import embed_by_role
from gistfast.errors import DataError, ModelError, StoreError
from gistfast.guides.batch_done import advancing
from gistfast.guides.recorded_guide import open_recorded_guide
from gistfast.models.pretrained import pick_device
from gistfast.neighbours.index import index_path
from gistfast.neighbours.index_check import index_problem, rebuild_index
from gistfast.neighbours.index_search import choose_search
from gistfast.neighbours.mining import mine
from gistfast.neighbours.pair_scores import score_pairs
from gistfast.progress import progress
from gistfast.rows.dataset import RowSource, read_rows
from gistfast.settings.base import build
from gistfast.settings.store import StoreRepairSettings
from gistfast.store import GuideStore, Manifest
from gistfast.store.mined import mined_info
from gistfast.store.plan import FolderLock, missing_vectors, refuse_no_store
from gistfast.store.repair import VectorsAgain, remake_rows
from gistfast.store.shards import committed_shards
from gistfast.store.verify import BadShard, Findings, check_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repaired:
    """What came of a repair.

    Attributes:
        mended: What was made again, such as "vectors/3f9a01c2 shard 4" or "index".
        left: What is still wrong and what to do about it, one line each; empty when all is sound.
    """

    mended: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def repair(store: str | Path, **options: Any) -> Repaired:
    """Make the bad shards of a store again: vectors by their guide, texts and rows from their source.

    Args:
        store: Folder of the store.
        **options: The other fields of `gistfast.settings.store.StoreRepairSettings`.

    Raises:
        ConfigError: For an unknown or bad option.
        DataError: When the source cannot be read.
        DependencyError: When the index is bad and faiss is not installed.
        StoreError: When there is no store, the source is another one, or the store cannot be written.
        VectorError: When the guide gives a vector that is zero or not finite.
    """
    settings = build(StoreRepairSettings, {**options, "store": store})
    path = Path(settings.store).resolve()
    refuse_no_store(path)
    # Meanwhile nobody else adds rows, repairs or clears up; others may read, and add vectors.
    with FolderLock(path):
        found = check_store(path, deep=True)
        # Without a plan nothing says what is to be there.
        return _Repair(path, settings, found).run() if found.plans else Repaired(left=found.problems)


class _Repair:
    def __init__(self, store: Path, settings: StoreRepairSettings, found: Findings) -> None:
        self._store = store
        self._settings = settings
        self._found = found
        # What is under way has all shards of the store, but for its scores.
        self._plan = found.plans[-1]
        self._bad = list(found.shards)
        self._result = Repaired(left=list(found.others))

    def run(self) -> Repaired:
        """Mend each kind after those that it is made of."""
        if rows := self._bad_of("texts", "rows"):
            self._mend_rows(rows)
        changed = self._mend_vectors()
        for plan in self._found.plans:
            self._mend_scores(plan, changed)
            self._mend_index(plan)
            self._mend_mined(plan)
        return self._result

    def _mend_rows(self, bad: list[BadShard]) -> None:
        segments = self._plan.data.segments
        source = self._source({segments[self._segment(shard)].fingerprint for shard in bad})
        for number, group in groupby(sorted(bad, key=self._segment), key=self._segment):
            shards, segment = list(group), segments[number]
            if source is None or source.fingerprint != segment.fingerprint:
                where = f"{segment.description} (fingerprint {segment.fingerprint})"
                self._leave(shards, f"give --source with {where}, restore it, or make the store anew with --overwrite")
            elif any(self._segment(shard) < number for shard in self._bad_of("texts", "rows")):
                self._leave(shards, "mend the texts and rows that came in before it first")
            else:
                places = [(shard.kind, shard.index) for shard in shards]
                remake_rows(self._store, self._plan, number, source, places)
                self._mended(shards)

    def _source(self, wanted: Collection[str]) -> RowSource | None:
        """The source that was given; it must have one of the wanted fingerprints."""
        given = self._settings
        if given.source is None:
            return None
        # Rows that were skipped when it was read first are skipped again: it has the same contents.
        source = read_rows(
            given.source,
            columns=given.columns,
            subset=given.subset,
            split=given.split,
            revision=given.revision,
            on_bad_row="skip",
        )
        if source.fingerprint not in wanted:
            raise StoreError(
                f"{source.description} ({source.fingerprint}) is not what the bad texts and rows of {self._store} "
                f"came from ({', '.join(sorted(wanted))}): give the same source and --columns"
            )
        return source

    def _mend_vectors(self) -> bool:
        """Whether any vectors are now others than those that scores and index were made of."""
        changed = False
        bad_texts = {shard.index for shard in self._bad_of("texts")}
        bad = sorted(self._bad_of("vectors"), key=lambda shard: (shard.kind, shard.index))
        for kind, group in groupby(bad, key=lambda shard: shard.kind):
            shards = list(group)
            self._leave([shard for shard in shards if shard.index in bad_texts], "mend its texts first")
            shards = [shard for shard in shards if shard.index not in bad_texts]
            if not shards:
                continue
            number, numbers = self._plan.vectors.index(kind), [shard.index for shard in shards]
            try:
                guide = open_recorded_guide(self._store, self._plan, number, self._settings, bad=numbers)
            except (DataError, ModelError, StoreError) as error:
                self._leave(shards, str(error))
                continue
            again = VectorsAgain(self._store, self._plan, self._plan.guides[number])
            with progress("embedding texts again", total=sum(again.sizes[n] for n in numbers), unit="texts") as bar:
                for shard in shards:
                    texts, roles = again.texts_of(shard.index), again.roles_of(shard.index)
                    again.write(shard.index, embed_by_role(guide, texts, roles, advancing(bar)))
                    self._mended([shard])
            changed = changed or bool(again.changed)
        if changed:
            logger.info("vectors differ from those that were lost in their last bits: scores and index are made again")
        return changed

    def _mend_scores(self, plan: Manifest, changed: bool) -> None:
        bad = [shard for shard in self._bad_of("scores") if shard.kind == plan.scores]
        anew = committed_shards(self._store, plan.scores) if changed else set()
        anew |= {shard.index for shard in bad}
        if not anew:
            return
        if self._bad_of("texts", "rows", "vectors") or missing_vectors(self._store, plan):
            self._leave(bad, "mend rows and vectors first")
            return
        score_pairs(GuideStore(self._store, plan), anew)
        self._mended(bad)

    def _mend_index(self, plan: Manifest) -> None:
        store = GuideStore(self._store, plan)
        vectors_are_sound = not (self._bad_of("vectors") or missing_vectors(self._store, plan))
        # Vectors that were mended to the last bit leave it sound, others do not.
        stale = vectors_are_sound and index_problem(store, deep=False) is not None
        if not stale and plan.fingerprint not in self._found.indexes:
            return
        if not vectors_are_sound:
            self._result.left.append(f"{index_path(store, '.faiss')}: mend the vectors first, then it is built again")
            return
        rebuild_index(store)
        self._result.mended.append("index")

    def _mend_mined(self, plan: Manifest) -> None:
        info = mined_info(self._store, plan.fingerprint) if self._bad_of("mined") else None
        bad = [shard for shard in self._bad_of("mined") if info is not None and shard.kind == info.kind]
        if info is None or not bad:
            return
        if self._bad_of("texts", "rows", "vectors"):
            self._leave(bad, "mend rows and vectors first")
            return
        store = GuideStore(self._store, plan)
        search = choose_search(store, pick_device(self._settings.device))
        mine(store, info, search, [shard.index for shard in bad])
        self._mended(bad)

    def _segment(self, shard: BadShard) -> int:
        return self._plan.segment_of(shard.kind, shard.index)

    def _bad_of(self, *folders: str) -> list[BadShard]:
        """What is still bad of these kinds."""
        return [shard for shard in self._bad if shard.kind.partition("/")[0] in folders]

    def _mended(self, shards: list[BadShard]) -> None:
        self._bad = [shard for shard in self._bad if shard not in shards]
        self._result.mended.extend(f"{shard.kind} shard {shard.index}" for shard in shards)

    def _leave(self, shards: list[BadShard], reason: str) -> None:
        self._result.left.extend(f"{self._store / shard.kind} shard {shard.index}: {reason}" for shard in shards)
