"""Triton kernels of `userip_fast.ops.assign_codes`, for large codebooks.

`_rank_kernel`: score[n, k] = x_n . c_k - |c_k|^2 / 2, a row's running best two codes in registers.
One program owns BLOCK_N rows of one book and streams all its codewords, so that nothing is atomic
and ties go to the lowest id; programs that run together read the same codewords, which stay in L2.
`_decide_kernel`: the best two by their distance formed directly in fp32.
`_sum_kernel`: rows gathered in the order of their codes, a program owns a slab of columns of one
code's share; the shares are added in a fixed order.

x [J, N, D] fp32, bf16 or fp16, any strides; codewords [sum K, D] contiguous; `first` [J + 1] int64
is where each book's codes begin. Products are accumulated in fp32. bf16 vectors meet codewords
rounded to bf16, so that a codebook in fp32 is ranked up to that rounding; fp32 and fp16 vectors
are ranked as three TF32 products. The variant by tensor descriptors (TMA, sm_90) and the one by
pointers are the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
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


# Not measured yet; chosen by registers, shared memory and wgmma in the generated code (see
# tests/ops/test_assign_codes_codegen.py). Shared memory of the pointer form fits sm_86 and sm_89.
TMA = Config(128, 256, 64, 8, 4)
POINTER = Config(128, 128, 32, 8, 4)
TF32 = Config(64, 64, 32, 4, 3)


@triton.jit
def _rank_kernel(
    x,  # pointer or descriptor [J, N, D] of blocks [1, BLOCK_N, BLOCK_D]
    codewords,  # pointer or descriptor [sum K, D] of blocks [BLOCK_K, BLOCK_D]
    half_norm_ptr,  # [sum K] fp32; Inf for retired codes
    scale_ptr,  # [J, N] fp32, 1 / |x|
    first_ptr,
    ids_ptr,  # [2, J, N] int32, the best two; -1 where there is no second
    N,
    D,
    stride_xj,
    stride_xn,
    stride_xd,
    NORMALIZE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    j = tl.program_id(1)
    first = tl.load(first_ptr + j)
    size = (tl.load(first_ptr + j + 1) - first).to(tl.int32)
    n0 = tl.program_id(0) * BLOCK_N
    rows = n0 + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    depth = tl.arange(0, BLOCK_D)
    row_ok = rows < N
    best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    second = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    best_id = tl.zeros((BLOCK_N,), tl.int32)
    second_id = tl.full((BLOCK_N,), -1, tl.int32)
    if NORMALIZE:
        scale = tl.load(scale_ptr + j.to(tl.int64) * N + rows, mask=row_ok, other=0.0)
    if not TMA:
        x_rows = x + j.to(tl.int64) * stride_xj + rows.to(tl.int64)[:, None] * stride_xn
    for k0 in range(0, size, BLOCK_K):
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
        top, at = tl.max(score, 1, return_indices=True)
        score = tl.where(columns[None, :] == at[:, None], -float("inf"), score)
        next_top, next_at = tl.max(score, 1, return_indices=True)
        wins = top > best
        runner_up = tl.where(wins, next_top, top)
        runner_at = tl.where(wins, next_at, at)
        old = tl.where(wins, best, second)
        old_id = tl.where(wins, best_id, second_id)
        # Minus infinity is a retired code or none at all: `old_id` then says -1 or stays harmless.
        keep = (old >= runner_up) | (runner_up == -float("inf"))
        second = tl.where(keep, old, runner_up)
        second_id = tl.where(keep, tl.where(old == -float("inf"), -1, old_id), k0 + runner_at)
        best = tl.where(wins, top, best)
        best_id = tl.where(wins, k0 + at, best_id)
    out = ids_ptr + j.to(tl.int64) * N + rows
    tl.store(out, best_id, mask=row_ok)
    tl.store(out + tl.num_programs(1).to(tl.int64) * N, second_id, mask=row_ok)


@triton.jit
def _decide_kernel(
    x_ptr,
    words_ptr,  # [sum K, D] fp32
    scale_ptr,
    first_ptr,
    pair_ptr,  # [2, J, N] int32, from _rank_kernel
    ids_ptr,  # [J, N] int64; -1 where the distance is not finite
    near_ptr,  # [J, N] fp32
    far_ptr,
    N,
    D,
    stride_xj,
    stride_xn,
    stride_xd,
    NORMALIZE: tl.constexpr,
    HAS_FAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1).to(tl.int64)
    row_ok = n < N
    at = j * N + n
    first = tl.load(first_ptr + j)
    a = tl.load(pair_ptr + at, mask=row_ok, other=0)
    b = tl.load(pair_ptr + tl.num_programs(1).to(tl.int64) * N + at, mask=row_ok, other=0)
    has_b = b >= 0
    a_words = words_ptr + ((first + a) * D)[:, None]
    b_words = words_ptr + ((first + tl.where(has_b, b, a)) * D)[:, None]
    x_rows = x_ptr + j * stride_xj + n[:, None] * stride_xn
    near = tl.zeros((BLOCK_N,), tl.float32)
    far = tl.zeros((BLOCK_N,), tl.float32)
    if NORMALIZE:
        scale = tl.load(scale_ptr + at, mask=row_ok, other=0.0)
    for d0 in range(0, D, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D))[None, :]
        ok = row_ok[:, None] & (d < D)
        x = tl.load(x_rows + d.to(tl.int64) * stride_xd, mask=ok, other=0.0).to(tl.float32)
        if NORMALIZE:
            x *= scale[:, None]
        to_a = x - tl.load(a_words + d, mask=ok, other=0.0)
        to_b = x - tl.load(b_words + d, mask=ok, other=0.0)
        near += tl.sum(to_a * to_a, 1)
        far += tl.sum(to_b * to_b, 1)
    far = tl.where(has_b, far, float("inf"))
    swap = (far < near) | ((far == near) & has_b & (b < a))
    distance = tl.where(swap, far, near)
    finite = tl.abs(distance) < float("inf")  # false for NaN too
    ids = tl.where(finite, tl.where(swap, b, a), -1).to(tl.int64)
    tl.store(ids_ptr + at, ids, mask=row_ok)
    tl.store(near_ptr + at, distance, mask=row_ok)
    if HAS_FAR:
        tl.store(far_ptr + at, tl.where(swap, near, far), mask=row_ok)


@triton.jit
def _sum_kernel(
    x_ptr,  # [N, D] of one book
    scale_ptr,  # [N]
    order_ptr,  # [N] int64, rows in the order of their codes, stable
    start_ptr,  # [K + 1] int64, where each code's rows begin in it
    out_ptr,  # [SHARES, K, D] fp32
    K,
    D,
    stride_xn,
    stride_xd,
    NORMALIZE: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    share = tl.program_id(2).to(tl.int64)
    d_ok = d < D
    start = tl.load(start_ptr + k)
    count = tl.load(start_ptr + k + 1) - start
    begin = start + count * share // SHARES
    end = start + count * (share + 1) // SHARES
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
            x *= tl.load(scale_ptr + rows, mask=ok, other=0.0)[:, None]
        total += tl.sum(x, 0)
    tl.store(out_ptr + (share * K + k) * D + d, total, mask=d_ok)


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


def assign_codes(
    x: Tensor,
    codewords: Tensor,
    sizes: Sequence[int],
    active: Tensor | None,
    normalize: bool,
    need_second: bool,
    need_stats: bool,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `assign_codes_reference`; `tma` forces the variant (None: by `takes_tma`).

    Memory beside the outputs: the codebook in fp32 and in bf16, 8 N bytes, and for statistics
    16 N bytes and up to 64 MiB of partial sums.
    """
    books, rows, dim = x.shape
    words = codewords.float()
    words = torch.nn.functional.normalize(words, dim=1) if normalize else words.contiguous()
    half_norm = torch.linalg.vector_norm(words, dim=1, dtype=torch.float64).square().div(2).float()
    if active is not None:
        half_norm = half_norm.masked_fill(~active, torch.inf)
    scale = words
    if normalize:
        scale = torch.linalg.vector_norm(x, dim=2, dtype=torch.float32).clamp(min=1e-12)
        scale = scale.reciprocal()
    first = torch.tensor([0, *sizes], device=x.device).cumsum(0)
    pair = torch.empty((2, books, rows), dtype=torch.int32, device=x.device)
    ids = torch.empty((books, rows), dtype=torch.int64, device=x.device)
    near = torch.empty((books, rows), device=x.device)
    far = torch.empty((books, rows if need_second else 0), device=x.device)
    total = words.shape[0] if need_stats else 0
    counts = torch.zeros(total, dtype=torch.int64, device=x.device)
    sums = torch.zeros((total, dim), device=x.device)
    if rows == 0:
        return ids, near, far, counts, sums

    half = x.dtype == torch.bfloat16
    filter_words = words.bfloat16() if half else words
    tma = takes_tma(x) if tma is None else tma
    config = (TMA if tma else POINTER) if half else TF32
    operands = _descriptors(x, filter_words, config) if tma else (x, filter_words)
    _rank_kernel[(triton.cdiv(rows, config.block_n), books)](
        *operands,
        half_norm,
        scale,
        first,
        pair,
        rows,
        dim,
        *x.stride(),
        NORMALIZE=normalize,
        TMA=tma,
        PRECISION="ieee" if half else "tf32x3",
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _decide_kernel[(triton.cdiv(rows, 8), books)](
        x,
        words,
        scale,
        first,
        pair,
        ids,
        near,
        far,
        rows,
        dim,
        *x.stride(),
        NORMALIZE=normalize,
        HAS_FAR=need_second,
        BLOCK_N=8,
        BLOCK_D=min(512, triton.next_power_of_2(dim)),
    )
    if need_stats:
        begin = 0
        for j, size in enumerate(sizes):
            part = slice(begin, begin + size)
            counts[part], sums[part] = _stats(x[j], ids[j], scale[j] if normalize else None, size)
            begin += size
    return ids, near, far, counts, sums


def _stats(x: Tensor, ids: Tensor, scale: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """counts [size] and sums [size, D] of one book."""
    dim = x.shape[1]
    block_d = min(512, triton.next_power_of_2(dim))
    slabs = triton.cdiv(dim, block_d)
    by_code, order = ids.sort(stable=True)
    start = torch.searchsorted(by_code, torch.arange(size + 1, device=ids.device))
    # Few codes are cut into shares, so that there is work for every multiprocessor.
    shares = min(64, 1024 // (size * slabs), (1 << 24) // (size * dim), len(ids) // (32 * size))
    shares = max(1, shares)
    partial = torch.empty((shares, size, dim), device=x.device)
    _sum_kernel[(size, slabs, shares)](
        x,
        x if scale is None else scale,
        order,
        start,
        partial,
        size,
        dim,
        *x.stride(),
        NORMALIZE=scale is not None,
        SHARES=shares,
        BLOCK_N=16,
        BLOCK_D=block_d,
    )
    return start.diff(), partial.sum(0)
