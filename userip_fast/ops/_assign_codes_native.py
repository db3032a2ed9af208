"""`assign_codes` in the compiled extension: csrc/cpu/assign_codes.cpp."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from userip_fast import _extension

_TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of csrc/cpu/assign_codes.h


@cache
def _isa() -> str:
    """The best instruction set of this processor; AVX-512 only where it is asked for.

    The AVX-512 code is compiled but has not been run on such a processor yet.
    """
    names: list[str] = _module().assign_codes_isas()
    wanted = os.environ.get("USERIP_FAST_AVX512") == "1"
    return next(name for name in names if wanted or name != "avx512")


def _module() -> Any:
    return _extension.load()


def assign_codes_cpu(
    x: Tensor,
    codewords: Tensor,
    sizes: Sequence[int],
    active: Tensor | None,
    normalize: bool,
    need_second: bool,
    need_stats: bool,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `assign_codes_reference`; `isa` is one of `_C.assign_codes_isas()`.

    Memory beside the outputs: the codebook packed once more, a few hundred KiB per thread, and for
    statistics at most 32 MiB or 8 times the codebook, whichever is more.
    """
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
    _module().assign_codes_cpu(
        isa=isa or _isa(),
        x=x.data_ptr(),
        type=_TYPE[x.dtype],
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
