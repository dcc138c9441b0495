"""How a file reaches the disk: whole or not at all, whatever is killed when."""

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import xxhash

from gistfast.errors import StoreError

# The last is NFS's answer for a folder.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)


def fingerprint_of(record: Mapping[str, Any]) -> str:
    """The xxh3_128 of `record` as JSON with sorted keys, in 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True, ensure_ascii=False).encode())


def new_token() -> str:
    """Eight hex digits that no other writer has, for names of files that are not committed yet."""
    return secrets.token_hex(4)


@contextmanager
def one_line_write_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses under `path` (disk full, read-only) into one clear line.

    Raises:
        StoreError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(
            f"cannot write {path}: {reason}: what was committed is kept; "
            "make room or free the folder, then run the command again (precompute of a new store: with --resume)"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool) -> bool | None:
    """Lock a file or folder (flock) until its descriptor is closed, which happens when the process ends, too.

    Returns:
        True when it is locked, False when another process holds it (never with `wait`), None where the file system
        has no such locks: some of those that machines share have none, or none on folders.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def nobody_holds(path: Path) -> bool:
    """Whether a file or folder is there and not locked; False, too, where the file system has no locks to tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return lock(descriptor, wait=False) is True
    finally:
        os.close(descriptor)


@contextmanager
def durable_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under `path` when the block ends well, and not at all when it does not."""
    temporary = path.with_name(f".{path.name}.{new_token()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` to `path`, replacing an earlier file in one step.

    Raises:
        StoreError: When the disk is full or the folder cannot be written.
    """
    with one_line_write_errors(path), durable_file(path) as file:
        file.write(_json_bytes(record))


def create_json(path: Path, record: Mapping[str, Any]) -> None:
    """As `create_file`, with `record` as JSON."""
    create_file(path, _json_bytes(record))


def create_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` unless the file exists: of any number of writers the first succeeds.

    Raises:
        StoreError: When the disk is full, or the folder cannot be written or knows no hard links.
    """
    temporary = path.with_name(f".{path.name}.{new_token()}.tmp")
    with one_line_write_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # A hard link is created whole or not at all, and never over an existing name.
            os.link(temporary, path)
            sync_folder(path.parent)
        except FileExistsError:
            return
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def read_json(path: Path, advice: str = "restore it, or make the store anew") -> dict[str, Any]:
    """The object in `path`.

    Args:
        path: A file of JSON.
        advice: What to do when it cannot be read.

    Raises:
        StoreError: When the file cannot be read or holds no JSON object.
    """
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}: {advice}") from error
    except ValueError as error:
        raise StoreError(f"{path} is not valid JSON ({error}): {advice}") from error
    if not isinstance(record, dict):
        raise StoreError(f"{path} holds {type(record).__name__}, expected a JSON object: {advice}")
    return record


def file_checksum(path: Path) -> str:
    """The xxh3_128 of the bytes of `path`, in 32 hex digits."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def changed_bytes(path: Path, checksum: str, advice: str) -> str | None:
    """What is wrong with a file that is not what was written, all of it read; None when nothing is.

    Args:
        path: The file.
        checksum: Of what was written.
        advice: What to do.

    Raises:
        OSError: When it cannot be read.
    """
    if file_checksum(path) == checksum:
        return None
    return f"{path} was changed after it was written (its checksum differs): {advice}"


class ChecksumWriter:
    """A file to write to that counts and hashes what passes through."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = xxhash.xxh3_128()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write `data`; the number of its bytes."""
        size = memoryview(data).nbytes
        self._digest.update(data)
        self._file.write(data)
        self.num_bytes += size
        return size

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Leave the file open: whoever opened it syncs and closes it."""

    def hexdigest(self) -> str:
        """The xxh3_128 of everything written, in 32 hex digits."""
        return self._digest.hexdigest()


def _json_bytes(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
