"""x W^T in fp32 on the CPU, by whichever of torch's two libraries is the faster here.

torch hands fp32 products to MKL, whose AVX-512 code serves Intel's processors only: on an AMD Zen 5
oneDNN is twice as fast at the same precision. `isa.py` measures both. Sums are in another order, so
results differ by rounding between the two, as they do between processors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from userip_fast.ops import isa


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] weight^T [K, N] + bias [N], without a gradient. `weight` [N, K] may be strided."""
    fp32 = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if fp32 and len(x) and isa.settle().get(isa.PRODUCTS) == "onednn":
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return product(grads[0].contiguous(), ctx.weight.t()), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] weight^T [K, N] + bias, differentiable in x alone; nothing is saved for it."""
    y: Tensor = _FrozenProduct.apply(x.reshape(-1, weight.shape[1]), weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[0])
