"""Linear layer on a frozen NF4 weight, with an input gradient and nothing else.

    y = x W^T + bias,    dx = dy W,    W = nf4_dequantize(weight) in x's dtype, accumulated in fp32

Backward reads the 4-bit weight again: no dequantised copy and no activation is kept. The same W is
used both ways (bitsandbytes rounds it to the stored dtype in backward only).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from userip_fast.ops._dispatch import resolve
from userip_fast.ops.nf4_dequantize import candidates, run
from userip_fast.ops.nf4_format import DTYPES, NF4Weight

Weights = tuple[Tensor | None, ...]  # NF4Weight.tensors()
Sizes = tuple[int, int, int]  # (rows, cols, blocksize)


def _forward(impl: str, x: Tensor, weight: Weights, sizes: Sizes, bias: Tensor | None) -> Tensor:
    if impl == "cpu":
        from userip_fast.ops import _nf4_cpu

        return _nf4_cpu.linear(x, weight, sizes, bias)
    dense = run(impl, weight, sizes, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if x.device.type == "cpu":  # without bf16 instructions a CPU takes a scalar path in 16 bits
        wide = None if bias is None else bias.float()
        return F.linear(x.float(), dense.float(), wide).to(x.dtype)
    return F.linear(x, dense, bias)


def _input_gradient(impl: str, grad: Tensor, weight: Weights, sizes: Sizes) -> Tensor:
    if impl == "cpu":
        from userip_fast.ops import _nf4_cpu

        return _nf4_cpu.linear_grad(grad, weight, sizes)
    dense = run(impl, weight, sizes, grad.dtype)
    if grad.device.type == "cpu":
        return (grad.float() @ dense.float()).to(grad.dtype)
    return grad @ dense


def nf4_linear_reference(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """The oracle of the forward pass: x [M, K] -> [M, N]."""
    return _forward("reference", x, weight.tensors(), (*weight.shape, weight.blocksize), bias)


def nf4_linear_grad_reference(grad: Tensor, weight: NF4Weight) -> Tensor:
    """The oracle of the input gradient: grad [M, N] -> [M, K]."""
    return _input_gradient("reference", grad, weight.tensors(), (*weight.shape, weight.blocksize))


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
    weight = (packed, absmax, nested_absmax, nested_map, offset)
    return _forward(impl, x, weight, (rows, cols, blocksize), bias)


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
    weight = (packed, absmax, nested_absmax, nested_map, offset)
    return _input_gradient(impl, grad, weight, (rows, cols, blocksize))


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
    y = _nf4_linear(
        x.reshape(-1, cols), *weight.tensors(), rows, cols, weight.blocksize, bias, chosen
    )
    return y.view(*x.shape[:-1], rows)
