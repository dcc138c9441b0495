"""Who takes part in `gistfast.training.bench`: trainers that take the same rows, each in a process of its own.

A contender trains by its trainer's own loop, which a callback holds after each step until the benchmark asks for the
next one: a step is all that the loop does, from reading the rows to the record of the log.
"""

import ctypes
import os
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from transformers import PrinterCallback, Trainer, TrainerCallback

from gistfast.batches import EvenBatchSampler
from gistfast.process_memory import memory_mib
from gistfast.settings.stages import TrainSettings, build
from gistfast.store import GuideStore
from gistfast.students.student import load_student
from gistfast.training.ranks import Ranks
from gistfast.training.run_folder import RunFolder
from gistfast.training.setup import make_trainer
from gistfast.training.stores import open_stores
from gistfast.training.trainer import GuidedTrainer

PEERS = {"mnrl": "MultipleNegativesRankingLoss", "gist": "GISTEmbedLoss", "cached gist": "CachedGISTEmbedLoss"}
OURS: dict[str, dict[str, Any]] = {
    "gistfast": {},
    "gistfast padded": {"attention": "padded"},
    "gistfast compiled": {"compile": True},
    "gistfast cached": {"cached": True},
    "gistfast tolerance 0.05": {"cached": True, "replay_tolerance": 0.05},
    "gistfast unbiased 0.05": {"cached": True, "replay_tolerance": 0.05, "replay_unbiased": True},
}


@dataclass(frozen=True)
class Task:
    """What a contender is to train.

    Attributes:
        contender: A name of `PEERS` or `OURS`.
        store: Guide store of the rows.
        student: Folder of the student; trained without dropout.
        guide: Folder of the guide, for those who run it in every step.
        batch_size: Rows of a step.
        max_length: Tokens of a text at most.
        threads: Of PyTorch.
        folder: Takes what a run writes.
    """

    contender: str
    store: Path
    student: Path
    guide: Path
    batch_size: int
    max_length: int
    threads: int
    folder: Path


class Gate(TrainerCallback):
    """Holds the training after each step, and sends how long the step took.

    What is sent: seconds of the step, seconds of the processor, seconds of the step outside model, loss and optimizer,
    peak memory in MiB.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.inside = False
        self._begin()

    def _begin(self) -> None:
        self.begun_s, self.begun_cpu_s, self.working_s = time.perf_counter(), time.process_time(), 0.0

    def time(self, owner: Any, name: str) -> None:
        """Count the time that a method of `owner` takes, unless another one called it, as work that must be done."""
        method = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            if self.inside:
                return method(*arguments, **options)
            self.inside, begun_s = True, time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.inside = False
                self.working_s += time.perf_counter() - begun_s

        setattr(owner, name, timed)

    def on_train_begin(self, *given: Any, **options: Any) -> None:
        """What goes before the first step is no part of it."""
        self._begin()

    def on_pre_optimizer_step(self, *given: Any, **options: Any) -> None:
        """Count what the optimizer does as work."""
        self.working_s -= time.perf_counter()

    def on_optimizer_step(self, *given: Any, **options: Any) -> None:
        """The other end."""
        self.working_s += time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Report, and wait until the next step is asked for."""
        elapsed_s, cpu_s = time.perf_counter() - self.begun_s, time.process_time() - self.begun_cpu_s
        # Freed memory goes back to the system: the next contender may need it.
        ctypes.CDLL(None).malloc_trim(0)
        self.pipe.send((elapsed_s, cpu_s, elapsed_s - self.working_s, memory_mib("VmHWM")))
        control.should_training_stop = not self.pipe.recv()
        self._begin()


def serve(pipe: Connection, task: Task) -> None:
    """Take steps until told to stop; the target of a process."""
    _settle(task)
    gate = Gate(pipe)
    trainer = _own_trainer(task) if task.contender in OURS else _peer(task)
    model: Any = trainer.model
    gate.time(model, "forward")
    gate.time(trainer.accelerator, "backward")
    if task.contender in OURS:
        gate.time(cast(GuidedTrainer, trainer).loss, "contrast")
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(gate)
    pipe.send("ready")
    if pipe.recv():
        trainer.train()


def run_whole(pipe: Connection, task: Task, num_steps: int) -> None:
    """Train for some steps and save the student; the target of a process."""
    _settle(task)
    if task.contender in OURS:
        from gistfast.stages.train import train

        options = {"batch_size": task.batch_size, "max_length": task.max_length, "dropout": 0.0, "device": "cpu"}
        options |= {"max_steps": num_steps, "save_steps": 0, "trackers": ()} | OURS[task.contender]
        train(task.store, student=task.student, out=task.folder, **options)
    else:
        trainer = _peer(task, num_steps)
        trainer.train()
        cast(SentenceTransformer, trainer.model).save_pretrained(str(task.folder))
    pipe.send((time.process_time(), memory_mib("VmHWM")))


def _settle(task: Task) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    # What a trainer prints is not the benchmark's.
    sys.stdout = sys.stderr
    torch.set_num_threads(task.threads)


def _own_trainer(task: Task) -> Trainer:
    options = {"store": task.store, "student": task.student, "out": task.folder, "batch_size": task.batch_size}
    settings = build(TrainSettings, {**options, **OURS[task.contender], "epochs": 1000.0, "save_steps": 0})
    model = load_student(str(task.student), max_length=task.max_length, dropout=0.0, device="cpu")
    return make_trainer(model, open_stores(settings.store), settings, RunFolder(task.folder), [], Ranks())


def _peer(task: Task, num_steps: int = -1) -> Trainer:
    model = load_student(str(task.student), max_length=task.max_length, dropout=0.0, device="cpu")
    options: dict[str, Any] = {} if task.contender == "mnrl" else {"temperature": 0.01}
    if task.contender != "mnrl":
        options["guide"] = SentenceTransformer(str(task.guide), device="cpu")
        options["guide"].max_seq_length = task.max_length
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(task.folder),
        num_train_epochs=1000,
        max_steps=num_steps,
        per_device_train_batch_size=task.batch_size,
        batch_sampler=EvenBatchSampler,
        learning_rate=2e-5,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = GuideStore.open(task.store).to_dataset("train").remove_columns("label")
    loss = getattr(losses, PEERS[task.contender])(model, **options)
    return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss)
