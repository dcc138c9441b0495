"""Ranks, false negatives and hard negatives: every anchor meets every document.

Rows in training meet the documents of rows in training, so that nothing held out comes into it; held-out rows meet all
documents. Documents are the texts of all columns but the anchor's.

# R rows, C columns, Q distinct anchors, N documents, K negatives, E pairs of an anchor and a known positive
"""

import logging
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from gistfast.neighbours.exact import Asks, Found
from gistfast.neighbours.pair_scores import scores_of
from gistfast.progress import Bar, progress
from gistfast.store import GuideStore
from gistfast.store.mined import Mined, MinedInfo, finish_mined, mined_info, pending_mined, write_mined

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]


class Search(Protocol):
    """Finds the nearest documents of anchors, exactly or through an index."""

    def __call__(
        self, queries: Array, documents: Array, asks: Asks, excluded: tuple[Array, Array], number: int, bar: Bar
    ) -> Found:
        """As `gistfast.neighbours.exact.search`; the bar is advanced by Q."""


def mine(store: GuideStore, info: MinedInfo, search: Search, anew: Iterable[int] = ()) -> None:
    """Search every row's documents and write what is found into the store.

    Shards of rows that were searched so are left as they are: a stopped pass goes on where it was.

    Args:
        store: A store whose vectors are complete.
        info: What to mine.
        search: Finds neighbours.
        anew: Shards of rows that are searched again, though they are there.

    Raises:
        StoreError: When the disk is full, or the folder cannot be written.
    """
    replaced = set(anew)
    pending = sorted({*pending_mined(store, info), *replaced})
    if pending:
        corpus = Corpus(store)
        sizes = store.manifest.plan.rows
        with progress("mining negatives", total=sum(sizes[shard] for shard in pending), unit="rows") as bar:
            for shard in pending:
                mined = _mine_shard(corpus, info, search, shard, bar)
                write_mined(store, info, shard, mined, replace=shard in replaced)
    # Of several records the newest counts; where it is this one, nothing is left to write.
    if pending or mined_info(store.path, store.fingerprint) != info:
        finish_mined(store, info)


def _mine_shard(corpus: "Corpus", info: MinedInfo, search: Search, shard: int, bar: Bar) -> Mined:
    rows = corpus.store.rows_of(shard)
    first = sum(corpus.store.manifest.plan.rows[:shard])
    held_out = corpus.store.held_out[first : first + len(rows)]
    mined = Mined.empty(len(rows), info.negatives)
    for split in (False, True):
        (selected,) = np.nonzero(held_out == split)
        if len(selected):
            documents = corpus.all_documents if split else corpus.training_documents
            mined.put(selected, _mine_rows(corpus, documents, rows[selected], info, search, bar))
    return mined


def _mine_rows(corpus: "Corpus", documents: Array, rows: Array, info: MinedInfo, search: Search, bar: Bar) -> Mined:
    """What is found for rows (R, C) among the documents (N,)."""
    anchors, query_of = np.unique(rows[:, 0], return_inverse=True)
    known = KnownPositives(corpus, anchors, documents)
    positive_scores = known.score_of(query_of, rows[:, 1])
    order = np.argsort(query_of, kind="stable")
    asks = Asks(
        queries=query_of[order],
        thresholds=positive_scores[order],
        ceilings=ceiling(positive_scores[order], info.margin, info.margin_strategy),
    )
    num_own = rows.shape[1] - 2
    begun = bar.done
    found = search(anchors, documents, asks, known.excluded, info.negatives + num_own, bar)
    bar.advance(begun + len(rows) - bar.done)
    ids, scores = _without(found.ids, found.scores, rows[order, 2:], info.negatives)
    mined = Mined(
        positive_rank=(1 + found.above + known.number_above(asks.queries, asks.thresholds)).astype(np.int32),
        false_negatives=found.above.astype(np.int32),
        negatives=ids,
        negative_scores=scores,
        truncated=found.cut,
    )
    in_order = Mined.empty(len(rows), info.negatives)
    in_order.put(order, mined)
    return in_order


def ceiling(positive_scores: Array, margin: float, strategy: str) -> Array:
    """The guide score (R,) that a negative must not exceed, given that of the row's positive."""
    share = np.abs(positive_scores) if strategy == "relative" else np.float32(1)
    result: Array = positive_scores - share * np.float32(margin)
    return result


