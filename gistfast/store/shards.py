"""One shard: an Arrow file of one record batch, and the commit that makes it exist.

Any number of writers may write the same shard at once. Each writes a file of its own name; the first whose
commit takes its place wins, and the others remove their files.
"""

import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from gistfast.errors import StoreError
from gistfast.store.files import (
    ChecksumWriter,
    changed_bytes,
    create_json,
    durable_file,
    new_token,
    one_line_write_errors,
    read_json,
    write_json,
)
from gistfast.store.manifest import Manifest

COMMITS = "commits"
# What the processor loads at once, and what Arrow recommends.
ALIGNMENT = 64
ADVICE = "mend it with `gistfast store repair`, or restore it"

_FILE = re.compile(r"([a-z]+(?:/[0-9a-f]+)?)/([0-9]+)-[0-9a-f]+\.arrow")


@dataclass(frozen=True)
class Commit:
    """What commits/<kind>-<shard>.json says of one shard.

    Attributes:
        file: Path inside the store.
        rows: Rows in the file.
        bytes: Size of the file.
        xxh3_128: Hash of the file.
        recipe: From the manifest: a shard of another guide or other data has another one.
    """

    file: str
    rows: int
    bytes: int
    xxh3_128: str
    recipe: str


@dataclass(frozen=True)
class Shard:
    """A shard in memory, mapped from its file: pages are read when they are touched.

    Attributes:
        batch: The columns.
        raw: The bytes of the whole file, under the columns. Writing to them never reaches the file.
    """

    batch: pa.RecordBatch
    raw: torch.Tensor

    def tensor(self, column: int, dtype: torch.dtype) -> torch.Tensor:
        """The fixed-size lists of `column` as a (rows, width) tensor over the same memory."""
        lists = self.batch.column(column)
        values = lists.values
        start = values.buffers()[1].address - self.raw.data_ptr()
        width = lists.type.list_size
        num_bytes = self.batch.num_rows * width * dtype.itemsize
        return self.raw[start : start + num_bytes].view(dtype).view(-1, width)


def write_shard(store: Path, kind: str, index: int, batch: pa.RecordBatch, recipe: str) -> bool:
    """Write shard `index` of `kind` and commit it; False when another writer had committed it first.

    Args:
        store: Folder of the store.
        kind: Folder of the shard inside it: "texts", "rows", "vectors/<guide>", ...
        index: Number of the shard.
        batch: What is in it.
        recipe: What decides what is in it, from `Manifest.recipe`.

    Raises:
        StoreError: When the disk is full or the folder cannot be written.
    """
    commit = _write_file(store, kind, index, batch, recipe)
    committed_at = commit_path(store, kind, index)
    try:
        create_json(committed_at, asdict(commit))
    finally:
        # Also after an interruption: the file stays exactly if its commit does.
        won = committed_at.is_file() and read_json(committed_at).get("file") == commit.file
        if not won:
            with suppress(OSError):
                (store / commit.file).unlink()
    return won


def replace_shard(store: Path, kind: str, index: int, batch: pa.RecordBatch, recipe: str) -> Commit:
    """Write a shard in place of one that is there, damaged or lost; the new commit.

    The new file is whole before its commit takes the old one's place, in one step. Readers that have the old file
    mapped keep it. Arguments are those of `write_shard`.

    Raises:
        StoreError: When the disk is full or the folder cannot be written.
    """
    committed_at = commit_path(store, kind, index)
    old = file_named_by(committed_at)
    commit = _write_file(store, kind, index, batch, recipe)
    try:
        write_json(committed_at, asdict(commit))
    except BaseException:
        if file_named_by(committed_at) != commit.file:
            (store / commit.file).unlink(missing_ok=True)
        raise
    # A commit that was changed by hand may name the file of another shard.
    if _is_file_of(kind, index, old) and is_inside(store, store / str(old)):
        with suppress(OSError):
            (store / str(old)).unlink()
    return commit


def file_named_by(commit: Path) -> str | None:
    """The file inside the store that a commit names; None when it cannot be read or names no shard's file."""
    try:
        file = read_json(commit).get("file")
    except StoreError:
        return None
    return file if isinstance(file, str) and _FILE.fullmatch(file) else None


def is_inside(store: Path, path: Path) -> bool:
    """Whether the folder of `path` is in the store, and not one that a link in the store leads to."""
    return path.parent.resolve().is_relative_to(store.resolve())


