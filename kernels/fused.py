"""The guided contrastive loss with its gradient taken in the forward pass, in chunks of rows.

    x_i    = log(sum_j E_ij) + (ref_i - own_i) / T      E: exp((score - ref) / T), 0 where a candidate is dropped
    loss_i = softplus(x_i)
    v_i    = sigmoid(x_i) / sum_j E_ij                  the softmax normaliser is a factor of the row, so that
    T dX   = v * (E @ C) - sigmoid(x) * own positive    both gradients are plain matrix products on E
    T dC   = E^T @ (v * X)

A backend prepares the vectors, makes E and the row terms for a chunk of rows, and ends with the own positives and the
normalisation; the chunks and the matrix products are here. Shapes: B anchors, M negatives, R rows whose loss is taken,
D student width, G guide width. kernels/README.md derives the formulas.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LEAST_BUDGET_MIB = 32  # of a card
CPU_BUDGET_MIB = 4  # what caches hold; no fewer rows than make a good matrix product, though
CPU_ROWS = 128

_announced: set[tuple[int, str]] = set()  # budgets already logged


@dataclass(frozen=True)
class Layout:
    """Where each role's vectors lie in the stack, which rows meet which columns, and where their tiles lie in E.

    The stack is [anchors; positives; negatives], each role padded with zero vectors to a multiple of `align`, so that
    no tile straddles two blocks. Columns of E: the anchors' candidates [aa?, ap, an?], then the positives' [pp?].
    """

    num_anchors: int
    num_negatives: int
    contrast_anchors: bool
    contrast_positives: bool
    align: int = 1

    @property
    def first_positive(self) -> int:
        """Where positives begin: the padded number of anchors."""
        return self._padded(self.num_anchors)

    @property
    def num_vectors(self) -> int:
        """Vectors of the stack, padding included."""
        return 2 * self.first_positive + self._padded(self.num_negatives)

    @property
    def first_candidate(self) -> int:
        """The first vector of the stack that is a candidate of anchors."""
        return 0 if self.contrast_anchors else self.first_positive

    @property
    def pp_start(self) -> int:
        """The first column of E that belongs to block pp."""
        return self.num_vectors - self.first_candidate

    @property
    def e_columns(self) -> int:
        """Columns of E."""
        return self.pp_start + (self.first_positive if self.contrast_positives else 0)

    @property
    def roles(self) -> tuple[slice, ...]:
        """Where the anchors, the positives and the negatives (if any) lie in the stack."""
        starts = (0, self.first_positive, 2 * self.first_positive)
        sizes = (self.num_anchors, self.num_anchors, self.num_negatives)
        return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True) if size)

    @property
    def blocks(self) -> dict[str, "Block"]:
        """The blocks in use: the first letter is who looks, the second who is seen."""
        anchors, positives, *negatives = self.roles
        shift = -self.first_candidate
        blocks = {"ap": Block(0, positives.start, positives.stop, shift)}
        if self.contrast_anchors:
            blocks["aa"] = Block(0, anchors.start, anchors.stop, shift)
        if self.contrast_positives:
            blocks["pp"] = Block(positives.start, positives.start, positives.stop, self.pp_start - positives.start)
        if negatives:
            blocks["an"] = Block(0, negatives[0].start, negatives[0].stop, shift)
        return blocks

    def _padded(self, size: int) -> int:
        return -(-size // self.align) * self.align


class Block(NamedTuple):
    """First row of the row operand, first and end column in the stack, and the shift from there to columns of E."""

    row_base: int
    first: int
    end: int
    e_shift: int

    @property
    def columns(self) -> slice:
        """The block's columns of E."""
        return slice(self.first + self.e_shift, self.end + self.e_shift)


class Settings(NamedTuple):
    """What shapes the loss, and what is wanted of it; the first seven are those of `gistfast.guided_contrastive_loss`.

    Attributes:
        guide_widths: Widths of the guides that judge one by one, side by side in a guide vector; empty for one guide.
        guide_min: Of their scores the lowest counts, rather than the highest.
        half: Take scores in half precision although the vectors are wider.
        lowest_temperature: What the temperature is known to be no lower than; 0 when it is not known.
        with_gradients: Whether gradients are wanted.
        learn_temperature: Whether that on the temperature is, too.
        mean: The mean over the rows rather than a loss for each.
        chunk_bytes: Budget of E; 0 chooses.
        backend: "triton" or "chunked".
    """

    row_offset: int
    num_rows: int
    margin: float
    relative: bool
    contrast_anchors: bool
    contrast_positives: bool
    hard_only: bool
    guide_widths: Sequence[int]
    guide_min: bool
    half: bool
    lowest_temperature: float
    with_gradients: bool
    learn_temperature: bool
    mean: bool
    chunk_bytes: int
    backend: str


