"""A compiled student: the losses of one that is not, from one graph for passes of any size."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch._dynamo.utils import counters
from train_cases import ROWS, same_weights, steps, train_small

from gistfast.errors import ConfigError
from gistfast.settings.stages import TrainSettings, build
from gistfast.store import GuideStore
from gistfast.students.compiled import compiled
from gistfast.students.input import InputForm, TextSet, input_form, text_set
from gistfast.students.student import set_dropout
from gistfast.training.passes import Passes
from gistfast.training.step import Replay, embed, replayed_loss

# What PyTorch's compiler uses of itself, it calls deprecated.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(autouse=True)
def from_the_beginning() -> Iterator[None]:
    """Nothing is compiled yet."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def student(tiny_student: Path) -> SentenceTransformer:
    model = SentenceTransformer(str(tiny_student), device="cpu").train()
    set_dropout(model, 0.1)
    return model


def texts_of(*sizes: int) -> TextSet:
    """Texts of some lengths, longest first."""
    lengths = np.array(sizes)
    tokens = np.random.default_rng(0).integers(1000, 9000, lengths.sum())
    return text_set(tokens, lengths, Passes(64, 4).cut(lengths, np.zeros(len(sizes), np.int64)))


def loss_of(vectors: Tensor) -> Tensor:
    return (vectors @ vectors.T).logsumexp(1).sum()


def gradients(model: SentenceTransformer, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    loss().backward()
    # The vectors do not depend on BERT's own pooler: its gradient is zero, or there is none.
    named = model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None and "pooler" not in name}


def assert_close(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    largest = max(float(gradient.abs().max()) for gradient in right.values())
    for name, gradient in right.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * largest), name


def test_one_graph_serves_passes_of_any_size(student: SentenceTransformer) -> None:
    set_dropout(student, 0.0)
    form = input_form(student, [""])
    fast = compiled(student, form)
    several = [texts_of(9, 5, 5), texts_of(30, 30, 29, 8, 3), texts_of(32), texts_of(7, 7), texts_of(*[6] * 40)]
    assert any(end - first == 1 for texts in several for first, end, _ in texts.forwards)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for texts in several:
            right = gradients(student, lambda texts=texts: loss_of(embed(student, form, texts)))
            assert_close(gradients(student, lambda texts=texts: loss_of(embed(student, fast, texts))), right)
    assert counters["stats"]["unique_graphs"] == 1


def test_replay_draws_the_same_dropout_in_its_two_graphs(student: SentenceTransformer) -> None:
    form, texts = input_form(student, [""]), texts_of(9, 9, 8, 8, 7, 6, 6, 5, 5)

    def replayed(form: InputForm) -> Tensor:
        return replayed_loss(student, form, texts, loss_of, Replay(0.0, False, Passes(64, 4)))[0]

    fast = compiled(student, form)
    right = gradients(student, lambda: loss_of(embed(student, form, texts)))
    assert len(texts.forwards) > 1
    assert_close(gradients(student, lambda: replayed(fast)), right)
    assert counters["stats"]["unique_graphs"] == 2


def test_evaluation_is_not_compiled(student: SentenceTransformer) -> None:
    form = input_form(student, [""])
    student.eval()
    with torch.no_grad():
        fast, slow = (embed(student, form, texts_of(9, 5)) for form in (compiled(student, form), form))
    assert torch.equal(fast, slow)
    assert not counters["stats"]


@pytest.mark.parametrize("options", [{}, {"cached": True, "gradient_checkpointing": True, "eval_steps": 3}], ids=str)
def test_run_has_the_losses_of_one_that_is_not_compiled(
    options: dict[str, Any],
    make_store: Callable[..., GuideStore],
    tiny_student: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = make_store(ROWS, holdout=0.2)
    run = partial(train_small, store=store.path, student=tiny_student, dropout=0.0, tokens_per_forward=24, **options)
    plain = run(out=tmp_path / "plain", attention="padded")
    with caplog.at_level(logging.INFO, "gistfast.training.compilation"):
        fast = run(out=tmp_path / "fast", compile=True)
    assert sum(record.getMessage().startswith("compiled the student's") for record in caplog.records) == 1
    assert counters["stats"]["unique_graphs"] == (2 if "cached" in options else 1)
    for one, other in zip(steps(plain.path), steps(fast.path), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert not same_weights(fast.path, tiny_student)
    assert SentenceTransformer(str(fast.path), device="cpu").encode("oak").shape == (32,)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
def test_missing_compiler_is_said_in_one_line(
    make_store: Callable[..., GuideStore], tiny_student: Path, tmp_path: Path
) -> None:
    inductor = torch._inductor.config
    changes = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with inductor.patch(changes), pytest.raises(ConfigError) as error:
        train_small(store=make_store(ROWS).path, student=tiny_student, out=tmp_path / "out", compile=True)
    message = str(error.value)
    assert message.startswith(
        "--compile: BertModel cannot be compiled here: InvalidCxxCompiler: No working C++ compiler"
    )
    assert "\n" not in message


def test_unpadded_passes_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match="--compile compiles padded passes"):
        build(TrainSettings, {"store": "a", "student": "b", "out": "c", "compile": True, "attention": "unpadded"})
