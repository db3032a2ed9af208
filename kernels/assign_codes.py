"""Triton kernels of `userip_fast.ops.assign_codes`.

Many codes:

- `_rank_kernel`: score[n, k] = x_n . c_k - |c_k|^2 / 2, a row's running best two codes in
  registers. One program owns BLOCK_N rows of one book and streams one of its SLICES of codewords:
  nothing is atomic and ties go to the lowest id. Programs that run together read the same rows and
  codewords, which stay in L2.
- `_decide_kernel`: the best of all slices, its distance formed directly in fp32; the second best
  likewise where their scores are too close to tell, or where it is asked for.

Few codes of bf16 vectors, sm_90:

- `_few_kernel` reads x once: scores, and |x|^2 - 2 score for distances. A codeword is the sum of
  three bf16 parts, or one where it is bf16. Up to K = 16 and D = 256 it adds up the sums too.
- `_redo_kernel`: directly and in fp32 what that form of the distance cannot tell.

Sums, added in a fixed order:

- `_onehot_sum_kernel`, few codes of 16-bit vectors: one-hot rows times x on tensor cores, x read in
  its own order. A row of NaN spoils all sums, but such x is refused as a whole.
- `_sum_kernel`: rows gathered in the order of their codes, in pieces of at most PIECE rows of one
  code, so that a popular code is many programs' work; `_combine_kernel` adds a code's pieces.

x [J, N, D] fp32, bf16 or fp16, any strides; codewords [sum K, D] contiguous; `first` [J + 1] int64
is where each book's codes begin. Products are accumulated in fp32. `_rank_kernel` ranks bf16
vectors by codewords rounded to bf16, and fp32 and fp16 vectors as three TF32 products. The variant
by tensor descriptors (TMA, sm_90) and the one by pointers are the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """Tile and launch options of `_rank_kernel`."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int


# By descriptors, (most codes, tile): the fastest of those tried on an H200 (docs/gpu.md).
# The others are chosen by registers, shared memory and wgmma in the generated code (see
# tests/ops/test_assign_codes_codegen.py). Shared memory of the pointer form fits sm_86 and sm_89.
TMA = (
    (16, Config(256, 16, 128, 8, 3)),
    (64, Config(128, 64, 64, 4, 4)),
    (128, Config(128, 128, 64, 8, 4)),
    (None, Config(128, 256, 64, 8, 4)),
)
POINTER = Config(128, 128, 32, 8, 4)
TF32 = Config(64, 64, 32, 8, 3)
FEW = 64  # most codes of `_few_kernel` and `_onehot_sum_kernel`
WHOLE = 256  # most columns of a tile of whole rows
PIECE = 256
# Of |x|^2 + |a|^2 + |b|^2: nearer scores may be in the wrong order, by fp32 accumulation, by the
# bits that a packed score gives to its column, or by codewords rounded to bf16.
CLOSE, CLOSE_PACKED, CLOSE_ROUNDED = 2.0**-17, 2.0**-14, 2.0**-7
SMALL = 2.0**-3  # of |x|^2: smaller distances are formed directly
MOST = 1e37  # |c|^2 of a codeword: then x.c overflows float32 only where |x - c|^2 does too
BAD, ROUNDED = tl.constexpr(1), tl.constexpr(2)  # marks of a codeword: not to be used; not in bf16
CHANGED, BAD_WORD, NOT_FINITE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FLAGS = 4
"""Flags of a call [FLAGS] int32, zeroed by the first kernel and read once, after the last: a code
changed after the sums were taken, a codeword is bad, a row of x is."""


