"""The fused kernel on a card, beside the float64 reference: `pytest tests/test_gpu.py`, under a minute on an H100."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import (
    Batch,
    assert_no_worse_than_eager,
    clear_batch,
    errors,
    every_dtype,
    make_batch,
    outcome,
    truth,
    with_guides,
    with_ids,
)
from torch import Tensor

from gistfast.errors import VectorError
from gistfast.losses.functional import guided_contrastive_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Tensor cores cut off what they add up: of fp32 vectors, split in fp16 halves, that is what a score is off.
SCORE_ERROR = 3e-6


def on_card(*sizes: int, dtype: torch.dtype = torch.float32, **how: Any) -> Batch:
    """A batch of loss_cases.make_batch on the card."""
    return make_batch(*sizes, **how).on("cuda").to(dtype)


def assert_same(first: Any, second: Any) -> None:
    """Bit for bit."""
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(*pair) for pair in zip(first.gradients, second.gradients, strict=True))


def check(batch: Batch, *, temperature: float | Tensor, **options: Any) -> None:
    """That the fused kernel is no worse than eager code, but for what tensor cores cut off."""
    epsilon = SCORE_ERROR / float(temperature) if batch.student[0].dtype == torch.float32 else None
    assert_no_worse_than_eager(batch, "triton", epsilon=epsilon, temperature=temperature, **options)


@every_dtype
@pytest.mark.parametrize("sizes", [(129, 37, 60, 64), (1021, 517, 384, 384), (2048, 0, 384, 1024)], ids=str)
def test_error_is_no_larger_than_eagers(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    for temperature in (0.05, 0.01):
        check(on_card(*sizes, dtype=dtype), temperature=temperature)


@pytest.mark.parametrize(
    "options",
    [
        {"margin": -0.25},
        {"margin": 0.25, "margin_strategy": "relative"},
        {"contrast_anchors": False, "temperature": torch.tensor(0.03)},
        {"contrast_positives": False, "row_offset": 100, "num_rows": 333},
        {"row_weights": torch.linspace(-2.0, 3.0, 517), "temperature": torch.tensor(0.03)},
    ],
    ids=["negative margin", "relative margin", "no anchors, learned", "slice of rows", "weighted rows"],
)
def test_every_option_means_what_the_reference_says(options: dict[str, Any]) -> None:
    tensors = {name: value.cuda() for name, value in options.items() if isinstance(value, Tensor)}
    check(on_card(517, 100, 64, 64), **{"temperature": 0.05, **options, **tensors})


@every_dtype
def test_hard_only_and_ties(dtype: torch.dtype) -> None:
    batch = on_card(517, 100, 64, 64, dtype=dtype, exact=True)
    for hard_only in (False, True):
        options: dict[str, Any] = {"temperature": 0.05, "hard_only": hard_only}
        found, right = outcome(batch, "triton", **options), truth(batch, **options)
        assert torch.allclose(found.loss.double(), right.loss, rtol=1e-5)
        for block, share in right.stats.dropped.items():
            assert float(found.stats.dropped[block]) == pytest.approx(float(share), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_same_text_is_never_a_negative(dtype: torch.dtype) -> None:
    batch = with_ids(make_batch(517, 100), dtype=dtype).on("cuda").to(torch.float32)
    check(batch, temperature=0.05, margin=-2.5)


@pytest.mark.parametrize("guide_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_guide_of_other_precision_is_read(guide_dtype: torch.dtype) -> None:
    batch = clear_batch(0.01, 7, 3, 12, 64).on("cuda").to(torch.float32)
    assert_no_worse_than_eager(
        replace(batch, guide=[role.to(guide_dtype) for role in batch.guide]), "triton", temperature=0.05
    )


@every_dtype
@pytest.mark.parametrize("guide_score", ["min", "max"])
def test_lowest_and_highest_score_of_several_guides(dtype: torch.dtype, guide_score: str) -> None:
    widths = (16, 70, 256)
    batch = with_guides(make_batch(517, 100, 64), *widths).on("cuda").to(dtype)
    check(batch, temperature=0.05, guide_widths=widths, guide_score=guide_score)


def test_without_a_guide() -> None:
    check(replace(on_card(517, 100), guide=[]), temperature=0.05)


@pytest.mark.parametrize("chunk_mib", [0.05, 0.5])
def test_chunks_change_nothing_but_rounding(chunk_mib: float) -> None:
    check(on_card(517, 100, 64, 64), temperature=0.05, chunk_mib=chunk_mib)


@every_dtype
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_low_temperature_loses_no_row(dtype: torch.dtype, learned: bool) -> None:
    batch = on_card(517, 100, 64, 64, dtype=dtype, exact=True)
    # Of every other row, all scores are low.
    turned = torch.tensor([1.0, -1.0], device="cuda", dtype=dtype).repeat(259)[:517, None]
    batch = replace(batch, student=[batch.student[0] * turned, *batch.student[1:]])
    temperature = torch.tensor(0.001, device="cuda") if learned else 0.001
    found, right = outcome(batch, "triton", temperature=temperature), truth(batch, temperature=temperature)
    assert max(errors(found, right)[:2]) < (1e-5 if dtype == torch.float32 else 1e-2)


@every_dtype
def test_two_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    batch = on_card(2048, 0, 384, 1024, dtype=dtype)
    for options in ({}, {"chunk_mib": 4.0}, {"temperature": torch.tensor(0.005, device="cuda")}):
        assert_same(outcome(batch, "triton", **options), outcome(batch, "triton", **options))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Switches on that memory from torch.empty and its kin is NaN until it is written."""
    # Without it, torch refuses cuBLAS in the mode that fills memory.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield lambda: torch.use_deterministic_algorithms(True)
    torch.use_deterministic_algorithms(False)


