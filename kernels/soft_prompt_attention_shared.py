"""Triton building blocks of `soft_prompt_attention`: work lists, tiles, masks and scores."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
NOBODY = tl.constexpr(2**31 - 1)  # segment of a column past the end: no row sees it


@triton.jit
def _user_tiles(cu_ptr, u, T, U, TILE: tl.constexpr):
    """First row, end and tiles of users `u`; user U is the slack, later ones have none."""
    start = tl.minimum(tl.load(cu_ptr + u, mask=u <= U, other=T), T)
    end = tl.minimum(tl.load(cu_ptr + u + 1, mask=u < U, other=T), T)
    return start, end, tl.cdiv(tl.maximum(end - start, 0), TILE)


@triton.jit
def _work_list_kernel(
    work_ptr, cu_ptr, T, U, capacity, TILE: tl.constexpr, LAST_FIRST: tl.constexpr,
    BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Ranks every (user, tile) by the length of its walk; a row of programs per user.

    work [capacity, 3]: user's first row (-1: slack) and end, tile's first row (-1: none).
    """
    user = tl.program_id(0)
    start, end, tiles = _user_tiles(cu_ptr, user, T, U, TILE)
    for level in range(tl.program_id(1), tiles, tl.num_programs(1)):
        # Before it come the tiles of higher level, and those of this level of earlier users.
        rank = 0
        for u0 in range(0, U + 1, BLOCK_U):
            u = u0 + tl.arange(0, BLOCK_U)
            _, _, n = _user_tiles(cu_ptr, u, T, U, TILE)
            rank += tl.sum(tl.maximum(n - level - 1, 0) + ((u < user) & (n > level)).to(tl.int32))
        fits = rank < capacity  # cu_seqlens that break the rules must not write out of bounds
        tl.store(work_ptr + 3 * rank, tl.where(user < U, start, -1), mask=fits)
        tl.store(work_ptr + 3 * rank + 1, end, mask=fits)
        tile = level if LAST_FIRST else tiles - 1 - level
        tl.store(work_ptr + 3 * rank + 2, start + tile * TILE, mask=fits)
    if (user == U) & (tl.program_id(1) == 0):
        total = 0
        for u0 in range(0, U + 1, BLOCK_U):
            _, _, n = _user_tiles(cu_ptr, u0 + tl.arange(0, BLOCK_U), T, U, TILE)
            total += tl.sum(n)
        for i0 in range(total, capacity, BLOCK_U):
            i = i0 + tl.arange(0, BLOCK_U)
            tl.store(work_ptr + 3 * i + 2, -1, mask=i < capacity)


@triton.jit
def load_tile(
    rows, first, end, head, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DESC: tl.constexpr,
):  # fmt: skip
    """Rows first:first + ROWS of one head, [ROWS, BLOCK_D], zero past DIM.

    `rows` is (pointer or descriptor, row stride, head stride). Pointer loads: 0 from `end` on.
    """
    if DESC:
        tile = rows[0].load([head, first, 0]).reshape(ROWS, BLOCK_D)
    else:
        r = tl.arange(0, ROWS)
        d = tl.arange(0, BLOCK_D)
        base = rows[0] + tl.cast(first, tl.int64) * rows[1] + tl.cast(head, tl.int64) * rows[2]
        mask = (first + r < end)[:, None]
        if DIM < BLOCK_D:
            mask = mask & (d < DIM)[None, :]
        tile = tl.load(base + r[:, None] * rows[1] + d[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(ptr, x, first, end, head, HEADS: tl.constexpr, DIM: tl.constexpr):
    """The inverse of `load_tile`, into [T, HEADS, DIM], or some heads of rows of HEADS."""
    r = tl.arange(0, x.shape[0])
    d = tl.arange(0, x.shape[1])
    base = ptr + (tl.cast(first, tl.int64) * HEADS + head) * DIM
    mask = (first + r < end)[:, None] & (d < DIM)[None, :]
    at = base + r[:, None] * (HEADS * DIM) + d[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def marks(
    segment_ptr, position_ptr, first, end, other, ROWS: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Segments (`other` from `end` on) and positions of a tile; positions only under a window."""
    at = first + tl.arange(0, ROWS)
    segment = tl.load(segment_ptr + at, mask=at < end, other=other)
    position = tl.load(position_ptr + at, mask=at < end, other=0) if WINDOW else segment
    return at, segment, position


@triton.jit
def own_rows(tile, first, end):
    """Zeros in rows from `end` on: what a neighbour has there may be NaN, and 0 NaN is NaN."""
    inside = first + tl.arange(0, tile.shape[0]) < end
    return tl.where(inside[:, None], tile, 0.0)


@triton.jit
def _tanh(x):
    """tanh to fp32 rounding: Cephes' polynomial near 0, where (1 - e) / (1 + e) cancels."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = (p * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = ((p * z - 3.33332819422e-1) * z) * x + x
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def scores(a, b, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores a b^T in units of log2, and the slope of the soft cap (1 without one)."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    if SOFTCAP:
        t = _tanh(s * (scale / softcap))
        result, slope = t * (softcap * LOG2E), 1.0 - t * t
    else:
        result, slope = s * (scale * LOG2E), 1.0
    return result, slope


@triton.jit
def visible(row, col, num_fields, window, OWN: tl.constexpr, WINDOW: tl.constexpr):
    """The op's mask, from `marks` of rows and columns, already shaped to broadcast.

    WINDOW: 1, by a sliding window; 2, by chunks of `window`; 0, neither.
    """
    ok = (row[1] == col[1]) | (col[1] < tl.where(row[1] >= num_fields, num_fields, 0))
    if OWN:
        ok = ok & (col[0] <= row[0])
    if WINDOW == 1:
        ok = ok & (col[2] > row[2] - window)
    if WINDOW == 2:
        ok = ok & (col[2] // window == row[2] // window)
    return ok


@triton.jit
def down(marks):
    return marks[0][:, None], marks[1][:, None], marks[2][:, None]


@triton.jit
def across(marks):
    return marks[0][None, :], marks[1][None, :], marks[2][None, :]


WorkLists = dict[tuple[int, bool], Tensor]
"""Work lists of one pack, by tile and order; its layers share them."""


def work_list(
    cu_seqlens: Tensor, rows: int, tile: int, last_first: bool, block: int = 128,
    lists: WorkLists | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """The work list [capacity, 3] and its capacity, a bound that depends on T and U alone."""
    users = cu_seqlens.shape[0] - 1
    capacity = rows // tile + users + 1
    work = None if lists is None else lists.get((tile, last_first))
    if work is None:
        work = cu_seqlens.new_empty(capacity, 3)
        _work_list_kernel[(users + 1, 4)](
            work, cu_seqlens, rows, users, capacity, TILE=tile, LAST_FIRST=last_first, BLOCK_U=block
        )
        if lists is not None:
            lists[tile, last_first] = work
    return work, capacity
