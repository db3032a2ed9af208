"""Triton kernels of `userip_fast.ops.soft_prompt_attention`; the op's module has the formulas.

Tensors: q [T, H, d], k [T, Hkv, d], v [T, Hkv, dv] and out [T, H, dv], packed rows; prefix_k and
prefix_v likewise with P rows; any strides but a contiguous last dimension. lse (log2 of the sum of
2^score) and delta are [H, T] fp32. Dots accumulate in fp32; probabilities and score gradients are
rounded to the input dtype before they are multiplied, as FlashAttention does. fp32 inputs are
multiplied in fp32, not TF32.

Work: one program per (tile of one user's rows, head). The forward and dQ programs walk the prefix,
then the user's columns up to their own rows. A dK/dV program owns a tile of columns and one key
head and walks the rows at or after it, for every query head of the group. Every output row has one
owner and one order of summation: no atomics, bitwise repeatable, independent of the other users of
the pack. The tiles come from a work list built on the device, longest first, over a grid that
depends on T and U alone, so that a launch needs no host sync and can be captured in a CUDA graph.
Rows that belong to nobody are one more "user", whose outputs are zeros.

Tiles are read through tensor descriptors (TMA, so that the dots become wgmma) on sm_90, and
through pointers elsewhere, where descriptors would lose cp.async; the source is the same. Through
a descriptor, rows past a user's end hold the next user's values: the causal mask hides them as
columns and an infinite lse hides them as rows; in a user's last tile they are set to zero before
they are multiplied by zeros, since they may be NaN. Two kernels have no registers for that, dQ at
head size 256 and dK/dV at 128 with groups: there rows past a user's end must be finite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from userip_fast.ops.soft_prompt_attention.context import Context

LOG2E = tl.constexpr(1.4426950408889634)
NOBODY = tl.constexpr(2**31 - 1)  # segment of a column past the end: no row sees it


class Tiling(NamedTuple):
    """How a kernel is cut: a program's own rows (columns), the tile it walks, launch options."""

    own: int
    step: int
    num_warps: int
    num_stages: int


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
def _load(
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
def _store(ptr, x, first, end, head, HEADS: tl.constexpr, DIM: tl.constexpr):
    """The inverse of `_load`, into [T, HEADS, DIM], or some heads of rows of HEADS."""
    r = tl.arange(0, x.shape[0])
    d = tl.arange(0, x.shape[1])
    base = ptr + (tl.cast(first, tl.int64) * HEADS + head) * DIM
    mask = (first + r < end)[:, None] & (d < DIM)[None, :]
    at = base + r[:, None] * (HEADS * DIM) + d[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _marks(
    segment_ptr, position_ptr, first, end, other, ROWS: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Segments (`other` from `end` on) and positions of a tile; positions only under a window."""
    at = first + tl.arange(0, ROWS)
    segment = tl.load(segment_ptr + at, mask=at < end, other=other)
    position = tl.load(position_ptr + at, mask=at < end, other=0) if WINDOW else segment
    return at, segment, position


@triton.jit
def _own_rows(tile, first, end):
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
def _scores(a, b, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores a b^T in units of log2, and the slope of the soft cap (1 without one)."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    if SOFTCAP:
        t = _tanh(s * (scale / softcap))
        result, slope = t * (softcap * LOG2E), 1.0 - t * t
    else:
        result, slope = s * (scale * LOG2E), 1.0
    return result, slope


@triton.jit
def _visible(row, col, num_fields, window, OWN: tl.constexpr, WINDOW: tl.constexpr):
    """The op's mask, from `_marks` of rows and columns, already shaped to broadcast.

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
def _down(marks):
    return marks[0][:, None], marks[1][:, None], marks[2][:, None]


@triton.jit
def _across(marks):
    return marks[0][None, :], marks[1][None, :], marks[2][None, :]


@triton.jit
def _fwd_step(
    acc, m, total, q_tile, row, keys, values, segment_ptr, position_ptr, j, end, kv_head,
    num_fields, scale, window, softcap, BLOCK_N: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, OWN: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DESC: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One column tile of the online softmax; a tile that a row cannot see leaves it unchanged."""
    BLOCK_D: tl.constexpr = q_tile.shape[1]
    BLOCK_V: tl.constexpr = acc.shape[1]
    col = _marks(segment_ptr, position_ptr, j, end, NOBODY, BLOCK_N, WINDOW)
    k_tile = _load(keys, j, end, kv_head, BLOCK_N, DIM, BLOCK_D, DESC)
    s, _ = _scores(q_tile, k_tile, scale, softcap, SOFTCAP)
    ok = _visible(_down(row), _across(col), num_fields, window, OWN, WINDOW)
    s = tl.where(ok, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    v_tile = _load(values, j, end, kv_head, BLOCK_N, DIM_V, BLOCK_V, DESC)
    if TAIL:
        v_tile = _own_rows(v_tile, j, end)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return acc, m_new, total * shrink + tl.sum(p, 1)


@triton.jit
def _fwd_kernel(
    q, k, v, prefix_k, prefix_v, out_ptr, lse_ptr, sinks_ptr,
    work_ptr, segment_ptr, prefix_segment_ptr, position_ptr, prefix_position_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_pkt, stride_pkh, stride_pvt, stride_pvh,
    T, P, num_fields, scale, window, softcap,
    H: tl.constexpr, HKV: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0) // H, tl.program_id(0) % H
    kv_head = head // (H // HKV)
    start = tl.load(work_ptr + 3 * item)
    end = tl.load(work_ptr + 3 * item + 1)
    first = tl.load(work_ptr + 3 * item + 2)
    if first < 0:
        return
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    m = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite, so that exp2(m - m_new) is never NaN
    total = tl.zeros((BLOCK_M,), tl.float32)
    row = _marks(segment_ptr, position_ptr, first, end, 0, BLOCK_M, WINDOW)
    lse_at = lse_ptr + tl.cast(head, tl.int64) * T + row[0]
    if start < 0:
        _store(out_ptr, acc, first, end, head, H, DIM_V)
        tl.store(lse_at, total, mask=row[0] < end)
        return
    if SINKS:  # as if a column of this score and no value had been walked
        m = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + head) * LOG2E
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    q_tile = _load((q, stride_qt, stride_qh), first, end, head, BLOCK_M, DIM, BLOCK_D, DESC)
    prefix_keys, keys = (prefix_k, stride_pkt, stride_pkh), (k, stride_kt, stride_kh)
    prefix_values, values = (prefix_v, stride_pvt, stride_pvh), (v, stride_vt, stride_vh)
    for j in range(0, P, BLOCK_N):
        acc, m, total = _fwd_step(
            acc, m, total, q_tile, row, prefix_keys, prefix_values, prefix_segment_ptr,
            prefix_position_ptr, j, P, kv_head, num_fields, scale, window, softcap,
            BLOCK_N, DIM, DIM_V, False, WINDOW, SOFTCAP, DESC, False,
        )  # fmt: skip
    stop = tl.minimum(first + BLOCK_M, end)
    full = start + (stop - start) // BLOCK_N * BLOCK_N if DESC else stop
    for j in range(start, full, BLOCK_N):
        acc, m, total = _fwd_step(
            acc, m, total, q_tile, row, keys, values, segment_ptr,
            position_ptr, j, end, kv_head, num_fields, scale, window, softcap,
            BLOCK_N, DIM, DIM_V, True, WINDOW, SOFTCAP, DESC, False,
        )  # fmt: skip
    if DESC:  # noqa: SIM102 - known when compiled
        if full < stop:
            acc, m, total = _fwd_step(
                acc, m, total, q_tile, row, keys, values, segment_ptr,
                position_ptr, full, end, kv_head, num_fields, scale, window, softcap,
                BLOCK_N, DIM, DIM_V, True, WINDOW, SOFTCAP, DESC, True,
            )  # fmt: skip
    _store(out_ptr, acc / total[:, None], first, end, head, H, DIM_V)
    tl.store(lse_at, m + tl.log2(total), mask=row[0] < end)


@triton.jit
def _dq_step(
    dq, q_tile, grad, lse, delta, row, keys, values, segment_ptr, position_ptr, j, end, kv_head,
    num_fields, scale, window, softcap, BLOCK_N: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, OWN: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DESC: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = q_tile.shape[1]
    BLOCK_V: tl.constexpr = grad.shape[1]
    col = _marks(segment_ptr, position_ptr, j, end, NOBODY, BLOCK_N, WINDOW)
    k_tile = _load(keys, j, end, kv_head, BLOCK_N, DIM, BLOCK_D, DESC)
    v_tile = _load(values, j, end, kv_head, BLOCK_N, DIM_V, BLOCK_V, DESC)
    if TAIL:
        k_tile, v_tile = _own_rows(k_tile, j, end), _own_rows(v_tile, j, end)
    s, slope = _scores(q_tile, k_tile, scale, softcap, SOFTCAP)
    ok = _visible(_down(row), _across(col), num_fields, window, OWN, WINDOW)
    p = tl.where(ok, tl.exp2(s - lse[:, None]), 0.0)
    dp = tl.dot(grad, tl.trans(v_tile), input_precision="ieee")
    ds = p * (dp - delta[:, None]) * slope
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")


@triton.jit
def _dq_kernel(
    q, k, v, prefix_k, prefix_v, d_out, out, lse_ptr, delta_ptr, dq_ptr,
    work_ptr, segment_ptr, prefix_segment_ptr, position_ptr, prefix_position_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_pkt, stride_pkh, stride_pvt, stride_pvh,
    T, P, num_fields, scale, window, softcap,
    H: tl.constexpr, HKV: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROW_HEADS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """dq, and delta [H, T] for `_dkdv_kernel`; d_out and out are contiguous."""
    item, head = tl.program_id(0) // H, tl.program_id(0) % H
    kv_head = head // (H // HKV)
    start = tl.load(work_ptr + 3 * item)
    end = tl.load(work_ptr + 3 * item + 1)
    first = tl.load(work_ptr + 3 * item + 2)
    if first < 0:
        return
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if start < 0:
        _store(dq_ptr, dq, first, end, head, ROW_HEADS, DIM)
        return
    row = _marks(segment_ptr, position_ptr, first, end, 0, BLOCK_M, WINDOW)
    inside = row[0] < end
    at = tl.cast(head, tl.int64) * T + row[0]
    grad = _load((d_out, H * DIM_V, DIM_V), first, end, head, BLOCK_M, DIM_V, BLOCK_V, DESC)
    result = _load((out, H * DIM_V, DIM_V), first, end, head, BLOCK_M, DIM_V, BLOCK_V, DESC)
    delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=inside)
    lse = tl.load(lse_ptr + at, mask=inside, other=float("inf"))
    q_tile = _load((q, stride_qt, stride_qh), first, end, head, BLOCK_M, DIM, BLOCK_D, DESC)
    prefix_keys, keys = (prefix_k, stride_pkt, stride_pkh), (k, stride_kt, stride_kh)
    prefix_values, values = (prefix_v, stride_pvt, stride_pvh), (v, stride_vt, stride_vh)
    for j in range(0, P, BLOCK_N):
        dq = _dq_step(
            dq, q_tile, grad, lse, delta, row, prefix_keys, prefix_values, prefix_segment_ptr,
            prefix_position_ptr, j, P, kv_head, num_fields, scale, window, softcap,
            BLOCK_N, DIM, DIM_V, False, WINDOW, SOFTCAP, DESC, False,
        )  # fmt: skip
    stop = tl.minimum(first + BLOCK_M, end)
    CLEAN: tl.constexpr = DESC and BLOCK_D <= 128 and BLOCK_V <= 128  # it spills at 256
    full = start + (stop - start) // BLOCK_N * BLOCK_N if CLEAN else stop
    for j in range(start, full, BLOCK_N):
        dq = _dq_step(
            dq, q_tile, grad, lse, delta, row, keys, values, segment_ptr,
            position_ptr, j, end, kv_head, num_fields, scale, window, softcap,
            BLOCK_N, DIM, DIM_V, True, WINDOW, SOFTCAP, DESC, False,
        )  # fmt: skip
    if CLEAN:  # noqa: SIM102
        if full < stop:
            dq = _dq_step(
                dq, q_tile, grad, lse, delta, row, keys, values, segment_ptr,
                position_ptr, full, end, kv_head, num_fields, scale, window, softcap,
                BLOCK_N, DIM, DIM_V, True, WINDOW, SOFTCAP, DESC, True,
            )  # fmt: skip
    _store(dq_ptr, dq * scale, first, end, head, ROW_HEADS, DIM)


@triton.jit
def _dkdv_step(
    dk, dv, k_tile, v_tile, col, queries, gradients, lse_ptr, delta_ptr, segment_ptr,
    position_ptr, i, end, head, T, num_fields, scale, window, softcap, BLOCK_M: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DESC: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one query head."""
    BLOCK_D: tl.constexpr = k_tile.shape[1]
    BLOCK_V: tl.constexpr = v_tile.shape[1]
    row = _marks(segment_ptr, position_ptr, i, end, 0, BLOCK_M, WINDOW)
    inside = row[0] < end
    at = tl.cast(head, tl.int64) * T + row[0]
    lse = tl.load(lse_ptr + at, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    q_tile = _load(queries, i, end, head, BLOCK_M, DIM, BLOCK_D, DESC)
    grad = _load(gradients, i, end, head, BLOCK_M, DIM_V, BLOCK_V, DESC)
    if TAIL:
        q_tile, grad = _own_rows(q_tile, i, end), _own_rows(grad, i, end)
    s, slope = _scores(k_tile, q_tile, scale, softcap, SOFTCAP)
    ok = _visible(_across(row), _down(col), num_fields, window, True, WINDOW)
    p = tl.where(ok, tl.exp2(s - lse[None, :]), 0.0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    dp = tl.dot(v_tile, tl.trans(grad), input_precision="ieee")
    ds = p * (dp - delta[None, :]) * slope
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dkdv_kernel(
    q, k, v, d_out, lse_ptr, delta_ptr, dk_ptr, dv_ptr, work_ptr, segment_ptr, position_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    T, num_fields, scale, window, softcap,
    H: tl.constexpr, HKV: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROW_HEADS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N columns, BLOCK_M rows at a time; scores are transposed, [N, M]."""
    item, kv_head = tl.program_id(0) // HKV, tl.program_id(0) % HKV
    start = tl.load(work_ptr + 3 * item)
    end = tl.load(work_ptr + 3 * item + 1)
    first = tl.load(work_ptr + 3 * item + 2)
    if first < 0:
        return
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if start < 0:
        _store(dk_ptr, dk, first, end, kv_head, ROW_HEADS, DIM)
        _store(dv_ptr, dv, first, end, kv_head, ROW_HEADS, DIM_V)
        return
    k_tile = _load((k, stride_kt, stride_kh), first, end, kv_head, BLOCK_N, DIM, BLOCK_D, DESC)
    v_tile = _load((v, stride_vt, stride_vh), first, end, kv_head, BLOCK_N, DIM_V, BLOCK_V, DESC)
    col = _marks(segment_ptr, position_ptr, first, end, NOBODY, BLOCK_N, WINDOW)
    queries, gradients = (q, stride_qt, stride_qh), (d_out, H * DIM_V, DIM_V)
    SMALL: tl.constexpr = BLOCK_D <= 64 and BLOCK_V <= 64
    CLEAN: tl.constexpr = DESC and (SMALL or H == HKV)  # groups spill at 128
    full = first + (end - first) // BLOCK_M * BLOCK_M if CLEAN else end
    for g in range(H // HKV):
        head = kv_head * (H // HKV) + g
        for i in range(first, full, BLOCK_M):
            dk, dv = _dkdv_step(
                dk, dv, k_tile, v_tile, col, queries, gradients, lse_ptr, delta_ptr, segment_ptr,
                position_ptr, i, end, head, T, num_fields, scale, window, softcap,
                BLOCK_M, DIM, DIM_V, WINDOW, SOFTCAP, DESC, False,
            )  # fmt: skip
    if CLEAN:  # noqa: SIM102
        if full < end:
            for g in range(H // HKV):
                head = kv_head * (H // HKV) + g
                dk, dv = _dkdv_step(
                    dk, dv, k_tile, v_tile, col, queries, gradients, lse_ptr, delta_ptr,
                    segment_ptr, position_ptr, full, end, head, T, num_fields, scale, window,
                    softcap, BLOCK_M, DIM, DIM_V, WINDOW, SOFTCAP, DESC, True,
                )  # fmt: skip
    _store(dk_ptr, dk * scale, first, end, kv_head, ROW_HEADS, DIM)
    _store(dv_ptr, dv, first, end, kv_head, ROW_HEADS, DIM_V)


def tiling(kernel: str, dim: int, dtype: torch.dtype, desc: bool) -> Tiling:
    """The cut of "fwd", "dq" or "dkdv" for the wider of q and v: in 16 bits none spills where it is
    meant for.

    Found by compiling (docs/attention.md has registers and shared memory); timings on a GPU are
    still to come. A wgmma needs 64 own rows, hence 64 with descriptors.
    """
    if dtype == torch.float32:
        return Tiling(32, 32, 4, 1) if dim <= 64 else Tiling(16, 16, 4, 1)
    size = 0 if dim <= 64 else 1 if dim <= 128 else 2
    return (_DESCRIPTOR_TILINGS if desc else _POINTER_TILINGS)[kernel][size]


# For head sizes up to 64, 128 and 256.
_POINTER_TILINGS = {
    "fwd": (Tiling(64, 64, 4, 2), Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 1)),
    "dq": (Tiling(64, 32, 4, 2), Tiling(64, 64, 8, 2), Tiling(32, 32, 8, 1)),
    "dkdv": (Tiling(64, 32, 4, 2), Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 1)),
}
_DESCRIPTOR_TILINGS = {
    "fwd": (Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 2)),
    "dq": (Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 1)),
    "dkdv": (Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 2)),
}


WorkLists = dict[tuple[int, bool], Tensor]
"""Work lists of one pack, by tile and order; its layers share them."""


def _work_list(
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


def _descriptors_fit(tensors: tuple[Tensor, ...]) -> bool:
    """Whether to read through tensor descriptors: sm_90, 16-bit, and strides that TMA can take."""
    q = tensors[0]
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype.itemsize == 2
        and all(
            x.numel() > 0
            and x.data_ptr() % 16 == 0
            and (x.stride(0) * x.dtype.itemsize) % 16 == 0
            and (x.stride(1) * x.dtype.itemsize) % 16 == 0
            for x in tensors
        )
    )


def _source(x: Tensor, rows: int, desc: bool) -> Tensor | TensorDescriptor:
    """What `_load` reads `rows` rows from: x [T, h, d], or its descriptor [h, T, d]."""
    if not desc:
        return x
    shape, strides = (x.shape[i] for i in (1, 0, 2)), (x.stride(i) for i in (1, 0, 2))
    return TensorDescriptor(x, list(shape), list(strides), [1, rows, _padded(x.shape[2])])


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _constants(q: Tensor, v: Tensor, context: Context, desc: bool, cut: Tiling) -> dict[str, int]:
    """What all three kernels are compiled for, and how they are launched."""
    return {
        "H": q.shape[1],
        "HKV": v.shape[1],
        "DIM": q.shape[2],
        "BLOCK_D": _padded(q.shape[2]),
        "DIM_V": v.shape[2],
        "BLOCK_V": _padded(v.shape[2]),
        "WINDOW": 1 if context.window > 0 else 2 if context.chunk > 0 else 0,
        "SOFTCAP": context.softcap > 0.0,
        "DESC": desc,
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
    }


def _strides(*tensors: Tensor) -> list[int]:
    return [n for x in tensors for n in x.stride()[:2]]


def _mask(context: Context) -> tuple[float, ...]:
    """num_fields, scale, window and softcap as the kernels take them."""
    return (
        context.num_fields, context.scale, context.window or context.chunk, context.softcap
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, context: Context, lists: WorkLists | None = None
) -> tuple[Tensor, Tensor]:
    """out [T, H, dv] and lse [H, T] fp32."""
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    prefix_k, prefix_v, sinks = context.prefix_k, context.prefix_v, context.sinks
    desc = _descriptors_fit((q, k, v, prefix_k, prefix_v))
    cut = tiling("fwd", max(q.shape[2], v.shape[2]), q.dtype, desc)
    work, capacity = _work_list(context.cu_seqlens, q.shape[0], cut.own, True, lists=lists)
    _fwd_kernel[(capacity * q.shape[1],)](
        _source(q, cut.own, desc),
        *(_source(x, cut.step, desc) for x in (k, v, prefix_k, prefix_v)),
        out, lse, lse if sinks is None else sinks.float().contiguous(), work,
        context.segment, context.prefix_segment, context.position, context.prefix_position,
        *_strides(q, k, v, prefix_k, prefix_v), q.shape[0], prefix_k.shape[0], *_mask(context),
        BLOCK_M=cut.own, BLOCK_N=cut.step, SINKS=sinks is not None,
        **_constants(q, v, context, desc, cut),
    )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, context: Context,
    lists: WorkLists | None = None, into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [T, H, d], dk [T, Hkv, d], dv [T, Hkv, dv].

    Sinks are in lse already. `into`: where to write them; heads lie side by side, and rows may be
    any number of heads apart, the same for dk and dv.
    """
    if into is None:
        into = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dq, dk, dv = into
    if q.numel() == 0:
        return dq, dk, dv
    d_out, delta, rows = d_out.contiguous(), torch.empty_like(lse), q.shape[0]
    prefix_k, prefix_v = context.prefix_k, context.prefix_v
    desc = _descriptors_fit((q, k, v, prefix_k, prefix_v, d_out, out))
    widest = max(q.shape[2], v.shape[2])

    cut = tiling("dq", widest, q.dtype, desc)
    work, capacity = _work_list(context.cu_seqlens, rows, cut.own, True, lists=lists)
    _dq_kernel[(capacity * q.shape[1],)](
        _source(q, cut.own, desc),
        *(_source(x, cut.step, desc) for x in (k, v, prefix_k, prefix_v)),
        *(_source(x, cut.own, desc) for x in (d_out, out)),
        lse, delta, dq, work,
        context.segment, context.prefix_segment, context.position, context.prefix_position,
        *_strides(q, k, v, prefix_k, prefix_v), rows, prefix_k.shape[0], *_mask(context),
        BLOCK_M=cut.own, BLOCK_N=cut.step, ROW_HEADS=dq.stride(0) // q.shape[2],
        **_constants(q, v, context, desc, cut),
    )  # fmt: skip

    # At 256 wgmma's layouts of dk and dv spill, mma.sync's do not.
    desc = desc and _padded(widest) <= 128
    cut = tiling("dkdv", widest, q.dtype, desc)
    work, capacity = _work_list(context.cu_seqlens, rows, cut.own, False, lists=lists)
    _dkdv_kernel[(capacity * k.shape[1],)](
        _source(q, cut.step, desc), _source(k, cut.own, desc), _source(v, cut.own, desc),
        _source(d_out, cut.step, desc), lse, delta, dk, dv, work,
        context.segment, context.position, *_strides(q, k, v), rows, *_mask(context),
        BLOCK_M=cut.step, BLOCK_N=cut.own, ROW_HEADS=dk.stride(0) // k.shape[2],
        **_constants(q, v, context, desc, cut),
    )  # fmt: skip
    return dq, dk, dv
