"""Linear layer on a frozen NF4 weight, with an input gradient and nothing else.

    y = x W^T + bias,    dx = dy W,    W = nf4_dequantize(weight) in x's dtype, accumulated in fp32

Backward reads the 4-bit weight again: no dequantised copy and no activation is kept. The same W is
used both ways (bitsandbytes rounds it to the stored dtype in backward only).
"""

from __future__ import annotations

import torch
from torch import Tensor

from userip_fast.nf4 import DTYPES, NF4Weight
from userip_fast.ops._dispatch import resolve
from userip_fast.ops.nf4_dequantize import candidates, nf4_dequantize_reference


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; in fp32 on CPU, where 16 bits take a scalar path without bf16 instructions."""
    if a.device.type == "cpu" and a.dtype != torch.float32:
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def nf4_linear_reference(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    rows: int,
    cols: int,
    blocksize: int,
    bias: Tensor | None,
) -> Tensor:
    """The oracle of the forward pass: x [M, cols] -> [M, rows]."""
    weight = nf4_dequantize_reference(
        packed, absmax, nested_absmax, nested_map, offset, rows, cols, blocksize, x.dtype
    )
    y = _matmul(x, weight.T)
    return y if bias is None else y + bias.to(y.dtype)


def nf4_linear_grad_reference(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    rows: int,
    cols: int,
    blocksize: int,
) -> Tensor:
    """The oracle of the input gradient: grad [M, rows] -> [M, cols]."""
    weight = nf4_dequantize_reference(
        packed, absmax, nested_absmax, nested_map, offset, rows, cols, blocksize, grad.dtype
    )
    return _matmul(grad, weight)


@torch.library.custom_op("userip_fast::nf4_linear", mutates_args=())
def _nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    rows: int,
    cols: int,
    blocksize: int,
    bias: Tensor | None,
    impl: str,
) -> Tensor:
    if impl == "cpu":
        from userip_fast.ops import _nf4_cpu

        scales = (absmax, nested_absmax, nested_map, offset)
        return _nf4_cpu.linear(x, (packed, *scales), (rows, cols, blocksize), bias)
    assert impl == "reference", impl
    return nf4_linear_reference(
        x, packed, absmax, nested_absmax, nested_map, offset, rows, cols, blocksize, bias
    )


@_nf4_linear.register_fake
def _(x, packed, absmax, nested_absmax, nested_map, offset, rows, cols, blocksize, bias, impl):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], rows)


@torch.library.custom_op("userip_fast::nf4_linear_grad", mutates_args=())
def _nf4_linear_grad(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    rows: int,
    cols: int,
    blocksize: int,
    impl: str,
) -> Tensor:
    if impl == "cpu":
        from userip_fast.ops import _nf4_cpu

        scales = (absmax, nested_absmax, nested_map, offset)
        return _nf4_cpu.linear_grad(grad, (packed, *scales), (rows, cols, blocksize))
    assert impl == "reference", impl
    return nf4_linear_grad_reference(
        grad, packed, absmax, nested_absmax, nested_map, offset, rows, cols, blocksize
    )


@_nf4_linear_grad.register_fake
def _(grad, packed, absmax, nested_absmax, nested_map, offset, rows, cols, blocksize, impl):  # type: ignore[no-untyped-def]
    return grad.new_empty(grad.shape[0], cols)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[1:6])  # the stored weight itself: no new memory
    ctx.sizes, ctx.impl = inputs[6:9], inputs[10]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    dx = _nf4_linear_grad(grad.contiguous(), *ctx.saved_tensors, *ctx.sizes, ctx.impl)
    return dx, *[None] * 10


_nf4_linear.register_autograd(_backward, setup_context=_setup_context)


def nf4_linear(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """x W^T + bias with W frozen in NF4.

    Args:
        x: [..., K] float32, bfloat16 or float16, on the weight's device. Differentiable.
        weight: NF4 weight of shape (N, K).
        bias: [N] or None; frozen.
        impl: "auto", "cpu" or "reference".

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
    y = _nf4_linear(
        x.reshape(-1, cols), *weight.tensors(), rows, cols, weight.blocksize, bias, chosen
    )
    return y.view(*x.shape[:-1], rows)
