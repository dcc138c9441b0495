"""The kernel: tiles of exp((score - ref) / T), zero wherever a candidate is dropped.

    g_ij = guide_i . guide_j          E_ij = exp((s_ij - ref_i) / T)   where kept, else 0
    s_ij = unit_i . unit_j            kept: g_ij <= threshold_i, and id_j is neither the anchor's nor the positive's

Guide and student vectors lie side by side in one fp16 stack, [guide | student], of length `LENGTH` each. A program
takes BLOCK_M rows through one *segment*: a run of candidate columns of one block (aa, ap, an or pp). For each tile it
walks the guide's part of the stack, turns the scores into the mask, and walks on through the student's part with the
mask as start value. Several guides follow each other, each with the verdict so far as start value. A program reads
2 (BLOCK_M + BLOCK_N) bytes for each of the stack's columns, writes E (2 or 4 bytes an entry), and for each row of the
segment the sum of E, the sum of E s, the highest score kept and how many were kept. No two programs write to one place,
so two runs are bitwise equal. kernels/README.md derives the rest.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gistfast.kernels.fused import Block

LENGTH = 256.0  # of vectors in the stack: keeps small components, and the second half of split ones, in fp16's range
SQUARE = tl.constexpr(65536.0)  # LENGTH**2, a power of two: scaling scores by it is exact
LOG2E = tl.constexpr(1.4426950408889634)
DROPPED = tl.constexpr(-1.0e30)  # finite: products may be added to it, and it may be scaled


class TileShape(NamedTuple):
    """Rows, columns and depth of a tile product, and how the compiler schedules it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def tile_shape(e_dtype: torch.dtype, capability: int) -> TileShape:
    """The tile shape for E in `e_dtype` on a card of compute capability `capability` (90 is an H100).

    Four warps and about 112 KiB let two programs share a multiprocessor of an H100: one multiplies while the other is
    at its exponentials.
    """
    if capability >= 90:
        return TileShape(128, 128, 64, 4, 3 if e_dtype == torch.bfloat16 else 2)
    return TileShape(128, 128, 32, 8, 3)


