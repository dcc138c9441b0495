"""The guide stores of a run: opened, named, and refused where the run cannot use them."""

import logging
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from gistfast.errors import ConfigError
from gistfast.store import GuideStore
from gistfast.store.export import check_negatives

logger = logging.getLogger(__name__)

Stores = Mapping[str, GuideStore]


def open_stores(paths: Sequence[str]) -> Stores:
    """The stores by their names, in the order of their paths.

    Raises:
        ConfigError: When two are one.
        StoreError: When one is not there or not complete.
    """
    stores = [GuideStore.open(path) for path in paths]
    for one, other in combinations(stores, 2):
        if one.fingerprint == other.fingerprint:
            raise ConfigError(f"{one.path} and {other.path} hold the same rows and guide vectors: give one of them")
    return dict(zip(short_names([store.path for store in stores]), stores, strict=True))


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes for no two to be the same: mostly the folder's name."""
    parts = [path.resolve().parts for path in paths]
    names = ["/".join(own) for own in parts]
    for count in range(max(map(len, parts)), 0, -1):
        shorter = ["/".join(own[-count:]) for own in parts]
        if len(set(shorter)) == len(shorter):
            names = shorter
    return names


def check_stores(
    stores: Stores,
    *,
    batch_size: int,
    mined_negatives: int,
    evaluate: bool,
    only_rows: bool = True,
    processes: int = 1,
) -> None:
    """Refuse stores that have too little for the run; say which are not evaluated.

    Args:
        stores: By name.
        batch_size: Rows of a batch.
        mined_negatives: That each row gets.
        evaluate: Whether held-out rows are to be evaluated.
        only_rows: Whether nothing else is, so that some must be there.
        processes: That take a step together.

    Raises:
        ConfigError: When one has fewer rows than a step or fewer mined negatives than asked for, or none has rows to
            evaluate.
        StoreError: When one has no mined negatives.
    """
    for store in stores.values():
        num_rows = num_train_rows(store)
        if num_rows < 2 * processes:
            raise ConfigError(f"{store.path} has {num_rows} rows to train on: a step needs {2 * processes} at least")
        if batch_size * processes > num_rows:
            several = f" in {processes} processes" if processes > 1 else ""
            raise ConfigError(
                f"--batch-size {batch_size}{several} is larger than the data: "
                f"{store.path} has {num_rows} rows to train on: give {num_rows // processes} or less"
            )
        if mined_negatives:
            check_negatives(store, mined_negatives)
    if evaluate:
        without = [str(store.path) for store in stores.values() if not store.held_out.any()]
        if only_rows and len(without) == len(stores):
            have = "has" if len(without) == 1 else "have"
            raise ConfigError(
                f"--eval-steps needs held-out rows, {' and '.join(without)} {have} none: make the store with --holdout "
                "or give --eval-sts"
            )
        for path in without:
            logger.info("%s has no held-out rows: it is not evaluated", path)


def num_train_rows(store: GuideStore) -> int:
    """Rows that are not held out."""
    return int(store.num_rows - store.held_out.sum())
