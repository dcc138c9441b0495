"""The FAISS index over a store's vectors, and how well it finds what exact search finds.

# Q sampled queries, N vectors of a block, G guide width, K neighbours
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gistfast.errors import DependencyError, StoreError
from gistfast.progress import progress
from gistfast.store import GuideStore
from gistfast.store.files import durable_file, one_line_write_errors, read_json, write_json

logger = logging.getLogger(__name__)

IndexKind = Literal["auto", "flat", "ivf", "none"]
Vectors = np.ndarray[Any, np.dtype[np.float32]]

INDEX_NAME = "vectors.faiss"
REPORT_NAME = "index.json"

# Up to here a flat index answers a query within milliseconds, and nothing is lost.
FLAT_AT_MOST = 200_000
VECTORS_PER_BLOCK = 65_536

# Fewer training vectors a list make poor lists.
TRAINING_VECTORS_PER_LIST = 64
WANTED_RECALL = 0.95
NUM_QUERIES = 256
NUM_NEIGHBOURS = 10

# Scores closer than this count as equal: duplicates of a neighbour are as good as the neighbour.
SCORE_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What index/index.json says.

    Attributes:
        kind: "flat" or "ivf".
        num_vectors: Vectors in the index; their numbers are the store's text ids.
        width: Numbers in a vector (G).
        num_lists: Lists of an IVF index, 1 for a flat one.
        num_probes: Lists that a query looks into.
        recall_at_10: Share of the ten nearest by exact search that the index finds, 0 to 1.
        num_queries: Stored vectors that were the sample's queries.
        store_fingerprint: The store that was indexed.
    """

    kind: str
    num_vectors: int
    width: int
    num_lists: int
    num_probes: int
    recall_at_10: float
    num_queries: int
    store_fingerprint: str


def import_faiss(user: str = "the index", otherwise: str = "leave the index out with --index none") -> Any:
    """The faiss module.

    Args:
        user: What needs it.
        otherwise: How to do without it.

    Raises:
        DependencyError: When it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise DependencyError(
            f"{user} needs faiss, which is not installed: `pip install gistfast[cpu]` or "
            f"`pip install gistfast[gpu]`, never both, or {otherwise}"
        ) from None
    return faiss


def build_index(store: GuideStore, kind: IndexKind = "auto") -> IndexReport | None:
    """Build the index of inner products over all vectors of a store and measure its recall.

    Args:
        store: A store whose vectors are complete.
        kind: "flat" is exact; "ivf" looks at a part of the vectors; "auto" is flat up to 200,000 texts;
            "none" builds nothing. An index that is there already and of this kind is kept.

    Returns:
        What was written to index/index.json; None for "none".

    Raises:
        DependencyError: When faiss is not installed.
    """
    if kind == "none":
        return None
    if kind == "auto":
        kind = "flat" if store.num_texts <= FLAT_AT_MOST else "ivf"
    present = read_report(store)
    if present is not None and present.kind == kind:
        return present
    faiss = import_faiss()
    index = _empty_index(faiss, store, kind)
    with progress("building the index", total=store.num_texts, unit="vectors") as bar:
        for vectors in _blocks(store):
            index.add(vectors)
            bar.advance(len(vectors))
    report = _measure(store, index, kind)
    _write(faiss, store, index, report)
    return report


def load_index(store: GuideStore) -> Any:
    """The store's faiss index; the numbers it finds are text ids.

    Raises:
        StoreError: When the store has no index, or one of another store's vectors.
        DependencyError: When faiss is not installed.
    """
    if read_report(store) is None:
        raise StoreError(f"{store.path} has no index of its vectors: run gistfast.index.build_index(store)")
    faiss = import_faiss()
    try:
        return faiss.read_index(str(_folder(store) / INDEX_NAME))
    except RuntimeError as error:
        raise StoreError(
            f"{_folder(store)} is damaged, faiss cannot read it: delete the folder and build it again"
        ) from error


def read_report(store: GuideStore) -> IndexReport | None:
    """What is known of the store's index; None when it has none, or one of other vectors."""
    path = _folder(store) / REPORT_NAME
    if not path.is_file():
        return None
    try:
        report = IndexReport(**read_json(path))
    except TypeError as error:
        raise StoreError(f"{path} has other fields than expected: delete {path.parent} and build it again") from error
    return report if report.store_fingerprint == store.fingerprint else None


def _folder(store: GuideStore) -> Path:
    return Path(store.path) / "index"


