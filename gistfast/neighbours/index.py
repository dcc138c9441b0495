"""The FAISS index over a store's vectors, and how well it finds what exact search finds.

    index/<store>.faiss        the numbers that it finds are entry ids
    index/<store>.json         what it is; an index without this file is not there
    index/<store>.building/    of an index that is being built: gistfast.neighbours.index_build

<store> is the beginning of the store's fingerprint, so that an index for rows that are being appended does not take the
place of the one that readers use.
"""

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gistfast.errors import DependencyError, StoreError
from gistfast.neighbours.index_build import IndexBuilder, write_index
from gistfast.neighbours.index_recall import tune
from gistfast.neighbours.index_types import IndexKind, IndexPlan, plan_index
from gistfast.store import GuideStore
from gistfast.store.files import changed_bytes, fingerprint_of, one_line_write_errors, read_json, write_json
from gistfast.store.shards import ADVICE, read_commit

logger = logging.getLogger(__name__)

# An index that was trained on fewer vectors than this share of what it would hold is trained anew.
SHARE_TO_EXTEND = 0.25


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What index/<store>.json says.

    Attributes:
        kind: "flat", "ivf" or "pq".
        num_vectors: Vectors in the index; their numbers are the store's text ids.
        num_trained: Vectors of the store when its lists were trained.
        width: Numbers in a vector (G).
        code_bytes: Bytes of a vector in the index.
        num_lists: Lists of an IVF index, 1 for a flat one.
        num_probes: Lists that a query looks into.
        recall_at_10: Share of the ten nearest by exact search that the index finds, 0 to 1.
        num_queries: Stored vectors that were the sample's queries.
        vectors: Hash of the vectors in it.
        store_fingerprint: The store that was indexed.
        bytes: Size of the index's file.
        xxh3_128: Hash of the file.
    """

    kind: str
    num_vectors: int
    num_trained: int
    width: int
    code_bytes: int
    num_lists: int
    num_probes: int
    recall_at_10: float
    num_queries: int
    vectors: str
    store_fingerprint: str
    bytes: int
    xxh3_128: str


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


def build_index(store: GuideStore, kind: IndexKind = "auto", memory_gib: float | None = None) -> IndexReport | None:
    """Build the index of inner products over all vectors of a store and measure its recall.

    A build that was killed goes on shard by shard. After an append, the new vectors are added to a copy of the index.

    Args:
        store: A store whose vectors are complete.
        kind: "flat" is exact; "ivf" looks at a part of the vectors; "pq" approximates them as well; "auto" chooses by
            size and memory; "none" builds nothing. An index that is there already and of this kind is kept.
        memory_gib: Memory that an index may take; four fifths of what the machine has free when None.

    Returns:
        What was written; None for "none".

    Raises:
        ConfigError: When no index fits into the memory.
        DependencyError: When faiss is not installed.
        StoreError: When the disk is full or the folder cannot be written.
    """
    if kind == "none":
        return None
    present = read_report(store)
    if present is not None and (present.kind == kind or (kind == "auto" and memory_gib is None)):
        return present
    half = store.dtype == "float16"
    plan = plan_index(store.num_texts, store.width, half=half, kind=kind, memory_gib=memory_gib)
    if present is not None and present.kind == plan.kind:
        return present
    faiss = import_faiss()
    building = index_path(store, ".building")
    builder = IndexBuilder(faiss, store, plan, building)
    base = _index_to_extend(faiss, store, plan)
    index, num_trained = (builder.empty(), store.num_texts) if base is None else base
    builder.fill(index)
    recall = tune(faiss, store, index, has_lists=plan.kind != "flat")
    with one_line_write_errors(building):
        building.parent.mkdir(exist_ok=True)
        # Without its report, an index of another kind is not there.
        index_path(store, ".json").unlink(missing_ok=True)
        num_bytes, xxh3_128 = write_index(faiss, index, index_path(store, ".faiss"))
    report = IndexReport(
        kind=plan.kind,
        num_vectors=store.num_texts,
        num_trained=num_trained,
        width=store.width,
        code_bytes=plan.code_bytes,
        vectors=hash_of_vectors(store, len(store.manifest.plan.texts)),
        store_fingerprint=store.fingerprint,
        bytes=num_bytes,
        xxh3_128=xxh3_128,
        **asdict(recall),
    )
    write_json(index_path(store, ".json"), asdict(report))
    shutil.rmtree(building, ignore_errors=True)
    return report


def load_index(store: GuideStore) -> Any:
    """The store's faiss index; the numbers it finds are text ids.

    Raises:
        StoreError: When the store has no index, or it is damaged.
        DependencyError: When faiss is not installed.
    """
    if read_report(store) is None:
        raise StoreError(f"{store.path} has no index of its vectors: run gistfast.neighbours.index.build_index(store)")
    return _read(import_faiss(), index_path(store, ".faiss"))


def read_report(store: GuideStore) -> IndexReport | None:
    """What is known of the store's index; None when it has none.

    Raises:
        StoreError: When the report is damaged.
    """
    path = index_path(store, ".json")
    report = report_at(path) if path.is_file() else None
    return report if report is not None and report.store_fingerprint == store.fingerprint else None


def remove_other_indexes(store: GuideStore) -> None:
    """Remove the indexes of other states of the store; no reader of this one misses them."""
    folder = store.path / "index"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.partition(".")[0] != index_path(store, "").name:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def index_path(store: GuideStore, suffix: str) -> Path:
    """The file of the index of this state of the store with a suffix: ".faiss", ".json", or the folder ".building"."""
    return store.path / "index" / f"{store.fingerprint[:8]}{suffix}"


def _read(faiss: Any, path: Path) -> Any:
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise StoreError(f"{path} is damaged, faiss cannot read it: {ADVICE}") from error


def report_at(path: Path) -> IndexReport:
    """The report in a file.

    Raises:
        StoreError: When it is damaged.
    """
    try:
        return IndexReport(**read_json(path))
    except TypeError as error:
        raise StoreError(f"{path} has other fields than expected: {ADVICE}") from error


def file_problem(path: Path, report: IndexReport, *, deep: bool) -> str | None:
    """What is wrong with the index's file beside its report; None when nothing is.

    Args:
        path: The file.
        report: What is known of it.
        deep: Whether to read all of it; else its size is looked at.
    """
    size = path.stat().st_size if path.is_file() else None
    if size != report.bytes:
        found = "is missing" if size is None else f"has {size} bytes, expected {report.bytes}"
        return f"{path} {found}: {ADVICE}"
    return changed_bytes(path, report.xxh3_128, ADVICE) if deep else None


def _index_to_extend(faiss: Any, store: GuideStore, plan: IndexPlan) -> tuple[Any, int] | None:
    """An index of the store's first vectors and the vectors its lists were made for; None when there is none."""
    ends = np.cumsum(store.manifest.plan.texts).tolist()
    for path in sorted((store.path / "index").glob("*.json")):
        try:
            report = report_at(path)
        except StoreError as error:
            logger.warning("the index is built anew, not added to: %s", error)
            continue
        same_kind = (report.kind, report.code_bytes) == (plan.kind, plan.code_bytes)
        large_enough = plan.kind == "flat" or report.num_trained >= SHARE_TO_EXTEND * store.num_texts
        if not same_kind or not large_enough or report.num_vectors not in ends:
            continue
        num_shards = ends.index(report.num_vectors) + 1
        if num_shards == len(ends) or report.vectors != hash_of_vectors(store, num_shards):
            continue
        file = path.with_suffix(".faiss")
        # A copy of a damaged file would pass for sound ever after.
        if problem := file_problem(file, report, deep=True):
            logger.warning("the index is built anew, not added to: %s", problem)
            continue
        logger.info("adding to the index of the store's first %d vectors", report.num_vectors)
        return _read(faiss, file), report.num_trained
    return None


def hash_of_vectors(store: GuideStore, num_shards: int) -> str:
    """Hash of what decides the vectors of the first shards: files and weights."""
    manifest = store.manifest
    shards = ((kind, shard) for kind in manifest.vectors for shard in range(num_shards))
    checksums = [read_commit(store.path, kind, shard, manifest).xxh3_128 for kind, shard in shards]
    return fingerprint_of({"files": checksums, "weights": manifest.weights, "guide_score": manifest.guide_score})
