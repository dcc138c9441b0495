"""What a store is and what it is becoming: store.json and, while shards are missing, next.json beside it."""

import logging
import os
import re
from pathlib import Path
from typing import Self

from gistfast.errors import StoreError
from gistfast.store.files import lock, one_line_write_errors, read_json, sync_folder
from gistfast.store.manifest import MANIFEST_NAME, PLAN_NAME, Manifest
from gistfast.store.shards import COMMITS, commit_path, pending_shards

logger = logging.getLogger(__name__)


def is_store(folder: Path) -> bool:
    """Whether a store is in `folder`, finished or not."""
    return (folder / MANIFEST_NAME).is_file() or (folder / PLAN_NAME).is_file()


def read_finished(folder: Path) -> Manifest:
    """The manifest of the finished store in `folder`.

    Raises:
        StoreError: When there is none, it is not finished, of another version, or changed by hand.
    """
    if (folder / MANIFEST_NAME).is_file():
        return Manifest.read(folder / MANIFEST_NAME)
    if not (folder / PLAN_NAME).is_file():
        raise StoreError(f"{folder} has no {MANIFEST_NAME}: make a guide store with `gistfast precompute`")
    plan = Manifest.read(folder / PLAN_NAME)
    total = len(plan.vectors) * len(plan.plan.texts)
    missing = sum(missing_vectors(folder, plan).values())
    raise StoreError(
        f"{folder} is not finished: stage 1 has {total - missing} of {total} shards of vectors: "
        "run `gistfast precompute ... --resume`"
    )


def read_plan(folder: Path) -> Manifest:
    """What the store in `folder` is to be: next.json, or store.json when nothing is under way.

    Raises:
        StoreError: When there is neither, or the file is of another version or changed by hand.
    """
    unfinished = folder / PLAN_NAME
    return Manifest.read(unfinished) if unfinished.is_file() else read_finished(folder)


def missing_vectors(folder: Path, plan: Manifest) -> dict[str, int]:
    """By the name of the guide, how many shards of its vectors have no commit; guides that lack none are left out."""
    pairs = zip(plan.guides, plan.vectors, strict=True)
    missing = {guide.name: len(pending_shards(folder, kind, plan)) for guide, kind in pairs}
    return {name: count for name, count in missing.items() if count}


def refuse_missing_vectors(folder: Path, plan: Manifest) -> None:
    """Refuse to go on with a plan that is not complete.

    Raises:
        StoreError: When a guide lacks vectors.
    """
    if missing := sum(missing_vectors(folder, plan).values()):
        raise StoreError(f"{folder} still lacks {missing} shards of vectors: go on with --resume")


def finish_plan(folder: Path, plan: Manifest) -> None:
    """Let `plan` be the store, in one step; nothing happens when another process did so.

    Raises:
        StoreError: When the folder cannot be written.
    """
    unfinished = folder / PLAN_NAME
    # Meanwhile another process may have finished this plan and begun the next one.
    with FolderLock(folder), one_line_write_errors(folder):
        if unfinished.is_file() and Manifest.read(unfinished) == plan:
            unfinished.rename(folder / MANIFEST_NAME)
            sync_folder(folder)


def remove_unplanned(folder: Path, *plans: Manifest) -> list[str]:
    """Remove the commits of shards that no plan has, with their files; their names.

    They are what an append left that was interrupted while it read rows, or that was given up.
    """
    removed = []
    planned = {
        commit_path(folder, kind, shard).name for plan in plans for kind in plan.kinds for shard in plan.shards_of(kind)
    }
    for commit in sorted((folder / COMMITS).glob("*.json")):
        if commit.name in planned or not re.match(r"(texts|rows|vectors|scores)-", commit.name):
            continue
        file = read_json(commit).get("file")
        commit.unlink()
        if isinstance(file, str) and re.fullmatch(r"[a-z]+(/[0-9a-f]+)?/[0-9]+-[0-9a-f]+\.arrow", file):
            (folder / file).unlink(missing_ok=True)
        removed.append(commit.name)
    return removed


class FolderLock:
    """Holds a store for one process that adds rows to it or plans a guide; released when the process ends.

    Where the file system has no locks, it holds nothing.
    """

    def __init__(self, folder: Path) -> None:
        """Wait until no other process holds it."""
        self._descriptor = os.open(folder, os.O_RDONLY)
        if lock(self._descriptor, wait=False) is False:
            logger.info("another process is at %s: waiting for it", folder)
            lock(self._descriptor, wait=True)

    def release(self) -> None:
        """Let other processes in."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
