"""What a training run would be: its size, and what its first steps take, measured where nothing is kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer

from gistfast.errors import ConfigError
from gistfast.losses.functional import choose_backend
from gistfast.models.pretrained import no_weight_bar
from gistfast.process_memory import peak_mib
from gistfast.settings.stages import TrainSettings, build
from gistfast.training.begin import load, num_steps, open_run
from gistfast.training.callbacks import StepProgress, choose_trackers
from gistfast.training.collate import Collator, MixedCollator
from gistfast.training.hub_upload import check_hub
from gistfast.training.out_of_memory import memory_errors_in_one_line
from gistfast.training.ranks import Ranks
from gistfast.training.run_folder import RunFolder, step_of
from gistfast.training.setup import make_trainer, mixed_batches
from gistfast.training.stores import Stores, num_train_rows
from gistfast.training.trainer import GuidedTrainer

_MOST_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would be.

    Attributes:
        rows: Rows to train on.
        held_out: Rows held out of training.
        batch_size: Rows of a step at most.
        batches: Batches of an epoch.
        steps: Steps of the whole run.
        done: Steps that a run to be resumed has taken.
        weights: Numbers that the student consists of.
        trained: Those of them that are trained.
        tokens: Tokens that an epoch embeds, estimated from the steps that were taken.
        padded_tokens: The same with padding.
        how: Device, precision, backend of the loss, and forward passes, in words.
        peak_mib: Memory at its highest: on a GPU what was allocated there, else this process.
        on_gpu: Which of the two.
        taken: Steps that were taken.
        step_s: Seconds of a step, the first one left out where there are more.
        tokens_at: Folders in which the student's tokens stay: those of the stores that can be written.
    """

    rows: int
    held_out: int
    batch_size: int
    batches: int
    steps: int
    done: int
    weights: int
    trained: int
    tokens: float
    padded_tokens: float
    how: str
    peak_mib: float
    on_gpu: bool
    taken: int
    step_s: float
    tokens_at: tuple[Path, ...]

    @property
    def whole_s(self) -> float:
        """Seconds that the steps to come would take."""
        return (self.steps - self.done) * self.step_s


def dry_run(store: str | Path, *, student: str | Path, out: str | Path, **options: Any) -> DryRun:
    """What `gistfast.train` would do with the same arguments, measured on up to ten steps of it.

    The steps are taken in a temporary folder, and nothing is written to `out`. The student's tokens, and the clusters
    of `--batching cluster`, stay in the store, where the run finds them.

    Args:
        store: As for `train`.
        student: As for `train`.
        out: As for `train`; refused as there.
        **options: As for `train`.

    Raises:
        ConfigError: As `train`; also when a run to be resumed is complete.
        GistfastError: As `train`.
    """
    settings = build(TrainSettings, {**options, "store": store, "student": student, "out": out})
    stores, run, _ = open_run(settings)
    if settings.resume and run.finished() is not None:
        raise ConfigError(f"{run.path} is complete: nothing to resume")
    choose_trackers(settings.trackers)
    if settings.push_to_hub is not None:
        check_hub(settings.push_to_hub)
    model = load(settings)
    batches = sum(mixed_batches(stores, settings, 1).num_batches(settings.batch_size))
    steps = num_steps(settings, batches)
    done = step_of(run.last_checkpoint() if settings.resume else None)
    taken = min(_MOST_STEPS, max(steps - done, 1))
    with TemporaryDirectory(prefix="gistfast-") as folder:
        trainer = _take_steps(model, stores, _without_traces(settings, folder, taken))
        tokens_at = [tokens.path for made in _collators(trainer) for tokens in made.tokens]
        stay = [path for path in tokens_at if not path.is_relative_to(folder)]
        tokens, padded, step_s = _means(trainer.state.log_history)
        return DryRun(
            rows=sum(map(num_train_rows, stores.values())),
            held_out=sum(int(store.held_out.sum()) for store in stores.values()),
            batch_size=settings.batch_size,
            batches=batches,
            steps=steps,
            done=done,
            weights=sum(weight.numel() for weight in model.parameters()),
            trained=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            tokens=tokens * batches,
            padded_tokens=padded * batches,
            how=_how(trainer, settings),
            peak_mib=peak_mib(model.device),
            on_gpu=model.device.type == "cuda",
            taken=taken,
            step_s=step_s,
            tokens_at=tuple(dict.fromkeys(path.parent for path in stay)),
        )


