"""Batches for the tests of the loss, and what a backend makes of them.

Shapes: B anchors, M negatives, D student width, G guide width.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from gistfast.kernels import fused
from gistfast.kernels.reference import guided_contrastive_reference
from gistfast.losses.functional import LossStats, guided_contrastive_loss

# Under Triton's interpreter the tests of the kernels are tests of the fused one.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "chunked"

# Relative to the largest gradient (or loss), on top of what eager code of the same dtype is off. Half vectors make
# tiles in bfloat16, which the interpreter cuts off where cards round: that alone is 2**-7.
EPSILON = {torch.float32: 5e-7, torch.float16: 1e-2 if INTERPRETED else 1e-3, torch.bfloat16: 1e-2}

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)


@dataclass(frozen=True)
class Batch:
    """Vectors and text ids of anchors, positives and perhaps negatives; no guide or no ids where these are empty."""

    student: list[Tensor]
    guide: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)

    def to(self, *what: Any) -> "Batch":
        """The batch with the student's vectors in another dtype or on another device."""
        return replace(self, student=[role.to(*what) for role in self.student])

    def on(self, device: str) -> "Batch":
        """The batch on another device."""
        return Batch(*([role.to(device) for role in roles] for roles in (self.student, self.guide, self.ids)))

    def arguments(self) -> dict[str, Any]:
        """The tensors by the names that `guided_contrastive_loss` gives them."""
        names = ("anchor", "positive", "negative")
        arguments: dict[str, Any] = {"guide_anchor": None, "guide_positive": None}
        for form, roles in (("{}", self.student), ("guide_{}", self.guide), ("{}_ids", self.ids)):
            arguments |= {form.format(name): role for name, role in zip(names, roles, strict=False)}
        return arguments


@dataclass(frozen=True)
class Outcome:
    """Loss, gradients on anchors, positives, negatives and a learned temperature, and the stats."""

    loss: Tensor
    gradients: list[Tensor]
    stats: LossStats


