"""What becomes of a store while it is in use: it grows, is replaced, loses files, or has other bytes in them.

A reader holds the store as it was when it was opened: an append or an added guide changes no shard that was there. All
else is an error. Looking costs one stat, or one for each shard; bytes are read only of a file that was touched.
"""

import os
from pathlib import Path

from gistfast.errors import StoreError
from gistfast.store.files import file_checksum
from gistfast.store.manifest import MANIFEST_NAME, Manifest
from gistfast.store.reader import GuideStore
from gistfast.store.shards import Commit, read_commit

_Stamp = tuple[int, int, int]
_ADVICE = "bring that store back, or begin anew with another --out"


class StoreWatch:
    """Looks at an open store every now and then."""

    def __init__(self, store: GuideStore) -> None:
        """Remember the files of texts, rows and vectors.

        Raises:
            StoreError: When one of them has no commit.
        """
        self._path = store.path
        self._opened = store.manifest
        self._known = store.manifest
        # Unlike any file's: the store may have changed between its opening and now.
        self._seen: _Stamp | None = None
        kinds = ("texts", "rows", *store.manifest.vectors)
        shards = [(kind, index) for kind in kinds for index in store.manifest.shards_of(kind)]
        self._commits = {shard: read_commit(store.path, *shard, store.manifest) for shard in shards}
        self._stamps = {shard: _stamp(store.path / commit.file) for shard, commit in self._commits.items()}

    def look(self) -> str | None:
        """What the store has got since the last look, such as "4 rows"; None for nothing. One stat, mostly.

        Raises:
            StoreError: When it is gone, or another store has its place.
        """
        seen = _stamp(self._path / MANIFEST_NAME)
        if seen is not None and seen == self._seen:
            return None
        if seen is None:
            raise StoreError(f"{self._path} was removed while in use: {_ADVICE}")
        now = Manifest.read(self._path / MANIFEST_NAME)
        if not now.continues(self._opened):
            raise StoreError(
                f"{self._path} was replaced by another store while in use, its fingerprint {self._opened.fingerprint} "
                f"became {now.fingerprint}: {_ADVICE}"
            )
        gained = _gained(self._known, now)
        self._seen, self._known = seen, now
        return gained

    def look_at_files(self) -> None:
        """Look at every shard's file: one stat for each.

        Raises:
            StoreError: When one is gone or has other bytes; a repaired shard has another file, which is none of both.
        """
        for shard, commit in self._commits.items():
            path = self._path / commit.file
            stamp = _stamp(path)
            if stamp == self._stamps[shard]:
                continue
            again = read_commit(self._path, *shard, self._opened)
            if again.file == commit.file:
                _refuse_other_bytes(path, commit)
            self._commits[shard], self._stamps[shard] = again, _stamp(self._path / again.file)


def _refuse_other_bytes(path: Path, commit: Commit) -> None:
    if not path.is_file():
        raise StoreError(f"{path} was removed while in use: {_ADVICE}")
    if file_checksum(path) != commit.xxh3_128:
        raise StoreError(f"{path} was changed while in use: mend it with `gistfast store repair`")


def _stamp(path: Path) -> _Stamp | None:
    """What changes with a file; None when it is not there."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _gained(before: Manifest, now: Manifest) -> str | None:
    if before.fingerprint == now.fingerprint:
        return None
    rows, guides = now.data.num_rows - before.data.num_rows, len(now.guides) - len(before.guides)
    gains = [f"{rows:,} rows"] * (rows > 0) + [f"{guides} guide{'s' * (guides > 1)}"] * (guides > 0)
    return " and ".join(gains) or "another weight or score of its guides"
