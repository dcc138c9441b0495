"""Shards made again in place of bad ones: rows and texts from their source, vectors by their guide."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from gistfast.errors import StoreError
from gistfast.progress import progress
from gistfast.rows.dataset import RowSource
from gistfast.store.files import read_json
from gistfast.store.info import GuideInfo, Segment
from gistfast.store.ingest import Ingest
from gistfast.store.manifest import Manifest
from gistfast.store.replace import ReadingFolder
from gistfast.store.shards import commit_path, read_shard, replace_shard
from gistfast.store.vectors import VectorShards


class VectorsAgain(VectorShards):
    """The shards of a guide's vectors in a store that has them already: what is written replaces them.

    Attributes:
        changed: Shards whose new vectors are not, bit for bit, those that were committed first.
    """

    def __init__(self, store: Path, plan: Manifest, guide: GuideInfo) -> None:
        """Nothing is written yet."""
        super().__init__(store, plan, guide)
        self.changed: list[int] = []

    def commit(self, shard: int, batch: pa.RecordBatch) -> bool:
        """Put vectors in the place of those of `shard`."""
        promised = _promised_hash(self.store, self.kind, shard)
        commit = replace_shard(self.store, self.kind, shard, batch, self.plan.recipe(self.kind, shard))
        if commit.xxh3_128 != promised:
            self.changed.append(shard)
        return True


def remake_rows(
    store: Path, manifest: Manifest, segment: int, source: RowSource, shards: Sequence[tuple[str, int]]
) -> None:
    """Read the rows of a segment again and put what comes of them in the place of bad shards of texts and rows.

    Args:
        store: Folder of the store; texts and rows of earlier segments are sound.
        manifest: That plans the shards.
        segment: Number of the segment.
        source: Its rows.
        shards: Kind ("texts" or "rows") and number of each bad shard.

    Raises:
        DataError: When the source cannot be read.
        StoreError: When its rows are not those of the segment, or the store cannot be written.
    """
    segments = manifest.data.segments
    known = segments[segment]
    empty = Segment(description=known.description, fingerprint=known.fingerprint)
    begun = replace(manifest, data=replace(manifest.data, segments=(*segments[:segment], empty)))
    folder = ReadingFolder(store)
    try:
        ingest = Ingest(folder.path, begun, earlier=store)
        with progress("reading rows again", total=source.num_rows, unit="rows") as bar:
            for rows in source.batches():
                ingest.add(rows)
                bar.advance(len(rows.texts[0]))
        again = ingest.finish(skipped=known.skipped)
        if again.data.segments[segment] != known:
            raise StoreError(
                f"{source.description} gives other rows than {store} has of it, although it is the same: "
                "make the store anew with --overwrite"
            )
        for kind, index in shards:
            batch = read_shard(folder.path, kind, index, again).batch
            replace_shard(store, kind, index, batch, manifest.recipe(kind, index))
    finally:
        folder.remove()


def _promised_hash(store: Path, kind: str, index: int) -> Any:
    """The hash in a shard's commit; None when the commit is lost."""
    try:
        return read_json(commit_path(store, kind, index)).get("xxh3_128")
    except StoreError:
        return None
