"""The guide store: texts, rows of text ids, guide vectors and scores of one corpus under one guide.

    manifest   what store.json says            files     how a file reaches the disk whole
    shards     one shard and its commit        keys      which texts were seen before
    writer     rows in, vectors in             reader    everything out
    replace    a new store takes an old one's place

The layout on disk is written down in docs/store-format.md.
"""

from gistfast.store.manifest import DataInfo, GuideInfo, Manifest, Plan
from gistfast.store.reader import GuideStore
from gistfast.store.scores import pending_scores, write_scores
from gistfast.store.writer import StoreWriter

__all__ = [
    "DataInfo",
    "GuideInfo",
    "GuideStore",
    "Manifest",
    "Plan",
    "StoreWriter",
    "pending_scores",
    "write_scores",
]
