"""`userip_fast.ops.assign_codes` by Triton: few codes in one read of x, many by a GEMM.

    assign_codes_shared   the codebook made ready, distances formed directly
    assign_codes_few      few codes of bf16 vectors, sm_90
    assign_codes_many     all others
    assign_codes_sums     counts and sums

x [J, N, D] fp32, bf16 or fp16, any strides; codewords [sum K, D]. Products are accumulated in fp32.
The variant by tensor descriptors (TMA, sm_90) and the one by pointers are the same text.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from userip_fast.kernels.assign_codes_few import assign_few
from userip_fast.kernels.assign_codes_many import rank
from userip_fast.kernels.assign_codes_shared import prepare
from userip_fast.kernels.assign_codes_sums import count_and_sum

from userip_fast.ops.assign_codes import Problem

FEW = 64  # most codes of `assign_few`


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
    problem: Problem, *, need_distance: bool = True, tma: bool | None = None,
    slices: int | None = None, few: bool | None = None,
) -> Found:  # fmt: skip
    """Three kernels without statistics, and one wait, in `Found.usable`.

    Memory beside the outputs: the codebook in fp32 and in bf16, 16 to 128 N bytes, and for
    statistics 16 N bytes and a second codebook or 1/128 of x, whichever is more.

    Args:
        problem: On a CUDA device.
        need_distance: Else there are ids alone (and statistics).
        tma: By tensor descriptors or by pointers; None: by `takes_tma`.
        slices: How many parts of a codebook go over the same rows at a time; None: as L2 asks.
        few: Whether `assign_few` ranks; None: where it can.
    """
    x, codewords, sizes, active, normalize, need_second, need_stats = problem
    books, rows, dim = x.shape
    total = codewords.shape[0]
    codewords = codewords.contiguous()
    need_second &= need_distance
    ids = torch.empty((books, rows), dtype=torch.int64, device=x.device)
    near = torch.empty((books, rows if need_distance else 0), device=x.device)
    far = torch.empty((books, rows if need_second else 0), device=x.device)
    kept = total if need_stats else 0
    made = torch.zeros if rows == 0 else torch.empty
    counts = made(kept, dtype=torch.int64, device=x.device)
    sums = made((kept, dim), device=x.device)
    out = ids, near, far, counts, sums
    tma = takes_tma(x) if tma is None else tma
    if few is None:  # spills on older chips
        few = tma and max(sizes) <= FEW and not (normalize or need_second)
    bounds = [0, *accumulate(sizes)]
    books_of_words = [slice(a, b) for a, b in pairwise(bounds)]
    if rows and few:
        found = []
        for j, part in enumerate(books_of_words):
            mask = None if active is None else active[part]
            of_book = (x[j], codewords[part], mask, ids[j], near[j])
            stats, flags = assign_few(*of_book, normalize, need_stats, tma)
            if stats is not None:
                counts[part], sums[part] = stats
            found.append(flags)
        return Found(out, found[0] if len(found) == 1 else torch.stack(found).amax(0))
    parts = int(x.dtype == torch.bfloat16)
    words = prepare(codewords, active, normalize, total, parts, x.dtype)
    if rows == 0:
        return Found(out, None, bool((words.mark & 1).any()))
    norm = rank(x, words, sizes, normalize, tma, slices, ids, near, far)
    if need_stats:
        for j, part in enumerate(books_of_words):
            of_rows = norm[j] if normalize else None
            counts[part], sums[part] = count_and_sum(x[j], ids[j], of_rows, sizes[j])
    return Found(out, words.flags)
