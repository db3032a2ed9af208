"""Many codes: a GEMM whose rows keep their best two, then those two by their distances.

- `_rank_kernel`: score[n, k] = x_n . c_k - |c_k|^2 / 2, a row's running best two codes in
  registers. One program owns BLOCK_N rows of one book and streams one of its SLICES of codewords:
  nothing is atomic and ties go to the lowest id. Programs that run together read the same rows and
  codewords, which stay in L2.
- `_decide_kernel`: the best of all slices, its distance formed directly in fp32; the second best
  likewise where their scores are too close to tell, or where it is asked for.

bf16 vectors are ranked by codewords rounded to bf16, fp32 and fp16 vectors as three TF32 products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from userip_fast.kernels.assign_codes_shared import (
    CLOSE,
    NOT_FINITE,
    ROUNDED,
    Config,
    Words,
    distances,
    tell,
)

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
# As CLOSE, by the bits that a packed score gives to its column, or by codewords rounded to bf16.
CLOSE_PACKED, CLOSE_ROUNDED = 2.0**-14, 2.0**-7


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
        tell(mark_ptr, flags_ptr, words, 1024)
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
    near, square = distances(
        x_rows, a_words, norm, row_ok, D, stride_xd, NORMALIZE, BLOCK_N, BLOCK_D
    )
    half_norms = tl.load(half_norm_ptr + first + a) + tl.load(half_norm_ptr + first + b_or_a)
    rounded = (tl.load(mark_ptr + first + a) | tl.load(mark_ptr + first + b_or_a)) & ROUNDED
    close = tl.where(rounded != 0, CLOSE_ROUNDED, CLOSE) * (square + 2 * half_norms)
    unsure = has_b & (best - second <= close)
    far = tl.full((BLOCK_N,), float("inf"), tl.float32)
    if HAS_FAR or tl.max(unsure.to(tl.int32), 0) > 0:
        b_words = words_ptr + ((first + b_or_a) * D)[:, None]
        far, _ = distances(x_rows, b_words, norm, row_ok, D, stride_xd, NORMALIZE, BLOCK_N, BLOCK_D)
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


def rank(
    x: Tensor, words: Words, sizes: Sequence[int], normalize: bool, tma: bool,
    slices: int | None, ids: Tensor, near: Tensor, far: Tensor,
) -> Tensor:  # fmt: skip
    """Writes ids [J, N], near [J, N] (or [J, 0]: ids alone) and far [J, N] (or [J, 0]: without).

    Returns |x| [J, N] where vectors are to have length 1, else anything.
    """
    (books, rows, dim), half = x.shape, x.dtype == torch.bfloat16
    norm = words.fp32
    if normalize:
        norm = torch.linalg.vector_norm(x, dim=2, dtype=torch.float32).clamp(min=1e-12)
    first = _first(tuple(sizes), x.device)
    config = POINTER if half else TF32
    if tma and half:
        config = next(c for most, c in TMA if most is None or max(sizes) <= most)
    pieces = _slices(x, config, max(sizes)) if slices is None else slices
    pair = torch.empty((pieces, 2, books, rows), dtype=torch.int32, device=x.device)
    scores = torch.empty(pair.shape, device=x.device)
    _rank_kernel[(triton.cdiv(rows, config.block_n) * pieces, books)](
        *config.operands(tma, x, words.parts if half else words.fp32), words.half_norm, norm,
        first, pair, scores, rows, dim, *x.stride(),
        NORMALIZE=normalize, TMA=tma, PRECISION="ieee" if half else "tf32x3", SLICES=pieces,
        PACKED=half, **config.launch(),
    )  # fmt: skip
    block_n = 4 if normalize else 8  # a division takes registers
    _decide_kernel[(triton.cdiv(rows, block_n), books)](
        x, words.fp32, words.half_norm, norm, first, pair, scores, words.mark, words.flags, ids,
        near, far, rows, dim, len(words.mark), *x.stride(),
        CLOSE=CLOSE_PACKED if half else CLOSE, CLOSE_ROUNDED=CLOSE_ROUNDED, NORMALIZE=normalize,
        NEAR=near.numel() > 0, HAS_FAR=far.numel() > 0, SLICES=pieces, BLOCK_N=block_n,
        BLOCK_D=min(256, triton.next_power_of_2(dim)),
    )  # fmt: skip
    return norm
