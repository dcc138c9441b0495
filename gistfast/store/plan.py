"""What a store is and what it is becoming: store.json and, while shards are missing, next.json beside it."""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from gistfast.errors import StoreError
from gistfast.store.files import lock, one_line_write_errors, sync_folder
from gistfast.store.manifest import MANIFEST_NAME, PLAN_NAME, Manifest
from gistfast.store.shards import COMMITS, commit_path, file_named_by, is_inside, pending_shards

logger = logging.getLogger(__name__)

MAKE_ONE = "make a guide store with `gistfast precompute`"
# Commits of other names are none of this module's business.
_OURS = re.compile(r"(texts|rows|vectors|scores)-")


def is_store(folder: Path) -> bool:
    """Whether a store is in `folder`, finished or not."""
    # In the order in which another process renames them.
    return (folder / PLAN_NAME).is_file() or (folder / MANIFEST_NAME).is_file()


def read_finished(folder: Path) -> Manifest:
    """The manifest of the finished store in `folder`.

    Raises:
        StoreError: When there is none, it is not finished, of another version, or changed by hand.
    """
    finished = folder / MANIFEST_NAME
    plan = None if finished.is_file() else read_unfinished(folder)
    # Also when another process finished the store since.
    if finished.is_file():
        return Manifest.read(finished)
    if plan is None:
        raise StoreError(no_store(folder))
    total = len(plan.vectors) * len(plan.plan.texts)
    missing = sum(missing_vectors(folder, plan).values())
    raise StoreError(
        f"{folder} is not finished: stage 1 has {total - missing} of {total} shards of vectors: "
        "run `gistfast precompute ... --resume`"
    )


def refuse_no_store(folder: Path) -> None:
    """Refuse a folder without a store, finished or not.

    Raises:
        StoreError: When there is none.
    """
    if not is_store(folder):
        raise StoreError(no_store(folder))


def has_lost_its_name(folder: Path) -> bool:
    """Whether the shards of a store are in `folder`, and nothing says what they are."""
    return not is_store(folder) and any((folder / COMMITS).glob("texts-*.json"))


def no_store(folder: Path) -> str:
    """What to tell of a folder without a store."""
    if has_lost_its_name(folder):
        lost = f"{folder} has the shards of a store and lost its {MANIFEST_NAME}"
        return f"{lost}: restore that file, or remove the folder and make it anew"
    return f"{folder} has no {MANIFEST_NAME}: {MAKE_ONE}"


def read_unfinished(folder: Path) -> Manifest | None:
    """What the store in `folder` is becoming; None when nothing is under way.

    Raises:
        StoreError: When next.json is of another version or changed by hand.
    """
    unfinished = folder / PLAN_NAME
    if not unfinished.is_file():
        return None
    try:
        return Manifest.read(unfinished)
    except StoreError:
        if not unfinished.is_file():
            # Another process finished it between the look and the reading.
            return None
        raise


def read_plan(folder: Path) -> Manifest:
    """What the store in `folder` is to be: next.json, or store.json when nothing is under way.

    Raises:
        StoreError: When there is neither, or the file is of another version or changed by hand.
    """
    return read_unfinished(folder) or read_finished(folder)


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


def unplanned_files(folder: Path, *plans: Manifest) -> list[Path]:
    """The commits of shards that no plan has, each before its file.

    They are what an append left that was interrupted while it read rows, or that was given up.
    """
    planned = {commit.name for commit in _planned_commits(folder, plans)}
    commits = sorted((folder / COMMITS).glob("*.json"))
    unplanned = [commit for commit in commits if _OURS.match(commit.name) and commit.name not in planned]
    # A commit that was copied by hand names the file of another one.
    needed = {file_named_by(commit) for commit in _planned_commits(folder, plans)} if unplanned else set()
    files = []
    for commit in unplanned:
        file = file_named_by(commit)
        files.append(commit)
        if file is not None and file not in needed and is_inside(folder, folder / file):
            files.append(folder / file)
    return files


def remove_unplanned(folder: Path, *plans: Manifest) -> None:
    """Remove the commits of shards that no plan has, with their files."""
    for path in unplanned_files(folder, *plans):
        path.unlink(missing_ok=True)


def _planned_commits(folder: Path, plans: Iterable[Manifest]) -> Iterator[Path]:
    for plan in plans:
        for kind in plan.kinds:
            for shard in plan.shards_of(kind):
                yield commit_path(folder, kind, shard)


class FolderLock:
    """Holds a store for one process that adds rows to it or plans a guide; released when the process ends.

    Attributes:
        is_held: False where the file system has no locks.
    """

    def __init__(self, folder: Path, *, wait: bool = True) -> None:
        """Wait until no other process holds it.

        Raises:
            StoreError: When another process holds it and `wait` is False.
        """
        self._descriptor = os.open(folder, os.O_RDONLY)
        held = lock(self._descriptor, wait=False)
        if held is False and not wait:
            self.release()
            raise StoreError(f"another process is at {folder}: try again when it has ended")
        if held is False:
            logger.info("another process is at %s: waiting for it", folder)
            held = lock(self._descriptor, wait=True)
        self.is_held = held is True

    def release(self) -> None:
        """Let other processes in."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