def _vectors(store: GuideStore, ids: "np.ndarray[Any, np.dtype[np.int64]]") -> Vectors:
    vectors: Vectors = store.gather(torch.from_numpy(ids)).float().numpy()
    return vectors


def _blocks(store: GuideStore) -> Iterator[Vectors]:
    for start in range(0, store.num_texts, VECTORS_PER_BLOCK):
        yield _vectors(store, np.arange(start, min(start + VECTORS_PER_BLOCK, store.num_texts)))


def _empty_index(faiss: Any, store: GuideStore, kind: str) -> Any:
    """An index that is ready for vectors; it keeps them in the precision in which the store has them."""
    width, product = store.width, faiss.METRIC_INNER_PRODUCT
    half = store.dtype == "float16"
    fp16 = faiss.ScalarQuantizer.QT_fp16
    if kind == "flat":
        return faiss.IndexScalarQuantizer(width, fp16, product) if half else faiss.IndexFlatIP(width)
    num_lists = max(min(4 * math.isqrt(store.num_texts), store.num_texts // TRAINING_VECTORS_PER_LIST), 1)
    coarse = faiss.IndexFlatIP(width)
    if half:
        index = faiss.IndexIVFScalarQuantizer(coarse, width, num_lists, fp16, product, False)
    else:
        index = faiss.IndexIVFFlat(coarse, width, num_lists, product)
    num_sampled = min(num_lists * TRAINING_VECTORS_PER_LIST, store.num_texts)
    index.train(_vectors(store, _sample(store.num_texts, num_sampled)))
    return index


def _sample(num_texts: int, size: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.sort(np.random.default_rng(0).choice(num_texts, size, replace=False))


def _measure(store: GuideStore, index: Any, kind: str) -> IndexReport:
    """The report of a full index, after looking into more lists until it finds enough."""
    queries = _vectors(store, _sample(store.num_texts, min(NUM_QUERIES, store.num_texts)))
    needed = _tenth_best_scores(store, queries)
    num_lists = index.nlist if kind == "ivf" else 1
    num_probes = 1
    while True:
        if kind == "ivf":
            index.nprobe = num_probes
        recall = _recall(store, index, queries, needed)
        if recall >= WANTED_RECALL or num_probes >= num_lists:
            break
        num_probes = min(2 * num_probes, num_lists)
    searched = "all vectors" if kind == "flat" else f"{num_probes} of {num_lists} lists"
    logger.info("%s index: recall@10 %.3f, a query searches %s", kind, recall, searched)
    return IndexReport(
        kind=kind,
        num_vectors=store.num_texts,
        width=store.width,
        num_lists=num_lists,
        num_probes=num_probes,
        recall_at_10=recall,
        num_queries=len(queries),
        store_fingerprint=store.fingerprint,
    )


def _tenth_best_scores(store: GuideStore, queries: Vectors) -> Vectors:
    """The score (Q,) of each query's tenth neighbour by exact search, the last one's in a smaller store.

    Args:
        store: Whose vectors are searched.
        queries: (Q, G), fp32.
    """
    best = np.empty((len(queries), 0), np.float32)
    num_wanted = min(NUM_NEIGHBOURS, store.num_texts)
    for vectors in _blocks(store):
        best = np.concatenate([best, queries @ vectors.T], axis=1)
        best = np.partition(best, -min(num_wanted, best.shape[1]), axis=1)[:, -num_wanted:]
    tenth: Vectors = best.min(axis=1)
    return tenth


def _recall(store: GuideStore, index: Any, queries: Vectors, needed: Vectors) -> float:
    num_wanted = min(NUM_NEIGHBOURS, store.num_texts)
    _, found = index.search(queries, num_wanted)
    neighbours = _vectors(store, np.maximum(found, 0).astype(np.int64))
    scores = np.einsum("qg,qkg->qk", queries, neighbours)
    return float(np.mean((found >= 0) & (scores >= needed[:, None] - SCORE_TOLERANCE)))


def _write(faiss: Any, store: GuideStore, index: Any, report: IndexReport) -> None:
    """The report last: an index without one is not there."""
    folder = _folder(store)
    with one_line_write_errors(folder):
        folder.mkdir(exist_ok=True)
        (folder / REPORT_NAME).unlink(missing_ok=True)
        with durable_file(folder / INDEX_NAME) as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    write_json(folder / REPORT_NAME, asdict(report))
