"""Folders beside a store: rows that are being read, and a new store that will take the old one's place.

.NAME.reading-<token>   rows being read; a lock on the folder says that its writer lives
.NAME.new               a store that will replace NAME when it is complete
.NAME.old-<token>       a store that was replaced and is being removed
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

from gistfast.errors import StoreError
from gistfast.store.files import lock, new_token, nobody_holds, one_line_write_errors, sync_folder

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class ReadingFolder:
    """An empty folder beside `store`, locked as long as this object holds it."""

    def __init__(self, store: Path) -> None:
        with one_line_write_errors(store):
            store.parent.mkdir(parents=True, exist_ok=True)
            self.path, self._descriptor = _make_locked(store)

    def move_to(self, target: Path) -> bool:
        """Give the folder its name; False when a store of that name came first, and the folder is removed."""
        with one_line_write_errors(target):
            try:
                sync_folder(self.path)
                self.path.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self.remove()
                return False
            sync_folder(target.parent)
        os.close(self._descriptor)
        return True

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def replacement_of(store: Path) -> Path:
    """Where the store is built that will replace `store`."""
    return store.with_name(f".{store.name}.new")


def replace_store(store: Path) -> None:
    """Put the store built beside `store` in its place, in one step, and remove the old one.

    Raises:
        StoreError: When the folders cannot be renamed.
    """
    new = replacement_of(store)
    old = store.with_name(f".{store.name}.old-{new_token()}")
    with one_line_write_errors(store):
        if not store.exists():
            new.rename(store)
        elif _exchange(new, store):
            new.rename(old)
        else:
            # Between these two renames there is no store of that name; an interruption here is mended by the
            # next run with the same settings, which finds the complete one and renames it.
            store.rename(old)
            new.rename(store)
        sync_folder(store.parent)
    shutil.rmtree(old, ignore_errors=True)


def leftovers_of(store: Path) -> list[Path]:
    """Folders beside `store` that interrupted runs left and nobody can use."""
    reading = (folder for folder in store.parent.glob(f".{store.name}.reading-*") if nobody_holds(folder))
    old = store.parent.glob(f".{store.name}.old-*") if store.exists() else ()
    return sorted([*reading, *old])


def remove_leftovers(store: Path) -> None:
    """Remove what interrupted runs left beside `store` and nobody can use."""
    for folder in leftovers_of(store):
        remove_leftover(folder)


def remove_leftover(folder: Path) -> None:
    """Remove one of `leftovers_of` a store, unless a process has taken it since."""
    if ".reading-" in folder.name:
        _remove_unless_locked(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _make_locked(store: Path) -> tuple[Path, int]:
    while True:
        path = store.with_name(f".{store.name}.reading-{new_token()}")
        path.mkdir()
        descriptor = os.open(path, os.O_RDONLY)
        lock(descriptor, wait=True)
        # Another run may have taken the folder for a leftover before it was locked.
        if path.is_dir():
            return path, descriptor
        os.close(descriptor)


def _remove_unless_locked(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        # Another run removed it, or it became the store.
        return
    try:
        # Where there are no locks, nobody knows whether its writer lives.
        if lock(descriptor, wait=False):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or its file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise StoreError(f"cannot exchange {first} and {second}: {os.strerror(code)}: rename the first by hand")
