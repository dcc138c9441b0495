"""The backend that is PyTorch alone: any device, any floating dtype, memory in proportion to the chunk.

Vectors are read where they lie, at the length they have: a chunk of row operands is scaled to length 1, and the columns
of a tile are scaled after the product. Columns of E are scaled once more for the gradients, which are then those on the
vectors as they are, but for what lies along each:

    E'_ij = E_ij / |c_j|        T dX = v/|x| * (E' @ C)        T dC = E'^T @ (v/|x| * X)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from gistfast.kernels.fused import Layout, Rows, Segment, Settings, each_guide, threshold_of, wide_dtype


@dataclass(frozen=True)
class Side:
    """One model's vectors, (B, D), (B, D) and perhaps (M, D), with their lengths and what these are one over."""

    vectors: list[Tensor]
    lengths: list[Tensor]
    inverse: list[Tensor]

    def scores(self, looker: int, seen: int, rows: slice, out: Tensor | None = None) -> Tensor:
        """Cosines of a chunk of one role's vectors with all of another's, (rows, columns)."""
        unit_rows = self.vectors[looker][rows] * self.inverse[looker][rows, None]
        return torch.mm(unit_rows, self.vectors[seen].T, out=out).mul_(self.inverse[seen])

    def own_scores(self, rows: slice) -> Tensor:
        """Cosines of anchors with their positives, (R,)."""
        anchors, positives = (role[rows] for role in self.vectors[:2])
        products: Tensor = torch.linalg.vecdot(anchors, positives)
        return products * self.inverse[0][rows] * self.inverse[1][rows]


@dataclass(frozen=True)
class Prepared:
    """A batch as rows are judged by it.

    Attributes:
        student: The student's vectors, fp32 at least.
        guides: Those of each guide, by what it is called.
        ids: Text ids of the stack.
        own: (R,) own scores.
        threshold: (R,) guide score above which a candidate is dropped, or None.
        totals: T times the gradients on each role's vectors; none where no gradient is wanted.
        unusable: Whether a vector is zero or not finite.
        layout: Which rows meet which columns.
        settings: What shapes the loss.
    """

    student: Side
    guides: dict[str, Side]
    ids: Tensor
    own: Tensor
    threshold: Tensor | None
    totals: list[Tensor]
    unusable: Tensor
    layout: Layout
    settings: Settings

    @property
    def e_dtype(self) -> torch.dtype:
        """The precision of E."""
        return self.own.dtype

    @property
    def lengths(self) -> dict[str, list[Tensor]]:
        """Lengths of the vectors by whose they are."""
        return {whose: side.lengths for whose, side in ({"student": self.student} | self.guides).items()}

    @property
    def segments(self) -> list[Segment]:
        """One a block."""
        vectors, inverse, totals = self.student.vectors, self.student.inverse, self.totals
        segments = []
        for name, block in self.layout.blocks.items() if totals else ():
            row, seen = _roles(name)
            segments.append(
                Segment(block.columns, vectors[row], vectors[seen], totals[row], totals[seen], row_scale=inverse[row])
            )
        return segments


def alignment(device: torch.device) -> int:
    """1: roles may begin anywhere."""
    return 1


def prepare(
    vectors: Sequence[Tensor], guide: Sequence[Tensor], ids: Sequence[Tensor], temperature: Tensor, layout: Layout,
    settings: Settings,
) -> Prepared:  # fmt: skip
    """Lengths, own scores and thresholds, in fp32 at least: this backend gains nothing by half precision."""
    student, own_rows, threshold = _side(vectors), _own_rows(settings), None
    guides = {name: _side(roles) for name, roles in each_guide(guide, settings.guide_widths).items()}
    if guides:
        of_guides = torch.minimum if settings.guide_min else torch.maximum
        own_guide = reduce(of_guides, (side.own_scores(own_rows) for side in guides.values()))
        threshold = threshold_of(own_guide, settings.margin, relative=settings.relative)
    every = torch.cat([length for side in (student, *guides.values()) for length in side.lengths])
    unusable = ~((every > 0) & (every < torch.inf)).all()
    own = student.own_scores(own_rows)
    totals = [role.new_zeros(role.shape) for role in student.vectors] if settings.with_gradients else []
    return Prepared(student, guides, torch.cat(list(ids)), own, threshold, totals, unusable, layout, settings)


