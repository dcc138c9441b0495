"""Stage 1: rows of text in, guide store out.

Each step leaves on disk what it finished and skips what it finds there: a stopped run goes on with resume.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gistfast.config import PrecomputeSettings
from gistfast.dataset import RowSource, read_rows
from gistfast.guide import Guide
from gistfast.index import build_index, import_faiss
from gistfast.open_guide import open_guide
from gistfast.progress import progress
from gistfast.same_guide import check_same_guide
from gistfast.scores import score_pairs
from gistfast.server_guide import ServerGuide
from gistfast.settings import build, to_dict
from gistfast.store import GuideStore, StoreWriter
from gistfast.store.request import Mode

logger = logging.getLogger(__name__)


def precompute(source: str | Path, *, guide: str | Path, out: str | Path, **options: Any) -> GuideStore:
    """The guide store of a source of rows: its texts, their guide vectors, the score of each pair, an index.

    Each distinct text is embedded once. A run that was stopped leaves a store that `resume=True` completes;
    what is committed is never computed again.

    Args:
        source: File, folder, glob or hub id with the rows.
        guide: Folder or hub id of a model, address of an embedding server, or file of texts with ready vectors.
        out: Folder of the store.
        **options: The other fields of `gistfast.config.PrecomputeSettings`.

    Raises:
        ConfigError: For an unknown or bad option.
        DataError: When the source or one of its rows is bad.
        DependencyError: When an index is wanted and faiss is not installed.
        ModelError: When the guide cannot be loaded.
        StoreError: When the store exists, was made otherwise than asked for, or cannot be written.
        VectorError: When the guide gives a vector that is zero or not finite.
    """
    settings = build(PrecomputeSettings, {**options, "source": source, "guide": guide, "out": out})
    if settings.index != "none":
        # Refused now rather than after hours of embedding.
        import_faiss()
    rows = _open_rows(settings)
    model = open_guide(to_dict(settings))
    with StoreWriter.create(
        Path(settings.out),
        guide=replace(model.info, dtype=settings.store_dtype),
        source=rows,
        holdout=settings.holdout,
        mode=_mode(settings),
        split_roles=settings.split_roles,
        guide_weight=settings.guide_weight,
        guide_score=settings.guide_score,
    ) as writer:
        if isinstance(model, ServerGuide):
            # All else is told apart by what it is made of; a server shows nothing but vectors.
            check_same_guide(writer.path, writer.guide, model)
        if writer.needs_rows:
            write_rows(writer, rows)
        embed_texts(writer, model)
        if missing := writer.missing_vectors():
            return _unfinished(writer, missing)
        score_pairs(writer.store())
        build_index(writer.store(), settings.index)
        store = GuideStore.open(writer.publish())
    logger.info("%s: %d rows, %d texts, %d wide", store.path, store.num_rows, store.num_texts, store.width)
    return store


def _open_rows(settings: PrecomputeSettings) -> RowSource:
    return read_rows(
        settings.source,
        columns=settings.columns,
        subset=settings.subset,
        split=settings.split,
        revision=settings.revision,
        on_bad_row=settings.on_bad_row,
    )


def _mode(settings: PrecomputeSettings) -> Mode:
    chosen: dict[Mode, bool] = {
        "resume": settings.resume,
        "overwrite": settings.overwrite,
        "append": settings.append,
        "add_guide": settings.add_guide,
    }
    return next((mode for mode, wanted in chosen.items() if wanted), "new")


def _unfinished(writer: StoreWriter, missing: Mapping[str, int]) -> GuideStore:
    """The store as it was: rows were added, and other guides have not embedded their texts yet."""
    for guide, count in missing.items():
        logger.warning(
            "guide %s still lacks %d shards of the new texts: run the same command with that guide", guide, count
        )
    return GuideStore.open(writer.path)


def write_rows(writer: StoreWriter, rows: RowSource) -> None:
    """Read all rows into the store, each distinct text once.

    Raises:
        DataError: At the first bad row, unless bad rows are skipped.
    """
    with progress("reading rows", total=rows.num_rows, unit="rows") as bar:
        for batch in rows.batches():
            writer.add_rows(batch)
            bar.advance(len(batch.texts[0]))
        writer.finish_rows()
    if rows.skipped:
        logger.warning("%s: skipped %d bad rows", rows.description, rows.skipped)


def embed_texts(writer: StoreWriter, guide: Guide) -> None:
    """Embed every shard of texts that has no vectors yet."""
    sizes = writer.manifest.plan.texts
    pending = writer.pending_shards()
    if len(pending) < len(sizes):
        logger.info("%d of %d shards of vectors are there already", len(sizes) - len(pending), len(sizes))
    with progress("embedding texts", total=sum(sizes[shard] for shard in pending), unit="texts") as bar:
        for shard in pending:
            run_shard(writer, guide, shard, bar.advance)


def run_shard(writer: StoreWriter, guide: Guide, shard: int, on_batch: Callable[[int], None] | None = None) -> None:
    """Embed the texts of one shard and commit their vectors.

    Any number of workers may run the same shard: the first to finish commits, the others change nothing.

    Args:
        writer: Of a store whose rows are complete.
        guide: The guide that the store is made with.
        shard: Number of the shard.
        on_batch: Called with the number of texts of each batch that is done.

    Raises:
        VectorError: When a vector is zero or not finite; its text is named.
    """
    texts, roles = writer.texts_of(shard), np.array(writer.roles_of(shard))
    vectors = np.empty((len(texts), guide.info.width), np.float32)
    for role in ("query", "document"):
        numbers = np.flatnonzero(roles == role)
        vectors[numbers] = guide.embed([texts[number] for number in numbers], role, on_batch)
    writer.write_vectors(shard, vectors)
