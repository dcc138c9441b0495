"""A trainer from the settings of a run."""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator
from torch import nn
from transformers import PrinterCallback

from gistfast.batches import MixedBatches, StoreBatches
from gistfast.errors import ConfigError, ModelError
from gistfast.evaluation.judged import read_scored_pairs
from gistfast.evaluation.retrieval import held_out_evaluator
from gistfast.evaluation.similarity import STS, similarity_evaluator
from gistfast.evaluation.widths import AtWidths
from gistfast.losses.gist_loss import GISTLoss
from gistfast.losses.matryoshka import Matryoshka, matryoshka
from gistfast.losses.schedules import LOWEST_TEMPERATURE, LearnedTemperature, Schedule
from gistfast.models.pretrained import pick_device
from gistfast.settings.stages import TrainSettings
from gistfast.training.attention import choose_form
from gistfast.training.best import KeepBest, score_name
from gistfast.training.collate import MixedCollator, MixedRows, Split
from gistfast.training.compilation import compile_student
from gistfast.training.feed import feed, set_prompts
from gistfast.training.modelcard import card_rows, describe_data
from gistfast.training.non_finite import FiniteSteps
from gistfast.training.passes import Passes
from gistfast.training.ranks import Ranks
from gistfast.training.run_folder import RunFolder
from gistfast.training.step import Replay
from gistfast.training.stores import Stores
from gistfast.training.trainer import GuidedTrainer

logger = logging.getLogger(__name__)

_LOSS_OPTIONS = (
    "temperature",
    "margin",
    "margin_strategy",
    "contrast_anchors",
    "contrast_positives",
    "hard_only",
    "triplet",
    "backend",
)


def make_trainer(
    model: SentenceTransformer,
    stores: Stores,
    settings: TrainSettings,
    run: RunFolder,
    trackers: Sequence[str],
    ranks: Ranks,
) -> GuidedTrainer:
    """A trainer of the student on the stores' training rows, ready to train.

    Args:
        model: The student; its prompts and its card are set up as well.
        stores: The guide stores by name.
        settings: Of the run.
        run: The run's folder.
        trackers: Those that the trainer starts itself.
        ranks: The processes of the run.

    Raises:
        ConfigError: When there are too few rows for the clusters.
        ModelError: When the student takes more than tokens.
        StoreError: When tokens or clusters cannot be written.
    """
    columns = max((store.columns for store in stores.values()), key=len)
    prompts = set_prompts(model, columns, settings.query_prompt, settings.document_prompt)
    rows: dict[Split, MixedRows] = {"train": MixedRows(list(stores.values()), "train")}
    evaluated = settings.eval_steps > 0 and any(store.held_out.any() for store in stores.values())
    if evaluated:
        rows["held_out"] = MixedRows(list(stores.values()), "held_out")
    describe_data(model, stores, evaluated=evaluated)
    make_feed = partial(
        feed,
        model,
        list(stores.values()),
        prompts,
        spare_folder=run.path,
        tokens_per_forward=settings.tokens_per_forward,
        mined_negatives=settings.mined_negatives,
        on_cpu=pick_device(settings.device) == "cpu",
    )
    form, collators = ranks.in_turn(make_feed)
    if settings.compile:
        form = compile_student(model, form, collators[0], bf16=settings.bf16)
    else:
        form = choose_form(model, form, collators, attention=settings.attention, bf16=settings.bf16)
    widths = widths_of(model, settings)
    if widths is not None:
        logger.info("the loss is taken of vectors as they are, and cut to %s", ", ".join(map(str, widths.cuts)))
    batches = mixed_batches(stores, settings, ranks.count)
    if settings.batching == "cluster":
        # The trainer makes a sampler of its own, which finds the clusters.
        ranks.in_turn(partial(batches, rows["train"], settings.batch_size, ranks.count > 1, seed=settings.seed))
    trainer = GuidedTrainer(
        model=model,
        args=_arguments(settings, batches, ranks, run, prompts, trackers, score_name(model, held_out=evaluated)),
        rows=rows,
        form=form,
        losses=_losses(model, stores, settings, gather=ranks.count > 1),
        finite=FiniteSteps(run, bf16=settings.bf16),
        replay=_replay(model, settings, collators[0].passes) if settings.cached else None,
        data_collator=MixedCollator(collators),
        train_dataset=card_rows(stores, "train"),
        eval_dataset=card_rows(stores, "held_out") if evaluated else None,
        matryoshka=widths,
        evaluator=_evaluator(stores if evaluated else {}, settings, widths),
        schedule=_schedule(settings),
    )
    # It prints every record; the bar and the log file have them.
    trainer.remove_callback(PrinterCallback)
    if settings.keep_best:
        by = "nDCG@10 on the held-out rows" if evaluated else f"Spearman's correlation on {settings.eval_sts}"
        logger.info("the best student is the one with the highest %s", by)
        trainer.add_callback(KeepBest(settings.patience))
    return trainer


def widths_of(model: SentenceTransformer, settings: TrainSettings) -> Matryoshka | None:
    """The widths at which the loss is taken; None for the student's own alone.

    Raises:
        ConfigError: When the student is not that wide.
        ModelError: When it does not say how wide it is.
    """
    if not settings.matryoshka_dims:
        return None
    own = model.get_embedding_dimension()
    if own is None:
        raise ModelError("the student does not say how wide its vectors are: leave --matryoshka-dims out")
    return matryoshka(own, settings.matryoshka_dims, settings.matryoshka_weights)


