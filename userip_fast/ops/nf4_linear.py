"""Linear layer on a frozen NF4 weight, with an input gradient and nothing else.

    y = x W^T + bias,    dx = dy W,    W = nf4_dequantize(weight) in x's dtype, accumulated in fp32

Backward reads the 4-bit weight again: no dequantised copy and no activation is kept. The same W is
used both ways (bitsandbytes rounds it to the stored dtype in backward only).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from userip_fast.ops._dispatch import resolve
from userip_fast.ops._operator import differentiable, operator
from userip_fast.ops.nf4_dequantize import candidates, run
from userip_fast.ops.nf4_format import DTYPES, NF4Weight, Stored


def _product(x: Tensor, weight: Stored, bias: Tensor | None, impl: str) -> Tensor:
    dense = run(weight, x.dtype, impl)
    bias = None if bias is None else bias.to(x.dtype)
    if x.device.type == "cpu":  # without bf16 instructions a CPU takes a scalar path in 16 bits
        wide = None if bias is None else bias.float()
        return F.linear(x.float(), dense.float(), wide).to(x.dtype)
    return F.linear(x, dense, bias)


def _gradient_product(grad: Tensor, weight: Stored, impl: str) -> Tensor:
    dense = run(weight, grad.dtype, impl)
    if grad.device.type == "cpu":
        return (grad.float() @ dense.float()).to(grad.dtype)
    product: Tensor = grad @ dense
    return product


def reference(x: Tensor, weight: Stored, bias: Tensor | None) -> Tensor:
    """The oracle: x [M, K] -> [M, N]."""
    return _product(x, weight, bias, "reference")


def gradient_reference(grad: Tensor, weight: Stored) -> Tensor:
    """The oracle of the input gradient: grad [M, N] -> [M, K]."""
    return _gradient_product(grad, weight, "reference")


def nf4_linear_reference(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """The oracle of the forward pass: x [M, K] -> [M, N]."""
    return reference(x, weight.stored(), bias)


@operator("nf4_linear", reference, fake=lambda x, weight, *_: x.new_empty(len(x), weight.rows))
def _forward(x: Tensor, weight: Stored, bias: Tensor | None, impl: str) -> Tensor:
    if impl == "cpu":
        from userip_fast.ops import _nf4_cpu

        return _nf4_cpu.linear(x, weight, bias)
    return _product(x, weight, bias, impl)


@operator(
    "nf4_linear_grad",
    gradient_reference,
    fake=lambda grad, weight, impl: grad.new_empty(len(grad), weight.cols),
)
def _input_gradient(grad: Tensor, weight: Stored, impl: str) -> Tensor:
    if impl == "cpu":
        from userip_fast.ops import _nf4_cpu

        return _nf4_cpu.linear_grad(grad, weight)
    return _gradient_product(grad, weight, impl)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, ctx.impl = inputs
    ctx.save_for_backward(*weight.tensors)  # the stored weight itself: no new memory
    ctx.sizes = weight.sizes


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    weight = Stored(*ctx.saved_tensors, *ctx.sizes)
    return (_input_gradient(grad.contiguous(), weight, ctx.impl),)


_linear = differentiable(_forward, _setup_context, _backward)


def nf4_linear(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """x W^T + bias with W frozen in NF4.

    Args:
        x: [..., K] float32, bfloat16 or float16, on the weight's device. Differentiable.
        weight: NF4 weight of shape (N, K).
        bias: [N] or None; frozen.
        impl: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: A shape, dtype or device breaks the rules above, or `bias` requires grad.
    """
    rows, cols = weight.shape
    if x.dim() < 1 or x.shape[-1] != cols:
        raise ValueError(f"nf4_linear: x must be [..., {cols}], got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"nf4_linear: x must be one of {DTYPES}, got {x.dtype}")
    if x.device != weight.packed.device:
        raise ValueError(f"nf4_linear: x is on {x.device}, the weight on {weight.packed.device}")
    if bias is not None and (bias.shape != (rows,) or bias.requires_grad):
        raise ValueError(
            f"nf4_linear: bias must be [{rows}] and frozen, got {tuple(bias.shape)} with "
            f"requires_grad={bias.requires_grad}"
        )
    chosen = resolve("nf4_linear", impl, candidates(weight.packed))
    y: Tensor = _linear(x.reshape(-1, cols), weight.stored(), bias, chosen)
    return y.view(*x.shape[:-1], rows)
