"""The Triton backend: `exp_tiles` for what is large, and small kernels for what is done once a row.

Each of the small ones does in one launch what would be a dozen in PyTorch: at a thousand anchors, launches are what a
loss costs. Vectors wider than fp16 are split, x = high + low, both fp16, and laid out as

    rows [high | high | low]     columns [high | low | high]

so that the same fp16 product adds up high high + high low + low high: fp32's precision but for low low, 2^-22 of
a score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from gistfast.kernels.exp_tiles import LENGTH, Sums, device_capability, exp_tiles, tile_shape
from gistfast.kernels.fused import Layout, Rows, Segment, Settings, each_guide

ROWS = 128  # rows a program of the small kernels takes
ALIGN_WIDTH = 64  # a multiple of every BLOCK_K
HIGHEST_EXPONENT = 70.0  # exp(70) times 2**20 candidates stays inside bfloat16 and fp32
LOWEST_EXPONENT = -60.0  # what lies so far below ref is lost to underflow soon after
SAFE_TEMPERATURE = 2.0 / (HIGHEST_EXPONENT + 87.0)  # above this no score in [-1, 1] leaves the range of exp

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Prepared:
    """A batch as the kernels read it.

    Attributes:
        operand: The student's unit vectors in the precision of E, (vectors, width).
        total: T times the gradients on them, fp32; None where none are wanted.
        left: Row operands of the tile products, [guides | student], fp16 of length `LENGTH`.
        right: Column operands; `left` itself where nothing is split.
        guide_places: Columns of both at which each guide's part begins, and the one at which the last ends.
        width: Width of the student's vectors.
        ids: Text ids of the stack.
        terms: (3, R) own scores, thresholds, and refs: what is subtracted from a row's scores before exp.
        lengths: Lengths that vectors had.
        unusable: 1 if one of them is zero or not finite, else 0.
        layout: Which rows meet which columns.
        settings: What shapes the loss.
    """

    operand: Tensor
    total: Tensor | None
    left: Tensor
    right: Tensor
    guide_places: tuple[int, ...]
    width: int
    ids: Tensor
    terms: Tensor
    lengths: dict[str, list[Tensor]]
    unusable: Tensor
    layout: Layout
    settings: Settings

    @property
    def e_dtype(self) -> torch.dtype:
        """The precision of E."""
        return self.operand.dtype

    @property
    def segments(self) -> list[Segment]:
        """The candidates of anchors, blocks ap, aa and an in one run, and those of positives."""
        operand, total, layout = self.operand, self.total, self.layout
        if total is None:
            return []
        first, start = layout.first_candidate, layout.first_positive
        segments = [Segment(slice(0, layout.pp_start), operand, operand[first:], total, total[first:])]
        if layout.contrast_positives:
            rows, on_rows = operand[start : 2 * start], total[start : 2 * start]
            segments.append(Segment(slice(layout.pp_start, None), rows, rows, on_rows, on_rows))
        return segments


def alignment(device: torch.device) -> int:
    """Roles begin on a column tile."""
    return tile_shape(torch.bfloat16, device_capability(device)).block_n


def prepare(
    vectors: Sequence[Tensor], guide: Sequence[Tensor], ids: Sequence[Tensor], temperature: Tensor, layout: Layout,
    settings: Settings,
) -> Prepared:  # fmt: skip
    """Unit vectors of the roles, stacked in fp16 (split where they are wider), own scores and thresholds."""
    split = not settings.half and any(role.dtype not in _HALF for role in vectors)
    guide_split = any(role.dtype not in _HALF for role in guide)
    guides = each_guide(guide, settings.guide_widths)
    width, widths = _padded(vectors[0].shape[1]), [roles[0].shape[1] for roles in guides.values()] or [0]
    new = vectors[0].new_empty
    operand = new((layout.num_vectors, width), dtype=torch.float32 if split else torch.bfloat16)
    parts, guide_parts = 3 if split else 1, 3 if guide_split else 1
    places = (0, *accumulate(max(_padded(one), ALIGN_WIDTH) * guide_parts for one in widths))
    stride = places[-1] + width * parts
    left = new((layout.num_vectors, stride), dtype=torch.float16)
    right = torch.empty_like(left) if split or guide_split else left
    ids = _narrow(ids)
    stacked_ids = ids[0].new_empty(layout.num_vectors)
    lengths: dict[str, list[Tensor]] = {whose: [] for whose in ("student", *guides)}
    block, num_rows = _row_tile(_padded(max(width, *widths)))
    unusable = vectors[0].new_zeros((), dtype=torch.int32)
    ends = [*(role.start for role in layout.roles[1:]), layout.num_vectors]
    for index, (role, end) in enumerate(zip(layout.roles, ends, strict=True)):
        sizes = new((1 + len(widths), role.stop - role.start), dtype=torch.float32)
        guided = guide[index].contiguous() if guide else sizes
        _stack_role[(triton.cdiv(end - role.start, num_rows),)](
            vectors[index].contiguous(), guided, ids[index].contiguous(),
            left, right, operand, stacked_ids, sizes, unusable, role.stop - role.start, end - role.start, role.start,
            vectors[index].shape[1],
            GUIDE_COLUMNS=(0, *accumulate(widths)), GUIDE_PLACES=places, STRIDE=stride, PADDED=width, PARTS=parts,
            GUIDE_PARTS=guide_parts, LENGTH=LENGTH, ROWS=num_rows, BLOCK=block,
        )  # fmt: skip
        for whose, size in zip(lengths, sizes, strict=False):
            lengths[whose].append(size)
    terms = new((3, settings.num_rows), dtype=torch.float32)
    _own_terms[(triton.cdiv(settings.num_rows, 16),)](
        left, right, temperature, terms, settings.row_offset, layout.first_positive, settings.num_rows, settings.margin,
        HIGHEST_EXPONENT,
        GUIDE_PLACES=places, GUIDE_MIN=settings.guide_min, STRIDE=stride, GUIDED=bool(guide),
        RELATIVE=settings.relative, SQUARE=LENGTH**2, ROWS=16,
    )  # fmt: skip
    total = temperature.new_zeros(operand.shape) if settings.with_gradients else None
    return Prepared(
        operand, total, left, right, places, vectors[0].shape[1], stacked_ids, terms, lengths, unusable, layout,
        settings,
    )  # fmt: skip


def rows(
    prepared: Prepared, first: int, num_rows: int, temperature: Tensor, weights: Tensor | None, e: Tensor | None
) -> Rows:
    """The row terms of a chunk.

    At a low temperature all candidates of a row can lie so far below its ref that they underflow; such rows are done
    again with their highest score as ref.
    """
    settings, layout = prepared.settings, prepared.layout
    own, threshold, ref = prepared.terms[:, first : first + num_rows]
    share, weight, slope = own.new_empty((3, num_rows))
    losses, top = torch.empty_like(share), torch.empty_like(share)
    blocks = tuple(layout.blocks.values())
    grid = (triton.cdiv(num_rows, ROWS),)

    def run(lost: Tensor | None, sums: Sums | None) -> Sums:
        return exp_tiles(
            prepared.left, prepared.right, prepared.guide_places, prepared.ids, threshold, ref, own, temperature, e,
            blocks, first_row=settings.row_offset + first, first_positive=layout.first_positive,
            hard_only=settings.hard_only, guide_min=settings.guide_min, lost=lost, sums=sums,
        )  # fmt: skip

    sums = run(None, None)
    pieces = sums.total.shape[0] * sums.total.shape[1]
    if settings.lowest_temperature < SAFE_TEMPERATURE:
        lost = torch.empty_like(ref, dtype=torch.int32)
        _second_ref[grid](own, temperature, sums.top, ref, lost, num_rows, pieces, LOWEST_EXPONENT, BLOCK=ROWS)
        sums = run(lost, sums)
    _row_terms[grid](
        sums.total, sums.weighted, sums.top, own, ref, temperature, own if weights is None else weights,
        losses, share, weight, slope, top, num_rows, pieces, WEIGHTED=weights is not None, BLOCK=ROWS,
    )  # fmt: skip
    return Rows(losses, share, weight, slope if settings.learn_temperature else None, top, sums.kept.sum((1, 2)))


def gradients(prepared: Prepared, weight: Tensor, factor: Tensor) -> list[Tensor]:
    """Gradients on the vectors of each role, fp32: the own positive's part, then through the normalisation."""
    settings, layout, total = prepared.settings, prepared.layout, prepared.total
    assert total is not None
    partners = (layout.first_positive, -layout.first_positive, 0)
    block, num_rows = _row_tile(total.shape[1])
    results = []
    for role, lengths, partner in zip(layout.roles, prepared.lengths["student"], partners, strict=False):
        out = total.new_empty((len(lengths), prepared.width))
        _finish_gradients[(triton.cdiv(len(out), num_rows),)](
            total, prepared.operand, lengths, weight, factor, out, len(out), role.start, partner,
            settings.row_offset, settings.num_rows if partner else 0, prepared.width,
            STRIDE=total.shape[1], ROWS=num_rows, BLOCK=block,
        )  # fmt: skip
        results.append(out)
    return results


