"""How mining finds neighbours: by comparing everything, or, in a store too large for that, through the index.

# Q queries, A asks, L candidates that the index lists for a query, K neighbours, E exclusions
"""

import logging
from typing import Any

import numpy as np
import torch

from gistfast.neighbours.exact import Asks, Found, search
from gistfast.neighbours.index import import_faiss, load_index, read_report
from gistfast.neighbours.index_build import on_gpus
from gistfast.neighbours.index_recall import WANTED_RECALL
from gistfast.neighbours.pair_scores import scores_of
from gistfast.neighbours.scorer import Scorer
from gistfast.progress import Bar
from gistfast.store import GuideStore

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

# Texts up to which a search compares everything: hours on a CPU with the instructions for it, or on a GPU.
EXACT_AT_MOST = {"cpu": 5_000_000, "cuda": 50_000_000}
# The longest list that an index gives, on a GPU.
LONGEST_LIST = 2048
QUERIES_AT_ONCE = 256


class ExactSearch:
    """Compares every query with every document."""

    def __init__(self, store: GuideStore, device: str) -> None:
        self._store = store
        self._device = device
        self._scorer = Scorer.of(store)

    def __call__(
        self, queries: Array, documents: Array, asks: Asks, excluded: tuple[Array, Array], number: int, bar: Bar
    ) -> Found:
        """The nearest documents of each ask; see `gistfast.neighbours.exact.search`."""
        return search(
            self._store.gather,
            queries,
            documents,
            scorer=self._scorer,
            num_neighbours=number,
            asks=asks,
            excluded=excluded,
            device=self._device,
            on_queries=bar.advance,
        )


class IndexSearch:
    """Compares every query with the entries that the index finds near it."""

    def __init__(self, store: GuideStore, index: Any) -> None:
        self._store = store
        self._index = index
        self._scorer = Scorer.of(store)

    def __call__(
        self, queries: Array, documents: Array, asks: Asks, excluded: tuple[Array, Array], number: int, bar: Bar
    ) -> Found:
        """As `ExactSearch`, of the documents that were found; `cut` says where there may be more."""
        listed, scores = self._lists(queries, min(max(256, 8 * number), LONGEST_LIST, self._store.num_texts), bar)
        # Of entries that score below the last one of the list nothing is known, unless the list holds all entries.
        ends = scores.min(axis=1, where=listed >= 0, initial=np.inf)
        ends[(listed >= 0).sum(axis=1) == self._store.num_texts] = -np.inf
        is_document = np.zeros(self._store.num_texts + 1, bool)
        is_document[documents] = True
        scores[~is_document[listed] | _are_excluded(listed, excluded, self._store.num_texts)] = -np.inf
        order = np.lexsort((listed, -scores))
        listed, scores = (np.take_along_axis(values, order, axis=1) for values in (listed, scores))
        return _found(asks, listed, scores, ends, number)

    def _lists(self, queries: Array, length: int, bar: Bar) -> tuple[Array, Array]:
        """Entries near each query (Q, L), -1 for none, and their scores; -inf for none."""
        listed = np.empty((len(queries), length), np.int64)
        scores = np.empty((len(queries), length), np.float32)
        by_mean = Scorer(self._store.guide_widths)
        for first in range(0, len(queries), QUERIES_AT_ONCE):
            part = slice(first, first + QUERIES_AT_ONCE)
            vectors = by_mean.unit(self._store.gather(torch.from_numpy(queries[part]))).numpy()
            _, found = self._index.search(vectors, length)
            pairs = np.repeat(queries[part], length), np.maximum(found, 0).ravel()
            listed[part] = found
            scores[part] = np.where(found >= 0, scores_of(self._store, *pairs).reshape(found.shape), -np.inf)
            bar.advance(len(found))
        return listed, scores


def choose_search(store: GuideStore, device: str) -> ExactSearch | IndexSearch:
    """The search that a store of this size is mined with; the choice is logged.

    Args:
        store: Whose rows are to be mined.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        DependencyError: When the index is needed and faiss is not installed.
    """
    limit, report = EXACT_AT_MOST[torch.device(device).type], read_report(store)
    if store.num_texts <= limit:
        reason = f"up to {limit:,} texts everything is compared"
    elif store.guide_score != "mean" and len(store.guide_widths) > 1:
        reason = f"an index knows no {store.guide_score} of several guides"
    elif report is None:
        reason = "there is no index: this takes long"
    elif report.recall_at_10 < WANTED_RECALL:
        reason = f"the index finds {report.recall_at_10:.3f} of the ten nearest, {WANTED_RECALL} are wanted"
    else:
        logger.info("mining through the index, whose recall@10 is %.3f", report.recall_at_10)
        index = load_index(store)
        # A flat index of halves is nothing that faiss has on a GPU.
        return IndexSearch(store, index if report.kind == "flat" else on_gpus(import_faiss(), index))
    logger.info("mining by exact search: %s", reason)
    return ExactSearch(store, device)


def _are_excluded(listed: Array, excluded: tuple[Array, Array], stride: int) -> Array:
    """Which of the entries listed for each query, (Q, L), it must not meet."""
    query, entry = excluded
    pairs = np.arange(len(listed))[:, None] * stride + np.maximum(listed, 0)
    result: Array = np.isin(pairs, query * stride + entry)
    return result


def _found(asks: Asks, listed: Array, scores: Array, ends: Array, number: int) -> Found:
    """What lists (Q, L), best first, hold for each ask."""
    ids = np.full((len(asks), number), -1, np.int64)
    best = np.full((len(asks), number), -np.inf, np.float32)
    above = np.empty(len(asks), np.int64)
    for ask, query in enumerate(asks.queries):
        # Scores descend: what is above the ceiling comes first.
        first = np.searchsorted(-scores[query], -asks.ceilings[ask], side="left")
        last = min(first + number, int(np.isfinite(scores[query]).sum()))
        count = max(last - first, 0)
        ids[ask, :count], best[ask, :count] = listed[query, first:last], scores[query, first:last]
        above[ask] = np.searchsorted(-scores[query], -asks.thresholds[ask], side="left")
    too_few = ids[:, -1] < 0 if number else np.zeros(len(asks), bool)
    unseen = ends[asks.queries]
    return Found(ids=ids, scores=best, above=above, cut=(unseen > -np.inf) & (too_few | (unseen > asks.thresholds)))
