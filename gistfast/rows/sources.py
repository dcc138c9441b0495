"""Where rows come from: a path, a glob, or the hub becomes a list of files to read."""

import glob
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gistfast.errors import ConfigError, DataError, first_line
from gistfast.rows.formats import FORMATS, RowFile, SavedDataset

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_KNOWN = ", ".join(FORMATS)


def find_files(
    source: str | Path, *, subset: str | None, split: str | None, revision: str | None
) -> tuple[list[RowFile], str]:
    """The files of `source`, at least one, and what to call them together.

    Raises:
        ConfigError: When subset, split or revision do not go with the source.
        DataError: When the source is missing, unreachable, or of no known format.
    """
    text = str(source)
    path = Path(source)
    if path.is_dir() and _is_saved(path):
        _refuse_hub_options(text, "a saved data set", subset=subset, revision=revision)
        return _one(_load_saved(path, split), _called(path.name, None, split))
    local = _local_files(path, text)
    if local and not (path.is_dir() and (subset or split)):
        _refuse_hub_options(text, "plain files", subset=subset, revision=revision, split=split)
        return [FORMATS[file.suffix](file) for file in local], path.name
    if path.is_dir() or (_HUB_ID.fullmatch(text) and path.suffix not in FORMATS):
        return _one(_load_from_hub(text, subset, split, revision), _called(text, subset, split))
    raise DataError(f"{text} is not there: expected a {_KNOWN} file, a folder or glob of these, or a hub id")


def _one(dataset: "Dataset", description: str) -> tuple[list[RowFile], str]:
    return [SavedDataset(dataset, description)], description


def _called(name: str, subset: str | None, split: str | None) -> str:
    return f"{name} ({', '.join(part for part in (subset, split or 'train') if part)})"


def _is_saved(path: Path) -> bool:
    """Whether `datasets` wrote the folder with save_to_disk."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _local_files(path: Path, text: str) -> list[Path]:
    """Files of one known format at the path, in the folder, or under the glob; none when there are none."""
    if path.is_file():
        if path.suffix not in FORMATS:
            raise DataError(f"{text} ends in {path.suffix!r}, expected one of {_KNOWN}: convert or rename it")
        return [_readable(path)]
    paths = path.iterdir() if path.is_dir() else map(Path, glob.glob(text, recursive=True))
    shown = (file for file in sorted(paths) if not file.name.startswith("."))
    files = [_readable(file) for file in shown if file.suffix in FORMATS and file.is_file()]
    if not files and glob.has_magic(text):
        raise DataError(f"{text} matches no {_KNOWN} file: check the pattern")
    if len(suffixes := sorted({file.suffix for file in files})) > 1:
        raise DataError(f"{text} holds files of several formats, {', '.join(suffixes)}: choose with a glob")
    return files


def _readable(path: Path) -> Path:
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read by this user: change its permissions")
    return path


def _refuse_hub_options(source: str, kind: str, **options: str | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name} {value} does not go with {source}, which is {kind}: leave it out")


def _load_saved(path: Path, split: str | None) -> "Dataset":
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(path))
    if not isinstance(loaded, DatasetDict):
        if split is not None:
            raise ConfigError(f"--split {split} does not go with {path}, which is one split: leave it out")
        return loaded
    wanted = split or "train"
    if wanted not in loaded:
        raise DataError(f"{path} has no split {wanted!r}, it has {', '.join(loaded)}: choose with --split")
    return loaded[wanted]


def _load_from_hub(name: str, subset: str | None, split: str | None, revision: str | None) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    if split is None:
        logger.info("taking the split 'train' of %s", name)
    try:
        return load_dataset(name, subset, split=split or "train", revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"cannot load {name} as a data set: {first_line(error)}: "
            "check the path or hub id, --subset, --split and the network"
        ) from error
