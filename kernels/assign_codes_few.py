"""Few codes of bf16 vectors, sm_90: one read of x.

- `_few_kernel`: scores, and |x|^2 - 2 score for distances. A codeword is the sum of three bf16
  parts, or one where it is bf16. Up to K = 16 and D = 256 it adds up the sums too.
- `_redo_kernel`: directly and in fp32 what that form of the distance cannot tell.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from userip_fast.kernels.assign_codes_shared import (
    CHANGED,
    CLOSE,
    NOT_FINITE,
    Config,
    distances,
    prepare,
    tell,
)
from userip_fast.kernels.assign_codes_sums import count_and_sum

WHOLE = 256  # most columns of a tile of whole rows
SMALL = 2.0**-3  # of |x|^2: smaller distances are formed directly


@triton.jit
def _few_kernel(
    x,  # [N, D], pointer or descriptor of blocks [BLOCK_N, BLOCK_D]
    words,  # [PARTS * BLOCK_K, D], pointer or descriptor of blocks [BLOCK_K, BLOCK_D]
    half_norm_ptr,  # [BLOCK_K] fp32; Inf for retired codes and past the end
    ids_ptr,  # [N] int64
    near_ptr,  # [N] fp32
    other_ptr,  # [N] int32, of rows for `_redo_kernel` the second best code or -1, else -2
    sums_ptr,  # [programs, K, D] fp32
    counts_ptr,  # [programs, K] int64
    mark_ptr,
    flags_ptr,
    N,
    K,
    D,
    one,  # 1.0, which the compiler must not know: it would add on within the dot's accumulator
    stride_xn,
    stride_xd,
    CLOSE: tl.constexpr,
    SMALL: tl.constexpr,
    NEAR: tl.constexpr,  # else ids alone: |x|^2 is not formed, nothing is done over
    SUMS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,  # of a codeword, 1 or 3
    WHOLE: tl.constexpr,  # whether BLOCK_D covers D
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.arange(0, BLOCK_K)
    depth = tl.arange(0, BLOCK_D)
    half_norm = tl.load(half_norm_ptr + k)
    longest = tl.max(tl.where(half_norm < float("inf"), half_norm, 0.0), 0)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    counts = tl.zeros((BLOCK_K,), tl.int32)
    if tl.program_id(0) == 0:
        tell(mark_ptr, flags_ptr, BLOCK_K, BLOCK_K)
    if WHOLE:  # they stay on chip
        c = _tile(words, 0, 0, D, D, 1, TMA, BLOCK_K, BLOCK_D, PARTS * BLOCK_K)
        if PARTS > 1:
            c1 = _tile(words, BLOCK_K, 0, D, D, 1, TMA, BLOCK_K, BLOCK_D, PARTS * BLOCK_K)
            c2 = _tile(words, 2 * BLOCK_K, 0, D, D, 1, TMA, BLOCK_K, BLOCK_D, PARTS * BLOCK_K)
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        n0 = tile * BLOCK_N
        n = n0 + tl.arange(0, BLOCK_N)
        row_ok = n < N
        score = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if WHOLE:
            xs = _tile(x, n0, 0, D, stride_xn, stride_xd, TMA, BLOCK_N, BLOCK_D, N)
            score = tl.dot(xs, c.T, score, input_precision=PRECISION)
            if PARTS > 1:
                score = tl.dot(xs, c1.T, score, input_precision=PRECISION)
                score = tl.dot(xs, c2.T, score, input_precision=PRECISION)
            if NEAR:
                wide = xs.to(tl.float32)
                square = tl.sum(wide * wide, 1)
        else:
            square = tl.zeros((BLOCK_N,), tl.float32)
            for d0 in range(0, D, BLOCK_D):
                xs = _tile(x, n0, d0, D, stride_xn, stride_xd, TMA, BLOCK_N, BLOCK_D, N)
                # Tensor cores cut where fp32 rounds: no long sums are left to them.
                some = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
                for part in tl.static_range(PARTS):
                    c = _tile(
                        words, part * BLOCK_K, d0, D, D, 1, TMA, BLOCK_K, BLOCK_D, PARTS * BLOCK_K
                    )
                    some = tl.dot(xs, c.T, some, input_precision=PRECISION)
                score += some * one
                if NEAR:
                    wide = xs.to(tl.float32)
                    square += tl.sum(wide * wide, 1)
        score -= half_norm[None, :]
        best, at = tl.max(score, 1, return_indices=True)
        if NEAR:
            score = tl.where(k[None, :] == at[:, None], -float("inf"), score)
        at = tl.where(best > -float("inf"), at, 0)  # NaN has none
        tl.store(ids_ptr + n, at.to(tl.int64), mask=row_ok)
        if NEAR:
            second, second_at = tl.max(score, 1, return_indices=True)
            near = square - 2 * best
            # Of nearly equal scores the distances decide. And where x and its codeword nearly
            # cancel, or overflow, so that this form of the distance says little, the direct form
            # is taken.
            close = best - second <= CLOSE * (square + 4 * longest)
            sure = (near >= SMALL * square) & (near < float("inf"))
            other = tl.where(close, second_at, tl.where(sure, -2, -1))
            tl.store(near_ptr + n, near, mask=row_ok)
            tl.store(other_ptr + n, other, mask=row_ok)
        else:
            odd = row_ok & ~(tl.abs(best) < float("inf"))  # NaN too
            if tl.max(odd.to(tl.int32), 0) > 0:
                tl.store(flags_ptr + NOT_FINITE, 1)
        if SUMS:
            onehot = (k[:, None] == at[None, :]) & row_ok[None, :]
            total += tl.dot(onehot.to(xs.dtype), xs, input_precision=PRECISION)
            counts += tl.sum(onehot.to(tl.int32), 1)
    if SUMS:
        rows = tl.program_id(0).to(tl.int64) * K + k
        ok = (k < K)[:, None] & (depth < D)[None, :]
        tl.store(sums_ptr + rows[:, None] * D + depth[None, :], total, mask=ok)
        tl.store(counts_ptr + rows, counts.to(tl.int64), mask=k < K)


@triton.jit
def _tile(
    source,
    row,
    column,
    D,
    stride_row,
    stride_column,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    end,
):
    """[ROWS, COLUMNS] of a matrix [end, D], zero past its edges."""
    if TMA:
        out = source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        d = column + tl.arange(0, COLUMNS)
        at = r.to(tl.int64)[:, None] * stride_row + d.to(tl.int64)[None, :] * stride_column
        out = tl.load(source + at, mask=(r < end)[:, None] & (d < D)[None, :], other=0.0)
    return out


@triton.jit
def _redo_kernel(
    x_ptr,  # [N, D]
    words_ptr,  # [K, D] fp32
    other_ptr,  # [N] int32, from `_few_kernel`
    ids_ptr,  # [N] int64; -1 where the distance is not finite
    near_ptr,
    flags_ptr,
    N,
    D,
    stride_xn,
    stride_xd,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * SPAN
    span = begin + tl.arange(0, SPAN)
    if tl.max(tl.load(other_ptr + span, mask=span < N, other=-2), 0) > -2:
        for i in range(0, SPAN, BLOCK_N):
            n = begin + i + tl.arange(0, BLOCK_N)
            other = tl.load(other_ptr + n, mask=n < N, other=-2)
            if tl.max(other, 0) > -2:
                todo = other > -2
                a = tl.load(ids_ptr + n, mask=todo, other=0)
                has_b = other >= 0
                b = tl.where(has_b, other.to(tl.int64), a)
                x_rows = x_ptr + n[:, None] * stride_xn
                a_words, b_words = words_ptr + a[:, None] * D, words_ptr + b[:, None] * D
                near, _ = distances(
                    x_rows, a_words, 0.0, todo, D, stride_xd, False, BLOCK_N, BLOCK_D
                )
                far, _ = distances(
                    x_rows, b_words, 0.0, todo, D, stride_xd, False, BLOCK_N, BLOCK_D
                )
                swap = has_b & ((far < near) | ((far == near) & (b < a)))
                distance = tl.where(swap, far, near)
                ids = tl.where(distance < float("inf"), tl.where(swap, b, a), -1)  # NaN: false
                tl.store(ids_ptr + n, ids, mask=todo)
                tl.store(near_ptr + n, distance, mask=todo)
                if tl.max((todo & (ids != a)).to(tl.int32), 0) > 0:
                    tl.store(flags_ptr + CHANGED, 1)
                if tl.max((todo & (ids < 0)).to(tl.int32), 0) > 0:
                    tl.store(flags_ptr + NOT_FINITE, 1)


def few_config(block_k: int, dim: int, parts: int) -> tuple[Config, bool]:
    """Tile of `_few_kernel` for codebooks padded to `block_k`, and whether it has whole rows."""
    if block_k <= 16 and dim <= WHOLE:
        warps = 4 if parts == 1 else 8
        return Config(64, block_k, max(16, triton.next_power_of_2(dim)), warps, 3), True
    if block_k <= 16:
        return Config(256 if parts == 1 else 128, block_k, 128, 8, 3), False
    return Config(128, block_k, 64, 4, 4 if parts == 1 else 3), False


def assign_few(
    x: Tensor, codewords: Tensor, active: Tensor | None, ids: Tensor, near: Tensor,
    normalize: bool, need_stats: bool, tma: bool,
) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:  # fmt: skip
    """Writes ids [N] and near [N] (or [0]: ids alone) of one book of few codes.

    Returns its counts and sums where `need_stats`, and the flags.
    """
    (rows, dim), size = x.shape, len(codewords)
    block_k = max(16, triton.next_power_of_2(size))
    # By type, not value: a look at the codewords would be a wait for the device.
    parts = 1 if codewords.dtype == x.dtype and not normalize else 3
    words = prepare(codewords, active, normalize, block_k, parts, x.dtype)
    config, whole = few_config(block_k, dim, parts)
    if not x.is_cuda:  # the interpreter
        config = config._replace(block_n=16, block_d=config.block_d if whole else 32)
    programs = triton.cdiv(rows, config.block_n)
    if whole:
        cuda = x.is_cuda
        many = torch.cuda.get_device_properties(x.device).multi_processor_count if cuda else 2
        programs = min(programs, 2 * many)
    need_distance = near.numel() > 0
    other = torch.empty(rows if need_distance else 0, dtype=torch.int32, device=x.device)
    kept = programs if whole and need_stats else 0
    counts = torch.empty((kept, size), dtype=torch.int64, device=x.device)
    sums = torch.empty((kept, size, dim), device=x.device)
    _few_kernel[(programs,)](
        *config.operands(tma, x, words.parts), words.half_norm, ids, near, other, sums, counts,
        words.mark, words.flags, rows, size, dim, 1.0, *x.stride(),
        CLOSE=CLOSE, SMALL=SMALL, NEAR=need_distance, SUMS=kept > 0, TMA=tma,
        PRECISION="ieee" if x.element_size() == 2 else "tf32x3", PARTS=parts, WHOLE=whole,
        **config.launch(),
    )  # fmt: skip
    flags = words.flags
    if need_distance:
        span = 256 if x.is_cuda else 32
        _redo_kernel[(triton.cdiv(rows, span),)](
            x, words.fp32, other, ids, near, flags, rows, dim, *x.stride(),
            SPAN=span, BLOCK_N=8, BLOCK_D=min(256, triton.next_power_of_2(dim)),
        )  # fmt: skip
    if not need_stats:
        return None, flags
    if whole and need_distance:
        flags = flags.cpu()  # the call's one wait
    if not whole or (need_distance and bool(flags[0])):
        return count_and_sum(x, ids, None, size), flags
    return (counts.sum(0), sums.sum(0)), flags
