"""What a run replaces, kept in its folder until the run has taken a step: then it goes, or else comes back."""

import shutil
from collections.abc import Iterable
from pathlib import Path


class SetAside:
    """What lay in a folder before a run began.

    Attributes:
        path: Where it lies meanwhile; there as long as the run has taken no step.
    """

    def __init__(self, folder: Path) -> None:
        """Take the run's folder."""
        self.path = folder / "replaced"
        self._folder = folder

    def begin(self) -> None:
        """Set aside all that lies in the folder, if only nothing."""
        found = list(self._folder.iterdir())
        if self.path in found:
            # Beside it lies a run that was killed before its first step.
            _remove(path for path in found if path != self.path)
            return
        self.path.mkdir()
        for path in found:
            path.rename(self.path / path.name)

    def remove(self) -> None:
        """Let it go: the run has taken a step."""
        if self.path.is_dir():
            shutil.rmtree(self.path)

    def restore(self) -> None:
        """Leave the folder as it was found, if the run has taken no step; one that was not there goes."""
        if not self.path.is_dir():
            return
        _remove(path for path in self._folder.iterdir() if path != self.path)
        for path in self.path.iterdir():
            path.rename(self._folder / path.name)
        self.path.rmdir()
        if next(self._folder.iterdir(), None) is None:
            self._folder.rmdir()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