def _without(ids: Array, scores: Array, own: Array, number: int) -> tuple[Array, Array]:
    """The first `number` of ids (R, L) and scores that are not among the row's own negatives (R, C - 2)."""
    is_own = (ids[:, :, None] == own[:, None, :]).any(axis=2)
    order = np.argsort(is_own, axis=1, kind="stable")[:, :number]
    gone = np.take_along_axis(is_own, order, axis=1)
    kept_ids, kept_scores = (np.take_along_axis(values, order, axis=1) for values in (ids, scores))
    return np.where(gone, -1, kept_ids), np.where(gone, np.float32(-np.inf), kept_scores)


class Corpus:
    """The documents of a store, and the positives that its rows name for each anchor text.

    Attributes:
        store: The store.
    """

    def __init__(self, store: GuideStore) -> None:
        self.store = store

    @cached_property
    def all_documents(self) -> Array:
        """Entry ids of the texts of all columns but the anchor's, (N,), ascending."""
        return self._entries_in(self.store.rows[:, 1:])

    @cached_property
    def training_documents(self) -> Array:
        """The same of the rows that are not held out."""
        return self._entries_in(self.store.rows[~self.store.held_out, 1:])

    def _entries_in(self, ids: Array) -> Array:
        present = np.zeros(self.store.num_texts, bool)
        present[ids] = True
        return np.flatnonzero(present)

    @cached_property
    def _pairs(self) -> tuple[Array, Array]:
        """Identity of the anchor and entry of the positive of every row, ordered by the identity."""
        anchors = self.identity(self.store.rows[:, 0])
        order = np.argsort(anchors, kind="stable")
        return anchors[order], self.store.rows[order, 1]

    def identity(self, ids: Array) -> Array:
        """Text identity of entries."""
        return self.store.identity(torch.from_numpy(np.ascontiguousarray(ids))).numpy()

    def positives_of(self, identities: Array) -> tuple[Array, Array]:
        """Positives of anchor texts (Q,): the text's place among the Q, and the positive's entry, (E,) each."""
        anchors, positives = self._pairs
        first, last = (np.searchsorted(anchors, identities, side=side) for side in ("left", "right"))
        counts = last - first
        query = np.repeat(np.arange(len(identities)), counts)
        within = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
        return query, positives[np.repeat(first, counts) + within]


class KnownPositives:
    """What is known to fit the anchors of some rows, and how well the guide finds that it fits."""

    def __init__(self, corpus: Corpus, anchors: Array, documents: Array) -> None:
        """Score the positives of all rows with the same anchor text.

        Args:
            corpus: The rows.
            anchors: Entry ids of distinct anchors, (Q,).
            documents: Entry ids of what the anchors meet, (N,), ascending.
        """
        self._stride = corpus.store.num_texts
        identities = corpus.identity(anchors)
        query, positive = corpus.positives_of(identities)
        # One number for a pair, in the order of pairs.
        self._pairs = np.unique(query * self._stride + positive)
        query, positive = np.divmod(self._pairs, self._stride)
        self._scores = scores_of(corpus.store, anchors[query], positive)
        same_text = corpus.identity(positive) == identities[query]
        places = np.minimum(np.searchsorted(documents, positive), len(documents) - 1)
        met = ~same_text & (documents[places] == positive)
        self._keys = np.sort(_key(query[met], self._scores[met]))
        self.excluded = self._with_own_texts(corpus, documents, identities, query, positive)

    def score_of(self, query: Array, positive: Array) -> Array:
        """Guide scores (R,) of anchors, by their place among the Q, with their positives."""
        scores: Array = self._scores[np.searchsorted(self._pairs, query * self._stride + positive)]
        return scores

    def number_above(self, query: Array, scores: Array) -> Array:
        """How many known positives, other than the anchor's own text, score above, (R,)."""
        end = np.searchsorted(self._keys, _key(query + 1, np.full(len(query), -2.0)))
        above: Array = end - np.searchsorted(self._keys, _key(query, scores), side="right")
        return above

    @staticmethod
    def _with_own_texts(
        corpus: Corpus, documents: Array, identities: Array, query: Array, positive: Array
    ) -> tuple[Array, Array]:
        """Pairs of query and document that are no negatives: known positives, and documents of the same text."""
        texts = corpus.identity(documents)
        order = np.argsort(texts, kind="stable")
        places = np.minimum(np.searchsorted(texts, identities, sorter=order), len(texts) - 1)
        (own,) = np.nonzero(texts[order[places]] == identities)
        return np.concatenate([query, own]), np.concatenate([positive, documents[order[places[own]]]])


def _key(query: Array, scores: Array) -> Array:
    """Numbers that ascend with the query, and among those of one query with the score."""
    key: Array = query * 4.0 + scores
    return key
