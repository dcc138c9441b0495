"""Is every byte of a store what was written?"""

from pathlib import Path

import torch

from gistfast.errors import StoreError
from gistfast.progress import progress
from gistfast.store.files import file_checksum
from gistfast.store.manifest import Manifest
from gistfast.store.mined import mined_info
from gistfast.store.shards import committed_shards, open_shard, read_commit, shard_path


def problems_of(store: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the shards of a store, one line each; empty when all is sound."""
    problems = []
    # Scores are made last and may be absent altogether.
    kinds = [kind for kind in manifest.kinds if kind != manifest.scores or committed_shards(store, kind)]
    try:
        mined = mined_info(store, manifest.fingerprint)
        kinds += [mined.kind] if mined else []
    except StoreError as error:
        problems.append(str(error))
    shards = [(kind, index) for kind in kinds for index in manifest.shards_of(kind)]
    with progress("checking the store", total=len(shards), unit="shards") as bar:
        for kind, index in shards:
            try:
                _check_shard(store, kind, index, manifest)
            except StoreError as error:
                problems.append(str(error))
            bar.advance(1)
    return problems


def _check_shard(store: Path, kind: str, index: int, manifest: Manifest) -> None:
    commit = read_commit(store, kind, index, manifest)
    path = shard_path(store, commit)
    if file_checksum(path) != commit.xxh3_128:
        raise StoreError(f"{path} was changed after it was written (its checksum differs): restore it")
    shard = open_shard(store, commit)
    if kind == "rows":
        ids = shard.tensor(0, torch.int64)
        if int(ids.min()) < 0 or int(ids.max()) >= manifest.data.num_texts:
            raise StoreError(f"{path} has ids beyond its {manifest.data.num_texts} texts: make the store anew")
