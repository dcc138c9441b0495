"""Sentence-transformers' trainer on rows that are numbers: tokens, texts and guide vectors come from the stores.

A step embeds the set of distinct texts of its rows, puts the vectors back into columns and takes one loss. A text that
comes twice in a batch is embedded once, with one draw of dropout. The rows of a step are of one store.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.util import get_rank
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from gistfast.errors import VectorError
from gistfast.losses.gist_loss import GISTLoss, rows_of_all
from gistfast.losses.matryoshka import Matryoshka
from gistfast.losses.schedules import Schedule, ScheduledLoss
from gistfast.students.input import InputForm, TextSet
from gistfast.students.lora import has_lora, merged
from gistfast.training.checkpoint import load_trained, save_trained
from gistfast.training.collate import COUNTS, Batch, MixedBatch, MixedCollator, MixedRows, Split
from gistfast.training.loader import loader_of, worker_errors_in_one_line
from gistfast.training.means import StepMeans
from gistfast.training.non_finite import FiniteSteps, RowsOfStep
from gistfast.training.pace import Pace
from gistfast.training.step import Replay, embed, replayed_loss


class GuidedTrainer(SentenceTransformerTrainer):
    """The trainer on batches of `gistfast.training.collate.MixedCollator`.

    Each record of the log has the shares that the guide dropped ("dropped/ap", ...), the mean scores of the rows' own
    positives and hardest candidates ("score/positive", "score/hardest") and what a step embedded: rows, tokens, the
    same with padding, texts of all columns, and distinct texts among them; with a replay also the texts embedded again
    and the relative length of the gradient that was left out. Temperature and margin are there where they change. With
    several stores it has the loss of each that the steps took rows of ("loss/NAME"), and with several widths the loss
    at each ("loss_at/WIDTH"). What the clock says comes last (`gistfast.training.pace`).

    Attributes:
        evaluating: Whether an evaluation is under way, or failed.
    """

    def __init__(
        self,
        *,
        rows: Mapping[Split, MixedRows],
        form: InputForm,
        losses: Mapping[str, GISTLoss],
        schedule: Schedule,
        finite: FiniteSteps,
        replay: Replay | None = None,
        matryoshka: Matryoshka | None = None,
        **options: Any,
    ) -> None:
        """Take what is trained on, and the options of `SentenceTransformerTrainer`.

        Args:
            rows: Of the splits. `train_dataset` and `eval_dataset` are for the model card alone.
            form: What the student takes.
            losses: Of each store by its name, in the order of the rows; they share student and weights of their own.
            schedule: Temperature and margin of each step.
            finite: Looks at the numbers of each step.
            replay: How much of the gradient goes back by embedding again; None to keep the graphs of all passes.
            matryoshka: Widths at which the loss is taken; None for the student's own.
            **options: `data_collator` is a `MixedCollator`.
        """
        first, *others = losses.values()
        # The card names them all; the weights to be trained are the first one's as well as any other's.
        shown = {name: _shown(loss, matryoshka) for name, loss in losses.items()}
        super().__init__(loss=cast(Any, shown if others else shown.popitem()[1]), **options)
        self.loss: Any = first
        self.losses = losses
        self.evaluating = False
        self.rows = rows
        self.eval_dataset = rows.get("held_out")
        self.form = form
        self.finite = finite
        self.replay = replay
        self.matryoshka = matryoshka
        self.scheduled = ScheduledLoss([first, *others], schedule)
        self._means = {"train": StepMeans(), "eval": StepMeans()}
        self._pace = Pace()
        self.add_callback(self.scheduled)
        self.add_callback(self._pace)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """What was trained, by the trainer's own account; an error of a process that prepares batches is one line."""
        with worker_errors_in_one_line():
            return super().train(*arguments, **options)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader of the training rows."""
        self.accelerator.even_batches = False
        # Every process gets one batch of each step.
        loader = self._loader(self.rows["train"], self.args.train_batch_size, drop_last=self.args.world_size > 1)
        sampler: Any = loader.batch_sampler
        prepared = self.accelerator.prepare(loader)
        # A resumed epoch would not be told to the sampler behind accelerate's share of one process.
        prepared.batch_sampler.set_epoch = sampler.set_epoch
        return cast(DataLoader[Any], prepared)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The loader of the held-out rows, of all of them in every process; an empty one where there are none."""
        if "held_out" not in self.rows:
            return super().get_eval_dataloader(eval_dataset)
        return self._loader(self.rows["held_out"], self.args.eval_batch_size)

    def _loader(self, rows: MixedRows, batch_size: int, *, drop_last: bool = False) -> DataLoader[Any]:
        return loader_of(
            rows,
            self.get_batch_sampler(rows, batch_size=batch_size, drop_last=drop_last, seed=self.args.seed),
            cast(MixedCollator, self.data_collator),
            workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """The batches of a step, and how many items are in them."""
        with self._pace.fetching():
            return super().get_batch_samples(*arguments, **options)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """The scores of the student as it is; what the training draws afterwards is what it would have drawn before."""
        self.evaluating = True
        # A loader draws a seed for its workers, whether it has any or not.
        with torch.random.fork_rng(devices=[]):
            scores: dict[str, float] = super().evaluate(*arguments, **options)
        self.evaluating = False
        return scores

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """The loss of a batch; what the guide dropped and what was embedded join the record that is logged next."""
        batch = cast(MixedBatch, inputs)
        name, loss_module = list(self.losses.items())[batch["store"]]
        texts, loss_of = TextSet(**batch["texts"]), partial(self._contrast, loss_module, batch)
        # Counts are those of a step, and what is logged is the mean over its processes.
        processes = self.args.world_size
        counts = dict(zip(COUNTS, batch["counts"] * processes, strict=True)) if self.model.training else {}
        if self.replay is None or not torch.is_grad_enabled():
            loss = loss_of(embed(model, self.form, texts))
        else:
            learned = loss_module.learned_temperature
            own_weights = [] if learned is None else [learned.log]
            loss, replayed = replayed_loss(model, self.form, texts, loss_of, self.replay, own_weights)
            counts |= {**replayed, "replayed_texts": replayed["replayed_texts"] * processes}
        counts |= loss_module.last_stats
        if len(self.losses) > 1:
            counts[f"loss/{name}"] = loss
        self._means["train" if self.model.training else "eval"].add(counts)
        return (loss, {}) if return_outputs else loss

    @property
    def _loss_module(self) -> GISTLoss:
        return cast(GISTLoss, self.loss)

    def _contrast(self, loss: GISTLoss, batch: Batch, vectors: Tensor) -> Tensor:
        """The loss from the vectors (N, D) of the distinct texts."""
        places = batch["places"].T
        # As an embedding, because the gradient of one adds up in the same order each time, on every device.
        parts = [functional.embedding(places, vectors), batch["guide"][places], batch["identity"].T]
        done, training = self.state.global_step, self.model.training
        own_rows: dict[str, int] = {}
        if loss.gather_across_devices and training:
            own_rows = {"row_offset": places.shape[1] * get_rank(), "num_rows": places.shape[1]}
            parts = [rows_of_all(part) for part in parts]
        columns, guides, identities = parts

        def contrast(columns: Tensor) -> Tensor:
            return loss.contrast(columns.unbind(), guides.unbind(), identities.unbind(), **own_rows)

        when = f"step {done + 1}" if training else f"evaluation after step {done}"
        step = RowsOfStep(when, loss.store, batch["rows"])
        try:
            if self.matryoshka is None:
                value = contrast(columns)
            else:
                value, at_widths = self.matryoshka.loss(contrast, columns)
                loss.last_stats |= at_widths
        except VectorError:
            self.finite.refuse_vectors(vectors, batch["places"], step)
            raise
        if training:
            self.finite.take_loss(value, step)
        return value

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]  # theirs is untyped
        self.finite.take_norm(norm)
        return norm

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        control = self.control
        kept = control.should_save or control.should_training_stop
        if kept or control.should_log or control.should_evaluate:
            self.finite.look(self.model if kept else None)
        super()._maybe_log_save_evaluate(*arguments, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a record: of steps with what was counted and the options of the loss that change."""
        if "loss" in logs:
            means = self._means["train"].take()
            padding = {"padding": round(1 - means["tokens"] / means["padded_tokens"], 4)}
            pace = self._pace.take(means, self.args.device)
            logs = {**logs, **self.scheduled.options(), **means, **padding, **pace}
        elif "eval_loss" in logs:
            logs = {**logs, **{f"eval_{name}": mean for name, mean in self._means["eval"].take().items()}}
        super().log(logs, start_time)

    def load_weights(self, checkpoint: Path) -> None:
        """Take the weights of the student and of the loss over from a checkpoint, to the last bit."""
        self._load_from_checkpoint(str(checkpoint))

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        if not has_lora(self.model):
            super()._load_from_checkpoint(checkpoint_path)
        load_trained(Path(checkpoint_path), self.model, self._loss_module)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first process writes last what makes the checkpoint complete: the states of all are there by then.
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        with merged(self.model):
            super()._save(output_dir, state_dict)
        save_trained(Path(cast(str, output_dir or self.args.output_dir)), self.model, self._loss_module)


def _shown(loss: GISTLoss, matryoshka: Matryoshka | None) -> nn.Module:
    """The loss as the card shows it: by the names that sentence-transformers' users know."""
    if matryoshka is None:
        return loss
    return MatryoshkaLoss(loss.model, loss, list(matryoshka.weights), list(matryoshka.weights.values()))
