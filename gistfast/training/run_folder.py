"""The folder of a training run: what the run was made from, its checkpoints, its end.

OUT/
  gistfast.json       settings, number of processes, and the fingerprint of each store
  metrics.jsonl       one record for each logged step and evaluation
  tensorboard/        the same for TensorBoard
  checkpoints/        checkpoint-N: all that a run needs to go on after step N
  training.png        the log as a picture, where matplotlib is installed
  report.json         written last: the run is complete
  replaced/           what was there before, until the first step is taken; then it goes, or comes back
  adapter/            a LoRA run's adapter alone, as peft reads it; in the model files it is merged
  (model files)       SentenceTransformer(OUT) loads them
"""

import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from gistfast.errors import ConfigError, GistfastError
from gistfast.settings.stages import TrainSettings, to_dict
from gistfast.store.files import one_line_write_errors, write_json
from gistfast.training.set_aside import SetAside
from gistfast.training.store_change import stores_difference

if TYPE_CHECKING:
    from gistfast.training.stores import Stores

# What a resumed run may change: where things lie and who is told, nothing that the weights depend on.
FREE_SETTINGS = (
    *("store", "out", "resume", "overwrite", "device", "workers"),
    *("trackers", "save_total_limit", "picture", "push_to_hub", "dry_run"),
)

# What it may change, too: how a step is taken in the memory that there is, which moves no loss but for rounding and the
# draws of dropout.
MEMORY_SETTINGS = ("tokens_per_forward", "cached", "gradient_checkpointing")


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what.

    Attributes:
        path: The folder that the user named.
    """

    path: Path

    @property
    def record_path(self) -> Path:
        """What the run was made from."""
        return self.path / "gistfast.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Folder of the adapter alone."""
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        """The log, as JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def picture(self) -> Path:
        """The log as a picture."""
        return self.path / "training.png"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's files."""
        return self.path / "tensorboard"

    @property
    def report_path(self) -> Path:
        """What came of the run; there once it is complete."""
        return self.path / "report.json"

    @property
    def set_aside(self) -> SetAside:
        """What lay here before a run began."""
        return SetAside(self.path)

    def check(self, record: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that the run must not write to; changes nothing.

        Args:
            record: From `run_record`.
            resume: Whether a run found there is to go on.
            overwrite: Whether a run found there is to be replaced.

        Raises:
            ConfigError: When the folder holds a run and neither is asked for, holds something else or what the new
                run is made from, or its run was made with other settings or another store.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path} is a file: give a folder")
        if not self.path.exists() or next(self.path.iterdir(), None) is None:
            return
        if not self.record_path.is_file():
            raise ConfigError(f"--out {self.path} holds files, but no training run: give another folder")
        if not resume and not overwrite:
            raise ConfigError(
                f"--out {self.path} holds a training run: go on with --resume or replace it with --overwrite"
            )
        if resume and (difference := _difference(self._record(), record)):
            raise ConfigError(f"--out {self.path} holds a run made otherwise: {difference}: resume it as it was")
        if overwrite:
            self._refuse_to_replace(record["settings"])

    def _refuse_to_replace(self, settings: dict[str, Any]) -> None:
        """Refuse to remove what the new run is made from.

        Raises:
            ConfigError: With what lies here.
        """
        here = self.path.resolve()
        for source in filter(None, (*settings["store"], settings["student"], settings["eval_sts"])):
            if Path(source).expanduser().resolve().is_relative_to(here) and Path(source).expanduser().exists():
                raise ConfigError(
                    f"--out {self.path}: --overwrite would remove {source}, which this run needs: give another --out, "
                    "or move that first"
                )

    def store_names(self) -> list[str]:
        """What the stores of the run found there are called in its log, if there is a run of several stores."""
        stores = self._record()["store"] if self.record_path.is_file() else []
        return [store["name"] for store in stores] if isinstance(stores, list) else []

    def begin(self, record: dict[str, Any], *, overwrite: bool) -> None:
        """Make the folder and write down what the run is made from; an earlier run is set aside if asked to.

        Raises:
            StoreError: When the folder cannot be written.
        """
        with one_line_write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if overwrite or not self.record_path.is_file():
                self.set_aside.begin()
        write_json(self.record_path, record)

    def check_seen(self) -> None:
        """Refuse a folder in which the record that another process wrote is not to be seen.

        Raises:
            ConfigError: When it is not.
        """
        if not self.record_path.is_file():
            raise ConfigError(
                f"--out {self.path}: what the first process wrote there is not seen: give a folder that both see"
            )

    def checkpoint_of(self, step: int) -> Path:
        """Where the checkpoint after a step lies."""
        return self.checkpoints / f"checkpoint-{step}"

    def last_checkpoint(self) -> Path | None:
        """The latest complete checkpoint; a half-written one, left by a kill, is passed over."""
        # The trainer writes its state last; a power cut may leave an empty one.
        found = [path.parent for path in self.checkpoints.glob("checkpoint-*/trainer_state.json") if _is_whole(path)]
        return max(found, key=step_of, default=None)

    def finished(self) -> dict[str, Any] | None:
        """The report of a complete run, None while it is not."""
        return self._read(self.report_path) if self.report_path.is_file() else None

    def _record(self) -> dict[str, Any]:
        record = self._read(self.record_path)
        if not (isinstance(record, dict) and isinstance(record.get("settings"), dict) and record.get("store")):
            raise ConfigError(f"{self.record_path} is no record of a training run: start anew with --overwrite")
        return record

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}): start anew with --overwrite") from error
        return record


