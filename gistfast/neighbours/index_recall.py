"""How well an index finds what exact search finds, and how many of its lists a query must look into for that.

# Q sampled queries, K neighbours
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gistfast.neighbours.exact import search
from gistfast.neighbours.pair_scores import scores_of
from gistfast.neighbours.scorer import Scorer
from gistfast.store import GuideStore

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

WANTED_RECALL = 0.95
NUM_QUERIES = 256
NUM_NEIGHBOURS = 10
# Scores closer than half precision tells apart count as equal: any of these neighbours will do.
SCORE_TOLERANCE = 2.0**-11


@dataclass(frozen=True)
class Recall:
    """What was measured.

    Attributes:
        num_probes: Lists that a query looks into; 1 for an index without lists.
        num_lists: Lists of the index, likewise.
        recall_at_10: Share of the ten nearest by exact search that the index finds, 0 to 1.
        num_queries: Stored vectors that were the sample's queries (Q).
    """

    num_probes: int
    num_lists: int
    recall_at_10: float
    num_queries: int


def tune(faiss: Any, store: GuideStore, index: Any, *, has_lists: bool) -> Recall:
    """Let the index look into as many lists as it takes to find enough; how much that is.

    Args:
        faiss: The module.
        store: Whose vectors are in the index.
        index: Full; its `nprobe` is set.
        has_lists: Whether it is an IVF index.
    """
    generator = np.random.default_rng(0)
    queries = np.sort(generator.choice(store.num_texts, min(NUM_QUERIES, store.num_texts), replace=False))
    number = min(NUM_NEIGHBOURS, store.num_texts)
    # An inner product is the mean of the guides' cosines, however they are joined for a score.
    scorer = Scorer(store.guide_widths)
    nearest = search(store.gather, queries, np.arange(store.num_texts), scorer=scorer, num_neighbours=number)
    vectors = scorer.unit(store.gather(torch.from_numpy(queries))).numpy()
    needed = nearest.scores[:, -1:] - SCORE_TOLERANCE

    def recall() -> float:
        _, found = index.search(vectors, number)
        pairs = np.repeat(queries, number), np.maximum(found, 0).ravel()
        scores = scores_of(store, *pairs, scorer=scorer).reshape(found.shape)
        return float(np.mean((found >= 0) & (scores >= needed)))

    if not has_lists:
        return _report(Recall(1, 1, recall(), len(queries)))
    ivf = faiss.extract_index_ivf(index)
    ivf.nprobe = 1
    measured = recall()
    while measured < WANTED_RECALL and ivf.nprobe < ivf.nlist:
        ivf.nprobe = min(2 * ivf.nprobe, ivf.nlist)
        measured = recall()
    return _report(Recall(ivf.nprobe, ivf.nlist, measured, len(queries)))


def _report(recall: Recall) -> Recall:
    searched = "all vectors" if recall.num_lists == 1 else f"{recall.num_probes} of {recall.num_lists} lists"
    logger.info("recall@10 of the index is %.3f, a query looks into %s", recall.recall_at_10, searched)
    if recall.recall_at_10 < WANTED_RECALL:
        logger.warning(
            "the index falls short of the wanted recall@10 of %.2f even in %s: allow longer codes by --index-memory",
            WANTED_RECALL,
            searched,
        )
    return recall
