"""`assign_codes` in the compiled extension: `csrc/{cpu,cuda}/assign_codes.*`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from userip_fast.core import _extension

_TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of csrc/cpu/assign_codes.h


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
    """As `assign_codes_reference`; `isa` is one of `_C.instruction_sets()["assign_codes"]`;
    None for the one in use.

    Memory beside the outputs: the codebook packed once more, 1 to 2 MiB per thread, and for
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
        isa=isa or "",
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


CUDA_CODES = 32  # most codes of the one-pass kernel


def why_not_cuda(x: Tensor, sizes: Sequence[int]) -> str | None:
    """None where the one-pass kernel can run this call, else the reason."""
    if x.device.type != "cuda":
        return f"x is on {x.device}"
    if x.dtype not in _TYPE or x.stride(2) != 1 or x.shape[1] == 0:
        return f"x must be fp32, bf16 or fp16 with rows and contiguous columns, is {x.dtype}"
    if max(sizes) > CUDA_CODES:
        return f"{max(sizes)} codes are more than {CUDA_CODES}"
    if _module() is None:
        return _extension.why_not()
    if not hasattr(_module(), "assign_codes_cuda"):
        return "userip_fast._C was built without its CUDA half"
    if _plan(x, max(sizes))[0] == 0:
        return f"codebook and sums for D = {x.shape[2]} do not fit on this chip"
    return None


def _plan(x: Tensor, size: int) -> list[int]:
    plan: list[int] = _module().assign_codes_cuda_plan(
        rows=x.shape[1], dim=x.shape[2], size=size, device=x.device.index
    )
    return plan


def assign_codes_cuda(
    x: Tensor,
    codewords: Tensor,
    sizes: Sequence[int],
    active: Tensor | None,
    normalize: bool,
    need_second: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `assign_codes_reference`, in one read of `x`; one launch per book."""
    books, rows, dim = x.shape
    words = codewords.float()
    words = torch.nn.functional.normalize(words, dim=1) if normalize else words.contiguous()
    half_norm = torch.linalg.vector_norm(words, dim=1, dtype=torch.float64).square().div(2).float()
    if active is not None:
        half_norm = half_norm.masked_fill(~active, torch.inf)
    new: Any = {"device": x.device}
    code_ids = torch.empty((books, rows), dtype=torch.int64, **new)
    distance = torch.empty((books, rows), **new)
    second = torch.empty((books, rows if need_second else 0), **new)
    counts = torch.empty(words.shape[0] if need_stats else 0, dtype=torch.int64, **new)
    sums = torch.empty((len(counts), dim), **new)
    first = 0
    for j, size in enumerate(sizes):
        book = slice(first, first + size)
        plan = _plan(x, size)
        groups = plan[1] if need_stats else 0
        partial_counts = torch.empty((groups, size), dtype=torch.int64, **new)
        partial_sums = torch.empty((groups, size, dim), **new)
        _module().assign_codes_cuda(
            plan=plan,
            x=x[j].data_ptr(),
            dtype=_TYPE[x.dtype],
            rows=rows,
            dim=dim,
            stride_row=x.stride(1),
            codewords=words[book].data_ptr(),
            half_norm=half_norm[book].data_ptr(),
            size=size,
            normalize=normalize,
            code_ids=code_ids[j].data_ptr(),
            sq_distance=distance[j].data_ptr(),
            second_sq_distance=second[j].data_ptr() if need_second else 0,
            partial_counts=partial_counts.data_ptr() if need_stats else 0,
            partial_sums=partial_sums.data_ptr() if need_stats else 0,
            device=x.device.index,
            stream=torch.cuda.current_stream(x.device).cuda_stream,
        )
        if need_stats:
            counts[book], sums[book] = partial_counts.sum(0), partial_sums.sum(0)
        first += size
    return code_ids, distance, second, counts, sums
