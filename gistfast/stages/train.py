"""Stage 2: from a guide store to a trained student, through sentence-transformers' trainer."""

import errno
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from transformers import TrainerState

from gistfast.batches import StoreBatches
from gistfast.callbacks import (
    MetricsFile,
    StepProgress,
    StopOnInterrupt,
    choose_trackers,
    tensorboard_callback,
)
from gistfast.config import TrainSettings, build
from gistfast.errors import ConfigError, GistfastError
from gistfast.lora import Lora, has_lora, merged, save_adapter
from gistfast.modelcard import add_section, guide_section
from gistfast.pretrained import no_weight_bar
from gistfast.retrieval import MEASURES
from gistfast.run_folder import RunFolder, run_record, step_of
from gistfast.store import GuideStore
from gistfast.store.files import write_json
from gistfast.student import check_learning_rates, load_student
from gistfast.trainer import make_trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What came of a run.

    Attributes:
        path: Folder of the student.
        steps: Steps taken.
        rows: Rows trained on.
        loss: Mean over the steps of the last record of the log, in nats.
        dropped: Share of the candidates dropped in each block ("ap", "aa", "pp", "an"), mean over the log.
        elapsed_s: Seconds of this call.
        evaluation: Loss, nDCG@10, MRR@10 and recall of the last evaluation on the held-out rows, if any.
        temperature: In the last step, where it changed during the run.
        margin: As `temperature`.
    """

    path: Path
    steps: int
    rows: int
    loss: float
    dropped: dict[str, float]
    elapsed_s: float
    evaluation: dict[str, float]
    temperature: float | None = None
    margin: float | None = None


def train(store: str | Path, *, student: str | Path, out: str | Path, **options: Any) -> TrainReport:
    """Train a student against a guide store and save it as a sentence-transformers folder.

    Nothing is written before all that the run needs was found to be there. Ctrl-C finishes the step, saves a
    checkpoint and stops; `resume=True` goes on from the last checkpoint as if nothing had happened.

    Args:
        store: Folder of a complete guide store.
        student: The model to start from: a folder or a hub id.
        out: Folder of the trained student; `gistfast.run_folder` says what is in it.
        **options: Other fields of `TrainSettings`.

    Raises:
        ConfigError: When a setting is bad, contradicts the store, or `out` holds something else.
        DependencyError: When a tracker is not installed.
        GistfastError: When the disk is full; what was saved is kept.
        ModelError: When the student does not load.
        StoreError: When the store is not there or not complete.
        KeyboardInterrupt: After Ctrl-C.
    """
    begun_s = time.monotonic()
    settings = build(TrainSettings, {**options, "store": store, "student": student, "out": out})
    guide_store = GuideStore.open(settings.store)
    _check_rows(guide_store, settings.batch_size, settings.eval_steps)
    # Made here to be refused here: a store without tasks, clusters without faiss.
    StoreBatches(guide_store, settings.batching)
    run = RunFolder(Path(settings.out).expanduser())
    record = run_record(settings, guide_store.manifest)
    run.check(record, resume=settings.resume, overwrite=settings.overwrite)
    if settings.resume and (finished := run.finished()) is not None:
        logger.info("%s is complete: nothing to resume", run.path)
        return TrainReport(**finished | {"path": run.path})
    trackers = choose_trackers(settings.trackers)
    model = _load(settings)
    own_weights = ["learned_temperature.log"] if settings.learn_temperature else []
    check_learning_rates(settings.learning_rates or {}, model, own_weights)
    run.begin(record, overwrite=settings.overwrite)
    with _one_line_when_full(run.path):
        history = _fit(model, guide_store, settings, run, trackers)
        report = _report(run, history, _num_train_rows(guide_store), time.monotonic() - begun_s)
        _save(model, guide_store, settings, run, report)
    return report


def _check_rows(store: GuideStore, batch_size: int, eval_steps: int) -> None:
    num_rows = _num_train_rows(store)
    if batch_size > num_rows:
        raise ConfigError(
            f"--batch-size {batch_size} is larger than the data: "
            f"{store.path} has {num_rows} rows to train on: give {num_rows} or less"
        )
    if eval_steps and num_rows == store.num_rows:
        raise ConfigError(f"--eval-steps needs held-out rows, {store.path} has none: make the store with --holdout")


def _num_train_rows(store: GuideStore) -> int:
    return int(store.num_rows - store.held_out.sum())


def _load(settings: TrainSettings) -> SentenceTransformer:
    return load_student(
        settings.student,
        keep_layers=settings.keep_layers,
        pooling=settings.pooling,
        max_length=settings.max_length,
        dropout=settings.dropout,
        width=settings.dim,
        normalize=settings.normalize,
        freeze=settings.freeze,
        lora=_lora(settings),
        seed=settings.seed,
        revision=settings.student_revision,
        trust_remote_code=settings.trust_remote_code,
        device=settings.device,
    )


def _lora(settings: TrainSettings) -> Lora | None:
    if settings.lora_rank is None:
        return None
    return Lora(settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_targets)


def _fit(
    model: SentenceTransformer,
    store: GuideStore,
    settings: TrainSettings,
    run: RunFolder,
    trackers: Sequence[str],
) -> list[dict[str, Any]]:
    """Train, from the last checkpoint if there is one; returns the trainer's log.

    Raises:
        KeyboardInterrupt: After Ctrl-C, when a checkpoint was saved.
    """
    checkpoint = run.last_checkpoint()
    _say_how_it_begins(store, settings, checkpoint)
    # TensorBoard gets a folder of ours and the step of the checkpoint; the trainer starts the others itself.
    trainer = make_trainer(model, store, settings, run, [name for name in trackers if name != "tensorboard"])
    if checkpoint is not None and (past := _past_its_end(checkpoint)) is not None:
        with no_weight_bar():
            trainer.load_weights(checkpoint)
        return past.log_history
    if "tensorboard" in trackers:
        trainer.add_callback(tensorboard_callback(run.tensorboard, step_of(checkpoint)))
    trainer.add_callback(MetricsFile(run.metrics))
    with StepProgress() as bar, StopOnInterrupt() as stop, no_weight_bar():
        trainer.add_callback(bar)
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.asked and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}")
    return trainer.state.log_history


def _past_its_end(checkpoint: Path) -> TrainerState | None:
    """The trainer's state after the last step, None before it; the trainer would take one step more."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state if state.global_step >= state.max_steps else None


