"""The rows of a store as a dataset of texts and ids."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from gistfast.errors import ConfigError, StoreError
from gistfast.store.files import durable_file, one_line_write_errors

if TYPE_CHECKING:
    from datasets import Dataset

    from gistfast.store.reader import GuideStore

logger = logging.getLogger(__name__)

Ids = np.ndarray[Any, np.dtype[np.int64]]

_ROWS_PER_BATCH = 16_384


def dataset_of(store: "GuideStore", split: Literal["train", "held_out"], negatives: int = 0) -> "Dataset":
    """The rows of `split` with their texts and, in `label`, their entry ids, mapped from a file.

    Args:
        store: The store.
        split: "train" or "held_out".
        negatives: Mined negatives to add to each row, as `rows_with_negatives` has them.

    Raises:
        ConfigError: When there is no such split, or fewer negatives were mined.
        StoreError: When the split has no rows, nothing was mined, or the cache folder cannot be written.
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
    name = f"{store.fingerprint}-{split}"
    if negatives:
        check_negatives(store, negatives)
        name += f"-{store.mined_kind.replace('/', '-')}-{negatives}"
    path = Path(config.HF_DATASETS_CACHE) / "gistfast" / f"{name}.arrow"
    if not path.is_file():
        _write(store, selected, negatives, path)
    return Dataset.from_file(str(path), split=split)


def check_negatives(store: "GuideStore", number: int) -> None:
    """Refuse to add more mined negatives to each row than there are; say where they are too few.

    Raises:
        ConfigError: When fewer negatives were mined of each row.
        StoreError: When nothing was mined.
    """
    mined = store.mined.negatives
    if number > mined.shape[1]:
        raise ConfigError(
            f"{number} mined negatives are asked for, {store.path} has {mined.shape[1]} of each row: "
            f"mine more with `gistfast precompute ... --resume --negatives {number}`"
        )
    # The ones that were not found stand at the end.
    few, none = (int((mined[:, place] < 0).sum()) for place in (number - 1, 0))
    if few:
        logger.warning(
            "%d of %d rows have fewer than %d mined negatives, which are repeated; %d have none",
            few, len(mined), number, none,
        )  # fmt: skip


def rows_with_negatives(store: "GuideStore", rows: Ids, number: int) -> Ids:
    """Entry ids of rows with their hardest mined negatives behind their own columns, (R, C + number).

    Where fewer were found, they are repeated from the first on. A row without any gets its own positive in their
    place, which the guided loss never takes for a negative of the row; other losses should leave such rows out.

    Args:
        store: The store, checked by `check_negatives`.
        rows: Numbers of rows, (R,).
        number: Mined negatives to add.
    """
    own = store.rows[rows]
    if not number:
        return own
    mined = store.mined.negatives[rows, :number]
    counts = (mined >= 0).sum(axis=1)
    places = np.arange(number) % np.maximum(counts, 1)[:, None]
    negatives = np.where(counts[:, None] > 0, np.take_along_axis(mined, places, axis=1), own[:, 1:2])
    return np.concatenate([own, negatives], axis=1)


def _write(store: "GuideStore", selected: Ids, negatives: int, path: Path) -> None:
    logger.info("writing the texts of %d rows to %s", len(selected), path)
    num_columns = len(store.columns) + negatives
    names = [*store.columns, *(f"negative_{number}" for number in range(len(store.columns) - 1, num_columns - 1))]
    label = pa.list_(pa.int64(), num_columns)
    schema = pa.schema([*((name, pa.large_string()) for name in names), ("label", label)])
    with one_line_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable_file(path) as file, pa.ipc.new_stream(file, schema) as arrow:
            for first in range(0, len(selected), _ROWS_PER_BATCH):
                ids = rows_with_negatives(store, selected[first : first + _ROWS_PER_BATCH], negatives)
                texts = [store.texts.to_arrow(ids[:, column]) for column in range(num_columns)]
                labels = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), num_columns)
                arrow.write_batch(pa.record_batch([*texts, labels], schema=schema))
