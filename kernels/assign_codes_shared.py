"""What the Triton kernels of `assign_codes` share: a codebook made ready, and distances."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """Tile and launch options of a ranking kernel."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        """As a kernel's launch takes them."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def operands(self, tma: bool, x: Tensor, words: Tensor) -> tuple[Any, Any]:
        """x [..., N, D] and codewords [K, D], as they are or behind tensor descriptors."""
        if not tma:
            return x, words
        from triton.tools.tensor_descriptor import TensorDescriptor

        tile = [*[1] * (x.dim() - 2), self.block_n, self.block_d]
        return (
            TensorDescriptor(x, x.shape, x.stride(), tile),
            TensorDescriptor(words, words.shape, words.stride(), [self.block_k, self.block_d]),
        )


# Of |x|^2 + |a|^2 + |b|^2: nearer scores may be in the wrong order, by fp32 accumulation.
CLOSE = 2.0**-17
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
def tell(mark_ptr, flags_ptr, count, BLOCK: tl.constexpr):
    """Raises the flag of a bad codeword; one program's work."""
    bad = tl.zeros((BLOCK,), tl.int32)
    for k0 in range(0, count, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        bad = bad | (tl.load(mark_ptr + k, mask=k < count, other=0) & BAD)
    if tl.max(bad, 0) > 0:
        tl.store(flags_ptr + BAD_WORD, 1)


@triton.jit
def distances(
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


class Words(NamedTuple):
    """A codebook made ready."""

    fp32: Tensor  # [K, D]
    half_norm: Tensor  # [programs]
    mark: Tensor  # [programs]
    parts: Tensor  # [parts * programs, D], whose sum they are
    flags: Tensor  # [FLAGS]


def prepare(
    codewords: Tensor, active: Tensor | None, normalize: bool, programs: int, parts: int,
    dtype: torch.dtype,
) -> Words:  # fmt: skip
    """One launch of so many programs; `parts` tensors of `dtype` add up to the codewords."""
    (size, dim), device = codewords.shape, codewords.device
    as_they_are = codewords.dtype == torch.float32 and not normalize
    words = codewords if as_they_are else torch.empty((size, dim), device=device)
    half_norm = torch.empty(programs, device=device)
    mark = torch.empty(programs, dtype=torch.int32, device=device)
    stacked = torch.empty((parts * programs, dim), dtype=dtype, device=device)
    flags = torch.empty(FLAGS, dtype=torch.int32, device=device)
    _prepare_kernel[(programs,)](
        codewords, codewords if active is None else active.view(torch.uint8), words, half_norm,
        mark, stacked, flags, size, dim,
        MOST=MOST, NORMALIZE=normalize, ACTIVE=active is not None, WORDS=not as_they_are,
        PARTS=parts, BLOCK_D=min(1024, triton.next_power_of_2(dim)),
    )  # fmt: skip
    return Words(words, half_norm, mark, stacked, flags)