def _say_how_it_begins(store: GuideStore, settings: TrainSettings, checkpoint: Path | None) -> None:
    batches = StoreBatches(store, settings.batching).num_batches(settings.batch_size)
    logger.info(
        "%d rows, %d batches of up to %d an epoch, %d steps",
        _num_train_rows(store),
        batches,
        settings.batch_size,
        settings.max_steps or math.ceil(batches * settings.epochs),
    )
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    elif settings.resume:
        logger.info("found no checkpoint to resume: beginning at the first step")


def _report(run: RunFolder, history: Sequence[Mapping[str, Any]], num_rows: int, elapsed_s: float) -> TrainReport:
    steps = [record for record in history if "loss" in record]
    evaluations = [record for record in history if "eval_loss" in record]
    blocks = [name for name in steps[-1] if name.startswith("dropped/")]
    dropped = {name.removeprefix("dropped/"): sum(record[name] for record in steps) / len(steps) for name in blocks}
    return TrainReport(
        path=run.path,
        steps=history[-1]["step"],
        rows=num_rows,
        loss=steps[-1]["loss"],
        temperature=steps[-1].get("temperature"),
        margin=steps[-1].get("margin"),
        dropped=dropped,
        elapsed_s=elapsed_s,
        evaluation=_scores(evaluations[-1]) if evaluations else {},
    )


def _scores(record: Mapping[str, float]) -> dict[str, float]:
    """The measures in a record of an evaluation, under the names that `evaluate` gives them."""
    found = {name.rpartition("_")[2]: value for name, value in record.items() if name.startswith("eval_")}
    return {name: found[name] for name in ("loss", *MEASURES)}


def _save(
    model: SentenceTransformer,
    store: GuideStore,
    settings: TrainSettings,
    run: RunFolder,
    report: TrainReport,
) -> None:
    """Save the student, its card, and last of all the report, which says that the run is complete."""
    with no_weight_bar(), merged(model):
        model.save_pretrained(str(run.path))
    if has_lora(model) and settings.keep_layers is None:
        save_adapter(model, run.adapter, settings.student)
    add_section(run.path / "README.md", guide_section(store.manifest, settings, report.dropped))
    write_json(run.report_path, asdict(report) | {"path": str(report.path)})
    logger.info("saved the student to %s: loss %.4f after %d steps", run.path, report.loss, report.steps)


@contextmanager
def _one_line_when_full(folder: Path) -> Iterator[None]:
    """Say in one line that the disk is full, whoever noticed: each library has its own error for it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full and shutil.disk_usage(folder).free >= 1 << 20:
            raise
        raise GistfastError(
            f"the disk of {folder} is full: make room, then go on from the last checkpoint with --resume"
        ) from error
