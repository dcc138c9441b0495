"""The triplet term: candidates that the guide takes for positives are to lie nearer to the anchor than the others.

Row i has the candidates that its anchor sees: positives, negatives and, where anchors are contrasted, anchors. Those
that the loss drops, and the own positive, are its positives P_i here, those that it keeps its negatives N_i; a text
that is the anchor itself is neither. With d = 1 - cosine and the triplet margin m the term of row i is

    soft:  relu( m + mean of d over P_i - mean of d over N_i )
    hard:  relu( m + max of d over P_i - min of d over N_i )

and 0 where N_i is empty. What the student scores drops nothing here (`hard_only` is of the softmax).

Rows are taken in chunks, which are computed again for their gradient: memory is in proportion to the chunk.

Shapes: B anchors, M negatives, K candidates, R rows, C rows of a chunk, D student width, G guide width.

Source: the guided triplet terms of the code that belongs to GISTEmbed, arXiv:2402.16829.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gistfast.kernels.fused import each_guide, threshold_of, wide_dtype
from gistfast.losses.stats import unit_vectors

Triplet = Literal["soft", "hard"]

DEFAULT_MARGIN = 0.2
# For the tiles of a chunk, of which there are about so many at a time.
_CHUNK_BYTES, _TILES = 64 << 20, 4


@dataclass(frozen=True)
class Judge:
    """Says which candidates are a row's positives and negatives.

    Attributes:
        looks: Guide vectors of length 1 of the rows' anchors, (R, G), of each guide; none to judge by identity.
        seen: Those of the candidates, (K, G).
        threshold: (R,) guide score above which a candidate is a positive; empty without a guide.
        lowest: Whether the lowest of the guides' scores counts, rather than the highest.
        ids: (K,) text ids of the candidates.
        anchor_ids: (R,) of the rows' anchors.
        positive_ids: (R,) of their positives.
        places: (R,) of the own positives among the candidates.
    """

    looks: list[Tensor]
    seen: list[Tensor]
    threshold: Tensor
    lowest: bool
    ids: Tensor
    anchor_ids: Tensor
    positive_ids: Tensor
    places: Tensor

    def split(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Which candidates are positives and which are negatives of the rows, both (C, K)."""
        positives = self.ids == self.positive_ids[rows, None]
        if self.looks:
            scores = torch.stack([one[rows] @ other.T for one, other in zip(self.looks, self.seen, strict=True)])
            score = scores.amin(0) if self.lowest else scores.amax(0)
            positives |= score > self.threshold[rows, None]
        negatives = ~positives
        itself = self.ids == self.anchor_ids[rows, None]
        # An anchor and its positive may be one text: the positive stays one.
        positives = (positives & ~itself).scatter(1, self.places[rows, None], True)
        return positives, negatives & ~itself


def triplet_terms(
    students: Sequence[Tensor],
    guides: Sequence[Tensor],
    ids: Sequence[Tensor],
    *,
    kind: Triplet,
    triplet_margin: float,
    margin: float,
    relative: bool,
    contrast_anchors: bool,
    guide_widths: Sequence[int],
    lowest: bool,
    row_offset: int,
    num_rows: int,
    chunk_bytes: int = 0,
) -> Tensor:
    """The term of each row, (R,), fp32 at least; differentiable in the student's vectors.

    Args:
        students: Vectors of each role: anchor, positive and perhaps negative; (B, D), (B, D), (M, D).
        guides: Guide vectors of each role, or nothing.
        ids: Text ids of each role.
        kind: "soft" compares means, "hard" the farthest positive with the nearest negative.
        triplet_margin: By how much nearer positives are to lie.
        margin: How far below the positive's guide score a candidate is dropped already.
        relative: Whether that is a share of the positive's guide score rather than a distance.
        contrast_anchors: Whether anchors are candidates.
        guide_widths: Widths of guides that judge one by one.
        lowest: Whether the lowest of their scores counts, rather than the highest.
        row_offset: First row.
        num_rows: R.
        chunk_bytes: Memory for the tiles of a chunk; 0 for 64 MiB.
    """
    rows = slice(row_offset, row_offset + num_rows)

    def candidates(roles: Sequence[Tensor]) -> Tensor:
        return torch.cat([*roles[1:], *([roles[0]] if contrast_anchors else [])])

    with torch.autocast(students[0].device.type, enabled=False):
        unit = [unit_vectors(role, wide_dtype(students)) for role in students]
        looks, seen = unit[0][rows], candidates(unit)
        with torch.no_grad():
            of_each = each_guide(guides, guide_widths).values()
            of_guides = [[unit_vectors(role, wide_dtype(guides)) for role in roles] for roles in of_each]
            judge = Judge(
                looks=[one[0][rows] for one in of_guides],
                seen=[candidates(one) for one in of_guides],
                threshold=_threshold(of_guides, rows, margin, relative, lowest),
                lowest=lowest,
                ids=candidates(ids),
                anchor_ids=ids[0][rows],
                positive_ids=ids[1][rows],
                places=torch.arange(rows.start, rows.stop, device=looks.device),
            )
        row_bytes = _TILES * len(seen) * looks.element_size()
        chunk = max(1, (chunk_bytes or _CHUNK_BYTES) // row_bytes)
        parts = [slice(start, min(start + chunk, num_rows)) for start in range(0, num_rows, chunk)]
        if len(parts) == 1:
            return _terms(looks, seen, judge, parts[0], kind, triplet_margin)
        return torch.cat([_computed_again(looks, seen, judge, part, kind, triplet_margin) for part in parts])


def _computed_again(*arguments: Any) -> Tensor:
    """`_terms`, of which nothing is kept until its gradient is wanted."""
    terms: Tensor = checkpoint(_terms, *arguments, use_reentrant=False, preserve_rng_state=False)
    return terms


def _terms(looks: Tensor, seen: Tensor, judge: Judge, rows: slice, kind: Triplet, margin: float) -> Tensor:
    """The terms of a chunk of rows, (C,)."""
    with torch.no_grad():
        positives, negatives = judge.split(rows)
    if kind == "soft":
        # The difference of the means is one product with the vectors seen, weighted; no score is needed by itself.
        weights = _shares(negatives, seen.dtype) - _shares(positives, seen.dtype)
        gap = torch.linalg.vecdot(looks[rows], weights @ seen)
    else:
        scores = looks[rows] @ seen.T
        nearest = scores.masked_fill(~negatives, -torch.inf).amax(1)
        gap = nearest - scores.masked_fill(~positives, torch.inf).amin(1)
    return functional.relu(gap + margin).where(negatives.any(1), 0)


def _shares(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the number of those chosen in each row, where they are."""
    return chosen.to(dtype) / chosen.sum(1, keepdim=True).clamp_min(1)


def _threshold(of_guides: Sequence[list[Tensor]], rows: slice, margin: float, relative: bool, lowest: bool) -> Tensor:
    """The guide score above which a candidate is dropped, (R,); empty without a guide."""
    if not of_guides:
        return torch.empty(0)
    own = torch.stack([torch.linalg.vecdot(one[0][rows], one[1][rows]) for one in of_guides])
    score = own.amin(0) if lowest else own.amax(0)
    return threshold_of(score, margin, relative=relative)
