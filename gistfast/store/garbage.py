"""What lies in a store and beside it and nobody reads: found, and removed.

A process that writes has temporary files, and for an instant a shard without its commit. Files that no commit names
are therefore left alone until they are an hour old. All else is looked at under the lock that appending and adding a
guide hold, so that what is not planned now is not about to be.
"""

import re
import time
from collections.abc import Collection, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from gistfast.errors import StoreError
from gistfast.store.files import nobody_holds, one_line_write_errors, sync_folder
from gistfast.store.manifest import MANIFEST_NAME, PLAN_NAME, Manifest
from gistfast.store.mined import mined_info
from gistfast.store.plan import FolderLock, read_unfinished, refuse_no_store, unplanned_files
from gistfast.store.replace import leftovers_of, remove_leftover, replacement_of
from gistfast.store.shards import COMMITS, commit_path, commits_of, file_named_by, is_inside, read_commit, shard_path

# Writing one file takes minutes at worst.
SECONDS_TO_WRITE = 3600.0

_SHARD_FILE = re.compile(r"([0-9]+)-[0-9a-f]+\.arrow")


@dataclass(frozen=True)
class Garbage:
    """Something to remove.

    Attributes:
        path: A file, or a folder beside the store.
        what: What it is, in the plural, such as "temporary files".
        num_bytes: What removing it frees.
    """

    path: Path
    what: str
    num_bytes: int


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be.

    Attributes:
        garbage: All of it, in the order of removal.
        num_young: Files that were left alone, because a process may be writing them.
    """

    garbage: tuple[Garbage, ...]
    num_young: int

    @property
    def num_bytes(self) -> int:
        """What is freed."""
        return sum(item.num_bytes for item in self.garbage)


def collect_garbage(
    store: str | Path, *, unfinished: bool = False, now: bool = False, dry_run: bool = False
) -> Collected:
    """Remove what interrupted or earlier runs left: nothing that the store or an append under way consists of.

    Args:
        store: Folder of the store.
        unfinished: Whether to give up what is under way: an append or an added guide (next.json, and the shards that
            it alone plans), and a store that is to replace this one.
        now: Whether to remove files that no commit names however young they are.
        dry_run: Whether to find only.

    Raises:
        StoreError: When there is no store, it is damaged, another process adds to it, or it cannot be written.
    """
    folder = Path(store).resolve()
    refuse_no_store(folder)
    with (
        FolderLock(folder, wait=False) as held,
        # Scores, indexes and mined negatives are made under a lock of their own.
        FolderLock(folder / COMMITS, wait=False) if unfinished else nullcontext(),
    ):
        finished = Manifest.read(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).is_file() else None
        if unfinished and finished is None:
            raise StoreError(f"{folder} was never finished: go on with --resume, or delete the folder")
        search = _Search(folder, finished, None if unfinished else read_unfinished(folder))
        certain = [*(search.given_up() if unfinished else ()), *search.unwanted()]
        doubtful = list(search.nameless())
        if not (held.is_held or unfinished):
            # Without locks nobody can tell whether an append is reading rows.
            certain, doubtful = [], [*certain, *doubtful]
        limit = time.time() if now else time.time() - SECONDS_TO_WRITE
        old = [(path, what) for path, what in doubtful if _changed_at(path) <= limit]
        # In the order in which they were found, each once.
        garbage = tuple(Garbage(path, what, _size(path)) for path, what in dict([*certain, *old]).items())
        if not dry_run:
            for item in garbage:
                _remove(item.path)
            search.remove_empty_folders({item.path.parent for item in garbage})
    return Collected(garbage, num_young=len(doubtful) - len(old))


class _Search:
    """What there is to remove, under these plans.

    Paths come with what they are, in an order in which a removal may stop after any of them.
    """

    def __init__(self, folder: Path, finished: Manifest | None, under_way: Manifest | None) -> None:
        self._folder = folder
        self._under_way = under_way
        self._plans = [plan for plan in (finished, under_way) if plan is not None]
        self._states = [plan.fingerprint for plan in self._plans]
        self._kinds_of = [{*plan.kinds} for plan in self._plans]
        for kinds, state in zip(self._kinds_of, self._states, strict=True):
            if info := mined_info(folder, state):
                kinds.add(info.kind)
        self._kinds = set().union(*self._kinds_of)

    def given_up(self) -> Iterator[tuple[Path, str]]:
        """What is under way: plans, and indexes and mined negatives that are not complete."""
        for path in filter(Path.exists, (self._folder / PLAN_NAME, replacement_of(self._folder))):
            yield path, "plans that are given up"
        for path in sorted(self._folder.glob("index/*.building")):
            yield path, "indexes that were not completed"
        for kind in self._mined_kinds() - {f"mined/{path.stem}" for path in self._folder.glob("mined/*.json")}:
            yield from ((path, "files of mining that was not completed") for path in self._files_of(kind))

    def unwanted(self) -> Iterator[tuple[Path, str]]:
        """What is garbage however young it is."""
        for path in leftovers_of(self._folder):
            yield path, "folders of interrupted runs"
        for path in unplanned_files(self._folder, *self._plans):
            yield path, "files of shards that the store no longer has"
        # Reports and records go first: what they are of is not there without them.
        for suffix in (".json", ".faiss", ".building"):
            for path in sorted(self._folder.glob(f"index/*{suffix}")):
                if path.stem not in [state[:8] for state in self._states] and is_inside(self._folder, path):
                    yield path, "indexes of other vectors"
        for record in sorted(self._folder.glob("mined/*.json")):
            if (kind := f"mined/{record.stem}") not in self._kinds and is_inside(self._folder, record):
                yield from ((path, "files mined of other states") for path in (record, *self._files_of(kind)))

    def nameless(self) -> Iterator[tuple[Path, str]]:
        """What is garbage unless a process is about to name it."""
        named = {file_named_by(commit) for commit in (self._folder / COMMITS).glob("*.json")}
        for kind, folder in self._folders():
            for path in sorted(folder.iterdir()):
                match = _SHARD_FILE.fullmatch(path.name)
                if re.fullmatch(r"\..+\.tmp", path.name):
                    yield path, "temporary files"
                elif re.fullmatch(r"\..+\.lock", path.name) and nobody_holds(path):
                    yield path, "locks of processes that died"
                elif match and f"{kind}/{path.name}" not in named and not self._is_needed(kind, int(match[1])):
                    yield path, "files that no commit names"
                elif kind == "index" and path.suffix == ".faiss" and not path.with_suffix(".json").exists():
                    yield path, "indexes without a report"
                elif kind == "index" and path.suffix == ".building" and path.with_suffix(".json").exists():
                    yield path, "what a complete index was built from"

    def remove_empty_folders(self, folders: Collection[Path]) -> None:
        """Remove those folders of guides, scorings and settings that are empty now and will stay so."""
        for kind, folder in self._folders():
            if folder in folders and "/" in kind and kind not in self._kinds:
                with suppress(OSError):
                    folder.rmdir()

    def _folders(self) -> list[tuple[str, Path]]:
        """Where files of a store are, by their names in it; a folder that a link leads to is somebody else's."""
        found = [self._folder / name for name in (COMMITS, "texts", "rows", "index", "mined")]
        found += (folder for name in ("vectors", "scores", "mined") for folder in self._folder.glob(f"{name}/*"))
        own = [path for path in found if path.is_dir() and not path.is_symlink() and is_inside(self._folder, path)]
        return [(path.relative_to(self._folder).as_posix(), path) for path in (self._folder, *own)]

    def _mined_kinds(self) -> set[str]:
        return {kind for kind, _ in self._folders() if kind.startswith("mined/")}

    def _files_of(self, kind: str) -> list[Path]:
        """Commits and files of a kind that no reader looks for."""
        files = sorted((self._folder / kind).glob("*.arrow")) if kind in self._mined_kinds() else []
        return [*commits_of(self._folder, kind), *files]

    def _is_needed(self, kind: str, index: int) -> bool:
        """Whether a file that no commit names may be what is left of a shard whose commit is lost or damaged."""
        for plan, kinds in zip(self._plans, self._kinds_of, strict=True):
            if kind not in kinds or index not in plan.shards_of(kind):
                continue
            try:
                shard_path(self._folder, read_commit(self._folder, kind, index, plan))
            except StoreError:
                may_be_to_come = plan is self._under_way and kind not in ("texts", "rows")
                if not may_be_to_come or commit_path(self._folder, kind, index).exists():
                    return True
        return False


def _changed_at(path: Path) -> float:
    try:
        return path.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        # Its writer has finished: it is not garbage.
        return float("inf")


def _size(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    sizes = 0
    for file in files:
        with suppress(FileNotFoundError):
            sizes += 0 if file.is_dir() else file.stat(follow_symlinks=False).st_size
    return sizes


def _remove(path: Path) -> None:
    with one_line_write_errors(path):
        if path.is_dir():
            remove_leftover(path)
        else:
            path.unlink(missing_ok=True)
        if path.name == PLAN_NAME:
            sync_folder(path.parent)
