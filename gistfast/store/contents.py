"""What must hold of what is in a shard, beyond its bytes being those that were written.

# N entries of a shard, G guide width
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from gistfast.store.info import GuideInfo
from gistfast.store.ingest import ROW_FIELDS, TEXT_SCHEMA
from gistfast.store.manifest import Manifest
from gistfast.store.shards import Shard, fixed_size_lists

Array = np.ndarray[Any, Any]

# What a shard of mined negatives has beside them.
MINED_NUMBERS = {"positive_rank": pa.int32(), "false_negatives": pa.int32(), "truncated": pa.bool_()}
# Bounds the memory that a check takes beside the mapped file.
VECTORS_PER_BLOCK = 4096
# What fp32 arithmetic leaves of a length of 1; rounding to the stored precision comes on top.
LENGTH_TOLERANCE = 1e-5


def wrong_contents(kind: str, index: int, shard: Shard, manifest: Manifest) -> str | None:
    """What is wrong with the values in a shard, as "has ids beyond its 12 texts"; None when nothing is."""
    folder = kind.partition("/")[0]
    if folder not in _CHECKS:
        return None
    expected = _schema_of(kind, manifest, shard.batch.schema)
    if not shard.batch.schema.equals(expected):
        return f"has the columns {_columns(shard.batch.schema)}, expected {_columns(expected)}"
    try:
        shard.batch.validate(full=True)
    except pa.ArrowInvalid as error:
        return f"holds values that are none ({error})"
    return _CHECKS[folder](kind, index, shard, manifest)


def _wrong_texts(kind: str, index: int, shard: Shard, manifest: Manifest) -> str | None:
    roles, identity = (shard.batch.column(name).to_numpy() for name in ("role", "identity"))
    first = sum(manifest.plan.texts[:index])
    own = np.arange(first, first + len(roles))
    one_role = manifest.data.one_role
    if (roles > (0 if one_role else 1)).any():
        return f"has a role {roles.max()}, expected {'0' if one_role else '0 or 1'}"
    if (identity < 0).any() or (identity != own if one_role else identity > own).any():
        return "has an identity that is no earlier entry's and not its own"
    return None


def _wrong_rows(kind: str, index: int, shard: Shard, manifest: Manifest) -> str | None:
    ids = shard.tensor(0, torch.int64)
    tasks = shard.batch.column("task").to_numpy()
    num_texts, num_tasks = manifest.data.num_texts, len(manifest.data.tasks)
    if int(ids.min()) < 0 or int(ids.max()) >= num_texts:
        return f"has ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {num_texts - 1}"
    if tasks.min() < -1 or tasks.max() >= num_tasks:
        return f"has tasks from {tasks.min()} to {tasks.max()}, expected -1 to {num_tasks - 1}"
    return None


def _wrong_vectors(kind: str, index: int, shard: Shard, manifest: Manifest) -> str | None:
    guide = _guide_of(kind, manifest)
    dtype = torch.float32 if guide.dtype == "float32" else torch.float16
    vectors = shard.tensor(0, dtype)
    tolerance = torch.finfo(dtype).eps + LENGTH_TOLERANCE
    for start in range(0, len(vectors), VECTORS_PER_BLOCK):
        lengths = torch.linalg.vector_norm(vectors[start : start + VECTORS_PER_BLOCK].float(), dim=1)
        bad = ~lengths.isfinite() | (lengths == 0)
        if guide.normalised:
            bad |= (lengths - 1).abs() > tolerance
        if bad.any():
            place = int(bad.nonzero()[0])
            entry = sum(manifest.plan.texts[:index]) + start + place
            wanted = "length 1" if guide.normalised else "a finite length above 0"
            return f"has a vector of length {float(lengths[place]):.4g} for text {entry}, expected {wanted}"
    return None


def _wrong_scores(kind: str, index: int, shard: Shard, manifest: Manifest) -> str | None:
    scores = shard.tensor(0, torch.float32)
    if scores.isfinite().all():
        return None
    row = sum(manifest.plan.rows[:index]) + int((~scores.isfinite()).any(dim=1).nonzero()[0])
    return f"has a score that is not finite for row {row}"


def _wrong_mined(kind: str, index: int, shard: Shard, manifest: Manifest) -> str | None:
    ids, scores = shard.tensor(0, torch.int64), shard.tensor(1, torch.float32)
    num_texts = manifest.data.num_texts
    if int(ids.min()) < -1 or int(ids.max()) >= num_texts:
        return f"has negatives from {int(ids.min())} to {int(ids.max())}, expected -1 to {num_texts - 1}"
    if (scores.isfinite() != (ids >= 0)).any():
        return "has a score where there is no negative, or none where there is one"
    ranks, above = (shard.batch.column(name).to_numpy() for name in ("positive_rank", "false_negatives"))
    if (ranks < 1).any() or (above < 0).any() or (above >= ranks).any():
        return "has a rank that does not go with its false negatives"
    return None


_Check = Callable[[str, int, Shard, Manifest], str | None]
_CHECKS: dict[str, _Check] = {
    "texts": _wrong_texts,
    "rows": _wrong_rows,
    "vectors": _wrong_vectors,
    "scores": _wrong_scores,
    "mined": _wrong_mined,
}


def _schema_of(kind: str, manifest: Manifest, found: pa.Schema) -> pa.Schema:
    num_columns = len(manifest.data.columns)
    folder = kind.partition("/")[0]
    if folder == "texts":
        return TEXT_SCHEMA
    if folder == "rows":
        return pa.schema([_lists("ids", num_columns, "int64"), *ROW_FIELDS])
    if folder == "vectors":
        guide = _guide_of(kind, manifest)
        return pa.schema([_lists("vector", guide.width, guide.dtype)])
    if folder == "scores":
        return pa.schema([_lists("scores", num_columns - 1, "float32")])
    # The manifest does not say how many negatives there are.
    width = found.types[0].list_size if found.types and pa.types.is_fixed_size_list(found.types[0]) else 1
    numbers = [pa.field(name, kind, nullable=False) for name, kind in MINED_NUMBERS.items()]
    return pa.schema([_lists("negatives", width, "int64"), _lists("negative_scores", width, "float32"), *numbers])


def _guide_of(kind: str, manifest: Manifest) -> GuideInfo:
    return manifest.guides[manifest.vectors.index(kind)]


def _lists(name: str, width: int, dtype: str) -> pa.Field:
    field, _ = fixed_size_lists(name, np.empty((1, width), dtype))
    return field


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