def device_capability(device: torch.device) -> int:
    """Compute capability as one number; an H100's under the interpreter."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@triton.jit
def _add_products(
    acc, rows_desc, columns_desc, row, column, first_step, end_step, BLOCK_K: tl.constexpr
):  # fmt: skip
    """`acc` plus the products of the vectors from `row` on with those from `column` on, over a part of the stack."""
    for step in range(first_step, end_step):
        left = rows_desc.load([row, step * BLOCK_K])
        right = columns_desc.load([column, step * BLOCK_K])
        acc = tl.dot(left, right.T, acc)
    return acc


@triton.jit
def _exp_tiles(
    rows_desc, columns_desc, e_desc,
    ids_ptr, threshold_ptr, ref_ptr, own_ptr, temperature_ptr, lost_ptr, segments_ptr,
    sums_ptr, weighted_ptr, top_ptr, kept_ptr,
    num_rows, first_row, first_positive,
    GUIDE_STEPS: tl.constexpr, GUIDE_MIN: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HARD_ONLY: tl.constexpr, REDO: tl.constexpr, WRITE_E: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) * BLOCK_M
    local = tile + tl.arange(0, BLOCK_M)
    in_range = local < num_rows
    if REDO and tl.max(tl.load(lost_ptr + local, mask=in_range, other=0), 0) == 0:
        return

    segment = tl.program_id(1)
    row_base = tl.load(segments_ptr + 4 * segment)
    first_column = tl.load(segments_ptr + 4 * segment + 1)
    end_column = tl.load(segments_ptr + 4 * segment + 2)
    e_shift = tl.load(segments_ptr + 4 * segment + 3)

    row = row_base + first_row + tile
    anchor_id = tl.load(ids_ptr + first_row + local, mask=in_range, other=0)
    positive_id = tl.load(ids_ptr + first_positive + first_row + local, mask=in_range, other=0)
    threshold = tl.load(threshold_ptr + local, mask=in_range, other=0.0) * SQUARE
    scale = LOG2E / (SQUARE * tl.load(temperature_ptr))
    ref = tl.load(ref_ptr + local, mask=in_range, other=float("inf")) * SQUARE

    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), DROPPED, tl.float32)
    kept = tl.zeros((BLOCK_M,), tl.int32)
    for column in range(first_column, end_column, BLOCK_N):
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _add_products(acc, rows_desc, columns_desc, row, column, 0, GUIDE_STEPS[1], BLOCK_K)
        for guide in tl.static_range(1, len(GUIDE_STEPS) - 1):
            # The verdict so far is the next guide's start value: 0 where that one decides. The threshold is read
            # again: kept in registers up to here, it would push others out of them.
            limit = tl.load(threshold_ptr + local, mask=in_range, other=0.0) * SQUARE
            if GUIDE_MIN:
                acc = tl.where(acc > limit[:, None], 0.0, DROPPED)
            else:
                acc = tl.where(acc > limit[:, None], -DROPPED, 0.0)
            acc = _add_products(
                acc, rows_desc, columns_desc, row, column, GUIDE_STEPS[guide], GUIDE_STEPS[guide + 1], BLOCK_K
            )
        columns = column + tl.arange(0, BLOCK_N)
        column_id = tl.load(ids_ptr + columns)
        keep = (acc <= threshold[:, None]) & (columns < end_column)[None, :]
        keep &= (column_id[None, :] != anchor_id[:, None]) & (column_id[None, :] != positive_id[:, None])
        # The mask is the start value of the student's product: it needs no registers of its own.
        acc = tl.where(keep, 0.0, DROPPED)
        acc = _add_products(acc, rows_desc, columns_desc, row, column, GUIDE_STEPS[-1], STEPS, BLOCK_K)
        if HARD_ONLY:
            own = tl.load(own_ptr + local, mask=in_range, other=0.0) * SQUARE
            acc = tl.where(acc < own[:, None], DROPPED, acc)
        e = tl.exp2((acc - ref[:, None]) * scale)
        total += tl.sum(e, 1)
        # 0 * DROPPED is 0. Scaled tile by tile: a row's sum of up to exp(70) * SQUARE would leave fp32.
        weighted += tl.sum(e * acc, 1) * (1.0 / SQUARE)
        top = tl.maximum(top, tl.max(acc, 1))
        kept += tl.sum((acc > 0.5 * DROPPED).to(tl.int32), 1)
        if WRITE_E:
            # In two halves: the way to memory leads through shared memory, and a whole tile would crowd out operands.
            left, right = e.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
            e_desc.store([tile, column + e_shift], left.to(e_desc.dtype))
            e_desc.store([tile, column + e_shift + BLOCK_N // 2], right.to(e_desc.dtype))

    out = segment * num_rows + local
    tl.store(sums_ptr + out, total, mask=in_range)
    tl.store(weighted_ptr + out, weighted, mask=in_range)
    tl.store(top_ptr + out, top / SQUARE, mask=in_range)
    tl.store(kept_ptr + out, kept, mask=in_range)


class Sums(NamedTuple):
    """What the kernel leaves for each segment and row, (blocks, pieces, R): fp32, and `kept` int32."""

    total: Tensor
    weighted: Tensor
    top: Tensor
    kept: Tensor


@lru_cache(maxsize=64)
def _segments(blocks: tuple[Block, ...], pieces: int, block_n: int, device: torch.device) -> Tensor:
    """Each block's columns cut into `pieces` runs of whole tiles: (blocks * pieces, 4) int32, for the kernel."""
    table = []
    for block in blocks:
        width = triton.cdiv(triton.cdiv(block.end - block.first, block_n), pieces) * block_n
        for piece in range(pieces):
            start = min(block.first + piece * width, block.end)
            table.append((block.row_base, start, min(start + width, block.end), block.e_shift))
    return torch.tensor(table, dtype=torch.int32).to(device, non_blocking=True)