def committed_shards(store: Path, kind: str) -> set[int]:
    """Numbers of the shards of `kind` that have a commit."""
    folder = store / COMMITS
    pattern = re.compile(rf"{_commit_name(kind)}-(\d+)\.json")
    matches = (pattern.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return {int(match[1]) for match in matches if match}


def pending_shards(store: Path, kind: str, manifest: Manifest) -> list[int]:
    """Numbers of the shards of `kind` in the plan that have no commit yet, in order."""
    done = committed_shards(store, kind)
    return [index for index in range(len(manifest.plan.sizes(kind))) if index not in done]


def read_commit(store: Path, kind: str, index: int, manifest: Manifest) -> Commit:
    """The commit of one shard of a store with this manifest.

    Raises:
        StoreError: When it is missing, damaged, made for another store, or points outside the store.
    """
    path = commit_path(store, kind, index)
    record = read_json(path, ADVICE)
    if {field.name for field in fields(Commit)} != record.keys():
        found = ", ".join(sorted(record)) or "none"
        raise StoreError(f"{path} has other fields than those of a commit ({found}): {ADVICE}")
    commit = Commit(**record)
    if not _is_file_of(kind, index, commit.file):
        raise StoreError(f"{path} names the file {commit.file!r}, expected one in {kind}/ of its number: {ADVICE}")
    if commit.recipe != manifest.recipe(kind, index):
        raise StoreError(f"{path} was written for another guide or other data than this store: {ADVICE}")
    planned = manifest.plan.sizes(kind)[index]
    if commit.rows != planned:
        raise StoreError(f"{path} says {commit.rows} rows, the plan {planned}: {ADVICE}")
    return commit


def shard_path(store: Path, commit: Commit) -> Path:
    """The file that `commit` names.

    Raises:
        StoreError: When it is missing or has another size.
    """
    path = store / commit.file
    size = path.stat().st_size if path.is_file() else None
    if size != commit.bytes:
        found = "is missing" if size is None else f"has {size} bytes, expected {commit.bytes}"
        raise StoreError(f"{path} {found}: {ADVICE}")
    return path


def read_shard(store: Path, kind: str, index: int, manifest: Manifest) -> Shard:
    """One shard of a store with this manifest, mapped.

    Raises:
        StoreError: When its commit or its file is missing, damaged, or made for another store.
    """
    commit = read_commit(store, kind, index, manifest)
    try:
        return open_shard(store, commit)
    except StoreError:
        # A repair may have put another file in its place since.
        again = read_commit(store, kind, index, manifest)
        if again == commit:
            raise
        return open_shard(store, again)


def refuse_other_bytes(store: Path, commit: Commit) -> None:
    """Read all of a shard's file, and refuse it when it is not what was written.

    Raises:
        StoreError: When it is missing, or has another size or checksum.
    """
    if problem := changed_bytes(shard_path(store, commit), commit.xxh3_128, ADVICE):
        raise StoreError(problem)


def open_shard(store: Path, commit: Commit) -> Shard:
    """The shard that `commit` describes, mapped.

    Raises:
        StoreError: When its file is missing, has another size, or is not what the commit says.
    """
    path = shard_path(store, commit)
    # Mapped by torch and not by Arrow: its mapping holds no file descriptor, so the number of shards is not
    # limited, and its memory counts as writable, which torch asks of what it wraps.
    raw = torch.from_file(str(path), shared=False, size=commit.bytes, dtype=torch.uint8)
    try:
        batch = pa.ipc.open_file(pa.py_buffer(raw.numpy())).get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path} is not a readable Arrow file ({error}): {ADVICE}") from error
    if batch.num_rows != commit.rows:
        raise StoreError(f"{path} holds {batch.num_rows} rows, its commit says {commit.rows}: {ADVICE}")
    return Shard(batch, raw)


def fixed_size_lists(name: str, values: np.ndarray[Any, Any]) -> tuple[pa.Field, pa.Array]:
    """A (rows, width) array as an Arrow column of lists of `width` values, without a copy."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.field(name, column.type, nullable=False), column


def commit_path(store: Path, kind: str, index: int) -> Path:
    """Where the commit of a shard is, or will be."""
    return store / COMMITS / f"{_commit_name(kind)}-{index:05d}.json"


def commits_of(store: Path, kind: str) -> list[Path]:
    """The commits of a kind that lie in the store, in the order of their shards."""
    return sorted((store / COMMITS).glob(f"{_commit_name(kind)}-*.json"))


def _is_file_of(kind: str, index: int, file: object) -> bool:
    match = _FILE.fullmatch(file) if isinstance(file, str) else None
    return match is not None and (match[1], int(match[2])) == (kind, index)


def _write_file(store: Path, kind: str, index: int, batch: pa.RecordBatch, recipe: str) -> Commit:
    """Write a shard under a name that no other writer has; the commit to be."""
    name = f"{kind}/{index:05d}-{new_token()}.arrow"
    path = store / name
    with one_line_write_errors(path):
        for folder in (path.parent, store / COMMITS):
            folder.mkdir(parents=True, exist_ok=True)
        with durable_file(path) as file:
            sink = ChecksumWriter(file)
            aligned = _aligned(batch)
            with pa.ipc.new_file(sink, aligned.schema) as arrow:
                arrow.write_batch(aligned)
    return Commit(name, batch.num_rows, sink.num_bytes, sink.hexdigest(), recipe)


def _commit_name(kind: str) -> str:
    return kind.replace("/", "-")


def _aligned(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with as much padding in its schema as brings the first column to a multiple of 64 bytes."""
    for padding in range(0, ALIGNMENT, 8):
        padded = batch.replace_schema_metadata({"padding": " " * padding})
        # Headers have the same size for one row as for all.
        if _first_column_offset(padded.slice(0, 1)) % ALIGNMENT == 0:
            break
    return padded


def _first_column_offset(batch: pa.RecordBatch) -> int:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as arrow:
        arrow.write_batch(batch)
    file = sink.getvalue()
    column = pa.ipc.open_file(file).get_batch(0).column(0)
    values = column.values if pa.types.is_fixed_size_list(column.type) else column
    offset: int = values.buffers()[1].address - file.address
    return offset
