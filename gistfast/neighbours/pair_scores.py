"""The guides' score of every pair: the loss's threshold, and the first thing to ask of a corpus.

# R rows of a shard, C columns, P pairs
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from gistfast.neighbours.scorer import Scorer
from gistfast.progress import progress
from gistfast.store import GuideStore, pending_scores, write_scores

Array = np.ndarray[Any, Any]

# Two blocks of 4,096 x 1,024 fp32 stay within 32 MiB.
PAIRS_PER_BLOCK = 4096


def score_pairs(store: GuideStore, anew: Iterable[int] = ()) -> None:
    """Write the guide score of each row's anchor with its positive and with each negative into the store.

    Shards of rows that have their scores are left as they are, so a stopped pass goes on where it was.

    Args:
        store: A store whose vectors are complete.
        anew: Shards of rows whose scores are made again, though they are there.
    """
    replaced = set(anew)
    pending = sorted({*pending_scores(store), *replaced})
    if not pending:
        return
    rows = {shard: store.rows_of(shard) for shard in pending}
    with progress("scoring pairs", total=sum(map(len, rows.values())), unit="rows") as bar:
        for shard, ids in rows.items():
            scores = [scores_of(store, ids[:, 0], ids[:, column]) for column in range(1, ids.shape[1])]
            write_scores(store, shard, np.stack(scores, axis=1), replace=shard in replaced)
            bar.advance(len(ids))


def scores_of(store: GuideStore, left: Array, right: Array, scorer: Scorer | None = None) -> Array:
    """The guide scores (P,), fp32, of the entries left (P,) with the entries right (P,); the scorer is the store's."""
    scorer = Scorer.of(store) if scorer is None else scorer
    scores = np.empty(len(left), np.float32)
    for start in range(0, len(left), PAIRS_PER_BLOCK):
        block = slice(start, start + PAIRS_PER_BLOCK)
        x, y = (scorer.unit(store.gather(torch.from_numpy(ids[block]))) for ids in (left, right))
        scores[block] = scorer.rows(x, y).numpy()
    return scores