def signs(num_vectors: int, width: int, generator: torch.Generator) -> Tensor:
    """Vectors of length 1 whose products are exact in any precision: all components are one power of two, or zero."""
    # A power of four, so that its root is one of two.
    filled = 4 ** ((width.bit_length() - 1) // 2)
    vectors: Tensor = (torch.randint(0, 2, (num_vectors, width), generator=generator) * 2.0 - 1.0) / filled**0.5
    vectors[:, filled:] = 0
    return vectors


def make_batch(
    num_anchors: int,
    num_negatives: int = 0,
    width: int = 24,
    guide_width: int = 16,
    seed: int = 0,
    *,
    exact: bool = False,
) -> Batch:
    """Student vectors of many lengths, and guide vectors with false negatives, and ties at the threshold, among them.

    Anchors lie around a few centres and positives around their anchors, as seen by both. With `exact` the student's
    products are exact too.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [num_anchors, num_anchors, *([num_negatives] if num_negatives else [])]
    num_topics = 1 + num_anchors // 12
    topics = [torch.randint(0, num_topics, (size,), generator=generator) for size in sizes]
    topics[1] = topics[0]

    def flipped(centres: Tensor, share: float) -> Tensor:
        return torch.where(torch.rand(centres.shape, generator=generator) < share, -centres, centres)

    def sign_roles(columns: int) -> list[Tensor]:
        centres = signs(num_topics, columns, generator)
        anchors, *others = (flipped(centres[topic], 0.15) for topic in topics)
        return [anchors, flipped(anchors, 0.3), *others[1:]]

    student = sign_roles(width) if exact else _normal_roles(width, topics, generator)
    return Batch([role.double() for role in student], [role.half() for role in sign_roles(guide_width)])


def _normal_roles(width: int, topics: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Vectors around centres, of lengths from 0.1 to 10; positives are little nearer than others of the topic."""
    centres = torch.randn(int(torch.cat(list(topics)).max()) + 1, width, generator=generator)
    anchors = centres[topics[0]] + torch.randn(len(topics[0]), width, generator=generator)
    around = [anchors, 0.5 * (anchors + centres[topics[1]]), *(centres[topic] for topic in topics[2:])]
    roles = [anchors, *(role + torch.randn(role.shape, generator=generator) for role in around[1:])]
    return [role * 10 ** (2 * torch.rand(len(role), 1, generator=generator) - 1) for role in roles]


def with_guides(batch: Batch, *widths: int) -> Batch:
    """The batch with several guides that are not of one mind, of lengths 1, 2, 4 and so on, side by side."""
    num_anchors, num_negatives = len(batch.student[0]), sum(map(len, batch.student[2:]))
    guides = [
        [2.0**number * role for role in make_batch(num_anchors, num_negatives, 8, width, seed=number).guide]
        for number, width in enumerate(widths)
    ]
    return replace(batch, guide=[torch.cat(roles, 1) for roles in zip(*guides, strict=True)])


def with_ids(batch: Batch, seed: int = 0, dtype: torch.dtype = torch.int64) -> Batch:
    """The batch with few distinct texts: same id, same vectors, within a role and across roles."""
    sizes = [len(role) for role in batch.student]
    every = sum(sizes)
    ids = torch.randint(0, 1 + every // 2, (every,), generator=torch.Generator().manual_seed(seed))
    student, guide = (
        list(torch.cat(roles)[ids].split(sizes)) if roles else [] for roles in (batch.student, batch.guide)
    )
    # Ids that differ above bit 31 alone must differ.
    stretched = ids << 33 if dtype == torch.int64 else ids.to(dtype)
    return Batch(student, guide, list(stretched.split(sizes)))


def clear_batch(gap: float, *sizes: int) -> Batch:
    """A batch with guide vectors drawn at random, none of whose scores lies within `gap` of its row's threshold."""
    for seed in count():
        batch = make_batch(*sizes, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        noise = 0.3 / batch.guide[0].shape[1] ** 0.5
        guide = [role + noise * torch.randn(role.shape, generator=generator) for role in batch.guide]
        anchors, positives, *negatives = (torch.nn.functional.normalize(role.half().double()) for role in guide)
        own = (anchors * positives).sum(1, keepdim=True)
        off = [rows @ columns.T - own for rows, columns in [(anchors, anchors), (positives, positives)]]
        off += [anchors @ columns.T - own for columns in negatives]
        off.append((anchors @ positives.T - own).fill_diagonal_(1.0))
        if torch.cat(off, 1).abs().min() > gap:
            return replace(batch, guide=[role.half() for role in guide])
    raise AssertionError("unreachable")


def rows_mib(rows: int, num_anchors: int, num_negatives: int) -> float:
    """The budget that holds so many rows of fp32 score tiles."""
    layout = fused.Layout(num_anchors, num_negatives, True, True, 128 if BACKEND == "triton" else 1)
    return rows * layout.e_columns * 4 / 2**20


def outcome(batch: Batch, backend: str = BACKEND, *, row_weights: Tensor | None = None, **options: Any) -> Outcome:
    """Loss and gradients of `backend`: of the mean, or of the sum weighted by `row_weights`.

    A temperature given as a tensor is learned.
    """
    student = [role.detach().clone().requires_grad_() for role in batch.student]
    learned = options.get("temperature")
    if isinstance(learned, Tensor):
        options["temperature"] = learned = learned.detach().clone().requires_grad_()
    if row_weights is not None:
        options["reduction"] = "none"
    loss, stats = guided_contrastive_loss(
        **replace(batch, student=student).arguments(), backend=backend, return_stats=True, **options
    )
    (loss if row_weights is None else (loss * row_weights.to(loss)).sum()).backward()
    leaves = [*student, *([learned] if isinstance(learned, Tensor) else [])]
    assert all(leaf.grad is not None and leaf.grad.dtype == leaf.dtype for leaf in leaves)
    return Outcome(loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None], stats)


def truth(batch: Batch, **options: Any) -> Outcome:
    """What the reference says in float64 of the very same numbers."""
    exact = Batch([role.double() for role in batch.student], [role.double() for role in batch.guide], batch.ids)
    if isinstance(options.get("temperature"), Tensor):
        options["temperature"] = options["temperature"].double()
    return outcome(exact, "reference", **options)


def errors(found: Outcome, right: Outcome) -> list[float]:
    """The largest errors of loss, vectors' gradients and the temperature's, each relative to the largest entry."""
    num_roles = sum(gradient.ndim > 0 for gradient in right.gradients)
    pairs = [
        ([found.loss], [right.loss]),
        (found.gradients[:num_roles], right.gradients[:num_roles]),
        (found.gradients[num_roles:], right.gradients[num_roles:]),
    ]
    return [_largest_error(*pair) for pair in pairs if pair[0]]


def _largest_error(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Over all tensors, relative to the largest entry of `right`; infinite where one is not finite."""
    largest = max(float(tensor.abs().max()) for tensor in right)
    gaps = [(mine.double() - true).abs().nan_to_num(torch.inf) for mine, true in zip(found, right, strict=True)]
    off = max(float(gap.max()) for gap in gaps)
    return off / largest if largest else off


def assert_no_worse_than_eager(
    batch: Batch, backend: str = BACKEND, *, epsilon: float | None = None, **options: Any
) -> Outcome:
    """The backend's outcome, no further from the float64 reference than eager code of the dtype, plus epsilon.

    Rounding is luck: what eager code is off is the most over eight orders in which it may add up products.
    """
    right, found = truth(batch, **options), outcome(batch, backend, **options)
    eager = half_eager if backend == "triton" and batch.student[0].dtype != torch.float32 else _whole_eager
    allowed = [0.0, 0.0, 0.0]
    for seed in range(8):
        theirs = errors(eager(_reordered(batch, seed), **options), _reordered_outcome(right, seed))
        allowed = [max(pair) for pair in zip(allowed, theirs, strict=False)] + allowed[len(theirs) :]
    epsilon = EPSILON[batch.student[0].dtype] if epsilon is None else epsilon
    for what, error, eagers in zip(("loss", "gradient", "temperature"), errors(found, right), allowed, strict=False):
        assert error <= eagers + epsilon, f"{what}: off by {error:.1e}, eager code by {eagers:.1e}"
    return found


def _whole_eager(batch: Batch, **options: Any) -> Outcome:
    return outcome(batch, "reference", **options)


def half_eager(
    batch: Batch,
    *,
    temperature: float = 0.01,
    margin: float = 0.0,
    guide_widths: Sequence[int] = (),
    guide_score: str = "max",
) -> Outcome:
    """What eager code gives whose unit vectors, products and softmax are all in the dtype of the batch."""
    student = [role.detach().clone().requires_grad_() for role in batch.student]
    unit, *guides = (
        torch.cat([torch.nn.functional.normalize(role) for role in roles])
        for roles in (student, *fused.each_guide(batch.guide, guide_widths).values())
    )
    losses, _, _ = guided_contrastive_reference(
        unit, guides, torch.arange(len(unit), device=unit.device), torch.tensor(temperature), len(student[0]),
        ("ap", "aa", "pp", "an")[: 1 + len(student)], row_offset=0, num_rows=len(student[0]), margin=margin,
        relative=False, hard_only=False, guide_min=guide_score == "min",
    )  # fmt: skip
    loss = losses.float().mean()
    loss.backward()
    return Outcome(loss.detach(), [role.grad for role in student if role.grad is not None], LossStats({}, unit, unit))


def _reordered(batch: Batch, seed: int) -> Batch:
    """The batch with the components of its vectors in another order."""
    return replace(batch, student=[role[:, _order(role, seed)] for role in batch.student])


def _reordered_outcome(right: Outcome, seed: int) -> Outcome:
    gradients = [gradient[:, _order(gradient, seed)] if gradient.ndim else gradient for gradient in right.gradients]
    return replace(right, gradients=gradients)


def _order(vectors: Tensor, seed: int) -> Tensor:
    return torch.randperm(vectors.shape[1], generator=torch.Generator().manual_seed(seed)).to(vectors.device)