def num_pieces(blocks: tuple[Block, ...], num_rows: int, shape: TileShape, device: torch.device) -> int:
    """How many segments a block is cut into: programs for every multiprocessor many times over, none without work."""
    tiles = max(triton.cdiv(block.end - block.first, shape.block_n) for block in blocks)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs_a_piece = triton.cdiv(num_rows, shape.block_m) * len(blocks)
    wanted = -(-16 * processors // int(programs_a_piece))
    return max(1, min(int(tiles), wanted))


def exp_tiles(
    left: Tensor,
    right: Tensor,
    guide_places: tuple[int, ...],
    ids: Tensor,
    threshold: Tensor,
    ref: Tensor,
    own: Tensor,
    temperature: Tensor,
    e: Tensor | None,
    blocks: tuple[Block, ...],
    *,
    first_row: int,
    first_positive: int,
    hard_only: bool,
    guide_min: bool = False,
    lost: Tensor | None = None,
    sums: Sums | None = None,
    shape: TileShape | None = None,
) -> Sums:
    """Run the kernel for a chunk of R rows.

    Args:
        left: Row operands, (vectors, width) fp16: [guides | student], each padded to a multiple of BLOCK_K.
        right: Column operands, as `left`; the same tensor unless vectors are split in two halves.
        guide_places: Columns of `left` at which each guide's part begins, and the one at which the last ends.
        ids: (vectors,) text ids, int32 or int64.
        threshold: (R,) fp32; a candidate whose guide score is above is dropped.
        ref: (R,) fp32, subtracted from each score of the row.
        own: (R,) fp32 scores of the own positives; read if `hard_only`.
        temperature: Scalar fp32.
        e: (R, columns) bf16 or fp32, to be filled; None when no gradient is wanted.
        blocks: Which rows meet which columns.
        first_row: Row of the batch that the chunk begins with.
        first_positive: Where positives begin in the stack.
        hard_only: Drop candidates that score below `own`.
        guide_min: Of several guides' scores the lowest counts, rather than the highest.
        lost: (R,) int32; tiles of rows without a 1 are left as they are in `e` and `sums`.
        sums: What a first call returned, to be written again.
        shape: Tile shape; by default the one tuned for the card.
    """
    num_rows = len(threshold)
    shape = shape or tile_shape(torch.bfloat16 if left is right else torch.float32, device_capability(left.device))
    pieces = num_pieces(blocks, num_rows, shape, left.device)
    if sums is None:
        size = (len(blocks), pieces, num_rows)
        total, weighted, top = (left.new_empty(size, dtype=torch.float32) for _ in range(3))
        sums = Sums(total, weighted, top, left.new_empty(size, dtype=torch.int32))

    def tiles(matrix: Tensor, num_tile_rows: int, num_tile_columns: int) -> TensorDescriptor:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [num_tile_rows, num_tile_columns])

    row_tiles = tiles(left, shape.block_m, shape.block_k)
    same = left is right and shape.block_m == shape.block_n
    _exp_tiles[(triton.cdiv(num_rows, shape.block_m), len(blocks) * pieces)](
        row_tiles, row_tiles if same else tiles(right, shape.block_n, shape.block_k),
        row_tiles if e is None else tiles(e, shape.block_m, shape.block_n // 2),
        ids, threshold, ref, own, temperature, ids if lost is None else lost,
        _segments(blocks, pieces, shape.block_n, left.device), *sums,
        num_rows, first_row, first_positive,
        GUIDE_STEPS=tuple(place // shape.block_k for place in guide_places), GUIDE_MIN=guide_min,
        STEPS=left.shape[1] // shape.block_k,
        BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_K=shape.block_k,
        HARD_ONLY=hard_only, REDO=lost is not None, WRITE_E=e is not None,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    return sums
