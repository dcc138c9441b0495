"""Rows of text in, shards of distinct texts and of row ids out."""

import logging
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from gistfast.errors import DataError
from gistfast.progress import progress
from gistfast.rows.dataset import Rows
from gistfast.store.keys import EntryIds, KeyTable, key_words, row_keys, text_keys
from gistfast.store.manifest import ROWS_PER_SHARD, Manifest
from gistfast.store.shards import Shard, fixed_size_lists, open_shard, read_commit, refuse_other_bytes, write_shard

logger = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]

TEXT_SCHEMA = pa.schema(
    [
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("role", pa.uint8(), nullable=False),
        pa.field("identity", pa.int64(), nullable=False),
    ]
)
# Beside the entry ids.
ROW_FIELDS = [
    pa.field("held_out", pa.bool_(), nullable=False),
    pa.field("task", pa.int32(), nullable=False),
]


class Ingest:
    """Takes rows in batches of any size and writes the shards of texts and rows of one segment.

    Ids do not depend on the batches: entries are numbered row by row, from the anchor on.

    Attributes:
        num_rows: Rows added.
        num_texts: New entries made of them.
        repeated: Rows left out, because earlier segments have them.
        tasks: Names of all tasks so far.
    """

    def __init__(self, store: Path, begun: Manifest, *, earlier: Path | None = None) -> None:
        """Write into the folder `store`.

        Args:
            store: Folder of the store.
            begun: What the store will be; its last segment, still empty, is the one to write.
            earlier: Folder of the store that has the segments before it, when that is another one.

        Raises:
            StoreError: When texts or rows of earlier segments are missing or damaged.
        """
        data = begun.data
        self.num_rows = 0
        self.num_texts = 0
        self.repeated = 0
        self.tasks = list(data.tasks)
        self._begun = begun
        self._entry_ids = EntryIds(one_role=data.one_role)
        self._known_rows = KeyTable()
        # Anchors are queries (0), all other columns documents (1), unless one entry serves both.
        self._roles = np.array([0] + [0 if data.one_role else 1] * (len(data.columns) - 1), dtype=np.int64)
        self._texts = _Pending(store, "texts", begun)
        self._rows = _Pending(store, "rows", begun)
        self._num_held_out = 0
        if len(data.segments) > 1:
            self._remember(earlier or store)

    def add(self, rows: Rows) -> None:
        """Add a batch of rows, but for those that earlier segments have.

        Raises:
            StoreError: When the disk is full or the folder cannot be written.
        """
        num_rows, num_columns = len(rows.texts[0]), len(rows.texts)
        texts = list(chain.from_iterable(zip(*rows.texts, strict=True)))
        keys = text_keys(texts)
        roles = np.tile(self._roles, num_rows)
        assigned = self._entry_ids.assign(keys, roles)
        new_texts = pa.array([texts[position] for position in assigned.new], type=pa.large_string())
        new_roles = pa.array(roles[assigned.new], type=pa.uint8())
        self._texts.append(pa.record_batch([new_texts, new_roles, pa.array(assigned.identity)], schema=TEXT_SCHEMA))
        self.num_texts += len(assigned.new)
        ids = assigned.ids.reshape(num_rows, num_columns)
        # A row of new entries cannot be known, so nothing is left behind of a row that is.
        new = self._known_rows.find(key_words(row_keys(ids))) < 0 if self._known_rows.count else np.full(num_rows, True)
        self._add_rows(ids[new], self._held_out(keys[1::num_columns])[new], self._task_numbers(rows)[new])
        self.repeated += num_rows - int(new.sum())

    def finish(self, *, skipped: int) -> Manifest:
        """Write what is left; the manifest with the segment that the rows make.

        Args:
            skipped: Bad rows that the source left out.

        Raises:
            DataError: When no row was added.
            StoreError: When the disk is full or the folder cannot be written.
        """
        if not self.num_rows + self.repeated:
            raise DataError("the source gave no rows: check the path and the columns")
        if self._begun.data.holdout and self.num_rows:
            self._report_holdout()
        *earlier, segment = self._begun.data.segments
        segment = replace(
            segment,
            num_rows=self.num_rows,
            num_texts=self.num_texts,
            skipped=skipped,
            repeated=self.repeated,
            texts=self._texts.finish(),
            rows=self._rows.finish(),
        )
        data = replace(self._begun.data, tasks=tuple(self.tasks), segments=(*earlier, segment))
        return replace(self._begun, data=data)

    def _add_rows(self, ids: Array, held_out: Array, tasks: Array) -> None:
        field, lists = fixed_size_lists("ids", ids)
        schema = pa.schema([field, *ROW_FIELDS])
        self._rows.append(pa.record_batch([lists, pa.array(held_out), pa.array(tasks)], schema=schema))
        self.num_rows += len(ids)
        self._num_held_out += int(held_out.sum())

    def _remember(self, store: Path) -> None:
        """Give every text of earlier segments its id again, and know their rows."""
        plan = self._begun.plan
        num_entries = sum(plan.texts) + sum(plan.rows)
        with progress("reading what the store has", total=num_entries, unit="texts and rows") as bar:
            for shard, size in enumerate(plan.texts):
                batch = self._sound(store, "texts", shard).batch
                self._entry_ids.assign(text_keys(batch.column("text").to_pylist()), batch.column("role").to_numpy())
                bar.advance(size)
            for shard, size in enumerate(plan.rows):
                ids = self._sound(store, "rows", shard).tensor(0, torch.int64)
                self._known_rows.number(np.unique(key_words(row_keys(ids.numpy())), axis=0))
                bar.advance(size)

    def _sound(self, store: Path, kind: str, shard: int) -> Shard:
        """A shard of an earlier segment.

        Every byte is looked at: a text that lost a bit would enter a second time, and be there twice once it is mended.
        """
        commit = read_commit(store, kind, shard, self._begun)
        refuse_other_bytes(store, commit)
        return open_shard(store, commit)

    def _held_out(self, positive_keys: list[bytes]) -> Array:
        # The key is as good as a random number that every occurrence of the text shares.
        share = key_words(positive_keys)[:, 1] / 2.0**64
        held_out: Array = share < self._begun.data.holdout
        return held_out

    def _task_numbers(self, rows: Rows) -> Array:
        """The number of each row's task, (R,) int32; -1 for none."""
        if rows.tasks is None:
            return np.full(len(rows.texts[0]), -1, np.int32)
        new = dict.fromkeys(task for task in rows.tasks if task is not None)
        self.tasks += [task for task in new if task not in self.tasks]
        numbers = {task: number for number, task in enumerate(self.tasks)}
        return np.array([-1 if task is None else numbers[task] for task in rows.tasks], np.int32)

    def _report_holdout(self) -> None:
        level = logging.INFO if 0 < self._num_held_out < self.num_rows else logging.WARNING
        counts = (self._num_held_out, self.num_rows, self._begun.data.holdout)
        logger.log(level, "held out %d of %d rows (--holdout %g of the distinct positives)", *counts)


class _Pending:
    """Rows of one kind that wait for their shard to fill."""

    def __init__(self, store: Path, kind: str, begun: Manifest) -> None:
        self._store = store
        self._kind = kind
        self._first_shard = len(begun.plan.sizes(kind))
        self._recipe = begun.recipe_of_segment(kind, len(begun.data.segments) - 1)
        self._batches: list[pa.RecordBatch] = []
        self._count = 0
        self._sizes: list[int] = []

    def append(self, batch: pa.RecordBatch) -> None:
        """Add rows and write the shards that are full."""
        self._batches.append(batch)
        self._count += batch.num_rows
        while self._count >= ROWS_PER_SHARD:
            self._write(ROWS_PER_SHARD)

    def finish(self) -> tuple[int, ...]:
        """Write the rest; the sizes of all shards."""
        if self._count:
            self._write(self._count)
        return tuple(self._sizes)

    def _write(self, size: int) -> None:
        waiting = pa.concat_batches(self._batches)
        shard = self._first_shard + len(self._sizes)
        write_shard(self._store, self._kind, shard, waiting.slice(0, size), self._recipe)
        self._sizes.append(size)
        self._count -= size
        self._batches = [waiting.slice(size)] if self._count else []
