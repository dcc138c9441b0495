"""Rows of text in, shards of distinct texts and of row ids out."""

import logging
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gistfast.dataset import Rows
from gistfast.errors import DataError
from gistfast.store.keys import EntryIds, key_words, text_keys
from gistfast.store.manifest import ROWS_PER_SHARD, Plan
from gistfast.store.shards import fixed_size_lists, write_shard

logger = logging.getLogger(__name__)

TEXT_SCHEMA = pa.schema(
    [
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("role", pa.uint8(), nullable=False),
        pa.field("identity", pa.int64(), nullable=False),
    ]
)


class Ingest:
    """Takes rows in batches of any size and writes the shards of texts and rows of a new store.

    Ids do not depend on the batches: entries are numbered row by row, from the anchor on.

    Attributes:
        num_rows: Rows added.
        num_texts: Entries made of them.
    """

    def __init__(self, store: Path, *, num_columns: int, holdout: float, shared_prompt: bool, recipe: str) -> None:
        """Write into the folder `store`.

        Args:
            store: An empty folder.
            num_columns: Texts in a row (C).
            holdout: Share of the distinct positives to hold out, 0 to 1.
            shared_prompt: Whether anchors are embedded with the same prompt as the other columns.
            recipe: What commits carry.
        """
        self.num_rows = 0
        self.num_texts = 0
        self._store = store
        self._recipe = recipe
        self._holdout = holdout
        self._entry_ids = EntryIds(roles_share_entries=shared_prompt)
        # Anchors are queries (0), all other columns documents (1), unless one prompt serves both.
        self._roles = np.array([0] + [0 if shared_prompt else 1] * (num_columns - 1), dtype=np.int64)
        self._texts = _Pending(store, "texts", recipe)
        self._rows = _Pending(store, "rows", recipe)
        self._num_held_out = 0

    def add(self, rows: Rows) -> None:
        """Add a batch of rows.

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
        held_out = self._held_out(keys[1::num_columns])
        field, ids = fixed_size_lists("ids", assigned.ids.reshape(num_rows, num_columns))
        schema = pa.schema([field, pa.field("held_out", pa.bool_(), nullable=False)])
        self._rows.append(pa.record_batch([ids, pa.array(held_out)], schema=schema))
        self.num_rows += num_rows
        self.num_texts = self._entry_ids.count
        self._num_held_out += int(held_out.sum())

    def finish(self) -> Plan:
        """Write what is left; the plan of the shards.

        Raises:
            DataError: When no row was added.
            StoreError: When the disk is full or the folder cannot be written.
        """
        if not self.num_rows:
            raise DataError("the source gave no rows: check the path and the columns")
        if self._holdout:
            self._report_holdout()
        return Plan(texts=self._texts.finish(), rows=self._rows.finish())

    def _held_out(self, positive_keys: list[bytes]) -> np.ndarray[Any, Any]:
        # The key is as good as a random number that every occurrence of the text shares.
        share = key_words(positive_keys)[:, 1] / 2.0**64
        held_out: np.ndarray[Any, Any] = share < self._holdout
        return held_out

    def _report_holdout(self) -> None:
        level = logging.INFO if 0 < self._num_held_out < self.num_rows else logging.WARNING
        counts = (self._num_held_out, self.num_rows, self._holdout)
        logger.log(level, "held out %d of %d rows (--holdout %g of the distinct positives)", *counts)


class _Pending:
    """Rows of one kind that wait for their shard to fill."""

    def __init__(self, store: Path, kind: str, recipe: str) -> None:
        self._store = store
        self._kind = kind
        self._recipe = recipe
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
        write_shard(self._store, self._kind, len(self._sizes), waiting.slice(0, size), self._recipe)
        self._sizes.append(size)
        self._count -= size
        self._batches = [waiting.slice(size)] if self._count else []
