"""Counts and sums per code, added in a fixed order.

- `_onehot_sum_kernel`, few codes of 16-bit vectors: one-hot rows times x on tensor cores, x read in
  its own order. A row of NaN spoils all sums, but such x is refused as a whole.
- `_sum_kernel`: rows gathered in the order of their codes, in pieces of at most PIECE rows of one
  code, so that a popular code is many programs' work; `_combine_kernel` adds a code's pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 64  # most codes of `_onehot_sum_kernel`
PIECE = 256


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


def count_and_sum(x: Tensor, ids: Tensor, norm: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """counts [size] and sums [size, D] of one book."""
    if size <= FEW and norm is None and x.element_size() == 2:
        return _by_onehot(x, ids, size)
    return _by_code(x, ids, norm, size)


def _by_onehot(x: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    rows, dim = x.shape
    block_k = max(16, triton.next_power_of_2(size))
    block_d = 128 if block_k <= 32 else 64
    slabs = triton.cdiv(dim, block_d)
    shares = max(1, min(2048 // slabs, (1 << 24) // (size * dim), rows // 1024))
    sums = torch.empty((shares, size, dim), device=x.device)
    counts = torch.empty((shares, size), dtype=torch.int64, device=x.device)
    _onehot_sum_kernel[(shares, slabs + 1)](
        x, ids, sums, counts, rows, size, dim, triton.cdiv(rows, shares), *x.stride(),
        CHAIN=1024, BLOCK_K=block_k, BLOCK_N=64, BLOCK_D=block_d, num_warps=4, num_stages=3,
    )  # fmt: skip
    return counts.sum(0), sums.sum(0)


def _by_code(x: Tensor, ids: Tensor, norm: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    rows, dim = x.shape
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
        x, x if norm is None else norm, order, start, first_piece, code, pieces, size, dim,
        *x.stride(),
        NORMALIZE=norm is not None, PIECE=PIECE, BLOCK_N=32, BLOCK_D=block_d,
    )  # fmt: skip
    _combine_kernel[(size, slabs)](pieces, first_piece, sums, dim, BLOCK_D=block_d)
    return counts, sums
