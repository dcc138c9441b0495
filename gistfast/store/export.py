"""The rows of a store as a dataset of texts and ids."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from gistfast.errors import ConfigError, StoreError
from gistfast.store.files import durable_file, one_line_write_errors

if TYPE_CHECKING:
    from datasets import Dataset

    from gistfast.store.reader import GuideStore

logger = logging.getLogger(__name__)

_ROWS_PER_BATCH = 16_384


def dataset_of(store: "GuideStore", split: Literal["train", "held_out"]) -> "Dataset":
    """The rows of `split` with their texts and, in `label`, their entry ids, mapped from a file.

    Raises:
        ConfigError: When there is no such split.
        StoreError: When the split has no rows, or the cache folder cannot be written.
    """
    from datasets import Dataset, config

    if split not in ("train", "held_out"):
        raise ConfigError(f"split is {split!r}, expected 'train' or 'held_out'")
    (selected,) = np.nonzero(store.held_out if split == "held_out" else ~store.held_out)
    if not len(selected):
        share = store.manifest.data.holdout
        raise StoreError(
            f"{store.path} has no rows in {split!r}, its --holdout was {share:g}: make one with another share"
        )
    path = Path(config.HF_DATASETS_CACHE) / "gistfast" / f"{store.fingerprint}-{split}.arrow"
    if not path.is_file():
        _write(store, selected, path)
    return Dataset.from_file(str(path), split=split)


def _write(store: "GuideStore", selected: "np.ndarray[tuple[int], np.dtype[np.int64]]", path: Path) -> None:
    logger.info("writing the texts of %d rows to %s", len(selected), path)
    num_columns = len(store.columns)
    label = pa.list_(pa.int64(), num_columns)
    schema = pa.schema([*((name, pa.large_string()) for name in store.columns), ("label", label)])
    with one_line_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable_file(path) as file, pa.ipc.new_stream(file, schema) as arrow:
            for first in range(0, len(selected), _ROWS_PER_BATCH):
                ids = store.rows[selected[first : first + _ROWS_PER_BATCH]]
                texts = [store.texts.to_arrow(ids[:, column]) for column in range(num_columns)]
                labels = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), num_columns)
                arrow.write_batch(pa.record_batch([*texts, labels], schema=schema))
