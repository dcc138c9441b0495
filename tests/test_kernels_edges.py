"""Rows at the edge of what numbers hold: as test_kernels.py, for vectors that nobody hopes for."""

from dataclasses import replace

import pytest
import torch
from loss_cases import (
    BACKEND,
    Batch,
    assert_no_worse_than_eager,
    errors,
    every_dtype,
    make_batch,
    outcome,
    signs,
    truth,
)
from torch import Tensor

from gistfast.errors import VectorError
from gistfast.losses.functional import guided_contrastive_loss


@pytest.mark.parametrize("temperature", [0.001, torch.tensor(0.001), 0.012], ids=["0.001", "learned", "0.012"])
def test_low_temperature_loses_no_row(temperature: float | Tensor) -> None:
    batch = make_batch(29, 11, 16, exact=True)
    # Of half of the rows, all scores are low.
    turned = batch.student[0] * torch.where(torch.arange(29) < 14, -1.0, 1.0)[:, None]
    batch = replace(batch, student=[turned, *batch.student[1:]])
    found = assert_no_worse_than_eager(batch.to(torch.float32), temperature=temperature)
    assert bool(torch.isfinite(found.loss))


@every_dtype
def test_rows_far_below_the_highest_score_are_not_lost(dtype: torch.dtype) -> None:
    # Own score 1 (so the reference of exp is 1), all candidates at -1 but for one row.
    anchor = signs(1, 16, torch.Generator().manual_seed(0)).double()
    batch = Batch([torch.cat([anchor, -anchor]), torch.cat([anchor, -anchor]), -anchor])
    for temperature in (0.05, 0.02, 0.01):
        found, right = outcome(batch.to(dtype), temperature=temperature), truth(batch, temperature=temperature)
        # Anchor 1 has the negative at its own score, anchor 0 only candidates at -1.
        assert float(found.loss) == pytest.approx(float(right.loss), rel=1e-5)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in found.gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_peaked_rows_keep_loss_and_gradient(dtype: torch.dtype) -> None:
    first = signs(1, 16, torch.Generator().manual_seed(0)).double()
    second = first.clone()
    second[:, :4] *= -1
    # Own scores 1, all others 0.5, so far away that a loss is 3e-12.
    batch = Batch([torch.cat([first, second])] * 2).to(dtype)
    found, right = outcome(batch, temperature=0.5 / 27.6), truth(batch, temperature=0.5 / 27.6)
    assert float(right.loss) == pytest.approx(3.1e-12, rel=0.1)
    assert float(found.loss) == pytest.approx(float(right.loss), rel=1e-5)
    assert errors(found, right)[1] < (1e-5 if dtype == torch.float32 else 2e-2)


@every_dtype
def test_bad_positive_beside_unmasked_near_duplicates(dtype: torch.dtype) -> None:
    batch = make_batch(13, 130, 16, exact=True)
    anchor, positive, negative = (role.clone() for role in batch.student)
    positive[4], negative[:] = -anchor[4], anchor[4]
    # The guide finds the negatives unlike anchor 4, and the positive as well.
    guide = [role.clone() for role in batch.guide]
    guide[1][4], guide[2][:] = -guide[0][4], -guide[0][4]
    batch = replace(batch, student=[anchor, positive, negative], guide=guide).to(dtype)
    found = assert_no_worse_than_eager(batch, temperature=0.01)
    # log(130) + 2 / 0.01 in one of 13 rows.
    assert float(found.loss) > 204 / 13


def test_temperature_of_a_row_with_thousands_of_near_duplicates_has_a_gradient() -> None:
    batch = make_batch(2, 9000, 16, exact=True)
    anchor, positive, negative = (role.clone() for role in batch.student)
    # Own score -1, so that each of the negatives counts exp(70).
    positive[1], negative[:] = -anchor[1], anchor[1]
    batch = replace(batch, student=[anchor, positive, negative], guide=[]).to(torch.float32)
    temperature = torch.tensor(0.015)
    found, right = (loss(batch, temperature=temperature) for loss in (outcome, truth))
    assert float(found.gradients[-1]) == pytest.approx(float(right.gradients[-1]), rel=1e-5)


@every_dtype
def test_student_that_is_the_guide(dtype: torch.dtype) -> None:
    batch = make_batch(29, 11, 64, exact=True)
    batch = replace(batch, guide=[role.half() for role in batch.student]).to(dtype)
    found = assert_no_worse_than_eager(batch, temperature=0.02)
    # No candidate kept scores higher than the own positive.
    own = (batch.student[0].float() * batch.student[1].float()).sum(1)
    assert bool((found.stats.hardest_score <= own).all())


@every_dtype
def test_rows_with_everything_dropped_have_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    batch = make_batch(5, 3).to(dtype)
    found = outcome(batch, temperature=torch.tensor(0.05), margin=3.0)
    assert float(found.loss) == 0
    assert all(bool((gradient == 0).all()) for gradient in found.gradients)
    assert all(float(share) == 1 for share in found.stats.dropped.values())


def test_one_row_with_everything_dropped_leaves_the_others_alone() -> None:
    batch = make_batch(6, 4).to(torch.float32)
    guide = [role.clone() for role in batch.guide]
    # Whatever row 2 meets has its anchor's text but for its own positive.
    guide[1][2] = -guide[0][2]
    found = assert_no_worse_than_eager(replace(batch, guide=guide), temperature=0.05, margin=1e-3, reduction="mean")
    losses = guided_contrastive_loss(
        **replace(batch, guide=guide).arguments(), backend=BACKEND, temperature=0.05, margin=1e-3, reduction="none"
    )
    assert float(losses[2]) == 0
    assert float(losses.mean()) == pytest.approx(float(found.loss), rel=1e-6)
    assert float(losses.sum()) > 0


# NumPy, which the interpreter computes with, warns where a card is silent.
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_unusable_vector_of_one_of_several_guides_is_named(value: float) -> None:
    batch = make_batch(5, 3).to(torch.float32)
    batch.guide[2][1, 10:] = value
    found = "zero" if value == 0 else "not finite"
    with pytest.raises(VectorError, match=f"the guide 2 vector of negative 1 is {found}"):
        outcome(batch, guide_widths=(10, 6), guide_score="min")


# NumPy, which the interpreter computes with, warns where a card is silent.
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("whose", ["student", "guide"])
def test_unusable_vector_is_named(whose: str, value: float) -> None:
    batch = make_batch(5, 3).to(torch.float32)
    roles = [role.clone() for role in getattr(batch, whose)]
    roles[2][1] = value
    found = "zero" if value == 0 else "not finite"
    with pytest.raises(VectorError, match=f"the {whose} vector of negative 1 is {found}"):
        outcome(replace(batch, **{whose: roles}))
