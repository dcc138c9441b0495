"""Is the index of a store what was built of its vectors?"""

import shutil
from contextlib import suppress

from gistfast.errors import StoreError
from gistfast.neighbours.index import build_index, file_problem, hash_of_vectors, import_faiss, index_path, report_at
from gistfast.neighbours.index_types import IndexKind
from gistfast.store import GuideStore
from gistfast.store.shards import ADVICE


def index_problem(store: GuideStore, *, deep: bool, vectors_are_sound: bool = True) -> str | None:
    """What is wrong with the index of a store; None when it is sound, or when there is none.

    Args:
        store: The store.
        deep: Whether to read the whole file; else its size is looked at.
        vectors_are_sound: Whether it is known what vectors should be in it.
    """
    report_path, path = (index_path(store, suffix) for suffix in (".json", ".faiss"))
    if not report_path.is_file():
        # A file without a report is what an interrupted run left.
        return None
    try:
        report = report_at(report_path)
    except StoreError as error:
        return str(error)
    num_shards = len(store.manifest.plan.texts)
    stale = vectors_are_sound and report.vectors != hash_of_vectors(store, num_shards)
    if stale or report.store_fingerprint != store.fingerprint:
        return f"{report_path} is of other vectors than the store's: {ADVICE}"
    return file_problem(path, report, deep=deep)


def rebuild_index(store: GuideStore) -> None:
    """Build the index of a store anew, whatever is there of one; of its kind where that is still known.

    Raises:
        ConfigError: When no index fits into the memory.
        DependencyError: When faiss is not installed.
        StoreError: When the disk is full or the folder cannot be written.
    """
    import_faiss()
    kinds: dict[str, IndexKind] = {"flat": "flat", "ivf": "ivf", "pq": "pq"}
    kind: IndexKind = "auto"
    with suppress(StoreError):
        kind = kinds.get(report_at(index_path(store, ".json")).kind, "auto")
    index_path(store, ".json").unlink(missing_ok=True)
    shutil.rmtree(index_path(store, ".building"), ignore_errors=True)
    build_index(store, kind)