def _without_traces(settings: TrainSettings, folder: str, steps: int) -> TrainSettings:
    """The settings of a few steps in a folder, of which nothing is evaluated, saved or told to anyone."""
    return replace(
        settings,
        out=folder,
        max_steps=steps,
        eval_steps=0,
        eval_sts=None,
        keep_best=False,
        patience=None,
        save_steps=0,
        push_to_hub=None,
        logging_steps=1,
        dry_run=False,
    )


def _take_steps(model: SentenceTransformer, stores: Stores, settings: TrainSettings) -> GuidedTrainer:
    trainer = make_trainer(model, stores, settings, RunFolder(Path(settings.out)), [], Ranks())
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    with (
        StepProgress() as bar,
        no_weight_bar(),
        memory_errors_in_one_line(trainer, None, recomputes=settings.gradient_checkpointing),
    ):
        trainer.add_callback(bar)
        trainer.train()
    return trainer


def _collators(trainer: GuidedTrainer) -> Sequence[Collator]:
    return cast(MixedCollator, trainer.data_collator).of_stores


def _means(history: Sequence[dict[str, float]]) -> tuple[float, float, float]:
    """Tokens of a step, the same with padding, and its seconds.

    The first step, in which everything is done for the first time, is not timed where there are more.
    """
    steps = [record for record in history if "loss" in record]
    tokens, padded = (fmean(record[name] for record in steps) for name in ("tokens", "padded_tokens"))
    return tokens, padded, fmean(record["step_ms"] for record in steps[1:] or steps) / 1000


def _how(trainer: GuidedTrainer, settings: TrainSettings) -> str:
    device = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    backend = choose_backend(settings.backend, torch.empty(0, device=device))
    budget = _collators(trainer)[0].passes.budget
    how = [
        name,
        "bf16 where it is safe" if settings.bf16 else "fp32",
        f"loss backend {backend}",
        f"passes of up to {budget:,} tokens" if budget else "one pass for all texts of a batch",
    ]
    how += ["each embedded twice (cached)"] * settings.cached + ["activations recomputed"] * (
        settings.gradient_checkpointing
    )
    return ", ".join(how)


def facts(found: DryRun) -> list[tuple[str, str]]:
    """The figures, by name, as a table shows them."""
    padding = 1 - found.tokens / max(found.padded_tokens, 1)
    frozen = "all trained" if found.trained == found.weights else f"{found.trained:,} of them trained"
    begun = f", {found.done:,} of them done" if found.done else ""
    epochs = found.steps / found.batches
    timed = f"mean of steps 2 to {found.taken}" if found.taken > 2 else f"that of step {found.taken}"
    where = "on the GPU" if found.on_gpu else "for the process"
    tokens_at = " and ".join(map(str, found.tokens_at))
    tokens = f"; the student's tokens stay in {tokens_at}, for the run" if tokens_at else ""
    return [
        ("rows", f"{found.rows:,} to train on, {found.held_out:,} held out"),
        (
            "steps",
            f"{found.steps:,}{begun}: {epochs:.4g} epochs of {found.batches:,} batches of up to {found.batch_size:,}",
        ),
        ("weights", f"{found.weights:,}, {frozen}"),
        (
            "tokens",
            f"about {float(f'{found.tokens:.3g}'):,.0f} an epoch; padding makes {padding:.1%} of what is computed",
        ),
        ("computes on", found.how),
        ("memory", f"{found.peak_mib:,.0f} MiB {where}, at its highest in {found.taken} steps"),
        ("a step", f"{found.step_s:.3g} s, {timed}"),
        ("whole run", f"about {_duration(found.whole_s)}, evaluations and checkpoints not counted"),
        ("written", f"nothing to --out{tokens}"),
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
