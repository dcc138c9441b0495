"""Stage 2: from a guide store to a trained student, through sentence-transformers' trainer."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback, TrainerState

from gistfast.errors import ConfigError
from gistfast.launch import alike
from gistfast.models.pretrained import no_weight_bar, pick_device
from gistfast.settings.stages import TrainSettings, build
from gistfast.store.files import write_json
from gistfast.students.lora import has_lora, merged, save_adapter
from gistfast.training.begin import load, num_steps, open_run
from gistfast.training.best import best_step, out_of_patience
from gistfast.training.callbacks import (
    MetricsFile,
    RemoveSetAside,
    StepProgress,
    StopOnInterrupt,
    choose_trackers,
    tensorboard_callback,
)
from gistfast.training.hub_upload import UploadCheckpoints, check_hub, uploads_to
from gistfast.training.modelcard import add_section, guide_section
from gistfast.training.out_of_memory import memory_errors_in_one_line
from gistfast.training.ranks import Ranks, join, left_in_one_line, without_their_warnings
from gistfast.training.report import TrainReport, train_report
from gistfast.training.run_folder import RunFolder, check_same_run, disk_errors_in_one_line, step_of
from gistfast.training.run_picture import draw_run
from gistfast.training.setup import make_trainer, mixed_batches
from gistfast.training.store_watch import WatchStores
from gistfast.training.stores import Stores, num_train_rows
from gistfast.training.trainer import GuidedTrainer

logger = logging.getLogger(__name__)


def train(
    store: str | Path | Sequence[str | Path], *, student: str | Path, out: str | Path, **options: Any
) -> TrainReport:
    """Train a student against a guide store, or several, and save it as a sentence-transformers folder.

    Nothing is written before all that the run needs was found to be there. Ctrl-C finishes the step, saves a
    checkpoint and stops; `resume=True` goes on from the last checkpoint as if nothing had happened.

    Args:
        store: Folder of a complete guide store, or several folders; no batch has rows of two stores.
        student: The model to start from: a folder or a hub id.
        out: Folder of the trained student; `gistfast.training.run_folder` says what is in it.
        **options: Other fields of `TrainSettings`.

    Raises:
        ConfigError: When a setting is bad, contradicts a store, or `out` holds something else.
        DataError: When the file of scored pairs cannot be read.
        DependencyError: When a tracker, or peft for an adapter, is not installed.
        GistfastError: When the disk is full; what was saved is kept.
        ModelError: When the student does not load.
        StoreError: When a store is not there or not complete, or not the same any more.
        TrainingError: When a step's numbers are not finite, or memory does not suffice for it.
        KeyboardInterrupt: After Ctrl-C.
    """
    begun_s = time.monotonic()
    with alike():
        settings = build(TrainSettings, {**options, "store": store, "student": student, "out": out})
        if settings.dry_run:
            raise ConfigError(
                "dry_run leaves no student to report on: call gistfast.stages.dry_run.dry_run for its figures"
            )
        ranks = join(pick_device(settings.device))
    with ranks.together():
        stores, run, record = open_run(settings, processes=ranks.count)
    if settings.resume and (finished := run.finished()) is not None:
        logger.info("%s is complete: nothing to resume", run.path)
        return TrainReport(**finished | {"path": run.path})
    records = ranks.gather(record)
    with ranks.together():
        check_same_run(records)
        trackers = choose_trackers(settings.trackers) if ranks.first else ()
        if settings.push_to_hub is not None:
            check_hub(settings.push_to_hub)
        model = load(settings)
    _begin(run, record, ranks, overwrite=settings.overwrite)
    upload_to = settings.push_to_hub if ranks.first else None
    with (
        _undone_before_its_first_step(run, ranks),
        disk_errors_in_one_line(run.path),
        left_in_one_line(),
        uploads_to(upload_to) as upload,
    ):
        more = [] if upload is None else [UploadCheckpoints(upload, run)]
        history = _fit(model, stores, settings, run, trackers, more, ranks)
        best = best_step(history) if settings.keep_best else None
        report = train_report(
            run.path,
            history,
            best=best,
            num_rows={name: num_train_rows(store) for name, store in stores.items()},
            elapsed_s=time.monotonic() - begun_s,
        )
        if ranks.first:
            _save(model, stores, settings, run, report, ranks.count)
        if upload is not None:
            upload.offer(run.path, f"trained student, {report.steps} steps")
        ranks.gather("saved")
    return report


def _begin(run: RunFolder, record: dict[str, Any], ranks: Ranks, *, overwrite: bool) -> None:
    """Let the first process make the run's folder, where the others must see it."""
    with ranks.together():
        if ranks.first:
            run.begin(record, overwrite=overwrite)
    with ranks.together():
        run.check_seen()


@contextmanager
def _undone_before_its_first_step(run: RunFolder, ranks: Ranks) -> Iterator[None]:
    """Leave the folder as it was found where the run ends, for any reason, before it has taken a step."""
    try:
        yield
    except BaseException:
        if ranks.first:
            run.set_aside.restore()
        raise


