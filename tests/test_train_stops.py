"""Steps that cannot be taken stop a run in one line, leave its checkpoints good, and can be taken again."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from train_cases import ROWS, same_weights, steps, train_small

from gistfast.batches import StoreBatches
from gistfast.errors import TrainingError
from gistfast.losses.gist_loss import GISTLoss
from gistfast.stages.train import TrainReport
from gistfast.store import GuideStore
from gistfast.training.trainer import GuidedTrainer

SEED = 42


@pytest.fixture
def store(make_store: Callable[..., GuideStore]) -> GuideStore:
    return make_store(ROWS)


@pytest.fixture
def run(store: GuideStore, tiny_student: Path, tmp_path: Path) -> Callable[..., TrainReport]:
    """Six steps of four rows, with a checkpoint every second step."""
    options = {"seed": SEED, "save_steps": 2, "out": tmp_path / "student"}
    return partial(train_small, store=store.path, student=tiny_student, **options)


@contextmanager
def at_step(number: int, act: Callable[[GuidedTrainer], Any]) -> Iterator[None]:
    """Let something happen to the trainer at the beginning of a step, counted from 1."""
    training_step = GuidedTrainer.training_step

    def step(self: GuidedTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        if self.state.global_step + 1 == number:
            act(self)
        return training_step(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuidedTrainer, "training_step", step)
        yield


def rows_of_step(store: GuideStore, number: int) -> list[int]:
    """The rows that meet in a step of the first two epochs."""
    sampler = StoreBatches(store)(range(store.num_rows), 4, False, seed=SEED)
    batches = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches += list(sampler)
    return batches[number - 1]


def loss_is_nan(trainer: GuidedTrainer) -> None:
    contrast = GISTLoss.contrast

    def once(self: GISTLoss, *arguments: Any, **options: Any) -> torch.Tensor:
        GISTLoss.contrast = contrast
        return contrast(self, *arguments, **options) * torch.nan

    GISTLoss.contrast = once


def gradient_is_infinite(trainer: GuidedTrainer) -> None:
    weight = next(weight for weight in trainer.model.parameters() if weight.requires_grad)

    def once(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return torch.full_like(gradient, torch.inf)

    handle = weight.register_hook(once)


def weights_are_infinite(trainer: GuidedTrainer) -> None:
    """The next update of the optimizer leaves the range of the numbers."""
    trainer.optimizer.optimizer.register_step_post_hook(
        lambda optimizer, *_: optimizer.param_groups[0]["params"][0].data.fill_(torch.inf)
    )


def named_rows(message: str) -> list[int]:
    return [int(number) for number in re.findall(r"(\d+) \('", message)]


# Numbers that are not finite.


@pytest.mark.parametrize(
    "options", [{}, {"logging_steps": 100, "cached": True, "replay_tolerance": 0.1}], ids=["kept", "replayed"]
)
@pytest.mark.parametrize(
    ("act", "problem"),
    [(loss_is_nan, "the loss is nan"), (gradient_is_infinite, "the length of the gradient is inf")],
)
def test_step_that_is_not_finite_stops_with_its_rows_and_the_last_good_checkpoint(
    act: Callable[[GuidedTrainer], None],
    problem: str,
    options: dict[str, Any],
    run: Callable[..., TrainReport],
    store: GuideStore,
    tmp_path: Path,
) -> None:
    run = partial(run, **options)
    undisturbed = run(out=tmp_path / "undisturbed")
    with at_step(5, act), pytest.raises(TrainingError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"step 5: {problem}; rows ")
    wanted = rows_of_step(store, 5)
    assert named_rows(message) == wanted[:3]
    assert f"{wanted[0]} ({ROWS[wanted[0]][0]!r}, {ROWS[wanted[0]][1]!r})" in message
    assert " and 1 more of " in message
    good = tmp_path / "student" / "checkpoints" / "checkpoint-4"
    assert f"the last good checkpoint is {good}: begin a new run there (--student {good}) with a lower" in message
    assert "--bf16" not in message
    assert same_weights(good, tmp_path / "undisturbed" / "checkpoints" / "checkpoint-4")
    assert [path.name for path in sorted(good.parent.iterdir())] == ["checkpoint-2", "checkpoint-4"]
    assert all(record["step"] < 5 for record in steps(tmp_path / "student"))
    assert same_weights(run(resume=True).path, undisturbed.path)


def test_gradient_of_a_step_that_is_saved_is_looked_at_before(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    with at_step(4, gradient_is_infinite), pytest.raises(TrainingError, match=r"step 4: .*checkpoint-2: begin"):
        run(logging_steps=100)
    assert [path.name for path in (tmp_path / "student" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_gradient_of_the_last_step_is_looked_at(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    with at_step(6, gradient_is_infinite), pytest.raises(TrainingError, match=r"step 6: .* there is no checkpoint yet"):
        run(logging_steps=100, save_steps=0)
    assert not (tmp_path / "student" / "report.json").exists()


@pytest.mark.parametrize(("step", "found"), [(3, "step 4: the student's vectors are"), (4, r"step 4: .*weight is")])
def test_weights_that_are_not_finite_are_never_saved(
    step: int, found: str, run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    with at_step(step, weights_are_infinite), pytest.raises(TrainingError, match=f"{found} not finite.*checkpoint-2"):
        run(logging_steps=100)
    assert [path.name for path in (tmp_path / "student" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_rows_of_a_vector_without_direction_are_named_alone(run: Callable[..., TrainReport], store: GuideStore) -> None:
    bad = rows_of_step(store, 3)[2]

    def spoil(trainer: GuidedTrainer) -> None:
        contrast = trainer._contrast

        def once(loss: GISTLoss, batch: Any, vectors: torch.Tensor) -> torch.Tensor:
            anchor = batch["places"][batch["rows"].tolist().index(bad), 0]
            return contrast(loss, batch, vectors.index_fill(0, anchor, torch.nan))

        trainer._contrast = once

    with (
        at_step(3, spoil),
        pytest.raises(TrainingError, match="step 3: the student's vectors are not finite") as caught,
    ):
        run()
    assert named_rows(str(caught.value)) == [bad]
    assert "; row " in str(caught.value)


def test_rows_are_those_of_their_store(
    make_store: Callable[..., GuideStore], run: Callable[..., TrainReport], store: GuideStore
) -> None:
    others = [(f"{anchor} of the other", positive) for anchor, positive in ROWS]
    other = make_store(others, name="other")
    with at_step(3, loss_is_nan), pytest.raises(TrainingError) as caught:
        run(store=(store.path, other.path))
    message = str(caught.value)
    texts = others if f" of {other.path}; nothing" in message else ROWS
    for row in named_rows(message):
        assert f"{row} ({texts[row][0]!r}, {texts[row][1]!r})" in message


def test_runaway_learning_rate_is_named_as_the_cause(run: Callable[..., TrainReport]) -> None:
    with pytest.raises(TrainingError, match=r"not finite.*a lower --learning-rate, or without --bf16"):
        run(learning_rate=1e38, bf16=True, warmup=0.0)


def test_long_texts_are_shortened(make_store: Callable[..., GuideStore], run: Callable[..., TrainReport]) -> None:
    texts = [(f"{number} " + "word\n" * 100, f"meaning {number}") for number in range(8)]
    with at_step(1, loss_is_nan), pytest.raises(TrainingError) as caught:
        run(store=make_store(texts, name="long").path)
    assert re.search(r"\d \('\d word word [word ]+ \.\.\.', 'meaning \d'\)", str(caught.value))
    assert "\n" not in str(caught.value)


# Too little memory.

EXBIBYTE = 1 << 60


def more_than_there_is(trainer: GuidedTrainer) -> None:
    torch.empty(EXBIBYTE, dtype=torch.uint8)


def more_than_numpy_gets(trainer: GuidedTrainer) -> None:
    np.empty(EXBIBYTE, np.uint8)


def more_than_the_gpu_has(trainer: GuidedTrainer) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.11 GiB in all.")


@pytest.mark.parametrize(
    ("act", "asked_for"),
    [
        (more_than_there_is, "1152921504606846976 bytes"),
        (more_than_numpy_gets, r"1\.00 EiB"),
        (more_than_the_gpu_has, r"2\.00 GiB"),
    ],
)
def test_step_without_memory_names_the_budget_to_try(
    act: Callable[[GuidedTrainer], None], asked_for: str, run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    with at_step(5, act), pytest.raises(TrainingError) as caught:
        run()
    last = tmp_path / "student" / "checkpoints" / "checkpoint-4"
    assert re.fullmatch(
        rf"step 5: out of memory \({asked_for} asked for\) with --tokens-per-forward 2048: "
        "try --tokens-per-forward 1024, and --cached, which keeps the activations of one pass in place of all, "
        f"and --gradient-checkpointing; --resume goes on from {re.escape(str(last))}",
        str(caught.value),
    )


def test_what_saves_memory_already_is_not_advised(run: Callable[..., TrainReport]) -> None:
    options = {"tokens_per_forward": 31, "cached": True, "gradient_checkpointing": True}
    with at_step(2, more_than_there_is), pytest.raises(TrainingError) as caught:
        run(**options)
    wanted = (
        "with --tokens-per-forward 31: try --tokens-per-forward 15; --resume begins anew: there is no checkpoint yet"
    )
    assert str(caught.value).endswith(wanted)


def test_student_without_passes_is_told_another_batch_size(
    run: Callable[..., TrainReport], tiny_student: Path, tmp_path: Path
) -> None:
    tokenizer = SentenceTransformer(str(tiny_student), device="cpu").tokenizer
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu").save(str(tmp_path / "s"))
    with at_step(3, more_than_there_is), pytest.raises(TrainingError, match=r"try a smaller --batch-size .*-2\)$"):
        run(student=tmp_path / "s")


def test_evaluation_without_memory_is_told_apart(
    make_store: Callable[..., GuideStore], run: Callable[..., TrainReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*arguments: Any, **options: Any) -> None:
        torch.empty(EXBIBYTE, dtype=torch.uint8)

    monkeypatch.setattr(InformationRetrievalEvaluator, "__call__", score)
    held_out = make_store(ROWS, name="held out", holdout=0.3)
    with pytest.raises(TrainingError, match=r"^evaluation after step 0: out of memory .* leave --eval-steps out"):
        run(store=held_out.path, eval_steps=3)


def test_other_errors_are_not_taken_for_missing_memory(run: Callable[..., TrainReport]) -> None:
    def fail(trainer: GuidedTrainer) -> None:
        raise RuntimeError("the power went")

    with at_step(2, fail), pytest.raises(RuntimeError, match=r"^the power went$"):
        run()


@pytest.mark.parametrize(
    "option",
    [{"tokens_per_forward": 16}, {"cached": True}, {"gradient_checkpointing": True}],
    ids=lambda option: next(iter(option)),
)
def test_run_goes_on_in_less_memory_with_the_same_losses(
    option: dict[str, Any], run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    run = partial(run, dropout=0.0)
    undisturbed = run(out=tmp_path / "undisturbed")
    with at_step(5, more_than_there_is), pytest.raises(TrainingError):
        run()
    resumed = run(resume=True, **option)
    found, wanted = ([record["loss"] for record in steps(report.path)] for report in (resumed, undisturbed))
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
