"""What the tests of the store share: a guide that needs no model, rows that repeat texts, and stores of both."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from gistfast.errors import StoreError
from gistfast.neighbours.index import build_index, index_path
from gistfast.neighbours.index_search import choose_search
from gistfast.neighbours.mining import mine
from gistfast.neighbours.pair_scores import score_pairs
from gistfast.rows.dataset import RowSource, read_rows
from gistfast.store import GuideInfo, GuideStore, StoreWriter
from gistfast.store.mined import MinedInfo

WIDTH = 8
GUIDE = GuideInfo(
    name="guide",
    revision=None,
    weights_hash="w",
    tokenizer_hash="t",
    pooling="mean",
    query_prompt="",
    document_prompt="",
    max_length=128,
    dtype="float16",
    compute_dtype="float32",
    normalised=True,
    width=WIDTH,
    decoded_with=None,
)
TWO_PROMPTS = replace(GUIDE, query_prompt="query: ")
# 60 rows that repeat texts within and across columns.
ROWS = [(f"question {i % 40}", f"answer {i % 25}", f"question {i % 7}") for i in range(60)]

# Half of their texts are in ROWS; the last one is one of these rows.
MORE = [*((f"question {i}", f"new answer {i}", f"question {i % 7}") for i in range(30, 50)), ROWS[3]]
KINDS = ["texts", "rows", "vectors", "scores", "mined"]

Array = np.ndarray[Any, Any]


def source_of(path: Path, rows: Sequence[tuple[str, ...]]) -> RowSource:
    names = ("anchor", "positive", *(f"negative_{number}" for number in range(1, len(rows[0]) - 1)))
    lines = (json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return read_rows(path)


def vectors_for(texts: Sequence[str], roles: Sequence[str] = (), width: int = WIDTH) -> Array:
    """Vectors of length 1 that follow from role and text alone."""
    keys = [f"{role}:{text}" for role, text in zip(roles or ["query"] * len(texts), texts, strict=True)]
    seeds = [xxhash.xxh32_intdigest(key.encode()) for key in keys]
    vectors = np.stack([np.random.default_rng(seed).standard_normal(width) for seed in seeds])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def fill(writer: StoreWriter, source: RowSource, rows_per_batch: int = 10_000) -> None:
    for rows in source.batches(rows_per_batch):
        writer.add_rows(rows)
    writer.finish_rows()


def embed(writer: StoreWriter, shards: Sequence[int] | None = None) -> None:
    for shard in writer.vectors.pending() if shards is None else shards:
        vectors = vectors_for(writer.vectors.texts_of(shard), writer.vectors.roles_of(shard), writer.guide.width)
        assert writer.vectors.write(shard, vectors)


def make_store(path: Path, source: RowSource, guide: GuideInfo = GUIDE, **options: Any) -> GuideStore:
    with StoreWriter.create(path, guide=guide, source=source, **options) as writer:
        if writer.needs_rows:
            fill(writer, source)
        embed(writer)
        return GuideStore.open(writer.publish())


def complete(store: GuideStore) -> GuideStore:
    """The store with scores, an index and mined negatives."""
    score_pairs(store)
    build_index(store, "flat")
    mine(store, two_negatives(store), choose_search(store, "cpu"))
    return store


def two_negatives(store: GuideStore) -> MinedInfo:
    return MinedInfo(negatives=2, margin=0.05, margin_strategy="relative", store_fingerprint=store.fingerprint)


def contents(store: GuideStore) -> tuple[list[str], list[Any], bytes]:
    vectors = store.gather(torch.arange(store.num_texts))
    return store.texts[:], store.rows.tolist(), vectors.numpy().tobytes()


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def shard_file(store: Path, kind: str, shard: int) -> Path:
    return store / json.loads(commit_file(store, kind, shard).read_text())["file"]


def commit_file(store: Path, kind: str, shard: int) -> Path:
    """Where the commit is; vectors, scores and mined negatives are those of the only guide."""
    (path,) = [*store.glob(f"commits/{kind}-{shard:05d}.json"), *store.glob(f"commits/{kind}-*-{shard:05d}.json")]
    return path


def file_of(store: Path, kind: str) -> Path:
    """The file of shard 1, or that of the index."""
    return index_path(GuideStore.open(store), ".faiss") if kind == "index" else shard_file(store, kind, 1)


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and bytes of every file."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.read_bytes()) for path in paths}


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a file of JSON."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class FullDisk:
    """Stands for os.fsync and fails at one call; the others do nothing: nobody cuts the power here."""

    def __init__(self, failing_call: int) -> None:
        self.calls_left = failing_call

    def __call__(self, descriptor: int) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refusal_of(run: Callable[[], object]) -> str | None:
    """What a StoreError says; None when there is none."""
    try:
        run()
    except StoreError as error:
        return str(error)
    return None
