"""`assign_codes` in the compiled extension: csrc/cpu/assign_codes.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from userip_fast.core import _extension
from userip_fast.ops._dispatch import ELEMENT_TYPES

if TYPE_CHECKING:
    from userip_fast.ops.assign_codes import Assignment, Problem


def assign_codes(problem: Problem, isa: str = "") -> Assignment:
    """`isa` is one of `_C.instruction_sets()["assign_codes"]`, or empty for the one in use.

    Memory beside the outputs: the codebook packed once more, 1 to 2 MiB per thread, and for
    statistics at most 32 MiB or 8 times the codebook, whichever is more.
    """
    x, codewords, sizes, active, normalize, need_second, need_stats = problem
    books, rows, dim = x.shape
    words = codewords.float()
    words = torch.nn.functional.normalize(words, dim=1) if normalize else words
    words = words.contiguous()
    mask = None if active is None else active.contiguous()
    total = words.shape[0] if need_stats else 0
    code_ids = torch.empty((books, rows), dtype=torch.int64)
    distance = torch.empty((books, rows))
    second = torch.empty((books, rows if need_second else 0))
    counts = torch.empty(total, dtype=torch.int64)
    sums = torch.empty((total, dim))
    module = _extension.load()
    assert module is not None
    module.assign_codes_cpu(
        isa=isa,
        x=x.data_ptr(),
        type=ELEMENT_TYPES[x.dtype],
        rows=rows,
        dim=dim,
        stride_book=x.stride(0),
        stride_row=x.stride(1),
        stride_dim=x.stride(2),
        codewords=words.data_ptr(),
        sizes=list(sizes),
        active=0 if mask is None else mask.data_ptr(),
        normalize=normalize,
        code_ids=code_ids.data_ptr(),
        sq_distance=distance.data_ptr(),
        second_sq_distance=second.data_ptr() if need_second else 0,
        counts=counts.data_ptr() if need_stats else 0,
        sums=sums.data_ptr() if need_stats else 0,
    )
    return code_ids, distance, second, counts, sums
