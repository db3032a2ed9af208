"""`nf4_dequantize` and `nf4_linear` on CPU: decoding in C++ (csrc/cpu/nf4.cpp), products in fp32.

Few rows are multiplied while the decoded tile is in L1. Many rows, and the gradient, dequantise a
block of the weight into scratch of at most `_SCRATCH_BYTES` and hand it to the BLAS that a dense
layer uses. The weight is first rounded to the dtype of the activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from userip_fast.ops._dispatch import ELEMENT_TYPES, extension
from userip_fast.ops._products import product
from userip_fast.ops.nf4_format import Stored

# Up to this many rows the fused kernel is the faster: for a 4096 x 4096 weight on one Zen 3 core
# 10.7 ms against 18.1 at 16 rows and 23.0 against 25.5 at 32; about even at 64, slower beyond.
FUSED_ROWS = 32
_SCRATCH_BYTES = 16 << 20


class _Weight:
    """One weight as the extension wants it, kept alive for the call."""

    def __init__(self, weight: Stored) -> None:
        self.kept = [None if t is None else t.contiguous() for t in weight.tensors]
        self.told = [0 if t is None else t.data_ptr() for t in self.kept], weight.sizes

    def block(self, r0: int, r1: int, c0: int, c1: int, out: Tensor, dtype: torch.dtype) -> Tensor:
        """W[r0:r1, c0:c1], rounded to `dtype`, written to the front of `out`."""
        as_float = out.dtype == torch.float32
        of = ELEMENT_TYPES[dtype], as_float
        extension("nf4_dequantize", *self.told, r0, r1, c0, c1, out, *of)
        return out[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0)


def dequantize(weight: Stored, out: Tensor) -> None:
    """Writes the whole weight to `out` [rows, cols]."""
    _Weight(weight).block(0, weight.rows, 0, weight.cols, out.view(-1), out.dtype)


def linear(x: Tensor, weight: Stored, bias: Tensor | None) -> Tensor:
    """x [M, cols] -> [M, rows] in x's dtype."""
    rows, cols, _ = weight.sizes
    known, batch = _Weight(weight), x.shape[0]
    wide = x.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = torch.empty(batch, rows)
    if batch <= FUSED_ROWS:
        extension("nf4_linear", *known.told, wide, cols, batch, bias, y, ELEMENT_TYPES[x.dtype])
        return y.to(x.dtype)
    step = max(1, min(rows, _SCRATCH_BYTES // (4 * cols)))
    scratch = torch.empty(step * cols)
    for r0 in range(0, rows, step):
        r1 = min(rows, r0 + step)
        block = known.block(r0, r1, 0, cols, scratch, x.dtype)
        part = product(wide, block, None if bias is None else bias[r0:r1])
        if r1 - r0 == rows:
            return part.to(x.dtype)
        y[:, r0:r1] = part
    return y.to(x.dtype)


def linear_grad(grad: Tensor, weight: Stored) -> Tensor:
    """grad [M, rows] -> [M, cols] in grad's dtype."""
    rows, cols, _ = weight.sizes
    known, batch = _Weight(weight), grad.shape[0]
    wide = grad.float().contiguous()
    dx = torch.empty(batch, cols)
    # Blocks of columns: each is written once, where blocks of rows would be summed M x cols times.
    step = max(1, min(cols, _SCRATCH_BYTES // (4 * rows)))
    scratch = torch.empty(rows * step)
    for c0 in range(0, cols, step):
        c1 = min(cols, c0 + step)
        part = product(wide, known.block(0, rows, c0, c1, scratch, grad.dtype).t())
        if c1 - c0 == cols:
            return part.to(grad.dtype)
        dx[:, c0:c1] = part
    return dx.to(grad.dtype)