@triton.jit
def _prepare_kernel(
    codewords_ptr,  # [sum K, D], rows contiguous
    active_ptr,  # [sum K] bool, or anything
    words_ptr,  # [sum K, D] fp32, where WORDS
    half_norm_ptr,  # [programs] fp32; Inf for retired codes and for rows past K
    mark_ptr,  # [programs] int32
    parts_ptr,  # [PARTS * programs, D], of `_few_kernel`'s or `_rank_kernel`'s type
    flags_ptr,
    K,
    D,
    MOST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACTIVE: tl.constexpr,
    WORDS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row of the codebook: half its squared norm, marks, and its parts."""
    k = tl.program_id(0).to(tl.int64)
    depth = tl.arange(0, BLOCK_D)
    end = tl.where(k < K, D, 0)  # of rows past K nothing is read
    square = tl.zeros((BLOCK_D,), tl.float64)
    for d0 in range(0, D, BLOCK_D):
        ok = d0 + depth < end
        c = tl.load(codewords_ptr + k * D + d0 + depth, mask=ok, other=0.0).to(tl.float64)
        square += c * c
    total = tl.sum(square, 0)
    mark = tl.where(total <= MOST, 0, BAD)
    norm = tl.maximum(tl.sqrt(total).to(tl.float32), 1e-12)
    inexact = tl.zeros((BLOCK_D,), tl.int32)
    square = tl.zeros((BLOCK_D,), tl.float64)
    for d0 in range(0, D, BLOCK_D):
        at = d0 + depth
        ok = at < end
        c = tl.load(codewords_ptr + k * D + at, mask=ok, other=0.0).to(tl.float32)
        if NORMALIZE:
            c = tl.div_rn(c, norm + tl.zeros_like(c))
        if WORDS:
            tl.store(words_ptr + k * D + at, c, mask=ok)
        square += c.to(tl.float64) * c.to(tl.float64)
        rest = c
        for part in tl.static_range(PARTS):
            low = rest.to(parts_ptr.dtype.element_ty)
            place = (part * tl.num_programs(0) + k) * D + at
            tl.store(parts_ptr + place, low, mask=at < D)
            rest = rest - low.to(tl.float32)
        if PARTS > 0:
            inexact = inexact | (rest != 0).to(tl.int32)
    half_norm = (tl.sum(square, 0) / 2).to(tl.float32)
    if ACTIVE:
        end = tl.where(tl.load(active_ptr + tl.minimum(k, K - 1)) != 0, end, 0)
    tl.store(half_norm_ptr + k, tl.where(end > 0, half_norm, float("inf")))
    tl.store(mark_ptr + k, mark + tl.where(tl.max(inexact, 0) > 0, ROUNDED, 0))
    if k == 0:
        tl.store(flags_ptr + tl.arange(0, 4), tl.zeros((4,), tl.int32))


@triton.jit
def _tell(mark_ptr, flags_ptr, count, BLOCK: tl.constexpr):
    """Raises the flag of a bad codeword; one program's work."""
    bad = tl.zeros((BLOCK,), tl.int32)
    for k0 in range(0, count, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        bad = bad | (tl.load(mark_ptr + k, mask=k < count, other=0) & BAD)
    if tl.max(bad, 0) > 0:
        tl.store(flags_ptr + BAD_WORD, 1)


@triton.jit
def _two_of(a, a2, b, b2):
    """The greatest two of two pairs, each in falling order."""
    return tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(a2, b2))


@triton.jit
def _packed_top_two(score, columns, BLOCK_K: tl.constexpr):
    """A tile's best two and their columns, of equals those of the lower columns first.

    One pass over integers: a score's bits in the order of integers, its lowest bits the column.
    The scores come back without those bits.
    """
    low: tl.constexpr = BLOCK_K - 1
    bits = score.to(tl.int32, bitcast=True) & ~low
    key = (bits ^ ((bits >> 31) & (0x7FFFFFFF & ~low))) | (low - columns)[None, :]
    top, second = tl.reduce((key, tl.full(key.shape, -(2**31), tl.int32)), 1, _two_of)
    at, second_at = low - (top & low), low - (second & low)
    top, second = top & ~low, second & ~low
    top = top ^ ((top >> 31) & (0x7FFFFFFF & ~low))
    second = second ^ ((second >> 31) & (0x7FFFFFFF & ~low))
    return (
        top.to(tl.float32, bitcast=True),
        at,
        second.to(tl.float32, bitcast=True),
        second_at,
    )


@triton.jit
def _merge(best, best_id, second, second_id, top, top_id, next_top, next_id):
    """The best two of two pairs; of equals those of the first pair, whose ids are lower."""
    wins = top > best
    runner_up = tl.where(wins, next_top, top)
    runner_id = tl.where(wins, next_id, top_id)
    old = tl.where(wins, best, second)
    old_id = tl.where(wins, best_id, second_id)
    # Minus infinity is a retired code or none at all: `old_id` then says -1 or stays harmless.
    keep = (old >= runner_up) | (runner_up == -float("inf"))
    second = tl.where(keep, old, runner_up)
    second_id = tl.where(keep, tl.where(old == -float("inf"), -1, old_id), runner_id)
    return tl.where(wins, top, best), tl.where(wins, top_id, best_id), second, second_id


@triton.jit
def _rank_kernel(
    x,  # pointer or descriptor [J, N, D] of blocks [1, BLOCK_N, BLOCK_D]
    codewords,  # pointer or descriptor [sum K, D] of blocks [BLOCK_K, BLOCK_D]
    half_norm_ptr,  # [sum K] fp32; Inf for retired codes
    norm_ptr,  # [J, N] fp32, |x|, where vectors are to have length 1
    first_ptr,
    ids_ptr,  # [SLICES, 2, J, N] int32, the best two; -1 where there is no second
    scores_ptr,  # [SLICES, 2, J, N] fp32, theirs
    N,
    D,
    stride_xj,
    stride_xn,
    stride_xd,
    NORMALIZE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    SLICES: tl.constexpr,
    PACKED: tl.constexpr,  # the tile's best two in one pass; see `_packed_top_two`
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    j = tl.program_id(1)
    first = tl.load(first_ptr + j)
    size = (tl.load(first_ptr + j + 1) - first).to(tl.int32)
    piece = tl.program_id(0) % SLICES  # of one tile of rows side by side
    begin = tl.cdiv(size, BLOCK_K) * piece // SLICES * BLOCK_K
    end = tl.minimum(size, tl.cdiv(size, BLOCK_K) * (piece + 1) // SLICES * BLOCK_K)
    n0 = tl.program_id(0) // SLICES * BLOCK_N
    rows = n0 + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    depth = tl.arange(0, BLOCK_D)
    row_ok = rows < N
    best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    second = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    best_id = tl.zeros((BLOCK_N,), tl.int32)
    second_id = tl.full((BLOCK_N,), -1, tl.int32)
    if NORMALIZE:
        scale = 1 / tl.load(norm_ptr + j.to(tl.int64) * N + rows, mask=row_ok, other=1.0)
    if not TMA:
        x_rows = x + j.to(tl.int64) * stride_xj + rows.to(tl.int64)[:, None] * stride_xn
    for k0 in range(begin, end, BLOCK_K):
        score = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        k = k0 + columns
        code_ok = k < size
        for d0 in range(0, D, BLOCK_D):
            if TMA:
                xs = x.load([j, n0, d0]).reshape(BLOCK_N, BLOCK_D)
                # Rows of the next book may come along; their half norm is Inf below.
                c = codewords.load([(first + k0).to(tl.int32), d0])
            else:
                d = d0 + depth
                d_ok = d < D
                xs = tl.load(
                    x_rows + d.to(tl.int64)[None, :] * stride_xd,
                    mask=row_ok[:, None] & d_ok[None, :],
                    other=0.0,
                ).to(codewords.dtype.element_ty)
                c = tl.load(
                    codewords + (first + k)[:, None] * D + d[None, :],
                    mask=code_ok[:, None] & d_ok[None, :],
                    other=0.0,
                )
            score = tl.dot(xs, c.T, score, input_precision=PRECISION)
        if NORMALIZE:
            score *= scale[:, None]
        half_norm = tl.load(half_norm_ptr + first + k, mask=code_ok, other=float("inf"))
        score -= half_norm[None, :]
        # The tile's best two, lowest id first among equals, then merged behind earlier ones.
        if PACKED:
            top, at, next_top, next_at = _packed_top_two(score, columns, BLOCK_K)
        else:
            top, at = tl.max(score, 1, return_indices=True)
            score = tl.where(columns[None, :] == at[:, None], -float("inf"), score)
            next_top, next_at = tl.max(score, 1, return_indices=True)
        best, best_id, second, second_id = _merge(
            best, best_id, second, second_id, top, k0 + at, next_top, k0 + next_at
        )
    plane = tl.num_programs(1).to(tl.int64) * N
    out = 2 * piece * plane + j.to(tl.int64) * N + rows
    tl.store(ids_ptr + out, best_id, mask=row_ok)
    tl.store(ids_ptr + out + plane, second_id, mask=row_ok)
    tl.store(scores_ptr + out, best, mask=row_ok)
    tl.store(scores_ptr + out + plane, second, mask=row_ok)


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
        _tell(mark_ptr, flags_ptr, BLOCK_K, BLOCK_K)
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
def _distances(
    x_rows,  # [BLOCK_N, 1] pointers
    word_rows,
    norm,  # [BLOCK_N, 1]
    row_ok,
    D,
    stride_xd,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_N] each, |x - word|^2 formed directly, and |x|^2."""
    distance = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D))[None, :]
        ok = row_ok[:, None] & (d < D)
        x = tl.load(x_rows + d.to(tl.int64) * stride_xd, mask=ok, other=0.0).to(tl.float32)
        if NORMALIZE:
            x = tl.div_rn(x, norm)
        to_word = x - tl.load(word_rows + d, mask=ok, other=0.0)
        distance += tl.sum(to_word * to_word, 1)
        square += tl.sum(x * x, 1)
    return distance, square


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
                near, _ = _distances(
                    x_rows, a_words, 0.0, todo, D, stride_xd, False, BLOCK_N, BLOCK_D
                )
                far, _ = _distances(
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


@triton.jit
def _decide_kernel(
    x_ptr,
    words_ptr,  # [sum K, D] fp32
    half_norm_ptr,
    norm_ptr,
    first_ptr,
    pair_ptr,  # [SLICES, 2, J, N], from _rank_kernel
    scores_ptr,
    mark_ptr,  # [sum K] int32
    flags_ptr,
    ids_ptr,  # [J, N] int64; -1 where the distance is not finite
    near_ptr,  # [J, N] fp32
    far_ptr,
    N,
    D,
    words,  # sum K
    stride_xj,
    stride_xn,
    stride_xd,
    CLOSE: tl.constexpr,
    CLOSE_ROUNDED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NEAR: tl.constexpr,  # else ids alone, by their scores
    HAS_FAR: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1).to(tl.int64)
    row_ok = n < N
    at = j * N + n
    first = tl.load(first_ptr + j)
    plane = tl.num_programs(1).to(tl.int64) * N
    a = tl.load(pair_ptr + at, mask=row_ok, other=0)
    b = tl.load(pair_ptr + plane + at, mask=row_ok, other=-1)
    best = tl.load(scores_ptr + at, mask=row_ok, other=0.0)
    second = tl.load(scores_ptr + plane + at, mask=row_ok, other=-float("inf"))
    for piece in tl.static_range(1, SLICES):
        there = 2 * piece * plane + at
        best, a, second, b = _merge(
            best,
            a,
            second,
            b,
            tl.load(scores_ptr + there, mask=row_ok, other=-float("inf")),
            tl.load(pair_ptr + there, mask=row_ok, other=0),
            tl.load(scores_ptr + there + plane, mask=row_ok, other=-float("inf")),
            tl.load(pair_ptr + there + plane, mask=row_ok, other=-1),
        )
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        _tell(mark_ptr, flags_ptr, words, 1024)
    if not NEAR:
        odd = row_ok & ~(tl.abs(best) < float("inf"))  # NaN too
        tl.store(ids_ptr + at, tl.where(odd, -1, a).to(tl.int64), mask=row_ok)
        if tl.max(odd.to(tl.int32), 0) > 0:
            tl.store(flags_ptr + NOT_FINITE, 1)
        return
    has_b = b >= 0
    b_or_a = tl.where(has_b, b, a)
    x_rows = x_ptr + j * stride_xj + n[:, None] * stride_xn
    norm = tl.full((BLOCK_N, 1), 1.0, tl.float32)
    if NORMALIZE:
        norm = tl.load(norm_ptr + at, mask=row_ok, other=1.0)[:, None]
    a_words = words_ptr + ((first + a) * D)[:, None]
    near, square = _distances(
        x_rows, a_words, norm, row_ok, D, stride_xd, NORMALIZE, BLOCK_N, BLOCK_D
    )
    half_norms = tl.load(half_norm_ptr + first + a) + tl.load(half_norm_ptr + first + b_or_a)
    rounded = (tl.load(mark_ptr + first + a) | tl.load(mark_ptr + first + b_or_a)) & ROUNDED
    close = tl.where(rounded != 0, CLOSE_ROUNDED, CLOSE) * (square + 2 * half_norms)
    unsure = has_b & (best - second <= close)
    far = tl.full((BLOCK_N,), float("inf"), tl.float32)
    if HAS_FAR or tl.max(unsure.to(tl.int32), 0) > 0:
        b_words = words_ptr + ((first + b_or_a) * D)[:, None]
        far, _ = _distances(
            x_rows, b_words, norm, row_ok, D, stride_xd, NORMALIZE, BLOCK_N, BLOCK_D
        )
        far = tl.where(has_b, far, float("inf"))
    swap = (far < near) | ((far == near) & has_b & (b < a))
    distance = tl.where(swap, far, near)
    finite = tl.abs(distance) < float("inf")  # false for NaN too
    ids = tl.where(finite, tl.where(swap, b, a), -1).to(tl.int64)
    tl.store(ids_ptr + at, ids, mask=row_ok)
    tl.store(near_ptr + at, distance, mask=row_ok)
    if tl.max((row_ok & ~finite).to(tl.int32), 0) > 0:
        tl.store(flags_ptr + NOT_FINITE, 1)
    if HAS_FAR:
        tl.store(far_ptr + at, tl.where(swap, near, far), mask=row_ok)


@triton.jit
def _onehot_sum_kernel(
    x_ptr,  # [N, D] of one book, 16 bits
    ids_ptr,  # [N] int64
    sums_ptr,  # [SHARES, K, D] fp32
    counts_ptr,  # [SHARES, K] int64
    N,
    K,
    D,
    share_rows,
    stride_xn,
    stride_xd,
    CHAIN: tl.constexpr,  # rows that tensor cores add before fp32 does; they cut where it rounds
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    share = tl.program_id(0).to(tl.int64)
    begin = share * share_rows
    end = tl.minimum(begin + share_rows, N)
    k = tl.arange(0, BLOCK_K)
    rows = share * K + k
    if tl.program_id(1) == tl.num_programs(1) - 1:  # these count
        counts = tl.zeros((BLOCK_K,), tl.int32)
        for i in range(begin, end, BLOCK_N):
            n = i + tl.arange(0, BLOCK_N)
            ids = tl.load(ids_ptr + n, mask=n < end, other=-1).to(tl.int32)
            counts += tl.sum((k[:, None] == ids[None, :]).to(tl.int32), 1)
        tl.store(counts_ptr + rows, counts.to(tl.int64), mask=k < K)
    else:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        columns = x_ptr + d.to(tl.int64)[None, :] * stride_xd
        total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for i in range(begin, end, CHAIN):
            part = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
            for offset in range(0, CHAIN, BLOCK_N):
                n = i + offset + tl.arange(0, BLOCK_N)
                ids = tl.load(ids_ptr + n, mask=n < end, other=-1).to(tl.int32)
                ok = (n < end)[:, None] & (d < D)[None, :]
                x = tl.load(columns + n[:, None] * stride_xn, mask=ok, other=0.0)
                part = tl.dot((k[:, None] == ids[None, :]).to(x.dtype), x, part)
            total += part
        ok = (k < K)[:, None] & (d < D)[None, :]
        tl.store(sums_ptr + rows[:, None] * D + d[None, :], total, mask=ok)


@triton.jit
def _sum_kernel(
    x_ptr,  # [N, D] of one book
    norm_ptr,  # [N]
    order_ptr,  # [N] int64, rows in the order of their codes, stable
    start_ptr,  # [K + 1] int64, where each code's rows begin in it
    first_piece_ptr,  # [K + 1] int64
    code_ptr,  # [pieces] int64, whose piece it is; K: nobody's
    out_ptr,  # [pieces, D] fp32
    K,
    D,
    stride_xn,
    stride_xd,
    NORMALIZE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_ok = d < D
    code = tl.load(code_ptr + piece)
    if code < K:
        begin = tl.load(start_ptr + code) + (piece - tl.load(first_piece_ptr + code)) * PIECE
        end = tl.minimum(begin + PIECE, tl.load(start_ptr + code + 1))
        total = tl.zeros((BLOCK_D,), tl.float32)
        for i in range(begin, end, BLOCK_N):
            place = i + tl.arange(0, BLOCK_N)
            ok = place < end
            rows = tl.load(order_ptr + place, mask=ok, other=0)
            x = tl.load(
                x_ptr + rows[:, None] * stride_xn + d.to(tl.int64)[None, :] * stride_xd,
                mask=ok[:, None] & d_ok[None, :],
                other=0.0,
            ).to(tl.float32)
            if NORMALIZE:
                x = tl.div_rn(x, tl.load(norm_ptr + rows, mask=ok, other=1.0)[:, None])
            total += tl.sum(x, 0)
        tl.store(out_ptr + piece * D + d, total, mask=d_ok)


@triton.jit
def _combine_kernel(
    piece_ptr,  # [pieces, D] fp32
    first_piece_ptr,
    sums_ptr,  # [K, D] fp32
    D,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for piece in range(tl.load(first_piece_ptr + k), tl.load(first_piece_ptr + k + 1)):
        total += tl.load(piece_ptr + piece * D + d, mask=d < D, other=0.0)
    tl.store(sums_ptr + k * D + d, total, mask=d < D)


def _descriptors(x: Tensor, words: Tensor, config: Config) -> tuple[Any, Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor(x, x.shape, x.stride(), [1, config.block_n, config.block_d]),
        TensorDescriptor(words, words.shape, words.stride(), [config.block_k, config.block_d]),
    )


def takes_tma(x: Tensor) -> bool:
    """Whether the hardware can copy tiles of `x`: bf16, 16-byte rows, sm_90 or later."""
    return (
        x.is_cuda
        and torch.cuda.get_device_capability(x.device)[0] >= 9
        and x.dtype == torch.bfloat16
        and x.stride(2) == 1
        and x.data_ptr() % 16 == 0
        and all(s * x.element_size() % 16 == 0 for s in (x.stride(0), x.stride(1), x.shape[2]))
    )


def _slices(x: Tensor, config: Config, size: int) -> int:
    """So many that the rows of all programs that run together stay in half of L2."""
    if not x.is_cuda:
        return 1
    device = torch.cuda.get_device_properties(x.device)
    tiles = device.multi_processor_count * config.block_n * x.shape[2] * x.element_size()
    wanted = triton.next_power_of_2(max(1, 2 * tiles // device.L2_cache_size))
    return min(8, wanted, triton.cdiv(size, config.block_k))


@cache
def _first(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[J + 1] where each book's codes begin; kept, since making it is a copy from the host."""
    return torch.tensor([0, *sizes], device=device).cumsum(0)


class Found(NamedTuple):
    """What a call gives: the results, and the flags that say whether they may be used.

    `flags` is None where `refused` is known already; reading it is the call's one wait.
    """

    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    flags: Tensor | None
    refused: bool = False

    def usable(self) -> bool:
        """Whether all codewords and all rows of x were finite, and their distances are."""
        if self.flags is None:
            return not self.refused
        _, bad_word, not_finite, _ = self.flags.tolist()
        return not (bad_word or not_finite)


def assign_codes(
    x: Tensor,
    codewords: Tensor,
    sizes: Sequence[int],
    active: Tensor | None,
    normalize: bool,
    need_second: bool,
    need_stats: bool,
    tma: bool | None = None,
    slices: int | None = None,
    few: bool | None = None,
    need_distance: bool = True,
) -> Found:
    """As `assign_codes_reference`; `tma` forces the variant (None: by `takes_tma`), `slices` how
    many parts of a codebook go over the same rows at the same time (None: by `_slices`), `few`
    whether `_few_kernel` ranks. Without `need_distance` there are ids alone (and statistics).

    Three kernels without statistics, and one wait, in `Found.usable`.

    Memory beside the outputs: the codebook in fp32 and in bf16, 16 to 128 N bytes, and for
    statistics 16 N bytes and a second codebook or 1/128 of x, whichever is more.
    """
    books, rows, dim = x.shape
    total = codewords.shape[0]
    codewords = codewords.contiguous()
    need_second &= need_distance
    ids = torch.empty((books, rows), dtype=torch.int64, device=x.device)
    near = torch.empty((books, rows if need_distance else 0), device=x.device)
    far = torch.empty((books, rows if need_second else 0), device=x.device)
    stats = total if need_stats else 0
    made = torch.zeros if rows == 0 else torch.empty
    counts = made(stats, dtype=torch.int64, device=x.device)
    sums = made((stats, dim), device=x.device)
    out = ids, near, far, counts, sums
    half = x.dtype == torch.bfloat16
    tma = takes_tma(x) if tma is None else tma
    if few is None:  # spills on older chips
        few = tma and max(sizes) <= FEW and not (normalize or need_second)
    if rows and few:
        found = []
        begin = 0
        for j, size in enumerate(sizes):
            part = slice(begin, begin + size)
            # By type, not value: a look at the codewords would be a wait for the device.
            parts = 1 if codewords.dtype == x.dtype and not normalize else 3
            mask = None if active is None else active[part]
            pair = _few(
                x[j], codewords[part], mask, ids[j], near[j], normalize, need_stats, tma, parts
            )
            if need_stats:
                counts[part], sums[part] = pair[0]
            found.append(pair[1])
            begin += size
        if len(found) == 1:
            return Found(out, found[0])
        return Found(out, torch.stack(found).amax(0))
    pieces_of_words = int(half)
    words, half_norm, mark, filter_words, flags = _prepare(
        codewords, active, normalize, total, pieces_of_words, x.dtype
    )
    if rows == 0:
        return Found(out, None, bool((mark & 1).any()))
    if not half:
        filter_words = words
    norm = words
    if normalize:
        norm = torch.linalg.vector_norm(x, dim=2, dtype=torch.float32).clamp(min=1e-12)
    first = _first(tuple(sizes), x.device)
    config = POINTER if half else TF32
    if tma and half:
        config = next(c for most, c in TMA if most is None or max(sizes) <= most)
    pieces = _slices(x, config, max(sizes)) if slices is None else slices
    pair = torch.empty((pieces, 2, books, rows), dtype=torch.int32, device=x.device)
    scores = torch.empty(pair.shape, device=x.device)
    operands = _descriptors(x, filter_words, config) if tma else (x, filter_words)
    _rank_kernel[(triton.cdiv(rows, config.block_n) * pieces, books)](
        *operands,
        half_norm,
        norm,
        first,
        pair,
        scores,
        rows,
        dim,
        *x.stride(),
        NORMALIZE=normalize,
        TMA=tma,
        PRECISION="ieee" if half else "tf32x3",
        SLICES=pieces,
        PACKED=half,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    block_n = 4 if normalize else 8  # a division takes registers
    _decide_kernel[(triton.cdiv(rows, block_n), books)](
        x,
        words,
        half_norm,
        norm,
        first,
        pair,
        scores,
        mark,
        flags,
        ids,
        near,
        far,
        rows,
        dim,
        total,
        *x.stride(),
        CLOSE=CLOSE_PACKED if half else CLOSE,
        CLOSE_ROUNDED=CLOSE_ROUNDED,
        NORMALIZE=normalize,
        NEAR=need_distance,
        HAS_FAR=need_second,
        SLICES=pieces,
        BLOCK_N=block_n,
        BLOCK_D=min(256, triton.next_power_of_2(dim)),
    )
    if need_stats:
        begin = 0
        for j, size in enumerate(sizes):
            part = slice(begin, begin + size)
            counts[part], sums[part] = _stats(x[j], ids[j], norm[j] if normalize else None, size)
            begin += size
    return Found(out, flags)


def _prepare(
    codewords: Tensor, active: Tensor | None, normalize: bool, programs: int, parts: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fp32 codewords, half norms and marks [programs], parts and flags; one launch."""
    (size, dim), device = codewords.shape, codewords.device
    as_they_are = codewords.dtype == torch.float32 and not normalize
    words = codewords if as_they_are else torch.empty((size, dim), device=device)
    half_norm = torch.empty(programs, device=device)
    mark = torch.empty(programs, dtype=torch.int32, device=device)
    stacked = torch.empty((parts * programs, dim), dtype=dtype, device=device)
    flags = torch.empty(FLAGS, dtype=torch.int32, device=device)
    _prepare_kernel[(programs,)](
        codewords,
        codewords if active is None else active.view(torch.uint8),
        words,
        half_norm,
        mark,
        stacked,
        flags,
        size,
        dim,
        MOST=MOST,
        NORMALIZE=normalize,
        ACTIVE=active is not None,
        WORDS=not as_they_are,
        PARTS=parts,
        BLOCK_D=min(1024, triton.next_power_of_2(dim)),
    )
    return words, half_norm, mark, stacked, flags


def few_config(block_k: int, dim: int, parts: int) -> tuple[Config, bool]:
    """Tile of `_few_kernel` for codebooks padded to `block_k`, and whether it has whole rows."""
    if block_k <= 16 and dim <= WHOLE:
        warps = 4 if parts == 1 else 8
        return Config(64, block_k, max(16, triton.next_power_of_2(dim)), warps, 3), True
    if block_k <= 16:
        return Config(256 if parts == 1 else 128, block_k, 128, 8, 3), False
    return Config(128, block_k, 64, 4, 4 if parts == 1 else 3), False


def _few(
    x: Tensor,
    codewords: Tensor,
    active: Tensor | None,
    ids: Tensor,
    near: Tensor,
    normalize: bool,
    need_stats: bool,
    tma: bool,
    parts: int,
) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
    """Writes ids [N] and near [N] (or [0]: ids alone) of one book of few codes.

    Returns its counts and sums where `need_stats`, and the flags. The codewords are the sum of
    `parts` tensors of x's type.
    """
    (rows, dim), size = x.shape, len(codewords)
    block_k = max(16, triton.next_power_of_2(size))
    words, padded, mark, stacked, flags = _prepare(
        codewords, active, normalize, block_k, parts, x.dtype
    )
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
    operands: tuple[Any, Any] = (x, stacked)
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        block = [config.block_n, config.block_k]
        operands = tuple(
            TensorDescriptor(t, t.shape, t.stride(), [n, config.block_d])
            for t, n in zip(operands, block)
        )
    _few_kernel[(programs,)](
        *operands,
        padded,
        ids,
        near,
        other,
        sums,
        counts,
        mark,
        flags,
        rows,
        size,
        dim,
        1.0,
        *x.stride(),
        CLOSE=CLOSE,
        SMALL=SMALL,
        NEAR=need_distance,
        SUMS=kept > 0,
        TMA=tma,
        PRECISION="ieee" if x.element_size() == 2 else "tf32x3",
        PARTS=parts,
        WHOLE=whole,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if need_distance:
        span = 256 if x.is_cuda else 32
        _redo_kernel[(triton.cdiv(rows, span),)](
            x,
            words,
            other,
            ids,
            near,
            flags,
            rows,
            dim,
            *x.stride(),
            SPAN=span,
            BLOCK_N=8,
            BLOCK_D=min(256, triton.next_power_of_2(dim)),
        )
    if not need_stats:
        return None, flags
    if not whole:
        return _stats(x, ids, None, size), flags
    if need_distance:
        flags = flags.cpu()  # the call's one wait
        if bool(flags[0]):
            return _stats(x, ids, None, size), flags
    return (counts.sum(0), sums.sum(0)), flags


def _stats(x: Tensor, ids: Tensor, norm: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """counts [size] and sums [size, D] of one book."""
    rows, dim = x.shape
    if size <= FEW and norm is None and x.element_size() == 2:
        block_k = max(16, triton.next_power_of_2(size))
        block_d = 128 if block_k <= 32 else 64
        slabs = triton.cdiv(dim, block_d)
        shares = max(1, min(2048 // slabs, (1 << 24) // (size * dim), rows // 1024))
        sums = torch.empty((shares, size, dim), device=x.device)
        counts = torch.empty((shares, size), dtype=torch.int64, device=x.device)
        _onehot_sum_kernel[(shares, slabs + 1)](
            x,
            ids,
            sums,
            counts,
            rows,
            size,
            dim,
            triton.cdiv(rows, shares),
            *x.stride(),
            CHAIN=1024,
            BLOCK_K=block_k,
            BLOCK_N=64,
            BLOCK_D=block_d,
            num_warps=4,
            num_stages=3,
        )
        return counts.sum(0), sums.sum(0)
    narrow = ids.to(torch.int16 if size < 1 << 15 else torch.int32)  # fewer passes of radix sort
    by_code, order = narrow.sort(stable=True)
    codes = torch.arange(size + 1, device=ids.device)
    start = torch.searchsorted(by_code, codes.to(narrow.dtype))
    counts = start.diff()
    first_piece = torch.nn.functional.pad(((counts + PIECE - 1) // PIECE).cumsum(0), (1, 0))
    most = size + rows // PIECE  # of pieces
    code = torch.searchsorted(first_piece[1:], torch.arange(most, device=ids.device), right=True)
    block_d = min(256, triton.next_power_of_2(dim))
    slabs = triton.cdiv(dim, block_d)
    pieces = torch.empty((most, dim), device=x.device)
    sums = torch.empty((size, dim), device=x.device)
    _sum_kernel[(most, slabs)](
        x,
        x if norm is None else norm,
        order,
        start,
        first_piece,
        code,
        pieces,
        size,
        dim,
        *x.stride(),
        NORMALIZE=norm is not None,
        PIECE=PIECE,
        BLOCK_N=32,
        BLOCK_D=block_d,
    )
    _combine_kernel[(size, slabs)](pieces, first_piece, sums, dim, BLOCK_D=block_d)
    return counts, sums
