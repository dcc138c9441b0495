"""A step on a set of texts gives the gradient of the columns, each embedded by itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor
from torch.nn import functional

from gistfast import GISTLoss
from gistfast.losses.carriers import carriers
from gistfast.store import GuideStore
from gistfast.students.input import InputForm, TextSet
from gistfast.students.student import set_dropout
from gistfast.training.collate import Batch
from gistfast.training.feed import feed
from gistfast.training.passes import Passes
from gistfast.training.step import Replay, embed, part_of, replayed_loss

# "automobile" is an anchor, a positive and a negative; two rows share a positive; "bank" comes twice.
ROWS = [
    ("car", "a motor vehicle with four wheels", "a boat with sails"),
    ("automobile", "a motor vehicle with four wheels", "a road for vehicles"),
    ("a carriage with an engine", "automobile", "a drink of water"),
    ("bank", "a financial institution that accepts deposits", "automobile"),
    ("bank", "sloping land beside a body of water", "flat land"),
    ("oak", "a tree that bears acorns", "a wooden table"),
]
PASSES = Passes(budget=30, overhead=4)


@pytest.fixture
def student(tiny_student: Path) -> SentenceTransformer:
    model = SentenceTransformer(str(tiny_student), device="cpu").train()
    set_dropout(model, 0.0)
    return model


@pytest.fixture
def store(make_store: Callable[..., GuideStore]) -> GuideStore:
    return make_store(ROWS, dtype="float32")


class Step:
    """A student, the batch of all rows, and its loss."""

    def __init__(self, model: SentenceTransformer, store: GuideStore, spare: Path, **prompts: str) -> None:
        self.model, self.store, self.prompts = model, store, prompts
        self.form, (collator,) = feed(model, [store], prompts, spare_folder=spare, tokens_per_forward=30, on_cpu=True)
        self.batch: Batch = collator(np.arange(len(ROWS)))
        self.texts = TextSet(**self.batch["texts"])
        self.loss = GISTLoss(model, store, temperature=0.1)

    def loss_of(self, vectors: Tensor) -> Tensor:
        columns = functional.embedding(self.batch["places"].T, vectors)
        guides = self.batch["guide"][self.batch["places"].T]
        return self.loss.contrast(columns.unbind(), guides.unbind(), self.batch["identity"].T.unbind())

    def in_columns(self) -> Tensor:
        """As sentence-transformers' trainer gives a loss its columns: padded, and embedded one by one."""
        features = [
            self.model.preprocess([row[number] for row in ROWS], prompt=self.prompts.get(column))
            for number, column in enumerate(self.store.columns)
        ]
        return self.loss(features, torch.from_numpy(np.array(self.store.rows)))

    def kept(self) -> Tensor:
        return self.loss_of(embed(self.model, self.form, self.texts))

    def replayed(self, tolerance: float = 0.0, unbiased: bool = False) -> Tensor:
        replay = Replay(tolerance, unbiased, PASSES)
        loss, self.counts = replayed_loss(self.model, self.form, self.texts, self.loss_of, replay)
        return loss

    def gradient(self, take: Callable[[], Tensor], seed: int = 0) -> tuple[Tensor, Tensor]:
        """The loss, and the gradients on all weights as one vector."""
        self.model.zero_grad()
        torch.manual_seed(seed)
        loss = take()
        (2 * loss).backward()
        found = [weight.grad.flatten() for weight in self.model.parameters() if weight.grad is not None]
        return loss.detach(), torch.cat(found).clone() / 2


@pytest.fixture
def step(student: SentenceTransformer, store: GuideStore, tmp_path: Path) -> Step:
    return Step(student, store, tmp_path)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-6) -> None:
    for one, other in zip(found, expected, strict=True):
        assert other.norm() > 1e-3
        assert (one - other).norm() <= tolerance * other.norm()


def test_gradient_is_that_of_padded_columns(step: Step) -> None:
    assert len(step.texts.forwards) > 2
    step.model.double()
    assert_same(step.gradient(step.kept), step.gradient(step.in_columns))


def test_prompts_are_those_of_the_columns(student: SentenceTransformer, store: GuideStore, tmp_path: Path) -> None:
    step = Step(student.double(), store, tmp_path, anchor="a word: ", positive="a meaning: ")
    plain = Step(student.double(), store, tmp_path)
    assert_same(step.gradient(step.kept), step.gradient(step.in_columns))
    assert step.kept() != plain.kept()


def test_student_without_padding_takes_the_same_step(
    student: SentenceTransformer, store: GuideStore, tmp_path: Path
) -> None:
    static = SentenceTransformer(modules=[StaticEmbedding(student.tokenizer, embedding_dim=16)], device="cpu")
    step = Step(static.double(), store, tmp_path)
    assert len(step.texts.forwards) == 1
    assert_same(step.gradient(step.kept), step.gradient(step.in_columns))
    assert_same(step.gradient(step.replayed), step.gradient(step.in_columns))


