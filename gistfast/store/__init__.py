"""The guide store: texts, rows of text ids, guide vectors and scores of one corpus under one guide.

    info       guides, data, sizes of shards   manifest  what store.json says
    files      how a file reaches disk whole   shards    one shard and its commit
    plan       what a store is becoming        keys      which texts were seen before
    ingest     rows to texts and ids           writer    rows in, vectors in
    reader     everything out                  replace   a new store takes an old one's place
    scores     guide scores of pairs           mined     ranks and hard negatives of rows
    verify     is it what was written          contents  what must hold of the values in a shard
    repair     bad shards made again           garbage   what nobody reads
    describe   what is in it, in figures

The layout on disk is written down in docs/store-format.md.
"""

from gistfast.store.info import DataInfo, GuideInfo, GuideScore, Plan, Segment
from gistfast.store.manifest import Manifest
from gistfast.store.reader import GuideStore
from gistfast.store.scores import pending_scores, write_scores
from gistfast.store.writer import StoreWriter

__all__ = [
    "DataInfo",
    "GuideInfo",
    "GuideScore",
    "GuideStore",
    "Manifest",
    "Plan",
    "Segment",
    "StoreWriter",
    "pending_scores",
    "write_scores",
]