def _is_whole(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


def step_of(checkpoint: Path | None) -> int:
    """The step after which a checkpoint was saved; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def run_record(settings: TrainSettings, stores: "Stores", processes: int) -> dict[str, Any]:
    """What a run is made from, as JSON knows it.

    Settings, the number of processes, and fingerprint, guides, data and mined negatives of each store by name.
    """
    records: list[dict[str, Any]] = [
        {
            "name": name,
            "fingerprint": store.fingerprint,
            "guides": [asdict(guide) for guide in store.manifest.guides],
            "data": {**asdict(store.manifest.data), "fingerprint": store.manifest.data.fingerprint},
            "mined": store.mined_kind if settings.mined_negatives else None,
        }
        for name, store in stores.items()
    ]
    of_stores = records[0] if len(records) == 1 else records
    return {"settings": to_dict(settings), "processes": processes, "store": of_stores}


def check_same_run(records: Sequence[dict[str, Any]]) -> None:
    """Refuse processes that were started for different runs, by the record that each of them makes.

    Raises:
        ConfigError: With the first difference.
    """
    for number, record in enumerate(records):
        if difference := _difference(records[0], record):
            raise ConfigError(f"process {number} was started otherwise than the first one: {difference}")


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first thing that the run found there was made with and the wanted one is not, in words."""
    for name, value in wanted["settings"].items():
        before = found["settings"].get(name)
        if name not in (*FREE_SETTINGS, *MEMORY_SETTINGS) and before != value:
            return f"--{name.replace('_', '-')} was {before}, found {value}"
    # Earlier records are of one process.
    if (before := found.get("processes", 1)) != wanted["processes"]:
        return f"its steps were those of {before} process{'es' * (before > 1)}, found {wanted['processes']}"
    return stores_difference(found["store"], wanted["store"])


@contextmanager
def disk_errors_in_one_line(folder: Path) -> Iterator[None]:
    """Say in one line that the disk is full or the folder gone, whoever noticed: each library has its own error for it.

    Raises:
        GistfastError: When it is.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not folder.is_dir():
            raise GistfastError(f"{folder} was removed or renamed while the run wrote to it: begin it anew") from error
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full and shutil.disk_usage(folder).free >= 1 << 20:
            raise
        raise GistfastError(
            f"the disk of {folder} is full: make room, then go on from the last checkpoint with --resume"
        ) from error
