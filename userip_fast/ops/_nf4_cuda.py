"""`nf4_dequantize` on CUDA in C++ (csrc/cuda/nf4.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from userip_fast.core import _extension

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(*tensors: Tensor | None) -> str | None:
    """None where this implementation can run on such tensors, else the reason."""
    if any(t is not None and t.device.type != "cuda" for t in tensors):
        return "a tensor is not on a CUDA device"
    module = _extension.load()
    if module is None:
        return _extension.why_not()
    if not hasattr(module, "nf4_dequantize_cuda"):
        return "userip_fast._C was built without its CUDA half"
    return None


def dequantize(
    tensors: tuple[Tensor | None, ...], sizes: tuple[int, int, int], out: Tensor
) -> None:
    """Writes the weight to `out` [rows, cols], in one launch on the current stream."""
    kept = [None if t is None else t.contiguous() for t in tensors]
    packed = kept[0]
    assert packed is not None
    if packed.data_ptr() % 4:  # a view into a file's bytes may start anywhere
        kept[0] = packed = packed.clone()
    module: Any = _extension.load()
    module.nf4_dequantize_cuda(
        [0 if t is None else t.data_ptr() for t in kept],
        sizes,
        out.data_ptr(),
        _DTYPE[out.dtype],
        packed.device.index,
        torch.cuda.current_stream(packed.device).cuda_stream,
    )
