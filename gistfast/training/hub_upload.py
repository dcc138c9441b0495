"""Uploads to the Hugging Face hub beside a run, which waits for none of them and is stopped by none of them.

One folder is on its way at a time. What is offered meanwhile waits, the latest alone; what failed is tried again after
a while that doubles each time.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gistfast.errors import ConfigError, first_line
from gistfast.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

# What lies beside the student in a run's folder and in a checkpoint; some of it names paths of this machine.
_NOT_THE_STUDENT = (
    *("checkpoints/*", "tensorboard/*", "tokens/*", "gistfast.json", "report.json"),
    *("*.pt", "*.pth", "*.bin", "trainer_state.json", "trained.safetensors"),
)

# Of a connection, of the hub's answers (whose parent is the client's own error), of a folder that is gone.
_FAILURES: tuple[Any, ...] = (OSError, RuntimeError, ValueError, *HfHubHTTPError.__bases__)

_FIRST_WAIT_S = 5.0
_LONGEST_WAIT_S = 300.0
# For what is not uploaded at the end of a run.
_LAST_WAIT_S = 300.0


class HubUpload:
    """Uploads folders to one repository, in a thread of its own."""

    def __init__(self, api: Any, repo: str, *, first_wait_s: float = _FIRST_WAIT_S) -> None:
        """Begin to wait for folders.

        Args:
            api: A `huggingface_hub.HfApi`.
            repo: Repository on the hub; made, and private, when it is not there.
            first_wait_s: Seconds between a failure and the next try; they double with each further one.
        """
        self.repo = repo
        self._api = api
        self._first_wait_s = first_wait_s
        self._offered: tuple[Path, str] | None = None
        self._busy = False
        self._failures = 0
        # Guards what stands above, and tells of every change.
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="gistfast-hub", daemon=True).start()

    def offer(self, folder: Path, message: str) -> None:
        """Upload a folder soon, in place of any that waits."""
        with self._changed:
            self._offered = (folder, message)
            self._changed.notify_all()

    def finish(self, at_most_s: float) -> bool:
        """Wait until everything is uploaded, but not for ever; whether it is."""
        with self._changed:
            # What waits for its next try is tried now, and soon again.
            self._failures = 0
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._offered is None and not self._busy, at_most_s)
        if not done:
            logger.warning("%s has not got all of the run within %.0f s: upload it yourself", self.repo, at_most_s)
        return done

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._offered is not None)
                assert self._offered is not None
                (folder, message), self._offered, self._busy = self._offered, None, True
            error = self._try(folder, message)
            with self._changed:
                self._failures = 0 if error is None else self._failures + 1
                self._busy = False
                if error is not None and self._offered is None and folder.is_dir():
                    self._offered = (folder, message)
                self._changed.notify_all()
                if error is not None:
                    wait_s = min(self._first_wait_s * 2.0 ** (self._failures - 1), _LONGEST_WAIT_S)
                    logger.warning("upload to %s failed (%s): next try in %.0f s", self.repo, error, wait_s)
                    self._changed.wait(wait_s)

    def _try(self, folder: Path, message: str) -> str | None:
        """Upload a folder; returns what went wrong, None when nothing did."""
        try:
            self._api.create_repo(self.repo, private=True, exist_ok=True)
            self._api.upload_folder(
                repo_id=self.repo,
                folder_path=str(folder),
                commit_message=message,
                ignore_patterns=list(_NOT_THE_STUDENT),
            )
        except _FAILURES as error:
            return first_line(error)
        logger.info("uploaded to %s: %s", self.repo, message)
        return None


class UploadCheckpoints(TrainerCallback):
    """Offers each checkpoint for upload."""

    def __init__(self, upload: HubUpload, run: RunFolder) -> None:
        self.upload = upload
        self.run = run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Offer the checkpoint that was just written."""
        if state.is_world_process_zero:
            self.upload.offer(self.run.checkpoint_of(state.global_step), f"step {state.global_step}")


@contextmanager
def uploads_to(repo: str | None) -> Iterator[HubUpload | None]:
    """An upload to the repository, None for none; at the end of the context it has a while to finish."""
    if repo is None:
        yield None
        return
    upload = HubUpload(HfApi(), repo)
    yield upload
    upload.finish(_LAST_WAIT_S)


def check_hub(repo: str) -> None:
    """Refuse an upload that cannot come to anything; asks nobody.

    Raises:
        ConfigError: When the repository's name is none, or nobody is logged in.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo} is no name of a repository: {first_line(error)}") from None
    if get_token() is None:
        raise ConfigError(f"--push-to-hub {repo}: not logged in: run `hf auth login`, or set HF_TOKEN")