def mixed_batches(stores: Stores, settings: TrainSettings, processes: int) -> MixedBatches:
    """How the rows of the stores are batched.

    Raises:
        ConfigError: When a store does not know the tasks of its rows.
        DependencyError: When faiss is needed and not installed.
    """
    batches = (
        StoreBatches(store, settings.batching, clusters=settings.clusters, processes=processes)
        for store in stores.values()
    )
    return MixedBatches(tuple(batches), settings.mixing or "proportional")


def check_steps(batches: MixedBatches, batch_size: int) -> None:
    """Refuse stores whose rows fill no step of several processes, though they are many enough.

    Raises:
        ConfigError: With the first such store.
    """
    for of_store in batches.of_stores:
        if of_store.num_batches(batch_size) == 0:
            raise ConfigError(
                f"--batch-size {batch_size} in {of_store.processes} processes: no task of {of_store.store.path} has "
                f"the {batch_size * of_store.processes} rows of a step: give less"
            )


def _losses(
    model: SentenceTransformer, stores: Stores, settings: TrainSettings, *, gather: bool
) -> dict[str, GISTLoss]:
    """The loss of each store; a learned temperature is one weight of them all."""
    options: dict[str, Any] = {name: getattr(settings, name) for name in _LOSS_OPTIONS}
    if settings.learn_temperature:
        options["temperature"] = LearnedTemperature(settings.temperature, _lowest_temperature(settings))
    if settings.triplet_margin is not None:
        options["triplet_margin"] = settings.triplet_margin
    options["gather_across_devices"] = gather
    return {name: GISTLoss(model, store, **options) for name, store in stores.items()}


def _evaluator(stores: Stores, settings: TrainSettings, widths: Matryoshka | None) -> BaseEvaluator | None:
    """What scores the student: the stores' held-out rows, a file of scored pairs, or both; None for neither."""
    evaluators: list[BaseEvaluator] = []
    cuts = [] if widths is None else widths.cuts
    if stores:
        evaluators.append(held_out_evaluator(stores, batch_size=settings.batch_size, widths=cuts))
    if settings.eval_sts is not None:
        pairs = read_scored_pairs(settings.eval_sts)
        by_cosine = similarity_evaluator(pairs, batch_size=settings.batch_size, name=STS)
        evaluators.append(AtWidths(by_cosine, cuts) if cuts else by_cosine)
    if len(evaluators) < 2:
        return next(iter(evaluators), None)
    return SequentialEvaluator(evaluators, main_score_function=lambda scores: scores[0])


def _replay(model: SentenceTransformer, settings: TrainSettings, passes: Passes) -> Replay:
    if settings.replay_tolerance and any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules()):
        logger.info("replay tolerance: the texts embedded again draw their dropout anew; --dropout 0 for none")
    return Replay(settings.replay_tolerance, settings.replay_unbiased, passes)


def _schedule(settings: TrainSettings) -> Schedule:
    return Schedule(
        temperature=settings.temperature,
        lowest=_lowest_temperature(settings),
        decay=settings.temperature_decay,
        margin=settings.margin,
        margin_end=settings.margin_end,
    )


def _lowest_temperature(settings: TrainSettings) -> float:
    return LOWEST_TEMPERATURE if settings.min_temperature is None else settings.min_temperature


def _arguments(
    settings: TrainSettings,
    batches: MixedBatches,
    ranks: Ranks,
    run: RunFolder,
    prompts: dict[str, str],
    trackers: Sequence[str],
    score: str,
) -> SentenceTransformerTrainingArguments:
    on_cpu = pick_device(settings.device) == "cpu"
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(run.checkpoints),
        run_name=run.path.name,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        # Each process evaluates all rows, in batches of as many as meet in a step.
        per_device_eval_batch_size=settings.batch_size * ranks.count,
        dataloader_drop_last=ranks.count > 1,
        batch_sampler=cast(Any, batches),
        # For the card: `batch_sampler` mixes, too.
        multi_dataset_batch_sampler=settings.mixing or "proportional",
        prompts=prompts,
        learning_rate=settings.learning_rate,
        learning_rate_mapping=dict(settings.learning_rates or {}),
        # Below 1 it is a share of the steps.
        warmup_steps=settings.warmup,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        accelerator_config={"non_blocking": not on_cpu},
        dataloader_num_workers=settings.workers,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        # A loss that is not finite stops the run; the filter would wait for the device in each step.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        # The beginning of a resumed run was evaluated already.
        eval_on_start=bool(settings.eval_steps) and run.last_checkpoint() is None,
        # The best checkpoint is looked after only where checkpoints are saved every so many steps.
        save_strategy="steps" if settings.save_steps or settings.keep_best else "no",
        save_steps=settings.save_steps or sys.maxsize,
        metric_for_best_model=score if settings.keep_best else None,
        save_total_limit=settings.save_total_limit,
        report_to=list(trackers) or "none",
        disable_tqdm=True,
    )
    # Left to itself the trainer makes the batch larger and splits it over all GPUs of one process.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