class Rows(NamedTuple):
    """The row terms of a chunk, each (R,) but `kept` (blocks,): see the module's formulas.

    `share` is v and `weight` sigmoid(x), both times the row's weight; `slope` is the derivative by 1 / T, where that is
    wanted; `top` the highest score kept.
    """

    losses: Tensor
    share: Tensor
    weight: Tensor
    slope: Tensor | None
    top: Tensor
    kept: Tensor


class Segment(NamedTuple):
    """A run of E's columns: who looks, who is seen, and where the gradients on both add up.

    Attributes:
        columns: Of E.
        rows: Vectors of those who look, from row 0 of the batch on, (>= B, D).
        seen: Vectors of those who are seen, one for each column, in the precision of E.
        on_rows: Gradients on `rows` and, in `on_seen`, on `seen`; fp32 at least.
        row_scale: (>= B,) factors that make unit vectors of `rows`; None where they are that. E holds those of `seen`.
    """

    columns: slice
    rows: Tensor
    seen: Tensor
    on_rows: Tensor
    on_seen: Tensor
    row_scale: Tensor | None = None


class Backend(Protocol):
    """What a backend does; `chunked` and `triton_backend` are two."""

    def alignment(self, device: torch.device) -> int:
        """What roles begin at a multiple of in the stack."""

    def prepare(
        self, vectors: Sequence[Tensor], guide: Sequence[Tensor], ids: Sequence[Tensor], temperature: Tensor,
        layout: Layout, settings: Settings,
    ) -> Any:  # fmt: skip
        """All that rows are judged by, and zeros where their gradients will add up.

        Has `e_dtype`; `segments`, none where no gradient is wanted; `lengths` of the student's and the guide's
        vectors, role by role; and `unusable`, whether one of these is zero or not finite.
        """

    def rows(
        self, prepared: Any, first: int, num_rows: int, temperature: Tensor, weights: Tensor | None, e: Tensor | None
    ) -> Rows:
        """The row terms of the chunk that begins `first` rows after the row offset; fills `e` unless it is None."""

    def gradients(self, prepared: Any, weight: Tensor, factor: Tensor) -> list[Tensor]:
        """Gradients on each role's vectors, from the segments' less `weight` times the own positives."""


@dataclass
class Result:
    """Losses (R,), highest kept score (R,), candidates kept in each block, and gradients where they were wanted.

    `lengths` are those of the vectors given, `unusable` whether one is zero or not finite: then nothing else counts.
    """

    losses: Tensor
    top: Tensor
    kept: Tensor
    lengths: dict[str, list[Tensor]]
    unusable: Tensor
    on_vectors: list[Tensor]
    on_temperature: Tensor | None


def loss_and_gradients(
    vectors: Sequence[Tensor],
    guide: Sequence[Tensor],
    ids: Sequence[Tensor],
    temperature: Tensor,
    layout: Layout,
    settings: Settings,
    backend: Backend,
    *,
    row_weights: Tensor | None,
) -> Result:
    """Losses of the rows and, if wanted, the gradients of their weighted sum.

    Args:
        vectors: Student vectors of each role, anchors first: (B, D), (B, D) and perhaps (M, D).
        guide: Guide vectors of each role, or nothing.
        ids: Text ids of each role.
        temperature: Scalar tensor, fp32 or fp64.
        layout: Which rows meet which columns.
        settings: What shapes the loss.
        backend: Who makes the tiles.
        row_weights: (R,) weight of each row's loss in the gradients; None for the mean.
    """
    prepared = backend.prepare(vectors, guide, ids, temperature, layout, settings)
    scale = None if row_weights is None else row_weights.abs().amax().clamp_min(1e-30)
    weights = None if row_weights is None or scale is None else row_weights / scale
    rows = _all_rows(prepared, temperature, weights, vectors[0].device, layout, settings, backend)
    result = Result(rows.losses, rows.top, rows.kept, prepared.lengths, prepared.unusable, [], None)
    if settings.with_gradients:
        inverse_t = temperature.reciprocal()
        factor = inverse_t * (1.0 / settings.num_rows if scale is None else scale)
        result.on_vectors = backend.gradients(prepared, rows.weight, factor)
        if rows.slope is not None:
            result.on_temperature = -rows.slope.sum() * inverse_t * factor
    return result