def _narrow(ids: Sequence[Tensor]) -> Sequence[Tensor]:
    """The ids as int32, which cost the kernel half the registers: wider ones by their rank among all."""
    if all(role.dtype == torch.int32 for role in ids):
        return ids
    in_order, order = torch.cat(list(ids)).sort()
    ranks = torch.zeros_like(order, dtype=torch.int32)
    ranks[order[1:]] = (in_order[1:] != in_order[:-1]).cumsum(0, dtype=torch.int32)
    return torch.split(ranks, [len(role) for role in ids])


def _padded(width: int) -> int:
    """`width` rounded up to what tile products ask for."""
    return -(-width // ALIGN_WIDTH) * ALIGN_WIDTH


def _row_tile(width: int) -> tuple[int, int]:
    """Columns and rows of a tile of about 4,096 numbers that holds whole vectors."""
    block = triton.next_power_of_2(width)
    return block, max(1, 4096 // block)


@triton.jit
def _store_parts(left_ptrs, right_ptrs, vectors, in_stack, k, PADDED: tl.constexpr, PARTS: tl.constexpr):
    """Store vectors as one fp16 part, or as [high | high | low] on the left and [high | low | high] on the right."""
    mask = in_stack[:, None] & (k < PADDED)[None, :]
    high = vectors.to(tl.float16)
    tl.store(left_ptrs, high, mask=mask)
    tl.store(right_ptrs, high, mask=mask)
    if PARTS == 3:
        low = (vectors - high.to(tl.float32)).to(tl.float16)
        tl.store(left_ptrs + PADDED, high, mask=mask)
        tl.store(left_ptrs + 2 * PADDED, low, mask=mask)
        tl.store(right_ptrs + PADDED, low, mask=mask)
        tl.store(right_ptrs + 2 * PADDED, high, mask=mask)


@triton.jit
def _unit_vectors(vectors_ptr, lengths_ptr, unusable_ptr, row, k, num_vectors, width, stride):
    """The rows' vectors at length 1, fp32, zeros past the end; stores their lengths, and 1 if one is unusable."""
    in_role = row < num_vectors
    places = row[:, None].to(tl.int64) * stride + k[None, :]
    vectors = tl.load(vectors_ptr + places, mask=in_role[:, None] & (k < width)[None, :], other=0.0).to(tl.float32)
    # Scaled by the largest component first, so that no square leaves fp32's range. Division and root are rounded, not
    # approximate: an error here would be one of all the row's scores, and a temperature of 0.01 magnifies it.
    largest = tl.max(tl.abs(vectors), 1)
    vectors = tl.div_rn(vectors, tl.where(largest > 0, largest, 1.0)[:, None])
    length = tl.sqrt_rn(tl.sum(vectors * vectors, 1))
    length_before = largest * length
    tl.store(lengths_ptr + row, length_before, mask=in_role)
    usable = (length_before > 0) & (length_before < float("inf"))
    if (tl.max((in_role & (usable == 0)).to(tl.int32), 0) == 1) & (width > 0):
        tl.store(unusable_ptr, 1)
    return tl.div_rn(vectors, tl.where(length > 0, length, 1.0)[:, None])


@triton.jit
def _stack_role(
    vectors_ptr, guide_ptr, ids_ptr, left_ptr, right_ptr, operand_ptr, stacked_ids_ptr, lengths_ptr, unusable_ptr,
    num_vectors, num_padded, start, width,
    GUIDE_COLUMNS: tl.constexpr, GUIDE_PLACES: tl.constexpr, STRIDE: tl.constexpr, PADDED: tl.constexpr,
    PARTS: tl.constexpr, GUIDE_PARTS: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of a role: unit vectors of guides and student into the stack, ids, and lengths. Zeros past the end.

    Guide number n has columns GUIDE_COLUMNS[n] to [n + 1] of the guide vectors, and GUIDE_PLACES likewise of the stack.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    in_stack = row < num_padded
    place = (start + row).to(tl.int64)
    left = left_ptr + place[:, None] * STRIDE + k[None, :]
    right = right_ptr + place[:, None] * STRIDE + k[None, :]
    for n in tl.static_range(len(GUIDE_COLUMNS) - 1):
        guide = _unit_vectors(
            guide_ptr + GUIDE_COLUMNS[n], lengths_ptr + (n + 1) * num_vectors, unusable_ptr, row, k, num_vectors,
            GUIDE_COLUMNS[n + 1] - GUIDE_COLUMNS[n], GUIDE_COLUMNS[-1],
        )  # fmt: skip
        _store_parts(
            left + GUIDE_PLACES[n], right + GUIDE_PLACES[n], guide * LENGTH, in_stack, k,
            (GUIDE_PLACES[n + 1] - GUIDE_PLACES[n]) // GUIDE_PARTS, GUIDE_PARTS,
        )  # fmt: skip
    unit = _unit_vectors(vectors_ptr, lengths_ptr, unusable_ptr, row, k, num_vectors, width, width)
    _store_parts(left + GUIDE_PLACES[-1], right + GUIDE_PLACES[-1], unit * LENGTH, in_stack, k, PADDED, PARTS)
    mask = in_stack[:, None] & (k < PADDED)[None, :]
    tl.store(operand_ptr + place[:, None] * PADDED + k[None, :], unit.to(operand_ptr.dtype.element_ty), mask=mask)
    tl.store(stacked_ids_ptr + place, tl.load(ids_ptr + row, mask=row < num_vectors, other=0), mask=in_stack)


@triton.jit
def _own_products(
    left_ptr, right_ptr, anchor, positive, inside, FIRST: tl.constexpr, END: tl.constexpr, STRIDE: tl.constexpr
):
    """Products of anchors and positives over one part of the stack, summed in 64 chains: longer ones lose digits."""
    products = tl.zeros((anchor.shape[0], 64), tl.float32)
    for first in range(FIRST, END, 64):
        k = first + tl.arange(0, 64)
        a = tl.load(left_ptr + anchor[:, None] * STRIDE + k[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        p = tl.load(right_ptr + positive[:, None] * STRIDE + k[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        products += a * p
    return tl.sum(products, 1)


@triton.jit
def _own_terms(
    left_ptr, right_ptr, temperature_ptr, terms_ptr, row_offset, first_positive, num_rows, margin, highest_exponent,
    GUIDE_PLACES: tl.constexpr, GUIDE_MIN: tl.constexpr, STRIDE: tl.constexpr, GUIDED: tl.constexpr,
    RELATIVE: tl.constexpr, SQUARE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The rows' own scores, thresholds and refs, from the very vectors that the tiles are made of.

    A ref is the own score, raised so far that no score up to 1 makes an exponent above `highest_exponent`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    anchor = (row_offset + row).to(tl.int64)
    positive = first_positive + anchor
    own = _own_products(left_ptr, right_ptr, anchor, positive, inside, GUIDE_PLACES[-1], STRIDE, STRIDE)
    tl.store(terms_ptr + row, own / SQUARE, mask=inside)
    threshold = tl.full((ROWS,), float("inf"), tl.float32)
    if GUIDED:
        own_guide = _own_products(left_ptr, right_ptr, anchor, positive, inside, 0, GUIDE_PLACES[1], STRIDE)
        for n in tl.static_range(1, len(GUIDE_PLACES) - 1):
            another = _own_products(
                left_ptr, right_ptr, anchor, positive, inside, GUIDE_PLACES[n], GUIDE_PLACES[n + 1], STRIDE
            )
            own_guide = tl.minimum(own_guide, another) if GUIDE_MIN else tl.maximum(own_guide, another)
        own_guide = own_guide / SQUARE
        threshold = own_guide - (tl.abs(own_guide) * margin if RELATIVE else margin)
    tl.store(terms_ptr + num_rows + row, threshold, mask=inside)
    lowest = 1.0 - highest_exponent * tl.load(temperature_ptr)
    tl.store(terms_ptr + 2 * num_rows + row, tl.maximum(own / SQUARE, lowest), mask=inside)


@triton.jit
def _second_ref(
    own_ptr, temperature_ptr, top_ptr, ref_ptr, lost_ptr, num_rows, pieces, lowest_exponent, BLOCK: tl.constexpr
):  # fmt: skip
    """Where own positive and all candidates lie too far below ref: 1 in `lost`, and the highest score as ref."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    highest = tl.load(own_ptr + row, mask=inside, other=0.0)
    for piece in range(pieces):
        highest = tl.maximum(highest, tl.load(top_ptr + piece * num_rows + row, mask=inside, other=0.0))
    ref = tl.load(ref_ptr + row, mask=inside, other=0.0)
    lost = highest - ref < lowest_exponent * tl.load(temperature_ptr)
    tl.store(ref_ptr + row, tl.where(lost, highest, ref), mask=inside)
    tl.store(lost_ptr + row, lost.to(tl.int32), mask=inside)


@triton.jit
def _row_terms(
    total_ptr, weighted_ptr, tops_ptr, own_ptr, ref_ptr, temperature_ptr, weights_ptr,
    losses_ptr, share_ptr, weight_ptr, slope_ptr, top_ptr, num_rows, pieces,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, share, weight, slope and top score of each row from the sums over its segments."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    top = tl.full((BLOCK,), -1.0e30, tl.float32)
    for piece in range(pieces):
        total += tl.load(total_ptr + piece * num_rows + row, mask=inside, other=0.0)
        weighted += tl.load(weighted_ptr + piece * num_rows + row, mask=inside, other=0.0)
        top = tl.maximum(top, tl.load(tops_ptr + piece * num_rows + row, mask=inside, other=0.0))
    own = tl.load(own_ptr + row, mask=inside, other=0.0)
    some = total > 0
    safe = tl.where(some, total, 1.0)
    gap = tl.log(safe) + (tl.load(ref_ptr + row, mask=inside, other=0.0) - own) / tl.load(temperature_ptr)
    gap = tl.where(some, gap, float("-inf"))
    # softplus(gap) = max(gap, 0) + log(1 + z), and log(1 + z) = z log(u) / (u - 1) with u the rounded 1 + z: exact for
    # small z.
    z = tl.exp(-tl.abs(gap))
    u = 1.0 + z
    log_u = tl.where(u == 1.0, z, z * tl.log(u) / tl.where(u == 1.0, 1.0, u - 1.0))
    weight = tl.where(gap >= 0, 1.0, z) / u
    if WEIGHTED:
        weight = weight * tl.load(weights_ptr + row, mask=inside, other=0.0)
    share = weight / safe
    tl.store(losses_ptr + row, tl.maximum(gap, 0.0) + log_u, mask=inside)
    tl.store(share_ptr + row, share, mask=inside)
    tl.store(weight_ptr + row, weight, mask=inside)
    tl.store(slope_ptr + row, share * weighted - weight * own, mask=inside)
    tl.store(top_ptr + row, tl.where(top < -2.0, float("-inf"), top), mask=inside)


@triton.jit
def _finish_gradients(
    total_ptr, operand_ptr, lengths_ptr, weight_ptr, factor_ptr, out_ptr,
    num_vectors, start, partner, row_offset, num_rows, width,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients on vectors: `total` less weight times the own positive, across the vector, over its length."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    in_role = row < num_vectors
    mask = in_role[:, None] & (k < STRIDE)[None, :]
    places = (start + row)[:, None].to(tl.int64) * STRIDE + k[None, :]
    local = row - row_offset
    has_loss = in_role & (local >= 0) & (local < num_rows)
    weight = tl.load(weight_ptr + local, mask=has_loss, other=0.0)
    other = tl.load(operand_ptr + places + partner * STRIDE, mask=mask & has_loss[:, None], other=0.0).to(tl.float32)
    gradient = tl.load(total_ptr + places, mask=mask, other=0.0) - weight[:, None] * other
    unit = tl.load(operand_ptr + places, mask=mask, other=0.0).to(tl.float32)
    gradient -= tl.sum(gradient * unit, 1)[:, None] * unit
    gradient *= (tl.load(factor_ptr) / tl.load(lengths_ptr + row, mask=in_role, other=1.0))[:, None]
    out = out_ptr + row[:, None].to(tl.int64) * width + k[None, :]
    tl.store(out, gradient, mask=in_role[:, None] & (k < width)[None, :])
