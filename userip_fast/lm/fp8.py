"""FP8 residency: two e4m3 copies of each frozen weight, and the gate that a load has to pass.

    y  = (x8 W8^T) sx sw + bias      W8 [N, K] with a scale per output row, x8 one per token
    dx = (g8 T8^T) sg st             T8 = W^T in e4m3 [K, N], a scale per row of it; g8 per token

Two copies, because 8-bit tensor cores read both operands along the summed axis. The gradient's
product promotes its sums to fp32 (`use_fast_accum=False`): Hopper adds e4m3 products in about 14
bits otherwise. On CUDA the products are `torch._scaled_mm` (sm_89 and later); elsewhere the same
roundings are followed by an fp32 product, which is for tests and for the gate, not for speed.

It is lossy, so `lm.residency=fp8` is refused where the gate finds that the LM reads users otherwise
than the unrounded weights do, and `auto` takes it only where, beside that, a step was faster in it
on this device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from userip_fast.core.errors import UnavailableError, UnsupportedError, UserIPError
from userip_fast.lm.layers import layer_of
from userip_fast.lm.nf4 import swap_modules
from userip_fast.ops.packed_block import cast_rows

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears of one input


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] to e4m3 [M, K] and the fp32 scale [M] of each row; a row of zeros has scale 1."""
    x = x if x.stride(1) == 1 else x.contiguous()  # tensor cores read row by row
    return cast_rows(x, "triton" if x.is_cuda or x.is_meta else "reference")


def scaled_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """a [M, K] b^T [K, N], each row of either scaled: [M, N] in `dtype`, sums in fp32.

    Args:
        fast: On CUDA, add up in the tensor core's own precision.
    """
    if a.is_cuda or a.is_meta:
        out = torch._scaled_mm(
            a, b.t(), a_scale[:, None], b_scale[None], out_dtype=torch.bfloat16, use_fast_accum=fast
        )
        return out.to(dtype)
    return (a.float() @ b.float().t()).mul_(a_scale[:, None]).mul_(b_scale).to(dtype)


class FP8Linear(nn.Module):
    """See the module. Only the input gets a gradient, and nothing is saved for it.

    Linears of one input are rounded together: their rows of W^T share a scale, so that their token
    gradients go through one product (`userip_fast.lm.products`). Each is still a linear of its own.

    Args:
        weight: [N, K] dense.
        bias: [N] or None.
        rounded: W and W^T with their scales, where they were rounded with others.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rounded: tuple[Tensor, ...] | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        if rounded is None:
            rounded = (*quantize_rows(weight), *quantize_rows(weight.t().contiguous()))
        names = ("forward_weight", "forward_scale", "backward_weight", "backward_scale")
        for name, tensor in zip(names, rounded, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach())

    def dense_weight(self) -> Tensor:
        """[N, K], the values that the forward pass multiplies with."""
        values: Any = self.forward_weight
        scale: Any = self.forward_scale
        return (values.float() * scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        y: Tensor = _FP8Product.apply(x.reshape(-1, self.in_features), self)  # type: ignore[no-untyped-call]
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


class _FP8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any) -> Tensor:
        ctx.linear = linear
        weight = linear.forward_weight, linear.forward_scale
        return scaled_product(*quantize_rows(x), *weight, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight = ctx.linear.backward_weight, ctx.linear.backward_scale
        return scaled_product(*quantize_rows(grads[0]), *weight, grads[0].dtype, fast=False), None


def wanted(name: str, module: nn.Module) -> bool:
    """Whether it is a dense linear of a layer."""
    return type(module) is nn.Linear and layer_of(name) != name


def why_not(model: nn.Module) -> UserIPError | None:
    """What `convert_linears` would raise."""
    linears: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if wanted(n, m)]
    for name, module in linears:
        weight = module.weight
        if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
            return UnavailableError(
                "lm.residency=fp8 needs a GPU with FP8 tensor cores (compute capability 8.9 or "
                f"later), this one has {torch.cuda.get_device_capability(weight.device)}"
            )
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            return UnsupportedError(
                f"lm.residency=fp8 needs weights whose sizes are multiples of 16, {name} is "
                f"{tuple(weight.shape)}; set lm.residency=resident"
            )
    if not linears:
        return UnsupportedError(
            "lm.residency=fp8 finds no linear in this model's layers; set lm.residency=resident"
        )
    return None


def convert_linears(model: nn.Module) -> int:
    """Replaces the dense linears of the model's layers by `FP8Linear`, in place; how many.

    Raises:
        UnavailableError: The GPU has no FP8 tensor cores.
        UnsupportedError: A weight's sizes are not multiples of 16, which they need, or there is no
            linear to convert.
    """
    if (error := why_not(model)) is not None:
        raise error
    count = 0
    for parent in list(model.modules()):
        for names in _TOGETHER:
            linears = [getattr(parent, n, None) for n in names]
            if all(type(m) is nn.Linear for m in linears):
                for name, linear in zip(names, _rounded_together(linears), strict=True):
                    setattr(parent, name, linear)
                count += len(names)
    return count + swap_modules(model, wanted, lambda m: FP8Linear(m.weight, m.bias))


def _rounded_together(linears: Sequence[Any]) -> list[FP8Linear]:
    """Linears of one input; their buffers are parts of joined ones."""
    sizes = [m.out_features for m in linears]
    whole = torch.cat([m.weight.detach() for m in linears])
    values, scale = quantize_rows(whole)
    back, back_scale = quantize_rows(whole.t().contiguous())
    parts = zip(
        torch.split(values, sizes), torch.split(scale, sizes), torch.split(back, sizes, 1),
        strict=True,
    )  # fmt: skip
    return [
        FP8Linear(m.weight, m.bias, (v, s, b, back_scale)).train(m.training)
        for m, (v, s, b) in zip(linears, parts, strict=True)
    ]


def joined_weights(linears: Sequence[Any]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """W [sum N, K] and W^T [K, sum N] with their scales, of linears that were rounded together."""
    first = linears[0]
    rows = sum(m.out_features for m in linears)
    forward, backward = first.forward_weight, first.backward_weight
    if len(linears) == 1:
        return (forward, first.forward_scale), (backward, first.backward_scale)
    columns = first.in_features
    return (
        (
            forward.as_strided((rows, columns), (columns, 1), forward.storage_offset()),
            first.forward_scale.as_strided((rows,), (1,), first.forward_scale.storage_offset()),
        ),
        (
            backward.as_strided((columns, rows), (rows, 1), backward.storage_offset()),
            first.backward_scale,
        ),
    )
