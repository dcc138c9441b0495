"""The guide's score of every pair: the loss's threshold, and the first thing to ask of a corpus.

# R rows of a block, C columns, G guide width
"""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from gistfast.progress import progress
from gistfast.store import GuideStore, pending_scores, write_scores

# Two blocks of 4,096 x 1,024 fp32 stay within 32 MiB.
ROWS_PER_BLOCK = 4096


def score_pairs(store: GuideStore) -> None:
    """Write the guide score of each row's anchor with its positive and with each negative into the store.

    Shards of rows that have their scores are left as they are, so a stopped pass goes on where it was.
    """
    pending = pending_scores(store)
    if not pending:
        return
    rows = {shard: store.rows_of(shard) for shard in pending}
    with progress("scoring pairs", total=sum(map(len, rows.values())), unit="rows") as bar:
        for shard, ids in rows.items():
            scores = np.empty((len(ids), ids.shape[1] - 1), np.float32)
            for start in range(0, len(ids), ROWS_PER_BLOCK):
                block = slice(start, start + ROWS_PER_BLOCK)
                scores[block] = _cosines(store, torch.from_numpy(ids[block]))
                bar.advance(len(ids[block]))
            write_scores(store, shard, scores)


def _cosines(store: GuideStore, ids: torch.Tensor) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """The cosines (R, C-1) of the first column's vectors with those of each other column; ids are (R, C)."""
    anchors = store.gather(ids[:, 0]).float()
    others = [store.gather(column).float() for column in ids[:, 1:].unbind(dim=1)]
    scores = torch.stack([cosine_similarity(anchors, other) for other in others], dim=1)
    return scores.numpy()
