"""Is every byte of a store what was written?"""

from pathlib import Path

import torch

from gistfast.errors import StoreError
from gistfast.progress import progress
from gistfast.store.files import file_checksum
from gistfast.store.manifest import Manifest
from gistfast.store.shards import KINDS, committed_shards, open_shard, read_commit, shard_path


def problems_of(store: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the shards of a store, one line each; empty when all is sound."""
    problems = _plan_problems(manifest)
    # Scores are made last and may be absent altogether.
    kinds = [kind for kind in KINDS if kind != "scores" or committed_shards(store, kind)]
    shards = [(kind, index) for kind in kinds for index in range(len(manifest.plan.sizes(kind)))]
    with progress("checking the store", total=len(shards), unit="shards") as bar:
        for kind, index in shards:
            try:
                _check_shard(store, kind, index, manifest)
            except StoreError as error:
                problems.append(str(error))
            bar.advance(1)
    return problems


def _plan_problems(manifest: Manifest) -> list[str]:
    plan, data = manifest.plan, manifest.data
    counts = (("texts", sum(plan.texts), data.num_texts), ("rows", sum(plan.rows), data.num_rows))
    return [
        f"store.json plans {planned} {kind} and counts {counted}: make the store anew"
        for kind, planned, counted in counts
        if planned != counted
    ]


def _check_shard(store: Path, kind: str, index: int, manifest: Manifest) -> None:
    commit = read_commit(store, kind, index, plan=manifest.plan, recipe=manifest.recipe)
    path = shard_path(store, commit)
    if file_checksum(path) != commit.xxh3_128:
        raise StoreError(f"{path} was changed after it was written (its checksum differs): restore it")
    shard = open_shard(store, commit)
    if kind == "rows":
        ids = shard.tensor(0, torch.int64)
        if int(ids.min()) < 0 or int(ids.max()) >= manifest.data.num_texts:
            raise StoreError(f"{path} has ids beyond its {manifest.data.num_texts} texts: make the store anew")