def _fit(
    model: SentenceTransformer,
    stores: Stores,
    settings: TrainSettings,
    run: RunFolder,
    trackers: Sequence[str],
    callbacks: Sequence[TrainerCallback],
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """Train, from the last checkpoint if there is one; returns the trainer's log.

    Raises:
        KeyboardInterrupt: After Ctrl-C, when a checkpoint was saved.
    """
    checkpoint = run.last_checkpoint()
    _say_how_it_begins(stores, settings, checkpoint, ranks.count)
    # TensorBoard gets a folder of ours and the step of the checkpoint; the trainer starts the others itself.
    trainer = make_trainer(model, stores, settings, run, [name for name in trackers if name != "tensorboard"], ranks)
    if checkpoint is not None and (past := _past_its_end(checkpoint, settings.patience)) is not None:
        history, ends_with = past.log_history, checkpoint
    else:
        for callback in callbacks:
            trainer.add_callback(callback)
        if "tensorboard" in trackers:
            trainer.add_callback(tensorboard_callback(run.tensorboard, step_of(checkpoint)))
        with memory_errors_in_one_line(trainer, run, recomputes=settings.gradient_checkpointing):
            watch = WatchStores(list(stores.values()), ranks)
            history, ends_with = _take_steps(trainer, watch, run, checkpoint, ranks), None
    if settings.keep_best and (best := best_step(history)) is not None:
        logger.info("the best student is that of step %d", best)
        ends_with = run.checkpoint_of(best)
        model.model_card_data.set_best_model_step(best)
    if ends_with is not None:
        with no_weight_bar():
            trainer.load_weights(ends_with)
    return history


def _take_steps(
    trainer: GuidedTrainer, watch: WatchStores, run: RunFolder, checkpoint: Path | None, ranks: Ranks
) -> list[dict[str, Any]]:
    """Train from a checkpoint or from the beginning; returns the trainer's log.

    Raises:
        StoreError: When a store was replaced or removed meanwhile.
        KeyboardInterrupt: After Ctrl-C, when a checkpoint was saved.
    """
    trainer.add_callback(MetricsFile(run.metrics))
    trainer.add_callback(RemoveSetAside(run))
    with StepProgress() as bar, StopOnInterrupt(ranks) as stop, no_weight_bar(), without_their_warnings():
        trainer.add_callback(bar)
        trainer.add_callback(stop)
        # Last, because it looks closer where the others have a checkpoint saved.
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # torchrun ends all processes with the first that leaves: not before the checkpoint is whole.
        ranks.gather("trained")
    if watch.error is not None:
        raise watch.error
    if stop.stopped:
        raise KeyboardInterrupt(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}")
    return trainer.state.log_history


def _past_its_end(checkpoint: Path, patience: int | None) -> TrainerState | None:
    """The trainer's state after the last step, None before it; the trainer would take one step more."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state if state.global_step >= state.max_steps or out_of_patience(state.log_history, patience) else None


def _say_how_it_begins(stores: Stores, settings: TrainSettings, checkpoint: Path | None, processes: int) -> None:
    rows = {name: num_train_rows(store) for name, store in stores.items()}
    mixed = mixed_batches(stores, settings, processes)
    counts = mixed.num_batches(settings.batch_size)
    if processes > 1:
        rows_of_step = f"{processes} x {settings.batch_size} rows"
        logger.info("%d processes: a step is %s, all of them candidates", processes, rows_of_step)
    if len(stores) > 1:
        for name, count, batches in zip(stores, counts, mixed.of_stores, strict=True):
            all_batches = batches.num_batches(settings.batch_size)
            logger.info("%s: %d rows, %d of its %d batches an epoch", name, rows[name], count, all_batches)
    logger.info(
        "%d rows, %d batches of up to %d an epoch, %d steps",
        sum(rows.values()),
        sum(counts),
        settings.batch_size * processes,
        num_steps(settings, sum(counts)),
    )
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    elif settings.resume:
        logger.info("found no checkpoint to resume: beginning at the first step")


def _save(
    model: SentenceTransformer,
    stores: Stores,
    settings: TrainSettings,
    run: RunFolder,
    report: TrainReport,
    processes: int,
) -> None:
    """Save the student, its card, and last of all the report, which says that the run is complete."""
    with no_weight_bar(), merged(model):
        model.save_pretrained(str(run.path))
    if has_lora(model) and settings.keep_layers is None:
        save_adapter(model, run.adapter, settings.student)
    manifests = {name: store.manifest for name, store in stores.items()}
    best_by = "nDCG@10" if "ndcg@10" in report.evaluation else "Spearman's correlation"
    section = guide_section(manifests, settings, report.dropped, report.best_step, best_by=best_by, processes=processes)
    add_section(run.path / "README.md", section)
    if settings.picture:
        _draw(run)
    write_json(run.report_path, asdict(report) | {"path": str(report.path)})
    logger.info("saved the student to %s: loss %.4f after %d steps", run.path, report.loss, report.steps)


def _draw(run: RunFolder) -> None:
    if find_spec("matplotlib") is None:
        logger.info("matplotlib is not installed: no picture of the run (`pip install gistfast[plot]`)")
    else:
        draw_run(run.metrics, run.picture)
