"""What a backend that takes its gradient in the forward pass must hold: here `chunked`, and under Triton's interpreter
(TRITON_INTERPRET=1, set by test_triton_interpreter.py) the fused kernel.

Guide vectors of most batches have products that are exact in any precision, so that ties at the threshold are ties, and
every precision drops the same candidates.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import starmap
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    BACKEND,
    INTERPRETED,
    Batch,
    Outcome,
    assert_no_worse_than_eager,
    clear_batch,
    errors,
    every_dtype,
    make_batch,
    outcome,
    rows_mib,
    truth,
    with_guides,
    with_ids,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gistfast.kernels import bench
from gistfast.losses.functional import guided_contrastive_loss


def assert_same(first: Outcome, second: Outcome) -> None:
    """Bit for bit."""
    assert torch.equal(first.loss, second.loss)
    assert all(starmap(torch.equal, zip(first.gradients, second.gradients, strict=True)))
    assert all(torch.equal(first.stats.dropped[block], second.stats.dropped[block]) for block in first.stats.dropped)
    assert torch.equal(first.stats.hardest_score, second.stats.hardest_score)


@every_dtype
@pytest.mark.parametrize(
    ("num_anchors", "num_negatives", "width", "guide_width"),
    [(1, 0, 24, 16), (2, 1, 8, 16), (13, 5, 100, 64), (5, 129, 7, 16), (129, 37, 65, 16), (29, 11, 1024, 768)],
    ids=["one row", "two rows", "primes", "one negative past a tile", "one row past a tile", "wide"],
)
def test_error_is_no_larger_than_eagers(
    dtype: torch.dtype, num_anchors: int, num_negatives: int, width: int, guide_width: int
) -> None:  # fmt: skip
    batch = make_batch(num_anchors, num_negatives, width, guide_width)
    assert_no_worse_than_eager(batch.to(dtype), temperature=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.01},
        {"temperature": torch.tensor(0.03)},
        {"contrast_anchors": False},
        {"contrast_positives": False},
        {"contrast_anchors": False, "contrast_positives": False, "margin": 0.1},
        {"margin": -0.25},
        {"margin": 0.25, "margin_strategy": "relative"},
        {"row_offset": 3, "num_rows": 7, "temperature": torch.tensor(0.03)},
        {"row_weights": torch.linspace(-2.0, 3.0, 29), "temperature": torch.tensor(0.03)},
        {"row_weights": torch.zeros(29)},
    ],
    ids=[
        "temperature", "learned temperature", "no anchors", "no positives", "ap and an alone", "negative margin",
        "relative margin", "slice of rows", "weighted rows", "rows of no weight",
    ],
)  # fmt: skip
def test_every_option_means_what_the_reference_says(options: dict[str, Any]) -> None:
    batch = make_batch(29, 11).to(torch.float32)
    found = assert_no_worse_than_eager(batch, **{"temperature": 0.05, **options})
    dropped = truth(batch, **options).stats.dropped
    assert list(found.stats.dropped) == list(dropped)
    assert all(float(found.stats.dropped[block]) == pytest.approx(float(dropped[block])) for block in dropped)


@every_dtype
def test_ties_with_the_threshold_and_with_the_own_score_are_kept(dtype: torch.dtype) -> None:
    batch = make_batch(29, 11, 16, exact=True).to(dtype)
    for options in ({"margin": 0.0}, {"margin": 0.125}, {"margin": 0.0, "hard_only": True}):
        found, right = outcome(batch, temperature=0.05, **options), truth(batch, temperature=0.05, **options)
        for block, share in right.stats.dropped.items():
            assert float(found.stats.dropped[block]) == pytest.approx(float(share), abs=1e-7)
        assert torch.allclose(found.loss.double(), right.loss, rtol=1e-6)
        # Where nothing is kept, it is far below any score.
        assert torch.equal(found.stats.hardest_score.double().clamp_min(-2), right.stats.hardest_score.clamp_min(-2))


def test_hard_only_drops_what_the_student_already_scores_below_the_own_positive() -> None:
    batch = make_batch(29, 11, 16, exact=True).to(torch.float32)
    assert_no_worse_than_eager(batch, temperature=0.05, hard_only=True)


def test_without_a_guide_only_the_same_text_is_dropped() -> None:
    batch = replace(make_batch(29, 11), guide=[]).to(torch.float32)
    stats = assert_no_worse_than_eager(batch, temperature=0.05).stats
    assert all(float(share) == 0 for share in stats.dropped.values())


def test_empty_matrix_of_negatives_is_none() -> None:
    batch = make_batch(7, 3).to(torch.float32)
    pairs = Batch(batch.student[:2], batch.guide[:2])
    empty = Batch([*pairs.student, batch.student[2][:0]], [*pairs.guide, batch.guide[2][:0]])
    anchor, positive = (role.clone().requires_grad_() for role in pairs.student)
    loss = guided_contrastive_loss(**{**empty.arguments(), "anchor": anchor, "positive": positive}, backend=BACKEND)
    loss.backward()
    without = outcome(pairs)
    assert torch.equal(loss, without.loss)
    assert all(map(torch.equal, (anchor.grad, positive.grad), without.gradients))


@pytest.mark.parametrize("guide_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_guide_of_any_precision_and_length_is_read(guide_dtype: torch.dtype) -> None:
    batch = clear_batch(0.01, 7, 3, 12, 64)
    # Powers of two, so that products stay what they were.
    lengths = [2.0 ** (torch.arange(len(role)) % 7 - 3)[:, None] for role in batch.guide]
    guide = [(role * length).to(guide_dtype) for role, length in zip(batch.guide, lengths, strict=True)]
    assert_no_worse_than_eager(replace(batch, guide=guide).to(torch.float32), temperature=0.05)


@pytest.mark.parametrize("guide_score", ["min", "max"])
@pytest.mark.parametrize(
    ("dtype", "num_anchors", "num_negatives", "guide_widths"),
    [
        (torch.float32, 1, 0, (16, 4)),
        (torch.float16, 13, 5, (16, 70, 4)),
        (torch.bfloat16, 29, 11, (16, 16)),
        (torch.float32, 129, 37, (70, 16)),
    ],
    ids=["one row", "three guides, one past a tile's depth", "two of a width", "one row past a tile"],
)
def test_lowest_and_highest_score_of_several_guides(
    guide_score: str, dtype: torch.dtype, num_anchors: int, num_negatives: int, guide_widths: tuple[int, ...]
) -> None:
    batch = with_guides(make_batch(num_anchors, num_negatives), *guide_widths).to(dtype)
    options: dict[str, Any] = {"guide_widths": guide_widths, "temperature": 0.05}
    found = assert_no_worse_than_eager(batch, guide_score=guide_score, **options)
    right = truth(batch, guide_score=guide_score, **options).stats.dropped
    assert all(float(found.stats.dropped[block]) == pytest.approx(float(right[block])) for block in right)
    if num_anchors > 1:
        other = truth(batch, guide_score={"min": "max", "max": "min"}[guide_score], **options).stats.dropped
        assert any(float(other[block]) != pytest.approx(float(right[block])) for block in right)


@pytest.mark.parametrize("guide_score", ["min", "max"])
def test_several_guides_in_full_precision_with_options(guide_score: str) -> None:
    batch = with_ids(with_guides(make_batch(29, 11), 16, 70)).to(torch.float32)
    batch = replace(batch, guide=[role.float() for role in batch.guide])
    options: dict[str, Any] = {"margin": 0.125, "margin_strategy": "relative", "row_offset": 3, "num_rows": 9}
    assert_no_worse_than_eager(
        batch, guide_widths=(16, 70), guide_score=guide_score, temperature=torch.tensor(0.05), **options
    )


@pytest.mark.parametrize("guide_score", ["mean", "min", "max"])
def test_guides_of_one_mind_are_one_guide(guide_score: str) -> None:
    batch = make_batch(29, 11).to(torch.float32)
    # Four, so that the length of all together is a power of two, and ties stay ties.
    four = replace(batch, guide=[torch.cat([role] * 4, 1) for role in batch.guide])
    assert_same(outcome(batch), outcome(four, guide_widths=(16,) * 4, guide_score=guide_score))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_same_text_is_never_a_negative(dtype: torch.dtype) -> None:
    batch = with_ids(make_batch(29, 11), dtype=dtype).to(torch.float32)
    found = assert_no_worse_than_eager(batch, temperature=0.05, margin=-2.5)
    right = truth(batch, temperature=0.05, margin=-2.5).stats.dropped
    assert all(float(share) > 0 for share in found.stats.dropped.values())
    assert all(float(found.stats.dropped[block]) == pytest.approx(float(right[block])) for block in right)


def test_columns_of_one_stack_are_read_in_place() -> None:
    batch = make_batch(9, 9).to(torch.float32)
    views = Batch(*(list(torch.stack(roles, 1).unbind(1)) for roles in (batch.student, batch.guide)))
    assert_same(outcome(batch), outcome(views))


@pytest.mark.parametrize(
    ("num_anchors", "num_negatives", "rows"),
    [(37, 5, 9), (37, 5, 36), (7, 0, 1), (150, 0, 149)],
    ids=["last chunk short", "last chunk of one row", "a row a chunk", "chunk of whole tiles"],
)
def test_chunks_change_nothing_but_rounding(num_anchors: int, num_negatives: int, rows: int) -> None:
    batch = make_batch(num_anchors, num_negatives, 20).to(torch.float32)
    options = {"temperature": torch.tensor(0.05), "chunk_mib": rows_mib(rows, num_anchors, num_negatives)}
    whole, chunks = outcome(batch, temperature=torch.tensor(0.05)), assert_no_worse_than_eager(batch, **options)
    assert torch.allclose(whole.stats.hardest_score, chunks.stats.hardest_score, atol=1e-6)
    assert whole.stats.dropped == chunks.stats.dropped


def test_slice_of_rows_in_chunks() -> None:
    options = {"row_offset": 11, "num_rows": 23, "chunk_mib": rows_mib(5, 37, 5)}
    batch = with_ids(make_batch(37, 5)).to(torch.float32)
    assert_no_worse_than_eager(batch, temperature=0.05, **options)


@every_dtype
def test_two_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    batch = make_batch(130, 5).to(dtype)
    options: dict[str, Any] = {"temperature": torch.tensor(0.01), "chunk_mib": rows_mib(100, 130, 5)}
    assert_same(outcome(batch, **options), outcome(batch, **options))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that comes from torch.empty and its kin is NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"temperature": torch.tensor(0.005)}),
        (torch.float16, {"temperature": 0.05, "contrast_anchors": False}),
        (torch.bfloat16, {"temperature": 0.05, "row_offset": 5, "num_rows": 9}),
    ],
    ids=["two passes", "no anchors", "slice"],
)
def test_every_element_that_is_read_was_written(
    dtype: torch.dtype, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    batch = make_batch(29, 11, 20, 64).to(dtype)
    clean = outcome(batch, **options)
    request.getfixturevalue("poisoned_memory")
    poisoned = outcome(batch, **options)
    assert bool(torch.isfinite(poisoned.loss))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in poisoned.gradients)
    assert_same(clean, poisoned)


def test_autocast_takes_scores_in_half_precision_at_most() -> None:
    batch = make_batch(29, 11).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(batch, temperature=0.05)
    assert found.loss.dtype == torch.float32
    assert max(errors(found, truth(batch, temperature=0.05))) < 1e-2


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.004, 0.01, 0.05, 0.3, 1.0, torch.tensor(0.05)]),
        "margin": st.sampled_from([-0.5, -0.125, 0.0, 0.01, 0.125, 0.5]),
        "margin_strategy": st.sampled_from(["absolute", "relative"]),
        "contrast_anchors": st.booleans(),
        "contrast_positives": st.booleans(),
        "hard_only": st.booleans(),
        "row_offset": st.integers(0, 3),
        "num_rows": st.integers(1, 3) | st.none(),
        "chunk_mib": st.sampled_from([None, 0.001, 0.02]),
    }
)


@settings(max_examples=12 if INTERPRETED else 60, deadline=None, derandomize=True, database=None)
@given(
    num_anchors=st.integers(6, 11),
    num_negatives=st.integers(0, 9),
    guided=st.booleans(),
    identified=st.booleans(),
    seed=st.integers(0, 99),
    options=OPTIONS,
)
def test_random_options(
    num_anchors: int, num_negatives: int, guided: bool, identified: bool, seed: int, options: dict[str, Any]
) -> None:
    batch = make_batch(num_anchors, num_negatives, 16, seed=seed, exact=True)
    batch = with_ids(batch, seed) if identified else batch
    batch = batch if guided else replace(batch, guide=[])
    assert_no_worse_than_eager(batch.to(torch.float32), **options)


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.skipif(INTERPRETED, reason="large batches take minutes under the interpreter")
def test_no_tensor_grows_with_the_square_of_the_batch() -> None:
    largest = []
    for num_anchors in (512, 2048):
        batch = make_batch(num_anchors, 0, 16).to(torch.float32)
        with LargestTensor() as noted:
            outcome(batch, chunk_mib=1.0)
        largest.append(noted.largest)
    # 512 anchors meet 1,536 candidates: 3 MiB as a whole; 2,048 meet 6,144: 48 MiB.
    assert max(largest) <= 2**20


@pytest.mark.skipif(INTERPRETED, reason="large batches take minutes under the interpreter")
def test_memory_is_less_than_a_tenth_of_plain_products() -> None:
    anchor, positive, *guide = bench.vectors(2048, 384, 384, torch.device("cpu"), torch.float32)
    student = [anchor.requires_grad_(), positive.requires_grad_()]
    ours, plain = (bench.loss_function(name) for name in ("chunked", "eager"))
    ours_mib, plain_mib = (
        bench.peak_memory_mib(lambda loss=loss: loss(*student, *guide).backward(), torch.device("cpu"))
        for loss in (ours, plain)
    )
    # Of which 6 MiB are the gradients.
    assert ours_mib < plain_mib / 10