def _all_rows(
    prepared: Any, temperature: Tensor, weights: Tensor | None, device: torch.device, layout: Layout,
    settings: Settings, backend: Backend,
) -> Rows:  # fmt: skip
    """The row terms of all rows; adds up the segments' gradients, chunk by chunk. E lives no longer than this."""
    dtype, num_rows = prepared.e_dtype, settings.num_rows
    chunk = rows_per_chunk(num_rows, layout, dtype.itemsize, settings.chunk_bytes, device)
    e = torch.empty((chunk, layout.e_columns), dtype=dtype, device=device) if settings.with_gradients else None
    chunks = []
    for start in range(0, num_rows, chunk):
        size = min(chunk, num_rows - start)
        part = None if e is None else e[:size]
        part_weights = None if weights is None else weights[start : start + size]
        rows = backend.rows(prepared, start, size, temperature, part_weights, part)
        chunks.append(rows)
        if part is not None:
            for segment in prepared.segments:
                _add_gradients(segment, part, rows.share, settings.row_offset + start)
    return chunks[0] if len(chunks) == 1 else _joined(chunks)


def _joined(chunks: list[Rows]) -> Rows:
    """The row terms of all chunks."""

    def joined(field: str) -> Any:
        parts = [getattr(rows, field) for rows in chunks]
        return None if parts[0] is None else torch.cat(parts)

    terms = [joined(field) for field in Rows._fields[:-1]]
    return Rows._make([*terms, torch.stack([rows.kept for rows in chunks]).sum(0)])


def _add_gradients(segment: Segment, e: Tensor, share: Tensor, first_row: int) -> None:
    """Add a chunk's products with E to the segment's gradients, which are T times those on the vectors."""
    rows = slice(first_row, first_row + len(e))
    block, lookers = e[:, segment.columns], segment.rows[rows]
    if segment.row_scale is not None:
        share = share * segment.row_scale[rows]
    onto_rows = products(block, segment.seen)
    scaled = torch.mul(lookers, share[:, None], out=torch.empty_like(lookers))
    add_products(segment.on_seen, block.T, scaled)
    segment.on_rows[rows].addcmul_(onto_rows, share[:, None])


def products(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, in fp32 at least, whatever the operands' precision."""
    if left.dtype not in (torch.float16, torch.bfloat16):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, in the precision of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def rows_per_chunk(num_rows: int, layout: Layout, e_itemsize: int, chunk_bytes: int, device: torch.device) -> int:
    """Rows of E that fit into `chunk_bytes`, or into a budget chosen by the device when that is 0."""
    row_bytes = layout.e_columns * e_itemsize
    if chunk_bytes == 0 and device.type != "cuda":
        rows = max(CPU_ROWS, (CPU_BUDGET_MIB << 20) // row_bytes)
    elif chunk_bytes == 0 and num_rows * row_bytes <= LEAST_BUDGET_MIB << 20:
        return num_rows  # to ask a card for its free memory takes longer than a small batch
    else:
        rows = max(1, (chunk_bytes or _budget_bytes(device)) // row_bytes)
    if rows >= num_rows:
        return num_rows
    return rows // 128 * 128 if rows >= 128 else rows


def _budget_bytes(device: torch.device) -> int:
    """A sixteenth of a card's free memory, as a power of two of 32 MiB to 2 GiB; each budget is logged once.

    A power of two, so that small changes of the free memory do not change the chunks, and with them the last bits.
    """
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    mib = max(1, free // 16 >> 20)
    mib = min(2048, max(LEAST_BUDGET_MIB, 1 << (mib.bit_length() - 1)))
    if (mib, str(device)) not in _announced:
        _announced.add((mib, str(device)))
        logger.info("guided loss: score tiles take up to %d MiB at a time on %s, by its free memory", mib, device)
    return mib << 20


def threshold_of(own_guide: Tensor, margin: float, *, relative: bool) -> Tensor:
    """The guide score above which a candidate of a row is dropped, from that of the row's own positive.

    Args:
        own_guide: Of any shape.
        margin: How far below it a candidate is dropped already.
        relative: Whether that is a share of the score rather than a distance.
    """
    return own_guide - (own_guide.abs() * margin if relative else margin)


def each_guide(guide: Sequence[Tensor], widths: Sequence[int]) -> dict[str, list[Tensor]]:
    """The roles' vectors of each guide, by what it is called: `guide`, cut into `widths` where these are given."""
    if not widths:
        return {"guide": list(guide)} if guide else {}
    cut = [role.split(list(widths), dim=1) for role in guide]
    return {f"guide {number}": list(roles) for number, roles in enumerate(zip(*cut, strict=True), 1)}


def wide_dtype(columns: Sequence[Tensor]) -> torch.dtype:
    """The dtype of sums over the columns: theirs, fp32 at least."""
    return reduce(torch.promote_types, (column.dtype for column in columns), torch.float32)