# The replay.


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_replayed_gradient_is_the_kept_one(step: Step, dropout: float) -> None:
    set_dropout(step.model, dropout)
    kept = step.gradient(step.kept)
    assert_same(step.gradient(step.replayed), kept)
    assert step.counts["replayed_texts"] == len(step.texts)
    if dropout:
        assert not torch.equal(step.gradient(step.kept, seed=1)[1], kept[1])


def test_replay_draws_no_random_numbers_of_its_own(step: Step) -> None:
    set_dropout(step.model, 0.3)
    states = []
    for take in (step.kept, step.replayed):
        step.gradient(take)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_whole_gradient_is_replayed_within_a_tiny_tolerance(step: Step) -> None:
    step.model.double()
    assert_same(step.gradient(lambda: step.replayed(1e-9)), step.gradient(step.kept))


@pytest.mark.parametrize("tolerance", [0.05, 0.3, 0.9])
def test_tolerance_bounds_what_is_left_out(step: Step, tolerance: float) -> None:
    vectors = embed(step.model, step.form, step.texts).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(step.loss_of(vectors), vectors)
    found = carriers(gradient, vectors.detach(), step.texts.sizes, tolerance)
    lengths = gradient.norm(dim=1) * vectors.detach().norm(dim=1)
    left = np.setdiff1d(np.arange(len(lengths)), found.places)
    assert len(left) > 0
    assert found.left_out == pytest.approx((lengths[left].norm() / lengths.norm()).item())
    assert found.left_out <= tolerance
    # Those taken have the largest shares for each token, and one text less would have been too few.
    shares = lengths.numpy() ** 2 / step.texts.sizes
    assert shares[found.places].min() >= shares[left].max()
    last = found.places[shares[found.places].argmin()]
    assert lengths[[*left, last]].norm() > tolerance * lengths.norm()


def test_fewer_texts_are_replayed_with_a_gradient_nearby(step: Step) -> None:
    whole = step.gradient(step.kept)
    errors, counts = [], []
    for tolerance in (0.5, 0.1):
        loss, gradient = step.gradient(lambda tolerance=tolerance: step.replayed(tolerance))
        assert loss == whole[0]
        assert 0 < step.counts["replay_left_out"] <= tolerance
        counts.append(step.counts["replayed_texts"])
        errors.append((gradient - whole[1]).norm() / whole[1].norm())
    assert counts[0] < counts[1] < len(step.texts)
    assert 1 > errors[0] > errors[1] > 0


def test_mean_of_unbiased_draws_is_the_whole_gradient() -> None:
    gradient = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    sizes = np.array([1, 2, 1, 2, 1])
    torch.manual_seed(0)
    mean = torch.zeros_like(gradient)
    draws = 2000
    for _ in range(draws):
        found = carriers(gradient, torch.eye(5, dtype=torch.float64), sizes, 0.3, unbiased=True)
        assert {0, 1} <= set(found.places)
        mean[found.places] += gradient[found.places] * torch.from_numpy(found.weights)[:, None] / draws
    torch.testing.assert_close(mean, gradient, rtol=0.1, atol=0)
    assert found.left_out == pytest.approx((5.25 / 85.25) ** 0.5)


def test_no_gradient_is_replayed_by_one_text(step: Step) -> None:
    zeros = torch.zeros(5, 3)
    for unbiased in (False, True):
        found = carriers(zeros, torch.ones(5, 3), np.ones(5), 0.1, unbiased=unbiased)
        assert (len(found.places), found.left_out) == (1, 0.0)


def test_length_of_a_vector_does_not_count() -> None:
    """A loss of cosines has a longer gradient on a shorter vector."""
    vectors = torch.tensor([[1.0, 0.0], [0.01, 0.0]])
    gradient = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    assert carriers(gradient, vectors, np.ones(2), 0.5).places.tolist() == [0]


def test_long_texts_are_left_out_before_short_ones() -> None:
    gradient = torch.diag(torch.tensor([1.0, 1.0, 0.9]))
    assert carriers(gradient, torch.eye(3), np.array([10, 100, 10]), 0.7).places.tolist() == [0, 2]


def test_part_of_texts_keeps_their_tokens(step: Step) -> None:
    places = np.array([0, 3, 4, 7])
    part = part_of(step.texts, places, PASSES)
    for place, start, length in zip(places, part.starts.tolist(), part.lengths.tolist(), strict=True):
        assert (start, length) == (step.texts.starts[place], step.texts.lengths[place])
    assert (part.forwards[:, 1] - part.forwards[:, 0]).sum() == len(places)


class Kept:
    """A tensor that a graph keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_one_pass_at_a_time_is_in_memory(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: WeakSet[Kept] = WeakSet()
    features = InputForm.features
    found = []

    def keep(tensor: Tensor) -> Kept:
        holder = Kept(tensor)
        if tensor.ndim == 3:  # of each token
            kept.add(holder)
        return holder

    def watched(self: InputForm, *arguments: Any) -> dict[str, Any]:
        found.append(len(kept))
        return features(self, *arguments)

    monkeypatch.setattr(InputForm, "features", watched)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
        step.gradient(step.replayed)
        assert found == [0] * 2 * len(step.texts.forwards)
        step.gradient(step.kept)
        assert found[-1] > 0
