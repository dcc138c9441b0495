"""What a run has before its first step: stores, a folder and a student that fit together; nothing is written."""

import math
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from gistfast.evaluation.judged import read_scored_pairs
from gistfast.settings.stages import TrainSettings
from gistfast.students.lora import Lora
from gistfast.students.student import check_learning_rates, checkpoint_activations, load_student
from gistfast.training.run_folder import RunFolder, run_record
from gistfast.training.setup import check_steps, mixed_batches, widths_of
from gistfast.training.stores import Stores, check_stores, open_stores


def open_run(settings: TrainSettings, *, processes: int = 1) -> tuple[Stores, RunFolder, dict[str, Any]]:
    """The stores and the folder of a run, and what the run is made from, when they fit together.

    Args:
        settings: Of the run.
        processes: That take its steps together.

    Raises:
        ConfigError: When a setting contradicts a store, or the folder holds something else.
        DataError: When the file of scored pairs cannot be read.
        DependencyError: When faiss is needed and not installed.
        StoreError: When a store is not there or not complete.
    """
    stores = open_stores(settings.store)
    check_stores(
        stores,
        batch_size=settings.batch_size,
        mined_negatives=settings.mined_negatives,
        evaluate=settings.eval_steps > 0,
        only_rows=settings.eval_sts is None,
        processes=processes,
    )
    if settings.eval_sts is not None:
        # Read here to be refused here, as what follows is made.
        read_scored_pairs(settings.eval_sts)
    # A store without tasks, clusters without faiss.
    check_steps(mixed_batches(stores, settings, processes), settings.batch_size)
    run = RunFolder(Path(settings.out).expanduser())
    if settings.resume and len(names := run.store_names()) == len(stores):
        # As its log calls them, wherever they lie now.
        stores = dict(zip(names, stores.values(), strict=True))
    record = run_record(settings, stores, processes)
    run.check(record, resume=settings.resume, overwrite=settings.overwrite)
    return stores, run, record


def load(settings: TrainSettings) -> SentenceTransformer:
    """The student of a run, in the shape that the run asks for.

    Raises:
        ConfigError: When the shape, a width, or a learning rate, is of something that it has not.
        DependencyError: When peft is needed and not installed.
        ModelError: When it does not load.
    """
    model = load_student(
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
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    # Made again for the trainer; here it is refused in time.
    widths_of(model, settings)
    own_weights = ["learned_temperature.log"] if settings.learn_temperature else []
    check_learning_rates(settings.learning_rates or {}, model, own_weights)
    return model


def num_steps(settings: TrainSettings, batches: int) -> int:
    """Steps of a run whose epochs have so many batches."""
    return settings.max_steps or math.ceil(batches * settings.epochs)


def _lora(settings: TrainSettings) -> Lora | None:
    if settings.lora_rank is None:
        return None
    return Lora(settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_targets)
