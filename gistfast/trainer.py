"""Sentence-transformers' trainer on rows that are numbers: tokens, texts and guide vectors come from the store.

A step embeds the set of distinct texts of its rows, puts the vectors back into columns and takes one loss. A text that
comes twice in a batch is embedded once, with one draw of dropout.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PrinterCallback

from gistfast.batches import StoreBatches
from gistfast.best import KeepBest, score_name
from gistfast.checkpoint import load_trained, save_trained
from gistfast.collate import COUNTS, Batch, Rows, Split
from gistfast.config import TrainSettings
from gistfast.feed import feed, set_prompts
from gistfast.lora import has_lora, merged
from gistfast.loss import GISTLoss
from gistfast.modelcard import card_rows, describe_data
from gistfast.passes import Passes
from gistfast.pretrained import pick_device
from gistfast.retrieval import held_out_retrieval, retrieval_evaluator
from gistfast.run_folder import RunFolder
from gistfast.schedules import LOWEST_TEMPERATURE, LearnedTemperature, Schedule, ScheduledLoss
from gistfast.step import Replay, embed, replayed_loss
from gistfast.store import GuideStore
from gistfast.student import checkpoint_activations
from gistfast.student_input import InputForm, TextSet

_EVALUATOR = "held_out"

_LOSS_OPTIONS = (
    "temperature",
    "margin",
    "margin_strategy",
    "contrast_anchors",
    "contrast_positives",
    "hard_only",
    "backend",
)


logger = logging.getLogger(__name__)


class GuidedTrainer(SentenceTransformerTrainer):
    """The trainer on batches of `gistfast.collate.Collator`.

    Each record of the log has the shares that the guide dropped ("dropped/ap", ...) and what a step embedded: tokens,
    the same with padding, texts of all columns, and distinct texts among them; with a replay also the texts embedded
    again and the relative length of the gradient that was left out. Temperature and margin are there where they change.
    """

    def __init__(
        self,
        *,
        rows: Mapping[Split, Rows],
        form: InputForm,
        schedule: Schedule,
        replay: Replay | None = None,
        **options: Any,
    ) -> None:
        """Take what is trained on, and the options of `SentenceTransformerTrainer`.

        Args:
            rows: Of the splits. `train_dataset` and `eval_dataset` are for the model card alone.
            form: What the student takes.
            schedule: Temperature and margin of each step.
            replay: How much of the gradient goes back by embedding again; None to keep the graphs of all passes.
            **options: `data_collator` is a `Collator`, `loss` a `GISTLoss`.
        """
        super().__init__(**options)
        self.rows = rows
        self.form = form
        self.replay = replay
        self.scheduled = ScheduledLoss(self._loss_module, schedule)
        self.add_callback(self.scheduled)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader of the training rows."""
        self.accelerator.even_batches = False
        return self._loader(self.rows["train"], self.args.train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The loader of the held-out rows, whatever the model card calls them."""
        self.accelerator.even_batches = True
        return self._loader(self.rows["held_out"], self.args.eval_batch_size)

    def _loader(self, rows: Rows, batch_size: int) -> DataLoader[Any]:
        sampler = self.get_batch_sampler(
            rows, batch_size=batch_size, drop_last=self.args.dataloader_drop_last, seed=self.args.seed
        )
        loader = DataLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return cast(DataLoader[Any], self.accelerator.prepare(loader))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """The loss of a batch; what the guide dropped and what was embedded join the record that is logged next."""
        batch = cast(Batch, inputs)
        texts, loss_of = TextSet(**batch["texts"]), partial(self._contrast, batch)
        counts = dict(zip(COUNTS, batch["counts"], strict=True)) if self.model.training else {}
        if self.replay is None or not torch.is_grad_enabled():
            loss = loss_of(embed(model, self.form, texts))
        else:
            learned = self._loss_module.learned_temperature
            own_weights = [] if learned is None else [learned.log]
            loss, replayed = replayed_loss(model, self.form, texts, loss_of, self.replay, own_weights)
            counts |= replayed
        dropped = {f"dropped/{block}": share for block, share in self._loss_module.last_stats.items()}
        self.track_loss_components(dropped | counts)
        return (loss, {}) if return_outputs else loss

    @property
    def _loss_module(self) -> GISTLoss:
        return cast(GISTLoss, self.loss)

    def _contrast(self, batch: Batch, vectors: Tensor) -> Tensor:
        """The loss from the vectors (N, D) of the distinct texts."""
        places, identity = batch["places"].T, batch["identity"].T
        # As an embedding, because the gradient of one adds up in the same order each time, on every device.
        columns = functional.embedding(places, vectors)
        return self._loss_module.contrast(columns.unbind(), batch["guide"][places].unbind(), identity.unbind())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a record, that of a step with the options of the loss that change."""
        super().log({**logs, **self.scheduled.options()} if "loss" in logs else logs, start_time)

    def load_weights(self, checkpoint: Path) -> None:
        """Take the weights of the student and of the loss over from a checkpoint, to the last bit."""
        self._load_from_checkpoint(str(checkpoint))

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        if not has_lora(self.model):
            super()._load_from_checkpoint(checkpoint_path)
        load_trained(Path(checkpoint_path), self.model, self._loss_module)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with merged(self.model):
            super()._save(output_dir, state_dict)
        save_trained(Path(cast(str, output_dir or self.args.output_dir)), self.model, self._loss_module)


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
    prompts = set_prompts(model, store.columns, settings.query_prompt, settings.document_prompt)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    rows: dict[Split, Rows] = {"train": Rows(store, "train")}
    shown = card_rows(store, rows["train"].numbers)
    describe_data(model, shown, store.manifest.data.description, evaluated=settings.eval_steps > 0)
    held_out, evaluator = None, None
    if settings.eval_steps:
        rows["held_out"] = Rows(store, "held_out")
        held_out = card_rows(store, rows["held_out"].numbers)
        task = held_out_retrieval(store)
        evaluator = retrieval_evaluator(task, batch_size=settings.batch_size, name=_EVALUATOR)
    options: dict[str, Any] = {name: getattr(settings, name) for name in _LOSS_OPTIONS}
    if settings.learn_temperature:
        options["temperature"] = LearnedTemperature(settings.temperature, _lowest_temperature(settings))
    form, collator = feed(
        model,
        store,
        prompts,
        spare_folder=run.path,
        tokens_per_forward=settings.tokens_per_forward,
        on_cpu=pick_device(settings.device) == "cpu",
    )
    trainer = GuidedTrainer(
        model=model,
        args=_arguments(settings, store, run, prompts, trackers, score_name(model, _EVALUATOR)),
        rows=rows,
        form=form,
        replay=_replay(model, settings, collator.passes) if settings.cached else None,
        data_collator=collator,
        train_dataset=shown,
        eval_dataset=held_out,
        loss=GISTLoss(model, store, **options),
        evaluator=evaluator,
        schedule=_schedule(settings),
    )
    # It prints every record; the bar and the log file have them.
    trainer.remove_callback(PrinterCallback)
    if settings.keep_best:
        trainer.add_callback(KeepBest(settings.patience))
    return trainer


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
    store: GuideStore,
    run: RunFolder,
    prompts: dict[str, str],
    trackers: Sequence[str],
    score: str,
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
        # A loss that is not a number is shown as it is.
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
