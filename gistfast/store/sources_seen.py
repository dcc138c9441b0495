"""Fingerprints of sources whose rows are in a store, kept so that a run that goes on need not read them again."""

from pathlib import Path

from gistfast.errors import StoreError
from gistfast.rows.dataset import RowSource
from gistfast.store.files import read_json, write_json

NAME = "sources.json"


def recall_fingerprint(store: Path, source: RowSource) -> None:
    """Tell the source its fingerprint, if the store knows its files and they have not been written to since."""
    if (stamp := source.stamp()) and (known := _seen(store).get(stamp)):
        source.fingerprint = known


def keep_fingerprint(store: Path, source: RowSource) -> None:
    """Let the store know the source's fingerprint.

    Raises:
        StoreError: When the folder cannot be written.
    """
    seen = _seen(store)
    if (stamp := source.stamp()) and seen.get(stamp) != source.fingerprint:
        write_json(store / NAME, {**seen, stamp: source.fingerprint})


def _seen(store: Path) -> dict[str, str]:
    """Fingerprints by stamp; none where the file is missing or damaged, because nothing depends on it."""
    try:
        return read_json(store / NAME)
    except StoreError:
        return {}
