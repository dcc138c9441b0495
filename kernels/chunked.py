"""The backend that is PyTorch alone: any device, any floating dtype, memory in proportion to the chunk."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gistfast.kernels.fused import Layout, Rows, Settings, wide_dtype


@dataclass(frozen=True)
class Prepared:
    """Unit vectors, ids, own scores (R,) and thresholds (R,) of a batch; `operand` is the student's stack."""

    operand: Tensor
    guide: Tensor | None
    ids: Tensor
    own: Tensor
    threshold: Tensor | None
    lengths: dict[str, list[Tensor]]
    unusable: Tensor
    layout: Layout
    settings: Settings


def alignment(device: torch.device) -> int:
    """1: roles may begin anywhere."""
    return 1


def prepare(
    vectors: Sequence[Tensor], guide: Sequence[Tensor], ids: Sequence[Tensor], temperature: Tensor, layout: Layout,
    settings: Settings,
) -> Prepared:  # fmt: skip
    """Unit vectors, in fp32 at least: this backend gains nothing by half precision."""
    unit, lengths = _unit_stack(vectors)
    own = _own_products(unit, layout, settings)
    unit_guide, threshold = None, None
    guide_lengths: list[Tensor] = []
    if guide:
        unit_guide, guide_lengths = _unit_stack(guide)
        own_guide = _own_products(unit_guide, layout, settings)
        threshold = own_guide - (own_guide.abs() * settings.margin if settings.relative else settings.margin)
    every = torch.cat(lengths + guide_lengths)
    unusable = ~((every > 0) & (every < torch.inf)).all()
    all_lengths = {"student": lengths, "guide": guide_lengths}
    return Prepared(unit, unit_guide, torch.cat(list(ids)), own, threshold, all_lengths, unusable, layout, settings)


def rows(
    prepared: Prepared, first: int, num_rows: int, temperature: Tensor, weights: Tensor | None, e: Tensor | None
) -> Rows:
    """The row terms of a chunk. `ref` is each row's highest score, so that no temperature is too low for exp."""
    if e is None:
        e = prepared.operand.new_empty((num_rows, prepared.layout.e_columns))
    own = prepared.own[first : first + num_rows]
    kept = _fill_with_scores(prepared, first, e)
    top = e.amax(1)
    highest = torch.maximum(top, own)
    inverse_t = temperature.reciprocal()
    e.sub_(highest[:, None]).mul_(inverse_t).exp_()
    total = e.sum(1)
    gap = total.log() + (highest - own) * inverse_t
    weight = torch.sigmoid(gap) if weights is None else torch.sigmoid(gap) * weights
    share = torch.where(total > 0, weight / total, 0.0)
    slope = None
    if prepared.settings.learn_temperature:
        # The sum of E s, from s = T log E + highest: E log E is 0 where E is.
        slope = share * (torch.xlogy(e, e).sum(1) / inverse_t + total * highest) - weight * own
    return Rows(-torch.nn.functional.logsigmoid(-gap), share, weight, slope, top, kept)


def gradients(prepared: Prepared, total: Tensor, weight: Tensor, factor: Tensor) -> list[Tensor]:
    """Gradients on the vectors of each role: what lies along a vector goes, the rest is over its length."""
    unit, layout = prepared.operand, prepared.layout
    anchors, positives = _own_rows(layout, prepared.settings)
    total[anchors].addcmul_(weight[:, None], unit[positives], value=-1)
    total[positives].addcmul_(weight[:, None], unit[anchors], value=-1)
    along = torch.linalg.vecdot(total, unit)[:, None]
    total.addcmul_(along, unit, value=-1).mul_(factor)
    lengths = prepared.lengths["student"]
    return [total[role].div_(length[:, None]) for role, length in zip(layout.roles, lengths, strict=True)]


def _fill_with_scores(prepared: Prepared, first: int, e: Tensor) -> Tensor:
    """Write the scores of a chunk of rows into `e`, -inf where dropped; returns the candidates kept in each block."""
    settings, layout, ids = prepared.settings, prepared.layout, prepared.ids
    start, end = settings.row_offset + first, settings.row_offset + first + len(e)
    anchor_id = ids[start:end, None]
    positive_id = ids[layout.first_positive + start : layout.first_positive + end, None]
    kept = []
    for block in layout.blocks.values():
        rows, columns = slice(block.row_base + start, block.row_base + end), slice(block.first, block.end)
        dropped = (ids[columns] == anchor_id).logical_or_(ids[columns] == positive_id)
        if prepared.guide is not None and prepared.threshold is not None:
            guide_scores = prepared.guide[rows] @ prepared.guide[columns].T
            dropped.logical_or_(guide_scores > prepared.threshold[first : first + len(e), None])
            del guide_scores
        scores = e[:, block.first + block.e_shift : block.end + block.e_shift]
        torch.mm(prepared.operand[rows], prepared.operand[columns].T, out=scores)
        if settings.hard_only:
            dropped.logical_or_(scores < prepared.own[first : first + len(e), None])
        scores.masked_fill_(dropped, -torch.inf)
        kept.append(dropped.numel() - dropped.sum())
    return torch.stack(kept)


def _unit_stack(vectors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The roles' vectors at length 1, stacked, and the lengths they had; fp32 at least."""
    stack = torch.cat([role.to(wide_dtype(vectors)) for role in vectors])
    lengths = torch.linalg.vector_norm(stack, dim=1)
    return stack.div_(lengths[:, None]), list(torch.split(lengths, [len(role) for role in vectors]))


def _own_rows(layout: Layout, settings: Settings) -> tuple[slice, slice]:
    """Where the anchors and the positives whose loss is taken lie in the stack."""
    start, end = settings.row_offset, settings.row_offset + settings.num_rows
    return slice(start, end), slice(layout.first_positive + start, layout.first_positive + end)


def _own_products(unit: Tensor, layout: Layout, settings: Settings) -> Tensor:
    """Each row's product of anchor and positive, (R,)."""
    anchors, positives = _own_rows(layout, settings)
    return (unit[anchors] * unit[positives]).sum(-1)
