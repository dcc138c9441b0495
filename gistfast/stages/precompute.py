"""Stage 1: rows of text in, guide store out.

Each step leaves on disk what it finished and skips what it finds there: a stopped run goes on with resume.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gistfast.engines.choice import Engine, start_engine
from gistfast.engines.shards import WHOLE, Part
from gistfast.errors import StoreError
from gistfast.guides.kinds import guide_kind
from gistfast.guides.open_guide import open_guide
from gistfast.guides.same_guide import check_same_guide
from gistfast.models.pretrained import pick_device
from gistfast.neighbours.index import build_index, import_faiss, remove_other_indexes
from gistfast.neighbours.index_search import choose_search
from gistfast.neighbours.index_types import refuse_impossible_index
from gistfast.neighbours.mining import mine
from gistfast.neighbours.pair_scores import score_pairs
from gistfast.progress import progress
from gistfast.rows.dataset import RowSource, read_rows
from gistfast.settings.base import build, to_dict
from gistfast.settings.stages import PrecomputeSettings
from gistfast.store import GuideStore, StoreWriter
from gistfast.store.mined import MinedInfo, mined_infos, remove_other_mined
from gistfast.store.plan import FolderLock, is_store
from gistfast.store.request import Mode
from gistfast.store.shards import COMMITS
from gistfast.store.vectors import VectorShards

logger = logging.getLogger(__name__)


def precompute(source: str | Path, *, guide: str | Path, out: str | Path, **options: Any) -> GuideStore:
    """The guide store of a source of rows: its texts, their guide vectors, the score of each pair, an index.

    Each distinct text is embedded once. A run that was stopped leaves a store that `resume=True` completes;
    what is committed is never computed again.

    Args:
        source: File, folder, glob or hub id with the rows.
        guide: Folder or hub id of a model, address of an embedding server, or file of texts with ready vectors.
        out: Folder of the store.
        **options: The other fields of `gistfast.settings.stages.PrecomputeSettings`.

    Raises:
        ConfigError: For an unknown or bad option.
        DataError: When the source or one of its rows is bad.
        DependencyError: When an index is wanted and faiss is not installed.
        ModelError: When the guide cannot be loaded.
        StoreError: When the store exists, was made otherwise than asked for, or cannot be written.
        VectorError: When the guide gives a vector that is zero or not finite.
        WorkerError: When worker processes died, or a cluster cannot be reached.
    """
    store = precompute_part(source, guide=guide, out=out, **options)
    if store is None:
        raise StoreError(f"{out} is not finished: this run did its part; the store opens when the others have")
    return store


def precompute_part(source: str | Path, *, guide: str | Path, out: str | Path, **options: Any) -> GuideStore | None:
    """As `precompute`, for one run of several: the store, or None while other runs have something left to do.

    Raises:
        As `precompute`.
    """
    settings = build(PrecomputeSettings, {**options, "source": source, "guide": guide, "out": out})
    if settings.index != "none":
        # Refused now rather than after hours of embedding.
        import_faiss()
    rows = _open_rows(settings)
    with (
        start_engine(to_dict(settings)) as engine,
        StoreWriter.create(
            Path(settings.out),
            guide=engine.guide_info(),
            source=rows,
            holdout=settings.holdout,
            mode=_mode(settings),
            split_roles=settings.split_roles,
            guide_weight=settings.guide_weight,
            guide_score=settings.guide_score,
        ) as writer,
    ):
        if guide_kind(settings.guide) == "server":
            # All else is told apart by what it is made of; a server shows nothing but vectors.
            check_same_guide(writer.path, writer.guide, engine.guide or open_guide(to_dict(settings)))
        if writer.needs_rows:
            write_rows(writer, rows)
        if settings.rows_only:
            logger.info("%s has its rows: the same command with --resume in place of --rows-only embeds them", out)
            return None
        if settings.shards is None and writer.vectors.pending():
            # As with faiss: now. Of several runs nobody knows which one builds the index, and with what memory.
            refuse_impossible_index(writer.manifest, settings.index, settings.index_memory)
        embed_texts(writer.vectors, engine, Part(*settings.shards or WHOLE))
        if left := len(writer.vectors.pending()):
            logger.info("%s: %d shards of vectors are left to other runs; the last completes the store", out, left)
            return None
        if missing := writer.missing_vectors():
            return _unfinished(writer, missing)
        store = _complete(writer, settings)
    logger.info("%s: %d rows, %d texts, %d wide", store.path, store.num_rows, store.num_texts, store.width)
    return store


def _complete(writer: StoreWriter, settings: PrecomputeSettings) -> GuideStore:
    """The store with all that is made of its vectors; of several runs that come here at once, one makes it."""
    with FolderLock(writer.path / COMMITS):
        if not is_store(writer.path):
            # Another run was first, and the store has taken the place that was meant for it.
            return GuideStore.open(settings.out)
        _add_findings(writer.store(), settings)
        store = GuideStore.open(writer.publish())
        # Readers of the store as it was may have used them until now.
        remove_other_indexes(store)
        remove_other_mined(store)
        return store


def _add_findings(store: GuideStore, settings: PrecomputeSettings) -> None:
    """Write what follows from the vectors: scores of pairs, index, mined negatives; what is there is kept."""
    score_pairs(store)
    build_index(store, settings.index, settings.index_memory)
    if info := _wanted_negatives(store, settings):
        mine(store, info, choose_search(store, pick_device(settings.device)))


def _wanted_negatives(store: GuideStore, settings: PrecomputeSettings) -> MinedInfo | None:
    """What to mine; what was mined of the store last, before it grew, when nothing is asked for."""
    if settings.negatives is None:
        last = next(iter(mined_infos(store.path)), None)
        return replace(last, store_fingerprint=store.fingerprint) if last else None
    return MinedInfo(
        negatives=settings.negatives,
        margin=settings.negatives_margin,
        margin_strategy=settings.negatives_margin_strategy,
        store_fingerprint=store.fingerprint,
    )


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


def embed_texts(vectors: VectorShards, engine: Engine, part: Part = WHOLE) -> None:
    """Let an engine embed every shard of a part that has no vectors yet."""
    sizes, pending = vectors.sizes, vectors.pending()
    if len(pending) < len(sizes):
        logger.info("%d of %d shards of vectors are there already", len(sizes) - len(pending), len(sizes))
    mine = part.of_shards(pending)
    if part != WHOLE:
        logger.info("this run takes %d of the %d shards that are left", len(mine), len(pending))
    if not mine:
        return
    with progress("embedding texts", total=sum(sizes[shard] for shard in mine), unit="texts") as bar:
        engine.embed(vectors, part, bar)
        # What other runs did meanwhile.
        bar.advance(max((bar.total or 0) - bar.done, 0))
