"""The guided contrastive loss as a function of vectors.

Shapes: B anchors, M negatives, K = 2B + M, R rows whose loss is taken, D student width, G guide width.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gistfast.errors import ConfigError, VectorError
from gistfast.kernels import operator
from gistfast.kernels.fused import Layout, Settings, each_guide, wide_dtype
from gistfast.kernels.reference import guided_contrastive_reference
from gistfast.losses.inputs import (
    check_options,
    check_rows,
    check_triplet,
    guide_columns,
    id_columns,
    vector_columns,
    widths_of_guides,
)
from gistfast.losses.stats import LossStats, dropped_share, positive_score
from gistfast.losses.triplet import DEFAULT_MARGIN, Triplet, triplet_terms

logger = logging.getLogger(__name__)

MarginStrategy = Literal["absolute", "relative"]
GuideScore = Literal["mean", "min", "max"]
Reduction = Literal["mean", "none"]
Backend = Literal["auto", "reference", "chunked", "triton"]

_announced: set[tuple[str, str]] = set()  # automatic choices already logged


@overload
def guided_contrastive_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    return_stats: Literal[False] = ...,
    **options: Any,
) -> Tensor: ...


@overload
def guided_contrastive_loss(
    anchor: Tensor, positive: Tensor, negative: Tensor | None = None, *, return_stats: Literal[True], **options: Any
) -> tuple[Tensor, LossStats]: ...


# The overloads say what comes back; what goes in is spelled out here alone.
def guided_contrastive_loss(  # type: ignore[misc]
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    guide_anchor: Tensor | None,
    guide_positive: Tensor | None,
    guide_negative: Tensor | None = None,
    guide_widths: Sequence[int] | None = None,
    guide_score: GuideScore = "mean",
    anchor_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    temperature: float | Tensor = 0.01,
    margin: float = 0.0,
    margin_strategy: MarginStrategy = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    hard_only: bool = False,
    triplet: Triplet | None = None,
    triplet_margin: float = DEFAULT_MARGIN,
    row_offset: int = 0,
    num_rows: int | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    chunk_mib: float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """The contrastive loss in nats, blind to candidates that the guide takes for positives.

    With c the cosine of student vectors, g that of guide vectors, T the temperature and t_i = g(a_i, p_i) - margin,
    the loss of row i is

        softplus( log sum_k exp(c_k / T) - c(a_i, p_i) / T ),    k over the candidates that are kept.

    Candidates of row i are the other positives and all negatives, seen from the anchor; the other anchors, seen from
    the anchor (`contrast_anchors`); the other positives, seen from the positive (`contrast_positives`). A candidate
    is dropped when its guide score exceeds t_i, or when it is the same text as the row's anchor or positive. The own
    positive is the target and stays, whatever the margin. A row whose candidates are all dropped has loss 0.

    The vectors of several guides stand side by side in guide_*. With `guide_score` "min" or "max", g is the lowest or
    highest of their cosines, for candidates and threshold alike. With "mean", g is the cosine of the vectors as a
    whole: the weighted mean of the guides' cosines, where each guide's vector has the root of its weight for a length,
    as `GuideStore.gather` gives them.

    Under autocast, scores are taken in half precision like any other matrix product there.

    Args:
        anchor: (B, D) student vectors of any length above 0, any floating dtype.
        positive: (B, D) as `anchor`.
        negative: (M, D) hard negatives, candidates of every anchor.
        guide_anchor: (B, G) guide vectors, any floating dtype; no gradient flows to them. None for no guide:
            candidates are then dropped by identity alone.
        guide_positive: (B, G) as `guide_anchor`.
        guide_negative: (M, G) as `guide_anchor`.
        guide_widths: Widths of the guides whose vectors stand side by side, G in sum; None for one guide.
        guide_score: How the scores of several guides become one: "mean", "min" or "max".
        anchor_ids: (B,) int32 or int64 text ids; equal ids mean the same text. Without ids a text is known to be the
            same as itself alone.
        positive_ids: (B,) as `anchor_ids`.
        negative_ids: (M,) as `anchor_ids`.
        temperature: Divides student scores; above 0. May be a scalar tensor that requires a gradient.
        margin: How far below the positive's guide score a candidate is dropped already; may be negative.
        margin_strategy: "absolute": margin is a distance of cosines. "relative": a share of the positive's score.
        contrast_anchors: Whether anchors are contrasted with each other.
        contrast_positives: Whether positives are contrasted with each other.
        hard_only: Drop candidates that the student scores below the own positive, too.
        triplet: "soft" or "hard" adds a triplet term (`gistfast.losses.triplet`) to each row's loss; None adds none.
        triplet_margin: By how much nearer than its negatives the term wants a row's positives, in cosines.
        row_offset: First row whose loss is taken; the others are candidates alone.
        num_rows: R, how many rows' loss is taken; None for all from `row_offset` on.
        reduction: "mean" over the R rows, or "none".
        backend: "reference" (whole matrices, any precision), "chunked" (PyTorch on any device, memory B x chunk),
            "triton" (fused kernel; CUDA, or CPU tensors under Triton's interpreter), "auto" (triton where it runs).
        chunk_mib: Memory for score tiles in MiB; None chooses by the free memory.
        return_stats: Return (loss, stats).

    Returns:
        A scalar or (R,), fp32 (fp64 for fp64 vectors). Differentiable in student vectors and temperature.

    Raises:
        ShapeError: When shapes, devices or ids do not fit together.
        ConfigError: When an option is out of its range.
        VectorError: When a vector is zero or not finite; names its row.

    Source: GISTEmbed, arXiv:2402.16829.
    """
    num_rows = len(anchor) - row_offset if num_rows is None else num_rows
    check_options(temperature, margin, margin_strategy, reduction, chunk_mib)
    check_triplet(triplet, triplet_margin)
    students = vector_columns("student", [anchor, positive, negative])
    check_rows(row_offset, num_rows, len(anchor))
    guides = guide_columns(students, [guide_anchor, guide_positive, guide_negative])
    widths = widths_of_guides(guides, guide_widths, guide_score)
    ids = id_columns(students, [anchor_ids, positive_ids, negative_ids])
    if negative is not None and len(negative) == 0:  # checked like any, and then no role at all
        students, guides, ids = students[:2], guides[:2], ids[:2]
    chosen = choose_backend(backend, anchor)
    wide = wide_dtype(students)
    if isinstance(temperature, Tensor):
        scalar = temperature.to(anchor.device, wide)
    else:  # made on the device: a copy to it would wait
        scalar = torch.full((), temperature, dtype=wide, device=anchor.device)
    layout = Layout(len(anchor), 0 if negative is None else len(negative), contrast_anchors, contrast_positives)
    relative, mean = margin_strategy == "relative", reduction == "mean"
    chunk_bytes = 0 if chunk_mib is None else int(chunk_mib * 2**20)
    try:
        if chosen == "reference":
            losses, kept, hardest = _reference(
                students, guides, ids, scalar, layout,
                guide_widths=widths, row_offset=row_offset, num_rows=num_rows, margin=margin, relative=relative,
                hard_only=hard_only, guide_min=guide_score == "min",
            )  # fmt: skip
            loss = losses.mean() if mean else losses
        else:
            wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*students, scalar))
            settings = Settings(
                row_offset, num_rows, float(margin), relative, contrast_anchors, contrast_positives, hard_only,
                guide_widths=widths, guide_min=guide_score == "min", half=torch.is_autocast_enabled(anchor.device.type),
                lowest_temperature=0.0 if isinstance(temperature, Tensor) else float(temperature),
                with_gradients=wanted and mean, learn_temperature=scalar.requires_grad,
                mean=mean, chunk_bytes=chunk_bytes, backend=chosen,
            )  # fmt: skip
            loss, kept, hardest = operator.guided_contrastive(students, guides, ids, scalar, settings)
    except operator.UnusableVectorError as error:
        raise VectorError(str(error)) from None
    terms = None
    if triplet is not None:
        terms = triplet_terms(
            students, guides, ids, kind=triplet, triplet_margin=triplet_margin, margin=margin, relative=relative,
            contrast_anchors=contrast_anchors, guide_widths=widths, lowest=guide_score == "min",
            row_offset=row_offset, num_rows=num_rows, chunk_bytes=chunk_bytes,
        )  # fmt: skip
        loss = loss + (terms.mean() if mean else terms)
    if not return_stats:
        return loss
    scores = positive_score(anchor, positive, row_offset, num_rows)
    return loss, LossStats(dropped_share(kept, layout, num_rows), scores, hardest, terms)


def choose_backend(backend: Backend, vectors: Tensor) -> str:
    """The backend that `backend` stands for on the device of `vectors`; a choice made here is logged once.

    Raises:
        ConfigError: When the backend is unknown or cannot run on these vectors.
    """
    if backend == "auto":
        return _automatic_backend(vectors.device, vectors.dtype)
    if backend not in ("reference", "chunked", "triton"):
        raise ConfigError(f"backend is {backend!r}: choose auto, reference, chunked or triton")
    if backend == "triton":
        if vectors.dtype == torch.float64:
            raise ConfigError("backend='triton' was given float64 vectors: use 'chunked' or 'reference' for these")
        if not vectors.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
            raise ConfigError(
                f"backend='triton' was given vectors on {vectors.device}: it needs a CUDA device, or "
                "TRITON_INTERPRET=1 in the environment before Python starts; use 'chunked' here"
            )
    return backend


def _automatic_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Triton on a CUDA device of compute capability 8.0 or above, else chunked."""
    chosen, reason = "chunked", f"{device} is not a CUDA device"
    if dtype == torch.float64:
        reason = "vectors are float64"
    elif device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        reason = f"compute capability {capability[0]}.{capability[1]}; the fused kernel needs 8.0"
        if capability >= (8, 0):
            chosen, reason = "triton", f"compute capability {capability[0]}.{capability[1]}"
    if not torch.compiler.is_compiling() and (chosen, reason) not in _announced:
        _announced.add((chosen, reason))
        logger.info("guided loss: backend %s (%s)", chosen, reason)
    return chosen


def _reference(
    students: list[Tensor],
    guide: list[Tensor],
    ids: list[Tensor],
    temperature: Tensor,
    layout: Layout,
    *,
    guide_widths: Sequence[int],
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (R,), kept per block and hardest score by the reference; half precision is taken in fp32."""

    def unit(columns: list[Tensor], whose: str) -> Tensor:
        stack = torch.cat([column.to(wide_dtype(columns)) for column in columns])
        lengths = torch.linalg.vector_norm(stack, dim=1, keepdim=True)
        operator.refuse_unusable({whose: list(lengths.detach()[:, 0].split([len(column) for column in columns]))})
        unit_stack: Tensor = stack / lengths
        return unit_stack

    with torch.autocast(students[0].device.type, enabled=False):
        return guided_contrastive_reference(
            unit(students, "student"), [unit(*named[::-1]) for named in each_guide(guide, guide_widths).items()],
            torch.cat(ids), temperature, layout.num_anchors, tuple(layout.blocks), **options,
        )  # fmt: skip
