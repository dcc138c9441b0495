"""Sentence-transformers' trainer, set up for a guide store."""

import logging
from collections.abc import Sequence
from typing import Any, cast

from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import Tensor
from transformers import PrinterCallback

from gistfast.batches import StoreBatches
from gistfast.config import TrainSettings
from gistfast.loss import CachedGISTLoss, GISTLoss
from gistfast.modelcard import describe_data
from gistfast.pretrained import pick_device
from gistfast.retrieval import held_out_retrieval, retrieval_evaluator
from gistfast.run_folder import RunFolder
from gistfast.store import GuideStore
from gistfast.student import checkpoint_activations

logger = logging.getLogger(__name__)

_LOSS_OPTIONS = (
    "temperature",
    "margin",
    "margin_strategy",
    "contrast_anchors",
    "contrast_positives",
    "hard_only",
    "backend",
)


class GuidedTrainer(SentenceTransformerTrainer):
    """The trainer, with the shares that the guide dropped in each record of the log ("dropped/ap", ...)."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """The loss of a batch; its shares join the record that is logged next."""
        outcome: Tensor | tuple[Tensor, dict[str, Any]] = super().compute_loss(
            model, inputs, return_outputs, num_items_in_batch
        )
        dropped = cast(GISTLoss | CachedGISTLoss, self.loss).last_stats
        self.track_loss_components({f"dropped/{block}": share for block, share in dropped.items()})
        return outcome


def make_trainer(
    model: SentenceTransformer,
    store: GuideStore,
    settings: TrainSettings,
    run: RunFolder,
    trackers: Sequence[str],
) -> GuidedTrainer:
    """A trainer of the student on the store's training rows, ready to train.

    Args:
        model: The student; its prompts, its card and its checkpointing of activations are set up as well.
        store: The guide store.
        settings: Of the run.
        run: The run's folder.
        trackers: Those that the trainer starts itself.
    """
    prompts = _set_prompts(model, store.columns, settings.query_prompt, settings.document_prompt)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    rows = store.to_dataset("train")
    describe_data(model, rows, store.manifest.data.description, evaluated=settings.eval_steps > 0)
    held_out, evaluator = None, None
    if settings.eval_steps:
        held_out = store.to_dataset("held_out")
        task = held_out_retrieval(store)
        evaluator = retrieval_evaluator(task, batch_size=settings.batch_size, name="held_out")
    trainer = GuidedTrainer(
        model=model,
        args=_arguments(settings, store, run, prompts, trackers),
        train_dataset=rows,
        eval_dataset=held_out,
        loss=_loss(model, store, settings),
        evaluator=evaluator,
    )
    # It prints every record; the bar and the log file have them.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _set_prompts(
    model: SentenceTransformer, columns: Sequence[str], query: str | None, document: str | None
) -> dict[str, str]:
    """The prompt of each column that has one; the model keeps them for encode_query and encode_document."""
    own_query, own_document = _own_prompt(model, "query"), _own_prompt(model, "document", "passage", "corpus")
    query = own_query if query is None else query
    document = own_document if document is None else document
    model.prompts.update(query=query, document=document)
    if query or document:
        logger.info("student's prompts: %r before anchors, %r before other texts", query, document)
    prompts = {column: query if column == "anchor" else document for column in columns}
    return {column: prompt for column, prompt in prompts.items() if prompt}


def _own_prompt(model: SentenceTransformer, *names: str) -> str:
    """The first prompt of these names, or the default one, that the model has."""
    candidates = [name for name in (*names, model.default_prompt_name) if name is not None]
    return next(filter(None, map(model.prompts.get, candidates)), "")


def _loss(model: SentenceTransformer, store: GuideStore, settings: TrainSettings) -> GISTLoss | CachedGISTLoss:
    options: dict[str, Any] = {name: getattr(settings, name) for name in _LOSS_OPTIONS}
    if settings.cached:
        return CachedGISTLoss(model, store, mini_batch_size=settings.mini_batch_size, **options)
    return GISTLoss(model, store, **options)


def _arguments(
    settings: TrainSettings,
    store: GuideStore,
    run: RunFolder,
    prompts: dict[str, str],
    trackers: Sequence[str],
) -> SentenceTransformerTrainingArguments:
    on_cpu = pick_device(settings.device) == "cpu"
    return SentenceTransformerTrainingArguments(
        output_dir=str(run.checkpoints),
        run_name=run.path.name,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        batch_sampler=StoreBatches(store, settings.batching, clusters=settings.clusters),
        prompts=prompts,
        learning_rate=settings.learning_rate,
        # Below 1 it is a share of the steps.
        warmup_steps=settings.warmup,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=settings.workers,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        # A loss that is not a number is shown as it is.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        # The beginning of a resumed run was evaluated already.
        eval_on_start=bool(settings.eval_steps) and run.last_checkpoint() is None,
        save_strategy="steps" if settings.save_steps else "no",
        # Unused, but not admitted to be 0, where nothing is saved.
        save_steps=settings.save_steps or 1,
        save_total_limit=settings.save_total_limit,
        report_to=list(trackers) or "none",
        disable_tqdm=True,
    )
