"""Which process is at which shard: advice that keeps workers apart, while commits alone decide what exists.

A worker locks a small file as long as it embeds a shard. The lock ends with its process, however that ends, so
that another worker takes the shard at once. Where the file system has no locks, or none between machines, two
workers may embed the same shard: the first commit stands, and nothing is lost but time.
"""

import os
from contextlib import suppress
from pathlib import Path

from gistfast.store.files import lock, one_line_write_errors


class Claim:
    """A file that this process has locked."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use `claim`."""
        self._path = path
        self._descriptor = descriptor

    def release(self, *, remove: bool) -> None:
        """Let others in; the file is removed when there is nothing left to claim."""
        if remove:
            with suppress(OSError):
                self._path.unlink()
        os.close(self._descriptor)


def claim(path: Path) -> Claim | None:
    """The lock of the file `path`, which is made where it is missing; None while another process holds it.

    Raises:
        StoreError: When the folder cannot be written.
    """
    with one_line_write_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if lock(descriptor, wait=False) is False:
        os.close(descriptor)
        return None
    return Claim(path, descriptor)