def rows(
    prepared: Prepared, first: int, num_rows: int, temperature: Tensor, weights: Tensor | None, e: Tensor | None
) -> Rows:
    """The row terms of a chunk. `ref` is each row's highest score, so that no temperature is too low for exp."""
    settings, layout, own = prepared.settings, prepared.layout, prepared.own[first : first + num_rows]
    scores = own.new_empty((num_rows, layout.e_columns)) if e is None else e
    kept = _fill_with_scores(prepared, first, scores)
    top = scores.amax(1)
    highest = torch.maximum(top, own)
    inverse_t = temperature.reciprocal()
    tiles = scores.sub_(highest[:, None]).mul_(inverse_t).exp_()
    total = tiles.sum(1)
    gap = total.log() + (highest - own) * inverse_t
    weight = torch.sigmoid(gap) if weights is None else torch.sigmoid(gap) * weights
    share = torch.where(total > 0, weight / total, 0.0)
    slope = None
    if settings.learn_temperature:
        # The sum of E s, from s = T log E + highest: E log E is 0 where E is.
        slope = share * (torch.xlogy(tiles, tiles).sum(1) / inverse_t + total * highest) - weight * own
    for name, block in layout.blocks.items() if e is not None else ():
        tiles[:, block.columns].mul_(prepared.student.inverse[_roles(name)[1]])
    return Rows(-torch.nn.functional.logsigmoid(-gap), share, weight, slope, top, kept)


def gradients(prepared: Prepared, weight: Tensor, factor: Tensor) -> list[Tensor]:
    """Gradients on the vectors of each role: the own positives' part, and nothing along a vector."""
    student, totals, rows = prepared.student, prepared.totals, _own_rows(prepared.settings)
    both = (weight * student.inverse[0][rows] * student.inverse[1][rows])[:, None]
    for role, other in ((0, 1), (1, 0)):
        totals[role][rows].addcmul_(both, student.vectors[other][rows], value=-1)
    for total, vectors, inverse in zip(totals, student.vectors, student.inverse, strict=True):
        along = torch.linalg.vecdot(total, vectors) * inverse.square()
        total.addcmul_(along[:, None], vectors, value=-1).mul_(factor)
    return totals


def _fill_with_scores(prepared: Prepared, first: int, e: Tensor) -> Tensor:
    """Write the scores of a chunk of rows into `e`, -inf where dropped; returns the candidates kept in each block."""
    settings, layout, ids = prepared.settings, prepared.layout, prepared.ids
    rows = slice(settings.row_offset + first, settings.row_offset + first + len(e))
    anchors, positives = layout.roles[:2]
    anchor_id, positive_id = ids[anchors][rows, None], ids[positives][rows, None]
    kept = []
    for name, block in layout.blocks.items():
        looker, seen = _roles(name)
        candidate_ids = ids[layout.roles[seen]]
        dropped = (candidate_ids == anchor_id).logical_or_(candidate_ids == positive_id)
        if prepared.threshold is not None:
            threshold = prepared.threshold[first : first + len(e), None]
            above = (guide.scores(looker, seen, rows) > threshold for guide in prepared.guides.values())
            # The highest score is above when any is, the lowest when all are.
            dropped.logical_or_(reduce(torch.logical_and if settings.guide_min else torch.logical_or, above))
        scores = e[:, block.columns]
        prepared.student.scores(looker, seen, rows, out=scores)
        if settings.hard_only:
            dropped.logical_or_(scores < prepared.own[first : first + len(e), None])
        scores.masked_fill_(dropped, -torch.inf)
        kept.append(dropped.numel() - dropped.count_nonzero())
    return torch.stack(kept)


def _side(vectors: Sequence[Tensor]) -> Side:
    """A model's vectors in fp32 at least, not copied where they are that."""
    wide = [role.to(wide_dtype(vectors)) for role in vectors]
    lengths = [torch.linalg.vector_norm(role, dim=1) for role in wide]
    return Side(wide, lengths, [length.reciprocal() for length in lengths])


def _roles(block: str) -> tuple[int, int]:
    """Who looks and who is seen in the block of that name, by their places among the roles."""
    looker, seen = ("apn".index(letter) for letter in block)
    return looker, seen


def _own_rows(settings: Settings) -> slice:
    """The anchors and positives whose loss is taken."""
    return slice(settings.row_offset, settings.row_offset + settings.num_rows)