@every_dtype
def test_every_element_that_is_read_was_written(dtype: torch.dtype, poison: Any) -> None:
    batch = on_card(517, 100, 60, 64, dtype=dtype)
    options: dict[str, Any] = {"temperature": torch.tensor(0.005, device="cuda")}
    clean = outcome(batch, "triton", **options)
    poison()
    poisoned = outcome(batch, "triton", **options)
    assert all(bool(gradient.isfinite().all()) for gradient in poisoned.gradients)
    assert_same(clean, poisoned)


def test_everything_dropped_gives_no_loss_and_no_gradient() -> None:
    found = outcome(on_card(129, 37), "triton", margin=3.0)
    assert float(found.loss) == 0
    assert all(bool((gradient == 0).all()) for gradient in found.gradients)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_unusable_vector_is_named(value: float) -> None:
    batch = on_card(129, 37)
    batch.student[1][128] = value
    with pytest.raises(VectorError, match="the student vector of positive 128 is"):
        outcome(batch, "triton")


def test_one_row() -> None:
    batch = on_card(1, 3, 24, 16, dtype=torch.float16)
    check(batch, temperature=0.05)


def test_sixteen_thousand_anchors() -> None:
    batch = on_card(16_384, 0, 384, 1024, dtype=torch.float16)
    with torch.no_grad():
        loss = guided_contrastive_loss(**batch.arguments(), backend="triton", temperature=0.02)
        wide = Batch([role.double() for role in batch.student], [role.double() for role in batch.guide])
        right = guided_contrastive_loss(**wide.arguments(), backend="chunked", temperature=0.02)
    assert float(loss) == pytest.approx(float(right), rel=1e-3)


def test_memory_is_that_of_the_vectors_and_one_chunk() -> None:
    batch = on_card(16_384, 0, 384, 1024, dtype=torch.float16)
    student = [role.requires_grad_() for role in batch.student]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    guided_contrastive_loss(**batch.arguments(), backend="triton", chunk_mib=64).backward()
    peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    # E as a whole is 1,536 MiB; the student's vectors in fp32 are 48.
    assert peak_mib < 64 + 10 * 48
    assert all(role.grad is not None for role in student)


# torch 2.11's own compiler still uses torch.jit, which it calls deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_whole_it_gives_the_same() -> None:
    batch = on_card(129, 37, 64, 64, dtype=torch.float16)
    eager = outcome(batch, "auto", temperature=0.05)
    torch.compiler.reset()
    student = [role.clone().requires_grad_() for role in batch.student]
    compiled = torch.compile(guided_contrastive_loss, fullgraph=True)
    loss = compiled(**replace(batch, student=student).arguments(), temperature=0.05, backend="triton")
    loss.backward()
    assert torch.equal(loss, eager.loss)
    assert all(torch.equal(role.grad, right) for role, right in zip(student, eager.gradients, strict=True))


def test_autocast_takes_scores_in_half_precision_at_most() -> None:
    batch = on_card(517, 100, 64, 64)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = outcome(batch, "triton", temperature=0.05)
    assert found.loss.dtype == torch.float32
    assert max(errors(found, truth(batch, temperature=0.05))) < 2e-2


def test_automatic_choice_is_the_fused_kernel() -> None:
    batch = on_card(129)
    assert_same(outcome(batch, "auto"), outcome(batch, "triton"))
